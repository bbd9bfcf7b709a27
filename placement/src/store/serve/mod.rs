//! The memory store behind the part of etcd's v3 API that we use, so that every process has one store client whichever
//! store runs, and `etcdctl` can look into both.
//!
//! In: gRPC calls of `etcdserverpb`. Out: etcd's answers, and etcd's own words in errors, since clients match on them.
//! Never here: old revisions (a read is of now), nested transactions, several members, users; they answer UNIMPLEMENTED.

mod about;
mod kv;
mod lease;
mod watch;

use std::time::Duration;

use etcd_client::proto::{
    PbClusterServer, PbKeyValue, PbKvServer, PbLeaseServer, PbMaintenanceServer, PbResponseHeader, PbWatchServer,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::ledger::{Ledger, Refusal};
use super::memory::MemoryStore;
use super::{Entry, LeaseId, MAX_VALUE};

/// This store's numbers in headers and in `etcdctl member list`. There is one of it, so they are constants.
const CLUSTER: u64 = 0xc0c1;
const MEMBER: u64 = 1;
/// Requests carry one value, or a few.
const MAX_REQUEST: usize = 2 * MAX_VALUE;
const MAX_STREAMS: u32 = 1024;
/// How long open calls may take to end once the server should.
const GRACE: Duration = Duration::from_secs(2);

/// The server could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The listener has no address.
    #[error("the store's listener has no address: {0}")]
    Listener(#[from] std::io::Error),
    /// The transport failed.
    #[error("serving the store failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves the store until the token is cancelled.
pub async fn serve_memory(store: MemoryStore, listener: TcpListener, token: CancellationToken) -> Result<(), Error> {
    let address = listener.local_addr()?;
    // Nagle's algorithm makes a small answer wait for the acknowledgement of the one before: 44 ms instead of 0.1.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let kv = PbKvServer::new(kv::Kv { store: store.clone() }).max_decoding_message_size(MAX_REQUEST);
    let watch = PbWatchServer::new(watch::Watch { store: store.clone(), token: token.clone() });
    let lease = PbLeaseServer::new(lease::Lease { store: store.clone(), token: token.clone() });
    let about = about::About { store, address };
    let serving = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(kv)
        .add_service(watch)
        .add_service(lease)
        .add_service(PbMaintenanceServer::new(about.clone()))
        .add_service(PbClusterServer::new(about))
        .serve_with_incoming_shutdown(incoming, token.clone().cancelled_owned());
    let overdue = async {
        token.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        outcome = serving => Ok(outcome?),
        () = overdue => Ok(()),
    }
}

fn header(revision: i64) -> Option<PbResponseHeader> {
    Some(PbResponseHeader { cluster_id: CLUSTER, member_id: MEMBER, revision, raft_term: 1 })
}

fn now(ledger: &Ledger) -> Option<PbResponseHeader> {
    header(ledger.revision())
}

fn pair(entry: &Entry) -> PbKeyValue {
    PbKeyValue {
        key: entry.key.clone().into_bytes(),
        value: entry.value.to_vec(),
        create_revision: entry.create_revision,
        mod_revision: entry.mod_revision,
        version: entry.version,
        lease: entry.lease.map_or(0, |lease| lease.0),
    }
}

fn lease_id(number: i64) -> Option<LeaseId> {
    (number != 0).then_some(LeaseId(number))
}

fn text(key: Vec<u8>) -> Result<String, Status> {
    String::from_utf8(key).map_err(|_| Status::invalid_argument("a key must be UTF-8"))
}

/// The book's refusals, with the codes and words of etcd's own errors.
fn status(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::Key => Status::invalid_argument("etcdserver: key is not provided, or longer than 1024 bytes"),
        Refusal::Value(_) => Status::invalid_argument("etcdserver: request is too large"),
        Refusal::Operations => Status::invalid_argument("etcdserver: too many operations in txn request"),
        Refusal::Twice(_) => Status::invalid_argument("etcdserver: duplicate key given in txn request"),
        Refusal::Full(what) => Status::resource_exhausted(format!("etcdserver: mvcc: database space exceeded: {what}")),
        Refusal::Lease(_) => Status::not_found("etcdserver: requested lease not found"),
        Refusal::LeaseTaken(_) => Status::failed_precondition("etcdserver: lease already exists"),
        Refusal::Compacted(_) => Status::out_of_range("etcdserver: mvcc: required revision has been compacted"),
        Refusal::Future(_) => Status::out_of_range("etcdserver: mvcc: required revision is a future revision"),
    }
}

fn unsupported(what: &'static str) -> Status {
    Status::unimplemented(format!("the embedded store does not do {what}; etcd does"))
}
