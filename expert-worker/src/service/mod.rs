//! The expert service: `Exchange` streams come in from routers, each batch is checked, queued and answered exactly once
//! in completion order; `GetInventory` shows what is here. A stream has a budget of bytes in flight, so a router that
//! does not read its answers is not read either. Nothing is computed on this side of the queue.

mod answer;
mod decode;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use conclave_model::wire::Encoding;
use conclave_placement::ids::LayerIdx;
use conclave_placement::state::WorkerState;
use conclave_proto::expert::v1 as pb;
use conclave_proto::expert::v1::expert_worker_server::{ExpertWorker, ExpertWorkerServer};
use conclave_proto::expert::{EXCHANGE_PATH, INCARNATION_METADATA};
use conclave_proto::integrity;
use conclave_proto::status::Failure;
use conclave_runtime::channel::MAX_INTERNAL_MESSAGE;
use conclave_runtime::stream::{Driver, Front, Handler, Inbound};
use http::HeaderMap;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
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
    pub fn server(self) -> Front<Self, ExpertWorkerServer<Self>> {
        let rest = ExpertWorkerServer::new(self.clone())
            .max_decoding_message_size(MAX_INTERNAL_MESSAGE)
            .max_encoding_message_size(MAX_INTERNAL_MESSAGE);
        Front { handler: self, rest }
    }
}

impl Handler for Service {
    const PATH: &'static str = EXCHANGE_PATH;

    fn accept(
        &self,
        metadata: &HeaderMap,
        messages: Inbound,
        driver: &Driver,
    ) -> Result<mpsc::Receiver<Bytes>, Status> {
        self.0.is_meant(metadata)?;
        let (answers, stream) = mpsc::channel(ANSWERS_WAITING);
        let exchange = Exchange {
            parts: Arc::clone(&self.0),
            answers,
            driver: driver.clone(),
            budget: Arc::new(Semaphore::new(STREAM_BUDGET_KIB as usize)),
        };
        driver.spawn(exchange.run(messages));
        Ok(stream)
    }
}

#[tonic::async_trait]
impl ExpertWorker for Service {
    type ExchangeStream = tokio_stream::Empty<Result<pb::CombineBatch, Status>>;

    async fn exchange(
        &self,
        _request: Request<Streaming<pb::DispatchBatch>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        Err(Status::internal("exchange streams are answered before they come here"))
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
    fn is_meant(&self, metadata: &HeaderMap) -> Result<(), Failure> {
        let Some(named) = metadata.get(INCARNATION_METADATA) else { return Ok(()) };
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
    answers: mpsc::Sender<Bytes>,
    driver: Driver,
    budget: Arc<Semaphore>,
}

impl Exchange {
    /// Reads batches until the router ends the stream or goes away, or this worker closes. What is in flight is still
    /// answered: each batch that waits for its rows holds the stream open.
    async fn run(self, mut batches: Inbound) {
        self.parts.metrics.streams.inc();
        loop {
            let message = tokio::select! {
                message = batches.next() => message,
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
    async fn one(&self, message: Bytes) -> Option<()> {
        let received = Instant::now();
        // The rows stay where they arrived. What is no message at all has no number to be refused by.
        let message = match pb::DispatchBatch::decode(message) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "an exchange stream holds what is no batch");
                return None;
            }
        };
        let budget = Arc::clone(&self.budget).acquire_many_owned(cost_kib(&message)).await.ok()?;
        match self.parts.accept(&message, received) {
            Ok(accepted) => {
                let (parts, answers) = (Arc::clone(&self.parts), self.answers.clone());
                let answered = async move { parts.answer(accepted, &answers, budget).await };
                self.driver.spawn(self.parts.in_flight.track_future(answered));
                Some(())
            }
            Err(refusal) => {
                let waited = received.elapsed();
                let refused = self.parts.refused(message.batch_id, refusal, waited, Duration::ZERO);
                self.answers.send(refused).await.ok()
            }
        }
    }
}

impl Parts {
    /// Waits for the rows and sends them. Where the router has gone away, the batch is given up: the queue drops it.
    async fn answer(&self, accepted: Accepted, answers: &mpsc::Sender<Bytes>, budget: OwnedSemaphorePermit) {
        let Accepted { batch_id, return_encoding, answer } = accepted;
        let answer = tokio::select! {
            answer = answer => answer,
            () = answers.closed() => return,
        };
        let message = match answer {
            Ok(Answer { outcome: Ok(rows), queued, computed }) => {
                let times = [micros(queued), micros(computed)];
                answer::returned(batch_id, &rows, self.shape.hidden, return_encoding, times).unwrap_or_else(|error| {
                    self.refused(batch_id, Refusal::Internal(error.to_string()), queued, computed)
                })
            }
            Ok(Answer { outcome: Err(refusal), queued, computed }) => self.refused(batch_id, refusal, queued, computed),
            Err(_) => {
                let gone = Refusal::Internal("the tensor thread has ended".to_owned());
                self.refused(batch_id, gone, Duration::ZERO, Duration::ZERO)
            }
        };
        // A router that is gone has nobody to tell.
        let _ = answers.send(message).await;
        drop(budget);
    }

    fn refused(&self, batch_id: u64, refusal: Refusal, queued: Duration, computed: Duration) -> Bytes {
        self.metrics.count_refused(&refusal);
        answer::refused(batch_id, refusal, [micros(queued), micros(computed)])
    }
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
