//! Logs: events of `tracing` come in, one line each leaves on stderr, as text or JSON. `RUST_LOG` filters, by default
//! at info. Panics become events too, so that a JSON reader never meets a bare backtrace. Nothing goes to stdout.

use std::io::IsTerminal;

use clap::ValueEnum;
use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// Installs the subscriber for the whole process and logs one line with the process's name, version and pid. A second
/// call in the same process changes nothing.
pub fn init(process: &str, format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let installed = match format {
        LogFormat::Text => registry.with(lines.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    if installed.is_err() {
        return;
    }
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let location = panic.location().map(ToString::to_string);
        tracing::error!(
            thread = thread.name(),
            location,
            message = %crate::tensor_thread::panic_message(panic.payload()),
        );
    }));
    tracing::info!(process, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
}
