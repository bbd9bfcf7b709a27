//! What an operator decides for one router: flags, environment and config file come in through the runtime, checked
//! values go out. Nothing is opened or bound here.

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use conclave_model::{
    device::{Compute, Device, Dtype, Numerics},
    wire::Encoding,
};
use conclave_placement::{
    ids::{Cluster, RouterId},
    policy::{Planner, Policy, Rebalancing},
};
use conclave_runtime::{config, memory::Memory, telemetry::LogFormat};
use serde::{Deserialize, Serialize};

use crate::{moe::Mode, scheduler::policy::Limits};

/// Serves a model: attention and the gate here, experts on the workers of the cluster.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(name = "conclave-router", version)]
pub struct Config {
    /// Checkpoint folder (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Name that requests may ask for [default: the folder's]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// Cluster to join
    #[arg(long, value_name = "NAME", default_value = "default")]
    #[serde(serialize_with = "config::as_text")]
    pub cluster: Cluster,
    /// Where the cluster's state lives
    #[arg(long, value_name = "SPEC", default_value = "etcd=http://127.0.0.1:2379")]
    pub store: String,
    /// This router's name [default: from the host's name and the port]
    #[arg(long, value_name = "NAME")]
    #[serde(serialize_with = "config::as_optional_text", skip_serializing_if = "Option::is_none")]
    pub id: Option<RouterId>,
    /// Where attention is computed: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Number format of the computation: f32 or bf16
    #[arg(long, default_value = "bf16")]
    pub dtype: Dtype,
    /// reproducible: a row's bits do not depend on its batch, the default on processors; or fast, the default on GPUs
    #[arg(long)]
    pub numerics: Option<Numerics>,
    /// Threads for tensor work; 0 takes all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// Where clients connect; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    pub listen: String,
    /// Where probes, metrics and operators connect
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7600")]
    pub admin_listen: String,
    /// How clients reach this router [default: the bound listen address]
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Workers that should hold each expert
    #[arg(long, value_name = "R", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub replicas: u32,
    /// Who decides where experts live
    #[arg(long, value_enum, default_value = "balanced")]
    pub planner: PlannerName,
    /// Workers that the first plan waits for
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub min_workers: usize,
    /// Rows come back per assignment (placement does not show in the result) or summed by each worker (fewest bytes)
    #[arg(long, value_enum, default_value = "per-assignment")]
    pub combine: Mode,
    /// How rows travel to workers [default: as they are computed]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire: Option<Wire>,
    /// Deadline of a request that brings none, and the longest one believed, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub request_timeout: u64,
    /// How long a worker may take for one batch before its rows are sent elsewhere, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub batch_timeout: u64,
    /// Send a batch that is late, by what batches of its size usually take, to other holders too: auto (at most one in five,
    /// or ten a second) or off
    #[arg(long, value_enum, default_value = "auto")]
    pub hedge: Hedge,
    /// How long a time the load that experts are placed by is of, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub load_window: u64,
    /// How often experts may be moved because of their load, seconds; 0 never moves one that has a live holder
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86400))]
    pub rebalance_period: u64,
    /// Balancedness (mean / max load of workers) below which they are moved sooner than that
    #[arg(long, value_name = "RATIO", default_value_t = 0.5, value_parser = config::ratio)]
    pub rebalance_below: f64,
    /// What balancedness must gain for experts to be moved
    #[arg(long, value_name = "RATIO", default_value_t = 0.05, value_parser = config::ratio)]
    pub rebalance_gain: f64,
    /// Further copies per layer, for the experts with the most rows, where memory allows [default: an eighth of a layer's
    /// experts]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=65536))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redundant_experts: Option<u32>,
    /// Rows in one step, of all sequences together
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_batched_tokens: u32,
    /// Sequences in one step
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_sequences: u32,
    /// Memory for the latent cache, such as 8GiB [default: a fifth of what is free, at most what --max-sequences can use]
    #[arg(long, value_name = "BYTES")]
    #[serde(serialize_with = "config::as_optional_text", skip_serializing_if = "Option::is_none")]
    pub kv_memory: Option<Memory>,
    /// Rows that each of two micro-batches has at least, one computing while the other waits for experts; 0 never divides
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub micro_batch_rows: u32,
    /// Requests that may wait for their first step
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_waiting: u32,
    /// Guess tokens ahead with the checkpoint's own module, where it has one; what is drawn stays the same
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculative: Option<Speculative>,
    /// How long the cluster remembers a router that went silent, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_ttl: u64,
    /// How long a router that leaves may finish what it has accepted, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub drain_grace: u64,
    /// text or json
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Drain when the process that started this one ends
    #[arg(long)]
    pub die_with_parent: bool,
}

/// Whether late batches are sent twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Hedge {
    /// Within a budget.
    Auto,
    /// Never.
    Off,
}

/// What guesses tokens ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Speculative {
    /// The multi-token-prediction module of DeepSeek-V3's checkpoints.
    Mtp,
}

/// The name of an encoding on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value.
    Bf16,
    /// 1 byte a value and a scale per 128.
    Fp8,
}

/// The planners there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlannerName {
    /// By load and capacity, as few moves as the gain is worth
    Balanced,
    /// DeepSeek's expert-parallel load balancer: by load alone, for equal workers and --replicas 1
    Eplb,
}

impl Config {
    /// How this process computes.
    pub fn compute(&self) -> Compute {
        Compute::new(self.device, self.dtype, self.numerics)
    }

    /// How rows travel.
    pub fn encoding(&self) -> Encoding {
        match (self.wire, self.dtype) {
            (Some(Wire::F32), _) | (None, Dtype::F32) => Encoding::F32,
            (Some(Wire::Bf16), _) | (None, Dtype::Bf16) => Encoding::Bf16,
            (Some(Wire::Fp8), _) => Encoding::Fp8Block128,
        }
    }

    /// What the controller plans by. `groups` is the gate's number of groups of experts.
    pub fn policy(&self, groups: usize) -> Policy {
        Policy {
            planner: match self.planner {
                PlannerName::Balanced => Planner::Balanced,
                PlannerName::Eplb => Planner::Eplb { groups },
            },
            replicas: self.replicas,
            redundant: self.redundant_experts,
            min_workers: self.min_workers,
            rebalance: Rebalancing {
                period: Duration::from_secs(self.rebalance_period),
                below: self.rebalance_below,
                gain: self.rebalance_gain,
            },
        }
    }

    /// Of what the load is told.
    pub fn load_window(&self) -> Duration {
        Duration::from_secs(self.load_window)
    }

    /// What one step may hold.
    pub fn limits(&self) -> Limits {
        Limits { tokens: self.max_batched_tokens as usize, sequences: self.max_sequences as usize }
    }

    /// From how many rows on a step is divided.
    pub fn micro_batch_rows(&self) -> Option<usize> {
        (self.micro_batch_rows > 0).then_some(self.micro_batch_rows as usize)
    }

    /// Default and longest deadline of a request.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout)
    }

    /// How long a worker may take for a batch.
    pub fn batch_timeout(&self) -> Duration {
        Duration::from_secs(self.batch_timeout)
    }

    /// Of this router's lease.
    pub fn lease_ttl(&self) -> Duration {
        Duration::from_secs(self.lease_ttl)
    }

    /// For what was accepted before the drain.
    pub fn drain_grace(&self) -> Duration {
        Duration::from_secs(self.drain_grace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        use clap::CommandFactory;
        Config::command().debug_assert();
    }

    #[test]
    fn rows_travel_as_they_are_computed_unless_told_otherwise() {
        let encoding = |args: &[&str]| {
            let args = ["conclave-router", "--model", "m"].iter().chain(args);
            Config::try_parse_from(args).expect("valid").encoding()
        };
        assert_eq!(encoding(&[]), Encoding::Bf16);
        assert_eq!(encoding(&["--dtype", "f32"]), Encoding::F32);
        assert_eq!(encoding(&["--dtype", "f32", "--wire", "fp8"]), Encoding::Fp8Block128);
    }
}
