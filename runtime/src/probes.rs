//! The admin port of a process, from its first moment to its last, so that a probe can see it start and drain.
//!
//! In: whether the process wants traffic. Out: the same, as readiness and as gRPC health of one service and of the
//! whole process. Never here: a decision about it.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, AdminState, Registry},
    health::Health,
    listen::Listener,
};

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
    ready: watch::Sender<bool>,
}

impl Probes {
    /// Serves the admin port until the process ends. `service` is the full name of what this process is there for.
    pub async fn serve(listener: Listener, service: &'static str) -> Self {
        let (ready, is_ready) = watch::channel(false);
        let (health, registry) = (Health::new().await, admin::registry());
        health.set(service, false).await;
        let state = AdminState { ready: is_ready, registry: Arc::clone(&registry), health: health.clone() };
        let address = listener.local_addr;
        tokio::spawn(async move {
            if let Err(error) = admin::serve(listener, state, CancellationToken::new()).await {
                tracing::error!(%error, "the admin port is gone");
            }
        });
        Self { address, health, registry, service, ready }
    }

    /// Says whether the process wants traffic.
    pub async fn set(&self, serving: bool) {
        self.ready.send_replace(serving);
        self.health.set(self.service, serving).await;
        self.health.set("", serving).await;
    }
}
