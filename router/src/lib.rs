//! The router: applications in front, expert workers behind.
//!
//! In: requests over gRPC; the cluster's state over the store. Out: streams of tokens; rows to expert workers; plans.
//! Never here: routed experts' weights; a read of the store on the way of a token.

// Wiring.
pub mod config;
pub mod app;
mod kv_memory;
mod metrics;

// The way of a request, room by room.
pub mod api;
pub mod sequence;
pub mod scheduler;
pub mod engine;
mod stall;
pub mod phases;
pub mod moe;
pub mod workers;
pub mod load;

// Who holds what, decided by the router that leads.
pub mod control;
mod registration;
