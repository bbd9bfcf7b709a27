//! How long plans take for a cluster of the largest size, how much they move, how large they are, and how even.
//!
//! In: nothing, or the number of workers. Out: a table, one plan a row. Never here: a store or a network; planning is pure.
//!
//! ```text
//! cargo run -p conclave-placement --example plan_scale
//! cargo run -p conclave-placement --example plan_scale -- 64
//! ```
//!
//! The model is as large as DeepSeek-V3: 61 layers of 256 experts. Rows follow Zipf's law, with other favourites in each
//! layer. Every worker has held what the plan before gave it when the next one is made.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use conclave_placement::load::balancedness;
use conclave_placement::planner::{PlannerWorker, Problem, Rebalance, balanced, eplb};
use conclave_placement::policy::{Planner, Policy, Rebalancing};
use conclave_placement::state::{ClusterState, WorkerRecord, WorkerState};
use conclave_placement::{Incarnation, LayerIdx, Load, Locality, ModelIdentity, Plan, Residency, WorkerId};

const LAYERS: u32 = 61;
const EXPERTS: u32 = 256;
/// Least gain in balancedness that copies move for, and how many may at once: no bound, to see the whole of it.
const IF_GAIN: Rebalance = Rebalance::IfGain { least: 0.05, moves: usize::MAX };

/// As the controller does it.
const RATIONED: Rebalance = Rebalance::IfGain { least: 0.05, moves: 256 };

fn main() -> anyhow::Result<()> {
    let workers = std::env::args().nth(1).map_or(Ok(1000), |count| count.parse()).context("the number of workers")?;
    let model = model();
    println!("{:<52} {:>7} {:>7} {:>7} {:>9} {:>13}", "plan", "seconds", "added", "removed", "bytes", "balancedness");
    ours(&model, workers)?;
    balanced_from_scratch(&model, workers)?;
    unlike(&model, workers)?;
    theirs(&model, workers.next_power_of_two())?;
    standing(&model, workers)
}

/// A cluster's life under `balanced`: its start, a death, load, other load, a newcomer.
fn ours(model: &ModelIdentity, count: usize) -> anyhow::Result<()> {
    let (even, other) = (zipf(model, 1), zipf(model, 7));
    let mut workers = cluster(count);
    let problem = Problem { workers: &workers, ..still_of(model) };
    let first = row("first plan, 2 replicas, no load", &problem, None, &even, balanced::plan)?;
    settle(&mut workers, &first);
    workers.remove(count / 2);
    let problem = Problem { workers: &workers, ..still_of(model) };
    let healed = row("one death", &problem, Some(&first), &even, balanced::plan)?;
    settle(&mut workers, &healed);
    let problem = Problem { workers: &workers, load: Some(&even), rebalance: IF_GAIN, ..still_of(model) };
    let loaded = row("rebalance after Zipf load, 256 spares a layer", &problem, Some(&healed), &even, balanced::plan)?;
    settle(&mut workers, &loaded);
    let problem = Problem { workers: &workers, load: Some(&other), rebalance: IF_GAIN, ..still_of(model) };
    let shifted = row("rebalance after other favourites", &problem, Some(&loaded), &other, balanced::plan)?;
    settle(&mut workers, &shifted);
    workers.push(PlannerWorker { locality: worker(count / 2).locality, ..worker(count) });
    let problem = Problem { workers: &workers, load: Some(&other), rebalance: IF_GAIN, ..still_of(model) };
    let joined = row("one joins", &problem, Some(&shifted), &other, balanced::plan)?;
    settle(&mut workers, &joined);
    let problem = Problem { workers: &workers, load: Some(&other), rebalance: IF_GAIN, ..still_of(model) };
    row("the same again", &problem, Some(&joined), &other, balanced::plan)?;
    Ok(())
}

fn balanced_from_scratch(model: &ModelIdentity, count: usize) -> anyhow::Result<()> {
    let (load, workers) = (zipf(model, 1), cluster(count));
    let problem = Problem { workers: &workers, load: Some(&load), rebalance: IF_GAIN, ..still_of(model) };
    row("first plan with Zipf load, 256 spares a layer", &problem, None, &load, balanced::plan)?;
    Ok(())
}

/// Workers of two speeds, with memory for a fifth more than two copies of everything, whose copies move 256 at a time.
fn unlike(model: &ModelIdentity, count: usize) -> anyhow::Result<()> {
    let (even, other) = (zipf(model, 1), zipf(model, 7));
    let copies = 2 * u64::from(LAYERS * EXPERTS);
    let mut workers = cluster(count);
    for (number, worker) in workers.iter_mut().enumerate() {
        worker.memory_budget = (copies * 12 / 10).div_ceil(count as u64) * model.expert_bytes;
        worker.speed = if number % 4 == 0 { 2000.0 } else { 1000.0 };
    }
    let problem = Problem { workers: &workers, load: Some(&even), rebalance: RATIONED, ..still_of(model) };
    let mut plan = row("tight memory, two speeds: first plan, Zipf load", &problem, None, &even, balanced::plan)?;
    for name in ["the same, other favourites, 256 moves", "256 more", "256 more"] {
        settle(&mut workers, &plan);
        let problem = Problem { workers: &workers, load: Some(&other), rebalance: RATIONED, ..still_of(model) };
        plan = row(name, &problem, Some(&plan), &other, balanced::plan)?;
    }
    Ok(())
}

/// EPLB and ours with the same number of copies: one slot per worker and layer, or what the experts need.
fn theirs(model: &ModelIdentity, count: usize) -> anyhow::Result<()> {
    let (load, other, workers) = (zipf(model, 1), zipf(model, 7), cluster(count));
    let slots = (EXPERTS as usize * 2).next_multiple_of(count) as u32;
    let spares = slots - EXPERTS;
    let problem = Problem { workers: &workers, load: Some(&load), replicas: 1, redundant: spares, ..still_of(model) };
    let name = |what: &str| format!("{what}, {count} workers, {slots} slots");
    let plan = |problem: &Problem<'_>, previous: Option<&Plan>| eplb::policy::plan(problem, 1, previous);
    let first = row(&name("eplb, Zipf load"), &problem, None, &load, plan)?;
    let shifted = Problem { load: Some(&other), ..problem };
    row(&name("eplb, other favourites"), &shifted, Some(&first), &other, plan)?;

    let problem = Problem { rebalance: IF_GAIN, ..problem };
    let mut ours = cluster(count);
    let first = row(&name("balanced, Zipf load"), &problem, None, &load, balanced::plan)?;
    settle(&mut ours, &first);
    let shifted = Problem { workers: &ours, load: Some(&other), ..problem };
    row(&name("balanced, other favourites"), &shifted, Some(&first), &other, balanced::plan)?;
    Ok(())
}

/// What a settled cluster costs whenever something in it changes: a copy of its state for the view, a look by the controller.
fn standing(model: &ModelIdentity, count: usize) -> anyhow::Result<()> {
    let (load, mut workers) = (zipf(model, 1), cluster(count));
    let problem = Problem { workers: &workers, load: Some(&load), ..still_of(model) };
    let plan = balanced::plan(&problem, None)?.context("a first plan is always made")?;
    settle(&mut workers, &plan);
    let version = plan.version;
    let mut state = ClusterState { model: Some(model.clone()), plan: Some(Arc::new(plan)), ..ClusterState::empty() };
    for PlannerWorker { id, resident, locality, .. } in workers {
        let starting = WorkerRecord::starting(id.clone(), Incarnation::fresh(), "127.0.0.1:7500");
        let record =
            WorkerRecord { state: WorkerState::Serving, resident, locality, plan_version: version, ..starting };
        state.workers.insert(id, record);
    }
    let rebalance = Rebalancing { period: Duration::from_secs(60), below: 0.5, gain: 0.05 };
    let policy = Policy { planner: Planner::Balanced, replicas: 2, redundant: None, min_workers: 1, rebalance };
    println!("\n{:<52} {:>7}", "when something changes", "ms");
    timed("the state copied, and compared with the one before", || state.clone() == state);
    timed("whether anything lacks a holder", || policy.due(&state, Some(&load), false));
    timed("whether to look for a better plan", || policy.urge(&state, Some(&load)));
    Ok(())
}

fn timed<T>(name: &str, what: impl Fn() -> T) {
    let start = Instant::now();
    std::hint::black_box(what());
    println!("{name:<52} {:>7.2}", start.elapsed().as_secs_f64() * 1e3);
}

type Planned<E> = Result<Option<Plan>, E>;

/// Makes a plan and prints what it took. Without a change the previous plan is returned.
fn row<E: std::error::Error + Send + Sync + 'static>(
    name: &str,
    problem: &Problem<'_>,
    previous: Option<&Plan>,
    load: &Load,
    planner: impl Fn(&Problem<'_>, Option<&Plan>) -> Planned<E>,
) -> anyhow::Result<Plan> {
    let start = Instant::now();
    let plan = planner(problem, previous)?;
    let seconds = start.elapsed().as_secs_f64();
    let balance = |plan: &Plan| balancedness(plan, load, problem.workers).unwrap_or(1.0);
    let before = previous.map_or_else(|| "-".to_owned(), |plan| format!("{:.3}", balance(plan)));
    let moves = plan.iter().flat_map(|plan| plan.moves_from(previous));
    let (added, removed) = moves.fold((0, 0), |sum, change| (sum.0 + change.added.len(), sum.1 + change.removed.len()));
    let plan = plan.or_else(|| previous.cloned()).context("a first plan is always made")?;
    let after = format!("{:.3}", balance(&plan));
    let bytes = plan.encode().len();
    println!("{name:<52} {seconds:>7.2} {added:>7} {removed:>7} {bytes:>9} {before:>5} > {after:>5}");
    Ok(plan)
}

/// Everybody holds what the plan says, and nothing else.
fn settle(workers: &mut [PlannerWorker], plan: &Plan) {
    for worker in workers.iter_mut() {
        worker.resident = Residency::new();
    }
    for change in plan.moves_from(None) {
        if let Some(worker) = workers.iter_mut().find(|worker| worker.id == change.worker) {
            worker.resident = change.added;
        }
    }
}

fn still_of(model: &ModelIdentity) -> Problem<'_> {
    let rebalance = Rebalance::No;
    Problem { model, workers: &[], replicas: 2, redundant: EXPERTS, load: None, rebalance }
}

fn model() -> ModelIdentity {
    let digests = [String::new(), String::new()];
    ModelIdentity::new("scale".into(), digests, LAYERS as usize, 0..LAYERS as usize, EXPERTS as usize, 1 << 20)
}

fn worker(number: usize) -> PlannerWorker {
    // Only the characters a name may have.
    #[allow(clippy::unwrap_used)]
    let id = WorkerId::parse(&format!("w{number:04}")).unwrap();
    PlannerWorker {
        id,
        memory_budget: 0,
        speed: 0.0,
        locality: Locality { host: format!("host-{}", number / 8), zone: format!("zone-{}", number % 3) },
        resident: Residency::new(),
        failing: Residency::new(),
    }
}

fn cluster(count: usize) -> Vec<PlannerWorker> {
    (0..count).map(worker).collect()
}

/// The expert of rank r has 1/r of the favourite's rows; `stride` decides which expert has which rank.
fn zipf(model: &ModelIdentity, stride: usize) -> Load {
    let layer = |layer: &LayerIdx| {
        let rank = |expert: usize| (expert * (2 * stride + 1) + layer.0 as usize * 37 * stride) % EXPERTS as usize;
        let rows = (0..EXPERTS as usize).map(|expert| 1_000_000 / (rank(expert) as u64 + 1));
        (*layer, rows.collect())
    };
    Load { window: Duration::from_secs(60), layers: model.moe_layers.iter().map(layer).collect() }
}
