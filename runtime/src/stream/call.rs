//! The caller's end of a stream: a connected socket comes in, an [`Outbox`] and an [`Inbox`] go out. The connection carries
//! this one stream and ends with it. Nothing is connected again here.
//!
//! Whoever sends also writes: the message is handed to HTTP/2 and the socket on the sender's own thread, because waking
//! another one to do it takes longer than to write a few rows. What the socket does not take at once, and all that
//! arrives, is the business of the connection's task, on the runtime that opened it. Who waits for a message may look for it
//! beside the inbox ([`super::lookout`]); whoever comes first has it. Nobody waits for the connection: who finds it in use
//! leaves the work to whoever uses it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::client::Connection;
use h2::{Ping, PingPong, RecvStream, SendStream};
use http::{HeaderMap, Request, Response, StatusCode};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::assembly::Assembly;
use super::bell::Bell;
use super::eager::{Eager, Signs};
use super::lookout::FIRST;
use super::word::{lock_or_leave, was_left};
use crate::server::{
    INTERNAL_CONNECTION_WINDOW, INTERNAL_FRAME, INTERNAL_KEEP_ALIVE, INTERNAL_KEEP_ALIVE_TIMEOUT,
    INTERNAL_STREAM_WINDOW, MAX_INTERNAL_MESSAGE,
};
use crate::socket::Socket;

/// What may wait for the socket, KiB: two of the largest messages.
const QUEUE_KIB: usize = 2 * MAX_INTERNAL_MESSAGE / 1024;
/// Of it, what HTTP/2 may hold, bytes.
const SEND_BUFFER: usize = 8 << 20;

/// The connection has ended.
#[derive(Debug, thiserror::Error)]
#[error("the connection has ended")]
pub struct Closed;

/// Where messages are sent.
#[derive(Clone, Debug)]
pub struct Outbox(pub(super) Arc<Shared>);

/// Where messages arrive. Dropping it ends the connection.
#[derive(Debug)]
pub struct Inbox {
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
pub(super) struct Shared {
    queue: Mutex<VecDeque<Queued>>,
    room: Arc<Semaphore>,
    /// `None` once it has ended.
    line: Mutex<Option<Line>>,
    /// Its socket once more, for lookouts.
    twin: Mutex<Option<OwnedFd>>,
    /// Of its socket.
    signs: Arc<Signs>,
    /// Somebody found the line in use: whoever uses it sees to what that one came for.
    again: AtomicBool,
    incoming: Mutex<Incoming>,
    /// Calls the connection's task.
    task: Bell,
    /// Calls whoever waits at the inbox.
    inbox: Bell,
    /// How many look out at the moment. What arrives is theirs first.
    pub(super) watching: AtomicUsize,
    /// It ended because the other end no longer answered.
    silent: AtomicBool,
}

/// Who takes a turn.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Task,
    Sender,
    /// It reads the socket though the runtime has not heard of anything.
    Lookout,
}

#[derive(Debug)]
struct Queued {
    rest: Bytes,
    _room: OwnedSemaphorePermit,
}

/// The connection and the way into it.
#[derive(Debug)]
struct Line {
    connection: Connection<Eager, Bytes>,
    stream: SendStream<Bytes>,
}

/// What has arrived, and not been taken.
#[derive(Debug, Default)]
struct Incoming {
    /// `None` until the other end has accepted the stream.
    stream: Option<RecvStream>,
    assembly: Assembly,
    /// What a look found behind what it looked for.
    found: Option<Arrival>,
}

/// A message; `None` where the other end has ended the stream in order.
type Arrival = Result<Option<Bytes>, Status>;

/// Opens a stream to `path` over `socket`, on the runtime of the moment, and waits until the other end has accepted it.
pub async fn open(
    socket: Socket,
    authority: &str,
    path: &str,
    metadata: &[(&'static str, String)],
) -> Result<(Outbox, Inbox), Status> {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(INTERNAL_STREAM_WINDOW)
        .initial_connection_window_size(INTERNAL_CONNECTION_WINDOW)
        .max_frame_size(INTERNAL_FRAME)
        .max_send_buffer_size(SEND_BUFFER);
    let signs = Arc::<Signs>::default();
    let twin = socket.as_fd().try_clone_to_owned().map_err(|error| Status::unavailable(error.to_string()))?;
    let (requests, mut connection) =
        builder.handshake::<_, Bytes>(Eager::new(socket, Arc::clone(&signs))).await.map_err(broken)?;
    let pings = connection.ping_pong();
    let mut request = Request::post(format!("http://{authority}{path}"))
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers");
    for (name, value) in metadata {
        request = request.header(*name, value);
    }
    let request = request.body(()).map_err(|error| Status::internal(error.to_string()))?;
    let mut requests = requests.ready().await.map_err(broken)?;
    let (response, stream) = requests.send_request(request, false).map_err(broken)?;
    let line = Line { connection, stream };
    let shared = Arc::new(Shared {
        queue: Mutex::default(),
        room: Arc::new(Semaphore::new(QUEUE_KIB)),
        line: Mutex::new(Some(line)),
        twin: Mutex::new(Some(twin)),
        signs,
        again: AtomicBool::new(false),
        incoming: Mutex::default(),
        task: Bell::default(),
        inbox: Bell::default(),
        watching: AtomicUsize::new(0),
        silent: AtomicBool::new(false),
    });
    let task = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&shared).run(pings)));
    let (parts, stream) = response.await.map_err(broken)?.into_parts();
    accepted(&Response::from_parts(parts, ()))?;
    shared.incoming.lock().stream = Some(stream);
    let inbox = Inbox { shared: Arc::clone(&shared), _task: task };
    Ok((Outbox(shared), inbox))
}

fn broken(error: h2::Error) -> Status {
    Status::unavailable(error.to_string())
}

fn accepted(response: &Response<()>) -> Result<(), Status> {
    if response.status() != StatusCode::OK {
        return Err(Status::unavailable(format!("answered with HTTP status {}", response.status())));
    }
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != tonic::Code::Ok => Err(status),
        _ => Ok(()),
    }
}

impl Outbox {
    /// Sends a message, header and all; waits only while too much waits already. Sent once this returns, as far as
    /// anybody on this side can tell.
    pub async fn send(&self, message: Bytes) -> Result<(), Closed> {
        let kib = (message.len() / 1024).clamp(1, QUEUE_KIB) as u32;
        let room = Arc::clone(&self.0.room).acquire_many_owned(kib).await.map_err(|_| Closed)?;
        self.0.queue.lock().push_back(Queued { rest: message, _room: room });
        // Whether it has ended is for the task to find.
        let _ = self.0.turn(By::Sender);
        Ok(())
    }
}

impl Inbox {
    /// The next message; `None` where the other end has ended the stream in order. May be dropped half-way.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        poll_fn(|cx| {
            self.shared.inbox.listen(cx.waker());
            self.shared.incoming.lock().poll_next(self.shared.inbox.waker())
        })
        .await
    }

    /// Whether the connection ended because the other end no longer answered keep-alives.
    pub fn fell_silent(&self) -> bool {
        self.shared.silent.load(Relaxed)
    }
}

impl Shared {
    /// The connection's task, until it ends.
    async fn run(self: Arc<Self>, pings: Option<PingPong>) {
        tokio::select! {
            () = self.serve() => {}
            () = silence(pings) => self.silent.store(true, Relaxed),
        }
        self.close();
    }

    /// Takes a turn whenever there is something to do, until the connection has ended. What arrives is left to those who look
    /// out, for a moment; what is to be sent never waits, nor what one of them came for in vain.
    async fn serve(&self) {
        let (mut theirs, mut until) = (false, pin!(sleep(FIRST)));
        poll_fn(|cx| {
            self.task.listen(cx.waker());
            let nothing_else = || {
                let wanted = self.again.load(Relaxed) || self.signs.full.load(Relaxed);
                !wanted && self.queue.lock().is_empty()
            };
            if self.watching.load(Relaxed) > 0 && nothing_else() {
                if !std::mem::replace(&mut theirs, true) {
                    until.as_mut().reset(Instant::now() + FIRST);
                }
                ready!(until.as_mut().poll(cx));
            }
            theirs = false;
            self.turn(By::Task)
        })
        .await;
    }

    /// Moves what can be moved, both ways. Ready once the connection has ended. Where somebody else is at it, that one sees
    /// to what this one came for.
    fn turn(&self, by: By) -> Poll<()> {
        loop {
            let Some(mut line) = lock_or_leave(&self.line, &self.again) else { return Poll::Pending };
            let wanted = self.again.swap(false, Relaxed);
            let Some(open) = line.as_mut() else { return Poll::Ready(()) };
            // Who was here in vain may have heard of what this one's runtime has not.
            self.signs.looking.store(wanted || by == By::Lookout, Relaxed);
            let turned = open.turn(&self.queue, &self.task);
            self.signs.looking.store(false, Relaxed);
            drop(line);
            if turned.is_ready() {
                // The end is for the task to see to. It may have been here in vain.
                if by != By::Task {
                    self.task.waker().wake_by_ref();
                }
                return Poll::Ready(());
            }
            if !was_left(&self.again) {
                return Poll::Pending;
            }
            // A sender has other things to do than to read what arrived meanwhile.
            if by == By::Sender && self.queue.lock().is_empty() {
                self.task.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Reads what has arrived, on the thread of whoever asks, and takes the first message that is whole. What the stream's
    /// end means is for the inbox to find, which is told.
    pub(super) fn look(&self) -> Option<Bytes> {
        // Whether it has ended is for the task to find, and what arrives is taken right here.
        let _ = self.inbox.quietly(|| self.turn(By::Lookout));
        let mut incoming = self.incoming.lock();
        let first = incoming.poll_next(self.inbox.waker());
        let (message, more) = match first {
            Poll::Ready(Ok(Some(message))) => (Some(message), incoming.poll_next(self.inbox.waker())),
            other => (None, other),
        };
        if let Poll::Ready(more) = more {
            incoming.found = Some(more);
            self.inbox.waker().wake_by_ref();
        }
        message
    }

    /// The socket once more.
    pub(super) fn twin(&self) -> Option<OwnedFd> {
        self.twin.lock().as_ref()?.try_clone().ok()
    }

    fn close(&self) {
        self.room.close();
        *self.line.lock() = None;
        *self.twin.lock() = None;
        self.queue.lock().clear();
    }
}

/// Ends when the other end no longer answers. Keep-alives run while idle too.
async fn silence(pings: Option<PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(INTERNAL_KEEP_ALIVE).await;
        match timeout(INTERNAL_KEEP_ALIVE_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

impl Line {
    /// Moves what can be moved, both ways. Ready once the connection has ended.
    fn turn(&mut self, queue: &Mutex<VecDeque<Queued>>, task: &Bell) -> Poll<()> {
        let mut cx = Context::from_waker(task.waker());
        // HTTP/2 calls for the task that writes, which is what comes next here.
        let filled = task.quietly(|| self.fill(queue, &mut cx));
        let ended = Pin::new(&mut self.connection).poll(&mut cx).is_ready();
        if filled.is_err() || ended { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Hands queued messages to HTTP/2, as much as the other end's window and the send buffer take.
    fn fill(&mut self, queue: &Mutex<VecDeque<Queued>>, cx: &mut Context<'_>) -> Result<(), Closed> {
        let mut queue = queue.lock();
        while let Some(first) = queue.front_mut() {
            self.stream.reserve_capacity(first.rest.len());
            let room = self.stream.capacity().min(first.rest.len());
            if room == 0 && !first.rest.is_empty() {
                match self.stream.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(_))) => continue,
                    Poll::Ready(_) => return Err(Closed),
                    Poll::Pending => return Ok(()),
                }
            }
            self.stream.send_data(first.rest.split_to(room), false).map_err(|_| Closed)?;
            if first.rest.is_empty() {
                queue.pop_front();
            }
        }
        Ok(())
    }
}

impl Incoming {
    /// As [`Inbox::next`]; `inbox` is called when there may be more.
    fn poll_next(&mut self, inbox: &Waker) -> Poll<Arrival> {
        if let Some(found) = self.found.take() {
            return Poll::Ready(found);
        }
        let Some(stream) = &mut self.stream else { return Poll::Pending };
        let mut cx = Context::from_waker(inbox);
        loop {
            if let Some(message) = self.assembly.next()? {
                return Poll::Ready(Ok(Some(message)));
            }
            match ready!(stream.poll_data(&mut cx)) {
                Some(Ok(frame)) => {
                    stream.flow_control().release_capacity(frame.len()).map_err(broken)?;
                    self.assembly.push(frame);
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None if !self.assembly.is_empty() => {
                    return Poll::Ready(Err(Status::unavailable("ended within a message")));
                }
                None => break,
            }
        }
        let trailers = ready!(stream.poll_trailers(&mut cx)).map_err(broken)?;
        Poll::Ready(match Status::from_header_map(&trailers.unwrap_or_else(HeaderMap::new)) {
            Some(status) if status.code() != tonic::Code::Ok => Err(status),
            _ => Ok(None),
        })
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.shared.close();
    }
}
