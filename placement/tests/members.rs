//! Members, candidates and views over the memory store: who registers, who leads, what everybody sees.
//!
//! In: a store without faults of its own, and hands that delete and revoke. Out: a cluster that repairs itself.

#![allow(clippy::unwrap_used, reason = "a story fails where it stands")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use conclave_placement::election::Election;
use conclave_placement::membership::Membership;
use conclave_placement::plan::Plan;
use conclave_placement::store::Error;
use conclave_placement::store::memory::MemoryStore;
use conclave_placement::view::View;
use conclave_placement::{ExpertId, Incarnation, LayerIdx, Residency, RouterId, Store, WorkerId, WorkerState};
use support::{keys, soon, until, worker};
use tokio_util::sync::CancellationToken;

const TTL: Duration = Duration::from_secs(3);

fn store() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new())
}

async fn member(store: &Arc<dyn Store>, key: &str, value: &'static str) -> Membership {
    let joining = Membership::join(store.clone(), key.into(), TTL, value.into(), CancellationToken::new());
    soon("join", joining).await.unwrap()
}

async fn value(store: &Arc<dyn Store>, key: &str) -> Option<String> {
    let entry = store.get(key).await.unwrap();
    entry.map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
}

/// Waits until the key has that value, or none.
async fn becomes(store: &Arc<dyn Store>, key: &str, wanted: Option<&str>) {
    let waiting = async {
        let mut events = store.watch(key, store.list(key).await.unwrap().revision + 1).await.unwrap();
        while value(store, key).await.as_deref() != wanted {
            events.next().await.unwrap();
        }
    };
    soon("the key changes", waiting).await;
}

#[tokio::test]
async fn a_member_registers_publishes_and_leaves_no_key_behind() {
    let store = store();
    let member = member(&store, "m", "one").await;
    assert_eq!(value(&store, "m").await.as_deref(), Some("one"));
    until("registered", member.registered(), |registered| *registered).await;
    member.publish("two".into());
    becomes(&store, "m", Some("two")).await;
    member.leave().await;
    assert_eq!(value(&store, "m").await, None);
}

#[tokio::test]
async fn of_many_values_in_a_row_the_last_arrives() {
    let store = store();
    let member = member(&store, "m", "first").await;
    for number in 0..1000 {
        member.publish(number.to_string().into());
    }
    member.publish("last".into());
    becomes(&store, "m", Some("last")).await;
}

#[tokio::test]
async fn a_dropped_or_cancelled_member_leaves_too() {
    let store = store();
    drop(member(&store, "m", "v").await);
    becomes(&store, "m", None).await;

    let token = CancellationToken::new();
    let joined = Membership::join(store.clone(), "m".into(), TTL, "v".into(), token.clone()).await.unwrap();
    token.cancel();
    becomes(&store, "m", None).await;
    joined.leave().await;
}

#[tokio::test]
async fn a_member_whose_key_or_lease_is_taken_away_registers_again() {
    let store = store();
    let member = member(&store, "m", "v").await;
    store.delete("m").await.unwrap();
    becomes(&store, "m", Some("v")).await;
    let lease = store.get("m").await.unwrap().unwrap().lease.unwrap();
    store.revoke(lease).await.unwrap();
    member.publish("newer".into());
    becomes(&store, "m", Some("newer")).await;
    assert_ne!(store.get("m").await.unwrap().unwrap().lease, Some(lease));
}

#[tokio::test]
async fn the_latest_process_of_a_name_has_it_and_the_former_waits() {
    let store = store();
    let former = member(&store, "m", "former").await;
    let latest = member(&store, "m", "latest").await;
    until("displaced", former.registered(), |registered| !registered).await;
    former.publish("still former".into());
    assert_eq!(value(&store, "m").await.as_deref(), Some("latest"));
    latest.leave().await;
    becomes(&store, "m", Some("still former")).await;
}

#[tokio::test]
async fn joining_with_an_impossible_value_is_refused_and_cancelling_ends_the_wait() {
    let store = store();
    let vast = vec![0; conclave_placement::store::MAX_VALUE + 1].into();
    let refused = Membership::join(store.clone(), "m".into(), TTL, vast, CancellationToken::new()).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");

    let nowhere = conclave_placement::store::connect("etcd=http://127.0.0.1:1").unwrap();
    let token = CancellationToken::new();
    let joining = tokio::spawn(Membership::join(nowhere.clone(), "m".into(), TTL, "v".into(), token.clone()));
    let viewing = tokio::spawn(View::start(nowhere, keys(), token.clone()));
    tokio::task::yield_now().await;
    token.cancel();
    assert!(soon("join ends", joining).await.unwrap().is_err());
    assert!(soon("view ends", viewing).await.unwrap().is_err());
}

fn candidate(store: &Arc<dyn Store>, name: &str) -> Election {
    let router = RouterId::parse(name).unwrap();
    Election::run(store.clone(), &keys(), router, Incarnation::fresh(), TTL, CancellationToken::new())
}

#[tokio::test]
async fn one_candidate_leads_and_another_follows_when_it_resigns() {
    let store = store();
    let view = View::start(store.clone(), keys(), CancellationToken::new()).await.unwrap();
    let first = candidate(&store, "first");
    let term = until("the first leads", first.is_leader(), Option::is_some).await.unwrap();
    let second = candidate(&store, "second");
    until("all see it", view.subscribe(), |state| state.leader == Some(RouterId::parse("first").unwrap())).await;
    assert_eq!(*second.is_leader().borrow(), None);
    first.resign().await;
    let next = until("the second leads", second.is_leader(), Option::is_some).await.unwrap();
    assert!(next.revision > term.revision);
    until("all see it", view.subscribe(), |state| state.leader == Some(RouterId::parse("second").unwrap())).await;
}

#[tokio::test]
async fn a_leader_without_its_lease_or_key_steps_down_and_there_is_one_again() {
    let store = store();
    let only = candidate(&store, "only");
    let first = until("leads", only.is_leader(), Option::is_some).await.unwrap();
    store.revoke(first.lease).await.unwrap();
    let second = until("leads again", only.is_leader(), |term| term.is_some_and(|term| term != first)).await.unwrap();
    store.delete(&keys().leader()).await.unwrap();
    let third = until("and again", only.is_leader(), |term| term.is_some_and(|term| term.revision > second.revision));
    third.await;
}

#[tokio::test]
async fn a_view_follows_members_and_the_plan() {
    let store = store();
    let view = View::start(store.clone(), keys(), CancellationToken::new()).await.unwrap();
    assert!(view.current().workers.is_empty());

    let mut record = worker("a", 0);
    let key = keys().worker(&record.id);
    let token = CancellationToken::new();
    let member = Membership::join(store.clone(), key, TTL, record.encode(), token).await.unwrap();
    until("the worker is seen", view.subscribe(), |state| state.workers.contains_key(&record.id)).await;

    let (layer, expert) = (LayerIdx(1), ExpertId(3));
    record.state = WorkerState::Serving;
    record.resident = Residency::from_iter([(layer, expert)]);
    member.publish(record.encode());
    let state = until("what it holds is seen", view.subscribe(), |state| state.holders(layer, expert).count() == 1);
    assert_eq!(state.await.workers[&record.id], record);

    let plan = Plan {
        version: conclave_placement::PlanVersion(1),
        parent: conclave_placement::PlanVersion::NONE,
        policy: "story".into(),
        reason: "story".into(),
        layers: [(layer, vec![vec![record.id.clone()]])].into(),
    };
    store.put(&keys().plan(), plan.encode(), None).await.unwrap();
    until("the plan is seen", view.subscribe(), |state| state.plan.as_deref() == Some(&plan)).await;
    store.put(&keys().plan(), "no plan".into(), None).await.unwrap();
    member.leave().await;
    let state = until("the worker has gone", view.subscribe(), |state| state.workers.is_empty()).await;
    assert_eq!(state.plan.as_deref(), Some(&plan), "a value that is no plan is ignored");
}

#[tokio::test]
async fn a_view_that_fell_behind_lists_anew() {
    let store = store();
    let view = View::start(store.clone(), keys(), CancellationToken::new()).await.unwrap();
    // On one thread, and the memory store never waits: the view gets no chance to read, so its watch is closed.
    for number in 0..1000 {
        let record = worker(&format!("w{number}"), number);
        store.put(&keys().worker(&record.id), record.encode(), None).await.unwrap();
    }
    let last = WorkerId::parse("w999").unwrap();
    store.delete(&keys().worker(&last)).await.unwrap();
    let state = until("all are seen", view.subscribe(), |state| state.workers.len() == 999).await;
    assert!(!state.workers.contains_key(&last));
}
