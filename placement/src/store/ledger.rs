//! The memory store's book: entries, their recent history, leases, and who watches. No clock and no lock of its own.
//!
//! In: operations and the time they happen. Out: their results; events into bounded channels. Never here: waiting. A
//! watcher whose channel is full is dropped, and history is forgotten from its oldest end.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::chance;

use super::{Entry, Event, LeaseId, MAX_VALUE};

const MAX_KEY: usize = 1024;
const MAX_KEYS: usize = 1 << 16;
const MAX_BYTES: usize = 256 << 20;
const MAX_LEASES: usize = 1 << 14;
const MAX_WATCHERS: usize = 1 << 12;
const MAX_HISTORY: usize = 1 << 13;
const MAX_HISTORY_BYTES: usize = 64 << 20;
/// Changes that may wait for a watcher, in batches of one revision. One that falls further behind is closed.
const WATCHER_QUEUE: usize = 256;
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// Operations of one transaction; etcd's own default.
pub(crate) const MAX_OPS: usize = 128;

/// Why the book refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("a key is empty or longer than {MAX_KEY} bytes")]
    Key,
    #[error("values of {0} bytes are more than {MAX_VALUE}")]
    Value(usize),
    #[error("a transaction has more than {MAX_OPS} operations")]
    Operations,
    #[error("a transaction puts the key {0:?} twice")]
    Twice(String),
    #[error("the store is full: {0}")]
    Full(&'static str),
    #[error("lease {0} is not known")]
    Lease(LeaseId),
    #[error("lease {0} is taken")]
    LeaseTaken(LeaseId),
    #[error("revision {0} is compacted away")]
    Compacted(i64),
    #[error("revision {0} is yet to come")]
    Future(i64),
}

/// Which keys an operation is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Keyspan {
    start: String,
    end: End,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Only,
    Before(Vec<u8>),
    Never,
}

impl Keyspan {
    pub(crate) fn key(key: &str) -> Self {
        Self { start: key.to_owned(), end: End::Only }
    }

    pub(crate) fn between(start: &str, end: &str) -> Self {
        Self { start: start.to_owned(), end: End::Before(end.as_bytes().to_vec()) }
    }

    pub(crate) fn prefix(prefix: &str) -> Self {
        let mut end = prefix.as_bytes().to_vec();
        while end.last() == Some(&0xff) {
            end.pop();
        }
        let end = match end.last_mut() {
            Some(last) => {
                *last += 1;
                End::Before(end)
            }
            None => End::Never,
        };
        Self { start: prefix.to_owned(), end }
    }

    /// As etcd writes it: no end is the key alone, a zero byte is every key from `start`.
    pub(crate) fn etcd(start: String, end: Vec<u8>) -> Self {
        let end = match end.as_slice() {
            [] => End::Only,
            [0] => End::Never,
            _ => End::Before(end),
        };
        Self { start, end }
    }

    fn contains(&self, key: &str) -> bool {
        match &self.end {
            End::Only => key == self.start,
            End::Before(end) => key >= self.start.as_str() && key.as_bytes() < end.as_slice(),
            End::Never => key >= self.start.as_str(),
        }
    }
}

/// A change as history keeps it.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) event: Event,
    pub(crate) previous: Option<Entry>,
}

impl Change {
    fn bytes(&self) -> usize {
        let value = match &self.event {
            Event::Put(entry) => entry.value.len(),
            Event::Delete { .. } => 0,
        };
        value + self.previous.as_ref().map_or(0, |entry| entry.value.len()) + self.event.key().len()
    }
}

/// A condition on one key; the closure sees its entry, or none.
pub(crate) type Condition = Box<dyn Fn(Option<&Entry>) -> bool + Send>;

/// One step of a transaction.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Read(Keyspan),
    Put { key: String, value: Bytes, lease: Option<LeaseId> },
    Delete(Keyspan),
}

/// What a step did.
#[derive(Debug, Clone)]
pub(crate) enum Done {
    Read(Vec<Entry>),
    Put { previous: Option<Entry> },
    Delete { previous: Vec<Entry> },
}

#[derive(Debug, Clone)]
pub(crate) struct LeaseInfo {
    pub(crate) ttl: Duration,
    pub(crate) expires: Instant,
    pub(crate) keys: BTreeSet<String>,
}

#[derive(Debug)]
struct Watcher {
    span: Keyspan,
    from: i64,
    changes: mpsc::Sender<Vec<Change>>,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    revision: i64,
    entries: BTreeMap<String, Entry>,
    bytes: usize,
    history: VecDeque<Change>,
    history_bytes: usize,
    /// Events before this revision are forgotten.
    compacted: i64,
    leases: HashMap<LeaseId, LeaseInfo>,
    watchers: Vec<Watcher>,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        // An empty etcd is at revision 1, and so is this.
        Self {
            revision: 1,
            entries: BTreeMap::new(),
            bytes: 0,
            history: VecDeque::new(),
            history_bytes: 0,
            compacted: 0,
            leases: HashMap::new(),
            watchers: Vec::new(),
        }
    }

    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn compacted(&self) -> i64 {
        self.compacted
    }

    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(crate) fn read(&self, span: &Keyspan) -> Vec<Entry> {
        match span.end {
            End::Only => self.entries.get(&span.start).cloned().into_iter().collect(),
            End::Before(_) | End::Never => {
                let from = self.entries.range(span.start.clone()..);
                from.map(|(_, entry)| entry).take_while(|entry| span.contains(&entry.key)).cloned().collect()
            }
        }
    }

    /// Runs `then` if every condition holds and `otherwise` if not, in one revision, wholly or not at all.
    pub(crate) fn transact(
        &mut self,
        conditions: &[(String, Condition)],
        then: Vec<Op>,
        otherwise: Vec<Op>,
    ) -> Result<(bool, Vec<Done>), Refusal> {
        let holds = conditions.iter().all(|(key, condition)| condition(self.entries.get(key)));
        let ops = if holds { then } else { otherwise };
        self.check(&ops)?;
        let revision = self.revision + 1;
        let mut changes = Vec::new();
        let mut done = Vec::with_capacity(ops.len());
        for op in ops {
            done.push(match op {
                Op::Read(span) => Done::Read(self.read(&span)),
                Op::Put { key, value, lease } => {
                    Done::Put { previous: self.put(key, value, lease, revision, &mut changes) }
                }
                Op::Delete(span) => Done::Delete { previous: self.delete(&span, revision, &mut changes) },
            });
        }
        self.commit(revision, changes);
        Ok((holds, done))
    }

    fn check(&self, ops: &[Op]) -> Result<(), Refusal> {
        if ops.len() > MAX_OPS {
            return Err(Refusal::Operations);
        }
        let mut seen = BTreeSet::new();
        let (mut growth, mut values) = (0, 0);
        for op in ops {
            let Op::Put { key, value, lease } = op else { continue };
            if key.is_empty() || key.len() > MAX_KEY {
                return Err(Refusal::Key);
            }
            // etcd bounds the request, and so what all of it puts.
            values += value.len();
            if values > MAX_VALUE {
                return Err(Refusal::Value(values));
            }
            if !seen.insert(key) {
                return Err(Refusal::Twice(key.clone()));
            }
            if let Some(lease) = lease.filter(|lease| !self.leases.contains_key(lease)) {
                return Err(Refusal::Lease(lease));
            }
            growth += key.len() + value.len();
        }
        if self.entries.len() + seen.len() > MAX_KEYS {
            return Err(Refusal::Full("too many keys"));
        }
        if self.bytes + growth > MAX_BYTES {
            return Err(Refusal::Full("too many bytes"));
        }
        Ok(())
    }

    fn put(
        &mut self,
        key: String,
        value: Bytes,
        lease: Option<LeaseId>,
        revision: i64,
        changes: &mut Vec<Change>,
    ) -> Option<Entry> {
        let previous = self.forget(&key);
        let entry = Entry {
            key: key.clone(),
            value,
            create_revision: previous.as_ref().map_or(revision, |entry| entry.create_revision),
            mod_revision: revision,
            version: previous.as_ref().map_or(1, |entry| entry.version + 1),
            lease,
        };
        if let Some(info) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            info.keys.insert(key.clone());
        }
        self.bytes += key.len() + entry.value.len();
        changes.push(Change { event: Event::Put(entry.clone()), previous: previous.clone() });
        self.entries.insert(key, entry);
        previous
    }

    fn delete(&mut self, span: &Keyspan, revision: i64, changes: &mut Vec<Change>) -> Vec<Entry> {
        let gone = self.read(span);
        for entry in &gone {
            self.forget(&entry.key);
            let event = Event::Delete { key: entry.key.clone(), revision };
            changes.push(Change { event, previous: Some(entry.clone()) });
        }
        gone
    }

    /// Takes an entry out of the entries and of its lease.
    fn forget(&mut self, key: &str) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.bytes -= key.len() + entry.value.len();
        if let Some(info) = entry.lease.and_then(|lease| self.leases.get_mut(&lease)) {
            info.keys.remove(key);
        }
        Some(entry)
    }

    fn commit(&mut self, revision: i64, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        self.revision = revision;
        self.watchers.retain(|watcher| {
            let seen = changes
                .iter()
                .filter(|change| change.event.revision() >= watcher.from && watcher.span.contains(change.event.key()));
            let seen: Vec<Change> = seen.cloned().collect();
            // A full channel is a reader too slow, a closed one is a reader gone: either way its sender is dropped here.
            if seen.is_empty() { !watcher.changes.is_closed() } else { watcher.changes.try_send(seen).is_ok() }
        });
        self.history_bytes += changes.iter().map(Change::bytes).sum::<usize>();
        self.history.extend(changes);
        while self.history.len() > MAX_HISTORY || self.history_bytes > MAX_HISTORY_BYTES {
            let Some(oldest) = self.history.front().map(|change| change.event.revision()) else { break };
            self.drop_before(oldest + 1);
        }
    }

    fn drop_before(&mut self, revision: i64) {
        while let Some(change) = self.history.front().filter(|change| change.event.revision() < revision) {
            self.history_bytes -= change.bytes();
            self.history.pop_front();
        }
        self.compacted = revision;
    }

    /// Forgets the events before `revision`.
    pub(crate) fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        if revision > self.revision {
            return Err(Refusal::Future(revision));
        }
        if revision <= self.compacted {
            return Err(Refusal::Compacted(self.compacted));
        }
        self.drop_before(revision);
        Ok(())
    }

    /// Events from `from` on, past ones first; 0 is from now on.
    pub(crate) fn watch(&mut self, span: Keyspan, from: i64) -> Result<mpsc::Receiver<Vec<Change>>, Refusal> {
        if from > 0 && from < self.compacted {
            return Err(Refusal::Compacted(self.compacted));
        }
        self.watchers.retain(|watcher| !watcher.changes.is_closed());
        if self.watchers.len() >= MAX_WATCHERS {
            return Err(Refusal::Full("too many watchers"));
        }
        let (changes, receiver) = mpsc::channel(WATCHER_QUEUE);
        if from > 0 {
            let past = self.history.iter().skip_while(|change| change.event.revision() < from);
            let past: Vec<Change> = past.filter(|change| span.contains(change.event.key())).cloned().collect();
            // The channel is new and holds many batches: there is room for one.
            let _ = if past.is_empty() { Ok(()) } else { changes.try_send(past) };
        }
        self.watchers.push(Watcher { span, from, changes });
        Ok(receiver)
    }

    pub(crate) fn grant(&mut self, id: Option<LeaseId>, ttl: Duration, now: Instant) -> Result<LeaseId, Refusal> {
        if self.leases.len() >= MAX_LEASES {
            return Err(Refusal::Full("too many leases"));
        }
        let id = id.unwrap_or_else(|| LeaseId(chance::draw(1..=i64::MAX)));
        if self.leases.contains_key(&id) {
            return Err(Refusal::LeaseTaken(id));
        }
        let ttl = ttl.min(MAX_TTL);
        self.leases.insert(id, LeaseInfo { ttl, expires: now + ttl, keys: BTreeSet::new() });
        Ok(id)
    }

    pub(crate) fn renew(&mut self, lease: LeaseId, now: Instant) -> Option<Duration> {
        let info = self.leases.get_mut(&lease)?;
        info.expires = now + info.ttl;
        Some(info.ttl)
    }

    pub(crate) fn lease(&self, lease: LeaseId) -> Option<&LeaseInfo> {
        self.leases.get(&lease)
    }

    pub(crate) fn leases(&self) -> impl Iterator<Item = LeaseId> {
        self.leases.keys().copied()
    }

    /// Ends a lease and deletes its keys in one revision; whether it was there.
    pub(crate) fn revoke(&mut self, lease: LeaseId) -> bool {
        let Some(info) = self.leases.remove(&lease) else { return false };
        let revision = self.revision + 1;
        let mut changes = Vec::new();
        for key in &info.keys {
            self.delete(&Keyspan::key(key), revision, &mut changes);
        }
        self.commit(revision, changes);
        true
    }

    /// When the next lease ends.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|info| info.expires).min()
    }

    /// Ends every lease whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        if self.next_expiry().is_none_or(|next| next > now) {
            return;
        }
        let over = self.leases.iter().filter(|(_, info)| info.expires <= now);
        let mut over: Vec<(Instant, LeaseId)> = over.map(|(lease, info)| (info.expires, *lease)).collect();
        over.sort_unstable();
        for (_, lease) in over {
            self.revoke(lease);
        }
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
