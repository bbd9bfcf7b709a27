//! The store in memory: for `conclave up` without etcd (served by `serve`), for simulations and for tests.
//!
//! In: calls from any task. Out: the same promises as etcd's, from one lock. Never here: a file; it ends with its
//! process. The lock is never held across an await, and every operation first ends the leases whose time is over, so that
//! nobody sees a key longer than its lease.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::ledger::{Condition, Done, Keyspan, Ledger, Op, Refusal};
use super::{CasOutcome, Entry, Error, Expected, KeepAlive, LeaseId, Listing, Result, Store, Transaction, WatchStream};

/// A store that lives as long as its last clone.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
    // Ends the expiry task when the last clone is dropped.
    guard: Arc<Guard>,
}

#[derive(Debug)]
struct Shared {
    ledger: Mutex<Ledger>,
    leases_changed: Notify,
}

#[derive(Debug)]
struct Guard {
    token: CancellationToken,
    started: Mutex<bool>,
    _cancel: DropGuard,
}

impl MemoryStore {
    /// An empty store.
    #[expect(clippy::new_without_default, reason = "a store is made on purpose, never by default")]
    pub fn new() -> Self {
        let token = CancellationToken::new();
        let guard = Guard { token: token.clone(), started: Mutex::new(false), _cancel: token.drop_guard() };
        let shared = Shared { ledger: Mutex::new(Ledger::new()), leases_changed: Notify::new() };
        Self { shared: Arc::new(shared), guard: Arc::new(guard) }
    }

    /// Forgets the events before a revision, as `etcdctl compact` does. The store does it by itself when history grows.
    pub fn compact(&self, revision: i64) -> Result<()> {
        self.with(|ledger| ledger.compact(revision)).map_err(|refusal| refused("compact", &refusal))
    }

    /// One operation, after the leases whose time is over have ended.
    pub(crate) fn with<R>(&self, operation: impl FnOnce(&mut Ledger) -> R) -> R {
        let mut ledger = self.shared.ledger.lock();
        ledger.expire(Instant::now());
        operation(&mut ledger)
    }

    /// Grants a lease and sees to it that it ends on time though nobody asks.
    pub(crate) fn grant_lease(&self, id: Option<LeaseId>, ttl: Duration) -> std::result::Result<LeaseId, Refusal> {
        let lease = self.with(|ledger| ledger.grant(id, ttl, Instant::now()))?;
        let mut started = self.guard.started.lock();
        if !*started {
            *started = true;
            tokio::spawn(expire(self.shared.clone(), self.guard.token.clone()));
        }
        self.shared.leases_changed.notify_one();
        Ok(lease)
    }
}

async fn expire(shared: Arc<Shared>, token: CancellationToken) {
    loop {
        let next = shared.ledger.lock().next_expiry();
        let over = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = token.cancelled() => return,
            () = shared.leases_changed.notified() => {}
            () = over => shared.ledger.lock().expire(Instant::now()),
        }
    }
}

fn refused(call: &'static str, refusal: &Refusal) -> Error {
    match refusal {
        Refusal::Lease(lease) => Error::LeaseLost(*lease),
        Refusal::Compacted(compact_revision) => Error::Compacted { compact_revision: *compact_revision },
        refusal => Error::Refused { call, message: refusal.to_string() },
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        Ok(self.with(|ledger| ledger.entry(key).cloned()))
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        Ok(self.with(|ledger| Listing { entries: ledger.read(&Keyspan::prefix(prefix)), revision: ledger.revision() }))
    }

    async fn compare_and_put(
        &self,
        key: &str,
        expected: Expected,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome> {
        self.with(|ledger| {
            let current = ledger.entry(key).cloned();
            if !expected.is_met_by(current.as_ref()) {
                return Ok(CasOutcome::Conflict { current });
            }
            let put = Op::Put { key: key.to_owned(), value, lease };
            ledger.transact(&[], vec![put], Vec::new()).map_err(|refusal| refused("compare_and_put", &refusal))?;
            Ok(CasOutcome::Stored { revision: ledger.revision() })
        })
    }

    async fn transact(&self, transaction: Transaction) -> Result<Option<i64>> {
        let Transaction { conditions, puts, deletes } = transaction;
        let conditions = conditions.into_iter().map(|(key, expected)| {
            let condition: Condition = Box::new(move |entry| expected.is_met_by(entry));
            (key, condition)
        });
        let conditions: Vec<(String, Condition)> = conditions.collect();
        let puts = puts.into_iter().map(|(key, value)| Op::Put { key, value, lease: None });
        let deletes = deletes.map(|(from, to)| Op::Delete(Keyspan::between(&from, &to)));
        self.with(|ledger| {
            let done = ledger.transact(&conditions, puts.chain(deletes).collect(), Vec::new());
            let (holds, _) = done.map_err(|refusal| refused("transact", &refusal))?;
            Ok(holds.then(|| ledger.revision()))
        })
    }

    async fn put(&self, key: &str, value: Bytes, lease: Option<LeaseId>) -> Result<i64> {
        self.with(|ledger| {
            let put = Op::Put { key: key.to_owned(), value, lease };
            ledger.transact(&[], vec![put], Vec::new()).map_err(|refusal| refused("put", &refusal))?;
            Ok(ledger.revision())
        })
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        delete(self, "delete", Keyspan::key(key)).map(|deleted| deleted > 0)
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<u64> {
        delete(self, "delete_prefix", Keyspan::prefix(prefix))
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let changes = self.with(|ledger| ledger.watch(Keyspan::prefix(prefix), from_revision));
        let changes = ReceiverStream::new(changes.map_err(|refusal| refused("watch", &refusal))?);
        Ok(WatchStream::new(changes.map(|batch| Ok(batch.into_iter().map(|change| change.event).collect()))))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId> {
        self.grant_lease(None, ttl).map_err(|refusal| refused("grant", &refusal))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<KeepAlive> {
        let remaining = self.with(|ledger| ledger.renew(lease, Instant::now()));
        remaining.map(|remaining| KeepAlive { remaining }).ok_or(Error::LeaseLost(lease))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.with(|ledger| ledger.revoke(lease));
        Ok(())
    }
}

fn delete(store: &MemoryStore, call: &'static str, span: Keyspan) -> Result<u64> {
    let done = store.with(|ledger| ledger.transact(&[], vec![Op::Delete(span)], Vec::new()));
    let (_, done) = done.map_err(|refusal| refused(call, &refusal))?;
    let deleted = done.iter().map(|done| if let Done::Delete { previous } = done { previous.len() as u64 } else { 0 });
    Ok(deleted.sum())
}
