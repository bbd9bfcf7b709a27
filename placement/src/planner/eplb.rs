//! EPLB, DeepSeek's expert parallelism load balancer, exactly.
//!
//! In: rows per logical expert and the numbers of slots, groups, nodes and devices. Out: which logical expert lies in which
//! physical slot. Never here: names, memory, what lay where before, or a panic; [`policy`] makes a plan of it.
//!
//! The algorithm is that of <https://github.com/deepseek-ai/EPLB>. It packs expert groups onto nodes, gives spare slots
//! inside each node to the experts with most rows per replica, and packs replicas onto devices. Weights are `f32`, as there.
//! Where weights tie, the original leaves the order to the tensor library; here the lower index comes first.

pub mod policy;

/// What the algorithm cannot do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Precondition {
    /// A count that must not be zero.
    #[error("the number of {0} is 0")]
    Zero(&'static str),
    /// A count that must divide another.
    #[error("{of} {of_what} cannot be shared evenly among {among} {among_what}")]
    Indivisible {
        /// What is shared.
        of: usize,
        /// Its name.
        of_what: &'static str,
        /// Among how many.
        among: usize,
        /// Their name.
        among_what: &'static str,
    },
    /// Fewer slots than experts.
    #[error("{slots} slots cannot hold {experts} experts")]
    TooFewSlots {
        /// Physical slots.
        slots: usize,
        /// Logical experts.
        experts: usize,
    },
    /// A row of another length than the first.
    #[error("row {row} has {found} weights, the first has {expected}")]
    Ragged {
        /// Its index.
        row: usize,
        /// Its length.
        found: usize,
        /// That of the first row.
        expected: usize,
    },
    /// A weight that is negative or not a number.
    #[error("the weight of item {item} in row {row} is negative or not finite")]
    Weight {
        /// The row's index.
        row: usize,
        /// The item's index in it.
        item: usize,
    },
}

/// Items put into packs, each row for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    /// Per row and item, its pack.
    pub pack: Vec<Vec<usize>>,
    /// Per row and item, how many items were in that pack before it.
    pub rank: Vec<Vec<usize>>,
}

/// Experts replicated into slots, each row for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replication {
    /// Per row and slot, the expert in it.
    pub phy2log: Vec<Vec<usize>>,
    /// Per row and slot, which replica of its expert it is, from 0.
    pub rank: Vec<Vec<usize>>,
    /// Per row and expert, how many replicas it has.
    pub logcnt: Vec<Vec<usize>>,
}

/// Where every expert lies. Slot `p` belongs to device `p / (slots / devices)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Per layer and slot, the expert in it.
    pub phy2log: Vec<Vec<usize>>,
    /// Per layer and expert, its slots by rank. The original pads these with -1 to equal lengths.
    pub log2phy: Vec<Vec<Vec<usize>>>,
    /// Per layer and expert, how many replicas it has.
    pub logcnt: Vec<Vec<usize>>,
    /// Per layer and slot, which replica of its expert it is, from 0.
    pub rank: Vec<Vec<usize>>,
}

/// Puts the items of each row into `packs` packs of equally many items: heaviest first, each into the lightest pack that is
/// not full, the lowest such pack where several are as light.
pub fn balanced_packing(weight: &[Vec<f32>], packs: usize) -> Result<Packing, Precondition> {
    let items = check_rows(weight)?;
    divides((items, "items"), (packs, "packs"))?;
    let each = items / packs;
    let (pack, rank) = weight.iter().map(|row| pack_row(row, packs, each)).unzip();
    Ok(Packing { pack, rank })
}

fn pack_row(weight: &[f32], packs: usize, each: usize) -> (Vec<usize>, Vec<usize>) {
    if each == 1 {
        return ((0..packs).collect(), vec![0; packs]);
    }
    let (mut pack, mut rank) = (vec![0; weight.len()], vec![0; weight.len()]);
    let (mut sum, mut filled) = (vec![0f32; packs], vec![0; packs]);
    for item in heaviest_first(weight) {
        let open = (0..packs).filter(|candidate| filled[*candidate] < each);
        // Packs hold exactly as many items as there are, so one is open until the last item has its place.
        let Some(lightest) = open.min_by(|a, b| sum[*a].total_cmp(&sum[*b])) else { break };
        (pack[item], rank[item]) = (lightest, filled[lightest]);
        sum[lightest] += weight[item];
        filled[lightest] += 1;
    }
    (pack, rank)
}

fn heaviest_first(weight: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weight.len()).collect();
    order.sort_by(|a, b| weight[*b].total_cmp(&weight[*a]));
    order
}

/// Gives every expert of each row one of `slots` slots, and each further slot to the expert that has most rows per replica
/// by then, so that the heaviest replica is as light as can be.
pub fn replicate_experts(weight: &[Vec<f32>], slots: usize) -> Result<Replication, Precondition> {
    let experts = check_rows(weight)?;
    if slots < experts {
        return Err(Precondition::TooFewSlots { slots, experts });
    }
    let mut all = Replication { phy2log: Vec::new(), rank: Vec::new(), logcnt: Vec::new() };
    for row in weight {
        let mut phy2log: Vec<usize> = (0..experts).collect();
        let (mut rank, mut count) = (vec![0; experts], vec![1; experts]);
        for _ in experts..slots {
            let heaviest = |a: &usize, b: &usize| per_replica(row, &count, *a).total_cmp(&per_replica(row, &count, *b));
            // `max_by` returns the last of equals; reversed, that is the first.
            let Some(expert) = (0..experts).rev().max_by(heaviest) else { break };
            phy2log.push(expert);
            rank.push(count[expert]);
            count[expert] += 1;
        }
        all.phy2log.push(phy2log);
        all.rank.push(rank);
        all.logcnt.push(count);
    }
    Ok(all)
}

fn per_replica(weight: &[f32], count: &[usize], expert: usize) -> f32 {
    weight[expert] / count[expert] as f32
}

/// Places every layer's experts, each layer for itself. `weight` is rows per layer and expert, in any unit.
///
/// Hierarchical where `num_nodes` divides `num_groups`: a group's experts then lie on one node, which suits gates that
/// choose few groups per token. Global otherwise, which is the same with one group and one node. Two replicas of an expert
/// may lie on one device, and nothing stays where it was.
pub fn rebalance_experts(
    weight: &[Vec<f32>],
    num_replicas: usize,
    num_groups: usize,
    num_nodes: usize,
    num_gpus: usize,
) -> Result<Placement, Precondition> {
    let experts = check_rows(weight)?;
    for (count, name) in [(num_groups, "groups"), (num_nodes, "nodes"), (num_gpus, "devices")] {
        if count == 0 {
            return Err(Precondition::Zero(name));
        }
    }
    let hierarchical = num_groups.is_multiple_of(num_nodes);
    let (groups, nodes) = if hierarchical { (num_groups, num_nodes) } else { (1, 1) };
    divides((experts, "experts"), (groups, "groups"))?;
    divides((num_gpus, "devices"), (nodes, "nodes"))?;
    divides((num_replicas, "slots"), (num_gpus, "devices"))?;
    if num_replicas < experts {
        return Err(Precondition::TooFewSlots { slots: num_replicas, experts });
    }
    let mut placement = Placement { phy2log: vec![], log2phy: vec![], logcnt: vec![], rank: vec![] };
    for row in weight {
        place_layer(row, num_replicas, groups, nodes, num_gpus, &mut placement)?;
    }
    Ok(placement)
}

/// One layer of the hierarchical algorithm, appended to `placement`.
fn place_layer(
    weight: &[f32],
    slots: usize,
    groups: usize,
    nodes: usize,
    gpus: usize,
    placement: &mut Placement,
) -> Result<(), Precondition> {
    let (experts, slots_per_node, slots_per_gpu) = (weight.len(), slots / nodes, slots / gpus);
    let mlog2log = groups_onto_nodes(weight, groups, nodes)?;
    let inside: Vec<Vec<f32>> =
        mlog2log.chunks(experts / nodes).map(|node| node.iter().map(|log| weight[*log]).collect()).collect();
    let replicas = replicate_experts(&inside, slots_per_node)?;
    let loads = |node: usize| {
        let slots = replicas.phy2log[node].iter();
        slots.map(|mlog| per_replica(&inside[node], &replicas.logcnt[node], *mlog)).collect()
    };
    let packing = balanced_packing(&(0..nodes).map(loads).collect::<Vec<Vec<f32>>>(), gpus / nodes)?;

    let (mut phy2log, mut rank) = (vec![0; slots], vec![0; slots]);
    let mut log2phy = vec![Vec::new(); experts];
    for node in 0..nodes {
        // Slots of one expert come by rank, so each is pushed at the place its rank names.
        for phy in 0..slots_per_node {
            let (pack, in_pack) = (packing.pack[node][phy], packing.rank[node][phy]);
            let pphy = node * slots_per_node + pack * slots_per_gpu + in_pack;
            let log = mlog2log[node * (experts / nodes) + replicas.phy2log[node][phy]];
            (phy2log[pphy], rank[pphy]) = (log, replicas.rank[node][phy]);
            log2phy[log].push(pphy);
        }
    }
    placement.logcnt.push(log2phy.iter().map(Vec::len).collect());
    placement.phy2log.push(phy2log);
    placement.log2phy.push(log2phy);
    placement.rank.push(rank);
    Ok(())
}

/// The experts in the order of the nodes their groups are packed onto.
fn groups_onto_nodes(weight: &[f32], groups: usize, nodes: usize) -> Result<Vec<usize>, Precondition> {
    let size = weight.len() / groups;
    let loads: Vec<f32> = weight.chunks(size).map(|group| group.iter().sum()).collect();
    let packing = balanced_packing(&[loads], nodes)?;
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by_key(|group| (packing.pack[0][*group], packing.rank[0][*group]));
    Ok(order.into_iter().flat_map(|group| group * size..(group + 1) * size).collect())
}

/// The rows' common length.
fn check_rows(weight: &[Vec<f32>]) -> Result<usize, Precondition> {
    let expected = weight.first().map_or(0, Vec::len);
    if expected == 0 {
        return Err(Precondition::Zero("weights"));
    }
    for (row, weights) in weight.iter().enumerate() {
        if weights.len() != expected {
            return Err(Precondition::Ragged { row, found: weights.len(), expected });
        }
        if let Some(item) = weights.iter().position(|weight| !weight.is_finite() || *weight < 0.0) {
            return Err(Precondition::Weight { row, item });
        }
    }
    Ok(expected)
}

fn divides(
    (of, of_what): (usize, &'static str),
    (among, among_what): (usize, &'static str),
) -> Result<(), Precondition> {
    match among {
        0 => Err(Precondition::Zero(among_what)),
        _ if of.is_multiple_of(among) => Ok(()),
        _ => Err(Precondition::Indivisible { of, of_what, among, among_what }),
    }
}

#[cfg(test)]
mod tests;
