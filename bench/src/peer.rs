//! The peer: `peers/transformers_decode.py` in the environment that `deploy/setup.sh bench` makes. In: a checkpoint, token
//! ids, a number of threads. Out: its decode rate in one JSON object, of which only what is printed is read here.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::process::Command;

/// Three implementations of the experts, each loaded from disk and timed.
const WITHIN: Duration = Duration::from_secs(900);

/// transformers on this machine.
#[derive(Debug)]
pub(crate) struct Transformers {
    python: PathBuf,
    script: PathBuf,
}

/// The best of what transformers offers for the experts.
#[derive(Debug)]
pub(crate) struct Timed {
    pub(crate) tokens_per_second: f64,
    pub(crate) prefill_seconds: f64,
    pub(crate) experts: String,
    pub(crate) name: String,
    pub(crate) tokens: Vec<u32>,
}

impl Transformers {
    /// Finds it, or says how to get it.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("this crate lies in no checkout")?;
        let python = checkout.join(".deps/bench/bin/python");
        // Written last, so a set-up that broke off is not taken for one.
        let complete = checkout.join(".deps/stamps/bench").exists() && python.exists();
        ensure!(complete, "no transformers in .deps/bench: deploy/setup.sh bench brings it (2.5 GB)");
        Ok(Self { python, script: checkout.join("bench/peers/transformers_decode.py") })
    }

    /// Median decode rate of `rounds` greedy answers of `tokens` tokens in bf16.
    pub(crate) async fn decode(
        &self,
        model: &Path,
        prompt: &[u32],
        tokens: u32,
        threads: usize,
        rounds: usize,
    ) -> anyhow::Result<Timed> {
        let ids: Vec<_> = prompt.iter().map(u32::to_string).collect();
        let running = Command::new(&self.python)
            .arg(&self.script)
            .arg("--model")
            .arg(model)
            .args(["--prompt", &ids.join(","), "--tokens", &tokens.to_string()])
            .args(["--threads", &threads.to_string(), "--rounds", &rounds.to_string(), "--dtype", "bf16"])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(WITHIN, running).await.context("transformers takes too long")??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "transformers ended with {}: {}", output.status, last_line(&said));
        let report: Value = serde_json::from_slice(&output.stdout).context("transformers printed no JSON")?;
        let text = |key: &str| report[key].as_str().unwrap_or("?").to_owned();
        let number = |key: &str| report[key].as_f64().with_context(|| format!("transformers gave no {key}"));
        let tokens = report["tokens"].as_array().into_iter().flatten();
        Ok(Timed {
            tokens_per_second: number("tokens_per_second_decode")?,
            prefill_seconds: number("prefill_seconds")?,
            experts: text("experts_implementation"),
            name: text("peer"),
            tokens: tokens.filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect(),
        })
    }
}

fn last_line(text: &str) -> &str {
    text.trim_end().lines().last().unwrap_or("it said nothing")
}
