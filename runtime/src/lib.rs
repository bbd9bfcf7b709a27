//! Process plumbing: what a router and an expert worker share because they are processes, not because they serve a
//! model. In: command lines, signals, sockets. Out: effective configuration, servers and channels with their limits
//! set, and threads that own state. Nothing here knows tensors, experts, placement or what a request means.

pub mod admin;
pub mod channel;
pub mod config;
pub mod health;
pub mod listen;
pub mod parent;
pub mod probes;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod tensor_thread;
