//! Samples come in, medians and percentiles go out. No mean and no "best of": one slow or lucky sample must not speak
//! for a run on a busy machine.

use std::time::Duration;

use serde_json::{Value, json};

/// Samples of one quantity, in whatever unit they were pushed in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Microseconds.
    pub(crate) fn push_us(&mut self, took: Duration) {
        self.push(took.as_secs_f64() * 1e6);
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The smallest sample that at least `fraction` of all samples do not exceed; NaN without samples.
    pub(crate) fn quantile(&self, fraction: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (fraction * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn p90(&self) -> f64 {
        self.quantile(0.9)
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "median": self.median(), "p90": self.p90(), "min": self.quantile(0.0), "max": self.quantile(1.0),
            "samples": self.0.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples_and_ordered() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan());
        (1..=10).rev().for_each(|value| samples.push(f64::from(value)));
        assert_eq!((samples.median(), samples.p90()), (5.0, 9.0));
        assert_eq!((samples.quantile(0.0), samples.quantile(1.0)), (1.0, 10.0));
    }
}
