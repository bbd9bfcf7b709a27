//! The harness that the stories in `tests/` are told with: real processes, faults, golden models.
//!
//! In: the project's own binaries and a real etcd. Out: clusters that come up on free ports, that can be hurt, and that
//! are gone when the test is. Never here: sleeping where a condition can be awaited, asserting a wall-clock time, or
//! skipping: what is missing fails the test with a word on how to get it. Functions here panic, as assertions do.
//!
//! Cargo does not build other packages' binaries for a test: `make test` runs `cargo build --workspace` first, and so
//! must whoever runs `cargo test -p conclave-tests` by hand.

pub mod eventually;
pub mod process;

pub mod etcd;

pub mod checkpoint;
pub mod golden;
pub mod metrics;
pub mod tokenizer;

pub mod cluster;

pub mod client;

pub mod fake_expert;

pub mod chaos;

pub mod record;

pub mod load;
pub mod signs;
pub mod vitals;

pub mod report;

pub mod drill;
