//! What `conclave placement show` says of the load: the cluster's state comes in, and per layer how evenly its rows lie on the
//! workers and which experts have most of them goes out. Nothing is asked of anybody.

use conclave_placement::load::layer_balancedness;
use conclave_placement::{ClusterState, ExpertId, planner, policy};
use serde::Serialize;

use crate::terminal;

/// Experts of a layer that are named.
const BUSIEST: usize = 3;

/// The load of one layer.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct LayerLoad {
    layer: u32,
    rows_per_minute: u64,
    /// Mean over maximum of the workers' rows by speed, see the README of the placement crate.
    balancedness: f64,
    busiest: Vec<ExpertLoad>,
}

#[derive(Debug, PartialEq, Serialize)]
struct ExpertLoad {
    expert: u16,
    rows_per_minute: u64,
    holders: usize,
}

/// Of every layer that has rows; `None` while too little is known to plan by.
pub(super) fn report(state: &ClusterState) -> Option<Vec<LayerLoad>> {
    let (load, plan) = (policy::known_load(state)?, state.plan.as_deref()?);
    let balance = layer_balancedness(plan, &load, &planner::candidates(state));
    let layer = |(layer, balancedness)| {
        let rows = load.layers.get(&layer).map(Vec::as_slice).unwrap_or_default();
        let mut experts: Vec<(u16, u64)> = (0..=u16::MAX).zip(rows.iter().copied()).collect();
        experts.sort_by_key(|&(expert, rows)| (std::cmp::Reverse(rows), expert));
        let busiest = experts.into_iter().take(BUSIEST).map(|(expert, rows_per_minute)| {
            let holders = state.holders(layer, ExpertId(expert)).count();
            ExpertLoad { expert, rows_per_minute, holders }
        });
        LayerLoad { layer: layer.0, rows_per_minute: rows.iter().sum(), balancedness, busiest: busiest.collect() }
    };
    Some(balance.into_iter().map(layer).collect())
}

/// As a table.
pub(super) fn table(layers: &[LayerLoad]) -> String {
    let header = ["LAYER", "ROWS/MIN", "BALANCEDNESS", "BUSIEST EXPERTS (ROWS/MIN, REPLICAS)"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for layer in layers {
        let of = |expert: &ExpertLoad| format!("{} ({}, {})", expert.expert, expert.rows_per_minute, expert.holders);
        let busiest: Vec<String> = layer.busiest.iter().map(of).collect();
        let balancedness = format!("{:.2}", layer.balancedness);
        rows.push(vec![layer.layer.to_string(), layer.rows_per_minute.to_string(), balancedness, busiest.join(", ")]);
    }
    terminal::table(&rows)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::time::Duration;

    use conclave_placement::{LayerIdx, Load, RouterId};

    use super::*;
    use crate::up::ready::tests::state;

    #[test]
    fn the_busiest_experts_and_their_balance_are_told() {
        let mut state = state(2, &[&[0], &[1], &[0, 1]]);
        assert_eq!(report(&state), None, "nobody knows of any load");
        let load = Load { window: Duration::from_secs(60), layers: BTreeMap::from([(LayerIdx(1), vec![10, 40, 100])]) };
        state.loads.insert(RouterId::parse("router-0").unwrap(), Arc::new(load));
        let expected = "\
LAYER  ROWS/MIN  BALANCEDNESS  BUSIEST EXPERTS (ROWS/MIN, REPLICAS)
1      150       0.83          2 (100, 2), 1 (40, 1), 0 (10, 1)
";
        assert_eq!(table(&report(&state).unwrap()), expected);
    }
}
