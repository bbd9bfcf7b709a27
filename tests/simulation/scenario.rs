//! What a seed stands for: a small cluster, and what is done to it when.
//!
//! In: a seed. Out: a [`Scenario`], the same for the same seed. Never here: anything that runs.

use std::{fmt, time::Duration};

use conclave_placement::policy::{Planner, Policy, Rebalancing};
use conclave_placement::{
    ids::{LayerIdx, WorkerId},
    state::{Locality, ModelIdentity},
};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

/// What one expert weighs, in bytes.
pub const EXPERT_BYTES: u64 = 100;
/// The cluster is left alone until here: a first plan is made and carried out.
const CALM: Duration = Duration::from_secs(3);

/// A cluster and its fate.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub model: ModelIdentity,
    pub policy: Policy,
    /// Of all leases.
    pub ttl: Duration,
    pub workers: Vec<Worker>,
    pub routers: usize,
    /// Ascending by time.
    pub faults: Vec<(Duration, Fault)>,
    /// Of a thousand calls, how many are lost before they happen, and how many after. Of watches and calls, how many are late.
    pub losses: u32,
    /// From here on nothing is lost, cut off or slow, and what was crashed runs.
    pub calm_again: Duration,
}

/// One worker, as it was set up.
#[derive(Clone, Debug)]
pub struct Worker {
    pub id: WorkerId,
    /// Experts that fit; 0 for no limit.
    pub room: usize,
    pub locality: Locality,
    /// Rows per second and expert.
    pub speed: f64,
    /// When it is started for the first time.
    pub starts: Duration,
}

/// What is done to the cluster. Workers and routers are named by their places in the scenario.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    CrashWorker {
        worker: usize,
        down: Duration,
    },
    CrashRouter {
        router: usize,
        down: Duration,
    },
    CrashLeader {
        down: Duration,
    },
    CutWorker {
        worker: usize,
        off: Duration,
    },
    CutRouter {
        router: usize,
        off: Duration,
    },
    BreakWatches,
    /// What it watches comes late, while what it calls works.
    LagWorker {
        worker: usize,
        off: Duration,
    },
    LagRouter {
        router: usize,
        off: Duration,
    },
    PauseStore {
        time: Duration,
    },
    CompactStore,
    DrainWorker {
        worker: usize,
    },
    /// One that has left comes again.
    StartWorker {
        worker: usize,
    },
    DeleteWorkerRecord {
        worker: usize,
    },
    ShiftLoad,
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, policy, workers, routers, ttl, losses, .. } = self;
        let rooms: Vec<usize> = workers.iter().map(|worker| worker.room).collect();
        let (layers, experts, replicas) = (model.moe_layers.len(), model.experts, policy.replicas);
        write!(f, "{layers} layers of {experts} experts, {replicas} replicas, redundant {:?}, ", policy.redundant)?;
        write!(f, "rooms {rooms:?}, {routers} routers, rebalance every {:?}, ", policy.rebalance.period)?;
        write!(f, "ttl {ttl:?}, {losses} losses in 1000")
    }
}

impl Scenario {
    pub fn of(seed: u64) -> Self {
        let mut chance = SmallRng::seed_from_u64(seed);
        let layers: u32 = chance.random_range(1..=3);
        let experts: u32 = chance.random_range(4..=8);
        let model = ModelIdentity {
            name: "simulated".into(),
            config_digest: "c".into(),
            checkpoint_digest: "d".into(),
            layers: layers + 1,
            moe_layers: (1..=layers).map(LayerIdx).collect(),
            experts,
            expert_bytes: EXPERT_BYTES,
        };
        let policy = policy(&mut chance);
        let calm_again = CALM + Duration::from_millis(chance.random_range(10_000..40_000));
        let workers = workers(&mut chance, (layers * experts) as usize, policy.replicas as usize, calm_again);
        let routers = chance.random_range(1..=3);
        let faults = faults(&mut chance, workers.len(), routers, calm_again);
        let ttl = Duration::from_millis(chance.random_range(2_000..6_000));
        let losses = *[0, 10, 20, 80].choose(&mut chance).unwrap_or(&0);
        Self { seed, model, policy, ttl, workers, routers, faults, losses, calm_again }
    }
}

/// Chance for one purpose, which no other purpose can disturb.
pub fn chance_of(seed: u64, purpose: &str, count: u32) -> SmallRng {
    let mix = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    SmallRng::seed_from_u64(purpose.bytes().fold(seed ^ (u64::from(count) << 40), mix))
}

fn policy(chance: &mut SmallRng) -> Policy {
    let period = match chance.random_bool(0.8) {
        true => Duration::from_millis(chance.random_range(2_000..5_000)),
        false => Duration::ZERO,
    };
    Policy {
        planner: Planner::Balanced,
        replicas: chance.random_range(1..=3),
        redundant: chance.random_bool(0.5).then(|| chance.random_range(0..=3)),
        min_workers: chance.random_range(1..=2),
        rebalance: Rebalancing { period, below: 0.8, gain: 0.05 },
    }
}

/// Two to five workers, of which the later ones may join while things happen. Memory is unlimited, ample, tight or scarce.
fn workers(chance: &mut SmallRng, experts: usize, replicas: usize, calm_again: Duration) -> Vec<Worker> {
    let count = chance.random_range(2..=5);
    let fill = match chance.random_range(0..6) {
        0..=2 => None,
        3 => Some(1.6),
        4 => Some(1.1),
        _ => Some(0.8),
    };
    let copies = experts * replicas.min(count);
    let labels = chance.random_range(0..3);
    (0..count)
        .map(|place| {
            let mut share = |fill: f64| (copies as f64 * fill / count as f64 * chance.random_range(0.8..1.2)).ceil();
            let room = fill.map_or(0, |fill| (share(fill) as usize).max(1));
            let mut label = |kind: &str, of: usize| match labels {
                0 => String::new(),
                _ => format!("{kind}{}", chance.random_range(0..of)),
            };
            let locality = Locality { host: label("host", 3), zone: label("zone", 2) };
            let starts = match place >= 2 && chance.random_bool(0.4) {
                true => chance.random_range(CALM..calm_again),
                false => Duration::from_millis(chance.random_range(0..1500)),
            };
            let speed = *[0.0, 1000.0, 2000.0].choose(chance).unwrap_or(&0.0);
            Worker { id: worker_id(place), room, locality, speed, starts }
        })
        .collect()
}

/// Any of them at any time, but for clusters in which nothing crashes: there, nothing excuses an expert without a holder.
fn faults(chance: &mut SmallRng, workers: usize, routers: usize, end: Duration) -> Vec<(Duration, Fault)> {
    let count = chance.random_range(3..=16);
    let crashes = chance.random_bool(0.6);
    let mut drains = 0;
    let mut faults: Vec<(Duration, Fault)> = (0..count)
        .map(|_| {
            let mut seconds = |most: u64| Duration::from_millis(chance.random_range(300..most * 1000));
            let (short, long) = (seconds(5), seconds(10));
            let (worker, router) = (chance.random_range(0..workers), chance.random_range(0..routers));
            let fault = match chance.random_range(if crashes { 0 } else { 6 }..27) {
                0..=2 => Fault::CrashWorker { worker, down: long },
                3 => Fault::CrashRouter { router, down: long },
                4 | 5 => Fault::CrashLeader { down: long },
                6 | 7 => Fault::CutWorker { worker, off: long },
                8 | 9 => Fault::CutRouter { router, off: long },
                10 | 11 => Fault::LagWorker { worker, off: short },
                12 => Fault::LagRouter { router, off: short },
                13 => Fault::BreakWatches,
                14 => Fault::PauseStore { time: short },
                15 => Fault::CompactStore,
                16 => Fault::DeleteWorkerRecord { worker },
                // Somebody must stay.
                17..=20 if drains + 1 < workers => {
                    drains += 1;
                    Fault::DrainWorker { worker }
                }
                21 | 22 => {
                    drains = drains.saturating_sub(1);
                    Fault::StartWorker { worker }
                }
                _ => Fault::ShiftLoad,
            };
            (chance.random_range(CALM..end), fault)
        })
        .collect();
    faults.sort_by_key(|(at, _)| *at);
    faults
}

fn worker_id(place: usize) -> WorkerId {
    WorkerId::parse(&format!("w{place}")).expect("a valid name")
}
