//! What the cluster itself shows of a fault: when a router first acted on it, and when every expert was held again.
//!
//! In: the routers' metrics, read every 50 ms; the store's picture, at each change. Out: moments. Never here: what a
//! client saw (that is `record`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use conclave_placement::state::ClusterState;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    cluster::held_everywhere,
    metrics::{Figures, figures},
};

/// How exactly a sign is dated.
const EVERY: Duration = Duration::from_millis(50);
/// What a router counts when a worker is not as it should be: a batch lost with its stream or to its time limit, refused,
/// sent to another worker as well because it is late, or answered with nonsense.
const SIGNS: [&str; 4] = [
    "conclave_dispatch_lost_total",
    "conclave_dispatch_refused_total",
    "conclave_dispatch_hedges_total",
    "conclave_combine_corrupt_total",
];

/// Moments at which a router acted on a fault, and at which the experts came to be held as wanted or ceased to.
#[derive(Debug)]
pub struct Signs {
    seen: Arc<Mutex<Seen>>,
    _stop: DropGuard,
}

#[derive(Debug, Default)]
struct Seen {
    acted: Vec<Instant>,
    /// Whether every expert was held as often as wanted from then on.
    held: Vec<(Instant, bool)>,
    /// Per router, the last figures of each kind.
    last: BTreeMap<String, Figures>,
    first: BTreeMap<String, Figures>,
}

impl Signs {
    /// Begins to look: at the routers with these admin addresses, and for `holders` workers of each expert.
    pub fn follow(routers: Vec<String>, cluster: watch::Receiver<Arc<ClusterState>>, holders: usize) -> Self {
        let (seen, stop, tasks) = (Arc::new(Mutex::new(Seen::default())), CancellationToken::new(), TaskTracker::new());
        for router in routers {
            let watching = acts(router, seen.clone());
            tasks.spawn(stop.clone().run_until_cancelled_owned(watching));
        }
        tasks.spawn(stop.clone().run_until_cancelled_owned(is_held(cluster, holders, seen.clone())));
        Self { seen, _stop: stop.drop_guard() }
    }

    /// The first moment after `fault` at which a router counted a batch as lost, refused, late or wrong.
    pub fn acted_on(&self, fault: Instant) -> Option<Instant> {
        self.seen.lock().acted.iter().copied().find(|at| *at >= fault)
    }

    /// The last moment at which the experts came to be held as wanted again, where they had ceased to be after `fault`.
    pub fn held_again(&self, fault: Instant) -> Option<Instant> {
        let seen = self.seen.lock();
        let ceased = seen.held.iter().position(|(at, held)| *at >= fault && !held)?;
        seen.held[ceased..].last().filter(|(_, held)| *held).map(|(at, _)| *at)
    }

    /// How much the routers' figure `name` grew while this looked.
    pub fn grown(&self, name: &str) -> f64 {
        let seen = self.seen.lock();
        let of = |figures: &Figures| figures.get(name).copied().unwrap_or_default();
        seen.last.iter().map(|(router, last)| of(last) - seen.first.get(router).map_or(0.0, of)).sum()
    }
}

async fn acts(router: String, seen: Arc<Mutex<Seen>>) {
    let mut before: Option<f64> = None;
    loop {
        // A router that is away has nothing to show.
        if let Some(figures) = figures(&router).await {
            let now: f64 = SIGNS.iter().filter_map(|name| figures.get(*name)).sum();
            let mut seen = seen.lock();
            if before.is_some_and(|before| now > before) {
                seen.acted.push(Instant::now());
            }
            before = Some(now);
            seen.first.entry(router.clone()).or_insert_with(|| figures.clone());
            seen.last.insert(router.clone(), figures);
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn is_held(mut cluster: watch::Receiver<Arc<ClusterState>>, holders: usize, seen: Arc<Mutex<Seen>>) {
    loop {
        let held = held_everywhere(&cluster.borrow_and_update(), holders);
        {
            let mut seen = seen.lock();
            if seen.held.last().is_none_or(|(_, before)| *before != held) {
                seen.held.push((Instant::now(), held));
            }
        }
        if cluster.changed().await.is_err() {
            return;
        }
    }
}
