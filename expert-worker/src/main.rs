//! `conclave-expert-worker`: configuration, telemetry, start, ready, drain. The worker itself is in the library.
//!
//! Exit status: 0 after a drain, 1 when it could not start or serve or had to leave experts behind, 64 when the configuration
//! is wrong, 130 after a second signal.

use std::process::ExitCode;

use anyhow::anyhow;
use conclave_expert_worker::app;
use conclave_expert_worker::config::Config;
use conclave_runtime::shutdown::Shutdown;
use conclave_runtime::{config, parent, telemetry};

fn main() -> ExitCode {
    let config: Config = config::load("CONCLAVE");
    telemetry::init("conclave-expert-worker", config.log_format);
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Every error of ours says its cause itself.
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config) -> anyhow::Result<()> {
    if config.die_with_parent {
        parent::die_with_parent().map_err(|error| anyhow!("cannot follow the parent process: {error}"))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| anyhow!("cannot start tokio: {error}"))?;
    runtime.block_on(async {
        let shutdown = Shutdown::on_signals();
        match app::start(config, &shutdown).await? {
            Some(worker) => worker.run(&shutdown).await?,
            None => tracing::info!("told to end before joining the cluster"),
        }
        Ok(())
    })
}
