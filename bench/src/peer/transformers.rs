//! transformers: `peers/transformers_rates.py` in the environment that `deploy/setup.sh bench` makes. In: a checkpoint. Out:
//! for each quantity the best of the implementations of the experts that the machine offers.

use std::path::{Path, PathBuf};

use anyhow::Context;
use conclave_model::device::Device;
use serde_json::Value;
use tokio::process::Command;

use super::{Rates, Workload, brought, checkout, output_of};

/// transformers on this machine.
#[derive(Debug)]
pub(crate) struct Transformers {
    python: PathBuf,
    script: PathBuf,
}

impl Transformers {
    /// Finds it, or says how to get it.
    pub(crate) fn find() -> anyhow::Result<Self> {
        Ok(Self {
            python: brought("bench", "bin/python")?,
            script: checkout()?.join("bench/peers/transformers_rates.py"),
        })
    }

    /// One round in bf16, on the workload's device.
    pub(crate) async fn measure(&self, model: &Path, work: Workload) -> anyhow::Result<Rates> {
        let streams = work.streams.map(|streams| streams.to_string()).join(",");
        let mut command = Command::new(&self.python);
        command.arg(&self.script).arg("--model").arg(model).args(["--dtype", "bf16", "--streams", &streams]);
        command.args(["--prompt-tokens", &work.prompt.to_string(), "--tokens", &work.tokens.to_string()]);
        command.args(["--prefill", &work.prefill.to_string(), "--threads", &work.threads.to_string()]);
        if let Device::Cuda(index) = work.device {
            command.args(["--device", &format!("cuda:{index}")]);
        }
        let report: Value = serde_json::from_str(&output_of(&mut command).await?).context("it printed no JSON")?;
        let experts = report["experts"].as_object().context("it measured nothing")?;
        let best = |rate: &dyn Fn(&Value) -> Option<f64>| experts.values().filter_map(rate).fold(f64::NAN, f64::max);
        let decode =
            work.streams.map(|streams| best(&|measured| measured["decode"][streams.to_string().as_str()].as_f64()));
        let prefill = best(&|measured| measured["prefill"].as_f64());
        Ok(Rates { decode: decode.into(), prefill })
    }
}
