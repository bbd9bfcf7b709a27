//! llama.cpp: its own `llama-batched-bench`, built from source for this processor by `deploy/setup.sh llama`. In: a
//! checkpoint, converted once by llama.cpp's own converter (`peers/llama_convert.py`) into a file that is kept. Out:
//! the rates that it prints.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::process::Command;

use super::{Rates, Workload, brought, checkout, output_of};
use crate::checkpoint;

/// How the converted file stores weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quantity {
    Bf16,
    /// Eight bits a weight and a scale per 32: beside FP8 the format with as many bytes.
    Q8,
}

/// llama.cpp on this machine.
#[derive(Debug)]
pub(crate) struct Llama {
    program: PathBuf,
    python: PathBuf,
    script: PathBuf,
}

impl Llama {
    /// Finds it, or says how to get it.
    pub(crate) fn find() -> anyhow::Result<Self> {
        Ok(Self {
            program: brought("llama", "llama.cpp/build/bin/llama-batched-bench")?,
            python: brought("bench", "bin/python")?,
            script: checkout()?.join("bench/peers/llama_convert.py"),
        })
    }

    /// The checkpoint as llama.cpp reads it, made anew where the checkpoint is newer.
    pub(crate) async fn converted(&self, model: &Path, quantity: Quantity) -> anyhow::Result<PathBuf> {
        let kind = match quantity {
            Quantity::Bf16 => "bf16",
            Quantity::Q8 => "q8_0",
        };
        let name = model.file_name().context("a checkpoint folder has a name")?.to_string_lossy().into_owned();
        let folder = checkpoint::kept()?;
        std::fs::create_dir_all(&folder)?;
        let file = folder.join(format!("{name}-{kind}.gguf"));
        let written =
            |path: &Path| path.metadata().and_then(|about| about.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        if written(&file) <= written(&model.join("config.json")) {
            eprintln!("converting {name} for llama.cpp ({kind}), once");
            let mut command = Command::new(&self.python);
            output_of(command.arg(&self.script).arg(model).arg(&file).arg(kind)).await.context("converting")?;
        }
        Ok(file)
    }

    /// One round.
    pub(crate) async fn measure(&self, file: &Path, work: Workload) -> anyhow::Result<Rates> {
        let streams = work.streams.map(|streams| streams.to_string()).join(",");
        let decoded = self.run(file, work, work.prompt, work.tokens, &streams).await?;
        ensure!(decoded.len() == work.streams.len(), "it printed {} lines", decoded.len());
        let prefilled = self.run(file, work, work.prefill, 1, "1").await?;
        let rate = |line: &Value, key: &str| line[key].as_f64().with_context(|| format!("it printed no {key}"));
        Ok(Rates {
            decode: decoded.iter().map(|line| rate(line, "speed_tg")).collect::<anyhow::Result<_>>()?,
            prefill: rate(prefilled.first().context("it printed nothing")?, "speed_pp")?,
        })
    }

    /// The lines of JSON that it prints, one a number of streams.
    async fn run(
        &self,
        file: &Path,
        work: Workload,
        prompt: usize,
        tokens: u32,
        streams: &str,
    ) -> anyhow::Result<Vec<Value>> {
        let most = work.streams.iter().max().map_or(1, |streams| streams * (work.prompt + work.tokens as usize));
        let context = most.max(work.prefill + 1).next_multiple_of(256);
        let run = async |repack: &[&str]| {
            let mut command = Command::new(&self.program);
            command.arg("-m").arg(file).args(["-c", &context.to_string(), "-npp", &prompt.to_string()]);
            command.args(["-ntg", &tokens.to_string(), "-npl", streams, "--output-format", "jsonl"]);
            command.args(["-t", &work.threads.to_string(), "-tb", &work.threads.to_string()]).args(repack);
            output_of(command.env("GGML_NO_BACKTRACE", "1")).await
        };
        // Its repacking for AMX aborts on experts in Q8_0 (an assertion of its scheduler); without it the same file runs.
        let printed = match run(&[]).await {
            Ok(printed) => printed,
            Err(error) => {
                eprintln!("llama.cpp: {error:#}; again with --no-repack");
                run(&["--no-repack"]).await?
            }
        };
        let lines = printed.lines().filter(|line| line.starts_with('{'));
        lines.map(|line| serde_json::from_str(line).with_context(|| format!("it printed {line:?}"))).collect()
    }
}
