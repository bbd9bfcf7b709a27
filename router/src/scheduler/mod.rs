//! Which sequences take part in the next step, and how requests get in.
//!
//! In: valid requests, through a bounded queue. Out: [`Grant`]s for each step, under the token budget.
//! Never here: tensors, the network, waiting. The engine asks when it is ready.

pub mod policy;

use std::{sync::Arc, time::Duration};

use conclave_proto::status::Failure;
use tokio::{
    sync::{mpsc, mpsc::error::TrySendError},
    time::Instant,
};

use crate::{
    sequence::{Event, EventReceiver, EventSender, ValidRequest},
    stall::Stall,
};

use policy::{Candidate, Grant, Limits};

/// Requests that wait for the engine to look at them.
const QUEUE: usize = 256;
/// Events of one request that its reader has not taken. A sequence whose reader is this far behind is not computed.
const EVENTS: usize = 64;
/// What a client turned away is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A request as it enters the engine.
#[derive(Debug)]
pub struct Submission {
    /// What is wanted.
    pub request: ValidRequest,
    /// Where its events go.
    pub events: EventSender,
    /// When it came.
    pub submitted: Instant,
}

/// The way in: cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    queue: mpsc::Sender<Submission>,
    stall: Arc<Stall>,
}

/// The engine's end.
pub type Queue = mpsc::Receiver<Submission>;

/// A bounded queue and the handle on it.
pub fn queue(stall: Arc<Stall>) -> (Handle, Queue) {
    let (queue, requests) = mpsc::channel(QUEUE);
    (Handle { queue, stall }, requests)
}

impl Handle {
    /// Puts a request into the queue. Dropping the receiver cancels it.
    pub async fn submit(&self, request: ValidRequest) -> Result<EventReceiver, Failure> {
        let (events, receiver) = mpsc::channel::<Event>(EVENTS);
        match self.queue.try_send(Submission { request, events, submitted: Instant::now() }) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => {
                let message = format!("{QUEUE} requests are waiting already");
                Err(Failure::exhausted("QUEUE_FULL", message, RETRY_AFTER))
            }
            Err(TrySendError::Closed(_)) => {
                Err(Failure::unavailable("ENGINE_STOPPED", "the engine has stopped", RETRY_AFTER))
            }
        }
    }

    /// What the engine's step waits for, while it waits for experts.
    pub fn waiting_for(&self) -> Option<String> {
        self.stall.reason()
    }
}

/// Chooses from what is there; holds nothing between steps but the limits.
#[derive(Clone, Copy, Debug)]
pub struct Scheduler {
    /// The token budget and the most sequences of one step.
    pub limits: Limits,
}

impl Scheduler {
    /// The next step's work, `None` where there is none. `candidates` are in order of arrival.
    pub fn next(&self, candidates: &[Candidate]) -> Option<Vec<Grant>> {
        let grants = policy::choose(candidates, self.limits);
        if grants.is_empty() { None } else { Some(grants) }
    }
}
