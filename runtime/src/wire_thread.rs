//! A thread that does nothing but serve sockets: futures come in, and run there beside each other on a tokio runtime of
//! one thread. Nothing is computed there, and nobody else's work stands before a message.
//!
//! On a runtime of many threads, a message passes four or five tasks on its way (connection, stream, reader, writer,
//! connection) and each step may wake another thread, at 5 to 50 µs a wake. Here each step is an entry in a queue.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Ends with its handle, and with it all that runs there.
#[derive(Debug)]
pub struct WireThread {
    handle: Handle,
    _stop: DropGuard,
}

impl WireThread {
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || runtime.block_on(stopped.cancelled()))?;
        Ok(Self { handle, _stop: stop.drop_guard() })
    }

    /// Runs `future` there.
    pub fn spawn<F: Future<Output: Send> + Send + 'static>(&self, future: F) -> JoinHandle<F::Output> {
        self.handle.spawn(future)
    }

    /// What spawns there.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}
