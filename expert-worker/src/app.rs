//! One worker, wired: a configuration comes in, a process that serves and leaves in order goes out. Start: sockets,
//! checkpoint, the model's identity, threads, and the record last, so that nobody is sent here too early. End: say so,
//! answer on until others hold the experts, refuse what is new, finish what was accepted, leave the store, close the
//! streams. Nothing about experts is decided here.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use conclave_model::checkpoint::{self, Checkpoint};
use conclave_model::device::{self, Compute};
use conclave_placement::ids::{Incarnation, InvalidName, WorkerId, default_name};
use conclave_placement::keys::Keys;
use conclave_placement::model_key::{self, IdentityError};
use conclave_placement::state::{ClusterState, LocalSocket, ModelIdentity, WorkerRecord};
use conclave_placement::store::{self, Store};
use conclave_placement::view::View;
use conclave_runtime::listen::{self, Listener};
use conclave_runtime::probes::{Probes, Stage};
use conclave_runtime::server;
use conclave_runtime::shutdown::Shutdown;
use conclave_runtime::stream;
use conclave_runtime::tensor_thread::{self, SpawnError};
use conclave_runtime::wire_thread::WireThread;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::config::Config;
use crate::executor::Executor;
use crate::loader::{self, Loader};
use crate::memory;
use crate::metrics::Metrics;
use crate::readiness;
use crate::reconcile;
use crate::reconciler::{Budget, Reconciler};
use crate::registration::Registration;
use crate::residency::Resident;
use crate::service::{self, Parts, Service, Shape};

/// Of the drain's grace, what is kept for batches in flight: at most a quarter, and at most this.
const FINISH_GRACE: Duration = Duration::from_secs(5);
/// How long taking an order out of the store may hold up the end.
const TIDY_GRACE: Duration = Duration::from_secs(2);
/// How long streams whose batches are all answered may hold up the end.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Listen(#[from] listen::Error),
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error(transparent)]
    Device(#[from] device::Error),
    #[error(transparent)]
    FreeMemory(#[from] memory::Error),
    #[error(transparent)]
    Checkpoint(#[from] loader::Error),
    #[error("left while {experts} of its experts were held by no other worker: the grace was over")]
    LeftBehind { experts: usize },
    #[error("--memory {budget} holds no expert: one takes {expert_bytes} bytes")]
    Memory { budget: u64, expert_bytes: u64 },
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("this worker may not join the cluster: {0}")]
    Model(#[from] IdentityError),
    #[error(transparent)]
    Thread(#[from] SpawnError<Infallible>),
    #[error("cannot start the thread that serves routers: {0}")]
    Wire(std::io::Error),
    #[error(transparent)]
    Server(#[from] server::Error),
    #[error("the service ended by itself")]
    ServiceEnded,
}

/// A worker that is registered and serves.
#[derive(Debug)]
pub struct Worker {
    pub id: WorkerId,
    /// Where routers connect.
    pub listen: SocketAddr,
    /// Where probes and scrapes connect.
    pub admin: SocketAddr,
    drain_grace: Duration,
    /// An operator ordered it to leave.
    ordered: Arc<AtomicBool>,
    registration: Arc<Registration>,
    executor: Arc<Executor>,
    resident: Arc<Resident>,
    reconciler: JoinHandle<()>,
    server: JoinHandle<()>,
    /// It lives as long as the streams may.
    _wire: WireThread,
    probes: Probes,
    store: Arc<dyn Store>,
    keys: Keys,
    view: View,
    in_flight: TaskTracker,
    /// Cancelled: new batches are refused.
    refusing: CancellationToken,
    /// Ends the streams.
    closing: CancellationToken,
    /// Ends what outlives the streams: view and lease.
    end: CancellationToken,
}

/// Starts a worker; `None` when it was told to end before it had joined the cluster.
pub async fn start(config: &Config, shutdown: &Shutdown) -> Result<Option<Worker>, Error> {
    let mut listener = listen::bind(&config.listen)?;
    let probes = Probes::serve(listen::bind(&config.admin_listen)?, service::NAME).await;
    let id = match &config.id {
        Some(id) => id.clone(),
        None => WorkerId::parse(&default_name("worker", &listen::host(), listener.local_addr.port()))?,
    };
    let prepared = tokio::select! {
        prepared = prepare(config, &probes) => prepared?,
        () = shutdown.draining().cancelled_owned() => return Ok(None),
    };
    let incarnation = Incarnation::fresh();
    let record = WorkerRecord {
        local: local_socket(config, &mut listener, incarnation),
        device: config.device.to_string(),
        memory_budget: prepared.model.published_budget(prepared.memory)?,
        locality: config.locality(),
        ..WorkerRecord::starting(
            id,
            incarnation,
            config.advertise.clone().unwrap_or_else(|| listen::reachable(listener.local_addr)),
        )
    };
    forget_old_order(&prepared, &record).await;
    let Some(registration) = join(config, shutdown, &prepared, record).await? else { return Ok(None) };
    Ok(Some(serve(config, shutdown, listener, probes, prepared, registration)))
}

/// An order for a former run of this worker has nobody left to follow it.
async fn forget_old_order(prepared: &Prepared, record: &WorkerRecord) {
    let Prepared { store, keys, view, .. } = prepared;
    if view.current().drains.get(&record.id).is_none_or(|meant| *meant == record.incarnation) {
        return;
    }
    if !matches!(timeout(TIDY_GRACE, store.delete(&keys.drain(&record.id))).await, Ok(Ok(_))) {
        tracing::warn!("an order for a former run of this worker stays in the store");
    }
}

/// Listens for routers of this host too. A worker that was told what to advertise is to be reached there and nowhere else.
fn local_socket(config: &Config, listener: &mut Listener, incarnation: Incarnation) -> Option<LocalSocket> {
    if config.advertise.is_some() || config.no_local_socket {
        return None;
    }
    let boot_id = listen::boot_id()?;
    // A name that nobody has, and that nobody can take before the store tells of it.
    let name = format!("conclave/{}", incarnation.get());
    match listener.also_at(&name) {
        Ok(()) => Some(LocalSocket { boot_id, name }),
        Err(error) => {
            tracing::info!(%error, "routers of this host come by the network");
            None
        }
    }
}

/// Registers. Not dropped half-way: told to end meanwhile, it waits until what was written is taken back.
async fn join(
    config: &Config,
    shutdown: &Shutdown,
    prepared: &Prepared,
    record: WorkerRecord,
) -> Result<Option<Arc<Registration>>, Error> {
    let Prepared { store, keys, end, .. } = prepared;
    let joining = Registration::join(Arc::clone(store), keys, config.lease_ttl(), record, end.clone());
    let mut joining = std::pin::pin!(joining);
    tokio::select! {
        joined = &mut joining => Ok(Some(Arc::new(joined?))),
        () = shutdown.draining().cancelled_owned() => {
            end.cancel();
            if let Ok(registration) = joining.await {
                registration.leave().await;
            }
            Ok(None)
        }
    }
}

/// What stands before the cluster hears of this worker.
struct Prepared {
    model: Model,
    /// Bytes for experts; 0 is no limit.
    memory: u64,
    store: Arc<dyn Store>,
    keys: Keys,
    view: View,
    executor: Arc<Executor>,
    loader: Loader,
    metrics: Metrics,
    /// Health and reflection; the service itself joins them last.
    routes: Routes,
    /// Where routers' streams are served.
    wire: WireThread,
    end: CancellationToken,
}

async fn prepare(config: &Config, probes: &Probes) -> Result<Prepared, Error> {
    config.device.open()?;
    let memory = memory::limit(config.memory, config.device)?;
    let compute = Compute::new(config.device, config.dtype, config.numerics);
    let room = if memory == 0 { "no limit".to_owned() } else { format!("{memory} bytes") };
    tracing::info!(compute = compute.describe(), memory = room, "experts are computed");
    let (checkpoint, identity) = loader::open(&config.model).await?;
    let opened = Arc::clone(&checkpoint);
    // On a GPU kernels are compiled for it.
    let model = tokio::task::spawn_blocking(move || Model::new(&opened, identity, compute)).await;
    let model = model.map_err(|error| loader::Error::Thread(tensor_thread::Error::Panicked(error.to_string())))?;
    // Beyond this, a start only waits for others.
    probes.set(Stage::Started).await;
    let store = store::connect(&config.store)?;
    let keys = Keys::new(&config.cluster);
    model_key::agree(&*store, &keys, &model.identity).await?;
    let end = CancellationToken::new();
    let view = View::start(Arc::clone(&store), keys.clone(), end.clone()).await?;
    let metrics = Metrics::register(&probes.registry, &model.shape.moe_layers);
    let executor = Arc::new(Executor::start(config.threads, config.queue as usize, metrics.clone()).await?);
    let loader = Loader::start(checkpoint, compute, Arc::clone(&executor)).await?;
    let (reflection, reflection_alpha) = server::reflection(&[service::NAME])?;
    let routes = Routes::new(probes.health.service()).add_service(reflection).add_service(reflection_alpha);
    let wire = WireThread::start("wire").map_err(Error::Wire)?;
    Ok(Prepared { model, memory, store, keys, view, executor, loader, metrics, routes, wire, end })
}

/// What this worker knows of the model.
struct Model {
    identity: ModelIdentity,
    shape: Shape,
    /// Memory that one expert takes here, in the format this worker computes in.
    expert_bytes: u64,
}

impl Model {
    fn new(checkpoint: &Checkpoint, identity: checkpoint::Identity, compute: Compute) -> Self {
        let config = checkpoint.config();
        let identity = ModelIdentity::new(
            checkpoint.name(),
            [identity.config_digest, identity.checkpoint_digest],
            config.layers(),
            config.moe_layers(),
            config.n_routed_experts,
            checkpoint.expert_bytes(),
        );
        let (experts, moe_layers) = (identity.experts, identity.moe_layers.clone());
        Self {
            shape: Shape { hidden: config.hidden_size, experts, moe_layers },
            expert_bytes: checkpoint.resident_expert_bytes(compute),
            identity,
        }
    }

    /// The memory budget as the planner counts it. The planner takes an expert to be as large as in the checkpoint; here
    /// it may be larger or smaller, so the budget is published as the whole experts that it really holds.
    fn published_budget(&self, budget: u64) -> Result<u64, Error> {
        match budget / self.expert_bytes.max(1) {
            _ if budget == 0 => Ok(0),
            0 => Err(Error::Memory { budget, expert_bytes: self.expert_bytes }),
            experts => Ok(experts.saturating_mul(self.identity.expert_bytes)),
        }
    }
}

/// Opens the service and starts following the plan.
fn serve(
    config: &Config,
    shutdown: &Shutdown,
    listener: Listener,
    probes: Probes,
    prepared: Prepared,
    registration: Arc<Registration>,
) -> Worker {
    let Prepared { model, memory, store, keys, view, executor, loader, metrics, routes, wire, end } = prepared;
    let resident = Arc::new(Resident::default());
    let (refusing, closing, in_flight) = (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
    let listen = listener.local_addr;
    let service = Service::new(Parts {
        shape: model.shape,
        executor: Arc::clone(&executor),
        resident: Arc::clone(&resident),
        registration: Arc::clone(&registration),
        metrics: metrics.clone(),
        refusing: refusing.clone(),
        closing: closing.clone(),
        in_flight: in_flight.clone(),
    });
    let routes = routes.add_service(service.server());
    let server = wire.spawn(stream::serve(routes, listener, closing.clone(), CLOSE_GRACE));
    let budget = Budget { expert_bytes: model.expert_bytes, bytes: memory };
    let reconciler = Reconciler::new(loader, Arc::clone(&resident), Arc::clone(&registration), metrics, budget);
    let ordered = Arc::new(AtomicBool::new(false));
    tokio::spawn(ordered_to_leave(view.subscribe(), registration.record(), shutdown.clone(), Arc::clone(&ordered)));
    Worker {
        id: registration.record().id,
        listen,
        admin: probes.address,
        drain_grace: config.drain_grace(),
        ordered,
        registration,
        executor,
        resident,
        reconciler: tokio::spawn(reconciler.run(view.subscribe(), shutdown.draining())),
        server,
        _wire: wire,
        probes,
        store,
        keys,
        view,
        in_flight,
        refusing,
        closing,
        end,
    }
}

/// Begins the drain when an operator asks for this run of this worker in the store.
async fn ordered_to_leave(
    mut changes: watch::Receiver<Arc<ClusterState>>,
    record: WorkerRecord,
    shutdown: Shutdown,
    is_ordered: Arc<AtomicBool>,
) {
    let ordered = |state: &Arc<ClusterState>| state.drains.get(&record.id) == Some(&record.incarnation);
    tokio::select! {
        ordered = changes.wait_for(ordered) => if ordered.is_ok() {
            tracing::info!("draining, as ordered in the store");
            is_ordered.store(true, Relaxed);
            shutdown.begin();
        },
        () = shutdown.draining().cancelled_owned() => {}
    }
}

impl Worker {
    /// Serves until told to drain, then leaves in order. Fails when the service ends by itself.
    pub async fn run(mut self, shutdown: &Shutdown) -> Result<(), Error> {
        tracing::info!(id = %self.id, listen = %self.listen, admin = %self.admin, "joined the cluster");
        let ready = readiness::reached(self.registration.run(), self.view.subscribe());
        tokio::select! {
            never = self.probes.serve_once(ready) => match never {},
            () = shutdown.draining().cancelled_owned() => match self.drain(shutdown).await {
                0 => Ok(()),
                experts => Err(Error::LeftBehind { experts }),
            },
            _ = &mut self.server => {
                shutdown.begin();
                self.registration.leave().await;
                Err(Error::ServiceEnded)
            }
        }
    }

    /// In this order: say that this worker leaves, answer on until others hold its experts, then refuse what is new and
    /// finish what was accepted. Says how many experts nobody else holds.
    async fn drain(mut self, shutdown: &Shutdown) -> usize {
        let finish_grace = (self.drain_grace / 4).min(FINISH_GRACE);
        let grace = self.drain_grace - finish_grace;
        let over = self.time_is_over(shutdown, grace);
        self.probes.set(Stage::Started).await;
        self.registration.drain();
        match timeout(grace, &mut self.reconciler).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the reconciler panicked"),
            Err(_) => tracing::warn!("an expert is being read and does not come: leaving without it"),
        }
        let left_behind = self.hand_over(&over).await;
        self.refusing.cancel();
        self.in_flight.close();
        if timeout(finish_grace, self.in_flight.wait()).await.is_err() {
            tracing::warn!(batches = self.in_flight.len(), "leaving with batches in flight: the grace is over");
        }
        self.take_out_order().await;
        self.registration.leave().await;
        self.closing.cancel();
        if let Err(error) = self.server.await {
            tracing::error!(%error, "the service panicked while closing");
        }
        self.end.cancel();
        // Streams that outlived their grace still hold it; then the process's end is its end.
        if let Some(executor) = Arc::into_inner(self.executor) {
            executor.close().await;
        }
        tracing::info!(id = %self.id, "left the cluster");
        left_behind
    }

    /// Cancelled once `grace` has passed. Who is ordered to leave by an operator takes as long as it takes, until a signal
    /// says that somebody counts.
    fn time_is_over(&self, shutdown: &Shutdown, grace: Duration) -> CancellationToken {
        let (over, counts) = (CancellationToken::new(), shutdown.signalled());
        let (is_over, waits_for_signal) = (over.clone(), self.ordered.load(Relaxed));
        tokio::spawn(async move {
            if waits_for_signal {
                counts.cancelled().await;
            }
            tokio::time::sleep(grace).await;
            is_over.cancel();
        });
        over
    }

    /// Waits until every expert of this worker is held by one that stays, or time is over. Says how many experts nobody else
    /// holds.
    async fn hand_over(&self, over: &CancellationToken) -> usize {
        let here = self.resident.snapshot();
        let mut changes = self.view.subscribe();
        let handed_over = changes.wait_for(|state| reconcile::is_handed_over(&self.id, &here.experts, state));
        match over.run_until_cancelled(handed_over).await {
            Some(Ok(_)) => {
                tracing::info!(experts = here.experts.len(), "nobody depends on this worker any more");
                0
            }
            Some(Err(_)) | None => {
                let lost = reconcile::left_behind(&self.id, &here.experts, &self.view.current());
                tracing::warn!(lost, grace = ?self.drain_grace, "leaving though other workers do not hold all of its experts yet");
                lost
            }
        }
    }

    /// An order that was carried out must not stay behind.
    async fn take_out_order(&self) {
        if self.view.current().drains.get(&self.id) != Some(&self.registration.record().incarnation) {
            return;
        }
        match timeout(TIDY_GRACE, self.store.delete(&self.keys.drain(&self.id))).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the order to leave stays in the store"),
            Err(_) => tracing::warn!("the order to leave stays in the store, which does not answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use conclave_model::expert::Expert;
    use conclave_placement::ids::LayerIdx;

    #[test]
    fn the_experts_of_multi_token_prediction_are_placed_and_served_like_the_others() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/v3_mtp");
        let checkpoint = Checkpoint::open(folder.as_ref()).unwrap();
        let model = Model::new(&checkpoint, checkpoint.identity().unwrap(), Compute::REFERENCE);
        let (identity, layers) = (&model.identity, [LayerIdx(1), LayerIdx(2)]);
        assert_eq!((identity.name.as_str(), identity.layers, identity.experts), ("v3_mtp", 3, 12));
        assert_eq!((&identity.moe_layers[..], &model.shape.moe_layers[..]), (&layers[..], &layers[..]));
        assert_eq!(ModelIdentity::decode(&identity.encode()).unwrap(), *identity);
        Expert::load(&checkpoint, 2, 11, Compute::REFERENCE).unwrap();
    }

    #[test]
    fn a_budget_is_published_as_the_whole_experts_that_it_holds_in_the_format_they_are_held_in() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/v3_mtp");
        let checkpoint = Checkpoint::open(folder.as_ref()).unwrap();
        let stored = checkpoint.expert_bytes();
        let mut model = Model::new(&checkpoint, checkpoint.identity().unwrap(), Compute::REFERENCE);
        assert_eq!(model.expert_bytes, checkpoint.resident_expert_bytes(Compute::REFERENCE));
        // As in f32 of a checkpoint in BF16.
        model.expert_bytes = 2 * stored;
        let published = |budget| model.published_budget(budget).unwrap();
        assert_eq!(published(0), 0, "no limit stays none");
        assert_eq!(published(7 * stored), 3 * stored, "three experts of twice the size");
        assert_eq!(published(u64::MAX), u64::MAX / (2 * stored) * stored);
        let refused = model.published_budget(stored).unwrap_err().to_string();
        assert!(refused.contains("holds no expert"), "{refused}");
    }
}
