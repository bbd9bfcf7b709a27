//! How requests get in, which sequences take part in the next step, and who holds which block of the cache.
//!
//! In: valid requests, through a bounded queue. Out: a plan for each step, under the token budget.
//! Never here: tensors, the network. The engine asks when it is ready.

mod admission;
mod waiting;
pub mod policy;
pub mod blocks;

pub use waiting::{Answers, Handle, Queue, Submission, Waiting, queue};
