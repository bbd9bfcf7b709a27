//! The expert workers as this router knows them: who is reachable, who holds what.
//!
//! In: the cluster's state, as the view brings it. Out: a [`Snapshot`] to plan by, and [`Link`]s to send over.
//! Never here: a choice between replicas, a retry, a read of the store.

mod codec;
mod link;
mod snapshot;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicU64},
};

use conclave_placement::{
    ids::{Incarnation, WorkerId},
    state::{ClusterState, WorkerRecord, WorkerState},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use codec::{Dispatch, Refusal, Reply};
pub use link::Link;
pub use snapshot::{Reach, Snapshot};

/// Link events waiting for the pool; each link has at most one change under way.
const EVENT_QUEUE: usize = 256;

/// Counters over all links, for metrics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Rows sent, once per worker they went to.
    pub rows: AtomicU64,
    /// Batches sent.
    pub batches: AtomicU64,
    /// Batches that a worker refused.
    pub refused: AtomicU64,
    /// Batches lost with their stream or to their deadline.
    pub lost: AtomicU64,
    /// Answers with a wrong size or values that are no numbers.
    pub corrupt: AtomicU64,
    /// Answers nobody waited for any more.
    pub late: AtomicU64,
}

/// A cheap handle on the pool.
#[derive(Clone, Debug)]
pub struct Workers {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    counters: Arc<Counters>,
}

impl Workers {
    /// Follows `cluster` until `stop`: one link to each serving worker, a new snapshot at every change.
    pub fn start(cluster: watch::Receiver<Arc<ClusterState>>, hidden: usize, stop: CancellationToken) -> Self {
        let (publish, snapshots) = watch::channel(Arc::new(Snapshot::empty()));
        let counters = Arc::new(Counters::default());
        let pool = Pool { links: BTreeMap::new(), publish, counters: counters.clone(), hidden };
        tokio::spawn(pool.run(cluster, stop));
        Self { snapshots, counters }
    }

    /// The newest picture.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Tells of newer ones.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// What was sent and lost.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// The task behind the handle.
struct Pool {
    links: BTreeMap<(WorkerId, Incarnation), Link>,
    publish: watch::Sender<Arc<Snapshot>>,
    counters: Arc<Counters>,
    hidden: usize,
}

impl Pool {
    async fn run(mut self, mut cluster: watch::Receiver<Arc<ClusterState>>, stop: CancellationToken) {
        let (events, mut changes) = mpsc::channel(EVENT_QUEUE);
        loop {
            let state = cluster.borrow_and_update().clone();
            self.follow(&state, &events, &stop);
            self.publish.send_replace(Arc::new(Snapshot::new(&state, &self.links)));
            tokio::select! {
                changed = cluster.changed() => if changed.is_err() { return },
                Some(()) = changes.recv() => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Opens links to newcomers and closes those to the departed.
    fn follow(&mut self, state: &ClusterState, events: &mpsc::Sender<()>, stop: &CancellationToken) {
        let serving = |worker: &&WorkerRecord| worker.state != WorkerState::Starting;
        let wanted: BTreeMap<_, _> = state
            .workers
            .values()
            .filter(serving)
            .map(|worker| ((worker.id.clone(), worker.incarnation), worker))
            .collect();
        self.links.retain(|key, link| {
            let stays = wanted.contains_key(key);
            if !stays {
                info!(worker = %key.0, "expert worker left");
                link.close();
            }
            stays
        });
        for (key, worker) in wanted {
            if self.links.contains_key(&key) {
                continue;
            }
            let (counters, token) = (self.counters.clone(), stop.child_token());
            match Link::open(worker, self.hidden, counters, events.clone(), token) {
                Ok(link) => {
                    info!(worker = %key.0, address = %worker.address, "expert worker joined");
                    self.links.insert(key, link);
                }
                Err(error) => warn!(worker = %key.0, %error, "expert worker cannot be reached"),
            }
        }
    }
}
