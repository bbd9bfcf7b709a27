//! Planners: pure functions from what is observed and what was planned to what should be.
//!
//! In: the model, the workers and what they hold, the load, the replicas wanted, the previous plan. Out: the next plan, or
//! nothing when the previous one still is right. Never here: the store, time, or chance. The same problem has the same
//! answer, so two leaders that see the same cluster write the same plan.

pub mod balanced;
pub mod eplb;
pub(crate) mod fate;

use std::collections::BTreeSet;

use crate::ids::{PlanVersion, WorkerId};
use crate::load::Load;
use crate::plan::Plan;
use crate::state::{ClusterState, Locality, ModelIdentity, Residency, WorkerRecord};

/// What a planner solves.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// The layers and experts to place, and what one weighs.
    pub model: &'a ModelIdentity,
    /// Those that may hold experts: alive and not leaving. In the same order for everyone who plans, which [`candidates`] is.
    pub workers: &'a [PlannerWorker],
    /// How many workers should at least hold each expert, where there are as many.
    pub replicas: u32,
    /// How many copies beyond those a layer may have in all, for the experts that have most rows.
    pub redundant: u32,
    /// Rows that went to each expert lately, if known.
    pub load: Option<&'a Load>,
    /// Whether copies may move that need not.
    pub rebalance: Rebalance,
}

/// Whether copies may move for evenness alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rebalance {
    /// No: only what a death, a departure, or a changed limit makes necessary.
    No,
    /// Where it is worth it.
    IfGain {
        /// The least gain in balancedness (see [`crate::load::balancedness`]), from 0 to 1, that a layer's copies move for.
        least: f64,
        /// How many copies may be on their way at once: planned on a worker and not resident there yet.
        moves: usize,
    },
}

/// A worker as a planner sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannerWorker {
    /// Its name.
    pub id: WorkerId,
    /// Bytes it may fill with experts; 0 means as many as it is given.
    pub memory_budget: u64,
    /// Rows per second through one expert; 0 while unknown, which counts as the mean of the known ones.
    pub speed: f64,
    /// What it shares its fate with.
    pub locality: Locality,
    /// What it holds now, and so takes memory until it is given up.
    pub resident: Residency,
    /// What it could not load lately, and is not given.
    pub failing: Residency,
}

/// Speeds within this factor of the median are noise of measurement: workers of one kind are measured while their machines do
/// other things too, and shall get equal shares.
const ALIKE: f64 = 1.25;
/// From this factor on a speed is taken as it was measured. Between the two it grows steadily from the median, so that no
/// difference of measurement, however small, makes a worker another one.
const UNLIKE: f64 = 1.75;

/// A problem that has no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// Nobody to give experts to.
    #[error("there is no live worker to hold the experts")]
    NoWorkers,
    /// A request for nothing.
    #[error("replicas is 0, every expert needs at least one holder")]
    NoReplicas,
    /// More experts than an id can count.
    #[error("the model has {experts} experts per layer, more than 65536")]
    TooManyExperts {
        /// As the model says.
        experts: u32,
    },
    /// The same worker twice.
    #[error("worker {worker} is listed twice")]
    DuplicateWorker {
        /// Its name.
        worker: WorkerId,
    },
    /// A gain that balancedness cannot have.
    #[error("a least gain of {least} in balancedness is not between 0 and 1")]
    Gain {
        /// As it was asked for.
        least: f64,
    },
    /// The previous plan has the last version number there is.
    #[error("the plan's version cannot grow any further")]
    VersionsExhausted,
    /// EPLB knows no second copies for safety.
    #[error("EPLB promises one holder per expert, {replicas} are wanted: ask for redundant copies instead")]
    OnlyOneReplica {
        /// As it was asked for.
        replicas: u32,
    },
    /// EPLB takes all workers for equal.
    #[error("EPLB needs equal workers: {slow} does {least} rows a second, {fast} does {most}")]
    UnequalSpeed {
        /// The slowest worker.
        slow: WorkerId,
        /// Its speed.
        least: f64,
        /// The fastest worker.
        fast: WorkerId,
        /// Its speed.
        most: f64,
    },
    /// EPLB gives each worker the same number of slots.
    #[error("EPLB gives every worker {slots} experts, {worker} has room for {room}")]
    NoRoom {
        /// Who is too small.
        worker: WorkerId,
        /// Experts it may hold.
        room: usize,
        /// Experts it would get.
        slots: usize,
    },
    /// Numbers that EPLB cannot share out.
    #[error("EPLB cannot place this model here")]
    Eplb(#[from] eplb::Precondition),
}

impl Problem<'_> {
    /// How many holders every expert should at least have.
    pub(crate) fn wanted(&self) -> usize {
        (self.replicas as usize).min(self.workers.len())
    }

    /// How many experts that worker may hold.
    pub(crate) fn room(&self, worker: &PlannerWorker) -> usize {
        worker.room(self.model)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.workers.is_empty() {
            return Err(Error::NoWorkers);
        }
        if self.replicas == 0 {
            return Err(Error::NoReplicas);
        }
        if self.model.experts > 1 << 16 {
            return Err(Error::TooManyExperts { experts: self.model.experts });
        }
        if let Rebalance::IfGain { least, .. } = self.rebalance
            && !(0.0..=1.0).contains(&least)
        {
            return Err(Error::Gain { least });
        }
        let mut seen = BTreeSet::new();
        match self.workers.iter().find(|worker| !seen.insert(&worker.id)) {
            Some(twice) => Err(Error::DuplicateWorker { worker: twice.id.clone() }),
            None => Ok(()),
        }
    }
}

impl PlannerWorker {
    /// How many experts of that model it may hold.
    pub fn room(&self, model: &ModelIdentity) -> usize {
        if self.memory_budget == 0 || model.expert_bytes == 0 {
            return usize::MAX;
        }
        usize::try_from(self.memory_budget / model.expert_bytes).unwrap_or(usize::MAX)
    }

    fn known_speed(&self) -> Option<f64> {
        (self.speed.is_finite() && self.speed > 0.0).then_some(self.speed)
    }
}

impl From<&WorkerRecord> for PlannerWorker {
    fn from(record: &WorkerRecord) -> Self {
        Self {
            id: record.id.clone(),
            memory_budget: record.memory_budget,
            speed: record.speed,
            locality: record.locality.clone(),
            resident: record.resident.clone(),
            failing: record.failing.clone(),
        }
    }
}

/// A layer's redundant copies where nobody said how many: one for eight experts, as is usual at scale (32 for 256).
pub fn redundant_by_default(model: &ModelIdentity) -> u32 {
    model.experts / 8
}

/// The workers of a cluster that a plan may use: all but those that are leaving or that no router can reach, by name.
pub fn candidates(state: &ClusterState) -> Vec<PlannerWorker> {
    let of_use = |worker: &&WorkerRecord| !state.is_leaving(worker) && !state.is_cut_off(worker);
    state.workers.values().filter(of_use).map(PlannerWorker::from).collect()
}

/// Each worker's speed as [`relative`] to the others'.
pub(crate) fn relative_speeds(workers: &[PlannerWorker]) -> Option<Vec<f64>> {
    let speeds: Vec<f64> = workers.iter().map(|worker| worker.speed).collect();
    relative(&speeds)
}

/// Speeds as multiples of the mean of the known ones (finite and above 0); 1 for the others. `None` while none is known. Each
/// is first [`settled`] towards the median.
pub fn relative(speeds: &[f64]) -> Option<Vec<f64>> {
    let is_known = |speed: f64| speed.is_finite() && speed > 0.0;
    let mut known: Vec<f64> = speeds.iter().copied().filter(|speed| is_known(*speed)).collect();
    known.sort_unstable_by(f64::total_cmp);
    let median = *known.get(known.len().checked_sub(1)? / 2)?;
    let mean = known.iter().map(|speed| settled(*speed, median)).sum::<f64>() / known.len() as f64;
    let relative = |speed: &f64| if is_known(*speed) { settled(*speed, median) / mean } else { 1.0 };
    // A sum of finite speeds may still overflow; no worker is that fast.
    mean.is_finite().then(|| speeds.iter().map(relative).collect())
}

/// What a speed counts as: with d = |ln(speed ÷ median)|, a = ln [`ALIKE`] and b = ln [`UNLIKE`], the median up to a, itself from
/// b on, and median · exp(±b · (d - a) ÷ (b - a)) between. A worker 1.5 times as slow counts as 1.36 times as slow.
fn settled(speed: f64, median: f64) -> f64 {
    let ratio = speed / median;
    let (distance, alike, unlike) = (ratio.ln().abs(), ALIKE.ln(), UNLIKE.ln());
    if distance <= alike {
        median
    } else if distance >= unlike {
        speed
    } else {
        let shrunk = unlike * (distance - alike) / (unlike - alike);
        median * shrunk.copysign(ratio.ln()).exp()
    }
}

/// The numbers of a plan that follows the previous one: its version and its parent.
fn succession(previous: Option<&Plan>) -> Result<(PlanVersion, PlanVersion), Error> {
    let parent = previous.map_or(PlanVersion::NONE, |plan| plan.version);
    let version = parent.0.checked_add(1).map(PlanVersion).ok_or(Error::VersionsExhausted)?;
    Ok((version, parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_of_one_kind_are_equal_and_others_keep_their_ratio() {
        assert_eq!(relative(&[850.0, 1000.0, 1200.0]), Some(vec![1.0; 3]));
        let slower = relative(&[1000.0, 1000.0, 1000.0 / 1.5]).map(|speeds| speeds[2] / speeds[0]).unwrap();
        assert!((0.7..0.78).contains(&slower), "{slower}");
        assert_eq!(
            relative(&[1000.0, 1100.0, 16_000.0, 0.0]).map(|speeds| speeds[2] / speeds[0]),
            Some(16_000.0 / 1100.0)
        );
        assert_eq!(relative(&[1000.0, 3000.0, 0.0]), Some(vec![0.5, 1.5, 1.0]), "an unknown one is the mean");
        assert_eq!(relative(&[0.0, f64::NAN]), None);
        assert_eq!(relative(&[]), None);
    }
    proptest::proptest! {
        #[test]
        fn a_little_more_speed_never_counts_for_much_more_nor_for_less(ratio in 0.2f64..5.0, more in 1.0f64..1.05) {
            let [one, other] = [ratio, ratio * more].map(|ratio| settled(1000.0 * ratio, 1000.0));
            proptest::prop_assert!(other >= one * (1.0 - 1e-9) && other <= one * more.powi(2), "{} {}", one, other);
        }
    }
}
