//! The loader: plans come in from the view, this worker's experts are mapped from the checkpoint and handed to the
//! tensor thread one by one, and what is resident is published as it grows. It runs on a thread of its own, so loading
//! never delays a batch. It chooses nothing: the plan says what, the memory budget says how much.
//!
//! Nothing is unloaded: a plan that takes an expert away leaves it resident until the process ends. Moving experts away
//! live needs the routers' agreement first and comes later.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_model::checkpoint::{self, Checkpoint};
use conclave_model::device::{Compute, init_thread};
use conclave_model::expert::Expert;
use conclave_placement::ids::{ExpertId, LayerIdx, PlanVersion};
use conclave_placement::state::{ClusterState, Residency};
use conclave_runtime::tensor_thread::{self, SpawnError, TensorThread};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::executor::Executor;
use crate::metrics::Metrics;
use crate::registration::Registration;
use crate::residency::Resident;

/// How often a growing residency is published while loading.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// How long to wait before experts that failed are tried again: doubles from the first to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error("loader thread: {0}")]
    Thread(#[from] tensor_thread::Error),
}

/// The thread that reads weights.
#[derive(Debug)]
pub struct Loader {
    thread: TensorThread<Arc<Checkpoint>>,
    compute: Compute,
}

impl Loader {
    pub async fn start(checkpoint: Arc<Checkpoint>, compute: Compute) -> Result<Self, SpawnError<Infallible>> {
        let init = move || {
            init_thread(1);
            Ok(checkpoint)
        };
        Ok(Self { thread: TensorThread::spawn("loader", 1, init).await?, compute })
    }

    async fn load(&self, layer: LayerIdx, expert: ExpertId) -> Result<Expert, Error> {
        let compute = self.compute;
        let load = move |checkpoint: &mut Arc<Checkpoint>| Expert::load(checkpoint, layer.0, expert.0.into(), compute);
        Ok(self.thread.run(load).await??)
    }

    async fn close(self) {
        self.thread.close().await;
    }
}

/// Makes what is resident follow the plan.
#[derive(Debug)]
pub struct Reconciler {
    pub loader: Loader,
    pub executor: Arc<Executor>,
    pub resident: Arc<Resident>,
    pub registration: Arc<Registration>,
    pub metrics: Metrics,
    /// Bytes that one resident expert takes.
    pub expert_bytes: u64,
    /// Bytes that experts may take; 0 for no limit.
    pub budget: u64,
}

/// How one pass over a plan ended.
#[derive(Debug, PartialEq, Eq)]
enum Pass {
    /// Everything that fits is here.
    Done,
    /// Some experts could not be loaded.
    Failed,
    /// A newer plan, or the end.
    Interrupted,
}

impl Reconciler {
    /// Follows the plan until `stop`. The experts stay with the executor.
    pub async fn run(self, mut view: watch::Receiver<Arc<ClusterState>>, stop: CancellationToken) {
        let id = self.registration.record().id;
        let mut retry = RETRY.0;
        while !stop.is_cancelled() {
            let plan = view.borrow_and_update().plan.clone();
            let pass = match &plan {
                Some(plan) => self.follow(plan.version, &plan.assigned_to(&id), &view, &stop).await,
                None => Pass::Done,
            };
            let pause = match pass {
                Pass::Done => None,
                Pass::Interrupted => continue,
                Pass::Failed => Some(retry),
            };
            retry = pause.map_or(RETRY.0, |pause| (pause * 2).min(RETRY.1));
            if !self.wait(&mut view, plan.map(|plan| plan.version), pause, &stop).await {
                break;
            }
        }
        self.loader.close().await;
    }

    /// Waits for another plan, or for `pause` to end. False when there is nothing more to wait for.
    async fn wait(
        &self,
        view: &mut watch::Receiver<Arc<ClusterState>>,
        plan: Option<PlanVersion>,
        pause: Option<Duration>,
        stop: &CancellationToken,
    ) -> bool {
        let another = view.wait_for(|state| state.plan.as_ref().map(|plan| plan.version) != plan);
        let paused = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            another = another => another.is_ok(),
            () = paused => true,
            () = stop.cancelled() => false,
        }
    }

    /// Loads what `assigned` has and this worker lacks.
    async fn follow(
        &self,
        plan: PlanVersion,
        assigned: &Residency,
        view: &watch::Receiver<Arc<ClusterState>>,
        stop: &CancellationToken,
    ) -> Pass {
        let here = self.resident.snapshot();
        let (lacking, too_many) = lacking(assigned, &here.experts, here.bytes, self.expert_bytes, self.budget);
        if too_many > 0 {
            tracing::error!(%plan, experts = too_many, budget = self.budget, "the plan gives more experts than memory allows");
        }
        let (started, total) = (Instant::now(), lacking.len());
        // The first expert is published at once: it makes this worker a serving one.
        let mut publish_at = if here.count == 0 { started } else { started + PUBLISH_EVERY };
        let mut failed = 0;
        for (layer, expert) in lacking {
            let newer = view.borrow().plan.as_ref().is_some_and(|newest| newest.version != plan);
            if newer || stop.is_cancelled() {
                self.publish();
                return Pass::Interrupted;
            }
            if let Err(error) = self.bring(layer, expert).await {
                failed += 1;
                self.metrics.load_failures.inc();
                tracing::error!(%layer, %expert, %error, "an expert could not be loaded");
            } else if Instant::now() >= publish_at {
                self.publish();
                publish_at = Instant::now() + PUBLISH_EVERY;
            }
        }
        self.publish();
        if failed > 0 {
            return Pass::Failed;
        }
        self.registration.acted_on(plan);
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(%plan, loaded = total, resident = self.resident.snapshot().count, seconds, "experts follow the plan");
        Pass::Done
    }

    /// One expert: mapped, then on the tensor thread, then said to be here.
    async fn bring(&self, layer: LayerIdx, id: ExpertId) -> Result<(), Error> {
        let started = Instant::now();
        let expert = self.loader.load(layer, id).await?;
        self.executor.install(layer, id, expert).await?;
        self.resident.insert(layer, id, self.expert_bytes);
        self.metrics.load_seconds.observe(started.elapsed().as_secs_f64());
        Ok(())
    }

    fn publish(&self) {
        let snapshot = self.resident.snapshot();
        self.metrics.resident_experts.set(i64::try_from(snapshot.count).unwrap_or(i64::MAX));
        self.metrics.resident_bytes.set(snapshot.bytes);
        self.registration.hold(&snapshot.experts);
    }
}

/// What to load, in layer order, and how many more the memory budget does not allow.
fn lacking(
    assigned: &Residency,
    here: &Residency,
    bytes_here: u64,
    expert_bytes: u64,
    budget: u64,
) -> (Vec<(LayerIdx, ExpertId)>, usize) {
    let mut lacking: Vec<_> = assigned.iter().filter(|(layer, expert)| !here.contains(*layer, *expert)).collect();
    let free = match budget {
        0 => usize::MAX,
        budget => usize::try_from(budget.saturating_sub(bytes_here) / expert_bytes.max(1)).unwrap_or(usize::MAX),
    };
    let too_many = lacking.len().saturating_sub(free);
    lacking.truncate(free);
    (lacking, too_many)
}

/// Opens a checkpoint and digests it, off the threads that serve: its headers are read and checked whole.
pub async fn open(dir: &Path) -> Result<(Arc<Checkpoint>, checkpoint::Identity), Error> {
    let dir = dir.to_owned();
    let open = move || -> Result<_, checkpoint::Error> {
        let checkpoint = Checkpoint::open(&dir)?;
        let identity = checkpoint.identity()?;
        Ok((Arc::new(checkpoint), identity))
    };
    let opened = tokio::task::spawn_blocking(open).await;
    Ok(opened.map_err(|error| tensor_thread::Error::Panicked(error.to_string()))??)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn residency(experts: &[(u32, u16)]) -> Residency {
        let mut residency = Residency::new();
        for (layer, expert) in experts {
            residency.insert(LayerIdx(*layer), ExpertId(*expert));
        }
        residency
    }

    #[test]
    fn only_what_is_lacking_is_loaded_and_only_while_memory_lasts() {
        let assigned = residency(&[(1, 0), (1, 1), (2, 0), (2, 1)]);
        let here = residency(&[(1, 1), (9, 9)]);
        let names = |(list, over): (Vec<(LayerIdx, ExpertId)>, usize)| {
            (list.iter().map(|(layer, expert)| (layer.0, expert.0)).collect::<Vec<_>>(), over)
        };
        assert_eq!(names(lacking(&assigned, &here, 20, 10, 0)), (vec![(1, 0), (2, 0), (2, 1)], 0));
        assert_eq!(names(lacking(&assigned, &here, 20, 10, 45)), (vec![(1, 0), (2, 0)], 1));
        assert_eq!(names(lacking(&assigned, &here, 20, 10, 20)), (vec![], 3));
        assert_eq!(names(lacking(&assigned, &assigned, 40, 10, 0)), (vec![], 0));
    }
}
