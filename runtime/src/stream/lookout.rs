//! Looking for messages beside the inbox. In: a stream's outbox, and the runtime of whoever waits. Out: each message to
//! whoever sees it first, the lookout or the inbox. Never here: the stream's end, which the inbox tells of.
//!
//! A message that the inbox's thread receives for somebody else wakes two threads, one after the other. A thread that has
//! nothing else to do can be woken by the socket itself. The connection's task is woken too, but leaves what has arrived
//! to who looks out for [`FIRST`]: two threads at one connection would wait for each other.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;

use super::call::{Outbox, Shared};
use crate::socket::Ear;

/// What has arrived is left for so long to who looks out: its thread may be computing.
pub(super) const FIRST: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub struct Lookout {
    shared: Arc<Shared>,
    ear: Ear,
}

impl Outbox {
    /// Has the runtime of the moment told when something arrives, whatever it is, until the lookout is dropped. There is
    /// none where the connection has ended or the runtime cannot.
    pub fn look_out(&self) -> Option<Lookout> {
        let ear = Ear::at(self.0.twin()?).ok()?;
        Some(Lookout { shared: Arc::clone(&self.0), ear })
    }
}

impl Lookout {
    /// The next message that nobody else has taken. Waits for ever where there is none; may be dropped half-way.
    pub async fn next(&self) -> Bytes {
        let watching = Watching::begin(&self.shared);
        match self.ear.arrival(|| self.shared.look()).await {
            Ok(message) => message,
            // The connection has ended, or the runtime: there is nothing more to look for, and nobody looks.
            Err(_) => {
                drop(watching);
                std::future::pending().await
            }
        }
    }
}

/// Somebody is looking out, as long as this lives.
struct Watching<'a>(&'a Shared);

impl<'a> Watching<'a> {
    fn begin(shared: &'a Shared) -> Self {
        shared.watching.fetch_add(1, Relaxed);
        Self(shared)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watching.fetch_sub(1, Relaxed);
    }
}
