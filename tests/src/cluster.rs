//! A whole cluster of real processes.
//!
//! In: a checkpoint and how many of what. Out: routers that answer, workers that can be killed, paused and asked to
//! leave, and the store's own view of all that. Never here: a fixed port, a shared name, a process that stays behind.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use conclave_model::device::Device;
use conclave_placement::{
    ids::{Cluster as ClusterName, ExpertId, RouterId, WorkerId},
    keys::Keys,
    state::ClusterState,
    store::{self, Store},
    view::View,
};
use conclave_proto::expert::v1::{GetInventoryRequest, GetInventoryResponse, expert_worker_client::ExpertWorkerClient};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    chaos::Proxy,
    client::Client,
    etcd::EtcdProcess,
    eventually::{eventually, soon},
    process::{Process, binary},
};

/// What a cluster shall consist of.
#[derive(Debug)]
pub struct Builder {
    checkpoint: PathBuf,
    device: Device,
    store: Option<String>,
    workers: usize,
    guests: usize,
    replicas: usize,
    routers: Option<Vec<Vec<String>>>,
    worker_arguments: Vec<String>,
}

/// Running processes around one store. All are killed when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// `worker-0`, `worker-1`, …
    pub workers: Vec<Process>,
    /// `router-0`, `router-1`, …
    pub routers: Vec<Process>,
    /// The cluster's own etcd; none where the builder was given another's.
    pub etcd: Option<EtcdProcess>,
    /// A connection to it.
    pub store: Arc<dyn Store>,
    /// The places of this cluster's keys.
    pub keys: Keys,
    plan: Builder,
    name: ClusterName,
    view: View,
    logs: TempDir,
    _stop: DropGuard,
}

impl Builder {
    /// Where every process computes; on the processor unless told.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Uses the store at `spec`, which the test keeps alive, instead of an etcd of the cluster's own.
    pub fn store(mut self, spec: &str) -> Self {
        self.store = Some(spec.to_owned());
        self
    }

    /// How many worker processes; one unless told.
    pub fn workers(mut self, count: usize) -> Self {
        self.workers = count;
        self
    }

    /// How many workers the test will bring itself (fake ones): the first plan waits for them too.
    pub fn guests(mut self, count: usize) -> Self {
        self.guests = count;
        self
    }

    /// How many workers shall hold each expert; one unless told.
    pub fn replicas(mut self, count: usize) -> Self {
        self.replicas = count;
        self
    }

    /// How many plain routers; one unless told.
    pub fn routers(mut self, count: usize) -> Self {
        self.routers = Some(vec![Vec::new(); count]);
        self
    }

    /// One more router, with `arguments` of its own.
    pub fn router(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.routers.get_or_insert_default().push(arguments);
        self
    }

    /// Further arguments for every worker.
    pub fn worker_arguments(mut self, arguments: &[&str]) -> Self {
        self.worker_arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Starts everything and waits until it serves.
    pub async fn start(self) -> Cluster {
        let mut cluster = self.launch().await;
        cluster.ready().await;
        cluster
    }

    /// Starts everything and waits for nothing but the store.
    pub async fn launch(mut self) -> Cluster {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let name = ClusterName::parse(&name).expect("a valid name");
        let etcd = if self.store.is_none() { Some(EtcdProcess::start().await) } else { None };
        let spec = self.store.get_or_insert_with(|| etcd.as_ref().expect("just started").spec()).clone();
        let routers = self.routers.take().unwrap_or_else(|| vec![Vec::new()]);
        let store = store::connect(&spec).expect("the store answers");
        let keys = Keys::new(&name);
        let stop = CancellationToken::new();
        let view = View::start(store.clone(), keys.clone(), stop.clone()).await.expect("the store can be watched");
        let logs = tempfile::Builder::new().prefix("conclave-test-").tempdir().expect("a temporary folder");
        let mut cluster = Cluster {
            workers: Vec::new(),
            routers: Vec::new(),
            etcd,
            store,
            keys,
            plan: self,
            name,
            view,
            logs,
            _stop: stop.drop_guard(),
        };
        for _ in 0..cluster.plan.workers {
            cluster.add_worker();
        }
        for arguments in &routers {
            cluster.add_router(arguments);
        }
        cluster
    }
}

impl Cluster {
    /// A cluster that serves the checkpoint in `folder`.
    pub fn builder(folder: &Path) -> Builder {
        Builder {
            checkpoint: folder.to_owned(),
            device: Device::Cpu,
            store: None,
            workers: 1,
            guests: 0,
            replicas: 1,
            routers: None,
            worker_arguments: Vec::new(),
        }
    }

    /// Starts one more worker.
    pub fn add_worker(&mut self) -> &mut Process {
        self.add_worker_with(&[])
    }

    /// Starts one more worker that routers reach through `proxy` alone.
    pub async fn add_worker_behind(&mut self, proxy: &Proxy) -> &mut Process {
        let worker = self.add_worker_with(&[&format!("--advertise={}", proxy.address())]);
        proxy.lead_to(eventually("a worker to say where it listens", async || worker.told("listen")).await);
        worker
    }

    /// Starts one more worker, with `own` arguments.
    pub fn add_worker_with(&mut self, own: &[&str]) -> &mut Process {
        let name = format!("worker-{}", self.workers.len());
        let mut arguments = self.arguments(&name, &self.plan.checkpoint);
        arguments.extend(self.plan.worker_arguments.iter().cloned());
        arguments.extend(own.iter().map(|&argument| argument.to_owned()));
        self.workers.push(Process::spawn(&name, &binary("conclave-expert-worker"), &arguments, self.logs.path()));
        self.workers.last_mut().expect("just pushed")
    }

    fn add_router(&mut self, own: &[String]) {
        let name = format!("router-{}", self.routers.len());
        let mut arguments = self.arguments(&name, &self.plan.checkpoint);
        arguments.push(format!("--replicas={}", self.plan.replicas));
        arguments.push(format!("--min-workers={}", (self.plan.workers + self.plan.guests).max(1)));
        arguments.extend_from_slice(own);
        self.routers.push(Process::spawn(&name, &binary("conclave-router"), &arguments, self.logs.path()));
    }

    /// What every process of this cluster is started with, called `id` and serving `checkpoint`.
    pub fn arguments(&self, id: &str, checkpoint: &Path) -> Vec<String> {
        let spec = self.plan.store.as_deref().unwrap_or_default();
        let mut arguments = vec!["--die-with-parent".to_owned()];
        for (flag, value) in [
            ("model", checkpoint.display().to_string().as_str()),
            ("cluster", self.name.to_string().as_str()),
            ("store", spec),
            ("id", id),
            ("device", self.plan.device.to_string().as_str()),
            ("dtype", "f32"),
            ("threads", "1"),
            ("listen", "127.0.0.1:0"),
            ("admin-listen", "127.0.0.1:0"),
        ] {
            arguments.push(format!("--{flag}={value}"));
        }
        arguments
    }

    /// Runs `conclave` with `arguments` on this cluster, to its end, which must be a good one.
    pub async fn conclave(&self, arguments: &[&str]) {
        let mut arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        arguments.push(format!("--store={}", self.plan.store.as_deref().unwrap_or_default()));
        arguments.push(format!("--cluster={}", self.name));
        let mut command = Process::spawn("conclave", &binary("conclave"), &arguments, self.logs.path());
        let status = command.ended().await;
        assert!(status.success(), "conclave {arguments:?} ended with {status}:\n{}", command.log());
    }

    /// Where this cluster's processes write their logs.
    pub fn log_folder(&self) -> &Path {
        self.logs.path()
    }

    /// Waits until every expert is resident as often as it shall be and every router serves.
    pub async fn ready(&mut self) {
        let holders = self.plan.replicas.min(self.plan.workers + self.plan.guests);
        let (view, processes) = (&self.view, self.workers.iter_mut().chain(self.routers.iter_mut()));
        let mut processes: Vec<_> = processes.collect();
        eventually("every expert to be resident", async || {
            for process in &mut processes {
                assert!(process.is_running(), "{} ended while the cluster started", process.name());
            }
            held_everywhere(&view.current(), holders).then_some(())
        })
        .await;
        for index in 0..self.routers.len() {
            self.router_serves(index).await;
        }
    }

    /// Waits until the state that the store tells passes `check`.
    pub async fn until(&self, what: &str, check: impl Fn(&ClusterState) -> bool) {
        eventually(what, async || check(&self.state()).then_some(())).await;
    }

    /// Waits until router `index` is registered and healthy.
    pub async fn router_serves(&self, index: usize) {
        let address = self.router_address(index).await;
        eventually("a router to serve", async || {
            let channel = conclave_runtime::channel::internal(&address).ok()?.connect().await.ok()?;
            let request = HealthCheckRequest { service: "conclave.inference.v1.Inference".into() };
            let answer = HealthClient::new(channel).check(request).await.ok()?;
            (answer.into_inner().status() == ServingStatus::Serving).then_some(())
        })
        .await;
    }

    /// Waits until worker `index` is gone from the store.
    pub async fn worker_gone(&self, index: usize) {
        let id = worker_id(index);
        self.until("a worker to be gone", |state| !state.workers.contains_key(&id)).await;
    }

    /// Waits until each expert is resident on `holders` workers.
    pub async fn held(&self, holders: usize) {
        self.until("every expert to be resident", |state| held_everywhere(state, holders)).await;
    }

    /// The router that runs the controller, once there is one.
    pub async fn leader(&self) -> usize {
        let leader = eventually("a leader", async || self.state().leader.clone()).await;
        let index = self.routers.iter().position(|router| router.name() == leader.to_string());
        index.expect("the leader is one of the cluster's routers")
    }

    /// Each router's public address, once all are registered.
    pub async fn router_addresses(&self) -> Vec<String> {
        let mut addresses = Vec::new();
        for index in 0..self.routers.len() {
            addresses.push(self.router_address(index).await);
        }
        addresses
    }

    /// Every later picture of the cluster, or at least the latest.
    pub fn changes(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.view.subscribe()
    }

    /// The cluster as its store tells it now.
    pub fn state(&self) -> Arc<ClusterState> {
        self.view.current()
    }

    /// The public address of router `index`, once it is registered.
    pub async fn router_address(&self, index: usize) -> String {
        let id = RouterId::parse(&format!("router-{index}")).expect("a valid name");
        let address = async || self.state().routers.get(&id).map(|record| record.inference_address.clone());
        eventually("a router to register", address).await
    }

    /// The internal address of worker `index`, once it is registered.
    pub async fn worker_address(&self, index: usize) -> String {
        let id = worker_id(index);
        let address = async || self.state().workers.get(&id).map(|record| record.address.clone());
        eventually("a worker to register", address).await
    }

    /// A client of router `index`.
    pub async fn client(&self, index: usize) -> Client {
        Client::connect(&self.router_address(index).await).await
    }

    /// What worker `index` says it holds and has computed.
    pub async fn inventory(&self, index: usize) -> GetInventoryResponse {
        let address = self.worker_address(index).await;
        let endpoint = conclave_runtime::channel::internal(&address).expect("a registered address is one");
        let channel = soon("a worker to accept", endpoint.connect()).await.expect("a live worker accepts");
        let mut worker = ExpertWorkerClient::new(channel);
        let answer = soon("an inventory", worker.get_inventory(GetInventoryRequest {})).await;
        answer.expect("a live worker tells what it holds").into_inner()
    }
}

/// The name of worker `index`.
pub fn worker_id(index: usize) -> WorkerId {
    WorkerId::parse(&format!("worker-{index}")).expect("a valid name")
}

/// Whether each expert of the model is resident on that many workers that serve.
pub fn held_everywhere(state: &ClusterState, holders: usize) -> bool {
    let Some(model) = &state.model else { return false };
    let experts = 0..u16::try_from(model.experts).expect("expert ids are u16");
    let mut pairs = model.moe_layers.iter().flat_map(|&layer| experts.clone().map(move |expert| (layer, expert)));
    pairs.all(|(layer, expert)| state.holders(layer, ExpertId(expert)).count() >= holders)
}
