//! A cluster's state, put together from its keys.
//!
//! In: listings and events. Out: a [`ClusterState`] that includes them. Never here: I/O, or trust. A value that cannot be
//! read is logged and ignored; what was known before it stays.

use std::sync::Arc;

use crate::codec::DecodeError;
use crate::keys::{Keys, Slot};
use crate::load::Load;
use crate::plan::Plan;
use crate::state::{ClusterState, DrainOrder, LeaderRecord, ModelIdentity, RouterRecord, WorkerRecord};
use crate::store::{Entry, Event, Listing};

#[derive(Debug)]
pub(super) struct Assembly {
    keys: Keys,
    state: ClusterState,
}

impl Assembly {
    pub(super) fn new(keys: Keys) -> Self {
        Self { keys, state: ClusterState::empty() }
    }

    pub(super) fn prefix(&self) -> &str {
        self.keys.prefix()
    }

    pub(super) fn state(&self) -> &ClusterState {
        &self.state
    }

    /// Starts anew from a listing. A value that cannot be read keeps its former meaning, if its key had one.
    pub(super) fn replace(&mut self, listing: Listing) {
        if listing.revision < self.state.revision {
            let (before, now) = (self.state.revision, listing.revision);
            tracing::warn!(before, now, "the store has gone back in time, as after a restore");
        }
        let former = std::mem::replace(&mut self.state, ClusterState::empty());
        for entry in listing.entries {
            let Some(slot) = self.keys.slot(&entry.key) else { continue };
            if let Err(error) = self.put(&slot, &entry) {
                ignored(&entry, &error);
                self.recall(&slot, &former);
            }
        }
        self.state.revision = listing.revision;
    }

    pub(super) fn apply(&mut self, batch: Vec<Event>) {
        for event in batch {
            self.state.revision = self.state.revision.max(event.revision());
            let Some(slot) = self.keys.slot(event.key()) else { continue };
            match event {
                Event::Put(entry) => {
                    if let Err(error) = self.put(&slot, &entry) {
                        ignored(&entry, &error);
                    }
                }
                Event::Delete { .. } => self.delete(&slot),
            }
        }
    }

    fn put(&mut self, slot: &Slot, entry: &Entry) -> Result<(), DecodeError> {
        let state = &mut self.state;
        match slot {
            Slot::Model => state.model = Some(ModelIdentity::decode(&entry.value)?),
            Slot::Plan => state.plan = Some(Arc::new(Plan::decode(&entry.value)?)),
            Slot::Leader => state.leader = Some(LeaderRecord::decode(&entry.value)?.router),
            Slot::Worker(id) => {
                let record = WorkerRecord::decode(&entry.value)?;
                if record.id != *id {
                    return Err(foreign("WorkerRecord.id", &record.id));
                }
                state.workers.insert(id.clone(), record);
            }
            Slot::Router(id) => {
                let record = RouterRecord::decode(&entry.value)?;
                if record.id != *id {
                    return Err(foreign("RouterRecord.id", &record.id));
                }
                state.routers.insert(id.clone(), record);
            }
            Slot::Load(id) => drop(state.loads.insert(id.clone(), Arc::new(Load::decode(&entry.value)?))),
            Slot::Drain(id) => drop(state.drains.insert(id.clone(), DrainOrder::decode(&entry.value)?.incarnation)),
        }
        Ok(())
    }

    fn delete(&mut self, slot: &Slot) {
        let state = &mut self.state;
        match slot {
            Slot::Model => state.model = None,
            Slot::Plan => state.plan = None,
            Slot::Leader => state.leader = None,
            Slot::Worker(id) => drop(state.workers.remove(id)),
            Slot::Router(id) => drop(state.routers.remove(id)),
            Slot::Load(id) => drop(state.loads.remove(id)),
            Slot::Drain(id) => drop(state.drains.remove(id)),
        }
    }

    fn recall(&mut self, slot: &Slot, former: &ClusterState) {
        let state = &mut self.state;
        match slot {
            Slot::Model => state.model.clone_from(&former.model),
            Slot::Plan => state.plan.clone_from(&former.plan),
            Slot::Leader => state.leader.clone_from(&former.leader),
            Slot::Worker(id) => state.workers.extend(former.workers.get(id).map(|record| (id.clone(), record.clone()))),
            Slot::Router(id) => state.routers.extend(former.routers.get(id).map(|record| (id.clone(), record.clone()))),
            Slot::Load(id) => state.loads.extend(former.loads.get(id).map(|load| (id.clone(), load.clone()))),
            Slot::Drain(id) => state.drains.extend(former.drains.get(id).map(|order| (id.clone(), *order))),
        }
    }
}

fn foreign(field: &'static str, id: &impl ToString) -> DecodeError {
    DecodeError::Field { field, problem: format!("{} is not the name in the key", id.to_string()) }
}

fn ignored(entry: &Entry, error: &DecodeError) {
    tracing::warn!(key = entry.key, revision = entry.mod_revision, %error, "a value is ignored");
}

#[cfg(test)]
#[path = "assembly_tests.rs"]
mod tests;
