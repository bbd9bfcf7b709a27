//! Load: how many rows went to each expert lately.
//!
//! In: counters that only grow, read from time to time. Out: rows per (layer, expert) over a sliding window, and their sum
//! over routers. Never here: a decision, or a clock.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::ids::{ExpertId, LayerIdx};

/// What sums are scaled to, so that routers with windows of different lengths add up.
const MINUTE: Duration = Duration::from_secs(60);

/// Rows that went to each expert in some time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Load {
    /// How long a time.
    pub window: Duration,
    /// Per layer, rows by expert.
    pub layers: BTreeMap<LayerIdx, Vec<u64>>,
}

impl Load {
    /// Rows of one expert; 0 where nothing is known of it.
    pub fn rows(&self, layer: LayerIdx, expert: ExpertId) -> u64 {
        let rows = self.layers.get(&layer).and_then(|rows| rows.get(usize::from(expert.0)));
        rows.copied().unwrap_or(0)
    }

    /// Rows over all experts.
    pub fn total(&self) -> u64 {
        self.layers.values().flatten().fold(0, |sum, rows| sum.saturating_add(*rows))
    }

    /// The sum of loads, each as rows per minute.
    pub fn sum<'a>(loads: impl Iterator<Item = &'a Self>) -> Self {
        let mut sum = Self { window: MINUTE, layers: BTreeMap::new() };
        for load in loads {
            let per_minute = |rows: u64| {
                let scaled = u128::from(rows) * MINUTE.as_millis() / load.window.as_millis().max(1);
                u64::try_from(scaled).unwrap_or(u64::MAX)
            };
            for (layer, rows) in &load.layers {
                let total = sum.layers.entry(*layer).or_default();
                total.resize(total.len().max(rows.len()), 0);
                for (total, rows) in total.iter_mut().zip(rows) {
                    *total = total.saturating_add(per_minute(*rows));
                }
            }
        }
        sum
    }
}

/// The last few readings of growing counters: what grew between the oldest and the newest is the load.
#[derive(Debug)]
pub struct SlidingWindow {
    readings: VecDeque<(Duration, BTreeMap<LayerIdx, Vec<u64>>)>,
    width: Duration,
}

impl SlidingWindow {
    /// A window of that width.
    pub fn new(width: Duration) -> Self {
        Self { readings: VecDeque::new(), width }
    }

    /// Takes a reading made at `now` (since any fixed moment, never going back) and says what grew within the window.
    /// `None` for the first reading: nothing is known of the time before it.
    pub fn read(&mut self, now: Duration, totals: BTreeMap<LayerIdx, Vec<u64>>) -> Option<Load> {
        // One reading at or before the window's beginning is kept: it is what the rest is compared with.
        while self.readings.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= self.width) {
            self.readings.pop_front();
        }
        let load = self.readings.front().map(|(at, before)| {
            let grown = |(layer, rows): (&LayerIdx, &Vec<u64>)| {
                let before = before.get(layer).map(Vec::as_slice).unwrap_or_default();
                let before = before.iter().copied().chain(std::iter::repeat(0));
                (*layer, rows.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect())
            };
            Load { window: now.saturating_sub(*at), layers: totals.iter().map(grown).collect() }
        });
        self.readings.push_back((now, totals));
        load
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYER: LayerIdx = LayerIdx(1);

    fn totals(rows: &[u64]) -> BTreeMap<LayerIdx, Vec<u64>> {
        BTreeMap::from([(LAYER, rows.to_vec())])
    }

    #[test]
    fn a_window_forgets_what_is_older_than_it() {
        let mut window = SlidingWindow::new(Duration::from_secs(10));
        let mut read = |second: u64, rows: &[u64]| window.read(Duration::from_secs(second), totals(rows));
        assert_eq!(read(0, &[0, 0]), None);
        let load = read(5, &[7, 0]).unwrap();
        assert_eq!((load.window.as_secs(), &load.layers[&LAYER]), (5, &vec![7, 0]));
        let load = read(10, &[9, 1]).unwrap();
        assert_eq!((load.window.as_secs(), &load.layers[&LAYER]), (10, &vec![9, 1]));
        let load = read(15, &[9, 4]).unwrap();
        assert_eq!((load.window.as_secs(), &load.layers[&LAYER]), (10, &vec![2, 4]));
        let load = read(100, &[9, 5]).unwrap();
        assert_eq!((load.window.as_secs(), &load.layers[&LAYER]), (85, &vec![0, 1]), "since the last reading");
    }

    #[test]
    fn routers_add_up_per_minute() {
        let of = |seconds, rows: &[u64]| Load { window: Duration::from_secs(seconds), layers: totals(rows) };
        let sum = Load::sum([of(30, &[1, 2]), of(120, &[4, 0, 6])].iter());
        assert_eq!(sum, of(60, &[4, 4, 3]));
        assert_eq!((sum.rows(LAYER, ExpertId(2)), sum.rows(LAYER, ExpertId(3)), sum.total()), (3, 0, 11));
    }

    proptest! {
        #[test]
        fn no_row_is_counted_twice_or_lost(grown in prop::collection::vec((1u64..20, 0u64..100), 1..50), width in 1u64..40) {
            let mut window = SlidingWindow::new(Duration::from_secs(width));
            let (mut now, mut total, mut at) = (0, 0, vec![(0, 0)]);
            window.read(Duration::ZERO, totals(&[0]));
            for (seconds, rows) in grown {
                now += seconds;
                total += rows;
                let load = window.read(Duration::from_secs(now), totals(&[total])).unwrap();
                let since = now - load.window.as_secs();
                let before = at.iter().find(|(second, _)| *second == since).expect("a reading was made then").1;
                prop_assert_eq!(load.layers[&LAYER][0], total - before);
                prop_assert!(load.window.as_secs() >= width.min(now));
                at.push((now, total));
            }
        }
    }
}
