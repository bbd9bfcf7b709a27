//! Workers that compute nothing, in a process of their own, for measuring a router: a batch comes in, as many rows of zeros
//! go back as a worker would answer with, at once. Any layer and any expert is theirs. The process ends when its standard
//! input does.

use std::time::Duration;

use bytes::Bytes;
use conclave_model::wire::Encoding;
use conclave_proto::expert::v1 as wire;
use conclave_proto::expert::v1::combine_batch::Outcome;
use conclave_proto::expert::v1::expert_worker_server::{ExpertWorker, ExpertWorkerServer};
use conclave_runtime::{listen, server, stream};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// Of every row.
pub(crate) const HIDDEN: usize = 2048;
/// The largest answer; the router cuts its batches far below.
const MOST_ROWS: usize = 4096;
/// As a worker has it.
const ANSWERS_QUEUED: usize = 16;

/// Prints the addresses of `count` workers as one line of JSON and serves them until standard input ends.
pub(crate) async fn serve(count: usize) -> anyhow::Result<()> {
    let zeros = Bytes::from(vec![0; MOST_ROWS * Encoding::Bf16.row_bytes(HIDDEN)]);
    let stop = CancellationToken::new();
    let (mut addresses, mut serving) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let listener = listen::bind("127.0.0.1:0")?;
        addresses.push(listener.local_addr.to_string());
        let service = ExpertWorkerServer::new(Fake { zeros: zeros.clone() })
            .max_decoding_message_size(server::MAX_INTERNAL_MESSAGE)
            .max_encoding_message_size(server::MAX_INTERNAL_MESSAGE);
        let routes = Routes::new(service);
        serving.push(tokio::spawn(stream::serve(routes, listener, stop.clone(), Duration::from_secs(1))));
    }
    println!("{}", json!(addresses));
    // What is read does not matter, and an error is an end too.
    let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
    stop.cancel();
    for server in serving {
        server.await?;
    }
    Ok(())
}

#[derive(Debug)]
struct Fake {
    zeros: Bytes,
}

impl Fake {
    fn answer(zeros: &Bytes, batch: &wire::DispatchBatch) -> wire::CombineBatch {
        let rows = match batch.mode() {
            wire::CombineMode::PartialSum => batch.rows as usize,
            // Two bytes an assignment.
            _ => batch.expert_ids.len() / 2,
        };
        let outcome = match rows * Encoding::Bf16.row_bytes(HIDDEN) {
            bytes if bytes <= zeros.len() => {
                Outcome::Returned(wire::Returned { encoding: wire::Encoding::Bf16.into(), rows: zeros.slice(..bytes) })
            }
            _ => Outcome::Refused(wire::Refused { reason: wire::RefusedReason::Invalid.into(), ..Default::default() }),
        };
        wire::CombineBatch { batch_id: batch.batch_id, outcome: Some(outcome), ..Default::default() }
    }
}

#[tonic::async_trait]
impl ExpertWorker for Fake {
    type ExchangeStream = ReceiverStream<Result<wire::CombineBatch, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<wire::DispatchBatch>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let (mut batches, zeros) = (request.into_inner(), self.zeros.clone());
        let (answers, answered) = mpsc::channel(ANSWERS_QUEUED);
        tokio::spawn(async move {
            while let Some(Ok(batch)) = batches.next().await {
                if answers.send(Ok(Self::answer(&zeros, &batch))).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answered)))
    }

    async fn get_inventory(
        &self,
        _request: Request<wire::GetInventoryRequest>,
    ) -> Result<Response<wire::GetInventoryResponse>, Status> {
        Ok(Response::new(wire::GetInventoryResponse::default()))
    }
}
