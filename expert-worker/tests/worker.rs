//! Stories of one worker in one process: a tiny checkpoint, the embedded store behind a socket, a plan written by the
//! test, and a router's stream spoken by hand.

#![allow(clippy::unwrap_used)]

mod checkpoint;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use checkpoint::{EXPERTS, HIDDEN, MOE_LAYER};
use clap::Parser;
use conclave_expert_worker::app::{self, Worker};
use conclave_expert_worker::config::Config;
use conclave_placement::ids::{Cluster, ExpertId, Incarnation, LayerIdx, PlanVersion, RouterId, WorkerId};
use conclave_placement::keys::Keys;
use conclave_placement::plan::Plan;
use conclave_placement::state::{ClusterState, DrainOrder, Residency, RouterRecord, WorkerRecord, WorkerState};
use conclave_placement::store::memory::MemoryStore;
use conclave_placement::store::serve::serve_memory;
use conclave_placement::store::{Store, connect};
use conclave_placement::view::View;
use conclave_proto::expert::INCARNATION_METADATA;
use conclave_proto::expert::v1 as pb;
use conclave_proto::expert::v1::combine_batch::Outcome;
use conclave_proto::expert::v1::expert_worker_client::ExpertWorkerClient;
use conclave_runtime::channel;
use conclave_runtime::shutdown::Shutdown;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;

const SEED: u64 = 7;

/// An embedded store behind a socket, a view of it, and a folder for checkpoints.
struct Setting {
    folder: tempfile::TempDir,
    spec: String,
    keys: Keys,
    store: Arc<dyn Store>,
    view: View,
    end: CancellationToken,
}

impl Setting {
    async fn start() -> Self {
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let spec = format!("etcd=http://{}", socket.local_addr().unwrap());
        let end = CancellationToken::new();
        tokio::spawn(serve_memory(MemoryStore::new(), socket, end.clone()));
        let keys = Keys::new(&Cluster::parse("test").unwrap());
        let store = connect(&spec).unwrap();
        let view = View::start(Arc::clone(&store), keys.clone(), end.clone()).await.unwrap();
        Self { folder: tempfile::tempdir().unwrap(), spec, keys, store, view, end }
    }

    /// Gives worker `w` these experts, and `other` no other.
    async fn plan(&self, version: u64, experts: &[u16]) {
        self.plan_for_two(version, experts, &[]).await;
    }

    /// Gives worker `w` these experts, and worker `other` those.
    async fn plan_for_two(&self, version: u64, experts: &[u16], others: &[u16]) {
        let holders = |expert| {
            let mine = experts.contains(&expert).then(worker_id);
            mine.into_iter().chain(others.contains(&expert).then(other_id)).collect()
        };
        let plan = Plan {
            version: PlanVersion(version),
            parent: PlanVersion(version - 1),
            policy: "test".to_owned(),
            reason: "test".to_owned(),
            layers: BTreeMap::from([(LayerIdx(MOE_LAYER), (0..EXPERTS as u16).map(holders).collect())]),
        };
        self.store.put(&self.keys.plan(), plan.encode(), None).await.unwrap();
    }

    /// Another worker, as far as its record goes.
    async fn other_holds(&self, experts: &[u16], plan: u64) {
        let other = WorkerRecord {
            state: WorkerState::Serving,
            resident: experts.iter().map(|expert| (LayerIdx(MOE_LAYER), ExpertId(*expert))).collect(),
            plan_version: PlanVersion(plan),
            ..WorkerRecord::starting(other_id(), Incarnation::new(7).unwrap(), "127.0.0.1:1")
        };
        self.store.put(&self.keys.worker(&other.id), other.encode(), None).await.unwrap();
    }

    /// A router that dispatches by that plan, as far as its record goes.
    async fn router_follows(&self, plan: u64) {
        let router = RouterRecord {
            plan_version: PlanVersion(plan),
            ..RouterRecord::starting(
                RouterId::parse("r").unwrap(),
                Incarnation::new(7).unwrap(),
                ["127.0.0.1:1".to_owned(), "127.0.0.1:1".to_owned()],
            )
        };
        self.store.put(&self.keys.router(&router.id), router.encode(), None).await.unwrap();
    }

    /// The experts that the worker tells the cluster of, once they are these.
    async fn until_told(&self, experts: &[u16]) {
        let wanted: Residency = experts.iter().map(|expert| (LayerIdx(MOE_LAYER), ExpertId(*expert))).collect();
        self.until(|state| state.workers.get(&worker_id()).is_some_and(|worker| worker.resident == wanted)).await;
    }

    async fn until(&self, condition: impl FnMut(&Arc<ClusterState>) -> bool) -> Arc<ClusterState> {
        self.view.subscribe().wait_for(condition).await.unwrap().clone()
    }

    /// Waits until the worker says that it did what the plan asks.
    async fn until_acted_on(&self, version: u64) -> Arc<ClusterState> {
        let acted = |state: &Arc<ClusterState>| {
            state.workers.get(&worker_id()).is_some_and(|worker| worker.plan_version == PlanVersion(version))
        };
        self.until(acted).await
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

fn worker_id() -> WorkerId {
    WorkerId::parse("w").unwrap()
}

fn other_id() -> WorkerId {
    WorkerId::parse("other").unwrap()
}

async fn try_start(cluster: &Setting, seed: u64, shutdown: &Shutdown) -> Result<Worker, app::Error> {
    let folder = cluster.folder.path().join(seed.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    checkpoint::write(&folder, seed);
    let model = folder.to_str().unwrap();
    let flags = ["--id=w", "--cluster=test", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--dtype=f32"];
    let all = ["worker", "--model", model, "--store", &cluster.spec, "--threads=1"].into_iter().chain(flags);
    let started = app::start(&Config::parse_from(all), shutdown).await;
    started.map(|worker| worker.expect("nobody asked it to end"))
}

/// A router's side of one stream.
struct Stream {
    client: ExpertWorkerClient<Channel>,
    batches: mpsc::Sender<pb::DispatchBatch>,
    answers: Streaming<pb::CombineBatch>,
}

impl Stream {
    async fn open(worker: &Worker) -> Self {
        let channel = channel::internal(&worker.listen.to_string()).unwrap().connect().await.unwrap();
        let mut client = ExpertWorkerClient::new(channel);
        let (batches, sending) = mpsc::channel(8);
        let answers = client.exchange(ReceiverStream::new(sending)).await.unwrap().into_inner();
        Self { client, batches, answers }
    }

    async fn ask(&mut self, batch: pb::DispatchBatch) -> Outcome {
        let id = batch.batch_id;
        self.batches.send(batch).await.unwrap();
        let answer = self.answers.message().await.unwrap().unwrap();
        assert_eq!(answer.batch_id, id);
        answer.outcome.unwrap()
    }

    async fn refusal(&mut self, batch: pb::DispatchBatch) -> pb::Refused {
        match self.ask(batch).await {
            Outcome::Refused(refused) => refused,
            Outcome::Returned(_) => panic!("computed instead of refused"),
        }
    }
}

fn le<const N: usize>(items: impl IntoIterator<Item = [u8; N]>) -> Bytes {
    items.into_iter().flatten().collect()
}

fn rows(n: usize) -> Vec<f32> {
    (0..n * HIDDEN).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// Rows that go where `assignments`, pairs of row and expert, say.
fn batch(batch_id: u64, n: usize, assignments: &[(u32, u16)]) -> pb::DispatchBatch {
    pb::DispatchBatch {
        checksum: None,
        batch_id,
        layer: MOE_LAYER,
        plan_version: 1,
        deadline_us: 60_000_000,
        encoding: pb::Encoding::F32.into(),
        rows: n as u32,
        hidden: le(rows(n).into_iter().map(f32::to_le_bytes)),
        scales: Bytes::new(),
        expert_ids: le(assignments.iter().map(|(_, expert)| expert.to_le_bytes())),
        row_ids: le(assignments.iter().map(|(row, _)| row.to_le_bytes())),
        weights: Bytes::new(),
        mode: pb::CombineMode::PerAssignment.into(),
        return_encoding: pb::Encoding::F32.into(),
    }
}

fn assert_close(returned: &Bytes, expected: &[f32]) {
    let returned: Vec<f32> = returned.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
    assert_eq!(returned.len(), expected.len());
    for (at, (got, want)) in returned.iter().zip(expected).enumerate() {
        assert!((got - want).abs() < 1e-5, "value {at}: {got}, expected {want}");
    }
}

#[tokio::test]
async fn a_worker_loads_its_plan_answers_in_both_modes_and_leaves() {
    let cluster = Setting::start().await;
    cluster.plan(1, &[0, 1, 2, 3]).await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    let state = cluster.until_acted_on(1).await;
    let record = &state.workers[&worker_id()];
    assert_eq!((record.state, record.resident.len()), (WorkerState::Serving, EXPERTS));

    let mut stream = Stream::open(&worker).await;
    let assignments = [(0, 3), (0, 1), (2, 3)];
    let input = rows(3);
    let each: Vec<Vec<f32>> = assignments
        .iter()
        .map(|(row, expert)| checkpoint::expert(SEED, *expert, &input[*row as usize * HIDDEN..][..HIDDEN]))
        .collect();
    let Outcome::Returned(returned) = stream.ask(batch(1, 3, &assignments)).await else { panic!("refused") };
    assert_close(&returned.rows, &each.concat());

    let mut partial = batch(2, 3, &assignments);
    partial.mode = pb::CombineMode::PartialSum.into();
    partial.weights = le([0.5f32, 2.0, -1.0].map(f32::to_le_bytes));
    let Outcome::Returned(returned) = stream.ask(partial).await else { panic!("refused") };
    let row0 = each[0].iter().zip(&each[1]).map(|(a, b)| 0.5 * a + 2.0 * b);
    let expected: Vec<f32> = row0.chain([0.0; HIDDEN]).chain(each[2].iter().map(|value| -value)).collect();
    assert_close(&returned.rows, &expected);

    let inventory = stream.client.get_inventory(pb::GetInventoryRequest {}).await.unwrap().into_inner();
    assert_eq!((inventory.batches_total, inventory.rows_total, inventory.refused_total), (2, 6, 0));
    assert_eq!((inventory.plan_version, inventory.layers[0].experts.len()), (1, EXPERTS));

    shutdown.begin();
    worker.run(&shutdown).await.unwrap();
    let state = cluster.until(|state| state.workers.is_empty()).await;
    assert_eq!(state.model.as_ref().map(|model| model.experts), Some(EXPERTS as u32));
    assert!(stream.answers.message().await.unwrap().is_none(), "the stream ends in order");
}

#[tokio::test]
async fn what_is_elsewhere_late_or_wrong_is_refused_and_the_stream_goes_on() {
    let cluster = Setting::start().await;
    cluster.plan(1, &[0, 1]).await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    cluster.until_acted_on(1).await;
    let mut stream = Stream::open(&worker).await;

    let elsewhere = stream.refusal(batch(1, 2, &[(0, 3), (0, 1), (1, 2), (1, 3)])).await;
    assert_eq!((elsewhere.reason(), elsewhere.missing_experts), (pb::RefusedReason::NotResident, vec![2, 3]));

    let wrong = stream.refusal(pb::DispatchBatch { layer: 0, ..batch(2, 1, &[(0, 0)]) }).await;
    assert_eq!(wrong.reason(), pb::RefusedReason::Invalid);
    assert!(wrong.message.contains("layer 0"), "{}", wrong.message);

    let damaged = stream.refusal(pb::DispatchBatch { checksum: Some(1), ..batch(7, 1, &[(0, 0)]) }).await;
    assert_eq!(damaged.reason(), pb::RefusedReason::Internal);
    assert!(damaged.message.contains("damaged"), "{}", damaged.message);

    let late = stream.refusal(pb::DispatchBatch { deadline_us: 0, ..batch(3, 1, &[(0, 0)]) }).await;
    assert_eq!(late.reason(), pb::RefusedReason::Busy);
    assert!(late.retry_after_us > 0);

    assert!(matches!(stream.ask(batch(4, 1, &[(0, 0)])).await, Outcome::Returned(_)));

    // The plan gives it one more: the same batch is then answered.
    cluster.plan(2, &[0, 1, 3]).await;
    cluster.until_acted_on(2).await;
    assert!(matches!(stream.ask(batch(5, 1, &[(0, 3)])).await, Outcome::Returned(_)));

    let inventory = stream.client.get_inventory(pb::GetInventoryRequest {}).await.unwrap().into_inner();
    assert_eq!((inventory.batches_total, inventory.refused_total, inventory.draining), (2, 4, false));
    shutdown.begin();
    worker.run(&shutdown).await.unwrap();
}

#[tokio::test]
async fn an_expert_that_moved_away_is_let_go_and_can_come_back() {
    let cluster = Setting::start().await;
    cluster.router_follows(1).await;
    cluster.other_holds(&[], 1).await;
    cluster.plan(1, &[0, 1]).await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    cluster.until_acted_on(1).await;
    let mut stream = Stream::open(&worker).await;

    // Neither the router nor the other worker is as far as the plan.
    cluster.plan_for_two(2, &[0], &[1]).await;
    let state = cluster.until_acted_on(2).await;
    assert_eq!(state.workers[&worker_id()].resident.len(), 2, "nobody else has it");
    cluster.other_holds(&[1], 2).await;
    assert!(matches!(stream.ask(batch(1, 1, &[(0, 1)])).await, Outcome::Returned(_)));
    cluster.router_follows(2).await;
    cluster.until_told(&[0]).await;

    // Answered for a while though nobody is told, then no longer.
    let mut id = 2;
    while matches!(stream.ask(batch(id, 1, &[(0, 1)])).await, Outcome::Returned(_)) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        id += 1;
    }
    let missing = stream.refusal(batch(1000, 1, &[(0, 1)])).await;
    assert_eq!((missing.reason(), missing.missing_experts), (pb::RefusedReason::NotResident, vec![1]));
    let inventory = stream.client.get_inventory(pb::GetInventoryRequest {}).await.unwrap().into_inner();
    assert_eq!(inventory.resident_bytes, (3 * HIDDEN * checkpoint::INNER * 4) as u64, "one expert is left");

    cluster.plan(3, &[0, 1]).await;
    cluster.until_told(&[0, 1]).await;
    assert!(matches!(stream.ask(batch(1001, 1, &[(0, 1)])).await, Outcome::Returned(_)));
    cluster.plan_for_two(4, &[], &[0, 1]).await;
    cluster.other_holds(&[0, 1], 4).await;
    shutdown.begin();
    worker.run(&shutdown).await.unwrap();
}

#[tokio::test]
async fn a_worker_that_leaves_answers_on_until_others_hold_its_experts() {
    let cluster = Setting::start().await;
    cluster.router_follows(1).await;
    cluster.other_holds(&[], 1).await;
    cluster.plan(1, &[0, 1]).await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    let state = cluster.until_acted_on(1).await;
    let mut stream = Stream::open(&worker).await;

    // An operator's order is as good as a signal.
    let order = DrainOrder { incarnation: state.workers[&worker_id()].incarnation };
    let ending = shutdown.clone();
    let running = tokio::spawn(async move { worker.run(&ending).await });
    cluster.store.put(&cluster.keys.drain(&worker_id()), order.encode(), None).await.unwrap();
    cluster.until(|state| state.workers[&worker_id()].state == WorkerState::Draining).await;
    assert!(matches!(stream.ask(batch(1, 1, &[(0, 1)])).await, Outcome::Returned(_)), "nobody else could answer");
    let inventory = stream.client.get_inventory(pb::GetInventoryRequest {}).await.unwrap().into_inner();
    assert!(inventory.draining);

    cluster.plan_for_two(2, &[], &[0, 1]).await;
    cluster.other_holds(&[0], 1).await;
    assert!(matches!(stream.ask(batch(2, 1, &[(0, 1)])).await, Outcome::Returned(_)), "it is still the only one");
    cluster.other_holds(&[0, 1], 2).await;
    running.await.unwrap().unwrap();
    let state = cluster.until(|state| !state.workers.contains_key(&worker_id())).await;
    assert!(state.drains.is_empty(), "the order was carried out");
    assert!(stream.answers.message().await.unwrap().is_none(), "the stream ends in order");
}

#[tokio::test]
async fn a_newcomer_is_started_at_once_and_ready_when_its_experts_are_in() {
    let cluster = Setting::start().await;
    cluster.other_holds(&[0, 1], 1).await;
    cluster.plan_for_two(1, &[], &[0, 1]).await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    let admin = worker.admin;
    let running = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { worker.run(&shutdown).await }
    });
    cluster.until_acted_on(1).await;
    assert_eq!(
        (status(admin, "/startupz").await, status(admin, "/readyz").await),
        (200, 503),
        "it has been given nothing"
    );
    cluster.plan_for_two(2, &[0], &[0, 1]).await;
    cluster.until_acted_on(2).await;
    while status(admin, "/readyz").await != 200 {
        tokio::task::yield_now().await;
    }
    cluster.plan_for_two(3, &[0, 1, 2, 3], &[0, 1]).await;
    cluster.until_acted_on(3).await;
    assert_eq!(status(admin, "/readyz").await, 200, "what comes later changes nothing");
    shutdown.begin();
    running.await.unwrap().unwrap();
}

/// The status of one plain request to the admin port.
async fn status(admin: SocketAddr, path: &str) -> u16 {
    let mut stream = TcpStream::connect(admin).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn of_many_batches_in_flight_each_is_answered_once() {
    let cluster = Setting::start().await;
    cluster.plan(1, &[0, 1, 2]).await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    cluster.until_acted_on(1).await;
    let Stream { batches, mut answers, .. } = Stream::open(&worker).await;

    // Every fourth batch asks for an expert that is elsewhere.
    let expert_of = |id: u64| (id % 4) as u16;
    let sending = tokio::spawn(async move {
        for id in 0..200 {
            batches.send(batch(id, 2, &[(1, expert_of(id)), (0, expert_of(id))])).await.unwrap();
        }
    });
    let input = rows(2);
    let mut seen = std::collections::BTreeSet::new();
    while let Some(answer) = answers.message().await.unwrap() {
        assert!(seen.insert(answer.batch_id), "batch {} is answered twice", answer.batch_id);
        let id = expert_of(answer.batch_id);
        match answer.outcome.unwrap() {
            Outcome::Returned(returned) => {
                let of = |row: usize| checkpoint::expert(SEED, id, &input[row * HIDDEN..][..HIDDEN]);
                assert_close(&returned.rows, &[of(1), of(0)].concat());
            }
            Outcome::Refused(refused) => assert_eq!((id, refused.missing_experts), (3, vec![3])),
        }
    }
    sending.await.unwrap();
    assert_eq!(seen.len(), 200, "the stream ends after the last answer");
    shutdown.begin();
    worker.run(&shutdown).await.unwrap();
}

#[tokio::test]
async fn a_worker_with_another_checkpoint_may_not_join() {
    let cluster = Setting::start().await;
    let shutdown = Shutdown::manual();
    let first = try_start(&cluster, SEED, &shutdown).await.unwrap();
    let error = try_start(&cluster, SEED + 1, &shutdown).await.unwrap_err();
    assert!(matches!(&error, app::Error::Model(_)), "{error}");
    assert!(error.to_string().contains("may not join"), "{error}");
    shutdown.begin();
    first.run(&shutdown).await.unwrap();
}

#[tokio::test]
async fn a_stream_meant_for_who_had_this_address_before_is_refused() {
    let cluster = Setting::start().await;
    let shutdown = Shutdown::manual();
    let worker = try_start(&cluster, SEED, &shutdown).await.unwrap();
    let state = cluster.until(|state| !state.workers.is_empty()).await;
    let own = state.workers[&worker.id].incarnation.get();
    let channel = channel::internal(&worker.listen.to_string()).unwrap().connect().await.unwrap();
    for (meant, accepted) in [(own, true), (own ^ 1, false)] {
        let (_open, sending) = mpsc::channel(1);
        let mut request = tonic::Request::new(ReceiverStream::new(sending));
        request.metadata_mut().insert(INCARNATION_METADATA, meant.into());
        let answer = ExpertWorkerClient::new(channel.clone()).exchange(request).await;
        assert_eq!(
            answer.map_err(|status| status.code()).err(),
            (!accepted).then_some(tonic::Code::FailedPrecondition)
        );
    }
    drop(channel);
    shutdown.begin();
    worker.run(&shutdown).await.unwrap();
}
