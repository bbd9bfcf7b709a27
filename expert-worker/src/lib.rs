//! The expert worker: hidden rows come in from routers, the outputs of the experts that live here go out. It holds
//! what the plan gives it, says honestly what it lacks, and computes on one thread. It never gates, never combines
//! across workers, never guesses at an expert it does not hold, and never speaks to another worker.

pub mod app;
pub mod batcher;
pub mod config;
pub mod executor;
pub mod loader;
pub mod metrics;
pub mod registration;
pub mod residency;
pub mod service;
