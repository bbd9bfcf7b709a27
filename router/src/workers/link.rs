//! One long-lived exchange stream to one worker, connected again whenever it breaks.
//!
//! In: dispatches. Out: a reply each, or word that it is lost, at once when the stream breaks; and whether an answer is
//! overdue, also one that nobody waits for any more.
//! Never here: a dispatch sent twice, an answer for one batch given to another, a wait without an end.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use conclave_placement::{
    ids::{Incarnation, WorkerId},
    state::{LocalSocket, WorkerRecord},
};
use conclave_proto::expert::{EXCHANGE_PATH, INCARNATION_METADATA};
use conclave_runtime::{
    channel, listen,
    socket::Socket,
    stream::{self, Inbox, Lookout, Outbox},
    wire_thread::WireThread,
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Counters, Pace, codec, probe};
use crate::phases::Phase;

/// How long a worker is avoided after a late answer: doubles from the first to the second with each one in a row.
const TARDY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(8));
/// Whoever waits for an answer of at most so many bytes looks for it itself. A larger one comes in many pieces, each of which
/// would wake two threads.
const LOOKED_FOR: usize = 64 << 10;
/// Batches that one worker may owe an answer for.
const UNANSWERED_MAX: usize = 1024;
/// Until a new stream must have been accepted.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two attempts to connect: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// How long a worker is left alone whose answer could not be believed, or did not come in time: doubles from the first to
/// the second with each time, until it has been well for as long as the second.
const QUARANTINE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// A worker that so many times in a row calls a batch invalid, or its own failure, is not asked on.
const STRIKES: u32 = 3;

/// A cheap handle on one worker's stream.
#[derive(Clone, Debug)]
pub struct Link(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    worker: WorkerId,
    incarnation: Incarnation,
    address: String,
    /// The Unix socket that it told of, where it runs on this very host.
    local: Option<String>,
    /// It runs on this very host, and computes on its processors.
    beside: bool,
    hidden: usize,
    next_batch: AtomicU64,
    stream: Mutex<Stream>,
    /// An expert that it holds, to be asked about when it comes back from being left alone.
    canary: Mutex<Option<probe::Canary>>,
    counters: Arc<Counters>,
    pace: Arc<Pace>,
    stop: CancellationToken,
}

/// The connection of the moment.
#[derive(Debug, Default)]
struct Stream {
    /// `None` while there is no connection.
    out: Option<Outbox>,
    /// What tells the engine's thread of arrivals, while answers are small.
    lookout: Option<Arc<Lookout>>,
    waiting: HashMap<u64, Waiting>,
    cut: Cut,
    /// Whether anything sound came back over it.
    answered: bool,
    /// Refusals in a row that speak against the worker.
    strikes: u32,
    /// Late answers in a row.
    tardy: u32,
    /// Until when it is avoided because of them.
    avoided_until: Option<Instant>,
}

impl Stream {
    /// What tells the runtime of the moment of arrivals, if the next answer is small.
    fn look_out(&mut self, small: bool) -> Option<Arc<Lookout>> {
        if !small {
            self.lookout = None;
        } else if self.lookout.is_none() {
            self.lookout = self.out.as_ref()?.look_out().map(Arc::new);
        }
        self.lookout.clone()
    }

    /// Counts what speaks against the worker; says why it cannot be relied on any more.
    fn strike(&mut self, reply: &codec::Reply) -> Result<(), String> {
        self.strikes = match reply {
            codec::Reply::Refused(codec::Refusal::Internal(_) | codec::Refusal::Invalid(_)) => self.strikes + 1,
            // Of rows alone it is known that its tensor thread works.
            codec::Reply::Rows(_) => 0,
            _ => self.strikes,
        };
        match reply {
            codec::Reply::Refused(refusal) if self.strikes >= STRIKES => {
                Err(format!("it refuses again and again: {refusal}"))
            }
            _ => Ok(()),
        }
    }

    /// A sound answer came. A worker that is late again and again is avoided for longer and longer, so that not every
    /// batch must find out anew; an answer in time clears its name.
    fn heard(&mut self, waiting: &Waiting, now: Instant) {
        self.answered = true;
        if waiting.late_at.is_none_or(|late_at| now < late_at) {
            (self.tardy, self.avoided_until) = (0, None);
        } else {
            let pause = TARDY.0 * (1 << self.tardy.min(16));
            self.avoided_until = Some(now + pause.min(TARDY.1));
            self.tardy += 1;
        }
    }
}

/// Ends one connection, whose worker cannot be relied on, and says why.
#[derive(Clone, Debug, Default)]
struct Cut {
    token: CancellationToken,
    why: Arc<OnceLock<String>>,
}

impl Cut {
    /// The first reason counts.
    fn because(&self, why: String) {
        let _ = self.why.set(why);
        self.token.cancel();
    }

    /// Waits until it happens; why it did.
    async fn happens(&self) -> String {
        self.token.cancelled().await;
        self.why.get().cloned().unwrap_or_default()
    }
}

/// Why a connection ended.
#[derive(Debug)]
enum Ending {
    /// It broke, or the worker ended it, or we did because the worker left.
    Broken(String),
    /// The worker cannot be relied on: it was silent for too long, or talked nonsense.
    Unreliable(String),
}

/// A batch that the worker owes an answer for.
#[derive(Debug)]
struct Waiting {
    rows: usize,
    assignments: usize,
    sent: Instant,
    late_at: Option<Instant>,
    /// `None` once the caller stopped waiting: the answer is dropped when it comes, and overdue until then.
    answer: Option<oneshot::Sender<codec::Reply>>,
}

/// Marks a batch whose caller stopped waiting.
struct Forget<'a> {
    link: &'a Link,
    batch_id: u64,
    /// Whether the worker has been asked: what never left is owed no answer.
    sent: bool,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let mut stream = self.link.0.stream.lock();
        match stream.waiting.get_mut(&self.batch_id) {
            Some(waiting) if self.sent => waiting.answer = None,
            _ => drop(stream.waiting.remove(&self.batch_id)),
        }
    }
}

/// The device of a worker that computes on processors.
const ON_PROCESSORS: &str = "cpu";

impl Link {
    /// Whether the worker runs on this very host and computes on its processors, as far as its record tells.
    pub fn is_beside(&self) -> bool {
        self.0.beside
    }

    /// Starts connecting to `worker`, on `wire`. Each change of state sends one event.
    pub(super) fn open(
        worker: &WorkerRecord,
        hidden: usize,
        (counters, pace): (Arc<Counters>, Arc<Pace>),
        wire: &WireThread,
        events: mpsc::Sender<()>,
        stop: CancellationToken,
    ) -> Self {
        let here = |local: &&LocalSocket| listen::boot_id().is_some_and(|boot_id| boot_id == local.boot_id);
        let local = worker.local.as_ref().filter(here);
        let link = Self(Arc::new(Shared {
            worker: worker.id.clone(),
            beside: local.is_some() && worker.device == ON_PROCESSORS,
            incarnation: worker.incarnation,
            address: worker.address.clone(),
            local: local.map(|local| local.name.clone()),
            hidden,
            next_batch: AtomicU64::new(1),
            stream: Mutex::default(),
            canary: Mutex::default(),
            counters,
            pace,
            stop,
        }));
        wire.spawn(link.clone().keep_connected(events));
        link
    }

    /// Ends it for good.
    pub(super) fn close(&self) {
        self.0.stop.cancel();
    }

    /// Whether it can be used now.
    pub fn is_up(&self) -> bool {
        self.0.stream.lock().out.is_some()
    }

    /// Whether it owes an answer that is late, or its last ones were.
    pub fn is_overdue(&self, now: Instant) -> bool {
        let stream = self.0.stream.lock();
        if stream.avoided_until.is_some_and(|until| now < until) {
            return true;
        }
        stream.waiting.values().any(|waiting| waiting.late_at.is_some_and(|late_at| late_at <= now))
    }

    /// What it may be asked when it comes back from being left alone.
    pub(super) fn remember(&self, canary: Option<probe::Canary>) {
        *self.0.canary.lock() = canary;
    }

    /// Sends one batch and waits for what becomes of it. A worker that has not answered at `late_at` is overdue until it
    /// does, whether or not this future still lives. One that has not answered after `patience` is suspect: its stream is
    /// cut, and it is asked nothing more until a new one opens. `deadline` is when nobody will wait for the answer any
    /// more, for the worker's information; the caller drops this future then.
    pub async fn call(
        &self,
        dispatch: codec::Dispatch,
        late_at: Option<Instant>,
        patience: Duration,
        deadline: Instant,
    ) -> codec::Reply {
        let counters = &self.0.counters;
        counters.batches.fetch_add(1, Relaxed);
        counters.rows.fetch_add(dispatch.rows() as u64, Relaxed);
        let batch_id = self.0.next_batch.fetch_add(1, Relaxed);
        let (answer, answered) = oneshot::channel();
        let small = dispatch.returned_rows() * self.0.hidden * size_of::<f32>() <= LOOKED_FOR;
        let (out, cut, lookout) = {
            let mut stream = self.0.stream.lock();
            let Some(out) = stream.out.clone() else { return self.lost("there is no connection") };
            if stream.waiting.len() >= UNANSWERED_MAX {
                return self.lost("it owes too many answers");
            }
            let (rows, assignments, sent) = (dispatch.returned_rows(), dispatch.assignments(), Instant::now());
            let waiting = Waiting { rows, assignments, sent, late_at, answer: Some(answer) };
            stream.waiting.insert(batch_id, waiting);
            (out, stream.cut.clone(), stream.look_out(small))
        };
        let mut forget = Forget { link: self, batch_id, sent: false };
        // A worker that cannot be in time says so itself, a little before it would be taken for dead.
        let left = deadline.saturating_duration_since(Instant::now()).min(patience.mul_f64(0.8));
        let message = match dispatch.finish(batch_id, left) {
            Ok(message) => message,
            Err(error) => return self.lost(&error.to_string()),
        };
        let exchange = async {
            if out.send(message).await.is_err() {
                return self.lost("the connection broke");
            }
            forget.sent = true;
            let answered = self.look_for(answered, lookout.as_deref(), &cut).await;
            answered.unwrap_or_else(|_| self.lost("the connection broke"))
        };
        match timeout(patience, exchange).await {
            Ok(reply) => {
                if matches!(reply, codec::Reply::Refused(_)) {
                    counters.refused.fetch_add(1, Relaxed);
                }
                reply
            }
            Err(_) => {
                cut.because("a batch was not answered in time".to_owned());
                self.lost("it did not answer in time")
            }
        }
    }

    /// Waits for an answer that the wire's thread brings, and looks for it meanwhile: who finds an answer first, be it for
    /// somebody else, gives it to whom it belongs.
    async fn look_for(
        &self,
        mut answered: oneshot::Receiver<codec::Reply>,
        lookout: Option<&Lookout>,
        cut: &Cut,
    ) -> Result<codec::Reply, oneshot::error::RecvError> {
        let Some(lookout) = lookout else { return answered.await };
        loop {
            tokio::select! {
                biased;
                reply = &mut answered => return reply,
                message = lookout.next() => if let Err(why) = self.answer(message) {
                    cut.because(why);
                }
            }
        }
    }

    fn lost(&self, why: &str) -> codec::Reply {
        self.0.counters.lost.fetch_add(1, Relaxed);
        codec::Reply::Lost(format!("worker {}: {why}", self.0.worker))
    }

    async fn keep_connected(self, events: mpsc::Sender<()>) {
        let stop = self.0.stop.clone();
        let (mut backoff, mut quarantine, mut distrusted) = (BACKOFF.0, QUARANTINE.0, false);
        let mut well_since = Instant::now();
        while !stop.is_cancelled() {
            let opened = tokio::select! {
                opened = self.connect(distrusted) => opened,
                () = stop.cancelled() => break,
            };
            let pause = match opened {
                Ok((out, inbound)) => {
                    let cut = self.up(out);
                    let _ = events.send(()).await;
                    let ending = self.receive(inbound, &cut).await;
                    let answered = self.down();
                    let _ = events.send(()).await;
                    if answered {
                        backoff = BACKOFF.0;
                    }
                    if well_since.elapsed() >= QUARANTINE.1 {
                        quarantine = QUARANTINE.0;
                    }
                    distrusted = matches!(ending, Ending::Unreliable(_));
                    match ending {
                        _ if stop.is_cancelled() => break,
                        Ending::Broken(why) => {
                            warn!(worker = %self.0.worker, %why, "stream to expert worker ended");
                            doubling(&mut backoff, BACKOFF.1)
                        }
                        Ending::Unreliable(why) => {
                            warn!(worker = %self.0.worker, %why, pause = ?quarantine, "expert worker left alone");
                            well_since = Instant::now() + quarantine;
                            doubling(&mut quarantine, QUARANTINE.1)
                        }
                    }
                }
                Err(why) => {
                    debug!(worker = %self.0.worker, %why, "expert worker not reached");
                    doubling(&mut backoff, BACKOFF.1)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => {}
            }
        }
        self.down();
    }

    /// Opens a stream: over the worker's Unix socket where it has one on this host, and over TCP where that does not work
    /// for whatever reason. The socket may be in another network namespace, or somebody else's by now.
    async fn connect(&self, distrusted: bool) -> Result<(Outbox, Inbox), String> {
        if let Some(local) = &self.0.local {
            match self.connect_by(channel::local(local), distrusted).await {
                Ok(opened) => return Ok(opened),
                Err(why) => debug!(worker = %self.0.worker, %why, "its Unix socket was not reached"),
            }
        }
        self.connect_by(channel::tcp(&self.0.address), distrusted).await
    }

    /// A stream to a worker that is distrusted is there only once it has answered a probe.
    async fn connect_by(
        &self,
        socket: impl Future<Output = io::Result<Socket>>,
        distrusted: bool,
    ) -> Result<(Outbox, Inbox), String> {
        let open = async {
            let socket = socket.await.map_err(|error| error.to_string())?;
            // Its address may be another worker's by now, with other weights: that one will refuse.
            let metadata = [(INCARNATION_METADATA, self.0.incarnation.get().to_string())];
            let opened = stream::open(socket, &self.0.address, EXCHANGE_PATH, &metadata).await;
            let (out, mut inbound) = opened.map_err(|status| status.to_string())?;
            let canary = *self.0.canary.lock();
            if let Some(canary) = canary.filter(|_| distrusted) {
                probe::ask(canary, self.0.hidden, &out, &mut inbound).await?;
            }
            Ok((out, inbound))
        };
        timeout(OPEN_TIMEOUT * 2, open).await.unwrap_or_else(|_| Err("it does not answer".to_owned()))
    }

    fn up(&self, out: Outbox) -> Cut {
        let cut = Cut::default();
        *self.0.stream.lock() = Stream { out: Some(out), cut: cut.clone(), ..Stream::default() };
        cut
    }

    /// Everything that waits is lost: dropping its sender tells it so. Says whether the worker had answered anything.
    fn down(&self) -> bool {
        std::mem::take(&mut *self.0.stream.lock()).answered
    }

    /// Gives answers to those who wait, until the stream ends.
    async fn receive(&self, mut inbound: Inbox, cut: &Cut) -> Ending {
        loop {
            let message = tokio::select! {
                message = inbound.next() => message,
                why = cut.happens() => return Ending::Unreliable(why),
                () = self.0.stop.cancelled() => return Ending::Broken("the worker left".to_owned()),
            };
            match message {
                Ok(Some(message)) => {
                    if let Err(why) = self.answer(message) {
                        return Ending::Unreliable(why);
                    }
                }
                Ok(None) => return Ending::Broken("the worker closed it".to_owned()),
                Err(_) if inbound.fell_silent() => {
                    return Ending::Unreliable("it does not answer keep-alives".to_owned());
                }
                Err(status) => return Ending::Broken(status.to_string()),
            }
        }
    }

    fn answer(&self, message: Bytes) -> Result<(), String> {
        let corrupt = |why| {
            self.0.counters.corrupt.fetch_add(1, Relaxed);
            why
        };
        let message = codec::read(message).map_err(corrupt)?;
        let waiting = self.0.stream.lock().waiting.remove(&message.batch_id);
        let Some(waiting) = waiting else {
            self.0.counters.late.fetch_add(1, Relaxed);
            return Ok(());
        };
        let (phases, away) = (&self.0.counters.phases, waiting.sent.elapsed());
        let (queued, computed) = (Duration::from_micros(message.queue_us), Duration::from_micros(message.compute_us));
        phases.add(Phase::Queue, queued.min(away));
        phases.add(Phase::Expert, computed.min(away));
        phases.add(Phase::Wire, away.saturating_sub(queued.saturating_add(computed)));
        let decode = || codec::from_message(message, waiting.rows, self.0.hidden);
        let reply = phases.timed(Phase::Decode, decode).map_err(corrupt)?;
        let verdict = {
            let mut stream = self.0.stream.lock();
            stream.heard(&waiting, Instant::now());
            stream.strike(&reply)
        };
        if matches!(reply, codec::Reply::Rows(_)) {
            self.0.pace.observe(waiting.assignments, waiting.sent.elapsed());
        }
        // Whoever asked may have stopped waiting.
        if waiting.answer.is_none_or(|answer| answer.send(reply).is_err()) {
            self.0.counters.late.fetch_add(1, Relaxed);
        }
        verdict
    }
}

/// The pause of this time; the next one is twice as long, up to `longest`.
fn doubling(pause: &mut Duration, longest: Duration) -> Duration {
    let now = *pause;
    *pause = (now * 2).min(longest);
    now
}
