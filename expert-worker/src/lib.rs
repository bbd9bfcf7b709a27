//! The expert worker: hidden rows come in from routers, the outputs of the experts that live here go out. It holds
//! what the plan gives it, says honestly what it lacks, and computes on one thread. It never gates, never combines
//! across workers, never guesses at an expert it does not hold, and never speaks to another worker.

// The process.
pub mod app;
pub mod config;
pub mod memory;
pub mod registration;
mod readiness;

// The way of a batch.
pub mod service;

pub mod batcher;
pub mod executor;
mod held;

// The way of an expert.
pub mod reconciler;
pub mod reconcile;
mod failures;
pub mod loader;
pub mod residency;

pub mod metrics;

#[cfg(test)]
#[path = "../../model/tests/made_up_gpu/mod.rs"]
mod made_up_gpu;
