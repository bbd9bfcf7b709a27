//! Sockets: an address comes in, a bound listener with Nagle's algorithm off goes out. Nothing is accepted or parsed.

use std::net::SocketAddr;

use tonic::transport::server::TcpIncoming;

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
    pub incoming: TcpIncoming,
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
        Ok(Listener { local_addr, incoming })
    };
    open().map_err(|source| Error { address: addr.to_owned(), source })
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
