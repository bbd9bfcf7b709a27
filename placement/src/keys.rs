//! Where things lie in the store: every key of a cluster, made and read in this one place.
//!
//! In: a cluster's name and ids. Out: key strings, and what a key string means. Never here: values.

use crate::ids::{Cluster, PlanVersion, RouterId, WorkerId};

/// The keys of one cluster, under `/conclave/<cluster>/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
    history: String,
}

/// What a key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slot {
    /// The model's identity.
    Model,
    /// The target plan.
    Plan,
    /// Who leads.
    Leader,
    /// A worker's record.
    Worker(WorkerId),
    /// A router's record.
    Router(RouterId),
    /// What a router sent where.
    Load(RouterId),
    /// The wish that a worker leaves.
    Drain(WorkerId),
}

impl Keys {
    /// The keys of that cluster.
    pub fn new(cluster: &Cluster) -> Self {
        Self { prefix: format!("/conclave/{cluster}/"), history: format!("/conclave-history/{cluster}/") }
    }

    /// What every key of the cluster starts with, and no key of another.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The model's identity.
    pub fn model(&self) -> String {
        format!("{}model", self.prefix)
    }

    /// The target plan.
    pub fn plan(&self) -> String {
        format!("{}plan", self.prefix)
    }

    /// Which router runs the controller.
    pub fn leader(&self) -> String {
        format!("{}leader", self.prefix)
    }

    /// A worker's record.
    pub fn worker(&self, id: &WorkerId) -> String {
        format!("{}workers/{id}", self.prefix)
    }

    /// A router's record.
    pub fn router(&self, id: &RouterId) -> String {
        format!("{}routers/{id}", self.prefix)
    }

    /// What a router sent where.
    pub fn load(&self, id: &RouterId) -> String {
        format!("{}load/{id}", self.prefix)
    }

    /// The wish that a worker leaves.
    pub fn drain(&self, id: &WorkerId) -> String {
        format!("{}drains/{id}", self.prefix)
    }

    /// What every past plan's key starts with. They lie outside the prefix: nobody needs to watch the past.
    pub fn history(&self) -> &str {
        &self.history
    }

    /// A plan that was in force. Keys sort as versions do.
    pub fn past_plan(&self, version: PlanVersion) -> String {
        format!("{}{:020}", self.history, version.0)
    }

    /// What a key means; `None` for a key of another cluster or one this version does not know.
    pub fn slot(&self, key: &str) -> Option<Slot> {
        let key = key.strip_prefix(&self.prefix)?;
        match key.split_once('/') {
            None => match key {
                "model" => Some(Slot::Model),
                "plan" => Some(Slot::Plan),
                "leader" => Some(Slot::Leader),
                _ => None,
            },
            Some(("workers", id)) => WorkerId::parse(id).ok().map(Slot::Worker),
            Some(("routers", id)) => RouterId::parse(id).ok().map(Slot::Router),
            Some(("load", id)) => RouterId::parse(id).ok().map(Slot::Load),
            Some(("drains", id)) => WorkerId::parse(id).ok().map(Slot::Drain),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_reads_back_as_what_it_was_made_for() {
        let keys = Keys::new(&Cluster::parse("demo").unwrap());
        let worker = WorkerId::parse("worker-0").unwrap();
        let router = RouterId::parse("router-0").unwrap();
        assert_eq!(keys.worker(&worker), "/conclave/demo/workers/worker-0");
        assert_eq!(keys.slot(&keys.model()), Some(Slot::Model));
        assert_eq!(keys.slot(&keys.plan()), Some(Slot::Plan));
        assert_eq!(keys.slot(&keys.leader()), Some(Slot::Leader));
        assert_eq!(keys.slot(&keys.worker(&worker)), Some(Slot::Worker(worker.clone())));
        assert_eq!(keys.slot(&keys.drain(&worker)), Some(Slot::Drain(worker)));
        assert_eq!(keys.slot(&keys.router(&router)), Some(Slot::Router(router.clone())));
        assert_eq!(keys.slot(&keys.load(&router)), Some(Slot::Load(router)));
    }

    #[test]
    fn past_plans_sort_by_version_and_are_nobody_s_to_watch() {
        let keys = Keys::new(&Cluster::parse("demo").unwrap());
        let [early, late] = [9, 10].map(|version| keys.past_plan(PlanVersion(version)));
        assert!(early < late && late.starts_with(keys.history()) && !late.starts_with(keys.prefix()));
    }

    #[test]
    fn foreign_keys_mean_nothing() {
        let keys = Keys::new(&Cluster::parse("demo").unwrap());
        let foreign =
            ["", "/conclave/demo2/model", "/conclave/demo/", "/conclave/demo/workers/Bad Name", "/conclave/demo/x/y"];
        for key in foreign {
            assert_eq!(keys.slot(key), None, "{key}");
        }
    }
}
