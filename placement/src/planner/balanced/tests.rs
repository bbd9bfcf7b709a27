//! The balanced planner's properties, over random clusters that lose and gain workers and memory.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::fixtures::{model, worker, workers};
use super::*;
use crate::ids::{ExpertId, LayerIdx, PlanVersion};
use crate::lint::{self, Rule};
use crate::planner::PlannerWorker;
use crate::state::ModelIdentity;

fn still<'a>(model: &'a ModelIdentity, workers: &'a [PlannerWorker], replicas: u32) -> Problem<'a> {
    Problem { model, workers, replicas, redundant: 0, load: None, rebalance: Rebalance::No }
}

fn counts(plan: &Plan, workers: &[PlannerWorker]) -> Vec<usize> {
    workers.iter().map(|worker| plan.assigned_to(&worker.id).len()).collect()
}

fn first(problem: &Problem<'_>) -> Plan {
    plan(problem, None).unwrap().expect("the first plan is always a change")
}

fn budgets() -> impl Strategy<Value = Vec<u64>> {
    let unlimited = prop::collection::vec(Just(0), 1..9);
    let tight = prop::collection::vec(0u64..300, 1..9);
    prop_oneof![unlimited, tight]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// (A), (B), (G), over changing clusters.
    #[test]
    fn every_plan_keeps_the_invariants(layers in 0u32..5, experts in 0u32..17, replicas in 1u32..5, budgets in budgets(),
                                       lost in any::<prop::sample::Index>(), gained in 0u64..300) {
        let model = model(layers, experts);
        let mut workers = workers(&budgets);
        let problem = still(&model, &workers, replicas);
        let one = first(&problem);
        prop_assert_eq!(lint::broken_invariant(&one, &problem, None), None);
        prop_assert_eq!(plan(&problem, Some(&one)).unwrap(), None, "a plan is stable when solved again");

        workers.remove(lost.index(workers.len()));
        workers.push(worker(100, gained));
        let problem = still(&model, &workers, replicas);
        if let Some(two) = plan(&problem, Some(&one)).unwrap() {
            prop_assert_eq!(lint::broken_invariant(&two, &problem, Some(&one)), None);
            prop_assert_eq!(two.parent, one.version);
            prop_assert!(two.version > one.version);
            prop_assert_eq!(plan(&problem, Some(&two)).unwrap(), None, "and so is its successor");
        }
    }

    /// (A), (D).
    #[test]
    fn without_budgets_every_expert_has_its_holders_and_counts_differ_by_at_most_one(
        layers in 1u32..5, experts in 1u32..17, replicas in 1u32..6, count in 1usize..9) {
        let model = model(layers, experts);
        let workers = workers(&vec![0; count]);
        let plan = first(&still(&model, &workers, replicas));
        let wanted = count.min(replicas as usize);
        for (layer, expert, holders) in plan.iter() {
            let distinct: std::collections::BTreeSet<_> = holders.iter().collect();
            prop_assert_eq!((distinct.len(), holders.len()), (wanted, wanted), "layer {}, expert {}", layer, expert);
        }
        let counts = counts(&plan, &workers);
        prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{:?}", counts);
    }

    /// (E).
    #[test]
    fn a_dead_workers_experts_are_placed_again_and_no_other_moves(
        layers in 1u32..5, experts in 1u32..17, replicas in 1u32..4, count in 2usize..9,
        dead in any::<prop::sample::Index>()) {
        let model = model(layers, experts);
        let mut workers = workers(&vec![0; count]);
        let before = first(&still(&model, &workers, replicas));
        let dead = workers.remove(dead.index(count)).id;
        let after = plan(&still(&model, &workers, replicas), Some(&before)).unwrap();
        let after = after.unwrap_or_else(|| before.clone());
        for (layer, expert, holders) in before.iter() {
            let now = after.holders(layer, expert);
            prop_assert!(!now.contains(&dead));
            prop_assert_eq!(now.len(), workers.len().min(replicas as usize));
            let survivors: Vec<_> = holders.iter().filter(|holder| **holder != dead).collect();
            prop_assert!(survivors.iter().all(|holder| now.contains(holder)), "a survivor's expert moved");
        }
    }

    /// (C).
    #[test]
    fn first_copies_come_before_second_ones(layers in 1u32..4, experts in 1u32..9, budgets in prop::collection::vec(1u64..120, 1..6)) {
        let model = model(layers, experts);
        let workers = workers(&budgets);
        let plan = first(&still(&model, &workers, 3));
        let unplaced = plan.iter().filter(|(_, _, holders)| holders.is_empty()).count();
        let richest = plan.iter().map(|(_, _, holders)| holders.len()).max().unwrap_or(0);
        prop_assert!(unplaced == 0 || richest <= 1, "{} experts have no holder and one has {}", unplaced, richest);
    }
}

proptest! {
    /// (D): nobody who has room has a smaller share of his speed than others.
    #[test]
    fn shares_follow_speed_as_far_as_memory_allows(
        experts in 1u32..17, of in prop::collection::vec((100.0f64..900.0, prop_oneof![Just(0), 10u64..300]), 1..7)) {
        let model = model(4, experts);
        let mut workers = workers(&of.iter().map(|(_, budget)| *budget).collect::<Vec<_>>());
        workers.iter_mut().zip(&of).for_each(|(worker, (speed, _))| worker.speed = *speed);
        let problem = still(&model, &workers, 1);
        let counts = counts(&first(&problem), &workers);
        let speeds = crate::planner::relative_speeds(&workers).unwrap();
        for (worker, count) in workers.iter().zip(&counts) {
            prop_assert!(*count <= problem.room(worker));
        }
        for (open, fewer) in counts.iter().enumerate().filter(|(at, count)| **count + 2 < problem.room(&workers[*at])) {
            for (other, more) in counts.iter().enumerate() {
                prop_assert!(*more as f64 / speeds[other] <= (fewer + 2) as f64 / speeds[open], "{:?} {:?}", counts, speeds);
            }
        }
    }
}

#[test]
fn neighbouring_layers_spread() {
    let model = model(4, 8);
    let workers = workers(&[0; 4]);
    let plan = first(&still(&model, &workers, 1));
    let holders: Vec<_> = (1..=4).map(|layer| plan.holders(LayerIdx(layer), ExpertId(0))[0].to_string()).collect();
    assert_eq!(holders, ["w0", "w1", "w2", "w3"]);
    assert_eq!(counts(&plan, &workers), [8; 4]);
}

#[test]
fn a_worker_with_twice_the_memory_gets_twice_the_experts() {
    let model = model(2, 15);
    let workers = workers(&[200, 400, 400]);
    let plan = first(&still(&model, &workers, 1));
    assert_eq!(counts(&plan, &workers), [6, 12, 12]);
}

#[test]
fn memory_that_ran_out_is_told_by_the_lint() {
    let model = model(1, 8);
    let workers = workers(&[30, 30]);
    let problem = still(&model, &workers, 2);
    let plan = first(&problem);
    assert_eq!(counts(&plan, &workers), [3, 3]);
    let unplaced =
        lint::lint(&plan, &problem, None).into_iter().filter(|note| matches!(note.rule, Rule::Unplaced { .. }));
    assert_eq!(unplaced.count(), 2);
}

/// (C).
#[test]
fn a_survivors_second_copy_makes_way_when_memory_runs_out() {
    let model = model(1, 4);
    let workers = workers(&[40, 20, 20]);
    let [w0, w1, w2] = [0, 1, 2].map(|number: usize| workers[number].id.clone());
    let twice = vec![w1.clone(), w2.clone()];
    let before = Plan {
        version: PlanVersion(1),
        parent: PlanVersion::NONE,
        policy: POLICY.into(),
        reason: String::new(),
        layers: BTreeMap::from([(LayerIdx(1), vec![twice.clone(), twice, vec![w0.clone()], vec![w0]])]),
    };
    let after = plan(&still(&model, &workers[1..], 2), Some(&before)).unwrap().unwrap();
    let holders: Vec<_> = after.iter().map(|(_, _, holders)| holders.to_vec()).collect();
    assert_eq!(holders, [vec![w1.clone()], vec![w1], vec![w2.clone()], vec![w2]]);
}

#[test]
fn the_reason_says_who_left() {
    let model = model(1, 4);
    let both = workers(&[0, 0]);
    let before = first(&still(&model, &both, 1));
    assert_eq!(before.reason, "first plan, 2 workers, 1 replicas");
    assert_eq!((before.version, before.parent), (PlanVersion(1), PlanVersion::NONE));
    let after = plan(&still(&model, &both[1..], 1), Some(&before)).unwrap().unwrap();
    assert_eq!(after.reason, "w0 left, 2 copies placed, 0 given up, 1 workers");
}

#[test]
fn impossible_problems_are_refused() {
    let model = model(1, 4);
    let both = workers(&[0, 0]);
    let solve = |workers: &[PlannerWorker], replicas| plan(&still(&model, workers, replicas), None);
    assert_eq!(solve(&[], 1), Err(Error::NoWorkers));
    assert_eq!(solve(&both, 0), Err(Error::NoReplicas));
    let twice = [worker(7, 0), worker(7, 0)];
    assert!(matches!(solve(&twice, 1), Err(Error::DuplicateWorker { .. })));
    let vast = ModelIdentity { experts: 70_000, ..model.clone() };
    let vast = plan(&still(&vast, &both, 1), None);
    assert_eq!(vast, Err(Error::TooManyExperts { experts: 70_000 }));
    let last = Plan {
        version: PlanVersion(u64::MAX),
        parent: PlanVersion(1),
        policy: POLICY.into(),
        reason: String::new(),
        layers: BTreeMap::new(),
    };
    let exhausted = plan(&still(&model, &both, 1), Some(&last));
    assert_eq!(exhausted, Err(Error::VersionsExhausted));
}

#[test]
fn a_full_worker_that_waits_for_one_expert_may_be_given_others_that_it_has() {
    let (model, mut workers) = (model(1, 4), workers(&[30, 30]));
    let w1 = workers[1].id.clone();
    let resident = |experts: &[u16]| experts.iter().map(|expert| (LayerIdx(1), ExpertId(*expert))).collect();
    workers[0].resident = resident(&[0, 1, 2]);
    let one = first(&still(&model, &workers, 1));
    let waits = vec![vec![w1.clone()], vec![w1.clone()], vec![w1], vec![workers[0].id.clone()]];
    let one = Plan { layers: BTreeMap::from([(LayerIdx(1), waits)]), ..one };
    workers.truncate(1);
    let two = plan(&still(&model, &workers, 1), Some(&one)).unwrap().expect("w1 left");
    assert_eq!(two.assigned_to(&workers[0].id), resident(&[0, 1, 3]));
}
