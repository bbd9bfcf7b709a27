//! A socket that is read when somebody looks, whether or not its runtime has heard of what arrived, and that tells whether
//! something waits for room. In: the runtime's socket. Out: the same, for HTTP/2. Nothing is waited for here that the
//! runtime would not tell of.
//!
//! A runtime's socket is read only once the runtime's own thread has been told that there is something to read. Whoever
//! looks from another thread may be quicker than that.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::socket::Socket;

/// Read at once by a look: more is what the runtime's thread is for.
const MOST: usize = 16 << 10;

#[derive(Debug)]
pub(super) struct Eager {
    socket: Socket,
    signs: Arc<Signs>,
}

/// Between the socket and those around HTTP/2.
#[derive(Debug, Default)]
pub(super) struct Signs {
    /// Somebody looks, and has not seen the end of what there is.
    pub(super) looking: AtomicBool,
    /// What was to be written had no room.
    pub(super) full: AtomicBool,
}

impl Eager {
    pub(super) fn new(socket: Socket, signs: Arc<Signs>) -> Self {
        Self { socket, signs }
    }

    /// Who is called because there is room finds that there was none.
    fn noting<T>(&mut self, write: impl FnOnce(Pin<&mut Socket>) -> Poll<T>) -> Poll<T> {
        self.signs.full.store(true, Relaxed);
        let written = write(Pin::new(&mut self.socket));
        self.signs.full.store(written.is_pending(), Relaxed);
        written
    }
}

impl AsyncRead for Eager {
    /// Where there is nothing, the runtime's socket finds so too, and keeps the waker.
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        use rustix::io::Errno;
        if !self.signs.looking.load(Relaxed) {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        let room = buf.remaining().min(MOST);
        match rustix::io::read(&self.socket, buf.initialize_unfilled_to(room)) {
            Ok(read) => {
                buf.advance(read);
                // What arrives after this is told to all.
                self.signs.looking.store(read == room, Relaxed);
                Poll::Ready(Ok(()))
            }
            Err(Errno::AGAIN | Errno::INTR) => Pin::new(&mut self.socket).poll_read(cx, buf),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

impl AsyncWrite for Eager {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.noting(|socket| socket.poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.noting(|socket| socket.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}
