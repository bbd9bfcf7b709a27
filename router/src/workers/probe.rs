//! A question with a known answer, for a worker that comes back from being left alone.
//!
//! In: a fresh stream and an expert the worker holds. Out: whether its answer can be believed.
//! Never here: rows of a request. An expert is a SwiGLU without biases, so a row of zeros comes back as zeros.

use std::time::Duration;

use conclave_model::wire::{self, Encoding};
use conclave_proto::expert::v1 as pb;
use tokio::{sync::mpsc, time::timeout};
use tonic::Streaming;

use super::codec::{self, Dispatch, Refusal, Reply};

/// An expert to ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Canary {
    pub(super) layer: u32,
    pub(super) expert: u16,
}

/// How long the answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// No batch of a request has this id: theirs count from 1.
const BATCH_ID: u64 = 0;

/// Asks, and says what is wrong with the answer. An honest refusal is an answer to be believed.
pub(super) async fn ask(
    canary: Canary,
    hidden: usize,
    out: &mpsc::Sender<pb::DispatchBatch>,
    inbound: &mut Streaming<pb::CombineBatch>,
) -> Result<(), String> {
    let (values, scales) = wire::encode(&vec![0.0; hidden], hidden, Encoding::F32);
    let dispatch = Dispatch {
        layer: canary.layer,
        plan_version: 0,
        encoding: Encoding::F32,
        rows: 1,
        hidden: values,
        scales,
        expert_ids: vec![canary.expert],
        row_ids: vec![0],
        weights: None,
    };
    let exchange = async {
        out.send(dispatch.to_message(BATCH_ID, PATIENCE)).await.map_err(|_| "the connection broke".to_owned())?;
        let message = inbound.message().await.map_err(|status| status.to_string())?;
        message.ok_or_else(|| "the worker closed the stream".to_owned())
    };
    let message = timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err("no answer to a probe".to_owned()))?;
    if message.batch_id != BATCH_ID {
        return Err("an answer to what was not asked".to_owned());
    }
    match codec::from_message(message, 1, hidden)? {
        Reply::Rows(rows) if rows.iter().all(|value| *value == 0.0) => Ok(()),
        Reply::Rows(_) => Err("a row of zeros came back as something else".to_owned()),
        Reply::Refused(Refusal::Invalid(message)) => Err(message),
        Reply::Refused(_) => Ok(()),
        Reply::Lost(why) => Err(why),
    }
}
