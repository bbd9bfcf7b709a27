//! Channels inside the cluster: an address comes in, an endpoint with its limits set goes out, or a connected socket for
//! a stream of rows. Nothing is retried or balanced here.

use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tonic::transport::Endpoint;

pub use crate::server::MAX_INTERNAL_MESSAGE;
use crate::server::{
    INTERNAL_CONNECTION_WINDOW, INTERNAL_FRAME, INTERNAL_KEEP_ALIVE, INTERNAL_KEEP_ALIVE_TIMEOUT,
    INTERNAL_STREAM_WINDOW,
};

use crate::listen::abstract_path;
use crate::socket::Socket;

/// How long a connection attempt may take. tonic has no limit of its own, so a black-holed address would hang.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
#[error("{address:?} is no address of the form host:port: {source}")]
pub struct Error {
    address: String,
    source: tonic::transport::Error,
}

/// An endpoint for `address` ("host:port"). Keep-alives run while idle too, so a peer that vanished without a reset is
/// noticed within 7 s. Give the client [`MAX_INTERNAL_MESSAGE`] as its message limits.
pub fn internal(address: &str) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|source| Error { address: address.to_owned(), source })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(INTERNAL_KEEP_ALIVE)
        .keep_alive_timeout(INTERNAL_KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(INTERNAL_STREAM_WINDOW)
        .initial_connection_window_size(INTERNAL_CONNECTION_WINDOW)
        .max_frame_size(INTERNAL_FRAME))
}

/// A TCP connection to `address` ("host:port").
pub async fn tcp(address: &str) -> std::io::Result<Socket> {
    let socket = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await??;
    socket.set_nodelay(true)?;
    Socket::tcp(socket)
}

/// A connection to the abstract Unix socket `name` of this network namespace. Refused at once where there is none.
pub async fn local(name: &str) -> std::io::Result<Socket> {
    Socket::local(timeout(CONNECT_TIMEOUT, UnixStream::connect(abstract_path(name))).await??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_with_its_own_words() {
        let error = internal("no host").unwrap_err().to_string();
        assert!(error.contains("no host"), "{error}");
    }
}
