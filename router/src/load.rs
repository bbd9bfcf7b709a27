//! What this router sends where, for the planner.
//!
//! In: the experts that each layer's gate chose. Out: rows per (layer, expert) over a sliding window, in the store under
//! this router's lease. Never here: a lock or an allocation on the way of a row; rows counted twice because they were sent
//! twice.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use conclave_placement::{
    ids::{LayerIdx, RouterId},
    keys::Keys,
    load::{Load, SlidingWindow},
    membership::Membership,
    store::Store,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// The window is read this often while it passes once.
const READINGS: u32 = 6;

/// Rows sent to each expert since start, retries and hedges apart.
#[derive(Debug)]
pub struct SentRows(BTreeMap<u32, Vec<AtomicU64>>);

impl SentRows {
    /// For these layers of `experts` experts each.
    pub fn new(layers: impl Iterator<Item = usize>, experts: usize) -> Self {
        let counters = || (0..experts).map(|_| AtomicU64::new(0)).collect();
        Self(layers.map(|layer| (layer as u32, counters())).collect())
    }

    /// A gate of `layer` chose these experts, one row each.
    pub fn count(&self, layer: u32, expert_ids: &[u16]) {
        let Some(rows) = self.0.get(&layer) else { return };
        for rows in expert_ids.iter().filter_map(|expert| rows.get(usize::from(*expert))) {
            rows.fetch_add(1, Relaxed);
        }
    }

    fn totals(&self) -> BTreeMap<LayerIdx, Vec<u64>> {
        let read = |rows: &Vec<AtomicU64>| rows.iter().map(|rows| rows.load(Relaxed)).collect();
        self.0.iter().map(|(layer, rows)| (LayerIdx(*layer), read(rows))).collect()
    }
}

/// This router's account of what it sent, in the store.
#[derive(Debug)]
pub struct Reporter {
    leave: CancellationToken,
    task: JoinHandle<()>,
}

impl Reporter {
    /// Tells the load of the last `window` a few times per window, under a lease of `ttl`.
    pub fn start(
        sent: Arc<SentRows>,
        (store, keys): (Arc<dyn Store>, &Keys),
        router: &RouterId,
        (ttl, window): (Duration, Duration),
    ) -> Self {
        let leave = CancellationToken::new();
        let joining = Membership::join(store, keys.load(router), ttl, Load::default().encode(), leave.clone());
        let left = leave.clone();
        let (began, mut sliding) = (Instant::now(), SlidingWindow::new(window));
        sliding.read(began.elapsed(), sent.totals());
        let task = tokio::spawn(async move {
            match joining.await {
                Ok(membership) => {
                    report(&sent, &membership, sliding, (began, window), &left).await;
                    // Dropped, it would leave too, but perhaps after this process has ended.
                    membership.leave().await;
                }
                Err(_) if left.is_cancelled() => {}
                Err(error) => warn!(%error, "the load of this router stays untold"),
            }
        });
        Self { leave, task }
    }

    /// Takes it out of the store; bounded by the membership's own limit.
    pub async fn leave(self) {
        self.leave.cancel();
        if let Err(error) = self.task.await {
            error!(%error, "the load reporter panicked");
        }
    }
}

async fn report(
    sent: &SentRows,
    membership: &Membership,
    mut sliding: SlidingWindow,
    (began, window): (Instant, Duration),
    leave: &CancellationToken,
) {
    let mut ticks = tokio::time::interval(window / READINGS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut idle = true;
    while leave.run_until_cancelled(ticks.tick()).await.is_some() {
        let Some(load) = sliding.read(began.elapsed(), sent.totals()) else { continue };
        // An idle router says so once.
        if load.total() > 0 || !idle {
            idle = load.total() == 0;
            membership.publish(load.encode());
        }
    }
}

#[cfg(test)]
mod tests {
    use conclave_placement::{
        ids::Cluster,
        store::{self, memory::MemoryStore, serve::serve_memory},
        view::View,
    };

    use super::*;

    #[test]
    fn what_does_not_exist_is_not_counted() {
        let sent = SentRows::new([1, 3].into_iter(), 2);
        sent.count(1, &[0, 1, 1, 9]);
        sent.count(2, &[0]);
        assert_eq!(sent.totals(), BTreeMap::from([(LayerIdx(1), vec![1, 2]), (LayerIdx(3), vec![0, 0])]));
    }

    #[tokio::test]
    async fn rows_are_told_while_they_are_sent_and_no_longer() {
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let spec = format!("etcd=http://{}", socket.local_addr().unwrap());
        let stop = CancellationToken::new();
        let _stopped = stop.clone().drop_guard();
        tokio::spawn(serve_memory(MemoryStore::new(), socket, stop.clone()));
        let (store, keys) = (store::connect(&spec).unwrap(), Keys::new(&Cluster::parse("c").unwrap()));
        let view = View::start(store.clone(), keys.clone(), stop.clone()).await.unwrap();
        let sent = Arc::new(SentRows::new([1].into_iter(), 2));
        let (router, times) = (RouterId::parse("r").unwrap(), (Duration::from_secs(5), Duration::from_millis(120)));
        let reporter = Reporter::start(sent.clone(), (store, &keys), &router, times);

        let mut state = view.subscribe();
        let told = |rows: u64| {
            sent.count(1, &vec![1; rows as usize]);
            let layer = LayerIdx(1);
            move |state: &Arc<conclave_placement::ClusterState>| {
                state.loads.values().any(|load| load.layers.get(&layer).is_some_and(|counts| counts == &[0, rows]))
            }
        };
        let patience = Duration::from_secs(60);
        tokio::time::timeout(patience, state.wait_for(told(7))).await.expect("it is told").unwrap();
        tokio::time::timeout(patience, state.wait_for(told(0))).await.expect("it passes").unwrap();
        reporter.leave().await;
        tokio::time::timeout(patience, state.wait_for(|state| state.loads.is_empty())).await.expect("it goes").unwrap();
    }
}
