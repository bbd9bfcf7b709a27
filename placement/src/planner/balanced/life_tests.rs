//! The balanced planner over the lives of random clusters, with workers that execute what it plans.

use proptest::prelude::*;
use proptest::sample::Index;

use super::fixtures::{load, model, worker};
use super::*;
use crate::ids::WorkerId;
use crate::lint::broken_invariant;
use crate::load::{Load, balancedness};
use crate::planner::PlannerWorker;
use crate::state::{Locality, ModelIdentity};

/// Everything a problem has.
#[derive(Debug, Clone)]
struct Case {
    model: ModelIdentity,
    workers: Vec<PlannerWorker>,
    replicas: u32,
    redundant: u32,
    loads: [Option<Load>; 2],
    rebalance: Rebalance,
}

impl Case {
    fn problem(&self, load: usize) -> Problem<'_> {
        Problem {
            model: &self.model,
            workers: &self.workers,
            replicas: self.replicas,
            redundant: self.redundant,
            load: self.loads[load].as_ref(),
            rebalance: self.rebalance,
        }
    }
}

fn some_worker(number: usize) -> impl Strategy<Value = PlannerWorker> {
    let budget = prop_oneof![3 => Just(0), 1 => 0u64..400];
    let speed = prop_oneof![2 => Just(0.0), 1 => 100.0..900.0];
    (budget, speed, 0usize..4, 0usize..3).prop_map(move |(budget, speed, host, zone)| {
        let host = ["", "a", "b", "c"][host].to_owned();
        let zone = ["", "x", "y"][zone].to_owned();
        PlannerWorker { speed, locality: Locality { host, zone }, ..worker(number, budget) }
    })
}

fn some_workers() -> impl Strategy<Value = Vec<PlannerWorker>> {
    (2usize..9).prop_flat_map(|count| (0..count).map(some_worker).collect::<Vec<_>>())
}

fn some_rows() -> impl Strategy<Value = Option<Vec<u64>>> {
    let rows = prop_oneof![2 => 0u64..100, 1 => Just(0u64), 1 => 500u64..5000];
    prop::option::weighted(0.8, prop::collection::vec(rows, 16))
}

fn some_rebalance() -> impl Strategy<Value = Rebalance> {
    let gain = (prop_oneof![Just(0.0), Just(0.05), Just(0.3)], prop_oneof![Just(usize::MAX), 1usize..30]);
    let gain = gain.prop_map(|(least, moves)| Rebalance::IfGain { least, moves });
    prop_oneof![1 => Just(Rebalance::No), 4 => gain]
}

prop_compose! {
    fn some_case()(layers in 1u32..5, experts in 1u32..17, workers in some_workers(), replicas in 1u32..4,
                   redundant in 0u32..12, rows in [some_rows(), some_rows()], rebalance in some_rebalance()) -> Case {
        let model = model(layers, experts);
        let loads = rows.map(|rows| rows.map(|rows| load(&model, &rows[..experts as usize])));
        Case { model, workers, replicas, redundant, loads, rebalance }
    }
}

/// Workers do what they are told, in an order that `chance` decides: load what fits, and give up what they should not hold
/// once all who should have it. Ends when nobody can do anything.
fn execute(case: &mut Case, plan: &Plan, chance: &mut impl FnMut() -> usize) {
    loop {
        let mut able: Vec<(usize, bool, crate::ids::LayerIdx, crate::ids::ExpertId)> = Vec::new();
        for (at, worker) in case.workers.iter().enumerate() {
            let planned = plan.assigned_to(&worker.id);
            let room = case.problem(0).room(worker);
            if worker.resident.len() < room {
                let lacks = planned.iter().filter(|(layer, expert)| !worker.resident.contains(*layer, *expert));
                able.extend(lacks.map(|(layer, expert)| (at, true, layer, expert)));
            }
            let arrived = |(layer, expert): &(_, _)| {
                let holders = plan.holders(*layer, *expert);
                let has =
                    |id: &WorkerId| case.workers.iter().any(|w| w.id == *id && w.resident.contains(*layer, *expert));
                !holders.is_empty() && holders.iter().all(has)
            };
            let idle = worker.resident.iter().filter(|(layer, expert)| !planned.contains(*layer, *expert));
            able.extend(idle.filter(arrived).map(|(layer, expert)| (at, false, layer, expert)));
        }
        if able.is_empty() {
            return;
        }
        let (at, loads, layer, expert) = able[chance() % able.len()];
        let resident = &mut case.workers[at].resident;
        if loads {
            resident.insert(layer, expert)
        } else {
            resident.remove(layer, expert)
        };
    }
}

/// Plans and executes until there is nothing to do; every plan is checked on the way.
fn live(case: &mut Case, load: usize, mut current: Option<Plan>, seed: usize) -> Result<Plan, TestCaseError> {
    let mut state = seed as u64 | 1;
    let mut chance = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    for _ in 0..200 {
        let next = plan(&case.problem(load), current.as_ref()).unwrap();
        let Some(next) = next else { return Ok(current.expect("a first plan is a change")) };
        prop_assert_eq!(broken_invariant(&next, &case.problem(load), current.as_ref()), None);
        if !matches!(case.rebalance, Rebalance::IfGain { moves, .. } if moves < 1000) {
            let again = plan(&case.problem(load), Some(&next)).unwrap();
            prop_assert!(
                again.is_none(),
                "not stable: {:?}",
                again.map(|again| (again.moves_from(Some(&next)), again.reason))
            );
        }
        let was: Vec<_> = case.workers.iter().flat_map(|worker| worker.resident.iter()).collect();
        execute(case, &next, &mut chance);
        for (layer, expert) in was {
            let there = case.workers.iter().any(|worker| worker.resident.contains(layer, expert));
            prop_assert!(there, "the last copy of {} in {} went", expert, layer);
        }
        for worker in &case.workers {
            prop_assert!(worker.resident.len() <= case.problem(load).room(worker));
            let planned = next.assigned_to(&worker.id);
            let lacks = planned.iter().any(|(layer, expert)| !worker.resident.contains(layer, expert));
            prop_assert!(!lacks, "{} waits for ever", worker.id);
        }
        current = Some(next);
    }
    prop_assert!(false, "plans without end");
    unreachable!()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// (A) to (C), (G), (K).
    #[test]
    fn clusters_live_through_deaths_joins_and_changing_load(
        mut case in some_case(), lost in any::<Index>(), gained in some_worker(100), seed in any::<usize>()) {
        let first = live(&mut case, 0, None, seed)?;
        let shifted = live(&mut case, 1, Some(first), seed)?;
        let dead = lost.index(case.workers.len());
        case.workers.remove(dead);
        let healed = live(&mut case, 1, Some(shifted), seed)?;
        case.workers.push(gained);
        let joined = live(&mut case, 1, Some(healed), seed)?;
        live(&mut case, 0, Some(joined), seed)?;
    }

    /// (E).
    #[test]
    fn without_rebalancing_only_the_dead_ones_experts_move(
        mut case in some_case(), lost in any::<Index>(), seed in any::<usize>()) {
        case.workers.iter_mut().for_each(|worker| worker.memory_budget = 0);
        case.rebalance = Rebalance::IfGain { least: 0.05, moves: 1000 };
        let before = live(&mut case, 0, None, seed)?;
        let dead = case.workers.remove(lost.index(case.workers.len())).id;
        case.rebalance = Rebalance::No;
        let after = plan(&case.problem(1), Some(&before)).unwrap().unwrap_or_else(|| before.clone());
        for (layer, expert, holders) in before.iter() {
            let now = after.holders(layer, expert);
            let stay = holders.iter().filter(|holder| **holder != dead);
            prop_assert!(stay.clone().all(|holder| now.contains(holder)), "a survivor's expert moved");
            prop_assert!(now.len() == stay.count().max(case.problem(1).wanted()));
        }
    }

    /// (F), (I).
    #[test]
    fn rebalancing_loses_nothing_and_first_plans_spread(mut case in some_case(), seed in any::<usize>()) {
        let no_budget = |worker: &mut PlannerWorker| worker.memory_budget = 0;
        case.workers.iter_mut().for_each(no_budget);
        let blind = { let mut blind = case.clone(); blind.loads[0] = None; live(&mut blind, 0, None, seed)? };
        let problem = case.problem(0);
        let shared = |note: &crate::lint::Note| matches!(note.rule, crate::lint::Rule::SharedFate { .. });
        prop_assert!(!crate::lint::lint(&blind, &problem, None).iter().any(shared));
        let Some(load) = &case.loads[1] else { return Ok(()) };
        for worker in &mut case.workers {
            worker.resident = blind.assigned_to(&worker.id);
            // Safety may cost evenness.
            worker.locality = Locality::default();
        }
        let balance = |plan: &Plan| balancedness(plan, load, &case.workers);
        if let Some(next) = plan(&case.problem(1), Some(&blind)).unwrap() {
            prop_assert!(balance(&next) >= balance(&blind).map(|before| before - 1e-6), "{}", next.reason);
        }
    }
}
