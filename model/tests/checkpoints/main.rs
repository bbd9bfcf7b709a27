//! Checkpoints from outside: small folders written by hand, good ones and spoilt ones.

mod bad;
mod fixture;
mod good;
