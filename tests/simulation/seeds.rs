//! Many seeds, shared out over threads.
//!
//! In: how many, from the environment. Out: nothing when all is well, else a panic that says how to run the seed alone.
//! Never here: what a seed means.

use std::{
    env,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::Instant,
};

use parking_lot::Mutex;

use crate::{
    scenario::Scenario,
    world::{Failure, Sabotage, live},
};

const SEEDS: u64 = 1000;
const HOW_MANY: &str = "CONCLAVE_SIMULATION_SEEDS";
const WHICH: &str = "CONCLAVE_SIMULATION_SEED";

/// Lives through all seeds that the environment asks for.
pub fn run() {
    let number = |name| env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let (first, end) = match number(WHICH) {
        Some(seed) => (seed, seed + 1),
        None => (0, number(HOW_MANY).unwrap_or(SEEDS)),
    };
    let next = AtomicU64::new(first);
    let (failures, tallies) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let began = Instant::now();
    let work = || {
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= end {
                return;
            }
            match live(Scenario::of(seed), Sabotage::None) {
                Ok(tally) => tallies.lock().push(tally),
                Err(failure) => failures.lock().push(failure),
            }
        }
    };
    // More threads than cores: each waits now and then for a planner on another one.
    let threads = 2 * thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let tallies = tallies.into_inner();
    let sum = |of: fn(&crate::witness::Tally) -> u64| tallies.iter().map(of).sum::<u64>();
    let (plans, loaded, let_go, left) = (sum(|t| t.plans), sum(|t| t.loaded), sum(|t| t.let_go), sum(|t| t.left));
    let seconds = began.elapsed().as_secs_f64();
    println!("{} seeds in {seconds:.1} s: {plans} plans, {loaded} loads, {let_go} let go, {left} left", tallies.len());
    let mut failures = failures.into_inner();
    failures.sort_by_key(|failure| failure.seed);
    for Failure { seed, what, .. } in &failures {
        println!("seed {seed}: {what}");
    }
    if let Some(Failure { seed, what, story }) = failures.first() {
        let alone = format!("{WHICH}={seed} cargo test -p conclave-tests --test simulation");
        panic!("seed {seed}: {what}\nWhat led to it:\n{story}To run it alone: {alone}");
    }
}
