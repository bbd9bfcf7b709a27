//! A connected socket inside the cluster: TCP, or a Unix socket where both ends are on one host. Bytes pass, nothing else.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::server::Connected;

#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Local(UnixStream),
}

/// Calls the same method of whichever socket it is.
macro_rules! either {
    ($socket:expr, $inner:ident => $call:expr) => {
        match $socket {
            Socket::Tcp($inner) => $call,
            Socket::Local($inner) => $call,
        }
    };
}

/// A socket once more, not known to a runtime yet.
#[derive(Debug)]
pub(crate) enum Twin {
    Tcp(std::net::TcpStream),
    Local(std::os::unix::net::UnixStream),
}

impl Twin {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
            Self::Local(socket) => Self::Local(socket.try_clone()?),
        })
    }

    /// Has the runtime of the moment told of what arrives, beside the one that was told before.
    pub(crate) fn register(self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(socket) => Socket::Tcp(TcpStream::from_std(socket)?),
            Self::Local(socket) => Socket::Local(UnixStream::from_std(socket)?),
        })
    }
}

impl Socket {
    /// The same socket, for another runtime. It stays open until all are gone.
    pub(crate) fn twin(&self) -> io::Result<Twin> {
        let fd = self.as_fd().try_clone_to_owned()?;
        Ok(match self {
            Self::Tcp(_) => Twin::Tcp(fd.into()),
            Self::Local(_) => Twin::Local(fd.into()),
        })
    }

    /// Waits until something may have arrived, and what `look` finds then. May be dropped half-way. An error once the other
    /// end has ended, whatever it sent before.
    pub(crate) async fn arrival<T>(&self, mut look: impl FnMut() -> Option<T>) -> io::Result<T> {
        loop {
            let ready = either!(self, socket => socket.ready(Interest::READABLE).await)?;
            // Such a socket stays ready for ever.
            if ready.is_read_closed() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // What arrives after this look is told again.
            let found = || look().ok_or_else(|| io::ErrorKind::WouldBlock.into());
            match either!(self, socket => socket.try_io(Interest::READABLE, found)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                found => return found,
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, socket => socket.as_fd())
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_shutdown(cx))
    }

    // A frame's header and its rows leave in one system call.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_write_vectored(cx, bufs))
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
