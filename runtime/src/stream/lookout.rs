//! Looking for messages beside the inbox. In: a stream's outbox, and the runtime of whoever waits. Out: each message to
//! whoever sees it first, the lookout or the inbox. Never here: the stream's end, which the inbox tells of.
//!
//! A message that the inbox's thread receives for somebody else wakes two threads, one after the other. A thread that has
//! nothing else to do can be woken by the socket itself.

use std::sync::Arc;

use bytes::Bytes;

use super::call::{Outbox, Shared};
use crate::socket::Socket;

#[derive(Debug)]
pub struct Lookout {
    shared: Arc<Shared>,
    socket: Socket,
}

impl Outbox {
    /// Has the runtime of the moment told when something arrives, whatever it is, until the lookout is dropped. There is
    /// none where the connection has ended or the runtime cannot.
    pub fn look_out(&self) -> Option<Lookout> {
        let socket = self.0.twin()?.register().ok()?;
        Some(Lookout { shared: Arc::clone(&self.0), socket })
    }
}

impl Lookout {
    /// The next message that nobody else has taken. Waits for ever where there is none; may be dropped half-way.
    pub async fn next(&self) -> Bytes {
        match self.socket.arrival(|| self.shared.look()).await {
            Ok(message) => message,
            // The connection has ended, or the runtime: there is nothing more to look for.
            Err(_) => std::future::pending().await,
        }
    }
}
