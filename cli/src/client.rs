//! Talking to a router: an endpoint comes in, a connected client goes out, and a gRPC status becomes a sentence for
//! people. Nothing is retried here; one attempt, one answer.

use std::error::Error as _;
use std::time::Duration;

use anyhow::{Context, anyhow};
use conclave_proto::inference::v1 as pb;
use conclave_proto::inference::v1::inference_client::InferenceClient;
use conclave_proto::status::ErrorKind;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use crate::terminal;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Prompt log probabilities of a long context arrive in one message.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Where a client finds the cluster, and how it wants tokens drawn: what `generate` and `chat` share.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A router's public address.
    #[arg(long, value_name = "ADDR", env = "CONCLAVE_ENDPOINT", default_value = "http://127.0.0.1:7400")]
    pub(crate) endpoint: String,
    /// Stop after this many tokens; otherwise when the model ends, or the context is full.
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// 0 is greedy; the default is the checkpoint's own.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Draw from the most probable tokens that sum up to P.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Draw from the K most probable tokens; 0 is off.
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// The same request and seed give the same answer.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// End before this text appears; may be repeated.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
}

impl Options {
    /// A request with these options for `input`. Ranges are the router's business: it names the field.
    pub(crate) fn request(&self, input: pb::generate_request::Input) -> pb::GenerateRequest {
        pb::GenerateRequest {
            input: Some(input),
            sampling: Some(pb::SamplingParams {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                seed: self.seed,
                ..Default::default()
            }),
            stop: Some(pb::StopParams {
                max_tokens: self.max_tokens,
                strings: self.stop.clone(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Connects to a router. The error is one sentence that says what to try.
pub(crate) async fn connect(endpoint: &str) -> anyhow::Result<InferenceClient<Channel>> {
    let channel = channel(endpoint)?.connect().await.map_err(|error| {
        anyhow!("cannot reach a router at {endpoint} ({}); is `conclave up` running?", root(&error))
    })?;
    Ok(client(channel))
}

/// A client that connects when it is first used.
pub(crate) fn connect_lazily(endpoint: &str) -> anyhow::Result<InferenceClient<Channel>> {
    Ok(client(channel(endpoint)?.connect_lazy()))
}

fn client(channel: Channel) -> InferenceClient<Channel> {
    InferenceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// An endpoint for "host:port" or "http://host:port".
fn channel(endpoint: &str) -> anyhow::Result<Endpoint> {
    let uri = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let endpoint = Endpoint::from_shared(uri).with_context(|| format!("{endpoint:?} is no address like host:port"))?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true))
}

/// Returns once `service` at `address` says that it serves. Waits for as long as it is polled: whoever calls decides
/// when to give up.
pub(crate) async fn until_serving(address: &str, service: &str) -> anyhow::Result<()> {
    let endpoint = channel(address)?;
    loop {
        // An error here means "not yet": the server may not listen, or not know the service so far.
        if let Ok(connection) = endpoint.connect().await {
            let request = HealthCheckRequest { service: service.to_owned() };
            if let Ok(stream) = HealthClient::new(connection).watch(request).await {
                let mut stream = stream.into_inner();
                while let Ok(Some(answer)) = stream.message().await {
                    if answer.status() == ServingStatus::Serving {
                        return Ok(());
                    }
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What a gRPC status means for whoever typed the command: what failed, the field at fault, when to try again.
pub(crate) fn sentence(status: &Status) -> String {
    let what = match ErrorKind::of(status) {
        ErrorKind::InvalidArgument => "the request is not valid",
        ErrorKind::NotFound => "not found",
        ErrorKind::FailedPrecondition => "not possible now",
        ErrorKind::ResourceExhausted => "the cluster is busy",
        ErrorKind::Unavailable => "the cluster cannot answer now",
        ErrorKind::DeadlineExceeded => "no answer before the deadline",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::Unimplemented => "this server does not offer that",
        ErrorKind::Internal => "the server failed",
    };
    let mut text = what.to_owned();
    if !status.message().is_empty() {
        text.push_str(": ");
        text.push_str(status.message());
    }
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    for violation in violations.iter().filter(|violation| !status.message().contains(&violation.field)) {
        text.push_str(&format!(" ({}: {})", violation.field, violation.description));
    }
    if let Some(source) = status.source() {
        text.push_str(&format!(" ({})", root(source)));
    }
    if let Some(after) = details.retry_info().and_then(|info| info.retry_delay) {
        text.push_str(&format!("; try again in {}", terminal::duration(after)));
    }
    text
}

/// The innermost cause: tonic's own errors say no more than "transport error".
fn root(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use conclave_proto::status::Failure;

    use super::*;

    #[test]
    fn a_bad_field_is_named_once() {
        let text = sentence(&Failure::invalid("sampling.top_p", "must be in (0, 1], is 2").into());
        assert_eq!(text, "the request is not valid: sampling.top_p: must be in (0, 1], is 2");
    }

    #[test]
    fn what_may_be_tried_again_says_when() {
        let after = Duration::from_millis(1500);
        let text = sentence(&Failure::unavailable("NO_HOLDER", "expert 3 of layer 1 has no holder", after).into());
        assert_eq!(text, "the cluster cannot answer now: expert 3 of layer 1 has no holder; try again in 1.50 s");
    }

    #[test]
    fn an_endpoint_needs_no_scheme() {
        assert!(channel("127.0.0.1:7400").is_ok());
        assert!(channel("http://127.0.0.1:7400").is_ok());
        assert!(channel("no address").is_err());
    }

    #[tokio::test]
    async fn nobody_there_is_one_sentence() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = connect(&address).await.unwrap_err().to_string();
        assert!(error.contains(&address) && error.contains("refused") && error.contains("conclave up"), "{error}");
    }
}
