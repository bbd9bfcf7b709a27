//! An expert worker that misbehaves on command, so that a router can be tested on what no honest worker does.
//!
//! In: a script that says, batch by batch, what to do. Out: a worker that is registered like any other and says it holds
//! every expert; it can compute the true answer too. Never here: the plan (it takes whatever it is sent).

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use conclave_model::{
    checkpoint::{self, Checkpoint},
    compute::{self, ExpertBatch},
    device::{Compute, init_thread},
    expert::Expert,
    wire,
};
use conclave_placement::{
    ids::{ExpertId, Incarnation, WorkerId},
    membership::Membership,
    state::{ModelIdentity, Residency, WorkerRecord, WorkerState},
};
use conclave_proto::expert::v1::{
    CombineBatch, CombineMode, DispatchBatch, Encoding, GetInventoryRequest, GetInventoryResponse, Refused,
    RefusedReason, Returned,
    combine_batch::Outcome,
    expert_worker_server::{ExpertWorker, ExpertWorkerServer},
};
use conclave_runtime::{channel::MAX_INTERNAL_MESSAGE, listen, stream, tensor_thread::TensorThread};
use futures::{StreamExt, stream::BoxStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming, service::Routes};

use crate::{
    cluster::Cluster,
    eventually::{eventually, soon},
};

/// Answers that may wait for the router at once.
const ANSWERS_WAITING: usize = 64;
/// Far from anything that a golden model computes: were it used, the tokens would change.
const GARBAGE: f32 = 1e3;

/// What to do with one batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// Answers truly.
    Compute,
    /// Answers truly in everything but the numbers, this late.
    GarbageAfter(Duration),
    /// Answers with rows of NaN.
    Nan,
    /// Answers with one byte too few.
    WrongSize,
    /// Answers to a batch that nobody sent.
    WrongBatch,
    /// Refuses; NOT_RESIDENT names every expert of the batch.
    Refuse(RefusedReason),
    /// Says nothing, for ever.
    Never,
    /// Ends the stream with an error.
    EndStream,
}

/// What to do with the n-th batch (from 0), over all streams.
pub type Script = dyn Fn(u64) -> Act + Send + Sync;

/// A registered fake. Dropped, it is gone from the network at once and from the store when its lease ends.
#[derive(Debug)]
pub struct FakeExpert {
    counts: Arc<Counts>,
    membership: Membership,
    _stop: DropGuard,
}

#[derive(Debug, Default)]
struct Counts {
    batches: AtomicU64,
    answered: AtomicU64,
}

impl FakeExpert {
    /// Starts a fake called `id` and registers it in `cluster` as a holder of every expert of `checkpoint`.
    pub async fn join(
        cluster: &Cluster,
        id: &str,
        checkpoint: &Path,
        script: impl Fn(u64) -> Act + Send + Sync + 'static,
    ) -> Self {
        let model = eventually("the cluster's model", async || cluster.state().model.clone()).await;
        let counts = Arc::new(Counts::default());
        let stop = CancellationToken::new();
        let listener = listen::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr.to_string();
        let experts = TrueExperts::start(checkpoint).await;
        let fake = Fake { counts: counts.clone(), script: Arc::new(script), experts: Arc::new(experts) };
        let service = ExpertWorkerServer::new(fake)
            .max_decoding_message_size(MAX_INTERNAL_MESSAGE)
            .max_encoding_message_size(MAX_INTERNAL_MESSAGE);
        let routes = Routes::new(service);
        tokio::spawn(stream::serve(routes, listener, stop.clone(), Duration::ZERO));

        let id = WorkerId::parse(id).expect("a valid name");
        let key = cluster.keys.worker(&id);
        let record = record(id, address, &model).encode();
        let ttl = Duration::from_secs(5);
        let membership = Membership::join(cluster.store.clone(), key, ttl, record, stop.clone()).await;
        let membership = membership.expect("a fake registers like any worker");
        Self { counts, membership, _stop: stop.drop_guard() }
    }

    /// Batches that came in so far.
    pub fn batches(&self) -> u64 {
        self.counts.batches.load(Ordering::Relaxed)
    }

    /// Batches that were answered so far, in whatever way.
    pub fn answered(&self) -> u64 {
        self.counts.answered.load(Ordering::Relaxed)
    }

    /// Takes its registration back, then stops.
    pub async fn leave(self) {
        soon("a fake to leave", self.membership.leave()).await;
    }
}

fn record(id: WorkerId, address: String, model: &ModelIdentity) -> WorkerRecord {
    let mut resident = Residency::new();
    for &layer in &model.moe_layers {
        for expert in 0..model.experts {
            resident.insert(layer, ExpertId(u16::try_from(expert).expect("expert ids are u16")));
        }
    }
    WorkerRecord { state: WorkerState::Serving, resident, ..WorkerRecord::starting(id, Incarnation::fresh(), address) }
}

/// The real experts, on a thread of their own as libtorch wants it.
struct TrueExperts {
    thread: TensorThread<Loaded>,
    hidden: usize,
}

struct Loaded {
    checkpoint: Checkpoint,
    experts: HashMap<(u32, u16), Expert>,
}

impl TrueExperts {
    async fn start(folder: &Path) -> Self {
        let folder = folder.to_owned();
        let load = move || -> Result<Loaded, checkpoint::Error> {
            init_thread(1);
            Ok(Loaded { checkpoint: Checkpoint::open(&folder)?, experts: HashMap::new() })
        };
        let thread = TensorThread::spawn("fake-experts", ANSWERS_WAITING, load).await.expect("a golden model loads");
        let hidden = thread.run(|loaded| loaded.checkpoint.config().hidden_size).await.expect("a running thread");
        Self { thread, hidden }
    }

    /// What an honest worker answers.
    async fn returned(&self, batch: &DispatchBatch) -> Returned {
        let hidden = self.hidden;
        let (rows, encoding) = (batch.rows as usize, encoding(batch.encoding()));
        let values = wire::decode(encoding, &batch.hidden, &batch.scales, rows, hidden).expect("a router encodes well");
        let batch_rows = ExpertBatch {
            layer: batch.layer,
            rows,
            hidden: values,
            expert_ids: batch.expert_ids.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect(),
            row_ids: words(&batch.row_ids).map(u32::from_le_bytes).collect(),
            weights: (batch.mode() == CombineMode::PartialSum)
                .then(|| words(&batch.weights).map(f32::from_le_bytes).collect()),
        };
        let computed = self.thread.run(move |loaded| loaded.compute(&batch_rows)).await.expect("a running thread");
        let (rows, _) = wire::encode(&computed, hidden, self::encoding(batch.return_encoding()));
        Returned { encoding: batch.return_encoding, rows }
    }
}

impl Loaded {
    fn compute(&mut self, batch: &ExpertBatch) -> Vec<f32> {
        for &id in &batch.expert_ids {
            let load = || Expert::load(&self.checkpoint, batch.layer, id.into(), Compute::REFERENCE);
            self.experts.entry((batch.layer, id)).or_insert_with(|| load().expect("a whole checkpoint"));
        }
        let resident = |id: u16| self.experts.get(&(batch.layer, id));
        compute::run(&[batch], &resident).expect("a router sends sound batches").swap_remove(0).into_f32()
    }
}

fn words(bytes: &Bytes) -> impl Iterator<Item = [u8; 4]> {
    bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

fn encoding(encoding: Encoding) -> wire::Encoding {
    match encoding {
        Encoding::F32 => wire::Encoding::F32,
        Encoding::Bf16 => wire::Encoding::Bf16,
        Encoding::Fp8E4m3Block128 => wire::Encoding::Fp8Block128,
        Encoding::Unspecified => panic!("a router says how its rows are encoded"),
    }
}

#[derive(Clone)]
struct Fake {
    counts: Arc<Counts>,
    script: Arc<Script>,
    experts: Arc<TrueExperts>,
}

impl Fake {
    /// The n-th batch's answer; `None` where there shall never be one, an error where the stream shall end.
    async fn act(&self, batch: DispatchBatch) -> Result<Option<CombineBatch>, Status> {
        let nth = self.counts.batches.fetch_add(1, Ordering::Relaxed);
        let act = (self.script)(nth);
        let mut batch_id = batch.batch_id;
        let outcome = match act {
            Act::Compute => Outcome::Returned(self.experts.returned(&batch).await),
            Act::GarbageAfter(delay) => {
                tokio::time::sleep(delay).await;
                Outcome::Returned(self.filled(&batch, GARBAGE).await)
            }
            Act::Nan => Outcome::Returned(self.filled(&batch, f32::NAN).await),
            Act::WrongSize => {
                let mut returned = self.experts.returned(&batch).await;
                returned.rows.truncate(returned.rows.len().saturating_sub(1));
                Outcome::Returned(returned)
            }
            Act::WrongBatch => {
                batch_id = u64::MAX;
                Outcome::Returned(self.filled(&batch, GARBAGE).await)
            }
            Act::Refuse(reason) => Outcome::Refused(refused(reason, &batch)),
            Act::Never => return Ok(None),
            Act::EndStream => return Err(Status::internal("the script ends this stream")),
        };
        self.counts.answered.fetch_add(1, Ordering::Relaxed);
        Ok(Some(CombineBatch { batch_id, outcome: Some(outcome), queue_us: 0, compute_us: 0, checksum: None }))
    }

    /// An answer of the right size in which every value is `value`.
    async fn filled(&self, batch: &DispatchBatch, value: f32) -> Returned {
        let honest = self.experts.returned(batch).await;
        let encoding = encoding(batch.return_encoding());
        let rows = honest.rows.len() / encoding.row_bytes(self.experts.hidden);
        let (rows, _) = wire::encode(&vec![value; rows * self.experts.hidden], self.experts.hidden, encoding);
        Returned { rows, ..honest }
    }
}

fn refused(reason: RefusedReason, batch: &DispatchBatch) -> Refused {
    let mut missing: Vec<u32> =
        batch.expert_ids.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect();
    missing.dedup();
    Refused {
        reason: reason.into(),
        missing_experts: if reason == RefusedReason::NotResident { missing } else { Vec::new() },
        retry_after_us: 1000,
        message: "the script says so".into(),
    }
}

#[tonic::async_trait]
impl ExpertWorker for Fake {
    type ExchangeStream = BoxStream<'static, Result<CombineBatch, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<DispatchBatch>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let (answers, stream) = tokio::sync::mpsc::channel(ANSWERS_WAITING);
        let (fake, mut batches) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(batch)) = batches.message().await {
                let (fake, answers) = (fake.clone(), answers.clone());
                // Each on its own: one that is late holds up nobody else. The router bounds how many it sends.
                tokio::spawn(async move {
                    if let Some(answer) = fake.act(batch).await.transpose() {
                        // A router that went away wants no answer.
                        let _ = answers.send(answer).await;
                    }
                });
            }
        });
        // An error is the last thing that a stream says.
        let mut over = false;
        let stream = ReceiverStream::new(stream).take_while(move |answer| {
            let go_on = !over;
            over |= answer.is_err();
            futures::future::ready(go_on)
        });
        Ok(Response::new(stream.boxed()))
    }

    async fn get_inventory(&self, _: Request<GetInventoryRequest>) -> Result<Response<GetInventoryResponse>, Status> {
        Err(Status::unimplemented("a fake keeps no books"))
    }
}
