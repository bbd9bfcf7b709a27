//! The store in etcd, or in anything that speaks the same part of its v3 API.
//!
//! In: addresses. Out: the promises of [`Store`], each call within a time limit. Never here: a background task, or a
//! silent repair. A watch that ends says so and its reader lists again; a lease that ended says so and its holder takes
//! another. What does repair itself is the connection: a call that times out or finds nobody throws it away, and the next
//! one goes to the next address. Otherwise a connection into a black hole would be used until TCP gives up on it, minutes
//! later.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, DeleteOptions, EventType, GetOptions, KeyValue, KvClient, LeaseClient,
    PutOptions, Txn, TxnOp, TxnOpResponse, WatchClient, WatchOptions, WatchResponse,
};
use futures::stream;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use super::{
    CasOutcome, Entry, Error, Event, Expected, KeepAlive, LeaseId, Listing, MAX_VALUE, Result, Store, Transaction,
    WatchStream,
};

/// How long any call may take. etcd's own elections take about one second.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long one of several addresses may take for a call that may go to another: a member that hangs must not cost a lease.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(1);
/// etcd answers pings that come more often than every 5 s with GOAWAY, so these come a little less often.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// A whole cluster's records and plan come in one listing.
const MAX_MESSAGE: usize = 64 << 20;

/// A client of one etcd cluster. Connects when it is first called, to one address at a time.
pub struct EtcdStore {
    endpoints: Vec<String>,
    current: Mutex<Current>,
}

/// The connection in use, if any, and whose turn it is.
struct Current {
    connection: Option<Arc<Connection>>,
    turn: usize,
}

struct Connection {
    kv: KvClient,
    watch: WatchClient,
    lease: LeaseClient,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EtcdStore").field(&self.endpoints).finish()
    }
}

impl EtcdStore {
    /// A store at these addresses (`http://host:port`), members of one etcd cluster.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self { endpoints, current: Mutex::new(Current { connection: None, turn: 0 }) }
    }

    async fn connection(&self) -> Outcome<Arc<Connection>> {
        let turn = {
            let current = self.current.lock();
            if let Some(connection) = &current.connection {
                return Ok(connection.clone());
            }
            current.turn
        };
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_tcp_keepalive(PING_EVERY)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            // etcd takes pings without a call in flight for abuse.
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        let mut endpoints = self.endpoints.iter().cycle().skip(turn % self.endpoints.len().max(1));
        let client = Client::connect(endpoints.next().as_slice(), Some(options)).await?;
        let connection = Arc::new(Connection {
            kv: client.kv_client().max_decoding_message_size(MAX_MESSAGE),
            watch: client.watch_client().max_decoding_message_size(MAX_MESSAGE),
            lease: client.lease_client(),
        });
        self.current.lock().connection = Some(connection.clone());
        Ok(connection)
    }

    /// Throws a connection away, unless another call did already, and passes the turn on.
    fn discard(&self, connection: &Arc<Connection>) {
        let mut current = self.current.lock();
        if current.connection.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection)) {
            current.connection = None;
            current.turn = current.turn.wrapping_add(1);
        }
    }

    /// Runs a call once, for what must not happen twice.
    async fn once<T, F>(&self, call: &'static str, run: impl FnOnce(Arc<Connection>) -> F) -> Result<T>
    where
        F: Future<Output = Outcome<T>>,
    {
        self.attempt(call, Instant::now() + CALL_TIMEOUT, run).await
    }

    /// Runs a call that may happen twice at one address after the other until one answers, within one time limit.
    async fn anywhere<T, F>(&self, call: &'static str, run: impl Fn(Arc<Connection>) -> F) -> Result<T>
    where
        F: Future<Output = Outcome<T>>,
    {
        let deadline = Instant::now() + CALL_TIMEOUT;
        for left in (2..=self.endpoints.len()).rev() {
            let share = (deadline.saturating_duration_since(Instant::now()) / left as u32).min(ADDRESS_TIMEOUT);
            match self.attempt(call, Instant::now() + share, &run).await {
                Err(error @ (Error::Unavailable { .. } | Error::Timeout { .. })) => {
                    tracing::debug!(call, %error, "asking the next address");
                }
                answer => return answer,
            }
        }
        self.attempt(call, deadline, &run).await
    }

    async fn attempt<T, F>(
        &self,
        call: &'static str,
        deadline: Instant,
        run: impl FnOnce(Arc<Connection>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Outcome<T>>,
    {
        let connection = self.connection().await.map_err(|error| classify(call, error))?;
        let answer = match timeout_at(deadline, run(connection.clone())).await {
            Ok(outcome) => outcome.map_err(|error| classify(call, error)),
            Err(_) => Err(Error::Timeout { call, after: CALL_TIMEOUT }),
        };
        if matches!(answer, Err(Error::Timeout { .. } | Error::Unavailable { .. })) {
            self.discard(&connection);
        }
        answer
    }
}

type Outcome<T> = std::result::Result<T, etcd_client::Error>;

/// Sorts what etcd and the transport say into what can be tried again and what cannot.
fn classify(call: &'static str, error: etcd_client::Error) -> Error {
    let message = error.to_string();
    match error {
        etcd_client::Error::GRpcStatus(status) => match status.code() {
            Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Aborted | Code::Internal => {
                Error::Unavailable { call, message: status.message().to_owned() }
            }
            Code::DeadlineExceeded => Error::Timeout { call, after: CALL_TIMEOUT },
            // "no space" is the one exhaustion that somebody must repair; "too many requests" passes.
            Code::ResourceExhausted if !status.message().contains("space") => {
                Error::Unavailable { call, message: status.message().to_owned() }
            }
            _ => Error::Refused { call, message: status.message().to_owned() },
        },
        etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => Error::Refused { call, message },
        _ => Error::Unavailable { call, message },
    }
}

/// etcd's answer to anything about a lease it does not have.
fn lease_lost(error: &etcd_client::Error) -> bool {
    match error {
        etcd_client::Error::GRpcStatus(status) => {
            status.code() == Code::NotFound && status.message().contains("lease not found")
        }
        // The client says this for a keep-alive that is answered with a ttl of 0, and for nothing else.
        etcd_client::Error::LeaseKeepAliveError(_) => true,
        _ => false,
    }
}

fn malformed(what: &'static str) -> etcd_client::Error {
    etcd_client::Error::Internal(format!("the answer has {what}"))
}

fn revision(header: Option<&etcd_client::ResponseHeader>) -> Outcome<i64> {
    header.map(etcd_client::ResponseHeader::revision).ok_or_else(|| malformed("no header"))
}

/// `None` for a key that is no UTF-8, which none of ours is.
fn entry(pair: &KeyValue) -> Option<Entry> {
    Some(Entry {
        key: pair.key_str().ok()?.to_owned(),
        value: Bytes::copy_from_slice(pair.value()),
        create_revision: pair.create_revision(),
        mod_revision: pair.mod_revision(),
        version: pair.version(),
        lease: Some(LeaseId(pair.lease())).filter(|lease| lease.0 != 0),
    })
}

fn check(call: &'static str, bytes: usize) -> Result<()> {
    if bytes <= MAX_VALUE {
        return Ok(());
    }
    Err(Error::Refused { call, message: format!("values of {bytes} bytes are more than {MAX_VALUE}") })
}

fn comparison(key: &str, expected: Expected) -> Compare {
    match expected {
        Expected::Absent => Compare::create_revision(key, CompareOp::Equal, 0),
        Expected::ModRevision(revision) => Compare::mod_revision(key, CompareOp::Equal, revision),
    }
}

/// Turns the answer to a call that named a lease into its outcome.
fn with_lease<T>(lease: Option<LeaseId>, outcome: Outcome<T>) -> Outcome<std::result::Result<T, LeaseId>> {
    match (outcome, lease) {
        (Err(error), Some(lease)) if lease_lost(&error) => Ok(Err(lease)),
        (outcome, _) => outcome.map(Ok),
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let got = self.anywhere("get", |connection| async move { connection.kv.clone().get(key, None).await }).await?;
        Ok(got.kvs().first().and_then(entry))
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        let list = |connection: Arc<Connection>| async move {
            let options = GetOptions::new().with_prefix();
            let got = connection.kv.clone().get(prefix, Some(options)).await?;
            let revision = revision(got.header())?;
            Ok(Listing { entries: got.kvs().iter().filter_map(entry).collect(), revision })
        };
        self.anywhere("list", list).await
    }

    async fn compare_and_put(
        &self,
        key: &str,
        expected: Expected,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome> {
        check("compare_and_put", value.len())?;
        let condition = comparison(key, expected);
        let put = TxnOp::put(key, value, Some(put_options(lease)));
        let txn = Txn::new().when([condition]).and_then([put]).or_else([TxnOp::get(key, None)]);
        let swap = |connection: Arc<Connection>| async move {
            let done = match with_lease(lease, connection.kv.clone().txn(txn).await)? {
                Ok(done) => done,
                Err(lease) => return Ok(Err(lease)),
            };
            if done.succeeded() {
                return Ok(Ok(CasOutcome::Stored { revision: revision(done.header())? }));
            }
            match done.op_responses().first() {
                Some(TxnOpResponse::Get(got)) => {
                    Ok(Ok(CasOutcome::Conflict { current: got.kvs().first().and_then(entry) }))
                }
                _ => Err(malformed("no entry")),
            }
        };
        self.once("compare_and_put", swap).await?.map_err(Error::LeaseLost)
    }

    async fn transact(&self, transaction: Transaction) -> Result<Option<i64>> {
        let Transaction { conditions, puts, deletes } = transaction;
        check("transact", puts.iter().map(|(_, value)| value.len()).sum())?;
        let conditions: Vec<Compare> = conditions.iter().map(|(key, expected)| comparison(key, *expected)).collect();
        let puts = puts.into_iter().map(|(key, value)| TxnOp::put(key, value, None));
        let deletes = deletes.map(|(from, to)| TxnOp::delete(from, Some(DeleteOptions::new().with_range(to))));
        let txn = Txn::new().when(conditions).and_then(puts.chain(deletes).collect::<Vec<_>>());
        let run = |connection: Arc<Connection>| async move {
            let done = connection.kv.clone().txn(txn).await?;
            let revision = revision(done.header())?;
            Ok(done.succeeded().then_some(revision))
        };
        self.once("transact", run).await
    }

    async fn put(&self, key: &str, value: Bytes, lease: Option<LeaseId>) -> Result<i64> {
        check("put", value.len())?;
        let put = |connection: Arc<Connection>| async move {
            let put = connection.kv.clone().put(key, value, Some(put_options(lease))).await;
            match with_lease(lease, put)? {
                Ok(put) => revision(put.header()).map(Ok),
                Err(lease) => Ok(Err(lease)),
            }
        };
        self.once("put", put).await?.map_err(Error::LeaseLost)
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        let gone =
            self.once("delete", |connection| async move { connection.kv.clone().delete(key, None).await }).await?;
        Ok(gone.deleted() > 0)
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<u64> {
        let options = DeleteOptions::new().with_prefix();
        let delete =
            |connection: Arc<Connection>| async move { connection.kv.clone().delete(prefix, Some(options)).await };
        Ok(self.once("delete_prefix", delete).await?.deleted().unsigned_abs())
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let open = |connection: Arc<Connection>| async move {
            let options = WatchOptions::new().with_prefix().with_start_revision(from_revision);
            let mut stream = connection.watch.clone().watch(prefix, Some(options)).await?;
            // The first message says that the watch exists; until then an event could be missed.
            let first = stream.message().await?.ok_or_else(|| malformed("no message"))?;
            Ok((stream, first))
        };
        let (stream, first) = self.anywhere("watch", open).await?;
        let first = events(&first)?;
        let rest = stream::unfold(Some(stream), |stream| async move {
            let mut stream = stream?;
            match stream.message().await {
                Ok(Some(message)) => match events(&message) {
                    Ok(events) => Some((Ok(events), Some(stream))),
                    Err(error) => Some((Err(error), None)),
                },
                Ok(None) => None,
                Err(error) => {
                    tracing::debug!(%error, "a watch ended");
                    None
                }
            }
        });
        Ok(WatchStream::new(futures::StreamExt::chain(stream::iter([Ok(first)]), rest)))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds.max(1)).unwrap_or(i64::MAX);
        let grant = |connection: Arc<Connection>| async move { connection.lease.clone().grant(seconds, None).await };
        Ok(LeaseId(self.anywhere("grant", grant).await?.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<KeepAlive> {
        // One stream per beat: beats are seconds apart, and a stream that broke between two of them would have to be
        // told from a lease that ended. So every beat gets the store's own answer.
        let beat = |connection: Arc<Connection>| async move {
            let (mut keeper, mut answers) =
                match with_lease(Some(lease), connection.lease.clone().keep_alive(lease.0).await)? {
                    Ok(kept) => kept,
                    Err(lease) => return Ok(Err(lease)),
                };
            // Opening the stream was the first beat, and its answer, which carries the ttl, is taken by the client.
            keeper.keep_alive().await?;
            let answer = answers.message().await?.ok_or_else(|| malformed("no message"))?;
            Ok(u64::try_from(answer.ttl()).ok().filter(|ttl| *ttl > 0).ok_or(lease))
        };
        let remaining = self.anywhere("keep_alive", beat).await?.map_err(Error::LeaseLost)?;
        Ok(KeepAlive { remaining: Duration::from_secs(remaining) })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        let revoke = |connection: Arc<Connection>| async move {
            let revoked = connection.lease.clone().revoke(lease.0).await;
            with_lease(Some(lease), revoked).map(|_| ())
        };
        self.anywhere("revoke", revoke).await
    }
}

fn put_options(lease: Option<LeaseId>) -> PutOptions {
    lease.map_or_else(PutOptions::new, |lease| PutOptions::new().with_lease(lease.0))
}

const PUT: i32 = EventType::Put as i32;
const DELETE: i32 = EventType::Delete as i32;

/// The events of one message; none for the one that says the watch exists.
fn events(message: &WatchResponse) -> Result<Vec<Event>> {
    if message.compact_revision() > 0 {
        return Err(Error::Compacted { compact_revision: message.compact_revision() });
    }
    if message.canceled() {
        tracing::debug!(reason = message.cancel_reason(), "the store ended a watch");
        return Err(Error::Closed);
    }
    let event = |event: &etcd_client::Event| {
        let entry = entry(event.kv()?)?;
        // Not `event_type()`, which panics on a number it does not know.
        match event.0.r#type {
            PUT => Some(Event::Put(entry)),
            DELETE => Some(Event::Delete { key: entry.key, revision: entry.mod_revision }),
            _ => None,
        }
    };
    Ok(message.events().iter().filter_map(event).collect())
}
