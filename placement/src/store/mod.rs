//! The store: a small linearizable key-value store with leases and watches, behind one trait.
//!
//! In: keys and values of the control plane. Out: entries with their revisions, and events in the order they happened.
//! Never here: what a value means, retries that go on for ever, or memory without a bound. Errors know whether trying
//! again can help; trying again is the caller's.

pub mod etcd;
mod ledger;
pub mod memory;
pub mod serve;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt};
use tonic::transport::Uri;

/// The largest value a store takes: what an etcd with default settings takes in one request of 1.5 MiB.
pub const MAX_VALUE: usize = crate::codec::MAX_VALUE;

/// A lease: keys put under it vanish when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A key and its value, as of its last change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// The revision that created the key.
    pub create_revision: i64,
    /// The revision that last put it.
    pub mod_revision: i64,
    /// How often it was put since it was created, from 1.
    pub version: i64,
    /// The lease it ends with.
    pub lease: Option<LeaseId>,
}

/// All keys with a prefix, ascending, and the store's revision at that moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The entries, by key.
    pub entries: Vec<Entry>,
    /// Watching from the next revision misses nothing.
    pub revision: i64,
}

/// What is asked of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// It must not exist.
    Absent,
    /// It must exist, last put at this revision.
    ModRevision(i64),
}

impl Expected {
    fn is_met_by(self, entry: Option<&Entry>) -> bool {
        match self {
            Self::Absent => entry.is_none(),
            Self::ModRevision(revision) => entry.is_some_and(|entry| entry.mod_revision == revision),
        }
    }
}

/// What a compare-and-put did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CasOutcome {
    /// The value is stored.
    Stored {
        /// At this revision.
        revision: i64,
    },
    /// The key was not as expected, nothing is stored.
    Conflict {
        /// What is there instead.
        current: Option<Entry>,
    },
}

/// What is done in one revision if every key is as expected, and not at all otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// What is asked of keys.
    pub conditions: Vec<(String, Expected)>,
    /// Values to put, under no lease. Together at most [`MAX_VALUE`] bytes.
    pub puts: Vec<(String, Bytes)>,
    /// Keys to delete, from the first up to the second and without it. None that is put.
    pub deletes: Option<(String, String)>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A key was put.
    Put(Entry),
    /// A key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: i64,
    },
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision of the change.
    pub fn revision(&self) -> i64 {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// A lease that was renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive {
    /// How long it lives without another renewal.
    pub remaining: Duration,
}

/// What can go wrong with a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No answer in time. A write may or may not have happened.
    #[error("{call}: the store did not answer within {after:?}")]
    Timeout {
        /// The call.
        call: &'static str,
        /// The time given.
        after: Duration,
    },
    /// Not reachable, or without a leader. A write may or may not have happened.
    #[error("{call}: the store is not available: {message}")]
    Unavailable {
        /// The call.
        call: &'static str,
        /// As the transport or the store puts it.
        message: String,
    },
    /// Asking again will not help.
    #[error("{call}: the store refused: {message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// As the store puts it.
        message: String,
    },
    /// The lease ended: it expired, or was revoked. Its keys are gone.
    #[error("lease {0} is lost")]
    LeaseLost(LeaseId),
    /// The events asked for are no longer kept. List, then watch from there.
    #[error("watch: the events up to revision {compact_revision} are compacted away")]
    Compacted {
        /// The oldest revision that can be watched.
        compact_revision: i64,
    },
    /// The watch ended, by the store's end or because its reader was too slow. List, then watch again.
    #[error("watch: the stream ended")]
    Closed,
    /// A store specification that cannot be read.
    #[error("store {spec:?}: {problem}")]
    Spec {
        /// As given.
        spec: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Error {
    /// Whether the same call may work later. Not so for a lost lease or a compacted watch, which need another call.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Unavailable { .. } | Self::Closed => true,
            Self::Refused { .. } | Self::LeaseLost(_) | Self::Compacted { .. } | Self::Spec { .. } => false,
        }
    }
}

/// Events of a watch that are given together at most, where more have come.
const AT_ONCE: usize = 4096;

/// A call's outcome.
pub type Result<T> = std::result::Result<T, Error>;

/// Events of a watch, in batches. Revisions never go down from one event to the next.
pub struct WatchStream {
    batches: BoxStream<'static, Result<Vec<Event>>>,
    /// What follows the batch that was given last.
    end: Option<Error>,
}

impl WatchStream {
    /// From batches that end with an error, or with the stream. A store makes them.
    pub fn new(batches: impl Stream<Item = Result<Vec<Event>>> + Send + 'static) -> Self {
        // Fused, so that asking on after the end gets the end again.
        Self { batches: batches.fuse().boxed(), end: None }
    }

    /// The next events, at least one, and with them those that have come meanwhile: who reads slowly gets more at once and
    /// keeps up. [`Error::Closed`] or [`Error::Compacted`] is the last thing it says.
    pub async fn next(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        while events.is_empty() {
            if let Some(end) = self.end.take() {
                return Err(end);
            }
            events = self.batches.next().await.unwrap_or(Err(Error::Closed))?;
        }
        while self.end.is_none() && events.len() < AT_ONCE {
            match self.batches.next().now_or_never() {
                Some(Some(Ok(more))) => events.extend(more),
                Some(Some(Err(error))) => self.end = Some(error),
                Some(None) => self.end = Some(Error::Closed),
                None => break,
            }
        }
        Ok(events)
    }
}

impl fmt::Debug for WatchStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WatchStream")
    }
}

/// A linearizable store: a read sees every write that was answered before it began.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// One entry.
    async fn get(&self, key: &str) -> Result<Option<Entry>>;

    /// Every entry whose key starts with `prefix`, at one revision.
    async fn list(&self, prefix: &str) -> Result<Listing>;

    /// Puts a value if the key is as expected. After [`Error::Timeout`] or [`Error::Unavailable`] the value may be there:
    /// who tries again must know its own value in a [`CasOutcome::Conflict`].
    async fn compare_and_put(
        &self,
        key: &str,
        expected: Expected,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome>;

    /// Does all of a transaction, or nothing: the revision, or `None` where a condition does not hold. After
    /// [`Error::Timeout`] or [`Error::Unavailable`] it may have been done.
    async fn transact(&self, transaction: Transaction) -> Result<Option<i64>>;

    /// Puts a value whatever is there, under `lease` or none; returns the revision.
    async fn put(&self, key: &str, value: Bytes, lease: Option<LeaseId>) -> Result<i64>;

    /// Deletes a key; whether it was there.
    async fn delete(&self, key: &str) -> Result<bool>;

    /// Deletes every key that starts with `prefix`, in one revision; how many there were.
    async fn delete_prefix(&self, prefix: &str) -> Result<u64>;

    /// Events of keys that start with `prefix`, from that revision on, past ones included. When the store no longer keeps
    /// them, [`Error::Compacted`] comes from here or as the stream's first word.
    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream>;

    /// A lease that lives `ttl` without renewal. A store may round up to whole seconds, or to its own minimum.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Renews a lease, or says [`Error::LeaseLost`].
    async fn keep_alive(&self, lease: LeaseId) -> Result<KeepAlive>;

    /// Ends a lease and deletes its keys. A lease that is gone already is no error.
    async fn revoke(&self, lease: LeaseId) -> Result<()>;
}

/// The store of a `--store` flag: `etcd=http://host:port[,http://host:port..]`, or the addresses alone. Connects when it
/// is first called, so a store that is away is an error of that call, not of this one.
pub fn connect(spec: &str) -> Result<Arc<dyn Store>> {
    let wrong = |problem| Error::Spec { spec: spec.to_owned(), problem };
    let endpoints = spec.strip_prefix("etcd=").unwrap_or(spec);
    let endpoints: Vec<String> = endpoints.split(',').map(|endpoint| endpoint.trim().to_owned()).collect();
    for endpoint in &endpoints {
        let uri: Uri = endpoint.parse().map_err(|_| wrong("not an address"))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong("an address must begin with http://"));
        }
        if uri.port_u16().is_none() {
            return Err(wrong("an address needs a port"));
        }
    }
    Ok(Arc::new(etcd::EtcdStore::new(endpoints)))
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    #[tokio::test]
    async fn a_spec_names_one_store_or_says_what_is_wrong() {
        assert!(connect("etcd=http://127.0.0.1:2379").is_ok());
        assert!(connect("http://a:1,http://b:2/").is_ok());
        for bad in ["", "etcd=", "redis://a:1", "etcd=a:1", "http://", "http://a", "http://a:1,", "http://a:x"] {
            assert!(matches!(connect(bad), Err(Error::Spec { .. })), "{bad:?} should be refused");
        }
    }

    #[test]
    fn only_absence_is_worth_trying_again() {
        let away = Error::Unavailable { call: "get", message: "refused".into() };
        assert!(away.retryable() && Error::Closed.retryable());
        assert!(!Error::LeaseLost(LeaseId(7)).retryable());
        assert!(!Error::Compacted { compact_revision: 3 }.retryable());
    }

    fn gone(revision: i64) -> Event {
        Event::Delete { key: revision.to_string(), revision }
    }

    #[tokio::test]
    async fn events_that_have_come_are_given_together_and_the_end_comes_after_them() {
        let batches =
            [Ok(vec![]), Ok(vec![gone(1)]), Ok(vec![gone(2), gone(3)]), Err(Error::Compacted { compact_revision: 9 })];
        let mut watch = WatchStream::new(stream::iter(batches).chain(stream::pending()));
        assert_eq!(watch.next().await.unwrap(), [gone(1), gone(2), gone(3)]);
        assert!(matches!(watch.next().await, Err(Error::Compacted { .. })));
    }

    #[tokio::test]
    async fn a_watch_that_ended_says_so_again_and_again() {
        let mut watch = WatchStream::new(stream::iter([Ok(vec![gone(1)])]));
        assert_eq!(watch.next().await.unwrap(), [gone(1)]);
        for _ in 0..2 {
            assert!(matches!(watch.next().await, Err(Error::Closed)));
        }
    }
}
