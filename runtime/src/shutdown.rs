//! Signals: SIGTERM or SIGINT comes in, a token that says "drain" goes out. A second signal ends the process at once
//! with status 130. What draining means is decided by whoever holds the token, never here.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The process's wish to end. Cheap to clone; all clones share one state.
#[derive(Debug, Clone)]
pub struct Shutdown {
    draining: CancellationToken,
    /// By a signal, after which whoever sent it counts the seconds.
    signalled: CancellationToken,
}

impl Shutdown {
    /// Listens for SIGTERM and SIGINT on the current tokio runtime. Where a handler cannot be installed the signal
    /// keeps its default meaning and ends the process without a drain; that is logged.
    pub fn on_signals() -> Self {
        let shutdown = Self::manual();
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => {
                tokio::spawn(watch(terminate, interrupt, shutdown.clone()));
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "cannot listen for signals: SIGTERM and SIGINT will end this process at once");
            }
        }
        shutdown
    }

    /// Begins only when told to by [`Shutdown::begin`]: for tests, and for processes inside a process.
    pub fn manual() -> Self {
        Self { draining: CancellationToken::new(), signalled: CancellationToken::new() }
    }

    /// Starts the drain as a signal would, for a process that must end for a reason of its own.
    pub fn begin(&self) {
        self.draining.cancel();
    }

    /// Cancelled once the process shall take nothing new.
    pub fn draining(&self) -> CancellationToken {
        self.draining.clone()
    }

    /// Cancelled by the first signal, also where the process drains already for a reason of its own.
    pub fn signalled(&self) -> CancellationToken {
        self.signalled.clone()
    }

    /// Ends `limit` after the drain began: the moment to stop waiting for what is still in flight.
    pub async fn grace(&self, limit: Duration) {
        self.draining.cancelled().await;
        tokio::time::sleep(limit).await;
    }
}

async fn watch(mut terminate: Signal, mut interrupt: Signal, shutdown: Shutdown) {
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let signal = next().await;
    tracing::info!(signal, "draining; a second signal ends the process at once");
    shutdown.signalled.cancel();
    shutdown.begin();
    let signal = next().await;
    tracing::warn!(signal, "second signal: leaving without a drain");
    // The operator asked for exactly this: no drain and no Drop.
    #[allow(clippy::disallowed_methods)]
    std::process::exit(130);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn grace_waits_for_the_beginning_of_the_drain() {
        let shutdown = Shutdown::manual();
        let mut over = std::pin::pin!(shutdown.grace(Duration::ZERO));
        assert!(futures::poll!(&mut over).is_pending(), "nothing drains yet");
        shutdown.begin();
        assert!(shutdown.draining().is_cancelled());
        over.await;
    }
}
