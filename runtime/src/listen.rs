//! Sockets: addresses come in, a bound listener with Nagle's algorithm off goes out, with a Unix socket beside the port
//! where processes of this host may use one. Nothing is accepted or parsed.

use std::net::SocketAddr;
use std::pin::Pin;

use tokio::net::UnixListener;
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
        let tcp = self.incoming.map(|accepted| accepted.map(Socket::Tcp));
        match self.local.map(UnixListenerStream::new) {
            Some(local) => Box::pin(tcp.merge(local.map(|accepted| accepted.map(Socket::Local)))),
            None => Box::pin(tcp),
        }
    }
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

    #[tokio::test]
    async fn a_taken_port_is_named_in_the_error() {
        let first = bind("127.0.0.1:0").unwrap();
        let address = first.local_addr.to_string();
        let error = bind(&address).unwrap_err().to_string();
        assert!(error.contains(&address), "{error}");
    }
}
