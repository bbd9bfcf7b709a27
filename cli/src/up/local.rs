//! The life of a local cluster: prepared, started, watched until it serves, watched while it serves, stopped, cleaned
//! up. Decisions are made from the store's view and from children's deaths, never from a clock.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use conclave_model::checkpoint::Checkpoint;
use conclave_model::device::Device;
use conclave_placement::store::{self, memory::MemoryStore, serve::serve_memory};
use conclave_placement::view::View;
use conclave_placement::{Cluster, ClusterState, Keys, RouterId, Store, WorkerId};
use conclave_runtime::telemetry::{self, LogFormat};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::children::{Children, Role, Spec};
use super::progress::{Console, Progress};
use super::ready::{Expected, Readiness, Ready};
use super::{Args, INTERRUPTED, Interrupts};
use crate::{client, terminal};

/// The default of `--store`.
pub(super) const EMBEDDED: &str = "embedded";

const INFERENCE: &str = "conclave.inference.v1.Inference";

/// From the first SIGTERM to SIGKILL; children are told to drain a little faster, so that they end by themselves.
const GRACE: Duration = Duration::from_secs(10);
const CHILD_GRACE_SECONDS: &str = "8";

const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a long start says what it waits for.
const REMINDER: Duration = Duration::from_secs(15);

pub(super) struct Local {
    args: Args,
    console: Console,
    children: Children,
    /// Not started so far.
    specs: Vec<Spec>,
    expected: Expected,
    store: Arc<dyn Store>,
    store_spec: String,
    cluster: Cluster,
    view: View,
    /// Ends the view.
    watching: CancellationToken,
    /// Ends the embedded store, when all children have left it.
    serving: CancellationToken,
    started: Instant,
    ready_written: bool,
}

/// How a start-up ended.
enum Start {
    Ready(Arc<ClusterState>),
    /// A child, by index.
    Died(usize),
    Interrupted(&'static str),
}

impl Local {
    /// Everything before the first child: programs found, checkpoint readable, store reachable, names free.
    pub(super) async fn prepare(args: Args) -> anyhow::Result<Self> {
        let console = Console::stderr();
        if args.verbose {
            telemetry::init("conclave", args.log_format);
        }
        let started = Instant::now();
        let programs = Programs::beside_this()?;
        let model = std::path::absolute(&args.model)?;
        let folder = model.clone();
        // Reads headers from disk. A bad checkpoint is one clear line here rather than one from every child.
        tokio::task::spawn_blocking(move || Checkpoint::open(&folder).map(drop)).await??;
        if let Some(file) = &args.ready_file {
            // One left by a crash would tell that this cluster serves.
            let _ = std::fs::remove_file(file);
        }
        let serving = CancellationToken::new();
        let (store, store_spec) = open_store(&args.store, &serving).await?;
        let cluster = match &args.cluster {
            Some(cluster) => cluster.clone(),
            None => Cluster::parse(&format!("up-{}-{:08x}", std::process::id(), rand::random::<u32>()))?,
        };
        let watching = CancellationToken::new();
        let viewing = async {
            // The view waits for a store that is away; a person wants to hear why.
            store.get(&Keys::new(&cluster).model()).await?;
            View::start(Arc::clone(&store), Keys::new(&cluster), watching.clone()).await
        };
        let view = match tokio::time::timeout(STORE_TIMEOUT, viewing).await {
            Ok(view) => view.with_context(|| format!("cannot use the store {store_spec}"))?,
            Err(_) => bail!("the store {store_spec} does not answer"),
        };
        let expected = Expected {
            routers: (0..args.routers).map(|i| RouterId::parse(&format!("router-{i}"))).collect::<Result<_, _>>()?,
            workers: (0..args.workers).map(|i| WorkerId::parse(&format!("worker-{i}"))).collect::<Result<_, _>>()?,
            replicas: usize::from(args.replicas),
        };
        refuse_taken_names(&view.current(), &expected, &cluster)?;
        let specs = specs(&args, &programs, &model, &store_spec, &cluster, &expected);
        let children = Children::new(console.clone(), args.verbose);
        Ok(Self {
            args,
            console,
            children,
            specs,
            expected,
            store,
            store_spec,
            cluster,
            view,
            watching,
            serving,
            started,
            ready_written: false,
        })
    }

    /// From the first child to the reason to stop. Whatever it returns, [`Local::stop`] comes next.
    pub(super) async fn live(&mut self, interrupts: &mut Interrupts) -> anyhow::Result<ExitCode> {
        // No await in between: children must be started by the main thread.
        for spec in std::mem::take(&mut self.specs) {
            self.children.spawn(spec)?;
        }
        let start = self.start(interrupts).await;
        self.console.end_bars();
        let state = match start? {
            Start::Ready(state) => state,
            Start::Interrupted(signal) => {
                self.console.line(&format!("{signal} during start-up: stopping"));
                return Ok(ExitCode::from(INTERRUPTED));
            }
            Start::Died(index) => {
                self.report_death(index).await;
                return Ok(ExitCode::FAILURE);
            }
        };
        self.watching.cancel();
        self.announce(&state)?;
        Ok(self.serve(interrupts).await)
    }

    /// Waits until everything serves.
    async fn start(&mut self, interrupts: &mut Interrupts) -> anyhow::Result<Start> {
        let mut progress = Progress::new(&self.console, self.expected.workers.len());
        let mut changes = self.view.subscribe();
        let mut asked: Vec<RouterId> = Vec::new();
        let mut unhealthy = self.expected.routers.clone();
        let mut health = JoinSet::new();
        let mut reminder = tokio::time::interval(REMINDER);
        reminder.reset();
        loop {
            let state = Arc::clone(&changes.borrow_and_update());
            let readiness = Readiness::of(&state, &self.expected);
            progress.show(&readiness);
            for (id, record) in state.routers.iter().filter(|(id, _)| self.expected.routers.contains(id)) {
                if !asked.contains(id) {
                    asked.push(id.clone());
                    let (id, address) = (id.clone(), super::ready::reachable(&record.inference_address));
                    health.spawn(async move { client::until_serving(&address, INFERENCE).await.map(|()| id) });
                }
            }
            if readiness.is_complete() && unhealthy.is_empty() {
                return Ok(Start::Ready(state));
            }
            tokio::select! {
                change = changes.changed() => change.context("the view of the store ended")?,
                Some(healthy) = health.join_next() => {
                    let healthy = healthy.context("a health check failed")??;
                    unhealthy.retain(|id| *id != healthy);
                }
                index = self.children.next_exit() => return Ok(Start::Died(index)),
                signal = interrupts.next() => return Ok(Start::Interrupted(signal)),
                _ = reminder.tick() => {
                    self.console.line(&format!("waiting for {}", readiness.missing(&unhealthy)));
                }
            }
        }
    }

    /// Until a signal, or the death of the last router.
    async fn serve(&mut self, interrupts: &mut Interrupts) -> ExitCode {
        loop {
            tokio::select! {
                index = self.children.next_exit() => {
                    let child = self.children.get(index);
                    let (name, role) = (child.name.clone(), child.role);
                    let ended = child.ended.clone().unwrap_or_default();
                    let left = self.children.alive(role);
                    match role {
                        Role::Worker => self.console.line(&format!(
                            "{name} ended ({ended}); the cluster goes on with {}", terminal::plural(left, "worker"))),
                        Role::Router if left > 0 => self.console.line(&format!(
                            "{name} ended ({ended}); {} left", terminal::plural(left, "router"))),
                        Role::Router => {
                            self.console.line(&format!("{name} ended ({ended}); no router is left: stopping"));
                            return ExitCode::FAILURE;
                        }
                    }
                }
                signal = interrupts.next() => {
                    self.console.line(&format!("{signal}: stopping; once more kills at once"));
                    return ExitCode::SUCCESS;
                }
            }
        }
    }

    async fn report_death(&mut self, index: usize) {
        let child = self.children.get(index);
        let tail = child.tail().await;
        let (name, ended) = (child.name.clone(), child.ended.clone().unwrap_or_default());
        let lines = if tail.is_empty() { "it logged nothing" } else { "its last lines:" };
        self.console.line(&format!("error: {name} died during start-up ({ended}); {lines}"));
        for line in tail {
            self.console.line(&format!("{name} | {line}"));
        }
    }

    /// Writes the ready file and says how to talk to the cluster.
    fn announce(&mut self, state: &ClusterState) -> anyhow::Result<()> {
        let pid = |name: &str| self.children.iter().find(|child| child.name == name).map(|child| child.pid);
        let ready = Ready::of(state, &self.expected, &self.store_spec, pid)?;
        if let Some(file) = &self.args.ready_file {
            ready.write(file)?;
            self.ready_written = true;
        }
        let model = state.model.as_ref();
        let (layers, experts) = model.map_or((0, 0), |model| (model.moe_layers.len(), model.experts));
        let replicas = self.expected.replicas.min(self.expected.workers.len());
        let mut lines = vec![format!(
            "serving {} after {}: {}, {}, {experts} experts in each of {}, {} of each",
            model.map_or("?", |model| model.name.as_str()),
            terminal::duration(self.started.elapsed()),
            terminal::plural(ready.routers.len(), "router"),
            terminal::plural(ready.workers.len(), "worker"),
            terminal::plural(layers, "layer"),
            if replicas == 1 { "1 copy".to_owned() } else { format!("{replicas} copies") },
        )];
        lines.push(format!(
            "who holds what: conclave placement show --store {} --cluster {}",
            ready.store, self.cluster
        ));
        lines.push(format!("talk to it: conclave chat --endpoint {}", ready.inference));
        let mut output = terminal::Output::stdout();
        for line in lines {
            // Nobody has to listen; the cluster serves all the same.
            let _ = output.line(&line);
        }
        Ok(())
    }

    /// Routers, then workers; at most [`GRACE`] and a little.
    pub(super) async fn stop(&mut self) {
        self.children.stop(GRACE).await;
    }

    /// At once.
    pub(super) async fn kill(&mut self) {
        self.console.line("killing what is left");
        self.children.kill().await;
    }

    /// After the children: nothing of this cluster stays in the store or on disk. A cluster whose name was given keeps
    /// its model and plan, but not the records of our processes, should one have been killed before it took it back.
    pub(super) async fn clean_up(&mut self) {
        self.watching.cancel();
        if let Some(file) = self.args.ready_file.as_ref().filter(|_| self.ready_written) {
            let _ = std::fs::remove_file(file);
        }
        if self.args.store != EMBEDDED {
            match tokio::time::timeout(STORE_TIMEOUT, self.forget()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.say_left_behind(&error.to_string()),
                Err(_) => self.say_left_behind("it does not answer"),
            }
        }
        self.serving.cancel();
    }

    async fn forget(&self) -> Result<(), store::Error> {
        let keys = Keys::new(&self.cluster);
        if self.args.cluster.is_none() {
            self.store.delete_prefix(keys.prefix()).await?;
            self.store.delete_prefix(keys.history()).await?;
            return Ok(());
        }
        for id in &self.expected.routers {
            self.store.delete(&keys.router(id)).await?;
        }
        for id in &self.expected.workers {
            self.store.delete(&keys.worker(id)).await?;
        }
        Ok(())
    }

    fn say_left_behind(&self, why: &str) {
        self.console.line(&format!("cluster {} may have left keys in {}: {why}", self.cluster, self.store_spec));
    }
}

/// The embedded store on a free loopback port, or the one that `spec` names. With its spec for the children.
async fn open_store(spec: &str, serving: &CancellationToken) -> anyhow::Result<(Arc<dyn Store>, String)> {
    if spec != EMBEDDED {
        return Ok((store::connect(spec)?, spec.to_owned()));
    }
    let listener =
        tokio::net::TcpListener::bind("127.0.0.1:0").await.context("cannot listen for the embedded store")?;
    let spec = format!("etcd=http://{}", listener.local_addr()?);
    let store = MemoryStore::new();
    tokio::spawn(serve_memory(store.clone(), listener, serving.clone()));
    Ok((Arc::new(store), spec))
}

/// Two `up`s under one given name would fight over ids.
fn refuse_taken_names(state: &ClusterState, expected: &Expected, cluster: &Cluster) -> anyhow::Result<()> {
    let router = expected.routers.iter().find(|id| state.routers.contains_key(*id)).map(ToString::to_string);
    let worker = expected.workers.iter().find(|id| state.workers.contains_key(*id)).map(ToString::to_string);
    match router.or(worker) {
        Some(id) => {
            bail!("cluster {cluster} already has a {id}; stop it, wait for its lease to end, or choose another name")
        }
        None => Ok(()),
    }
}

/// The servers' programs.
struct Programs {
    router: PathBuf,
    worker: PathBuf,
}

impl Programs {
    fn beside_this() -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("cannot tell where this program lies")?;
        let find = |name: &str| {
            let path = this.with_file_name(name);
            if path.is_file() {
                Ok(path)
            } else {
                Err(anyhow::anyhow!("{} is missing: build or install it beside {}", path.display(), this.display()))
            }
        };
        Ok(Self { router: find("conclave-router")?, worker: find("conclave-expert-worker")? })
    }
}

/// All children: workers first, for they take longest.
fn specs(
    args: &Args,
    programs: &Programs,
    model: &Path,
    store: &str,
    cluster: &Cluster,
    expected: &Expected,
) -> Vec<Spec> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // Everybody may have all: who has nothing to compute lets others, and a layer's experts are never spread evenly.
    let threads = args.threads.map_or(cores, usize::from);
    let mut shared: Vec<OsString> = vec!["--model".into(), model.into(), "--die-with-parent".into()];
    let mut flag = |name: &str, value: String| shared.extend([name.into(), value.into()]);
    flag("--store", store.to_owned());
    flag("--cluster", cluster.to_string());
    flag("--threads", threads.to_string());
    flag("--admin-listen", "127.0.0.1:0".to_owned());
    flag("--drain-grace", CHILD_GRACE_SECONDS.to_owned());
    flag("--log-format", if args.log_format == LogFormat::Json { "json" } else { "text" }.to_owned());
    if let Some(dtype) = args.dtype {
        flag("--dtype", dtype.to_string());
    }
    if let Some(numerics) = args.numerics {
        flag("--numerics", numerics.to_string());
    }
    let device = |nth: usize| args.device.get(nth % args.device.len().max(1)).copied();
    let spec = |name: String, role: Role, program: &Path, listen: &str, device: Option<Device>, own: Vec<String>| {
        let mut args = shared.clone();
        args.extend(["--id".into(), name.clone().into(), "--listen".into(), listen.into()]);
        if let Some(device) = device {
            args.extend(["--device".into(), device.to_string().into()]);
        }
        args.extend(own.into_iter().map(OsString::from));
        Spec { name, role, program: program.to_owned(), args }
    };
    let mut own = vec!["--replicas".to_owned(), args.replicas.to_string()];
    // The first plan waits for all, so that nothing is loaded twice.
    own.extend(["--min-workers".to_owned(), args.workers.to_string()]);
    if let Some(combine) = &args.combine {
        own.extend(["--combine".to_owned(), combine.clone()]);
    }
    let host = args.listen.rsplit_once(':').map_or(args.listen.as_str(), |(host, _)| host);
    let further = format!("{host}:0");
    let workers = expected.workers.iter().enumerate().map(|(index, id)| {
        spec(id.to_string(), Role::Worker, &programs.worker, "127.0.0.1:0", device(index), Vec::new())
    });
    let routers = expected.routers.iter().enumerate().map(|(index, id)| {
        let listen = if index == 0 { &args.listen } else { &further };
        spec(id.to_string(), Role::Router, &programs.router, listen, device(0), own.clone())
    });
    workers.chain(routers).collect()
}
