//! The task between the engine and one client.
//!
//! In: a request's events, in order. Out: `GenerateResponse`s (Started, Tokens, one Finished per answer) or one status
//! at the end. Never here: waiting beyond the deadline, or longer than a while for a client that does not read; a stream
//! that ends well without every Finished.

use std::time::{Duration, Instant};

use conclave_proto::{
    inference::v1::{self as pb, generate_response::Event as Told},
    status::Failure,
};
use tokio::{
    sync::mpsc::{self, error::SendTimeoutError},
    time,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{deadline, reply::Reply};
use crate::scheduler::Answers;

/// The body of a `Generate` call.
pub(super) type Responses = ReceiverStream<Result<pb::GenerateResponse, Status>>;

/// How long a message may wait for its client. A client that takes so long holds a cache that others wait for.
pub(super) const SLOW_READER: Duration = Duration::from_secs(30);
/// When a client that was too slow may ask again: it may at once, as far as we are concerned.
const SLOW_READER_RETRY: Duration = Duration::from_secs(1);
/// Messages that wait for a client to read them; beyond that the engine is made to wait too.
const UNREAD_MAX: usize = 16;
/// Tokens that were drawn while the client was busy travel together, at most this many.
const TOKENS_PER_MESSAGE: usize = 32;

/// When waiting ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For the whole reply.
    pub(super) deadline: Instant,
    /// For the client to take one message.
    pub(super) reader: Duration,
}

/// The whole stream of a reply that is known already.
pub(super) fn of<const N: usize>(told: [Told; N]) -> Responses {
    let (out, responses) = mpsc::channel(N.max(1));
    for told in told {
        // All fit into the channel just made.
        let _ = out.try_send(Ok(pb::GenerateResponse { event: Some(told) }));
    }
    ReceiverStream::new(responses)
}

/// Starts the task that carries one reply from the engine to its client. It ends, and with it the request, when every
/// answer is complete, when one fails, when the deadline passes, when the client is gone, or does not read: dropping
/// `answers` is how the queue and the engine hear of it. `waiting_for` says what the engine waits for, when the deadline
/// passes.
pub(super) fn open(
    reply: Reply,
    answers: Answers,
    patience: Patience,
    waiting_for: impl Fn() -> Option<String> + Send + 'static,
) -> Responses {
    // One seat is kept for the last status, so that it is told even to a client that has not read the rest.
    let (out, responses) = mpsc::channel(UNREAD_MAX + 1);
    tokio::spawn(async move {
        let Ok(last_seat) = out.clone().reserve_owned().await else { return };
        let request_id = reply.request_id.clone();
        let relay = relay(reply, answers, &out, patience.reader);
        let outcome = tokio::select! {
            () = out.closed() => Err(Failure::cancelled("the client is gone")),
            outcome = time::timeout_at(patience.deadline.into(), relay) => {
                outcome.unwrap_or_else(|_| Err(deadline::passed(waiting_for())))
            }
        };
        if let Err(failure) = outcome {
            tracing::info!(%request_id, reason = failure.reason, %failure, "answer not completed");
            last_seat.send(Err(failure.into()));
        }
    });
    ReceiverStream::new(responses)
}

/// Tells event after event until the last.
async fn relay(
    mut reply: Reply,
    mut answers: Answers,
    out: &mpsc::Sender<Result<pb::GenerateResponse, Status>>,
    reader: Duration,
) -> Result<(), Failure> {
    let mut batch = Vec::with_capacity(TOKENS_PER_MESSAGE);
    let mut words = Vec::new();
    loop {
        if answers.events.recv_many(&mut batch, TOKENS_PER_MESSAGE).await == 0 {
            let message = "the router stopped before the answer was complete";
            return Err(Failure::unavailable("ROUTER_STOPPED", message, Duration::from_secs(1)));
        }
        // What came before the end of the reply is told before it, whatever the end is.
        let mut tell = |event| reply.tell(event, &mut words, &answers.stopped);
        let told = batch.drain(..).map(&mut tell).find(|told| !matches!(told, Ok(false)));
        for event in words.drain(..) {
            let response = Ok(pb::GenerateResponse { event: Some(event) });
            out.send_timeout(response, reader).await.map_err(|unsent| not_taken(&unsent, reader))?;
        }
        if let Some(told) = told {
            tracing::debug!(request_id = %reply.request_id, tokens = reply.drawn(), "reply ended");
            return told.map(|_| ());
        }
    }
}

fn not_taken<T>(unsent: &SendTimeoutError<T>, reader: Duration) -> Failure {
    match unsent {
        SendTimeoutError::Timeout(_) => {
            let message = format!("the client has taken no message for {} s", reader.as_secs_f32());
            Failure::exhausted("SLOW_READER", message, SLOW_READER_RETRY)
        }
        SendTimeoutError::Closed(_) => Failure::cancelled("the client is gone"),
    }
}

#[cfg(test)]
mod tests;
