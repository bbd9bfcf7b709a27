//! Drills: a cluster of real processes under a steady load, and one thing that goes wrong.
//!
//! In: faults, as reliability engineers list them. Out: per drill, a report: requests ok, failed and hung, tokens that
//! differ from an undisturbed run, stalls, times to detect and to recover, throughput. Never here: two drills at once.
//! `make test` runs them for seconds each, `make drills` at full length (`CONCLAVE_DRILLS=full`); docs/robustness.md has
//! the figures, and says how each is defined.

mod scene;

mod balance;
mod network;
mod placement;
mod quorum;
mod routers;
mod soak;
mod store;
mod workers;
