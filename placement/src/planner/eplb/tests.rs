//! EPLB against vectors computed with the original, and its properties over random loads.

use proptest::prelude::*;

use super::*;

const FIRST: [f32; 12] = [90., 132., 40., 61., 104., 165., 39., 4., 73., 56., 183., 86.];
const SECOND: [f32; 12] = [20., 107., 104., 64., 19., 197., 187., 157., 172., 86., 16., 27.];

fn solve(groups: usize) -> Placement {
    rebalance_experts(&[FIRST.to_vec(), SECOND.to_vec()], 16, groups, 2, 8).unwrap()
}

fn gpu_loads(weight: &[f32], placement: &Placement, layer: usize, gpus: usize) -> Vec<f64> {
    let slots = &placement.phy2log[layer];
    let load = |log: &usize| f64::from(weight[*log]) / placement.logcnt[layer][*log] as f64;
    slots.chunks(slots.len() / gpus).map(|gpu| gpu.iter().map(load).sum()).collect()
}

/// Maximum over mean, to three digits.
fn imbalance(loads: &[f64]) -> f64 {
    let mean = loads.iter().sum::<f64>() / loads.len() as f64;
    (loads.iter().copied().fold(0.0, f64::max) / mean * 1000.0).round() / 1000.0
}

/// (A), (C).
#[test]
fn hierarchical_equals_the_original() {
    let placement = solve(4);
    assert_eq!(
        placement.phy2log,
        [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    );
    assert_eq!(
        placement.rank,
        [[0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]]
    );
    assert_eq!(placement.logcnt, [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]);
    let loads = gpu_loads(&FIRST, &placement, 0, 8);
    assert_eq!(loads, [121.5, 86.5, 125., 113., 147.5, 131.5, 156., 152.]);
    assert_eq!(imbalance(&loads), 1.208);
    assert_eq!(imbalance(&gpu_loads(&SECOND, &placement, 1, 8)), 1.242);
    assert_eq!(placement.log2phy[0][10], [8, 10]);
}

/// (A).
#[test]
fn global_equals_the_original_twins_on_one_device_included() {
    let placement = solve(3);
    assert_eq!(
        placement.phy2log,
        [[10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1], [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7]]
    );
    assert_eq!(imbalance(&gpu_loads(&FIRST, &placement, 0, 8)), 1.073);
    assert_eq!(imbalance(&gpu_loads(&SECOND, &placement, 1, 8)), 1.19);
}

/// (D).
#[test]
fn one_item_per_pack_keeps_its_place() {
    let packing = balanced_packing(&[vec![1., 9., 5.]], 3).unwrap();
    assert_eq!((packing.pack, packing.rank), (vec![vec![0, 1, 2]], vec![vec![0, 0, 0]]));
}

/// (E).
#[test]
fn what_cannot_be_is_refused() {
    let even = vec![vec![1f32; 12]];
    let refused = |weight: &[Vec<f32>], [slots, groups, nodes, gpus]: [usize; 4]| {
        rebalance_experts(weight, slots, groups, nodes, gpus).unwrap_err().to_string()
    };
    for (sizes, said) in [
        ([16, 5, 5, 8], "12 experts cannot be shared evenly among 5 groups"),
        ([16, 4, 2, 5], "5 devices cannot be shared evenly among 2 nodes"),
        ([17, 4, 2, 8], "17 slots cannot be shared evenly among 8 devices"),
        ([8, 4, 2, 8], "8 slots cannot hold 12 experts"),
        ([16, 0, 2, 8], "the number of groups is 0"),
        ([16, 4, 0, 8], "the number of nodes is 0"),
        ([16, 4, 2, 0], "the number of devices is 0"),
    ] {
        assert_eq!(refused(&even, sizes), said);
    }
    assert_eq!(refused(&[], [16, 4, 2, 8]), "the number of weights is 0");
    let ragged = [vec![1.; 12], vec![1.; 11]];
    assert_eq!(refused(&ragged, [16, 4, 2, 8]), "row 1 has 11 weights, the first has 12");
    let mut odd = even;
    odd[0][3] = f32::NAN;
    assert_eq!(refused(&odd, [16, 4, 2, 8]), "the weight of item 3 in row 0 is negative or not finite");
    assert!(balanced_packing(&[vec![1.; 4]], 3).is_err());
    assert!(replicate_experts(&[vec![1.; 4]], 3).is_err());
}

/// Numbers that fit together: groups, experts per group, nodes, devices per node, slots per device, and whether nodes divide.
fn sizes() -> impl Strategy<Value = [usize; 5]> {
    (1usize..5, 1usize..4, 1usize..5, 1usize..4, 1usize..4).prop_map(|(nodes, per_node, size, gpus, slots)| {
        let (groups, gpus) = (nodes * per_node, nodes * gpus);
        let experts = groups * size;
        let least = experts.div_ceil(gpus);
        [experts, groups, nodes, gpus, gpus * (least + slots - 1)]
    })
}

proptest! {
    /// (B), (C).
    #[test]
    fn every_placement_is_whole([experts, groups, nodes, gpus, slots] in sizes(), off in 0usize..2,
                                weights in prop::collection::vec(prop::collection::vec(0u32..10_000, 96), 1..4)) {
        let weight: Vec<Vec<f32>> =
            weights.iter().map(|row| row[..experts].iter().map(|rows| *rows as f32).collect()).collect();
        // Off by one group, most numbers fit no longer: global then.
        let given = groups + off;
        let placement = rebalance_experts(&weight, slots, given, nodes, gpus);
        let global = !given.is_multiple_of(nodes);
        prop_assume!(global || experts.is_multiple_of(given));
        let placement = placement.unwrap();
        for layer in 0..weight.len() {
            let (phy2log, rank) = (&placement.phy2log[layer], &placement.rank[layer]);
            let (log2phy, logcnt) = (&placement.log2phy[layer], &placement.logcnt[layer]);
            prop_assert_eq!((phy2log.len(), rank.len(), logcnt.iter().sum::<usize>()), (slots, slots, slots));
            prop_assert!(logcnt.iter().all(|count| *count >= 1));
            for (log, places) in log2phy.iter().enumerate() {
                prop_assert_eq!(places.len(), logcnt[log]);
                for (nth, phy) in places.iter().enumerate() {
                    prop_assert_eq!((phy2log[*phy], rank[*phy]), (log, nth));
                }
            }
            if !global {
                let node = |log: usize| log2phy[log].iter().map(|phy| phy / (slots / nodes));
                for group in 0..given {
                    let size = experts / given;
                    let mut on: Vec<usize> = (group * size..(group + 1) * size).flat_map(node).collect();
                    on.dedup();
                    prop_assert_eq!(on.len(), 1, "a group stays on one node");
                }
            }
        }
    }

    /// (D).
    #[test]
    fn packs_are_equally_full_and_ranks_count_up(rows in prop::collection::vec(prop::collection::vec(0u32..1000, 24), 1..4),
                                                 packs in prop::sample::select(vec![1usize, 2, 3, 4, 6, 8, 12, 24])) {
        let weight: Vec<Vec<f32>> = rows.iter().map(|row| row.iter().map(|rows| *rows as f32).collect()).collect();
        let packing = balanced_packing(&weight, packs).unwrap();
        for (pack, rank) in packing.pack.iter().zip(&packing.rank) {
            let mut places: Vec<_> = pack.iter().zip(rank).collect();
            places.sort();
            let expected: Vec<_> = (0..packs).flat_map(|pack| (0..24 / packs).map(move |rank| (pack, rank))).collect();
            prop_assert_eq!(places, expected.iter().map(|(pack, rank)| (pack, rank)).collect::<Vec<_>>());
        }
    }
}
