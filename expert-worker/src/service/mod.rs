//! The expert service: `Exchange` streams come in from routers, each batch is checked, queued and answered exactly once
//! in completion order; `GetInventory` shows what is here. A stream has a budget of bytes in flight, so a router that
//! does not read its answers is not read either. Nothing is computed on this side of the queue.

mod decode;

use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_model::wire::{self, Encoding};
use conclave_placement::ids::LayerIdx;
use conclave_placement::state::WorkerState;
use conclave_proto::expert::INCARNATION_METADATA;
use conclave_proto::expert::v1 as pb;
use conclave_proto::expert::v1::expert_worker_server::{ExpertWorker, ExpertWorkerServer};
use conclave_proto::integrity;
use conclave_proto::status::Failure;
use conclave_runtime::channel::MAX_INTERNAL_MESSAGE;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

pub use decode::{Decoded, Shape, decode};

use crate::batcher::{Answer, Refusal};
use crate::executor::Executor;
use crate::metrics::Metrics;
use crate::registration::Registration;
use crate::residency::Resident;

/// The full name of the service, for health and reflection.
pub const NAME: &str = "conclave.expert.v1.ExpertWorker";

/// What one stream may have in flight, KiB of rows received and to be returned; a single batch is always let in.
const STREAM_BUDGET_KIB: u32 = 512 * 1024;
/// Batches that one stream may have in flight.
const STREAM_BATCHES: u32 = 64;
/// Answers that wait for the connection to take them.
const ANSWERS_WAITING: usize = 4;
/// No batch waits longer, whatever its deadline says.
const LONGEST_DEADLINE: Duration = Duration::from_secs(3600);

/// What the service needs from the worker.
#[derive(Debug)]
pub struct Parts {
    pub shape: Shape,
    pub executor: Arc<Executor>,
    pub resident: Arc<Resident>,
    pub registration: Arc<Registration>,
    pub metrics: Metrics,
    /// Cancelled: refuse what is new.
    pub refusing: CancellationToken,
    /// Cancelled: read no more, end the streams after what is in flight.
    pub closing: CancellationToken,
    /// Batches accepted and not yet answered.
    pub in_flight: TaskTracker,
}

#[derive(Debug, Clone)]
pub struct Service(Arc<Parts>);

impl Service {
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// The service to add to a server, with the cluster's message limits.
    pub fn server(self) -> ExpertWorkerServer<Self> {
        ExpertWorkerServer::new(self)
            .max_decoding_message_size(MAX_INTERNAL_MESSAGE)
            .max_encoding_message_size(MAX_INTERNAL_MESSAGE)
    }
}

#[tonic::async_trait]
impl ExpertWorker for Service {
    type ExchangeStream = ReceiverStream<Result<pb::CombineBatch, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<pb::DispatchBatch>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        self.0.is_meant(&request)?;
        let (answers, stream) = mpsc::channel(ANSWERS_WAITING);
        let exchange = Exchange {
            parts: Arc::clone(&self.0),
            answers,
            budget: Arc::new(Semaphore::new(STREAM_BUDGET_KIB as usize)),
        };
        tokio::spawn(exchange.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_inventory(
        &self,
        _request: Request<pb::GetInventoryRequest>,
    ) -> Result<Response<pb::GetInventoryResponse>, Status> {
        Ok(Response::new(self.0.inventory()))
    }
}

impl Parts {
    /// A stream meant for whoever had this address before must not be answered with these weights.
    fn is_meant<T>(&self, request: &Request<T>) -> Result<(), Failure> {
        let Some(named) = request.metadata().get(INCARNATION_METADATA) else { return Ok(()) };
        let here = self.registration.record().incarnation.get().to_string();
        if named.as_bytes() == here.as_bytes() {
            return Ok(());
        }
        Err(Failure::precondition("OTHER_WORKER", "this is not the worker that was meant"))
    }

    fn inventory(&self) -> pb::GetInventoryResponse {
        let record = self.registration.record();
        let resident = self.resident.snapshot();
        let layers = self.shape.moe_layers.iter().map(|layer| pb::LayerInventory {
            layer: layer.0,
            experts: resident
                .experts
                .0
                .get(layer)
                .map_or_else(Vec::new, |set| set.iter().map(|id| id.0.into()).collect()),
            rows_total: self.metrics.rows_of(layer.0),
        });
        let layers: Vec<_> = layers.collect();
        pb::GetInventoryResponse {
            worker_id: record.id.to_string(),
            incarnation: record.incarnation.get(),
            device: record.device,
            plan_version: record.plan_version.0,
            draining: record.state == WorkerState::Draining,
            rows_total: layers.iter().map(|layer| layer.rows_total).sum(),
            layers,
            resident_bytes: resident.bytes,
            batches_total: self.metrics.batches.get(),
            refused_total: self.metrics.refused_total(),
        }
    }

    /// Checks a batch and lets it wait for the tensor thread.
    fn accept(&self, message: &pb::DispatchBatch, received: Instant) -> Result<Accepted, Refusal> {
        if self.refusing.is_cancelled() {
            return Err(Refusal::Draining);
        }
        if message.checksum.is_some_and(|sum| sum != integrity::of_dispatch(message)) {
            return Err(Refusal::Internal("the batch was damaged on its way".to_owned()));
        }
        let Decoded { batch, return_encoding } = decode(message, &self.shape).map_err(Refusal::Invalid)?;
        let missing = self.resident.missing(LayerIdx(batch.layer), &batch.expert_ids);
        if !missing.is_empty() {
            return Err(Refusal::NotResident(missing));
        }
        let deadline = received + Duration::from_micros(message.deadline_us).min(LONGEST_DEADLINE);
        let answer = self.executor.submit(batch, received, deadline)?;
        Ok(Accepted { batch_id: message.batch_id, return_encoding, answer })
    }
}

/// A batch on its way through the worker.
struct Accepted {
    batch_id: u64,
    return_encoding: Encoding,
    answer: oneshot::Receiver<Answer>,
}

/// One router's stream.
struct Exchange {
    parts: Arc<Parts>,
    answers: mpsc::Sender<Result<pb::CombineBatch, Status>>,
    budget: Arc<Semaphore>,
}

impl Exchange {
    /// Reads batches until the router ends the stream or goes away, or this worker closes. What is in flight is still
    /// answered: each of those tasks holds the stream open.
    async fn run(self, mut batches: Streaming<pb::DispatchBatch>) {
        self.parts.metrics.streams.inc();
        loop {
            let message = tokio::select! {
                message = batches.message() => message,
                () = self.parts.closing.cancelled() => break,
                () = self.answers.closed() => break,
            };
            match message {
                Ok(Some(message)) => {
                    if self.one(message).await.is_none() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(status) => {
                    tracing::debug!(code = ?status.code(), message = status.message(), "an exchange stream broke");
                    break;
                }
            }
        }
        self.parts.metrics.streams.dec();
    }

    /// Accepts or refuses one batch; `None` when the router is gone.
    async fn one(&self, message: pb::DispatchBatch) -> Option<()> {
        let received = Instant::now();
        let budget = Arc::clone(&self.budget).acquire_many_owned(cost_kib(&message)).await.ok()?;
        match self.parts.accept(&message, received) {
            Ok(accepted) => {
                let (parts, answers) = (Arc::clone(&self.parts), self.answers.clone());
                self.parts.in_flight.spawn(async move { parts.answer(accepted, &answers, budget).await });
                Some(())
            }
            Err(refusal) => {
                let waited = received.elapsed();
                let refused = self.parts.refused(message.batch_id, refusal, waited, Duration::ZERO);
                self.answers.send(Ok(refused)).await.ok()
            }
        }
    }
}

impl Parts {
    /// Waits for the rows and sends them. Where the router has gone away, the batch is given up: the queue drops it.
    async fn answer(
        &self,
        accepted: Accepted,
        answers: &mpsc::Sender<Result<pb::CombineBatch, Status>>,
        budget: OwnedSemaphorePermit,
    ) {
        let Accepted { batch_id, return_encoding, answer } = accepted;
        let answer = tokio::select! {
            answer = answer => answer,
            () = answers.closed() => return,
        };
        let message = match answer {
            Ok(Answer { outcome: Ok(rows), queued, computed }) => {
                let returned = self.returned(&rows, return_encoding);
                pb::CombineBatch {
                    batch_id,
                    checksum: Some(integrity::of_returned(batch_id, &returned)),
                    outcome: Some(pb::combine_batch::Outcome::Returned(returned)),
                    queue_us: micros(queued),
                    compute_us: micros(computed),
                }
            }
            Ok(Answer { outcome: Err(refusal), queued, computed }) => self.refused(batch_id, refusal, queued, computed),
            Err(_) => {
                let gone = Refusal::Internal("the tensor thread has ended".to_owned());
                self.refused(batch_id, gone, Duration::ZERO, Duration::ZERO)
            }
        };
        // A router that is gone has nobody to tell.
        let _ = answers.send(Ok(message)).await;
        drop(budget);
    }

    fn returned(&self, rows: &[f32], encoding: Encoding) -> pb::Returned {
        let (rows, _no_scales) = wire::encode(rows, self.shape.hidden, encoding);
        let encoding = match encoding {
            Encoding::Bf16 => pb::Encoding::Bf16,
            Encoding::F32 => pb::Encoding::F32,
            Encoding::Fp8Block128 => pb::Encoding::Fp8E4m3Block128,
        };
        pb::Returned { encoding: encoding.into(), rows }
    }

    fn refused(&self, batch_id: u64, refusal: Refusal, queued: Duration, computed: Duration) -> pb::CombineBatch {
        self.metrics.count_refused(&refusal);
        pb::CombineBatch {
            batch_id,
            checksum: None,
            outcome: Some(pb::combine_batch::Outcome::Refused(refused(refusal))),
            queue_us: micros(queued),
            compute_us: micros(computed),
        }
    }
}

fn refused(refusal: Refusal) -> pb::Refused {
    use pb::RefusedReason as Reason;
    let (reason, message, missing_experts, retry_after) = match refusal {
        Refusal::Busy { message, retry_after } => (Reason::Busy, message.to_owned(), Vec::new(), retry_after),
        Refusal::Draining => (Reason::Draining, "this worker is leaving".to_owned(), Vec::new(), Duration::ZERO),
        Refusal::NotResident(missing) => {
            let missing = missing.into_iter().map(u32::from).collect();
            (Reason::NotResident, "experts are not here".to_owned(), missing, Duration::ZERO)
        }
        Refusal::Invalid(message) => (Reason::Invalid, message, Vec::new(), Duration::ZERO),
        Refusal::Internal(message) => (Reason::Internal, message, Vec::new(), Duration::ZERO),
    };
    pb::Refused { reason: reason.into(), missing_experts, retry_after_us: micros(retry_after), message }
}

/// What a batch takes of its stream's budget: its own bytes and as many again per assignment for the answer.
fn cost_kib(message: &pb::DispatchBatch) -> u32 {
    let received = message.hidden.len();
    let row = received / (message.rows as usize).max(1);
    let returned = row.saturating_mul(message.expert_ids.len() / 2);
    let kib = received.saturating_add(returned) / 1024;
    u32::try_from(kib).unwrap_or(u32::MAX).clamp(STREAM_BUDGET_KIB / STREAM_BATCHES, STREAM_BUDGET_KIB)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
