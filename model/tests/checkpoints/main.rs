//! Checkpoints from outside: small folders written by hand, good ones and spoilt ones.

// Helpers outside of a test function are not seen as tests.
#![allow(clippy::unwrap_used)]

mod bad;
mod fixture;
mod good;
