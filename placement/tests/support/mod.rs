//! What the stories of this crate share: a real etcd, a served memory store, and waiting for something to become true.
//!
//! In: nothing. Out: stores to try things on. Never here: a story.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod etcd_process;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use conclave_placement::state::{WorkerRecord, WorkerState};
use conclave_placement::store::etcd::EtcdStore;
use conclave_placement::store::memory::MemoryStore;
use conclave_placement::store::serve::serve_memory;
use conclave_placement::{Cluster, Incarnation, Keys, PlanVersion, WorkerId};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Long enough for a loaded machine; a story that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: still waiting after {PATIENCE:?}"))
}

/// Waits until a watched value is as wanted, and returns it.
pub(crate) async fn until<T: Clone>(what: &str, mut receiver: watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) -> T {
    soon(what, async { receiver.wait_for(wanted).await.expect("its sender lives").clone() }).await
}

/// A memory store behind a socket, until dropped.
pub(crate) struct Served {
    pub(crate) store: Arc<EtcdStore>,
    pub(crate) address: String,
    _stop: DropGuard,
}

pub(crate) async fn served() -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("it is bound"));
    let token = CancellationToken::new();
    tokio::spawn(serve_memory(MemoryStore::new(), listener, token.clone()));
    Served { store: Arc::new(EtcdStore::new(vec![address.clone()])), address, _stop: token.drop_guard() }
}

pub(crate) fn keys() -> Keys {
    Keys::new(&Cluster::parse("story").expect("a name"))
}

pub(crate) fn worker(name: &str, plan: u64) -> WorkerRecord {
    WorkerRecord {
        state: WorkerState::Serving,
        plan_version: PlanVersion(plan),
        ..WorkerRecord::starting(WorkerId::parse(name).expect("a name"), Incarnation::fresh(), "127.0.0.1:7500")
    }
}
