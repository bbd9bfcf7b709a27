//! What the cluster knows of this worker: its record comes in from the rooms that change it, and is published under the
//! worker's lease. Readers elsewhere act on it, so it never claims an expert before the tensor thread has it.

use std::sync::Arc;
use std::time::Duration;

use conclave_placement::ids::PlanVersion;
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

    pub fn record(&self) -> WorkerRecord {
        self.current.lock().record.clone()
    }

    /// Says what is resident. The first expert makes a starting worker a serving one.
    pub fn hold(&self, resident: &Residency) {
        self.update(|record| {
            record.resident.clone_from(resident);
            if record.state == WorkerState::Starting && !resident.is_empty() {
                record.state = WorkerState::Serving;
            }
        });
    }

    /// Says which plan this worker has done everything for that it could.
    pub fn acted_on(&self, plan: PlanVersion) {
        self.update(|record| record.plan_version = plan);
    }

    /// Says that this worker takes nothing new. What it holds stays listed: it still answers for what it accepted.
    pub fn drain(&self) {
        self.update(|record| record.state = WorkerState::Draining);
    }

    /// Takes the record out of the store; bounded by the membership's own limit. Nothing is published after it.
    pub async fn leave(&self) {
        let membership = self.current.lock().membership.take();
        if let Some(membership) = membership {
            membership.leave().await;
        }
    }

    /// Publishes where the record really changed, under the lock so that two changes are published in their order.
    fn update(&self, change: impl FnOnce(&mut WorkerRecord)) {
        let mut current = self.current.lock();
        let before = current.record.clone();
        change(&mut current.record);
        if let (Some(membership), true) = (&current.membership, current.record != before) {
            membership.publish(current.record.encode());
        }
    }
}
