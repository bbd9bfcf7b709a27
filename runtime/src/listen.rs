//! Sockets: addresses come in, a bound listener with Nagle's algorithm off goes out, with a Unix socket beside the port
//! where processes of this host may use one. Nothing is accepted or parsed.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;

use crate::socket::Socket;

#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}")]
pub struct Error {
    address: String,
    source: std::io::Error,
}

/// A bound port, not served yet.
#[derive(Debug)]
pub struct Listener {
    /// Where it is bound: with port 0 asked for, the port that was found.
    pub local_addr: SocketAddr,
    incoming: TcpIncoming,
    local: Option<UnixListener>,
}

/// Binds `addr` ("host:port"; port 0 takes a free one). Must be called within a tokio runtime; a host name is resolved
/// on the calling thread.
///
/// tonic's `serve_with_incoming` leaves Nagle's algorithm on for a plain listener stream, and a small answer then takes
/// 44 ms on loopback; `TcpIncoming` with nodelay does not.
pub fn bind(addr: &str) -> Result<Listener, Error> {
    let open = || -> std::io::Result<Listener> {
        let socket = std::net::TcpListener::bind(addr)?;
        socket.set_nonblocking(true)?;
        let local_addr = socket.local_addr()?;
        let incoming = TcpIncoming::from(tokio::net::TcpListener::from_std(socket)?).with_nodelay(Some(true));
        Ok(Listener { local_addr, incoming, local: None })
    };
    open().map_err(|source| Error { address: addr.to_owned(), source })
}

impl Listener {
    /// Listens for processes of this host too, at the abstract Unix socket `name`. Such a socket lives in the network
    /// namespace: whoever can reach it can reach the port as well, it needs no folder that both sides see, and the kernel
    /// takes it away with the process, however that ends.
    pub fn also_at(&mut self, name: &str) -> Result<(), Error> {
        let bound = UnixListener::bind(abstract_path(name));
        self.local = Some(bound.map_err(|source| Error { address: format!("unix socket @{name}"), source })?);
        Ok(())
    }

    /// Connections from both.
    pub fn incoming(self) -> Pin<Box<dyn Stream<Item = std::io::Result<Socket>> + Send>> {
        let tcp = self.incoming.map(|accepted| accepted.and_then(Socket::tcp));
        match self.local.map(UnixListenerStream::new) {
            Some(local) => Box::pin(rested(tcp.merge(local.map(|accepted| accepted.and_then(Socket::local))))),
            None => Box::pin(rested(tcp)),
        }
    }
}

/// What a listener waits when there is nothing to accept a connection with.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// How often that is said.
const EXHAUSTED_TOLD_EVERY: Duration = Duration::from_secs(5);

/// A connection that cannot be accepted for want of descriptors or memory stays in the kernel's queue and fails again at once:
/// without a rest the thread would do nothing else, and it has other connections to serve.
fn rested<S: Send>(
    accepted: impl Stream<Item = std::io::Result<S>> + Send,
) -> impl Stream<Item = std::io::Result<S>> + Send {
    let mut told: Option<Instant> = None;
    futures::StreamExt::then(accepted, move |accepted| {
        let exhausted = accepted.as_ref().err().is_some_and(is_exhaustion);
        if exhausted && told.is_none_or(|told| told.elapsed() >= EXHAUSTED_TOLD_EVERY) {
            told = Some(Instant::now());
            tracing::warn!("no descriptors or memory for another connection");
        }
        async move {
            if exhausted {
                sleep(EXHAUSTED_PAUSE).await;
            }
            accepted
        }
    })
}

fn is_exhaustion(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|code| exhausted.iter().any(|errno| errno.raw_os_error() == code))
}

/// How tokio is told of the abstract socket `name`: by a path that begins with a zero byte.
pub(crate) fn abstract_path(name: &str) -> String {
    format!("\0{name}")
}

/// What tells this boot of this machine from all others, where the kernel says it. Containers of one host share it.
pub fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// This host's name, as others on its network may know it.
pub fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// An address that others can use: this host's name where the socket listens on all interfaces.
pub fn reachable(bound: SocketAddr) -> String {
    if bound.ip().is_unspecified() { format!("{}:{}", host(), bound.port()) } else { bound.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_listener_without_descriptors_rests_between_attempts() {
        let fails = || Err::<(), _>(std::io::Error::from_raw_os_error(rustix::io::Errno::MFILE.raw_os_error()));
        let other = Err(std::io::Error::other("another"));
        let (started, accepted) = (Instant::now(), tokio_stream::iter([fails(), fails(), other, Ok(())]));
        let accepted: Vec<_> = futures::StreamExt::collect(rested(accepted)).await;
        assert_eq!(accepted.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, false, false, true]);
        assert_eq!(started.elapsed(), 2 * EXHAUSTED_PAUSE, "only for those");
    }

    #[tokio::test]
    async fn a_taken_port_is_named_in_the_error() {
        let first = bind("127.0.0.1:0").unwrap();
        let address = first.local_addr.to_string();
        let error = bind(&address).unwrap_err().to_string();
        assert!(error.contains(&address), "{error}");
    }
}
