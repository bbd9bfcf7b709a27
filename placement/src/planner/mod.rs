//! Planners: pure functions from what is observed and what was planned to what should be.
//!
//! In: the model, the live workers, the replicas wanted, the previous plan. Out: the next plan, or nothing when the
//! previous one still is right. Never here: the store, time, or chance. The same problem has the same answer, so two
//! leaders that see the same cluster write the same plan.

pub mod balanced;

use std::collections::BTreeMap;

use crate::ids::WorkerId;
use crate::state::{ClusterState, ModelIdentity, WorkerState};

/// What a planner solves.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// The layers and experts to place, and what one weighs.
    pub model: &'a ModelIdentity,
    /// Those that may hold experts: alive and not draining.
    pub workers: &'a [PlannerWorker],
    /// How many workers should hold each expert, where there are as many.
    pub replicas: u32,
}

/// A worker as a planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannerWorker {
    /// Its name.
    pub id: WorkerId,
    /// Bytes it may fill with experts; 0 means as many as it is given.
    pub memory_budget: u64,
}

/// A problem that has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nobody to give experts to.
    #[error("there is no live worker to hold the experts")]
    NoWorkers,
    /// A request for nothing.
    #[error("replicas is 0, every expert needs at least one holder")]
    NoReplicas,
    /// More experts than an id can count.
    #[error("the model has {experts} experts per layer, more than 65536")]
    TooManyExperts {
        /// As the model says.
        experts: u32,
    },
    /// The same worker twice.
    #[error("worker {worker} is listed twice")]
    DuplicateWorker {
        /// Its name.
        worker: WorkerId,
    },
    /// The previous plan has the last version number there is.
    #[error("the plan's version cannot grow any further")]
    VersionsExhausted,
}

impl Problem<'_> {
    /// How many experts that worker may hold.
    pub(crate) fn room(&self, worker: &PlannerWorker) -> usize {
        let every = self.model.moe_layers.len() * self.model.experts as usize;
        if worker.memory_budget == 0 || self.model.expert_bytes == 0 {
            return every;
        }
        let fit = worker.memory_budget / self.model.expert_bytes;
        usize::try_from(fit).map_or(every, |fit| fit.min(every))
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.workers.is_empty() {
            return Err(Error::NoWorkers);
        }
        if self.replicas == 0 {
            return Err(Error::NoReplicas);
        }
        if self.model.experts > 1 << 16 {
            return Err(Error::TooManyExperts { experts: self.model.experts });
        }
        let mut seen = BTreeMap::new();
        match self.workers.iter().find(|worker| seen.insert(&worker.id, ()).is_some()) {
            Some(twice) => Err(Error::DuplicateWorker { worker: twice.id.clone() }),
            None => Ok(()),
        }
    }
}

/// The workers of a cluster that a plan may use: all but those that are leaving, by name.
pub fn candidates(state: &ClusterState) -> Vec<PlannerWorker> {
    let staying = state.workers.values().filter(|worker| worker.state != WorkerState::Draining);
    staying.map(|worker| PlannerWorker { id: worker.id.clone(), memory_budget: worker.memory_budget }).collect()
}
