//! The live view: the cluster's state in memory, as the store last told it.
//!
//! In: a listing of the cluster's keys, then a watch from the next revision. Out: one `Arc<ClusterState>` at a time, never
//! half of a change. Never here: an empty state because the store is away. The last picture stays until there is a newer
//! one, and after any break (an ended watch, a compaction, a store that restarted) the keys are listed anew.

mod assembly;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backoff::Backoff;
use crate::keys::Keys;
use crate::state::ClusterState;
use crate::store::{Error, Result, Store, WatchStream};
use assembly::Assembly;

/// The state of one cluster, current while the store is there. Dropping it ends its task.
#[derive(Debug)]
pub struct View {
    state: watch::Receiver<Arc<ClusterState>>,
    _guard: DropGuard,
}

impl View {
    /// Starts with a complete picture, waiting for a store that is away until it comes or the token is cancelled.
    pub async fn start(store: Arc<dyn Store>, keys: Keys, token: CancellationToken) -> Result<Self> {
        let token = token.child_token();
        let mut follower = Follower { store, assembly: Assembly::new(keys) };
        let first = token.run_until_cancelled(follower.connect()).await;
        let events = first.ok_or(Error::Closed)??;
        let (publish, state) = watch::channel(Arc::new(follower.assembly.state().clone()));
        let guard = token.clone().drop_guard();
        tokio::spawn(async move { token.run_until_cancelled(follower.follow(events, publish)).await });
        Ok(Self { state, _guard: guard })
    }

    /// The latest picture.
    pub fn current(&self) -> Arc<ClusterState> {
        self.state.borrow().clone()
    }

    /// Every later picture, or at least the latest.
    pub fn subscribe(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }
}

struct Follower {
    store: Arc<dyn Store>,
    assembly: Assembly,
}

impl Follower {
    /// Lists the keys and opens a watch from there; tries again while the store is away.
    async fn connect(&mut self) -> Result<WatchStream> {
        let mut backoff = Backoff::new();
        loop {
            match self.list_and_watch().await {
                Ok(events) => return Ok(events),
                Err(error) if error.retryable() || matches!(error, Error::Compacted { .. }) => {
                    tracing::warn!(%error, "the view waits for the store");
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn list_and_watch(&mut self) -> Result<WatchStream> {
        let prefix = self.assembly.prefix().to_owned();
        let listing = self.store.list(&prefix).await?;
        let events = self.store.watch(&prefix, listing.revision + 1).await?;
        self.assembly.replace(listing);
        Ok(events)
    }

    async fn follow(&mut self, mut events: WatchStream, publish: watch::Sender<Arc<ClusterState>>) {
        let mut backoff = Backoff::new();
        loop {
            match events.next().await {
                Ok(batch) => {
                    backoff.reset();
                    self.assembly.apply(batch);
                }
                Err(error) => {
                    tracing::info!(%error, "the view lists the cluster anew, and keeps what it has until then");
                    backoff.wait().await;
                    match self.connect().await {
                        Ok(again) => events = again,
                        // A store that refuses may be told to think again; the state stays meanwhile.
                        Err(error) => tracing::error!(%error, "the store refuses the view"),
                    }
                }
            }
            let state = self.assembly.state();
            publish.send_if_modified(|current| {
                let changed = **current != *state;
                if changed {
                    *current = Arc::new(state.clone());
                }
                changed
            });
        }
    }
}
