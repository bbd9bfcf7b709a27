//! gRPC servers: the kinds of listener and their limits, reflection, and serving until told to stop. Services come in from
//! the process, bytes leave on the wire. Nothing here knows a method. What routers and workers say to each other is served by
//! [`crate::stream`].
//!
//! Message sizes are limits of a tonic *service*, not of a server: give each service the constants below with
//! `max_decoding_message_size` and `max_encoding_message_size`.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_reflection::server::{Builder, v1, v1alpha};

use crate::listen::Listener;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Largest request a client may send to a public service, bytes: long prompts as token ids fit, abuse does not.
pub const MAX_PUBLIC_REQUEST: usize = 4 * MIB;
/// Largest message a public service sends, bytes: prompt logprobs of a long prompt are the largest.
pub const MAX_PUBLIC_RESPONSE: usize = 64 * MIB;
/// Largest message between router and worker, bytes: 4,681 bf16 rows of hidden size 7,168.
pub const MAX_INTERNAL_MESSAGE: usize = 64 * MIB;
/// Largest message of an admin service, bytes.
pub const MAX_ADMIN_MESSAGE: usize = MIB;

/// HTTP/2 windows inside the cluster, bytes. hyper's default of 1 MiB throttles large tensors.
pub(crate) const INTERNAL_STREAM_WINDOW: u32 = 16 * MIB as u32;
pub(crate) const INTERNAL_CONNECTION_WINDOW: u32 = 64 * MIB as u32;
/// Frames inside the cluster, bytes: 512 bf16 rows of 4,096 travel in one, and a message in one frame is never copied
/// together. On a network of 1 Gb/s one takes 34 ms, so a keep-alive behind it is still in time.
pub(crate) const INTERNAL_FRAME: u32 = 4 * MIB as u32;
/// A dead peer inside the cluster is noticed after at most the sum of the two.
pub(crate) const INTERNAL_KEEP_ALIVE: Duration = Duration::from_secs(5);
pub(crate) const INTERNAL_KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot build the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("server on {address} failed: {source}")]
    Serve { address: std::net::SocketAddr, source: tonic::transport::Error },
}

/// For clients we do not know: every limit is tight, and a flood of resets closes the connection.
pub fn public() -> Server {
    Server::builder()
        .max_concurrent_streams(128)
        .http2_max_pending_accept_reset_streams(Some(20))
        .http2_max_local_error_reset_streams(Some(256))
        .http2_max_header_list_size(16 * KIB as u32)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

/// For probes, scrapes and operators: few streams, small messages, HTTP/1 beside gRPC.
pub fn admin() -> Server {
    Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(32)
        .http2_max_pending_accept_reset_streams(Some(20))
        .http2_max_local_error_reset_streams(Some(64))
        .http2_max_header_list_size(16 * KIB as u32)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
}

/// The reflection services, v1 and v1alpha (older grpcurl asks for that). They list exactly `services`, health and
/// themselves, so that a listener does not promise what another one serves.
#[allow(clippy::type_complexity)]
pub fn reflection(
    services: &[&str],
) -> Result<
    (
        v1::ServerReflectionServer<impl v1::ServerReflection + use<>>,
        v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection + use<>>,
    ),
    Error,
> {
    let describe = || {
        let always = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"];
        let builder = Builder::configure()
            .register_encoded_file_descriptor_set(conclave_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.reflection.v1alpha.ServerReflection");
        services.iter().chain(&always).fold(builder, |builder, name| builder.with_service_name(*name))
    };
    Ok((describe().build_v1()?, describe().build_v1alpha()?))
}

/// Serves until `stop` is cancelled, then closes the port and waits for open streams, at most `grace`. Streams that
/// are still open after that end with the process.
pub async fn serve(router: Router, listener: Listener, stop: CancellationToken, grace: Duration) -> Result<(), Error> {
    let address = listener.local_addr;
    let too_long = async {
        stop.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        served = router.serve_with_incoming_shutdown(listener.incoming(), stop.clone().cancelled_owned()) => {
            served.map_err(|source| Error::Serve { address, source })
        }
        () = too_long => {
            tracing::warn!(%address, grace_s = grace.as_secs_f64(), "streams still open after the grace: leaving them");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;
    use tokio_stream::StreamExt;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    use super::*;
    use crate::admin::{self, AdminState};
    use crate::health::Health;
    use crate::probes::Stage;
    use crate::{channel, listen};

    #[tokio::test]
    async fn reflection_lists_what_this_listener_serves_and_health() {
        let listener = listen::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr.to_string();
        let (v1, v1alpha) = reflection(&["conclave.expert.v1.ExpertWorker"]).unwrap();
        let stop = CancellationToken::new();
        let router = public().add_service(v1).add_service(v1alpha);
        let serving = tokio::spawn(serve(router, listener, stop.clone(), Duration::from_secs(5)));

        let channel = channel::internal(&address).unwrap().connect().await.unwrap();
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap()
            .into_inner();
        let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
        let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
        let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
        names.sort();
        assert_eq!(
            names,
            [
                "conclave.expert.v1.ExpertWorker",
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
                "grpc.reflection.v1alpha.ServerReflection",
            ]
        );
        drop(answers);
        stop.cancel();
        serving.await.unwrap().unwrap();
    }

    /// One plain HTTP/1 request, as a kubelet or a scraper sends it.
    async fn http_get(address: std::net::SocketAddr, path: &str) -> String {
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn probes_metrics_and_health_share_the_admin_port() {
        let listener = listen::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr;
        let registry = admin::registry();
        let rows = prometheus_client::metrics::counter::Counter::<u64>::default();
        registry.lock().register("rows", "Rows seen", rows.clone());
        rows.inc_by(3);
        let (stage, is_at) = watch::channel(Stage::Starting);
        let health = Health::new().await;
        let stop = CancellationToken::new();
        let state = AdminState { stage: is_at, registry: Arc::clone(&registry), health: health.clone() };
        let serving = tokio::spawn(admin::serve(listener, state, stop.clone()));

        assert!(http_get(address, "/livez").await.starts_with("HTTP/1.1 200"));
        for (now, started, ready) in [
            (Stage::Starting, 503, 503),
            (Stage::Started, 200, 503),
            (Stage::Serving, 200, 200),
            (Stage::Started, 200, 503),
        ] {
            stage.send_replace(now);
            for (path, status) in [("/startupz", started), ("/readyz", ready)] {
                assert!(http_get(address, path).await.starts_with(&format!("HTTP/1.1 {status}")), "{path} of {now:?}");
            }
        }
        let metrics = http_get(address, "/metrics").await;
        assert!(metrics.contains("application/openmetrics-text"), "{metrics}");
        assert!(metrics.contains("conclave_rows_total 3") && metrics.ends_with("# EOF\n"), "{metrics}");

        let channel = channel::internal(&address.to_string()).unwrap().connect().await.unwrap();
        let mut client = HealthClient::new(channel);
        let mut status = async || {
            let request = HealthCheckRequest { service: String::new() };
            client.check(request).await.unwrap().into_inner().status
        };
        assert_eq!(status().await, tonic_health::ServingStatus::NotServing as i32);
        health.set("", true).await;
        assert_eq!(status().await, tonic_health::ServingStatus::Serving as i32);
        drop(client);
        stop.cancel();
        serving.await.unwrap().unwrap();
    }
}
