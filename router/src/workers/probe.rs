//! A question with a known answer, for a worker that comes back from being left alone.
//!
//! In: a fresh stream and an expert the worker holds. Out: whether its answer can be believed.
//! Never here: rows of a request. An expert is a SwiGLU without biases, so a row of zeros comes back as zeros.

use std::time::Duration;

use conclave_model::wire::{Encoded, Encoding};
use conclave_runtime::stream::{Inbox, Outbox};
use tokio::time::timeout;

use super::codec::{self, Contents, Dispatch, Refusal, Reply};

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

/// Asks, and says what is wrong with the answer. A refusal that speaks of the moment (busy, leaving, not resident) is an answer
/// to be believed; one that speaks against the worker is none.
pub(super) async fn ask(canary: Canary, hidden: usize, out: &Outbox, inbound: &mut Inbox) -> Result<(), String> {
    let zeros = Encoded::new(&vec![0.0; hidden], hidden, Encoding::F32).map_err(|error| error.to_string())?;
    let contents = Contents { layer: canary.layer, plan_version: 0, source: &zeros, rows: &[0], row_ids: &[0] };
    let dispatch = Dispatch::new(contents, [canary.expert].into_iter(), None::<std::iter::Empty<f32>>);
    let message = dispatch.finish(BATCH_ID, PATIENCE).map_err(|error| error.to_string())?;
    let exchange = async {
        out.send(message).await.map_err(|error| error.to_string())?;
        let message = inbound.next().await.map_err(|status| status.to_string())?;
        codec::read(message.ok_or("the worker closed the stream")?)
    };
    let message = timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err("no answer to a probe".to_owned()))?;
    if message.batch_id != BATCH_ID {
        return Err("an answer to what was not asked".to_owned());
    }
    match codec::from_message(message, 1, hidden)? {
        Reply::Rows(rows) if rows.are_zero() => Ok(()),
        Reply::Rows(_) => Err("a row of zeros came back as something else".to_owned()),
        Reply::Refused(Refusal::Invalid(message) | Refusal::Internal(message)) => Err(message),
        Reply::Refused(_) => Ok(()),
        Reply::Lost(why) => Err(why),
    }
}
