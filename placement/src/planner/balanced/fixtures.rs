//! Small models, workers and loads for tests.

use std::time::Duration;

use crate::ids::{LayerIdx, WorkerId};
use crate::load::Load;
use crate::planner::PlannerWorker;
use crate::state::{Locality, ModelIdentity, Residency};

/// A model whose experts weigh ten bytes, with a dense layer first.
pub(crate) fn model(layers: u32, experts: u32) -> ModelIdentity {
    ModelIdentity {
        name: "m".into(),
        config_digest: String::new(),
        checkpoint_digest: String::new(),
        layers: layers + 1,
        moe_layers: (1..=layers).map(LayerIdx).collect(),
        experts,
        expert_bytes: 10,
    }
}

pub(crate) fn worker(number: usize, memory_budget: u64) -> PlannerWorker {
    PlannerWorker {
        id: WorkerId::parse(&format!("w{number}")).unwrap(),
        memory_budget,
        speed: 0.0,
        locality: Locality::default(),
        resident: Residency::new(),
        failing: Residency::new(),
    }
}

/// `w0` and so on, one for each budget.
pub(crate) fn workers(budgets: &[u64]) -> Vec<PlannerWorker> {
    budgets.iter().enumerate().map(|(number, budget)| worker(number, *budget)).collect()
}

/// The same rows in every layer of a model, each layer's turned one further.
pub(crate) fn load(model: &ModelIdentity, rows: &[u64]) -> Load {
    let layer = |(nth, layer): (usize, &LayerIdx)| {
        let mut rows = rows.to_vec();
        let turn = nth % rows.len().max(1);
        rows.rotate_right(turn);
        (*layer, rows)
    };
    Load { window: Duration::from_secs(60), layers: model.moe_layers.iter().enumerate().map(layer).collect() }
}
