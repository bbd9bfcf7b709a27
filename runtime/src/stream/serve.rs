//! Serves the cluster's own methods: a listener and services come in, each connection gets a [`Driver`]. Which method is
//! answered how is for the services.

use std::pin::pin;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::service::Routes;

use super::driver::Driver;
use crate::listen::Listener;
use crate::server::{
    INTERNAL_CONNECTION_WINDOW, INTERNAL_FRAME, INTERNAL_KEEP_ALIVE, INTERNAL_KEEP_ALIVE_TIMEOUT,
    INTERNAL_STREAM_WINDOW,
};
use crate::socket::Socket;

/// Streams of one connection at a time.
const MOST_STREAMS: u32 = 1024;
/// Resets that a connection survives: many at once are normal where a router gives up a step.
const MOST_RESETS: usize = 2048;
/// Headers of a request, bytes.
const LONGEST_HEADERS: u32 = 16 << 10;

/// Serves until `stop` is cancelled, then closes the port and waits for open streams, at most `grace`. Streams that are still
/// open after that end with the runtime.
pub async fn serve(routes: Routes, listener: Listener, stop: CancellationToken, grace: Duration) {
    let (routes, connections) = (routes.prepare(), TaskTracker::new());
    let address = listener.local_addr;
    {
        // Let go of before others' streams are waited for: the port is closed then.
        let mut incoming = pin!(listener.incoming());
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                socket = incoming.next() => match socket {
                    // Who could not be accepted comes again.
                    Some(Ok(socket)) => drop(connections.spawn(connection(routes.clone(), socket, stop.clone()))),
                    Some(Err(_)) => {}
                    None => break,
                }
            }
        }
    }
    connections.close();
    if tokio::time::timeout(grace, connections.wait()).await.is_err() {
        tracing::warn!(%address, grace_s = grace.as_secs_f64(), "streams still open after the grace: leaving them");
    }
}

/// One connection, until it ends.
async fn connection(routes: Routes, socket: Socket, stop: CancellationToken) {
    let driver = Driver::new();
    let mut server = http2::Builder::new(driver.clone());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(MOST_STREAMS)
        .initial_stream_window_size(INTERNAL_STREAM_WINDOW)
        .initial_connection_window_size(INTERNAL_CONNECTION_WINDOW)
        .max_frame_size(INTERNAL_FRAME)
        .max_pending_accept_reset_streams(MOST_RESETS)
        .max_local_error_reset_streams(MOST_RESETS)
        .max_header_list_size(LONGEST_HEADERS)
        .keep_alive_interval(INTERNAL_KEEP_ALIVE)
        .keep_alive_timeout(INTERNAL_KEEP_ALIVE_TIMEOUT);
    let own = driver.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(own.clone());
        routes.clone().call(request)
    });
    let connection = server.serve_connection(TokioIo::new(socket), service);
    driver.spawn(async move {
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended");
        }
    });
    driver.run().await;
}
