//! Decode and prefill of a whole cluster (a router and two workers) beside other programs on the same checkpoint and the
//! same cores or the same GPU, in turns. In: the demo checkpoint; DeepSeek-V2-Lite's layers in bf16 and in FP8 are made here. Out: tokens/s
//! of 1, 4 and 16 streams, all of them together and while all decode, and of one prompt of 512 tokens; and the ratio to the
//! best peer in each. Where a peer cannot be had the reason is printed in its place.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use conclave_model::device::Device;
use serde_json::{Value, json};

use crate::checkpoint::{self, Weights};
use crate::cluster::{Cluster, WORKERS, measured_on};
use crate::peer::{self, Llama, Quantity, Rates, Transformers, Workload};
use crate::prompts::Prompts;
use crate::serve::decode_rate;
use crate::stats::Samples;

const STREAMS: [usize; 3] = [1, 4, 16];
const PROMPT: usize = 32;
const TOKENS: u32 = 48;
const PREFILL: usize = 512;
/// Everybody is measured this often, one after the other.
const TURNS: usize = 2;

#[derive(Debug)]
pub(crate) struct Report {
    device: Device,
    threads: usize,
    models: Vec<OfModel>,
}

#[derive(Debug)]
struct OfModel {
    name: String,
    cluster: Side,
    peers: Vec<(String, Result<Side, String>)>,
}

/// What was measured of one side: tokens per second by number of streams, and of the long prompt.
#[derive(Debug, Default)]
struct Side {
    decode: [Samples; STREAMS.len()],
    prefill: Samples,
}

/// Who is beside the cluster on one checkpoint.
enum Peer {
    Transformers(Transformers),
    /// With the converted checkpoint.
    Llama(Llama, PathBuf),
}

/// Measures the demo checkpoint, where one is given, and those of DeepSeek-V2-Lite's layers.
pub(crate) async fn measure(device: Device, model: Option<&Path>) -> anyhow::Result<Report> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = Workload { streams: STREAMS, prompt: PROMPT, tokens: TOKENS, prefill: PREFILL, threads, device };
    let mut models = Vec::new();
    if let Some(model) = model {
        models.push(of_model(model, model.display().to_string(), Weights::Bf16, work).await?);
    }
    for (weights, format) in [(Weights::Bf16, "bf16"), (Weights::Fp8, "FP8 as stored")] {
        let folder = tokio::task::spawn_blocking(move || checkpoint::v2_lite(weights)).await??;
        models.push(of_model(&folder, format!("{}, {format}", checkpoint::V2_LITE_IS), weights, work).await?);
    }
    Ok(Report { device, threads, models })
}

async fn of_model(folder: &Path, name: String, weights: Weights, work: Workload) -> anyhow::Result<OfModel> {
    let mut peers = peers(folder, weights, work.device).await;
    let mut sides: Vec<(String, Result<Side, String>)> = peers
        .iter()
        .map(|(name, peer)| (name.clone(), peer.as_ref().map(|_| Side::default()).map_err(Clone::clone)))
        .collect();
    let mut ours = Side::default();
    for turn in 1..=TURNS {
        eprintln!("decode: {name}, turn {turn} of {TURNS}, the cluster");
        // Started anew each turn: nobody's memory and threads are beside those of whoever is measured.
        let rates = measured_on(work.device, folder, of_cluster).await?;
        eprintln!("decode: {rates}");
        ours.add(&rates);
        for ((label, peer), (_, side)) in peers.iter_mut().zip(&mut sides) {
            // Who could not do it once is not asked again.
            let (Ok(peer), Ok(measured)) = (peer, side.as_mut()) else { continue };
            eprintln!("decode: {name}, turn {turn} of {TURNS}, {label}");
            match peer.measure(folder, work).await {
                Ok(rates) => {
                    eprintln!("decode: {rates}");
                    measured.add(&rates);
                }
                Err(error) => *side = Err(format!("{error:#}")),
            }
        }
    }
    Ok(OfModel { name, cluster: ours, peers: sides })
}

/// Those that can compute from weights of this format.
async fn peers(folder: &Path, weights: Weights, device: Device) -> Vec<(String, Result<Peer, String>)> {
    let (quantity, format) = match weights {
        Weights::Bf16 => (Quantity::Bf16, "bf16"),
        Weights::Fp8 => (Quantity::Q8, "Q8_0"),
    };
    let version = |list, package| peer::version(list, package).unwrap_or_default();
    let prepared = async {
        ensure!(device == Device::Cpu, "it is built for processors here");
        let llama = Llama::find()?;
        let file = llama.converted(folder, quantity).await?;
        anyhow::Ok(Peer::Llama(llama, file))
    };
    // It is told by the package that carries its sources.
    let name = format!("llama.cpp (in {}), {format}", version("llama.txt", "llama-cpp-python"));
    let llama = (name, prepared.await.map_err(|error| format!("{error:#}")));
    let transformers = match weights {
        Weights::Bf16 => Transformers::find().map(Peer::Transformers).map_err(|error| format!("{error:#}")),
        Weights::Fp8 => Err("its FP8 products are kernels that it loads from elsewhere, for GPUs".to_owned()),
    };
    vec![llama, (format!("transformers {}, bf16", version("bench.txt", "transformers")), transformers)]
}

impl Peer {
    async fn measure(&self, folder: &Path, work: Workload) -> anyhow::Result<Rates> {
        match self {
            Self::Transformers(transformers) => transformers.measure(folder, work).await,
            Self::Llama(llama, file) => llama.measure(file, work).await,
        }
    }
}

/// As a client sees it.
async fn of_cluster(cluster: &Cluster) -> anyhow::Result<Rates> {
    let mut prompts = Prompts::new(cluster.model().await?.vocab_size);
    // Warms up, and brings every expert's weights into memory: so many rows choose all of them.
    cluster.generate(&prompts.draw(PREFILL), 8).await?;
    let mut decode = Vec::new();
    for streams in STREAMS {
        decode.push(decode_rate(cluster, &mut prompts, streams, PROMPT, TOKENS).await?);
    }
    let prompt = prompts.draw(PREFILL);
    let first = cluster.generate(&prompt, 1).await?.first_token;
    Ok(Rates { decode, prefill: PREFILL as f64 / first.as_secs_f64() })
}

impl Side {
    fn add(&mut self, rates: &Rates) {
        self.decode.iter_mut().zip(&rates.decode).for_each(|(samples, rate)| samples.push(*rate));
        self.prefill.push(rates.prefill);
    }

    /// Decode by streams, then the prefill.
    fn all(&self) -> impl Iterator<Item = &Samples> {
        self.decode.iter().chain([&self.prefill])
    }

    fn cells(&self) -> String {
        let cell = |samples: &Samples| {
            let (median, least, most) = (samples.median(), samples.quantile(0.0), samples.quantile(1.0));
            format!(" {:>22}", format!("{median:.1} ({least:.1}–{most:.1})"))
        };
        self.all().map(cell).collect()
    }

    fn to_json(&self) -> Value {
        let decode: Vec<_> = self.decode.iter().map(Samples::to_json).collect();
        json!({ "decode_tokens_per_second": decode, "prefill_tokens_per_second": self.prefill.to_json() })
    }
}

impl OfModel {
    /// Ours over the best peer's, decode by streams, then the prefill; NaN without a peer.
    fn ratios(&self) -> Vec<f64> {
        let best = |index: usize| {
            let peers = self.peers.iter().filter_map(|(_, side)| side.as_ref().ok());
            peers.filter_map(|side| Some(side.all().nth(index)?.median())).fold(f64::NAN, f64::max)
        };
        self.cluster.all().enumerate().map(|(index, ours)| ours.median() / best(index)).collect()
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let models = self.models.iter().map(|model| {
            let peers = model.peers.iter().map(|(name, side)| match side {
                Ok(side) => json!({ "name": name, "measured": side.to_json() }),
                Err(reason) => json!({ "name": name, "missing": reason }),
            });
            json!({
                "model": model.name, "cluster": model.cluster.to_json(), "peers": peers.collect::<Vec<_>>(),
                "cluster_over_best_peer": model.ratios(),
            })
        });
        json!({
            "streams": STREAMS, "prompt_tokens": PROMPT, "tokens": TOKENS, "prefill_tokens": PREFILL, "workers": WORKERS,
            "device": self.device, "threads": self.threads, "turns": TURNS, "models": models.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = self.threads;
        let on = match self.device {
            Device::Cpu => String::new(),
            gpu => format!(" and {gpu}"),
        };
        writeln!(
            f,
            "Tokens/s, medians of {TURNS} turns (range), {threads} cores{on} for each side; products in bf16. Decode of all streams together,"
        )?;
        writeln!(f, "{TOKENS} tokens after prompts of {PROMPT}; prefill of one prompt of {PREFILL}.")?;
        for model in &self.models {
            writeln!(f, "{}", model.name)?;
            let heads =
                STREAMS.map(|streams| if streams == 1 { "1 stream".to_owned() } else { format!("{streams} streams") });
            write!(f, "{:<34}", "")?;
            heads.iter().chain([&"prefill".to_owned()]).try_for_each(|head| write!(f, " {head:>22}"))?;
            writeln!(f)?;
            writeln!(f, "{:<34}{}", format!("conclave, router and {WORKERS} workers"), model.cluster.cells())?;
            for (name, side) in &model.peers {
                match side {
                    Ok(side) => writeln!(f, "{name:<34}{}", side.cells())?,
                    Err(reason) => writeln!(f, "{name} was not measured: {reason}")?,
                }
            }
            write!(f, "{:<34}", "conclave ÷ the best of the others")?;
            model.ratios().iter().try_for_each(|ratio| write!(f, " {ratio:>22.2}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}
