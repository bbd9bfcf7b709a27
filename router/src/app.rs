//! One router, wired: a configuration comes in, a process that serves and leaves in order goes out.
//!
//! Start: sockets, checkpoint and the router's half of the weights, the model's identity, the view and the links, and the
//! record last. It wants traffic once every expert is in reach for the first time.
//! End: not ready, what is in flight done, the record out of the store, the engine stopped.
//! Never here: a decision about requests, batches or experts.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use conclave_model::{
    cache::{BLOCK_TOKENS, KvCache},
    checkpoint::{self, Checkpoint},
    config::{self as model_config, ModelConfig},
    device::{self, Compute, init_thread},
    generation::GenerationConfig,
    mtp::Mtp,
    tokenizer::{self, ChatTemplate, TemplateError, Tokenizer},
    transformer::Transformer,
};
use conclave_placement::{
    election::Election,
    ids::{Incarnation, InvalidName, LayerIdx, RouterId, default_name},
    keys::Keys,
    model_key::{self, IdentityError},
    state::{ModelIdentity, RouterRecord},
    store::{self, Store},
    view::View,
};
use conclave_runtime::{
    listen::{self, Listener},
    probes::{Probes, Stage},
    server,
    shutdown::Shutdown,
    tensor_thread,
};
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    api::{ApiState, Limits, ServedModel, Service},
    config::{Config, Hedge, Speculative},
    control::Controller,
    engine::{Drafter, Engine},
    kv_memory,
    load::{Reporter, SentRows},
    metrics::{self, EngineCounters, PlacementMetrics},
    moe::{Exchange, Hedging},
    registration::Registration,
    scheduler::{self, blocks::BlockPool},
    stall::Stall,
    workers::Workers,
};

/// The service this process is there for.
const SERVICE: &str = "conclave.inference.v1.Inference";
/// How long the engine may take to notice that it shall stop: it looks between two products.
const ENGINE_GRACE: Duration = Duration::from_secs(5);
/// How long a registration that is under way may hold up a process that was told to end.
const JOIN_GRACE: Duration = Duration::from_secs(2);

/// How often a router that is not ready says what it waits for.
const TELL_WAIT: Duration = Duration::from_secs(10);

/// Why a router could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port could not be bound.
    #[error(transparent)]
    Listen(#[from] listen::Error),
    /// No name could be made from the host's.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The device is not there.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// The checkpoint is not whole.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// tokenizer.json cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// generation_config.json cannot be used.
    #[error(transparent)]
    Generation(#[from] model_config::Error),
    /// The latent cache holds nothing.
    #[error(transparent)]
    KvMemory(#[from] kv_memory::Error),
    /// The store cannot be spoken to.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The cluster serves another model.
    #[error("this router may not join the cluster: {0}")]
    Model(#[from] IdentityError),
    /// A thread could not be started.
    #[error("a thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
    /// The engine ended or panicked.
    #[error("the engine ended: {0}")]
    Engine(String),
    /// The public listener failed.
    #[error(transparent)]
    Server(#[from] server::Error),
}

/// A router that is registered and serves.
#[derive(Debug)]
pub struct Router {
    id: RouterId,
    listen: SocketAddr,
    probes: Probes,
    workers: Workers,
    /// What must be in reach: experts in each of these layers.
    experts: (Vec<LayerIdx>, u32),
    registration: Registration,
    reporter: Reporter,
    election: Election,
    server: JoinHandle<Result<(), server::Error>>,
    engine: tensor_thread::Answer<()>,
    /// Ends the public listener.
    closing: CancellationToken,
    /// Ends what outlives the requests: engine, links, controller, view.
    end: CancellationToken,
}

/// Starts a router; `None` when it was told to end before it had joined the cluster.
pub async fn start(config: &Config, shutdown: &Shutdown) -> Result<Option<Router>, Error> {
    let listener = listen::bind(&config.listen)?;
    let probes = Probes::serve(listen::bind(&config.admin_listen)?, SERVICE).await;
    let draining = shutdown.draining();
    let prepared = tokio::select! {
        prepared = prepare(config, &probes) => prepared?,
        () = draining.cancelled() => return Ok(None),
    };
    // Not dropped half-way at once: a record that is already written would outlive the process by its lease.
    tokio::select! {
        router = serve(config, shutdown, listener, probes, prepared) => router.map(Some),
        () = shutdown.grace(JOIN_GRACE) => Ok(None),
    }
}

/// What stands before the cluster hears of this router.
struct Prepared {
    model: Arc<ServedModel>,
    experts: (Vec<LayerIdx>, u32),
    store: Arc<dyn Store>,
    keys: Keys,
    view: View,
    workers: Workers,
    sent: Arc<SentRows>,
    placement: Arc<PlacementMetrics>,
    scheduler: scheduler::Handle,
    /// Tokens that one sequence may have.
    context_tokens: usize,
    engine: tensor_thread::Answer<()>,
    end: CancellationToken,
}

async fn prepare(config: &Config, probes: &Probes) -> Result<Prepared, Error> {
    config.device.open()?;
    let dir = config.model.clone();
    let opened = tokio::task::spawn_blocking(move || open(&dir));
    let (checkpoint, mut model) = opened.await.map_err(std::io::Error::other)??;
    if let Some(name) = &config.model_name {
        model.name.clone_from(name);
    }
    let identity = identity(&checkpoint, &model);
    let loaded = load_engine(config, checkpoint).await?;
    // Beyond this, a start only waits for others.
    probes.set(Stage::Started).await;
    let store = store::connect(&config.store)?;
    let keys = Keys::new(&config.cluster);
    model_key::agree(&*store, &keys, &identity).await?;

    let end = CancellationToken::new();
    let view = View::start(Arc::clone(&store), keys.clone(), end.clone()).await?;
    let experts = (identity.moe_layers.clone(), identity.experts);
    tokio::spawn(model_key::keep(Arc::clone(&store), keys.clone(), identity, view.subscribe()));
    let workers = Workers::start(view.subscribe(), model.config.hidden_size, end.clone())?;
    metrics::register(&probes.registry, workers.clone());
    let stall = Arc::new(Stall::default());
    let (scheduler, queue) = scheduler::queue(Arc::clone(&stall), config.max_waiting as usize);
    let sent = Arc::new(SentRows::new(model.config.moe_layers(), model.config.n_routed_experts));
    let exchange = Exchange {
        workers: workers.clone(),
        mode: config.combine,
        encoding: config.encoding(),
        hidden: model.config.hidden_size,
        patience: config.batch_timeout(),
        hedging: (config.hedge == Hedge::Auto).then(Hedging::default),
        sent: Arc::clone(&sent),
        stall,
    };
    let layers = match config.speculative {
        Some(Speculative::Mtp) => model.config.layers(),
        None => model.config.num_hidden_layers,
    };
    let sequences = config.limits().sequences;
    let blocks = kv_memory::blocks(config.kv_memory, &model.config, config.compute(), layers, sequences)?;
    let context_tokens = (blocks * BLOCK_TOKENS).min(model.config.max_position_embeddings);
    info!(blocks, tokens = blocks * BLOCK_TOKENS, compute = config.compute().describe(), "latent cache");
    if context_tokens < model.config.max_position_embeddings {
        let model_allows = model.config.max_position_embeddings;
        warn!(context_tokens, model_allows, "the latent cache is smaller than the model's context");
    }
    let plan = EnginePlan {
        layers,
        blocks,
        counters: EngineCounters::register(&probes.registry),
        exchange,
        queue,
        stop: end.clone(),
    };
    let engine = loaded.begin(plan)?;
    let placement = PlacementMetrics::register(&probes.registry);
    let model = Arc::new(model);
    Ok(Prepared { model, experts, store, keys, view, workers, sent, placement, scheduler, context_tokens, engine, end })
}

/// Reads all of the folder but the weights.
fn open(dir: &std::path::Path) -> Result<(Checkpoint, ServedModel), Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let model = ServedModel {
        name: checkpoint.name(),
        config: checkpoint.config().clone(),
        identity: checkpoint.identity()?,
        tokenizer: Tokenizer::load(dir)?,
        chat_template: ChatTemplate::load(dir)?,
        generation: GenerationConfig::load(dir, checkpoint.config().vocab_size)?,
    };
    Ok((checkpoint, model))
}

/// What every member of a cluster must agree on.
fn identity(checkpoint: &Checkpoint, model: &ServedModel) -> ModelIdentity {
    let config: &ModelConfig = &model.config;
    ModelIdentity::new(
        checkpoint.name(),
        [model.identity.config_digest.clone(), model.identity.checkpoint_digest.clone()],
        config.layers(),
        config.moe_layers(),
        config.n_routed_experts,
        checkpoint.expert_bytes(),
    )
}

/// The router's half of the model, and what guesses tokens ahead where that is wanted and there.
fn load(
    checkpoint: &Checkpoint,
    compute: Compute,
    speculative: Option<Speculative>,
) -> Result<(Transformer, Option<Drafter>), checkpoint::Error> {
    let transformer = Transformer::load(checkpoint, compute, |layers| tracing::debug!(layers, "loaded"))?;
    let mtp = match speculative {
        Some(Speculative::Mtp) => Mtp::load(checkpoint, &transformer)?,
        None => None,
    };
    if speculative.is_some() && mtp.is_none() {
        let announced = checkpoint.lacks_mtp();
        info!(announced, "this checkpoint has no multi-token-prediction module: nothing is guessed");
    }
    Ok((transformer, mtp.map(Drafter::new)))
}

/// What the engine is made of beside the checkpoint.
struct EnginePlan {
    layers: usize,
    blocks: usize,
    counters: Arc<EngineCounters>,
    exchange: Exchange,
    queue: scheduler::Queue,
    stop: CancellationToken,
}

/// The engine's thread with the weights mapped; it waits for the rest of what it is made of.
struct LoadedEngine {
    begin: oneshot::Sender<EnginePlan>,
    thread: tensor_thread::Answer<()>,
}

impl LoadedEngine {
    fn begin(self, plan: EnginePlan) -> Result<tensor_thread::Answer<()>, Error> {
        let gone = |_| Error::Engine("its thread is gone".to_owned());
        self.begin.send(plan).map_err(gone).map(|()| self.thread)
    }
}

/// Starts the engine's thread and waits until it has mapped the weights.
async fn load_engine(config: &Config, checkpoint: Checkpoint) -> Result<LoadedEngine, Error> {
    let (compute, threads) = (config.compute(), config.threads);
    let (limits, micro_batch_rows, speculative) = (config.limits(), config.micro_batch_rows(), config.speculative);
    let (loaded, is_loaded) = oneshot::channel();
    let (begin, begins) = oneshot::channel();
    let thread = tensor_thread::spawn_local("engine", move || async move {
        init_thread(threads);
        match load(&checkpoint, compute, speculative) {
            Ok((transformer, drafter)) => {
                // Nobody waits any more where the process was told to end.
                let _ = loaded.send(Ok(()));
                let Ok(EnginePlan { layers, blocks, counters, exchange, queue, stop }) = begins.await else { return };
                let cache = KvCache::new(transformer.config(), compute, layers, blocks);
                let pool = BlockPool::new(blocks);
                let engine = Engine { transformer, exchange, cache, pool, limits, micro_batch_rows, drafter, counters };
                engine.run(queue, stop).await;
            }
            Err(error) => {
                let _ = loaded.send(Err(error));
            }
        }
    })?;
    match is_loaded.await {
        Ok(loaded) => loaded.map(|()| LoadedEngine { begin, thread }).map_err(Error::from),
        Err(_) => Err(Error::Engine(ended(thread.await))),
    }
}

async fn serve(
    config: &Config,
    shutdown: &Shutdown,
    listener: Listener,
    probes: Probes,
    prepared: Prepared,
) -> Result<Router, Error> {
    let Prepared {
        model,
        experts,
        store,
        keys,
        view,
        workers,
        sent,
        placement,
        scheduler,
        context_tokens,
        engine,
        end,
    } = prepared;
    let listen = listener.local_addr;
    let id = match &config.id {
        Some(id) => id.clone(),
        None => RouterId::parse(&default_name("router", &listen::host(), listen.port()))?,
    };
    let incarnation = Incarnation::fresh();
    let closing = CancellationToken::new();
    let limits = Limits {
        request_timeout: config.request_timeout(),
        context_tokens,
        answers_max: config.max_sequences as usize,
    };
    let policy = config.policy(model.config.n_group);
    let service = Service::new(ApiState { model, scheduler, limits, draining: shutdown.draining() });
    let (reflection, reflection_alpha) = server::reflection(&[SERVICE])?;
    let router = server::public()
        .add_service(probes.health.service())
        .add_service(reflection)
        .add_service(reflection_alpha)
        .add_service(service.into_server());
    let server = tokio::spawn(server::serve(router, listener, closing.clone(), config.drain_grace()));

    let record = RouterRecord {
        policy: Some(policy),
        ..RouterRecord::starting(
            id.clone(),
            incarnation,
            [config.advertise.clone().unwrap_or_else(|| listen::reachable(listen)), listen::reachable(probes.address)],
        )
    };
    let registration = Registration::join(Arc::clone(&store), &keys, config.lease_ttl(), record, &workers).await?;
    let election = Election::run(Arc::clone(&store), &keys, id.clone(), incarnation, config.lease_ttl(), end.clone());
    let times = (config.lease_ttl(), config.load_window());
    let reporter = Reporter::start(sent, (Arc::clone(&store), &keys), &id, times);
    let controller = Controller { store, keys, author: id.clone(), policy, metrics: placement };
    let controlling = controller.run(view.subscribe(), election.is_leader(), end.clone());
    tokio::spawn(async move {
        controlling.await;
        // The view lives as long as somebody follows it.
        drop(view);
    });
    Ok(Router { id, listen, probes, workers, experts, registration, reporter, election, server, engine, closing, end })
}

impl Router {
    /// Serves until told to drain, then leaves in order. Fails when the engine or the listener ends by itself.
    pub async fn run(mut self, shutdown: &Shutdown) -> Result<(), Error> {
        info!(id = %self.id, listen = %self.listen, admin = %self.probes.address, "joined the cluster");
        let draining = shutdown.draining();
        let result = tokio::select! {
            never = self.probes.serve_once(in_reach(&self.workers, &self.experts)) => match never {},
            () = draining.cancelled() => Ok(()),
            answer = &mut self.engine => Err(Error::Engine(ended(answer))),
            served = &mut self.server => Err(match served {
                Ok(Err(error)) => error.into(),
                Ok(Ok(())) | Err(_) => Error::Engine("the public listener ended by itself".to_owned()),
            }),
        };
        self.probes.set(Stage::Started).await;
        // Those who look routers up stop choosing this one before its port closes.
        self.election.resign().await;
        self.registration.leave().await;
        self.reporter.leave().await;
        self.closing.cancel();
        if result.is_ok() {
            // Waits for the streams in flight, at most for the grace.
            match self.server.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the public listener did not close cleanly"),
                Err(error) => tracing::error!(%error, "the public listener panicked while closing"),
            }
        }
        self.end.cancel();
        if result.is_ok() {
            match tokio::time::timeout(ENGINE_GRACE, self.engine).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "the engine did not stop cleanly"),
                Err(_) => tracing::warn!("the engine is still in a product; the process ends around it"),
            }
        }
        info!("left the cluster");
        result
    }
}

/// Comes back once every expert is in reach, which is when this router wants traffic; then it does so for good. An expert that is
/// missing later stops those who need it, and if all routers said that they want nothing, it would stop everybody.
async fn in_reach(workers: &Workers, (layers, experts): &(Vec<LayerIdx>, u32)) {
    let mut snapshots = workers.watch();
    let complete = snapshots.wait_for(|snapshot| snapshot.out_of_reach(layers, *experts) == 0);
    let mut complete = std::pin::pin!(complete);
    loop {
        match tokio::time::timeout(TELL_WAIT, &mut complete).await {
            Ok(Ok(_)) => return,
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => {
                let experts = workers.snapshot().out_of_reach(layers, *experts);
                info!(experts, "waiting for experts that no worker within reach holds");
            }
        }
    }
}

fn ended(answer: Result<(), tensor_thread::Error>) -> String {
    answer.map_or_else(|error| error.to_string(), |()| "it stopped".to_owned())
}
