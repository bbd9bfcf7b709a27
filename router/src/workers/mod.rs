//! The expert workers as this router knows them: who is reachable, who holds what.
//!
//! In: the cluster's state, as the view brings it. Out: a [`Snapshot`] to plan by, and [`Link`]s to send over. What the
//! store says of a worker is hearsay, a stream that works is a fact: a worker whose record vanished (a lost lease, a store
//! that was wiped) is asked for as long as its stream is up and nobody came in its place.
//! Never here: a choice between replicas, a retry, a read of the store.

mod codec;
mod link;
mod pace;
mod probe;
mod snapshot;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use conclave_placement::{
    ids::{Incarnation, WorkerId},
    state::{ClusterState, WorkerRecord, WorkerState},
};
use conclave_runtime::wire_thread::WireThread;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::phases::Phases;

pub use codec::{Contents, Dispatch, Refusal, Reply};
pub use link::Link;
pub use pace::Pace;
pub use snapshot::{Holders, Reach, Snapshot};

/// A worker that could not be used for so long is told to be out of reach: its experts may be placed elsewhere.
const OUT_OF_REACH: Duration = Duration::from_secs(3);
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
    /// Batches that were late and sent to others too.
    pub hedges: AtomicU64,
    /// Of them, those that others answered first.
    pub hedges_won: AtomicU64,
    /// Where time went, the engine's too: who measures has this handle anyway.
    pub phases: Phases,
}

impl Counters {
    /// A batch was late and goes to others too.
    pub(crate) fn hedged(&self) {
        self.hedges.fetch_add(1, Relaxed);
    }

    /// Others had it first.
    pub(crate) fn hedge_won(&self) {
        self.hedges_won.fetch_add(1, Relaxed);
    }
}

/// Runs of workers that the store tells of and that could not be used for a while.
pub type Unreachable = BTreeMap<WorkerId, Incarnation>;

/// A cheap handle on the pool.
#[derive(Clone, Debug)]
pub struct Workers {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    unreachable: watch::Receiver<Unreachable>,
    counters: Arc<Counters>,
    pace: Arc<Pace>,
    _wire: Arc<WireThread>,
}

impl Workers {
    /// Follows `cluster` until `stop`: one link to each serving worker, a new snapshot at every change. The links have a
    /// thread of their own, which ends with the last handle.
    pub fn start(
        cluster: watch::Receiver<Arc<ClusterState>>,
        hidden: usize,
        stop: CancellationToken,
    ) -> std::io::Result<Self> {
        let wire = Arc::new(WireThread::start("wire")?);
        let (publish, snapshots) = watch::channel(Arc::new(Snapshot::empty()));
        let (counters, pace) = (Arc::new(Counters::default()), Arc::new(Pace::default()));
        let (tell, unreachable) = watch::channel(Unreachable::new());
        let known = BTreeMap::new();
        let pool =
            Pool { known, publish, tell, counters: counters.clone(), pace: pace.clone(), wire: wire.clone(), hidden };
        tokio::spawn(pool.run(cluster, stop));
        Ok(Self { snapshots, unreachable, counters, pace, _wire: wire })
    }

    /// Tells of workers that could not be used for a while.
    pub fn unreachable(&self) -> watch::Receiver<Unreachable> {
        self.unreachable.clone()
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

    /// How long answers usually take.
    pub fn pace(&self) -> &Pace {
        &self.pace
    }
}

/// The task behind the handle.
struct Pool {
    known: BTreeMap<(WorkerId, Incarnation), Known>,
    publish: watch::Sender<Arc<Snapshot>>,
    tell: watch::Sender<Unreachable>,
    counters: Arc<Counters>,
    pace: Arc<Pace>,
    wire: Arc<WireThread>,
    hidden: usize,
}

/// A run of a worker: what it last said of itself, and the stream to it.
struct Known {
    record: WorkerRecord,
    link: Link,
    /// Whether the store still tells of it.
    listed: bool,
    /// Since when there has been no stream.
    down_since: Option<Instant>,
}

impl Pool {
    async fn run(mut self, mut cluster: watch::Receiver<Arc<ClusterState>>, stop: CancellationToken) {
        let (events, mut changes) = mpsc::channel(EVENT_QUEUE);
        loop {
            let state = cluster.borrow_and_update().clone();
            self.forget(&state);
            self.follow(&state, &events, &stop);
            let known = self.known.values().map(|known| (&known.record, &known.link));
            self.publish.send_replace(Arc::new(Snapshot::new(&state, known)));
            let wake = self.tell_unreachable();
            tokio::select! {
                changed = cluster.changed() => if changed.is_err() { return },
                Some(()) = changes.recv() => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Says whom nobody could use for a while, and when there may be more to say though nothing has changed.
    fn tell_unreachable(&mut self) -> Option<Instant> {
        let (now, mut unreachable, mut wake) = (Instant::now(), Unreachable::new(), None);
        for ((id, incarnation), known) in self.known.iter_mut().filter(|(_, known)| known.listed) {
            if known.link.is_up() {
                known.down_since = None;
                continue;
            }
            let until = *known.down_since.get_or_insert(now) + OUT_OF_REACH;
            if until <= now {
                unreachable.insert(id.clone(), *incarnation);
            } else {
                wake = wake.into_iter().chain([until]).min();
            }
        }
        self.tell.send_if_modified(|told| {
            let news = *told != unreachable;
            *told = unreachable;
            news
        });
        wake
    }

    /// Closes links to those who left: the store does not tell of them, and their stream is down or another run of them
    /// is there.
    fn forget(&mut self, state: &ClusterState) {
        self.known.retain(|(id, incarnation), known| {
            let there = state.workers.get(id);
            let listed = there.is_some_and(|worker| worker.incarnation == *incarnation);
            let stays = listed || there.is_none() && known.link.is_up();
            if !stays {
                info!(worker = %id, "expert worker left");
                known.link.close();
            } else if known.listed && !listed && known.record.state != WorkerState::Draining {
                warn!(worker = %id, "the store has lost this expert worker, its stream has not");
            }
            known.listed = listed;
            stays
        });
    }

    /// Opens links to newcomers, and hears what the others say of themselves.
    fn follow(&mut self, state: &ClusterState, events: &mpsc::Sender<()>, stop: &CancellationToken) {
        for worker in state.workers.values().filter(|worker| worker.state != WorkerState::Starting) {
            let key = (worker.id.clone(), worker.incarnation);
            if !self.known.contains_key(&key) {
                let shared = (self.counters.clone(), self.pace.clone());
                let link = Link::open(worker, self.hidden, shared, &self.wire, events.clone(), stop.child_token());
                info!(worker = %worker.id, address = %worker.address, "expert worker joined");
                link.remember(canary(worker));
                self.known.insert(key.clone(), Known { record: worker.clone(), link, listed: true, down_since: None });
            }
            if let Some(known) = self.known.get_mut(&key).filter(|known| known.record != *worker) {
                known.record.clone_from(worker);
                known.link.remember(canary(worker));
            }
        }
    }
}

/// An expert that a worker can be asked about.
fn canary(worker: &WorkerRecord) -> Option<probe::Canary> {
    let first = worker.resident.iter().next();
    first.map(|(layer, expert)| probe::Canary { layer: layer.0, expert: expert.0 })
}

#[cfg(test)]
mod tests;
