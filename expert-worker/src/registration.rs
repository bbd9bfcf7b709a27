//! What the cluster knows of this worker: its record comes in from the rooms that change it, and is published under the
//! worker's lease. Readers elsewhere act on it, so it never claims an expert before the tensor thread has it.

use std::sync::Arc;
use std::time::Duration;

use conclave_placement::ids::{Incarnation, PlanVersion, WorkerId};
use conclave_placement::keys::Keys;
use conclave_placement::membership::Membership;
use conclave_placement::state::{Residency, WorkerRecord, WorkerState};
use conclave_placement::store::{self, Store};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
pub struct Registration {
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    record: WorkerRecord,
    /// None once this worker has left.
    membership: Option<Membership>,
}

impl Registration {
    /// Joins the cluster with `record` under a lease of `ttl`. A lease that is lost later is taken again by itself.
    pub async fn join(
        store: Arc<dyn Store>,
        keys: &Keys,
        ttl: Duration,
        record: WorkerRecord,
        stop: CancellationToken,
    ) -> store::Result<Self> {
        let membership = Membership::join(store, keys.worker(&record.id), ttl, record.encode(), stop).await?;
        Ok(Self { current: Mutex::new(Current { record, membership: Some(membership) }) })
    }

    /// Which run of which worker this is.
    pub fn run(&self) -> (WorkerId, Incarnation) {
        let current = self.current.lock();
        (current.record.id.clone(), current.record.incarnation)
    }

    pub fn record(&self) -> WorkerRecord {
        self.current.lock().record.clone()
    }

    /// Says what is resident, and what could not be loaded. The first expert makes a starting worker a serving one.
    pub fn hold(&self, resident: &Residency, failing: Residency) {
        let _ = self.update(|record| {
            record.resident.clone_from(resident);
            record.failing = failing;
            if record.state == WorkerState::Starting && !resident.is_empty() {
                record.state = WorkerState::Serving;
            }
        });
    }

    /// Says which plan this worker has done everything for that it asks. True when that is news.
    pub fn acted_on(&self, plan: PlanVersion) -> bool {
        self.update(|record| record.plan_version = plan)
    }

    /// Says how many rows a second go through one of its experts. What is no speed is not told.
    pub fn is_as_fast_as(&self, rows_per_second: f64) {
        if rows_per_second.is_finite() && rows_per_second > 0.0 {
            self.update(|record| record.speed = rows_per_second.round());
        }
    }

    /// Whether it was said how fast this worker is.
    pub fn is_measured(&self) -> bool {
        self.current.lock().record.speed > 0.0
    }

    /// Whether the record surely is in the store now.
    pub fn is_registered(&self) -> bool {
        self.current.lock().membership.as_ref().is_some_and(|membership| *membership.registered().borrow())
    }

    /// Says that this worker is leaving. What it holds stays listed: it answers for it until others have it.
    pub fn drain(&self) {
        let _ = self.update(|record| record.state = WorkerState::Draining);
    }

    /// Takes the record out of the store; bounded by the membership's own limit. Nothing is published after it.
    pub async fn leave(&self) {
        let membership = self.current.lock().membership.take();
        if let Some(membership) = membership {
            membership.leave().await;
        }
    }

    /// Publishes the record and returns true where the record really changed, under the lock so that two changes are published in their order.
    fn update(&self, change: impl FnOnce(&mut WorkerRecord)) -> bool {
        let mut current = self.current.lock();
        let before = current.record.clone();
        change(&mut current.record);
        let changed = current.record != before;
        if let (Some(membership), true) = (&current.membership, changed) {
            membership.publish(current.record.encode());
        }
        changed
    }
}
