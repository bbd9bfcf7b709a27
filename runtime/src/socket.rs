//! A connected socket inside the cluster: TCP, or a Unix socket where both ends are on one host. Bytes pass, nothing else.
//!
//! tokio's own sockets are told of room to write whenever the other end of a Unix socket has read something, which wakes a
//! thread that has nothing to write. The ends of its pipes are told of one thing each, and to read and to write is the same
//! for both; so a socket is read as one is, and written as one only while there is no room.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::unix::pipe;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tonic::transport::server::Connected;

/// Between messages that fill a socket go others that do not, such as updates of windows, and to be told of room anew takes
/// longer than those.
const CALM: u32 = 32;

#[derive(Debug)]
pub struct Socket {
    inward: pipe::Receiver,
    outward: Outward,
    /// Which is told, whoever writes.
    runtime: Handle,
}

/// The socket once more, taken at the beginning: a process may have no descriptors left when it is needed.
#[derive(Debug)]
enum Outward {
    /// Nobody is told of room.
    Silent(OwnedFd),
    /// Since something had no room, until [`CALM`] writes in a row have found some: so many have by now.
    Told(pipe::Sender, u32),
    /// It could not be had, or not be told of. The connection ends.
    Lost,
}

impl Socket {
    /// Has the runtime of the moment told of what arrives.
    pub fn tcp(socket: TcpStream) -> io::Result<Self> {
        Self::adopt(socket.into_std()?.into())
    }

    /// As [`Socket::tcp`].
    pub fn local(socket: UnixStream) -> io::Result<Self> {
        Self::adopt(socket.into_std()?.into())
    }

    /// `socket` does not block.
    fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let outward = Outward::Silent(socket.try_clone()?);
        let inward = pipe::Receiver::from_owned_fd_unchecked(socket)?;
        Ok(Self { inward, outward, runtime: Handle::current() })
    }

    /// Writes without being told of room; waits for it where there is none.
    fn poll_send(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            if let Outward::Told(outward, calm) = &mut self.outward {
                let sent = Pin::new(outward).poll_write_vectored(cx, bufs);
                *calm = if sent.is_pending() { 0 } else { *calm + 1 };
                return sent;
            }
            match sendmsg(&self.inward, bufs, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL) {
                Err(Errno::AGAIN) => self.be_told()?,
                Err(Errno::INTR) => {}
                sent => return Poll::Ready(Ok(sent?)),
            }
        }
    }

    fn be_told(&mut self) -> io::Result<()> {
        let Outward::Silent(twin) = std::mem::replace(&mut self.outward, Outward::Lost) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let _entered = self.runtime.enter();
        self.outward = Outward::Told(pipe::Sender::from_owned_fd_unchecked(twin)?, 0);
        Ok(())
    }

    fn be_left_alone_if_calm(&mut self) -> io::Result<()> {
        self.outward = match std::mem::replace(&mut self.outward, Outward::Lost) {
            Outward::Told(outward, CALM..) => Outward::Silent(outward.into_nonblocking_fd()?),
            as_it_is => as_it_is,
        };
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inward.as_fd()
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inward).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[IoSlice::new(buf)])
    }

    /// Nothing is kept here that has not been written.
    fn poll_flush(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.be_left_alone_if_calm())
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match shutdown(&self.inward, Shutdown::Write) {
            // Who has gone already needs not be told.
            Ok(()) | Err(Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    // A frame's header and its rows leave in one system call.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

impl Connected for Socket {
    /// Nobody is told apart by where they call from.
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// Hears of what arrives at a socket, beside the runtime that reads it.
#[derive(Debug)]
pub(crate) struct Ear(pipe::Receiver);

impl Ear {
    /// `socket` once more. Has the runtime of the moment told too. The socket stays open until all are gone.
    pub(crate) fn at(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(pipe::Receiver::from_owned_fd_unchecked(socket)?))
    }

    /// Waits until something may have arrived, and what `look` finds then. May be dropped half-way. An error once the other
    /// end has ended, whatever it sent before.
    pub(crate) async fn arrival<T>(&self, mut look: impl FnMut() -> Option<T>) -> io::Result<T> {
        loop {
            // Such a socket stays ready for ever.
            if self.0.ready(Interest::READABLE).await?.is_read_closed() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // What arrives after this look is told again.
            match self.0.try_io(|| look().ok_or_else(|| io::ErrorKind::WouldBlock.into())) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                found => return found,
            }
        }
    }
}
