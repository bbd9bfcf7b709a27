//! What the cluster knows of this router: its record, under its lease.
//!
//! In: the record, and the workers as this router knows them. Out: the record again whenever this router acts on another
//! plan (a worker may only let go of an expert once every router has moved on) or can no longer use a worker.
//! Never here: a claim that outlives the lease.

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    keys::Keys,
    membership::Membership,
    state::RouterRecord,
    store::{self, Store},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::workers::Workers;

/// This router's place in the cluster.
#[derive(Debug)]
pub(crate) struct Registration {
    leave: CancellationToken,
    task: JoinHandle<()>,
}

impl Registration {
    /// Joins with `record` under a lease of `ttl`, and follows `snapshots` from there.
    pub(crate) async fn join(
        store: Arc<dyn Store>,
        keys: &Keys,
        ttl: Duration,
        mut record: RouterRecord,
        workers: &Workers,
    ) -> Result<Self, store::Error> {
        let leave = CancellationToken::new();
        let membership =
            Membership::join(store, keys.router(&record.id), ttl, record.encode(), CancellationToken::new()).await?;
        let left = leave.clone();
        let (mut snapshots, mut unreachable) = (workers.watch(), workers.unreachable());
        let task = tokio::spawn(async move {
            loop {
                let plan_version = snapshots.borrow_and_update().plan_version;
                let unreached = unreachable.borrow_and_update().clone();
                if record.plan_version != plan_version || record.unreachable != unreached {
                    (record.plan_version, record.unreachable) = (plan_version, unreached);
                    membership.publish(record.encode());
                }
                tokio::select! {
                    Ok(()) = snapshots.changed() => {}
                    Ok(()) = unreachable.changed() => {}
                    () = left.cancelled() => break,
                }
            }
            membership.leave().await;
        });
        Ok(Self { leave, task })
    }

    /// Takes the record out of the store; bounded by the membership's own limit.
    pub(crate) async fn leave(self) {
        self.leave.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the registration panicked");
        }
    }
}
