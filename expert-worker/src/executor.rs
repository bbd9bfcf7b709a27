//! The executor: checked batches come in, expert outputs go out. It owns the tensor thread and the experts on it, so no
//! weight is ever touched from two threads. Each accepted batch gives the thread one turn; a turn takes the oldest batch
//! and whatever can be computed with it, so a turn may find nothing left to do. While a GPU computes, the same turn prepares
//! what comes meanwhile, where that is much (`overlap`). A panic or an error refuses the batch that caused it, and no other.
//! Who has nothing else to do sends what is small at once, on the tensor thread itself.

mod overlap;

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use conclave_model::compute::{self, Computed, ExpertBatch, Started};
use conclave_model::device::init_thread;
use conclave_model::expert::Expert;
use conclave_placement::ids::{ExpertId, LayerIdx};
use conclave_runtime::stream::driven_here;
use conclave_runtime::tensor_thread::{self, SpawnError, TensorThread, panic_message};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::batcher::{Answer, Batcher, Pending, Refusal, Taken};
use crate::held::Held;
use crate::metrics::Metrics;

/// A worker's speed is measured with this many rows, this many times, for at most so long: the best time counts, because
/// all the others had company.
const MEASURED_ROWS: usize = 16;
const MEASURED_TIMES: usize = 30;
const MEASURED_FOR: Duration = Duration::from_millis(100);

/// Values of a group's answers that are encoded and sent on the tensor thread, at most, and only while nothing waits for it:
/// more take longer than it takes to wake the wire thread, which sends them while this one goes on.
const SENT_HERE: usize = 32 << 10;

/// Values that wait, at least, for a group of them to be started while another computes. Then to prepare them takes long, and their
/// weights are read for many rows anyway; fewer wait for company meanwhile, as they do on a processor.
const BESIDE: usize = 128 << 10;

#[derive(Debug)]
pub struct Executor {
    thread: TensorThread<Held>,
    waiting: Arc<Mutex<Batcher>>,
    metrics: Metrics,
    /// How many want something else of the thread: then a turn is one group.
    others: Arc<AtomicUsize>,
}

impl Executor {
    /// Starts the tensor thread with `threads` for libtorch's own loops (0: all cores). At most `queue` batches wait.
    pub async fn start(threads: usize, queue: usize, metrics: Metrics) -> Result<Self, SpawnError<Infallible>> {
        let init = move || {
            init_thread(threads);
            Ok(Held::default())
        };
        // One place more than turns need: an expert that is being installed must not keep a batch from its turn.
        let thread = TensorThread::spawn("experts", queue + 1, init).await?;
        let waiting = Arc::new(Mutex::new(Batcher::new(queue)));
        Ok(Self { thread, waiting, metrics, others: Arc::default() })
    }

    /// Lets a batch wait for its turn. All its experts must have been installed. Its answer comes exactly once; dropping
    /// the receiver gives the batch up.
    pub fn submit(
        &self,
        batch: ExpertBatch,
        arrived: Instant,
        deadline: Instant,
    ) -> Result<oneshot::Receiver<Answer>, Refusal> {
        let (answer, receiver) = oneshot::channel();
        self.waiting.lock().push(Pending { batch, arrived, deadline, answer })?;
        let (waiting, metrics, others) = (Arc::clone(&self.waiting), self.metrics.clone(), Arc::clone(&self.others));
        // A full queue of turns is fine: it holds as many turns as batches may wait, and each of them takes the oldest.
        // A thread that has ended drops the batch, and with it the answer's sender.
        match self.thread.try_run(move |experts| turn(experts, &waiting, &metrics, &others)) {
            Ok(_) | Err(tensor_thread::Error::Busy) => Ok(receiver),
            Err(error) => Err(Refusal::Internal(error.to_string())),
        }
    }

    /// Hands an expert to the tensor thread. It can be computed with once this returns.
    pub async fn install(&self, layer: LayerIdx, id: ExpertId, expert: Expert) -> Result<(), tensor_thread::Error> {
        self.run(move |experts| experts.insert(layer.0, id.0, expert)).await
    }

    /// Takes an expert from the tensor thread. A batch that still waits for it is refused then, as one that comes later.
    pub async fn remove(&self, layer: LayerIdx, id: ExpertId) -> Result<(), tensor_thread::Error> {
        self.run(move |experts| experts.remove(layer.0, id.0)).await
    }

    /// Rows a second through one installed expert, the best of some tries of a few rows each. 0 where it is not there.
    pub async fn measure(&self, layer: LayerIdx, id: ExpertId) -> Result<f64, tensor_thread::Error> {
        self.run(move |experts| speed(experts, layer.0, id.0)).await
    }

    /// Has the thread do something else than batches, after the turns that are queued.
    async fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Held) -> R + Send + 'static,
    ) -> Result<R, tensor_thread::Error> {
        let _one_more = OneMore::of(&self.others);
        self.thread.run(job).await
    }

    /// Batches computed so far.
    pub fn batches(&self) -> u64 {
        self.metrics.batches.get()
    }

    /// Lets the thread finish what waits and drop the experts.
    pub async fn close(self) {
        self.thread.close().await;
    }
}

/// Counts as one more for as long as it is kept.
struct OneMore<'a>(&'a AtomicUsize);

impl<'a> OneMore<'a> {
    fn of(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for OneMore<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn speed(experts: &Held, layer: u32, id: u16) -> f64 {
    let Some(expert) = experts.get(layer, id) else { return 0.0 };
    let rows = MEASURED_ROWS;
    let batch = ExpertBatch {
        layer,
        rows,
        hidden: vec![0.0; rows * expert.hidden_size()],
        expert_ids: vec![id; rows],
        row_ids: (0..rows as u32).collect(),
        weights: None,
    };
    let once = |_| {
        let started = Instant::now();
        compute_batches(experts, &[&batch]).map(|_| started.elapsed().as_secs_f64())
    };
    let end = Instant::now() + MEASURED_FOR;
    let times = (0..MEASURED_TIMES).take_while(|nth| *nth == 0 || Instant::now() < end).map(once);
    let best = times.filter_map(Result::ok).fold(f64::INFINITY, f64::min);
    if best.is_finite() { rows as f64 / best.max(1e-9) } else { 0.0 }
}

fn turn(experts: &mut Held, waiting: &Mutex<Batcher>, metrics: &Metrics, others: &AtomicUsize) {
    overlap::turn(&mut Turn { experts, waiting, metrics, others, under_way: 0, finished: None });
}

/// One turn of the tensor thread.
struct Turn<'a> {
    experts: &'a mut Held,
    waiting: &'a Mutex<Batcher>,
    metrics: &'a Metrics,
    others: &'a AtomicUsize,
    /// Groups that were started and are not finished.
    under_way: usize,
    /// When the last of them was.
    finished: Option<Instant>,
}

/// Batches that are computed together.
struct Group {
    batches: Vec<Pending>,
    started: Instant,
    /// Another one was under way then, and had its memory.
    beside: bool,
    /// Or why they cannot be.
    rows: Result<Started, String>,
}

impl overlap::Work for Turn<'_> {
    type Group = Group;

    fn start(&mut self) -> Option<Group> {
        let started = Instant::now();
        let Taken { expired, group } = self.waiting.lock().take(started);
        for late in expired {
            let retry_after = self.waiting.lock().retry_after();
            let refusal = Refusal::Busy { message: "the deadline passed in the queue", retry_after };
            reply(late, Err(refusal), started, Duration::ZERO);
        }
        let layer = group.first()?.batch.layer;
        let rows =
            unpanicked(|| self.experts.lay_out(layer)).and_then(|()| start_batches(self.experts, &batches_of(&group)));
        let beside = self.under_way > 0;
        self.under_way += 1;
        Some(Group { batches: group, started, beside, rows })
    }

    fn start_beside(&mut self) -> Option<Group> {
        let worth_it = self.others.load(Ordering::Relaxed) == 0 && self.waiting.lock().values() >= BESIDE;
        if worth_it { self.start() } else { None }
    }

    fn is_ready(&self, group: &Group) -> bool {
        group.rows.as_ref().map_or(true, Started::is_ready)
    }

    fn finish(&mut self, Group { batches: group, started, beside, rows }: Group) {
        let computed = rows.and_then(|rows| finish_batches(rows, group.len()));
        let outcomes = outcomes(self.experts, &group, computed, beside);
        let (now, metrics) = (Instant::now(), self.metrics);
        // Until then it waited for the one before.
        let began = self.finished.map_or(started, |before| before.max(started));
        let took = now - began;
        self.finished = Some(now);
        self.under_way -= 1;
        let nothing_waits = {
            let mut waiting = self.waiting.lock();
            waiting.finished(group.len(), took);
            waiting.is_empty() && self.under_way == 0
        };
        metrics.compute_seconds.observe(took.as_secs_f64());
        metrics.busy_seconds.inc_by(took.as_secs_f64());
        metrics.group_batches.observe(group.len() as f64);
        let values: usize = outcomes.iter().flatten().map(Computed::values).sum();
        let answers = group.into_iter().zip(outcomes);
        let reply_to_all = || answers.for_each(|(pending, outcome)| answer(pending, outcome, began, took, metrics));
        if nothing_waits && values <= SENT_HERE { driven_here(reply_to_all) } else { reply_to_all() }
    }
}

/// Counts what came of a batch, on which work began then and took so long, and says so.
fn answer(pending: Pending, outcome: Result<Computed, Refusal>, began: Instant, took: Duration, metrics: &Metrics) {
    if let Ok(rows) = &outcome {
        metrics.batches.inc();
        metrics.count_rows(pending.batch.layer, pending.batch.expert_ids.len());
        metrics.queue_seconds.observe(began.duration_since(pending.arrived).as_secs_f64());
        // Returned as computed: the router judges its workers, this worker only counts.
        if !rows.all_finite() {
            metrics.non_finite.inc();
        }
    }
    reply(pending, outcome, began, took);
}

fn reply(pending: Pending, outcome: Result<Computed, Refusal>, started: Instant, computed: Duration) {
    let queued = started.saturating_duration_since(pending.arrived);
    // Nobody may be waiting any more.
    let _ = pending.answer.send(Answer { outcome, queued, computed });
}

/// One outcome per batch of `group`, of which `computed` is what came. Where the group failed as a whole, a batch whose expert has
/// gone since it was accepted is refused, and each other one is tried alone, unless it was: so only the one that cannot be computed is
/// refused.
fn outcomes(
    experts: &Held,
    group: &[Pending],
    computed: Result<Vec<Computed>, String>,
    beside: bool,
) -> Vec<Result<Computed, Refusal>> {
    let reason = match computed {
        Ok(outputs) => return outputs.into_iter().map(Ok).collect(),
        Err(reason) => reason,
    };
    let alone = |batch: &ExpertBatch| {
        let missing = missing(experts, batch);
        if !missing.is_empty() {
            return Err(Refusal::NotResident(missing));
        }
        let outcome = match group {
            [_] if !beside => Err(reason.clone()),
            _ => compute_batches(experts, &[batch]).map(|mut outputs| outputs.swap_remove(0)),
        };
        outcome.map_err(|reason| {
            tracing::error!(layer = batch.layer, reason, "a batch could not be computed");
            Refusal::Internal(reason)
        })
    };
    batches_of(group).into_iter().map(alone).collect()
}

fn batches_of(group: &[Pending]) -> Vec<&ExpertBatch> {
    group.iter().map(|pending| &pending.batch).collect()
}

/// The experts of a batch that are not here, ascending.
fn missing(experts: &Held, batch: &ExpertBatch) -> Vec<u16> {
    let absent = |id: &&u16| experts.get(batch.layer, **id).is_none();
    let mut missing: Vec<u16> = batch.expert_ids.iter().filter(absent).copied().collect();
    missing.sort_unstable();
    missing.dedup();
    missing
}

/// One output per batch, or what went wrong, a panic included.
fn compute_batches(experts: &Held, batches: &[&ExpertBatch]) -> Result<Vec<Computed>, String> {
    finish_batches(start_batches(experts, batches)?, batches.len())
}

fn start_batches(experts: &Held, batches: &[&ExpertBatch]) -> Result<Started, String> {
    let layer = batches.first().map_or(0, |batch| batch.layer);
    let held = |id| experts.get(layer, id);
    unpanicked(|| compute::start(batches, &held))?.map_err(|error| error.to_string())
}

/// What came of `started`, which has `batches` of them.
fn finish_batches(started: Started, batches: usize) -> Result<Vec<Computed>, String> {
    let outputs = unpanicked(|| started.finish())?;
    match outputs.len() == batches {
        true => Ok(outputs),
        false => Err(format!("{} outputs for {batches} batches", outputs.len())),
    }
}

/// libtorch's errors are panics.
fn unpanicked<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| format!("panic: {}", panic_message(&*panic)))
}

#[cfg(test)]
mod tests {
    use conclave_model::checkpoint::Checkpoint;
    use conclave_model::device::{Compute, Device};

    use super::*;
    use crate::made_up_gpu;

    /// One row for these experts.
    fn pending(expert_ids: Vec<u16>) -> Pending {
        let now = Instant::now();
        let row_ids = vec![0; expert_ids.len()];
        let batch = ExpertBatch { layer: 1, rows: 1, hidden: vec![0.5; 4], expert_ids, row_ids, weights: None };
        Pending { batch, arrived: now, deadline: now + Duration::from_secs(60), answer: oneshot::channel().0 }
    }

    fn computed(group: &[Pending]) -> Vec<Result<Computed, Refusal>> {
        let experts = Held::default();
        outcomes(&experts, group, compute_batches(&experts, &batches_of(group)), false)
    }

    /// Answers to prompts that come one after the other, for two layers by turns.
    async fn answers(device: Device) -> Vec<Vec<f32>> {
        const ROWS: usize = 2048;
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/v2_lite");
        let checkpoint = Checkpoint::open(folder.as_ref()).unwrap();
        let (hidden, experts) = (checkpoint.config().hidden_size, checkpoint.config().n_routed_experts as u16);
        let executor =
            Executor::start(1, 8, Metrics::register(&conclave_runtime::admin::registry(), &[])).await.unwrap();
        for (layer, id) in [1, 2].into_iter().flat_map(|layer| (0..experts).map(move |id| (layer, id))) {
            let compute = Compute { device, ..Compute::REFERENCE };
            let expert = Expert::load(&checkpoint, layer, id.into(), compute).unwrap();
            executor.install(LayerIdx(layer), ExpertId(id), expert).await.unwrap();
        }
        let prompt = |nth: usize| ExpertBatch {
            layer: 1 + nth as u32 % 2,
            rows: ROWS,
            hidden: (0..ROWS * hidden).map(|at| ((at * 37 + nth) % 64) as f32 / 32.0 - 1.0).collect(),
            expert_ids: (0..ROWS).map(|row| (row + nth) as u16 % experts).collect(),
            row_ids: (0..ROWS as u32).collect(),
            weights: (nth == 3).then(|| vec![0.5; ROWS]),
        };
        assert!(prompt(0).hidden.len() >= BESIDE, "worth it while another computes");
        let now = Instant::now();
        let submitted = (0..6).map(|nth| executor.submit(prompt(nth), now, now + Duration::from_secs(600)).unwrap());
        let mut answers = Vec::new();
        for answer in submitted.collect::<Vec<_>>() {
            answers.push(answer.await.unwrap().outcome.unwrap().into_f32());
        }
        executor.close().await;
        answers
    }

    #[tokio::test]
    async fn prompts_that_come_while_a_gpu_computes_are_answered_as_by_a_processor() {
        let gpu = Device::Cuda(0);
        if let Err(error) = gpu.open() {
            return made_up_gpu::again(error);
        }
        let (ours, right) = (answers(gpu).await, answers(Device::Cpu).await);
        assert_eq!(ours.len(), right.len());
        for (nth, (ours, right)) in ours.iter().zip(&right).enumerate() {
            let off = ours.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(ours.len() == right.len() && off < 1e-4, "prompt {nth} is off by {off}");
        }
    }

    #[test]
    fn a_batch_whose_expert_has_gone_is_refused_and_takes_no_other_with_it() {
        let nothing_to_do = pending(vec![]);
        let outcomes = computed(&[pending(vec![9, 3, 9]), nothing_to_do]);
        assert_eq!(outcomes, [Err(Refusal::NotResident(vec![3, 9])), Ok(Vec::new().into())]);
    }

    #[test]
    fn a_batch_that_cannot_be_computed_takes_no_other_with_it() {
        let (mut cannot, nothing_to_do) = (pending(vec![]), pending(vec![]));
        // More rows than there are values.
        cannot.batch.rows = 1000;
        cannot.batch.row_ids = vec![999];
        cannot.batch.weights = Some(vec![1.0]);
        let outcomes = computed(&[cannot, nothing_to_do]);
        assert!(matches!(&outcomes[0], Err(Refusal::Internal(_))), "{outcomes:?}");
        assert_eq!(outcomes[1], Ok(Vec::new().into()));
    }
}
