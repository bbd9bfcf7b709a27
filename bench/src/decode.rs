//! Decode tokens/s of a local cluster and of transformers: same checkpoint, same token ids, same cores, bf16, one
//! sequence, in turns, without the time to the first token. Out: medians, their ratio, and the rows each worker
//! computed. Where transformers cannot be had the reason is printed in its place, and the cluster is measured alone.

use std::fmt;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use crate::cluster::{Cluster, WORKERS, measured};
use crate::peer::{Timed, Transformers};
use crate::stats::Samples;

const TOKENS: u32 = 32;
/// The two take turns this often. transformers loads the checkpoint anew for each implementation of the experts it has.
const TURNS: usize = 3;
/// Answers a turn: the peer's are few because its slower implementations take half a minute each.
const ANSWERS: usize = 3;
const PEER_ANSWERS: usize = 1;
const PROMPT: &str = "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down the weather \
                      and the ships that passed. One evening in late November she saw";
#[derive(Debug)]
pub(crate) struct Report {
    model: String,
    cores: usize,
    prompt_tokens: usize,
    cluster: Side,
    rows_by_worker: Vec<(String, u64)>,
    /// Or why there is none.
    peer: Result<Peer, String>,
}

/// What was measured of one of the two.
#[derive(Debug, Default)]
struct Side {
    tokens_per_second: Samples,
    first_token_ms: Samples,
}

#[derive(Debug)]
struct Peer {
    side: Side,
    name: String,
    experts: String,
    /// Greedy tokens until the two disagree: rounding in bf16 decides close calls differently.
    tokens_in_common: usize,
}

/// Starts a cluster, measures both in turns, stops it.
pub(crate) async fn measure(model: &Path) -> anyhow::Result<Report> {
    measured(model, async |cluster| in_turns(cluster, model).await).await
}

async fn in_turns(cluster: &Cluster, model: &Path) -> anyhow::Result<Report> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let prompt = cluster.tokenize(PROMPT).await.context("cannot tokenize the prompt")?;
    // Warms up the cluster; the peer does so by itself in every turn.
    let first = cluster.generate(&prompt, TOKENS).await?;
    let rows_before = cluster.rows_by_worker().await?;
    let mut ours = Side::default();
    let mut theirs = Side::default();
    let mut peer = Transformers::find().map_err(|error| error.to_string());
    let mut last: Option<Timed> = None;
    for turn in 1..=TURNS {
        eprintln!("decode: turn {turn} of {TURNS}, the cluster");
        for _ in 0..ANSWERS {
            let answer = cluster.generate(&prompt, TOKENS).await?;
            ours.tokens_per_second.push(answer.tokens_per_second);
            ours.first_token_ms.push(answer.first_token.as_secs_f64() * 1e3);
        }
        if let Ok(transformers) = &peer {
            eprintln!("decode: turn {turn} of {TURNS}, transformers (a minute or more)");
            match transformers.decode(model, &prompt, TOKENS, cores, PEER_ANSWERS).await {
                Ok(timed) => {
                    theirs.tokens_per_second.push(timed.tokens_per_second);
                    theirs.first_token_ms.push(timed.prefill_seconds * 1e3);
                    last = Some(timed);
                }
                Err(error) => peer = Err(format!("{error:#}")),
            }
        }
    }
    let rows_by_worker = since(&rows_before, cluster.rows_by_worker().await?);
    let peer = peer.and_then(|_| last.ok_or_else(|| "it was never measured".to_owned())).map(|timed| Peer {
        tokens_in_common: first.ids.iter().zip(&timed.tokens).take_while(|(here, there)| here == there).count(),
        side: theirs,
        name: timed.name,
        experts: timed.experts,
    });
    let model = model.display().to_string();
    Ok(Report { model, cores, prompt_tokens: prompt.len(), cluster: ours, rows_by_worker, peer })
}

/// Rows computed after `before`, by worker.
fn since(before: &[(String, u64)], now: Vec<(String, u64)>) -> Vec<(String, u64)> {
    let earlier = |id: &str| before.iter().find(|(known, _)| known == id).map_or(0, |(_, rows)| *rows);
    now.into_iter().map(|(id, rows)| (id.clone(), rows.saturating_sub(earlier(&id)))).collect()
}

impl Side {
    fn to_json(&self) -> Value {
        json!({ "tokens_per_second": self.tokens_per_second.to_json(), "first_token_ms": self.first_token_ms.to_json() })
    }

    /// Median and range of the rate, and the median time to the first token.
    fn cells(&self) -> String {
        let rate = &self.tokens_per_second;
        let (median, slowest, fastest) = (rate.median(), rate.quantile(0.0), rate.quantile(1.0));
        format!("{median:>9.1} {:>15} {:>16.0}", format!("{slowest:.1}–{fastest:.1}"), self.first_token_ms.median())
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let rows: Vec<_> = self.rows_by_worker.iter().map(|(id, rows)| json!({ "worker": id, "rows": rows })).collect();
        let peer = match &self.peer {
            Ok(peer) => json!({
                "name": peer.name, "experts_implementation": peer.experts, "tokens_in_common": peer.tokens_in_common,
                "measured": peer.side.to_json(),
            }),
            Err(reason) => json!({ "missing": reason }),
        };
        json!({
            "model": self.model, "dtype": "bf16", "cores": self.cores, "workers": WORKERS, "tokens": TOKENS,
            "prompt_tokens": self.prompt_tokens, "turns": TURNS, "answers_a_turn": { "cluster": ANSWERS, "transformers": PEER_ANSWERS },
            "cluster": self.cluster.to_json(), "transformers": peer, "cluster_over_transformers": self.ratio(),
            "rows_by_worker": rows,
        })
    }

    fn ratio(&self) -> Option<f64> {
        let peer = self.peer.as_ref().ok()?;
        Some(self.cluster.tokens_per_second.median() / peer.side.tokens_per_second.median())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, cores, prompt_tokens, .. } = self;
        writeln!(
            f,
            "Decode of {model}, bf16, one sequence, {prompt_tokens} prompt tokens and {TOKENS} drawn, {cores} cores for each side,"
        )?;
        writeln!(f, "in {TURNS} turns; the time to the first token is apart.")?;
        writeln!(f, "{:<62} {:>9} {:>15} {:>16}", "", "tokens/s", "range", "first token, ms")?;
        writeln!(f, "{:<62} {}", format!("conclave, router and {WORKERS} workers"), self.cluster.cells())?;
        match &self.peer {
            Ok(peer) => {
                writeln!(f, "{:<62} {}", format!("{}, {} experts", peer.name, peer.experts), peer.side.cells())?;
                writeln!(f, "{:<62} {:>9.2}", "conclave ÷ transformers", self.ratio().unwrap_or(f64::NAN))?;
                writeln!(
                    f,
                    "Of {TOKENS} greedy tokens the first {} are the same on both sides.",
                    peer.tokens_in_common
                )?;
            }
            Err(reason) => writeln!(f, "transformers was not measured: {reason}")?,
        }
        let rows: Vec<_> = self.rows_by_worker.iter().map(|(id, rows)| format!("{id} {rows}")).collect();
        writeln!(f, "Rows computed: {}", rows.join(", "))
    }
}
