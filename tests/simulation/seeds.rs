//! Many seeds, shared out over threads.
//!
//! In: how many, from the environment. Out: nothing when all is well, else a panic that says how to run the seed alone.
//! Never here: what a seed means.

use std::{
    env,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    scenario::Scenario,
    witness::Tally,
    world::{Outcome, Sabotage, live},
};

const SEEDS: u64 = 1000;
/// Seeds that once showed a bug (docs/robustness.md), beyond those.
const PAST: [u64; 4] = [1241, 1408, 7059, 10_087];
const HOW_MANY: &str = "CONCLAVE_SIMULATION_SEEDS";
const WHICH: &str = "CONCLAVE_SIMULATION_SEED";

/// Lives through all seeds that the environment asks for.
pub fn run() {
    let number = |name| env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds: Vec<u64> = match number(WHICH) {
        Some(seed) => vec![seed],
        None => PAST.into_iter().chain(0..number(HOW_MANY).unwrap_or(SEEDS)).collect(),
    };
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let began = Instant::now();
    let work = || {
        loop {
            let Some(seed) = seeds.get(next.fetch_add(1, Relaxed)) else { return };
            let mut outcome = live(Scenario::of(*seed), Sabotage::None);
            if outcome.breach.is_none() && seeds.len() > 1 {
                outcome.story = String::new();
            }
            outcomes.lock().push(outcome);
        }
    };
    // More threads than cores: each waits now and then for a planner on another one.
    let threads = 2 * thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let mut outcomes = outcomes.into_inner();
    outcomes.sort_by_key(|outcome| outcome.seed);
    report(&outcomes, began.elapsed());
}

fn report(outcomes: &[Outcome], took: Duration) {
    let sum = |of: fn(&Tally) -> u64| outcomes.iter().map(|outcome| of(&outcome.tally)).sum::<u64>();
    let (plans, loaded, let_go, left) = (sum(|t| t.plans), sum(|t| t.loaded), sum(|t| t.let_go), sum(|t| t.left));
    let (seeds, seconds) = (outcomes.len(), took.as_secs_f64());
    println!("{seeds} seeds in {seconds:.1} s: {plans} plans, {loaded} loads, {let_go} let go, {left} left");
    if let [Outcome { seed, story, breach: None, .. }] = outcomes {
        println!("What happened with seed {seed}:\n{story}");
    }
    let failed: Vec<(&Outcome, &String)> =
        outcomes.iter().filter_map(|outcome| Some((outcome, outcome.breach.as_ref()?))).collect();
    for (Outcome { seed, .. }, breach) in &failed {
        println!("seed {seed}: {breach}");
    }
    if let Some((Outcome { seed, story, .. }, breach)) = failed.first() {
        let alone = format!("{WHICH}={seed} cargo test -p conclave-tests --test simulation");
        panic!("seed {seed}: {breach}\nWhat led to it:\n{story}To run it alone: {alone}");
    }
}
