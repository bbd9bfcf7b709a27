//! The book's bounds and orders, and a comparison with a plain map.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn put(ledger: &mut Ledger, key: &str, value: &'static [u8], lease: Option<LeaseId>) -> Result<i64, Refusal> {
    let op = Op::Put { key: key.to_owned(), value: Bytes::from_static(value), lease };
    ledger.transact(&[], vec![op], Vec::new()).map(|_| ledger.revision())
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

proptest! {
    #[test]
    fn the_book_agrees_with_a_plain_map(steps in prop::collection::vec((0u8..3, 0usize..6, any::<u8>()), 0..60)) {
        let keys = ["a", "ab", "abc", "b", "ba", "c"];
        let mut ledger = Ledger::new();
        let mut model: BTreeMap<&str, u8> = BTreeMap::new();
        let mut changes = ledger.watch(Keyspan::prefix("a"), 1).unwrap();
        let mut replayed: BTreeMap<String, u8> = BTreeMap::new();
        for (kind, key, value) in steps {
            let before = ledger.revision();
            let op = match kind {
                0 | 1 => {
                    model.insert(keys[key], value);
                    Op::Put { key: keys[key].to_owned(), value: Bytes::from(vec![value]), lease: None }
                }
                _ => {
                    model.retain(|held, _| !held.starts_with(keys[key]));
                    Op::Delete(Keyspan::prefix(keys[key]))
                }
            };
            ledger.transact(&[], vec![op], Vec::new()).unwrap();
            prop_assert!(ledger.revision() <= before + 1, "one transaction is one revision");
            while let Ok(batch) = changes.try_recv() {
                for change in batch {
                    match change.event {
                        Event::Put(entry) => { replayed.insert(entry.key, entry.value[0]); }
                        Event::Delete { key, .. } => { replayed.remove(&key); }
                    }
                }
            }
        }
        let held = |prefix: &str| -> Vec<(String, u8)> {
            ledger.read(&Keyspan::prefix(prefix)).into_iter().map(|entry| (entry.key, entry.value[0])).collect()
        };
        let expected: Vec<_> = model.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
        prop_assert_eq!(held(""), expected);
        prop_assert_eq!(held("a"), replayed.into_iter().collect::<Vec<_>>(), "a watch tells the whole story");
    }
}

#[test]
fn a_slow_watcher_is_closed_and_the_others_go_on() {
    let mut ledger = Ledger::new();
    let mut slow = ledger.watch(Keyspan::prefix("k"), 0).unwrap();
    for _ in 0..=WATCHER_QUEUE {
        put(&mut ledger, "k", b"v", None).unwrap();
    }
    let mut quick = ledger.watch(Keyspan::prefix("k"), 0).unwrap();
    put(&mut ledger, "k", b"last", None).unwrap();
    assert_eq!(quick.try_recv().unwrap().len(), 1);
    let mut seen = 0;
    while slow.try_recv().is_ok() {
        seen += 1;
    }
    assert_eq!(seen, WATCHER_QUEUE);
    assert_eq!(slow.try_recv().unwrap_err(), mpsc::error::TryRecvError::Disconnected);
}

#[test]
fn history_is_bounded_and_says_from_where_it_begins() {
    let mut ledger = Ledger::new();
    for _ in 0..MAX_HISTORY + 10 {
        put(&mut ledger, "k", b"v", None).unwrap();
    }
    assert_eq!(ledger.history.len(), MAX_HISTORY);
    let oldest = ledger.compacted();
    assert_eq!(oldest, 12, "revision 1 is the empty store and ten puts are forgotten");
    assert_eq!(ledger.watch(Keyspan::prefix(""), oldest - 1).unwrap_err(), Refusal::Compacted(oldest));
    let past = ledger.watch(Keyspan::prefix(""), oldest).unwrap().try_recv().unwrap();
    assert_eq!(past.len(), MAX_HISTORY);
}

#[test]
fn a_key_belongs_to_the_lease_that_put_it_last() {
    let mut ledger = Ledger::new();
    let now = Instant::now();
    let old = ledger.grant(None, seconds(1), now).unwrap();
    let new = ledger.grant(None, seconds(9), now).unwrap();
    put(&mut ledger, "k", b"old", Some(old)).unwrap();
    put(&mut ledger, "k", b"new", Some(new)).unwrap();
    ledger.expire(now + seconds(2));
    assert_eq!(ledger.entry("k").unwrap().lease, Some(new));
    assert_eq!(put(&mut ledger, "k", b"late", Some(old)), Err(Refusal::Lease(old)));
    assert_eq!(ledger.renew(new, now + seconds(8)), Some(seconds(9)));
    ledger.expire(now + seconds(16));
    assert!(ledger.entry("k").is_some());
    ledger.expire(now + seconds(17));
    assert!(ledger.entry("k").is_none());
}

#[test]
fn a_refused_transaction_changes_nothing() {
    let mut ledger = Ledger::new();
    let op = |key: &str, bytes: usize| Op::Put { key: key.to_owned(), value: vec![0; bytes].into(), lease: None };
    let refuse = |ledger: &mut Ledger, ops| ledger.transact(&[], ops, Vec::new()).unwrap_err();
    assert_eq!(refuse(&mut ledger, vec![op("a", 1), op("", 1)]), Refusal::Key);
    assert_eq!(refuse(&mut ledger, vec![op("a", 1), op("a", 1)]), Refusal::Twice("a".into()));
    assert_eq!(refuse(&mut ledger, vec![op("a", 1), op("b", MAX_VALUE)]), Refusal::Value(MAX_VALUE + 1));
    assert_eq!(refuse(&mut ledger, vec![Op::Read(Keyspan::key("a")); MAX_OPS + 1]), Refusal::Operations);
    assert_eq!((ledger.revision(), ledger.bytes()), (1, 0));
}

#[test]
fn compaction_goes_forward_only() {
    let mut ledger = Ledger::new();
    for _ in 0..3 {
        put(&mut ledger, "k", b"v", None).unwrap();
    }
    assert_eq!(ledger.compact(9), Err(Refusal::Future(9)));
    ledger.compact(3).unwrap();
    assert_eq!(ledger.compact(3), Err(Refusal::Compacted(3)));
    assert!(ledger.entry("k").is_some(), "compaction forgets events, not entries");
}

#[test]
fn a_span_is_a_key_a_prefix_or_all_from_somewhere() {
    let cases = HashMap::from([
        ("one key", (Keyspan::etcd("b".into(), vec![]), vec!["b"])),
        ("a range", (Keyspan::etcd("a".into(), b"b".to_vec()), vec!["a", "ab"])),
        ("from a key", (Keyspan::etcd("ab".into(), vec![0]), vec!["ab", "b"])),
        ("a prefix", (Keyspan::prefix("a"), vec!["a", "ab"])),
        ("everything", (Keyspan::prefix(""), vec!["a", "ab", "b"])),
    ]);
    for (name, (span, keys)) in cases {
        let held: Vec<_> = ["a", "ab", "b"].into_iter().filter(|key| span.contains(key)).collect();
        assert_eq!(held, keys, "{name}");
    }
}
