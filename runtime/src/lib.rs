//! Process plumbing: what a router and an expert worker share because they are processes, not because they serve a
//! model. In: command lines, signals, sockets. Out: effective configuration, servers and channels with their limits
//! set, and threads that own state. Nothing here knows tensors, experts, placement or what a request means.

// From start to end.
pub mod config;
pub mod memory;
pub mod telemetry;

pub mod parent;
pub mod shutdown;

// What a process serves.
pub mod listen;
pub mod socket;
pub mod server;

pub mod health;

pub mod admin;
pub mod probes;

// What it uses.
pub mod channel;
pub mod stream;

// Threads of its own.
pub mod tensor_thread;
pub mod wire_thread;
