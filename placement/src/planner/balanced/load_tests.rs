//! The balanced planner where load, speed and fate are known: small cases that say what is wanted of it.

use super::fixtures::{load, model, worker, workers};
use super::*;
use crate::ids::{ExpertId, LayerIdx, WorkerId};
use crate::lint::{Rule, lint};
use crate::load::{Load, balancedness};
use crate::planner::PlannerWorker;
use crate::state::{Locality, ModelIdentity};

const FREELY: Rebalance = Rebalance::IfGain { least: 0.05, moves: usize::MAX };

fn problem<'a>(model: &'a ModelIdentity, workers: &'a [PlannerWorker], load: Option<&'a Load>) -> Problem<'a> {
    Problem { model, workers, replicas: 1, redundant: 0, load, rebalance: FREELY }
}

fn solve(problem: &Problem<'_>, previous: Option<&Plan>) -> Plan {
    plan(problem, previous).unwrap().expect("there is something to change")
}

/// Everybody holds what the plan says.
fn execute(workers: &mut [PlannerWorker], plan: &Plan) {
    for worker in workers {
        worker.resident = plan.assigned_to(&worker.id);
    }
}

fn counts(plan: &Plan, workers: &[PlannerWorker]) -> Vec<usize> {
    workers.iter().map(|worker| plan.assigned_to(&worker.id).len()).collect()
}

fn copies(plan: &Plan, layer: u32, expert: u16) -> usize {
    plan.holders(LayerIdx(layer), ExpertId(expert)).len()
}

/// (D).
#[test]
fn shares_follow_speed_whether_load_is_known_or_not() {
    let model = model(4, 16);
    let mut workers = workers(&[0; 4]);
    for (worker, speed) in workers.iter_mut().zip([2000.0, 1000.0, 1000.0, 0.0]) {
        worker.speed = speed;
    }
    let blind = solve(&problem(&model, &workers, None), None);
    let counts = counts(&blind, &workers);
    // The unknown one counts as the mean, 4/3 of the slower two.
    assert!(counts[0].abs_diff(24) <= 1 && counts[1].abs_diff(12) <= 1 && counts[3].abs_diff(16) <= 1, "{counts:?}");
    let load = load(&model, &[100, 50, 50, 50, 100, 50, 50, 50, 100, 50, 50, 50, 100, 50, 50, 50]);
    let seen = solve(&problem(&model, &workers, Some(&load)), None);
    assert!(balancedness(&seen, &load, &workers).unwrap() > 0.85, "{}", seen.reason);
}

/// (J).
#[test]
fn copies_of_an_expert_follow_its_load_up_and_down_again() {
    let model = model(2, 8);
    let mut workers = workers(&[0; 8]);
    let even = load(&model, &[100; 8]);
    let first = solve(&Problem { redundant: 4, ..problem(&model, &workers, Some(&even)) }, None);
    assert!(first.iter().all(|(_, _, holders)| holders.len() == 1), "an even load needs no spares");
    execute(&mut workers, &first);

    let hot = load(&model, &[500, 100, 100, 100, 100, 100, 100, 100]);
    let up = solve(&Problem { redundant: 4, ..problem(&model, &workers, Some(&hot)) }, Some(&first));
    assert!(copies(&up, 1, 0) > 2 && copies(&up, 2, 1) > 2, "{:?}", up.layers);
    assert!(balancedness(&up, &hot, &workers) > balancedness(&first, &hot, &workers));
    execute(&mut workers, &up);

    let cold = load(&model, &[100, 100, 100, 100, 500, 100, 100, 100]);
    let over = solve(&Problem { redundant: 4, ..problem(&model, &workers, Some(&cold)) }, Some(&up));
    assert_eq!(copies(&over, 1, 0), 1, "{:?}", over.layers);
    assert!(copies(&over, 1, 4) > 2, "{:?}", over.layers);
    execute(&mut workers, &over);

    let none = solve(&Problem { redundant: 0, ..problem(&model, &workers, Some(&cold)) }, Some(&over));
    assert!(none.iter().all(|(_, _, holders)| holders.len() == 1), "spares end with the wish for them");
}

/// (F).
#[test]
fn what_gains_less_than_the_floor_changes_nothing() {
    let model = model(3, 12);
    let mut workers = workers(&[0; 4]);
    let before = load(&model, &[100; 12]);
    let first = solve(&Problem { redundant: 4, ..problem(&model, &workers, Some(&before)) }, None);
    execute(&mut workers, &first);
    let noise = load(&model, &[104, 97, 100, 102, 96, 100, 103, 99, 98, 101, 100, 100]);
    assert_eq!(plan(&Problem { redundant: 4, ..problem(&model, &workers, Some(&noise)) }, Some(&first)).unwrap(), None);
    let still = Problem { rebalance: Rebalance::No, ..problem(&model, &workers, Some(&noise)) };
    assert_eq!(plan(&still, Some(&first)).unwrap(), None);
}

/// (E), (J).
#[test]
fn who_joins_gets_an_even_share_and_nobody_else_gets_anything() {
    let model = model(5, 16);
    let mut workers = workers(&[0; 4]);
    let first = solve(&Problem { replicas: 2, ..problem(&model, &workers, None) }, None);
    execute(&mut workers, &first);
    workers.push(worker(9, 0));
    let still = Problem { replicas: 2, rebalance: Rebalance::No, ..problem(&model, &workers, None) };
    assert_eq!(plan(&still, Some(&first)).unwrap(), None, "evening out is to be asked for");
    let joined = solve(&Problem { replicas: 2, ..problem(&model, &workers, None) }, Some(&first));
    assert_eq!(counts(&joined, &workers), [32; 5]);
    let moves = joined.moves_from(Some(&first));
    assert!(moves.iter().all(|change| change.worker == workers[4].id || change.added.is_empty()));
    assert_eq!(moves.iter().map(|change| change.added.len()).sum::<usize>(), 32);
    let per_layer = |layer: u32| {
        let residency = joined.assigned_to(&workers[4].id);
        residency.iter().filter(|(at, _)| *at == LayerIdx(layer)).count()
    };
    assert!((1..=5).all(|layer| (6..=7).contains(&per_layer(layer))), "its share is one of each layer");
    assert_eq!(joined.reason, "w9 joined, 32 copies placed, 32 given up, 5 workers");
}

/// (J).
#[test]
fn one_among_many_gets_its_share_however_high_the_floor() {
    let model = model(8, 64);
    let mut workers = workers(&vec![0; 40]);
    let rows: Vec<u64> = (0..64).map(|expert| 1000 + expert * 10).collect();
    let load = load(&model, &rows);
    let first = solve(&problem(&model, &workers, Some(&load)), None);
    execute(&mut workers, &first);
    workers.push(worker(99, 0));
    let joined = solve(&problem(&model, &workers, Some(&load)), Some(&first));
    let share = joined.assigned_to(&workers[40].id).len();
    assert!((10..=14).contains(&share), "{share} of 512 copies on 41 workers");
    assert!(balancedness(&joined, &load, &workers) >= balancedness(&first, &load, &workers));
}

/// (G).
#[test]
fn moves_are_rationed_and_go_on_when_the_last_ones_arrived() {
    let model = model(5, 16);
    let mut workers = workers(&[0; 4]);
    let mut current = solve(&problem(&model, &workers, None), None);
    execute(&mut workers, &current);
    workers.push(worker(9, 0));
    let mut plans = 0;
    loop {
        let rationed = Rebalance::IfGain { least: 0.05, moves: 5 };
        let Some(next) =
            plan(&Problem { rebalance: rationed, ..problem(&model, &workers, None) }, Some(&current)).unwrap()
        else {
            break;
        };
        assert_eq!(
            next.moves_from(Some(&current)).iter().map(|change| change.added.len()).sum::<usize>(),
            5.min(16 - 5 * plans)
        );
        let again = plan(&Problem { rebalance: rationed, ..problem(&model, &workers, None) }, Some(&next)).unwrap();
        assert!(again.is_none_or(|_| next.version.0 == 5), "nothing more while five are on their way");
        execute(&mut workers, &next);
        (current, plans) = (next, plans + 1);
    }
    assert_eq!((counts(&current, &workers), plans), (vec![16; 5], 4));
}

fn housed(places: &[(&str, &str)]) -> Vec<PlannerWorker> {
    let mut workers = workers(&vec![0; places.len()]);
    for (worker, (host, zone)) in workers.iter_mut().zip(places) {
        worker.locality = Locality { host: (*host).to_owned(), zone: (*zone).to_owned() };
    }
    workers
}

fn fates(plan: &Plan, problem: &Problem<'_>) -> usize {
    lint(plan, problem, None).iter().filter(|note| matches!(note.rule, Rule::SharedFate { .. })).count()
}

/// (I).
#[test]
fn replicas_live_on_different_hosts_and_zones_where_there_are_any() {
    let model = model(3, 16);
    let mut workers = housed(&[("a", "x"), ("a", "x"), ("b", "x"), ("b", "x"), ("c", "y"), ("c", "y")]);
    let two = Problem { replicas: 2, ..problem(&model, &workers, None) };
    let first = solve(&two, None);
    assert_eq!(fates(&first, &two), 0);
    let zone = |id: &WorkerId| workers.iter().find(|worker| worker.id == *id).unwrap().locality.zone.clone();
    assert!(first.iter().all(|(_, _, holders)| zone(&holders[0]) != zone(&holders[1])));

    // The other zone dies; when it comes back, copies part again if that is wanted.
    let away = workers.split_off(4);
    execute(&mut workers, &first);
    let huddled =
        solve(&Problem { replicas: 2, rebalance: Rebalance::No, ..problem(&model, &workers, None) }, Some(&first));
    assert!(huddled.iter().all(|(_, _, holders)| holders.len() == 2));
    execute(&mut workers, &huddled);
    workers.extend(away);
    let back = Problem { replicas: 2, ..problem(&model, &workers, None) };
    assert!(fates(&huddled, &back) > 0);
    let parted = solve(&back, Some(&huddled));
    assert_eq!(fates(&parted, &back), 0);
    execute(&mut workers, &parted);
    assert_eq!(plan(&Problem { replicas: 2, ..problem(&model, &workers, None) }, Some(&parted)).unwrap(), None);
}

/// (I), of spares: there is a host for each copy, and enough of them to gain by.
#[test]
fn spares_live_on_hosts_of_their_own_where_there_are_any() {
    let model = model(2, 8);
    let mut workers = housed(&[("a", ""), ("a", ""), ("b", ""), ("b", ""), ("c", ""), ("c", ""), ("d", ""), ("d", "")]);
    let hot = load(&model, &[800, 100, 100, 100, 100, 100, 100, 100]);
    let spared = |workers: &[PlannerWorker], previous| {
        let problem = Problem { redundant: 4, ..problem(&model, workers, Some(&hot)) };
        let plan = solve(&problem, previous);
        assert!(copies(&plan, 1, 0) > 1, "{:?}", plan.layers);
        (fates(&plan, &problem), plan)
    };
    let (shared, first) = spared(&workers, None);
    assert_eq!(shared, 0, "{:?}", first.layers);
    // With one host, spares share it rather than not being there.
    execute(&mut workers, &first);
    workers.iter_mut().for_each(|worker| worker.locality.host = "a".into());
    let cold = load(&model, &[100, 100, 100, 100, 800, 100, 100, 100]);
    let problem = Problem { redundant: 4, ..problem(&model, &workers, Some(&cold)) };
    assert!(copies(&solve(&problem, Some(&first)), 1, 4) > 1);
}

/// (K).
#[test]
fn a_place_is_promised_until_what_lies_there_is_given_up() {
    let model = model(1, 4);
    let mut all = workers(&[40, 20, 20]);
    let [w0, w1, w2] = [0, 1, 2].map(|number: usize| all[number].id.clone());
    let twice = vec![w1, w2];
    let layers = [(LayerIdx(1), vec![twice.clone(), twice, vec![w0.clone()], vec![w0]])].into();
    let first = solve(&problem(&model, &all, None), None);
    let before = Plan { layers, ..first };
    execute(&mut all, &before);
    let mut left = all.split_off(1);
    let ask = |workers: &[PlannerWorker], previous: &Plan| {
        let still = Problem { replicas: 2, rebalance: Rebalance::No, ..problem(&model, workers, None) };
        plan(&still, Some(previous)).unwrap()
    };
    let one = ask(&left, &before).expect("spare copies make way");
    assert_eq!(one.iter().map(|(_, _, holders)| holders.len()).collect::<Vec<_>>(), [1, 1, 0, 0]);
    assert_eq!(ask(&left, &one), None, "nothing more before they have");
    execute(&mut left, &one);
    let two = ask(&left, &one).expect("what has no holder takes their place");
    assert!(two.iter().all(|(_, _, holders)| holders.len() == 1), "{:?}", two.layers);
    execute(&mut left, &two);
    assert_eq!(ask(&left, &two), None);
}

#[test]
fn a_gain_that_cannot_be_is_refused() {
    let (model, workers) = (model(1, 4), workers(&[0]));
    for least in [-0.1, 1.5, f64::NAN] {
        let rebalance = Rebalance::IfGain { least, moves: 1 };
        let refused = plan(&Problem { rebalance, ..problem(&model, &workers, None) }, None);
        assert!(matches!(refused, Err(Error::Gain { .. })));
    }
}
