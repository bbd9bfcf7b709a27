//! The planner `eplb`: DeepSeek's placement as a plan.
//!
//! In: a [`Problem`] whose workers are equal, and the gate's number of expert groups. Out: the plan EPLB makes of it. Never
//! here: regard for what lies where. It moves nearly everything each time, so it is for a first plan, and to measure others
//! against; `balanced` is the planner to run.
//!
//! Preconditions: `replicas` is 1 (EPLB places spare copies for speed, none for safety), speeds are within a fifth of
//! the fastest, and every worker has room for its slots. Slots per layer are `experts + redundant`, rounded down to a multiple
//! of the workers. Nodes are hosts, where all workers name theirs and every host has as many; one node otherwise.
//!
//! EPLB may put two replicas of an expert on one device. A worker gains nothing from a second copy of the same weights, so
//! the two collapse to one holder, which then carries that expert's rows once for each distinct holder, not for each slot.

use std::collections::BTreeMap;

use super::rebalance_experts;
use crate::ids::{ExpertId, LayerIdx, WorkerId};
use crate::plan::Plan;
use crate::planner::{Error, PlannerWorker, Problem, succession};

/// The name this planner signs with.
pub const POLICY: &str = "eplb";

/// Workers that are at least this fast, compared with the fastest, are its equals.
const EQUAL: f64 = 0.8;

/// The next plan, or `None` when the previous one already is the answer. `groups` is the gate's `n_group`, 1 where it has none.
/// Without a load every expert weighs the same.
pub fn plan(problem: &Problem<'_>, groups: usize, previous: Option<&Plan>) -> Result<Option<Plan>, Error> {
    problem.check()?;
    let (version, parent) = succession(previous)?;
    if problem.replicas != 1 {
        return Err(Error::OnlyOneReplica { replicas: problem.replicas });
    }
    let (experts, workers) = (problem.model.experts as usize, by_host(problem.workers));
    // More slots than one per expert and worker could only hold twins.
    let most = (experts + problem.redundant as usize).min(experts * workers.len());
    let (slots, nodes) = (most / workers.len() * workers.len(), nodes(&workers));
    check_equal(problem, slots / workers.len())?;

    let layers = if problem.model.moe_layers.is_empty() || experts == 0 {
        problem.model.moe_layers.iter().map(|layer| (*layer, Vec::new())).collect()
    } else {
        let placement = rebalance_experts(&weights(problem), slots, groups, nodes, workers.len())?;
        let holders = |slots: &Vec<usize>| {
            let mut holders: Vec<usize> =
                slots.iter().map(|slot| slot / (placement.phy2log[0].len() / workers.len())).collect();
            holders.sort_unstable();
            holders.dedup();
            holders.into_iter().map(|worker| workers[worker].id.clone()).collect()
        };
        let layer = |log2phy: &Vec<Vec<usize>>| log2phy.iter().map(holders).collect();
        problem.model.moe_layers.iter().copied().zip(placement.log2phy.iter().map(layer)).collect()
    };
    if previous.is_some_and(|plan| same(&plan.layers, &layers)) {
        return Ok(None);
    }
    let how = if nodes > 1 && groups.is_multiple_of(nodes) { "hierarchical" } else { "global" };
    let reason = format!("{how} EPLB, {} workers, {slots} slots per layer", workers.len());
    Ok(Some(Plan { version, parent, policy: POLICY.to_owned(), reason, layers }))
}

/// Whether two plans place the same, whatever the order of holders.
fn same(one: &BTreeMap<LayerIdx, Vec<Vec<WorkerId>>>, other: &BTreeMap<LayerIdx, Vec<Vec<WorkerId>>>) -> bool {
    let sorted = |layers: &BTreeMap<LayerIdx, Vec<Vec<WorkerId>>>| {
        let mut layers = layers.clone();
        layers.values_mut().flatten().for_each(|holders| holders.sort_unstable());
        layers
    };
    sorted(one) == sorted(other)
}

/// Workers of one host next to each other, as EPLB numbers devices.
fn by_host(workers: &[PlannerWorker]) -> Vec<&PlannerWorker> {
    let mut workers: Vec<&PlannerWorker> = workers.iter().collect();
    workers.sort_by_key(|worker| (&worker.locality.host, &worker.id));
    workers
}

fn nodes(workers: &[&PlannerWorker]) -> usize {
    let mut hosts = BTreeMap::new();
    for worker in workers {
        *hosts.entry(worker.locality.host.as_str()).or_insert(0) += 1;
    }
    let each = workers.len() / hosts.len().max(1);
    let alike = !hosts.contains_key("") && hosts.values().all(|workers| *workers == each);
    if alike { hosts.len() } else { 1 }
}

fn check_equal(problem: &Problem<'_>, slots_per_layer: usize) -> Result<(), Error> {
    let speeds = problem.workers.iter().filter_map(|worker| Some((worker.known_speed()?, &worker.id)));
    let by_speed = |a: &(f64, &WorkerId), b: &(f64, &WorkerId)| a.0.total_cmp(&b.0);
    if let (Some((least, slow)), Some((most, fast))) = (speeds.clone().min_by(by_speed), speeds.max_by(by_speed))
        && least < most * EQUAL
    {
        return Err(Error::UnequalSpeed { slow: slow.clone(), least, fast: fast.clone(), most });
    }
    let slots = slots_per_layer * problem.model.moe_layers.len();
    match problem.workers.iter().find(|worker| problem.room(worker) < slots) {
        Some(small) => Err(Error::NoRoom { worker: small.id.clone(), room: problem.room(small), slots }),
        None => Ok(()),
    }
}

/// Rows per layer and expert. A layer nothing is known of has equal weights.
fn weights(problem: &Problem<'_>) -> Vec<Vec<f32>> {
    let experts = 0..problem.model.experts;
    let layer = |layer: &LayerIdx| {
        // `Problem::check` bounds the experts by what a u16 counts.
        let rows = |expert: u32| problem.load.map_or(0, |load| load.rows(*layer, ExpertId(expert as u16)));
        let weights: Vec<f32> = experts.clone().map(|expert| rows(expert) as f32).collect();
        if weights.iter().all(|weight| *weight == 0.0) { vec![1.0; weights.len()] } else { weights }
    };
    problem.model.moe_layers.iter().map(layer).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lint;
    use crate::load::Load;
    use crate::planner::Rebalance;
    use crate::planner::balanced::fixtures::{model, worker, workers};
    use crate::state::{Locality, ModelIdentity};

    fn problem<'a>(
        model: &'a ModelIdentity,
        workers: &'a [PlannerWorker],
        redundant: u32,
        load: Option<&'a Load>,
    ) -> Problem<'a> {
        Problem { model, workers, replicas: 1, redundant, load, rebalance: Rebalance::No }
    }

    /// (A), (F).
    #[test]
    fn the_published_example_becomes_a_plan() {
        let model = model(2, 12);
        let hosts = ["x", "x", "x", "x", "y", "y", "y", "y"];
        let mut workers = workers(&[0; 8]);
        for (worker, host) in workers.iter_mut().zip(hosts) {
            worker.locality = Locality { host: host.into(), zone: String::new() };
        }
        let rows = [
            vec![90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            vec![20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ];
        let layers = model.moe_layers.iter().copied().zip(rows).collect();
        let load = Load { window: std::time::Duration::from_secs(60), layers };
        let problem = problem(&model, &workers, 4, Some(&load));
        let four = plan(&problem, 4, None).unwrap().unwrap();
        assert_eq!(four.reason, "hierarchical EPLB, 8 workers, 16 slots per layer");
        let holders = |plan: &Plan, expert| plan.holders(LayerIdx(1), ExpertId(expert)).to_vec();
        assert_eq!(holders(&four, 5), [workers[0].id.clone(), workers[1].id.clone()]);
        let three = plan(&problem, 3, None).unwrap().unwrap();
        assert_eq!(three.reason, "global EPLB, 8 workers, 16 slots per layer");
        assert_eq!(holders(&three, 1), [workers[7].id.clone()], "twins on one worker collapse");
        assert_eq!(plan(&problem, 3, Some(&three)).unwrap(), None);
    }

    /// (E).
    #[test]
    fn unequal_workers_are_refused() {
        let model = model(2, 12);
        let mut pair = workers(&[0, 0]);
        let solve = |workers: &[PlannerWorker], replicas| {
            plan(&Problem { replicas, ..problem(&model, workers, 0, None) }, 1, None)
        };
        assert_eq!(solve(&pair, 2), Err(Error::OnlyOneReplica { replicas: 2 }));
        (pair[0].speed, pair[1].speed) = (70.0, 100.0);
        assert!(matches!(solve(&pair, 1), Err(Error::UnequalSpeed { .. })));
        pair[0].speed = 90.0;
        assert!(solve(&pair, 1).is_ok());
        pair[1] = worker(1, 110);
        let small = pair[1].id.clone();
        assert_eq!(solve(&pair, 1), Err(Error::NoRoom { worker: small, room: 11, slots: 12 }));
        assert!(matches!(solve(&workers(&[0; 5]), 1), Err(Error::Eplb(_))));
    }

    proptest! {
        /// (F).
        #[test]
        fn its_plans_are_whole(layers in 0u32..4, experts in 1u32..20, count in 1usize..9, redundant in 0u32..20,
                               rows in prop::collection::vec(0u64..1000, 20)) {
            let model = model(layers, experts);
            let workers = workers(&vec![0; count]);
            let rows = model.moe_layers.iter().map(|layer| (*layer, rows[..experts as usize].to_vec())).collect();
            let load = Load { window: std::time::Duration::from_secs(60), layers: rows };
            let problem = problem(&model, &workers, redundant, Some(&load));
            match plan(&problem, 1, None) {
                Ok(plan) => prop_assert_eq!(lint::broken_invariant(&plan.unwrap(), &problem, None), None),
                Err(error) => prop_assert!(
                    layers > 0 && ((experts + redundant) as usize / count * count) < experts as usize, "{}", error),
            }
        }
    }
}
