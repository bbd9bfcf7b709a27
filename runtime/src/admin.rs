//! The admin port: probes and scrapes come in over plain HTTP (`/livez`, `/startupz`, `/readyz`, `/metrics`) and gRPC
//! health on the same port; state the process already has goes out. It changes nothing and never shows a request's content.

use std::sync::Arc;
use std::time::Duration;

use axum::routing::get;
use http::{HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::health::Health;
use crate::listen::Listener;
use crate::probes::Stage;
use crate::server;

/// The process's metrics. Lock it to register; `/metrics` locks it to write them out.
pub type Registry = Arc<Mutex<prometheus_client::registry::Registry>>;

/// OpenMetrics 1.0.0 text, what `prometheus-client` writes.
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// How long probes in flight may hold up the end of the process.
const GRACE: Duration = Duration::from_secs(1);

/// What the admin port shows.
#[derive(Debug, Clone)]
pub struct AdminState {
    /// How far the process is.
    pub stage: watch::Receiver<Stage>,
    pub registry: Registry,
    pub health: Health,
}

/// An empty registry whose metrics all begin with `conclave_`.
pub fn registry() -> Registry {
    Arc::new(Mutex::new(prometheus_client::registry::Registry::with_prefix("conclave")))
}

/// Serves the admin port until `stop` is cancelled.
///
/// `/livez` answers 200 while the process runs; `/startupz` once it has started, `/readyz` while it wants traffic, else 503;
/// `/metrics` OpenMetrics text.
pub async fn serve(listener: Listener, state: AdminState, stop: CancellationToken) -> Result<(), server::Error> {
    let AdminState { stage, registry, health } = state;
    let ready = stage.clone();
    let routes = Routes::new(health.service())
        .into_axum_router()
        .route("/livez", get(async || "ok\n"))
        .route(
            "/readyz",
            get(async move || match *ready.borrow() {
                Stage::Serving => (StatusCode::OK, "ready\n"),
                Stage::Starting | Stage::Started => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            }),
        )
        .route(
            "/startupz",
            get(async move || match *stage.borrow() {
                Stage::Started | Stage::Serving => (StatusCode::OK, "started\n"),
                Stage::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
            }),
        )
        .route("/metrics", get(async move || metrics(&registry)));
    server::serve(server::admin().add_routes(Routes::from(routes)), listener, stop, GRACE).await
}

fn metrics(registry: &Registry) -> (StatusCode, [(header::HeaderName, HeaderValue); 1], String) {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry.lock()) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, OPEN_METRICS)], text),
        Err(error) => {
            tracing::error!(%error, "cannot write the metrics");
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, plain)], String::new())
        }
    }
}
