//! When requests are sent: a rate, a shape and a source of randomness come in, ascending times since the start go out.
//! Pure: nobody waits here.

use std::time::Duration;

use rand::Rng;

/// No clock overflows within it, and no benchmark lasts as long.
const LATEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The times of `count` requests, the first at zero. The gaps are gamma distributed with mean `1 / rate` seconds and
/// shape `shape`: 1 makes a Poisson process, as vLLM's burstiness does. An infinite rate makes all times zero.
pub(super) fn arrivals(count: u32, rate: f64, shape: f64, random: &mut impl Rng) -> Vec<Duration> {
    let mut now = Duration::ZERO;
    let mut times = Vec::new();
    for index in 0..count {
        if index > 0 && rate.is_finite() {
            let gap = gamma(shape, random) / (shape * rate);
            now = now.saturating_add(Duration::try_from_secs_f64(gap).unwrap_or(LATEST)).min(LATEST);
        }
        times.push(now);
    }
    times
}

/// A gamma variate of scale 1 by rejection: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000),
/// with their boost for shapes below 1.
fn gamma(shape: f64, random: &mut impl Rng) -> f64 {
    if shape < 1.0 {
        return gamma(shape + 1.0, random) * open_unit(random).powf(1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(random);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && open_unit(random).ln() < 0.5 * x * x + d * (1.0 - v + v.ln()) {
            return d * v;
        }
    }
}

/// A standard normal variate (Box and Muller, 1958).
fn normal(random: &mut impl Rng) -> f64 {
    let radius = (-2.0 * open_unit(random).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.random::<f64>()).cos()
}

/// In (0, 1]: its logarithm is finite.
fn open_unit(random: &mut impl Rng) -> f64 {
    1.0 - random.random::<f64>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    /// Mean and variance of the gaps, in units of the mean gap that was asked for.
    fn moments(rate: f64, shape: f64) -> (f64, f64) {
        let times = arrivals(20_001, rate, shape, &mut StdRng::seed_from_u64(7));
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * rate).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance)
    }

    #[test]
    fn gaps_have_the_mean_and_the_variance_of_their_distribution() {
        for (rate, shape) in [(10.0, 1.0), (2.0, 0.25), (50.0, 4.0)] {
            let (mean, variance) = moments(rate, shape);
            assert!((mean - 1.0).abs() < 0.05, "rate {rate}, shape {shape}: mean {mean}");
            assert!((variance * shape - 1.0).abs() < 0.1, "rate {rate}, shape {shape}: variance {variance}");
        }
    }

    #[test]
    fn an_infinite_rate_sends_all_at_once() {
        let times = arrivals(5, f64::INFINITY, 1.0, &mut StdRng::seed_from_u64(0));
        assert_eq!(times, [Duration::ZERO; 5]);
    }

    proptest! {
        #[test]
        fn times_begin_at_zero_ascend_and_come_from_the_seed_alone(
            count in 1_u32..200, rate in 1e-6..1e6_f64, shape in 0.01..1000.0_f64, seed: u64,
        ) {
            let draw = || arrivals(count, rate, shape, &mut StdRng::seed_from_u64(seed));
            let times = draw();
            prop_assert_eq!(times.len(), count as usize);
            prop_assert_eq!(times[0], Duration::ZERO);
            prop_assert!(times.is_sorted() && times.iter().all(|time| *time <= LATEST));
            prop_assert_eq!(draw(), times);
        }
    }
}
