//! The admin port of a process, from its first moment to its last, so that a probe can see it start and drain.
//!
//! In: how far the process is. Out: the same, as startup and readiness, and as gRPC health of one service and of the whole
//! process. Never here: a decision about it.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, AdminState, Registry},
    health::Health,
    listen::Listener,
};

/// How far a process is, by what it has done and not by how its peers or the store are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reads what it needs to run at all.
    Starting,
    /// Has that, and wants no traffic: not yet, or not any more.
    Started,
    /// Wants traffic.
    Serving,
}

/// What probes and scrapes see.
#[derive(Debug)]
pub struct Probes {
    /// Where they connect.
    pub address: SocketAddr,
    /// To serve on other ports too.
    pub health: Health,
    /// To register metrics with.
    pub registry: Registry,
    service: &'static str,
    stage: watch::Sender<Stage>,
}

impl Probes {
    /// Serves the admin port until the process ends. `service` is the full name of what this process is there for.
    pub async fn serve(listener: Listener, service: &'static str) -> Self {
        let (stage, is_at) = watch::channel(Stage::Starting);
        let (health, registry) = (Health::new().await, admin::registry());
        health.set(service, false).await;
        let state = AdminState { stage: is_at, registry: Arc::clone(&registry), health: health.clone() };
        let address = listener.local_addr;
        tokio::spawn(async move {
            if let Err(error) = admin::serve(listener, state, CancellationToken::new()).await {
                tracing::error!(%error, "the admin port is gone");
            }
        });
        Self { address, health, registry, service, stage }
    }

    /// Wants traffic from when `reached` comes back. Never comes back itself: to be raced against what ends the process.
    pub async fn serve_once(&self, reached: impl Future<Output = ()>) -> Infallible {
        reached.await;
        self.set(Stage::Serving).await;
        tracing::info!("ready");
        std::future::pending().await
    }

    /// Says how far the process is.
    pub async fn set(&self, stage: Stage) {
        self.stage.send_replace(stage);
        let serving = stage == Stage::Serving;
        self.health.set(self.service, serving).await;
        self.health.set("", serving).await;
    }
}
