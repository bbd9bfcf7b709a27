//! What the cluster knows of this router: its record, under its lease.
//!
//! In: the record, and the cluster's state. Out: the record again whenever this router acts on another plan: a worker
//! may only let go of an expert once every router has moved on.
//! Never here: a claim that outlives the lease.

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    keys::Keys,
    membership::{self, Membership},
    state::RouterRecord,
    store::Store,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::workers::Snapshot;

/// This router's place in the cluster.
#[derive(Debug)]
pub(crate) struct Registration {
    membership: Arc<Membership>,
}

impl Registration {
    /// Joins with `record` under a lease of `ttl`, and follows `snapshots` until `stop`.
    pub(crate) async fn join(
        store: Arc<dyn Store>,
        keys: &Keys,
        ttl: Duration,
        mut record: RouterRecord,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
        stop: CancellationToken,
    ) -> Result<Self, membership::Error> {
        let key = keys.router(&record.id);
        let membership = Arc::new(Membership::join(store, key, ttl, record.encode(), stop.clone()).await?);
        let publisher = membership.clone();
        tokio::spawn(async move {
            loop {
                let plan_version = snapshots.borrow_and_update().plan_version;
                if record.plan_version != plan_version {
                    record.plan_version = plan_version;
                    publisher.publish(record.encode());
                }
                tokio::select! {
                    changed = snapshots.changed() => if changed.is_err() { return },
                    () = stop.cancelled() => return,
                }
            }
        });
        Ok(Self { membership })
    }

    /// Takes the record out of the store; bounded by the membership's own limit.
    pub(crate) async fn leave(&self) {
        self.membership.leave().await;
    }
}
