//! gRPC health v1: what the process knows about itself comes in, the standard health service goes out. It reports what
//! it is told and probes nothing.

use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

/// The health of a process. Clones share one state, so one `Health` can be served on several ports.
#[derive(Debug, Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// Starts with the process as a whole (the empty service name) not serving.
    pub async fn new() -> Self {
        let health = Self { reporter: HealthReporter::new() };
        health.set("", false).await;
        health
    }

    /// Sets one service's health by its full name, such as `conclave.expert.v1.ExpertWorker`, or "" for the process.
    pub async fn set(&self, service: &str, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(service, status).await;
    }

    /// `grpc.health.v1.Health` to add to a server.
    pub fn service(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
            .max_decoding_message_size(crate::server::MAX_ADMIN_MESSAGE)
    }
}
