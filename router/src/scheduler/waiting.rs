//! Requests that wait to be computed, from their stream to their first step.
//!
//! In: checked requests. Out: submissions, in order of arrival, to the engine; a refusal where too many wait, or where
//! the wait would leave no time for the answer. Never here: a place kept for a client who is gone or out of time,
//! however long the engine's step takes.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use conclave_proto::status::Failure;
use parking_lot::Mutex;
use tokio::{
    sync::mpsc::{self, error::TryRecvError},
    time::{Duration, Instant},
};

use super::admission::{Admission, Refusal};
use crate::{
    sequence::{Event, EventReceiver, EventSender, Stopped, ValidRequest},
    stall::Stall,
};

/// Events of one answer that its reader has not taken. A sequence whose reader is this far behind is not computed.
const EVENTS: usize = 64;
/// What a client turned away is told to wait where nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A request as it enters the engine.
#[derive(Debug)]
pub struct Submission {
    /// What is wanted.
    pub request: ValidRequest,
    /// Where its events go.
    pub events: EventSender,
    /// Which answers its stream wants no more.
    pub stopped: Arc<Stopped>,
    /// When it came.
    pub submitted: Instant,
    /// Its place among those who wait: whoever computes the request drops this when it first joins a step.
    pub waiting: Waiting,
}

/// The engine's half of a place among those who wait. Dropping it says that the request is computed from now on (or,
/// past its deadline, that it never will be); and nothing where its stream has given the place up before.
#[derive(Debug)]
pub struct Waiting(Arc<Place>);

/// The stream's half: dropping it gives the place up, if the request still waits.
#[derive(Debug)]
struct Claim(Arc<Place>);

/// A request's answers, as its stream sees them. Dropping them cancels the request.
#[derive(Debug)]
pub struct Answers {
    /// Dropped before the events' end, so that a place which is given up never looks like a start.
    _claim: Claim,
    /// What the engine tells.
    pub events: EventReceiver,
    /// How single answers are ended.
    pub stopped: Arc<Stopped>,
}

#[derive(Debug)]
struct Place {
    room: Arc<Mutex<Room>>,
    deadline: Instant,
    /// Whether one of its two halves was dropped already.
    vacated: AtomicBool,
}

/// Everybody who waits, wherever: in the line, or in the engine and not yet in a step.
#[derive(Debug)]
struct Room {
    admission: Admission,
    line: VecDeque<Submission>,
}

/// The way in: cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    room: Arc<Mutex<Room>>,
    /// Tells the engine that somebody is in the line; its closing tells either side that the other is gone.
    bell: mpsc::Sender<()>,
    stall: Arc<Stall>,
}

/// The engine's end.
#[derive(Debug)]
pub struct Queue {
    room: Arc<Mutex<Room>>,
    bell: mpsc::Receiver<()>,
}

/// A queue in which, together with the engine, no more than `bound` requests wait; and the handle on it.
pub fn queue(stall: Arc<Stall>, bound: usize) -> (Handle, Queue) {
    let room = Arc::new(Mutex::new(Room { admission: Admission::new(bound), line: VecDeque::new() }));
    let (ring, bell) = mpsc::channel(1);
    (Handle { room: Arc::clone(&room), bell: ring, stall }, Queue { room, bell })
}

impl Handle {
    /// Puts a request into the line.
    ///
    /// # Errors
    /// `ResourceExhausted` where as many wait as may (`QUEUE_FULL`), or where it would start too late to be answered
    /// by its deadline (`OVERLOADED`), with the time after which to try again; `Unavailable` without an engine.
    pub fn submit(&self, request: ValidRequest) -> Result<Answers, Failure> {
        let now = Instant::now();
        let deadline = Instant::from_std(request.deadline);
        let (sender, events) = mpsc::channel::<Event>(EVENTS * request.answers);
        let stopped = Arc::new(Stopped::default());
        let place = Arc::new(Place { room: Arc::clone(&self.room), deadline, vacated: AtomicBool::new(false) });
        {
            let mut room = self.room.lock();
            let admitted = room.admission.admit(now, deadline.saturating_duration_since(now));
            admitted.map_err(|refusal| refused(refusal, room.admission.waiting()))?;
            room.line.push_back(Submission {
                request,
                events: sender,
                stopped: Arc::clone(&stopped),
                submitted: now,
                waiting: Waiting(Arc::clone(&place)),
            });
        }
        let answers = Answers { _claim: Claim(place), events, stopped };
        match self.bell.try_send(()) {
            // Full: the engine has not heard the last ring yet.
            Ok(()) | Err(mpsc::error::TrySendError::Full(())) => Ok(answers),
            Err(mpsc::error::TrySendError::Closed(())) => {
                Err(Failure::unavailable("ENGINE_STOPPED", "the engine has stopped", RETRY_AFTER))
            }
        }
    }

    /// What the engine's step waits for, while it waits for experts.
    pub fn waiting_for(&self) -> Option<String> {
        self.stall.reason()
    }
}

fn refused(refusal: Refusal, waiting: usize) -> Failure {
    match refusal {
        Refusal::Full => {
            Failure::exhausted("QUEUE_FULL", format!("{waiting} requests are waiting already"), RETRY_AFTER)
        }
        Refusal::Late { wait, retry_after } => {
            let message = format!(
                "{waiting} requests are waiting, for about {:.1} s: too little time would be left for the answer",
                wait.as_secs_f64()
            );
            Failure::exhausted("OVERLOADED", message, retry_after)
        }
    }
}

impl Queue {
    /// Who came first of those in the line.
    ///
    /// # Errors
    /// `Empty` where there is nobody, `Disconnected` where nobody can come any more.
    pub fn try_recv(&mut self) -> Result<Submission, TryRecvError> {
        // Asked before looking: whoever came before the last handle was gone is in the line by then.
        let gone = self.bell.is_closed();
        let first = self.room.lock().line.pop_front();
        first.ok_or(if gone { TryRecvError::Disconnected } else { TryRecvError::Empty })
    }

    /// Waits for somebody to come; `None` where nobody can any more. Nobody is lost if this is dropped.
    pub async fn recv(&mut self) -> Option<Submission> {
        loop {
            match self.try_recv() {
                Ok(submission) => return Some(submission),
                Err(TryRecvError::Disconnected) => return None,
                // A ring, or the end of them: both are seen above.
                Err(TryRecvError::Empty) => drop(self.bell.recv().await),
            }
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // First no new ones, then none of the old: their streams see that nobody will answer.
        self.bell.close();
        let line = std::mem::take(&mut self.room.lock().line);
        drop(line);
    }
}

impl Place {
    /// The first of the two halves to go decides.
    fn vacate(&self) -> bool {
        !self.vacated.swap(true, Relaxed)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.0.vacate() {
            return;
        }
        let now = Instant::now();
        let admission = &mut self.0.room.lock().admission;
        if now < self.0.deadline { admission.started(now) } else { admission.left(now) }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.0.vacate() {
            return;
        }
        let mut room = self.0.room.lock();
        room.admission.left(Instant::now());
        let at = room.line.iter().position(|submission| Arc::ptr_eq(&submission.waiting.0, &self.0));
        let submission = at.and_then(|at| room.line.remove(at));
        // What it holds looks at the room again as it goes.
        drop(room);
        drop(submission);
    }
}

#[cfg(test)]
mod tests;
