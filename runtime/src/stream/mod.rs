//! Bidirectional gRPC streams whose messages are bytes: the path that every row takes, without a copy, a task or a
//! thread that it can do without. In: whole messages, encoded by whoever knows them. Out: the same. What they mean is
//! not known here, and compression is refused: rows do not compress.
//!
//! tonic's own streams copy each message twice (into its frame buffer, and out of it), and hand it from task to task.

mod answer;
mod assembly;
mod bell;
mod call;
mod driver;
mod eager;
mod lookout;
mod serve;
mod word;

pub use answer::{Front, Handler, Inbound};
pub use assembly::{HEADER, Message, TooLong};
pub use call::{Closed, Inbox, Outbox, open};
pub use driver::{Driver, driven_here};
pub use lookout::Lookout;
pub use serve::serve;

#[cfg(test)]
mod tests;
