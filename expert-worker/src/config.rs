//! What an operator decides for one worker: flags, environment and config file come in through the runtime, checked
//! values go out. Nothing is opened or bound here.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use conclave_model::device::{Device, Dtype, Numerics};
use conclave_placement::ids::{Cluster, WorkerId};
use conclave_placement::state::Locality;
use conclave_runtime::config;
use conclave_runtime::telemetry::LogFormat;
use serde::Serialize;

use crate::memory::Limit;

/// Holds routed experts of one model and computes them for routers.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(name = "conclave-expert-worker", version)]
pub struct Config {
    /// Checkpoint folder (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Cluster to join
    #[arg(long, value_name = "NAME", default_value = "default")]
    #[serde(serialize_with = "config::as_text")]
    pub cluster: Cluster,
    /// Where the cluster's state lives
    #[arg(long, value_name = "SPEC", default_value = "etcd=http://127.0.0.1:2379")]
    pub store: String,
    /// This worker's name [default: from the host's name and the port]
    #[arg(long, value_name = "NAME")]
    #[serde(serialize_with = "config::as_optional_text", skip_serializing_if = "Option::is_none")]
    pub id: Option<WorkerId>,
    /// The machine it runs on: replicas of an expert are kept on different ones where that can be
    #[arg(long, value_name = "NAME", default_value = "")]
    pub host: String,
    /// What fails together with it, such as a rack or a zone: as with --host
    #[arg(long, value_name = "NAME", default_value = "")]
    pub zone: String,
    /// Where experts are computed: cpu or cuda:N
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
    /// Where routers connect; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7500")]
    pub listen: String,
    /// Where probes, metrics and operators connect
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    pub admin_listen: String,
    /// How routers reach this worker [default: the bound listen address]
    #[arg(long, value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Offer routers of this host no Unix socket beside the port; with --advertise there is none either
    #[arg(long)]
    pub no_local_socket: bool,
    /// Memory for experts: a size such as 16GiB; auto: most of what is free at the start, the default on GPUs; 0: no limit,
    /// the default on processors
    #[arg(long, value_name = "BYTES")]
    #[serde(serialize_with = "config::as_optional_text", skip_serializing_if = "Option::is_none")]
    pub memory: Option<Limit>,
    /// Batches that may wait for the tensor thread
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub queue: u32,
    /// How long the cluster remembers a worker that went silent, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_ttl: u64,
    /// How long a worker that is told to end may move its experts away and finish what it has accepted, seconds; one that is
    /// ordered to leave by `conclave placement drain` takes as long as it takes
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub drain_grace: u64,
    /// text or json
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Drain when the process that started this one ends
    #[arg(long)]
    pub die_with_parent: bool,
}

impl Config {
    pub fn locality(&self) -> Locality {
        Locality { host: self.host.clone(), zone: self.zone.clone() }
    }

    pub fn lease_ttl(&self) -> Duration {
        Duration::from_secs(self.lease_ttl)
    }

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
}
