//! The far side of the dispatch benchmark, a process of its own: bytes come in by raw TCP or as `DispatchBatch`es, the
//! same bytes go back. Nothing is computed, and the process ends when its standard input does, so that none is left
//! behind however its parent ends.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use conclave_model::wire::{self as codec, Encoding};
use conclave_proto::expert::v1::combine_batch::Outcome;
use conclave_proto::expert::v1::expert_worker_server::{ExpertWorker, ExpertWorkerServer};
use conclave_proto::expert::{EXCHANGE_PATH, v1 as wire};
use conclave_proto::integrity;
use conclave_runtime::stream::{self, Driver, Front, Handler, Inbound, Message};
use conclave_runtime::wire_thread::WireThread;
use conclave_runtime::{listen, server};
use http::HeaderMap;
use prost::Message as _;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// Batches under way on one stream: as a worker has it, more than the benchmark ever sends at once.
const ANSWERS_QUEUED: usize = 16;

/// Prints both addresses as one line of JSON and serves until standard input ends.
pub(crate) async fn serve() -> anyhow::Result<()> {
    let raw = TcpListener::bind("127.0.0.1:0")?;
    let raw_address = raw.local_addr()?;
    std::thread::spawn(move || raw_echo(&raw));

    let mut listener = listen::bind("127.0.0.1:0")?;
    let local = format!("conclave-bench/{}", std::process::id());
    listener.also_at(&local)?;
    let exchange = listener.local_addr.to_string();
    println!("{}", json!({ "raw": raw_address.to_string(), "exchange": exchange, "local": local }));

    let stop = CancellationToken::new();
    let stdin_ended = stop.clone();
    tokio::spawn(async move {
        // What is read does not matter, and an error is an end too.
        let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
        stdin_ended.cancel();
    });
    // As a worker has it: its streams on a thread of their own.
    let wire = WireThread::start("wire")?;
    let routes = Routes::new(Front { handler: Echo, rest: ExpertWorkerServer::new(Echo) });
    wire.spawn(stream::serve(routes, listener, stop, Duration::from_secs(1))).await?;
    Ok(())
}

/// One client after the other, one message after the other: a length (u32, little-endian), then that many bytes, which
/// go back when all of them are here. An expert needs a whole row as well before it can answer.
fn raw_echo(listener: &TcpListener) {
    for socket in listener.incoming().flatten() {
        // The client going away is how a connection ends.
        let _ = echo_messages(socket);
    }
}

fn echo_messages(mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut length = [0; 4];
    let mut message = Vec::new();
    loop {
        socket.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > server::MAX_INTERNAL_MESSAGE {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        message.resize(length, 0);
        socket.read_exact(&mut message)?;
        socket.write_all(&message)?;
    }
}

/// An expert worker whose experts all are the identity: with one assignment a row, rows go back as they came.
#[derive(Clone, Debug)]
struct Echo;

impl Handler for Echo {
    const PATH: &'static str = EXCHANGE_PATH;

    fn accept(
        &self,
        _metadata: &HeaderMap,
        mut messages: Inbound,
        driver: &Driver,
    ) -> Result<mpsc::Receiver<Bytes>, Status> {
        let (answers, answered) = mpsc::channel(ANSWERS_QUEUED);
        driver.spawn(async move {
            while let Ok(Some(message)) = messages.next().await {
                let Some(answer) = answer(message) else { break };
                if answers.send(answer).await.is_err() {
                    break;
                }
            }
        });
        Ok(answered)
    }
}

/// What came as bf16 goes back as it is, from where it lies. What came as FP8 is decoded and encoded as a worker does it,
/// which has f32 in between. Checksums are looked at and made.
fn answer(message: Bytes) -> Option<Bytes> {
    let batch = wire::DispatchBatch::decode(message).ok()?;
    batch.checksum.filter(|sum| *sum == integrity::of_dispatch(&batch))?;
    let rows = match batch.encoding() {
        wire::Encoding::Fp8E4m3Block128 => {
            let rows = batch.rows as usize;
            let hidden = batch.hidden.len() / rows.max(1);
            let values = codec::decode(Encoding::Fp8Block128, &batch.hidden, &batch.scales, rows, hidden).ok()?;
            codec::encode(&values, hidden, Encoding::Bf16).0
        }
        _ => batch.hidden,
    };
    let returned = wire::Returned { encoding: batch.return_encoding, rows };
    let answer = wire::CombineBatch {
        batch_id: batch.batch_id,
        checksum: Some(integrity::of_returned(batch.batch_id, &returned)),
        outcome: Some(Outcome::Returned(returned)),
        ..Default::default()
    };
    let mut out = Message::with_capacity(answer.encoded_len());
    answer.encode(out.body()).ok()?;
    out.finish().ok()
}

/// The methods that tonic answers.
#[tonic::async_trait]
impl ExpertWorker for Echo {
    type ExchangeStream = tokio_stream::Empty<Result<wire::CombineBatch, Status>>;

    async fn exchange(
        &self,
        _request: Request<Streaming<wire::DispatchBatch>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        Err(Status::unimplemented("streams are answered before they come here"))
    }

    async fn get_inventory(
        &self,
        _request: Request<wire::GetInventoryRequest>,
    ) -> Result<Response<wire::GetInventoryResponse>, Status> {
        Ok(Response::new(wire::GetInventoryResponse::default()))
    }
}
