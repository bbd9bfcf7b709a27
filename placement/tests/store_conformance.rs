//! One suite for every store: in memory, in memory behind a socket, and a real etcd.
//!
//! In: three stores. Out: the same answers from each. Never here: what only one of them does.

#![allow(clippy::unwrap_used, reason = "a story fails where it stands")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use conclave_placement::Store;
use conclave_placement::store::etcd::EtcdStore;
use conclave_placement::store::memory::MemoryStore;
use conclave_placement::store::{CasOutcome, Error, Event, Expected, LeaseId, MAX_VALUE, Transaction};
use futures::FutureExt;
use futures::future::BoxFuture;
use support::etcd_process::EtcdProcess;
use support::{PATIENCE, served, soon};

type Compact = Box<dyn Fn(i64) -> BoxFuture<'static, ()> + Send + Sync>;

/// A store, and how to compact it, which the trait leaves out because nobody in a cluster needs it.
struct Ground {
    store: Arc<dyn Store>,
    compact: Compact,
}

/// A story plays under its own prefix.
type Story = for<'a> fn(&'a Ground, &'a str) -> BoxFuture<'a, ()>;

const STORIES: &[(&str, Story)] = &[
    ("a key is created once", |g, p| a_key_is_created_once(g, p).boxed()),
    ("a swap needs the revision", |g, p| a_swap_needs_the_revision(g, p).boxed()),
    ("many counters make no lost update", |g, p| no_update_is_lost(g, p).boxed()),
    ("entries count versions", |g, p| entries_count_versions(g, p).boxed()),
    ("list then watch misses nothing", |g, p| list_then_watch_misses_nothing(g, p).boxed()),
    ("a watch sees puts and deletes in order", |g, p| a_watch_sees_changes_in_order(g, p).boxed()),
    ("a watch replays the past", |g, p| a_watch_replays_the_past(g, p).boxed()),
    ("a prefix is deleted at once", |g, p| a_prefix_is_deleted_at_once(g, p).boxed()),
    ("an expired lease takes its keys along", |g, p| an_expired_lease_takes_its_keys_along(g, p).boxed()),
    ("a lease that is kept alive stays", |g, p| a_lease_that_is_kept_alive_stays(g, p).boxed()),
    ("a revoked lease is lost", |g, p| a_revoked_lease_is_lost(g, p).boxed()),
    ("a key moves to its latest lease", |g, p| a_key_moves_to_its_latest_lease(g, p).boxed()),
    ("a compacted watch says so", |g, p| a_compacted_watch_says_so(g, p).boxed()),
    ("a large value survives", |g, p| a_large_value_survives(g, p).boxed()),
    ("a transaction is done wholly or not at all", |g, p| a_transaction_is_done_wholly_or_not_at_all(g, p).boxed()),
    ("an overlarge value is refused", |g, p| an_overlarge_value_is_refused(g, p).boxed()),
];

async fn play(ground: Ground) {
    for (number, (name, story)) in STORIES.iter().enumerate() {
        println!("{name}");
        soon(name, story(&ground, &format!("/story-{number:02}/"))).await;
    }
}

#[tokio::test]
async fn the_memory_store_conforms() {
    let store = MemoryStore::new();
    let compacted = store.clone();
    let compact = Box::new(move |revision| {
        compacted.compact(revision).expect("a revision to compact");
        async {}.boxed()
    });
    play(Ground { store: Arc::new(store), compact }).await;
}

#[tokio::test]
async fn the_served_memory_store_conforms() {
    let served = served().await;
    play(Ground { store: served.store.clone(), compact: compact_at(served.address.clone()) }).await;
}

#[tokio::test]
async fn etcd_conforms() -> anyhow::Result<()> {
    let etcd = EtcdProcess::start().await?;
    play(Ground { store: Arc::new(etcd.store()), compact: compact_at(etcd.endpoint()) }).await;
    Ok(())
}

#[tokio::test]
async fn a_dead_address_among_several_is_passed_over() {
    let served = served().await;
    let store = EtcdStore::new(vec!["http://127.0.0.1:1".into(), served.address.clone()]);
    for _ in 0..20 {
        store.get("k").await.unwrap();
        store.put("k", "v".into(), None).await.unwrap();
    }
}

fn compact_at(endpoint: String) -> Compact {
    Box::new(move |revision| {
        let endpoint = endpoint.clone();
        let compact = async move {
            let mut client = etcd_client::Client::connect([endpoint], None).await.unwrap();
            client.compact(revision, None).await.unwrap();
        };
        compact.boxed()
    })
}

fn key(prefix: &str, name: &str) -> String {
    format!("{prefix}{name}")
}

async fn a_key_is_created_once(ground: &Ground, prefix: &str) {
    let (store, key) = (&ground.store, key(prefix, "k"));
    assert_eq!(store.get(&key).await.unwrap(), None);
    let first = store.compare_and_put(&key, Expected::Absent, "one".into(), None).await.unwrap();
    let CasOutcome::Stored { revision } = first else { panic!("{first:?}") };
    let second = store.compare_and_put(&key, Expected::Absent, "two".into(), None).await.unwrap();
    let CasOutcome::Conflict { current: Some(current) } = second else { panic!("{second:?}") };
    assert_eq!((current.value.as_ref(), current.mod_revision), (&b"one"[..], revision));
    assert_eq!(store.get(&key).await.unwrap(), Some(current));
}

async fn a_swap_needs_the_revision(ground: &Ground, prefix: &str) {
    let (store, key) = (&ground.store, key(prefix, "k"));
    let absent = store.compare_and_put(&key, Expected::ModRevision(1), "x".into(), None).await.unwrap();
    assert_eq!(absent, CasOutcome::Conflict { current: None });
    let one = store.put(&key, "one".into(), None).await.unwrap();
    let swapped = store.compare_and_put(&key, Expected::ModRevision(one), "two".into(), None).await.unwrap();
    let CasOutcome::Stored { revision: two } = swapped else { panic!("{swapped:?}") };
    assert!(two > one);
    let stale = store.compare_and_put(&key, Expected::ModRevision(one), "three".into(), None).await.unwrap();
    let CasOutcome::Conflict { current: Some(current) } = stale else { panic!("{stale:?}") };
    assert_eq!((current.value.as_ref(), current.mod_revision), (&b"two"[..], two));
}

async fn no_update_is_lost(ground: &Ground, prefix: &str) {
    const TASKS: u64 = 6;
    const EACH: u64 = 8;
    let key = key(prefix, "counter");
    ground.store.put(&key, "0".into(), None).await.unwrap();
    let count = |store: Arc<dyn Store>, key: String| async move {
        for _ in 0..EACH {
            loop {
                let entry = store.get(&key).await.unwrap().unwrap();
                let next = std::str::from_utf8(&entry.value).unwrap().parse::<u64>().unwrap() + 1;
                let expected = Expected::ModRevision(entry.mod_revision);
                let outcome = store.compare_and_put(&key, expected, next.to_string().into(), None).await.unwrap();
                if matches!(outcome, CasOutcome::Stored { .. }) {
                    break;
                }
            }
        }
    };
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(count(ground.store.clone(), key.clone()))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    let total = ground.store.get(&key).await.unwrap().unwrap().value;
    assert_eq!(total, (TASKS * EACH).to_string());
}

async fn entries_count_versions(ground: &Ground, prefix: &str) {
    let (store, key) = (&ground.store, key(prefix, "k"));
    let created = store.put(&key, "one".into(), None).await.unwrap();
    let changed = store.put(&key, "two".into(), None).await.unwrap();
    let entry = store.get(&key).await.unwrap().unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision, entry.version), (created, changed, 2));
    assert!(store.delete(&key).await.unwrap());
    assert!(!store.delete(&key).await.unwrap());
    let created = store.put(&key, "three".into(), None).await.unwrap();
    let entry = store.get(&key).await.unwrap().unwrap();
    assert_eq!((entry.create_revision, entry.version, entry.lease), (created, 1, None));
}

async fn list_then_watch_misses_nothing(ground: &Ground, prefix: &str) {
    const PUTS: usize = 60;
    let writer = {
        let (store, prefix) = (ground.store.clone(), prefix.to_owned());
        tokio::spawn(async move {
            for number in 0..PUTS {
                store.put(&format!("{prefix}{number:03}"), "v".into(), None).await.unwrap();
                tokio::task::yield_now().await;
            }
        })
    };
    let listing = ground.store.list(prefix).await.unwrap();
    let mut seen: Vec<String> = listing.entries.iter().map(|entry| entry.key.clone()).collect();
    assert!(seen.is_sorted());
    let mut events = ground.store.watch(prefix, listing.revision + 1).await.unwrap();
    while seen.len() < PUTS {
        seen.extend(events.next().await.unwrap().iter().map(|event| event.key().to_owned()));
    }
    writer.await.unwrap();
    let all: Vec<String> = (0..PUTS).map(|number| format!("{prefix}{number:03}")).collect();
    assert_eq!(seen, all, "each once, in order");
}

async fn a_watch_sees_changes_in_order(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let start = store.list(prefix).await.unwrap().revision;
    let mut events = store.watch(prefix, start + 1).await.unwrap();
    store.put(&key(prefix, "a"), "1".into(), None).await.unwrap();
    store.put("/elsewhere", "x".into(), None).await.unwrap();
    store.put(&key(prefix, "b"), "2".into(), None).await.unwrap();
    store.put(&key(prefix, "a"), "3".into(), None).await.unwrap();
    store.delete(&key(prefix, "a")).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.extend(events.next().await.unwrap());
    }
    let told: Vec<(String, Option<Bytes>)> = seen
        .iter()
        .map(|event| match event {
            Event::Put(entry) => (entry.key.clone(), Some(entry.value.clone())),
            Event::Delete { key, .. } => (key.clone(), None),
        })
        .collect();
    let put = |name: &str, value: &'static str| (key(prefix, name), Some(Bytes::from_static(value.as_bytes())));
    assert_eq!(told, [put("a", "1"), put("b", "2"), put("a", "3"), (key(prefix, "a"), None)]);
    assert!(seen.iter().map(Event::revision).is_sorted_by(|earlier, later| earlier < later));
}

async fn a_watch_replays_the_past(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let first = store.put(&key(prefix, "a"), "1".into(), None).await.unwrap();
    store.put(&key(prefix, "a"), "2".into(), None).await.unwrap();
    store.delete(&key(prefix, "a")).await.unwrap();
    let mut events = store.watch(prefix, first + 1).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.extend(events.next().await.unwrap());
    }
    assert!(matches!(&seen[..], [Event::Put(entry), Event::Delete { .. }] if entry.value == "2"), "{seen:?}");
}

async fn a_prefix_is_deleted_at_once(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    for name in ["a", "b", "c"] {
        store.put(&key(prefix, name), "v".into(), None).await.unwrap();
    }
    let start = store.list(prefix).await.unwrap();
    assert_eq!(start.entries.len(), 3);
    let mut events = store.watch(prefix, start.revision + 1).await.unwrap();
    assert_eq!(store.delete_prefix(prefix).await.unwrap(), 3);
    assert_eq!(store.delete_prefix(prefix).await.unwrap(), 0);
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(events.next().await.unwrap());
    }
    assert!(seen.iter().all(|event| event.revision() == start.revision + 1), "{seen:?}");
    assert!(store.list(prefix).await.unwrap().entries.is_empty());
}

async fn an_expired_lease_takes_its_keys_along(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let lease = store.grant(Duration::from_secs(1)).await.unwrap();
    store.put(&key(prefix, "a"), "v".into(), Some(lease)).await.unwrap();
    let held = store.get(&key(prefix, "a")).await.unwrap().unwrap();
    assert_eq!(held.lease, Some(lease));
    let mut events = store.watch(prefix, held.mod_revision + 1).await.unwrap();
    let seen = events.next().await.unwrap();
    assert!(matches!(&seen[..], [Event::Delete { key: gone, .. }] if *gone == key(prefix, "a")), "{seen:?}");
    assert_eq!(store.get(&key(prefix, "a")).await.unwrap(), None);
    assert_eq!(store.keep_alive(lease).await, Err(Error::LeaseLost(lease)));
}

async fn a_lease_that_is_kept_alive_stays(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let ttl = Duration::from_secs(3);
    let lease = store.grant(ttl).await.unwrap();
    store.put(&key(prefix, "a"), "v".into(), Some(lease)).await.unwrap();
    let start = tokio::time::Instant::now();
    while start.elapsed() < ttl + Duration::from_secs(1) {
        let kept = store.keep_alive(lease).await.unwrap();
        assert!(!kept.remaining.is_zero() && kept.remaining < PATIENCE);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(store.get(&key(prefix, "a")).await.unwrap().is_some());
    store.revoke(lease).await.unwrap();
}

async fn a_revoked_lease_is_lost(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let lease = store.grant(PATIENCE).await.unwrap();
    for name in ["a", "b"] {
        store.put(&key(prefix, name), "v".into(), Some(lease)).await.unwrap();
    }
    store.revoke(lease).await.unwrap();
    store.revoke(lease).await.expect("revoking twice is no error");
    assert!(store.list(prefix).await.unwrap().entries.is_empty());
    assert_eq!(store.keep_alive(lease).await, Err(Error::LeaseLost(lease)));
    assert_eq!(store.put(&key(prefix, "a"), "v".into(), Some(lease)).await, Err(Error::LeaseLost(lease)));
    let swap = store.compare_and_put(&key(prefix, "a"), Expected::Absent, "v".into(), Some(lease)).await;
    assert_eq!(swap, Err(Error::LeaseLost(lease)));
    let never = LeaseId(0x7fff_0001);
    assert_eq!(store.keep_alive(never).await, Err(Error::LeaseLost(never)));
}

async fn a_key_moves_to_its_latest_lease(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let [one, two] = [store.grant(PATIENCE).await.unwrap(), store.grant(PATIENCE).await.unwrap()];
    store.put(&key(prefix, "a"), "old".into(), Some(one)).await.unwrap();
    store.put(&key(prefix, "a"), "new".into(), Some(two)).await.unwrap();
    store.revoke(one).await.unwrap();
    assert_eq!(store.get(&key(prefix, "a")).await.unwrap().unwrap().lease, Some(two));
    store.revoke(two).await.unwrap();
    assert_eq!(store.get(&key(prefix, "a")).await.unwrap(), None);
}

async fn a_compacted_watch_says_so(ground: &Ground, prefix: &str) {
    let store = &ground.store;
    let first = store.put(&key(prefix, "a"), "1".into(), None).await.unwrap();
    store.put(&key(prefix, "a"), "2".into(), None).await.unwrap();
    let last = store.put(&key(prefix, "a"), "3".into(), None).await.unwrap();
    let mut current = store.watch(prefix, last + 1).await.unwrap();
    (ground.compact)(last).await;
    let ended = match store.watch(prefix, first).await {
        Ok(mut events) => events.next().await,
        Err(error) => Err(error),
    };
    assert_eq!(ended, Err(Error::Compacted { compact_revision: last }));
    store.put(&key(prefix, "a"), "4".into(), None).await.unwrap();
    assert_eq!(current.next().await.unwrap().len(), 1, "a watch that is up to date does not notice");
    assert_eq!(store.get(&key(prefix, "a")).await.unwrap().unwrap().value, "4");
}

async fn a_large_value_survives(ground: &Ground, prefix: &str) {
    let large = Bytes::from(vec![0xa5; 1 << 20]);
    let revision = ground.store.put(&key(prefix, "a"), large.clone(), None).await.unwrap();
    for name in ["b", "c", "d", "e", "f"] {
        ground.store.put(&key(prefix, name), large.clone(), None).await.unwrap();
    }
    let listing = ground.store.list(prefix).await.unwrap();
    assert!(listing.entries.len() == 6 && listing.entries.iter().all(|entry| entry.value == large));
    let mut events = ground.store.watch(prefix, revision).await.unwrap();
    let mut seen = 0;
    while seen < 6 {
        seen += events.next().await.unwrap().len();
    }
    ground.store.delete_prefix(prefix).await.unwrap();
}

async fn a_transaction_is_done_wholly_or_not_at_all(ground: &Ground, prefix: &str) {
    let (store, [a, b, old]) = (&ground.store, ["a", "b", "old"].map(|name| key(prefix, name)));
    let one = store.put(&a, "one".into(), None).await.unwrap();
    for number in 0..3 {
        store.put(&format!("{old}{number}"), "v".into(), None).await.unwrap();
    }
    let with = |conditions: &[(&String, Expected)]| Transaction {
        conditions: conditions.iter().map(|(key, expected)| ((*key).clone(), *expected)).collect(),
        puts: vec![(a.clone(), "two".into()), (b.clone(), "new".into())],
        deletes: Some((old.clone(), format!("{old}2"))),
    };
    let before = store.list(prefix).await.unwrap();
    for failing in [
        [(&a, Expected::ModRevision(one)), (&b, Expected::ModRevision(one))],
        [(&a, Expected::Absent), (&b, Expected::Absent)],
    ] {
        assert_eq!(store.transact(with(&failing)).await.unwrap(), None);
    }
    assert_eq!(store.list(prefix).await.unwrap(), before);
    let both = [(&a, Expected::ModRevision(one)), (&b, Expected::Absent)];
    let revision = store.transact(with(&both)).await.unwrap();
    let after = store.list(prefix).await.unwrap();
    let now: Vec<(&str, &[u8])> = after.entries.iter().map(|entry| (entry.key.as_str(), &*entry.value)).collect();
    assert_eq!(now, [(a.as_str(), &b"two"[..]), (b.as_str(), b"new"), (&format!("{old}2"), b"v")]);
    assert!(after.entries[..2].iter().all(|entry| Some(entry.mod_revision) == revision));
    let half = Bytes::from(vec![0; MAX_VALUE / 2 + 1]);
    let vast = Transaction { puts: vec![(a.clone(), half.clone()), (b.clone(), half)], ..with(&[]) };
    assert!(matches!(store.transact(vast).await, Err(Error::Refused { .. })));
}

async fn an_overlarge_value_is_refused(ground: &Ground, prefix: &str) {
    let vast = Bytes::from(vec![0; MAX_VALUE + 1]);
    let refused = ground.store.put(&key(prefix, "a"), vast, None).await.unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }) && !refused.retryable(), "{refused}");
    assert_eq!(ground.store.get(&key(prefix, "a")).await.unwrap(), None);
    // etcd's own limit is above.
    ground.store.put(&key(prefix, "a"), vec![0; MAX_VALUE].into(), None).await.unwrap();
    ground.store.delete(&key(prefix, "a")).await.unwrap();
}
