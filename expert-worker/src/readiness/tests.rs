//! Stories of a worker that starts, by what it sees.

use super::*;
use crate::reconcile::tests::{cluster, plan, worker};

fn me() -> (WorkerId, Incarnation) {
    (WorkerId::parse("a").unwrap(), Incarnation::new(7).unwrap())
}

#[test]
fn before_the_first_plan_nothing_is_lacking() {
    assert_eq!(lacks(&me(), &ClusterState::empty(), &mut None), Lacks::Nothing);
}

#[test]
fn a_newcomer_waits_for_a_plan_that_names_it_and_then_for_its_experts() {
    let mut named = None;
    let elsewhere = cluster(vec![worker("a", 1, &[])], plan(1, &[&["b"]]), 1);
    assert_eq!(
        lacks(&me(), &elsewhere, &mut named),
        Lacks::Place,
        "acting on a plan that gives nothing is no achievement"
    );
    let given = cluster(vec![worker("a", 1, &[0])], plan(2, &[&["a", "b"], &["a"]]), 2);
    assert_eq!(lacks(&me(), &given, &mut named), Lacks::Experts, "one of two is here");
    // A plan that comes meanwhile asks for more: what was first asked for is enough.
    let more = cluster(vec![worker("a", 2, &[0, 1])], plan(3, &[&["a"], &["a"], &["a"]]), 2);
    assert_eq!(lacks(&me(), &more, &mut named), Lacks::Nothing);
}

#[test]
fn what_a_former_run_has_done_does_not_count() {
    let (id, _) = me();
    let state = cluster(vec![worker("a", 5, &[0])], plan(5, &[&["a"]]), 5);
    assert_eq!(lacks(&(id, Incarnation::new(8).unwrap()), &state, &mut None), Lacks::Experts);
    assert_eq!(lacks(&me(), &state, &mut None), Lacks::Nothing);
}

#[tokio::test(start_paused = true)]
async fn one_that_gets_nothing_is_not_waited_for_for_ever() {
    let (_view, changes) = watch::channel(Arc::new(cluster(vec![worker("a", 1, &[])], plan(1, &[&["b"]]), 1)));
    let started = Instant::now();
    reached(me(), changes).await;
    assert_eq!(started.elapsed(), GIVEN_WITHIN);
}

#[tokio::test(start_paused = true)]
async fn one_that_loads_is_waited_for_as_long_as_it_takes() {
    let state = cluster(vec![worker("a", 0, &[])], plan(1, &[&["a"]]), 1);
    let (view, changes) = watch::channel(Arc::new(state));
    let mut reached = std::pin::pin!(reached(me(), changes));
    assert!(tokio::time::timeout(10 * GIVEN_WITHIN, &mut reached).await.is_err());
    view.send_replace(Arc::new(cluster(vec![worker("a", 1, &[0])], plan(1, &[&["a"]]), 1)));
    reached.await;
}
