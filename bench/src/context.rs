//! What a longer context costs: a local cluster of one router and two workers, bf16, one sequence. Out, by context: the
//! time to the first token, the time per token after it, and the most memory that the router had so far. Contexts
//! ascend, so that this maximum belongs to the longest so far. Where the checkpoint's context is too short for one of
//! them, all are measured on a second one too, of DeepSeek-V2-Lite's attention, made for this run.

use std::fmt;
use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint;
use crate::cluster::{Cluster, WORKERS, measured};
use crate::prompts::Prompts;
use crate::stats::Samples;

/// Tokens of prompt and answer together.
const CONTEXTS: [usize; 3] = [512, 4096, 16_384];
/// Drawn at the end of each context.
const TOKENS: u32 = 16;
/// Of each context, with a prompt of its own each; the longest takes a minute or more for one.
const ANSWERS: usize = 3;

#[derive(Debug)]
pub(crate) struct Report(Vec<Row>);

/// One context of one checkpoint.
#[derive(Debug)]
struct Row {
    model: String,
    context: usize,
    first_token_ms: Samples,
    per_token_ms: Samples,
    router_peak_rss: u64,
}

/// Measures `model` as far as its context goes, and a made checkpoint where that is not far enough.
pub(crate) async fn measure(model: &Path) -> anyhow::Result<Report> {
    let mut rows = of_checkpoint(model, &model.display().to_string()).await?;
    if rows.len() < CONTEXTS.len() {
        eprintln!("context: making a checkpoint with a longer context");
        let scratch = tempfile::tempdir()?;
        let folder = scratch.path().to_owned();
        tokio::task::spawn_blocking(move || checkpoint::long_context(&folder)).await??;
        rows.extend(of_checkpoint(scratch.path(), checkpoint::LONG_CONTEXT).await?);
    }
    Ok(Report(rows))
}

async fn of_checkpoint(model: &Path, name: &str) -> anyhow::Result<Vec<Row>> {
    measured(model, async |cluster| ascending(cluster, name).await).await
}

async fn ascending(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<Row>> {
    let served = cluster.model().await?;
    let mut prompts = Prompts::new(served.vocab_size);
    // Warms up.
    cluster.generate(&prompts.draw(TOKENS as usize), TOKENS).await?;
    let mut rows = Vec::new();
    for context in CONTEXTS.into_iter().filter(|context| *context <= served.context_tokens as usize) {
        let (mut first_token_ms, mut per_token_ms) = (Samples::default(), Samples::default());
        for answer in 1..=ANSWERS {
            eprintln!("context: {name}, {context} tokens, answer {answer} of {ANSWERS}");
            let answer = cluster.generate(&prompts.draw(context - TOKENS as usize), TOKENS).await?;
            first_token_ms.push(answer.first_token.as_secs_f64() * 1e3);
            for pair in answer.arrivals.windows(2) {
                per_token_ms.push((pair[1] - pair[0]).as_secs_f64() * 1e3);
            }
        }
        let router_peak_rss = cluster.router_peak_rss()?;
        rows.push(Row { model: name.to_owned(), context, first_token_ms, per_token_ms, router_peak_rss });
    }
    Ok(rows)
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let rows = self.0.iter().map(|row| {
            json!({
                "model": row.model, "context_tokens": row.context, "first_token_ms": row.first_token_ms.to_json(),
                "per_token_ms": row.per_token_ms.to_json(), "router_peak_rss_bytes": row.router_peak_rss,
            })
        });
        json!({
            "dtype": "bf16", "workers": WORKERS, "tokens": TOKENS, "answers": ANSWERS, "rows": rows.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "By context, bf16, one sequence, router and {WORKERS} workers; medians of {ANSWERS} answers of {TOKENS} tokens."
        )?;
        let mut model = "";
        for row in &self.0 {
            if row.model != model {
                model = &row.model;
                let (context, first, token) = ("context, tokens", "first token, ms", "a token, ms");
                writeln!(f, "{model}")?;
                writeln!(f, "{context:>16} {first:>17} {token:>13} {:>24}", "router's peak RSS, MiB")?;
            }
            let (first, token) = (row.first_token_ms.median(), row.per_token_ms.median());
            writeln!(f, "{:>16} {first:>17.0} {token:>13.1} {:>24}", row.context, row.router_peak_rss >> 20)?;
        }
        Ok(())
    }
}
