//! A local cluster as a user starts it: `conclave up` as a child process. In: a checkpoint and a number of workers. Out:
//! addresses, token times of one answer, the router's memory. Nothing here knows how the cluster works.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use conclave_model::device::Device;
use conclave_proto::inference::v1 as pb;
use conclave_proto::inference::v1::generate_response::Event;
use conclave_proto::inference::v1::inference_client::InferenceClient;
use conclave_runtime::channel;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tonic::transport::Channel;

/// Loading a checkpoint from a cold disk takes a while.
const START_WITHIN: Duration = Duration::from_secs(300);
/// Longer than the drain grace of every process in it.
const STOP_WITHIN: Duration = Duration::from_secs(60);
/// In the process's own folder.
const READY_FILE: &str = "ready.json";
/// Of what it said before it ended.
const LINES_TOLD: usize = 10;

/// One answer, as its client saw it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) first_token: Duration,
    /// When each token came.
    pub(crate) arrivals: Vec<Instant>,
    /// Of the prompt's tokens, those that the router found in its prefix cache.
    pub(crate) cached_tokens: u32,
}

/// A process's figures, by name and labels.
pub(crate) type Figures = BTreeMap<String, f64>;

/// Where it is reached.
#[derive(Debug)]
pub(crate) struct Cluster {
    inference: String,
    admin: String,
    router_pid: u64,
}

/// The process that serves it.
#[derive(Debug)]
struct Up {
    child: Child,
    /// What it says on stderr.
    log: PathBuf,
    scratch: TempDir,
}

/// Of every cluster that is measured.
pub(crate) const WORKERS: usize = 2;

/// Starts a cluster on the processor, measures it, stops it whatever came of that. An error where it ends meanwhile.
pub(crate) async fn measured<T>(
    model: &Path,
    measure: impl AsyncFnOnce(&Cluster) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    measured_on(Device::Cpu, model, measure).await
}

/// As [`measured`], all of it on `device`.
pub(crate) async fn measured_on<T>(
    device: Device,
    model: &Path,
    measure: impl AsyncFnOnce(&Cluster) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut up = Up::start(device, model)?;
    let measured = async {
        let cluster = up.ready().await?;
        tokio::select! {
            measured = measure(&cluster) => measured,
            // Whoever measures would count refused connections instead.
            error = up.ended() => Err(error),
        }
    };
    let measured = measured.await;
    let stopped = up.stop().await;
    let report = measured?;
    stopped?;
    Ok(report)
}

impl Up {
    /// One router and its workers with the embedded store, computing in bf16.
    fn start(device: Device, model: &Path) -> anyhow::Result<Self> {
        let scratch = tempfile::tempdir()?;
        let log = scratch.path().join("log");
        let child = Command::new(beside_this_program("conclave")?)
            .args(["up", "--workers", &WORKERS.to_string(), "--dtype", "bf16", "--listen", "127.0.0.1:0"])
            .args(["--device", &device.to_string(), "--model"])
            .arg(model)
            .arg("--ready-file")
            .arg(scratch.path().join(READY_FILE))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start conclave up")?;
        Ok(Self { child, log, scratch })
    }

    /// The cluster, once it serves; an error where it does not, or not in time.
    async fn ready(&mut self) -> anyhow::Result<Cluster> {
        let file = self.scratch.path().join(READY_FILE);
        let ready = tokio::select! {
            ready = tokio::time::timeout(START_WITHIN, content(&file)) => ready,
            error = self.ended() => return Err(error),
        };
        let ready = ready.map_err(|_| self.error(&format!("not ready within {START_WITHIN:?}")))?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("an address is missing in the ready file");
        let router_pid = ready["routers"][0]["pid"].as_u64().context("no router in the ready file")?;
        Ok(Cluster { inference: text(&ready["inference"])?, admin: text(&ready["admin"])?, router_pid })
    }

    /// Comes when the process has ended, though nobody stopped it.
    async fn ended(&mut self) -> anyhow::Error {
        match self.child.wait().await {
            Ok(status) => self.error(&format!("ended with {status}")),
            Err(error) => self.error(&error.to_string()),
        }
    }

    /// What happened, and what it said last.
    fn error(&self, happened: &str) -> anyhow::Error {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        anyhow!("conclave up: {happened}\n{}", lines[lines.len().saturating_sub(LINES_TOLD)..].join("\n"))
    }

    /// Drains it as Ctrl-C would.
    async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            kill_process(pid, Signal::TERM)?;
        }
        tokio::time::timeout(STOP_WITHIN, self.child.wait()).await.context("conclave up does not end")??;
        Ok(())
    }
}

impl Cluster {
    pub(crate) async fn client(&self) -> anyhow::Result<InferenceClient<Channel>> {
        Ok(InferenceClient::new(channel::internal(&self.inference)?.connect().await?))
    }

    /// What is served.
    pub(crate) async fn model(&self) -> anyhow::Result<pb::GetModelResponse> {
        Ok(self.client().await?.get_model(pb::GetModelRequest {}).await?.into_inner())
    }

    /// One greedy answer of exactly `tokens` tokens, timed where the tokens arrive: at the client.
    pub(crate) async fn generate(&self, prompt: &[u32], tokens: u32) -> anyhow::Result<Answer> {
        let ids = pb::TokenIds { ids: prompt.to_vec() };
        let request = pb::GenerateRequest {
            input: Some(pb::generate_request::Input::Tokens(ids)),
            sampling: Some(pb::SamplingParams { temperature: Some(0.0), ..Default::default() }),
            stop: Some(pb::StopParams { max_tokens: Some(tokens), ignore_eos: true, ..Default::default() }),
            ..Default::default()
        };
        let mut client = self.client().await?;
        let asked = Instant::now();
        let mut stream = client.generate(request).await?.into_inner();
        let (mut arrivals, mut cached_tokens) = (Vec::new(), 0);
        while let Some(message) = stream.message().await? {
            match message.event {
                Some(Event::Started(started)) => cached_tokens = started.cached_tokens,
                Some(Event::Tokens(drawn)) => arrivals.resize(arrivals.len() + drawn.tokens.len(), Instant::now()),
                _ => {}
            }
        }
        ensure!(arrivals.len() == tokens as usize, "the cluster drew {} tokens instead of {tokens}", arrivals.len());
        let first = arrivals.first().copied().context("no token was asked for")?;
        Ok(Answer { first_token: first - asked, arrivals, cached_tokens })
    }

    /// Every figure that the router gives to whoever scrapes it, by name and labels.
    pub(crate) async fn figures(&self) -> anyhow::Result<Figures> {
        let mut stream = TcpStream::connect(&self.admin).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let figure = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Ok(text.lines().filter(|line| !line.starts_with('#')).filter_map(figure).collect())
    }

    /// The most memory that the router had resident since it was started, bytes, as Linux counts it.
    pub(crate) fn router_peak_rss(&self) -> anyhow::Result<u64> {
        let file = format!("/proc/{}/status", self.router_pid);
        let status = std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{file} tells no VmHWM"))? * 1024)
    }
}

/// The ready file's content, once it is there.
async fn content(ready_file: &Path) -> Value {
    loop {
        // The file appears in one piece, but a reader may be faster than that on other file systems.
        if let Some(ready) = std::fs::read(ready_file).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            return ready;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The workspace's programs are built into one folder.
pub(crate) fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.exists(), "{} is not built: cargo build --workspace --bins", path.display());
    Ok(path)
}
