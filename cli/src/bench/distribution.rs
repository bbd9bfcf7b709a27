//! Many figures of one kind come in, their mean and percentiles go out. Pure; nothing is sampled or binned.

use serde::Serialize;

/// What is told of a distribution, in its samples' unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Distribution {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Distribution {
    /// None without samples.
    pub(super) fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let max = *samples.last()?;
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|fraction| quantile(&samples, fraction));
        Some(Self { mean, p50, p90, p99, max })
    }
}

/// The value below which `fraction` of the samples lie, between the two nearest ones by linear interpolation: what NumPy,
/// and therefore vLLM, gives. `sorted` is not empty.
fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let position = fraction * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    below + (above - below) * position.fract()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_lie_between_the_nearest_samples() {
        let distribution = Distribution::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((distribution.mean, distribution.p50, distribution.max), (2.5, 2.5, 4.0));
        assert!((distribution.p90 - 3.7).abs() < 1e-12 && (distribution.p99 - 3.97).abs() < 1e-12);
        let hundred = Distribution::of((0..=100).map(f64::from).collect()).unwrap();
        assert_eq!((hundred.p50, hundred.p90, hundred.p99), (50.0, 90.0, 99.0));
    }

    #[test]
    fn without_samples_there_is_nothing_to_tell() {
        assert_eq!(Distribution::of(Vec::new()), None);
    }

    proptest! {
        #[test]
        fn percentiles_are_ordered_and_within_the_samples(samples in prop::collection::vec(0.0..1e9_f64, 1..200)) {
            let Distribution { mean, p50, p90, p99, max } = Distribution::of(samples.clone()).unwrap();
            let min = samples.iter().copied().fold(f64::INFINITY, f64::min);
            prop_assert!(min <= p50 && p50 <= p90 && p90 <= p99 && p99 <= max);
            prop_assert!(min <= mean * (1.0 + 1e-9) && mean <= max * (1.0 + 1e-9));
            prop_assert!(samples.contains(&max));
        }

        #[test]
        fn the_order_of_samples_does_not_matter(mut samples in prop::collection::vec(0.0..1e9_f64, 1..50)) {
            let percentiles = |samples: &[f64]| {
                let Distribution { p50, p90, p99, max, .. } = Distribution::of(samples.to_vec()).unwrap();
                [p50, p90, p99, max]
            };
            let forward = percentiles(&samples);
            samples.reverse();
            prop_assert_eq!(percentiles(&samples), forward);
        }
    }
}
