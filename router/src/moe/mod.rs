//! From a routing to the weighted sum of its experts' rows: plan, exchange, combine.
//!
//! In: normed rows and what the gate chose. Out: the whole sum for every row, or an error.
//! Never here: a contribution left out. A row's sum is complete or there is none.

pub mod combine;
pub mod exchange;
pub mod plan;
mod round;

pub use exchange::{Exchange, Hedging, Mode};
