//! The peers: other programs that serve the same checkpoint on the same cores, each run as its authors would. In: a
//! checkpoint and what to measure. Out: rates, or the reason why a peer cannot be had here. Nothing of ours is between.

mod llama;
mod transformers;

use std::fmt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use conclave_model::device::Device;
use tokio::process::Command;

pub(crate) use llama::{Llama, Quantity};
pub(crate) use transformers::Transformers;

/// A checkpoint loaded from disk and timed, several times over. Whoever takes longer is left out, so that
/// the rest is reached.
const WITHIN: Duration = Duration::from_secs(600);

/// What is measured of everybody.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workload {
    /// Decoded at once.
    pub(crate) streams: [usize; 3],
    /// Tokens of each stream's prompt, and drawn after it.
    pub(crate) prompt: usize,
    pub(crate) tokens: u32,
    /// Tokens of the one long prompt.
    pub(crate) prefill: usize,
    pub(crate) threads: usize,
    pub(crate) device: Device,
}

/// Tokens per second.
#[derive(Debug, Clone)]
pub(crate) struct Rates {
    /// In the order of the workload's streams, all streams together.
    pub(crate) decode: Vec<f64>,
    pub(crate) prefill: f64,
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1?} and {:.1} tokens/s", self.decode, self.prefill)
    }
}

/// What lies in `.deps/bench`, where the set-up step that stamps `stamp` was finished.
fn brought(stamp: &str, file: &str) -> anyhow::Result<PathBuf> {
    let deps = checkout()?.join(".deps");
    let path = deps.join("bench").join(file);
    // Written last, so a set-up that broke off is not taken for one.
    let complete = deps.join("stamps").join(stamp).exists() && path.exists();
    ensure!(complete, "it is not in .deps/bench: deploy/setup.sh {stamp} brings it");
    Ok(path)
}

/// The version of `package` in one of the set-up's lists, for a table.
pub(crate) fn version(list: &str, package: &str) -> Option<String> {
    let text = std::fs::read_to_string(checkout().ok()?.join("deploy/setup").join(list)).ok()?;
    let pinned = text.lines().find_map(|line| line.strip_prefix(package)?.strip_prefix("=="))?;
    Some(pinned.split_whitespace().next()?.to_owned())
}

fn checkout() -> anyhow::Result<PathBuf> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(folder.parent().context("this crate lies in no checkout")?.to_owned())
}

/// What the program prints, once it has ended well.
async fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(WITHIN, running).await;
    let output = output.with_context(|| format!("it takes longer than {} s", WITHIN.as_secs()))??;
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.trim_end().lines().last().unwrap_or("it said nothing");
    ensure!(output.status.success(), "it ended with {}: {last}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}
