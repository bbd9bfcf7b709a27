//! Load: how many rows went to each expert lately.
//!
//! In: counters that only grow, read from time to time. Out: rows per (layer, expert) over a sliding window, their sum
//! over routers, and how evenly a plan spreads them. Never here: a decision, or a clock.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use crate::ids::{ExpertId, LayerIdx, WorkerId};
use crate::plan::Plan;
use crate::planner::{PlannerWorker, relative_speeds};

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

/// How evenly a plan spreads the rows over the workers: 1 is perfect, 1/2 means that every step takes twice as long as it
/// need. `None` where there are no rows.
///
/// A step passes through the layers one after the other and waits in each for its slowest worker. So this is the time the
/// rows of all layers would take if each layer's were spread perfectly, over the time its slowest worker takes: over layers,
/// `Σ (rows ÷ sum of speeds) ÷ Σ (maximum over workers of rows ÷ speed)`. For one layer and equal speeds that is mean over
/// maximum, the measure by which expert balancers are compared. An expert's rows are split evenly over those of its holders
/// that are among `workers`; those of an expert without one count for nothing.
pub fn balancedness(plan: &Plan, load: &Load, workers: &[PlannerWorker]) -> Option<f64> {
    let (ideal, longest) = times(plan, load, workers)
        .into_values()
        .fold((0.0, 0.0), |sum, (ideal, longest)| (sum.0 + ideal, sum.1 + longest));
    (longest > 0.0).then(|| ideal / longest)
}

/// [`balancedness`] of each layer that has rows.
pub fn layer_balancedness(plan: &Plan, load: &Load, workers: &[PlannerWorker]) -> BTreeMap<LayerIdx, f64> {
    let busy = times(plan, load, workers).into_iter().filter(|(_, (_, longest))| *longest > 0.0);
    busy.map(|(layer, (ideal, longest))| (layer, ideal / longest)).collect()
}

/// Per layer, the time its rows take when spread perfectly, and as the plan spreads them: in rows per relative speed.
fn times(plan: &Plan, load: &Load, workers: &[PlannerWorker]) -> BTreeMap<LayerIdx, (f64, f64)> {
    let speeds = relative_speeds(workers).unwrap_or_else(|| vec![1.0; workers.len()]);
    let index: HashMap<&WorkerId, usize> = workers.iter().enumerate().map(|(at, worker)| (&worker.id, at)).collect();
    let mut carried: BTreeMap<LayerIdx, Vec<f64>> = BTreeMap::new();
    for (layer, expert, holders) in plan.iter() {
        let live: Vec<usize> = holders.iter().filter_map(|id| index.get(id).copied()).collect();
        let rows = carried.entry(layer).or_insert_with(|| vec![0.0; workers.len()]);
        for worker in &live {
            rows[*worker] += load.rows(layer, expert) as f64 / live.len() as f64;
        }
    }
    let layer = |(layer, rows): (LayerIdx, Vec<f64>)| {
        let ideal = rows.iter().sum::<f64>() / speeds.iter().sum::<f64>();
        let longest = rows.iter().zip(&speeds).map(|(rows, speed)| rows / speed).fold(0.0, f64::max);
        (layer, (ideal, longest))
    };
    carried.into_iter().map(layer).collect()
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
    use crate::ids::PlanVersion;
    use crate::planner::balanced::fixtures::workers;

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

    #[test]
    fn balancedness_is_mean_over_maximum_weighed_by_speed() {
        let mut workers = workers(&[0; 3]);
        let [a, b, c] = [0, 1, 2].map(|at: usize| workers[at].id.clone());
        let dead = WorkerId::parse("dead").unwrap();
        let plan = Plan {
            version: PlanVersion(1),
            parent: PlanVersion::NONE,
            policy: "test".into(),
            reason: "test".into(),
            layers: BTreeMap::from([
                (LAYER, vec![vec![a.clone()], vec![b.clone(), c, dead.clone()], vec![dead]]),
                (LayerIdx(2), vec![vec![b], vec![a]]),
            ]),
        };
        let rows = BTreeMap::from([(LAYER, vec![60, 60, 1000]), (LayerIdx(2), vec![0, 0])]);
        let load = Load { window: MINUTE, layers: rows };
        assert_eq!(balancedness(&plan, &load, &workers), Some(40.0 / 60.0));
        assert_eq!(layer_balancedness(&plan, &load, &workers), BTreeMap::from([(LAYER, 40.0 / 60.0)]));
        workers[0].speed = 200.0;
        workers[1].speed = 100.0;
        workers[2].speed = 100.0;
        assert_eq!(balancedness(&plan, &load, &workers), Some(1.0), "the fast worker has twice the rows");
        workers[2].speed = 0.0;
        let unknown = balancedness(&plan, &load, &workers).unwrap();
        assert!((unknown - 120.0 / 450.0 / (60.0 / 200.0)).abs() < 1e-12, "an unknown speed is the mean: {unknown}");
        let two = Load { window: MINUTE, layers: BTreeMap::from([(LAYER, vec![60, 60]), (LayerIdx(2), vec![40, 0])]) };
        workers.iter_mut().for_each(|worker| worker.speed = 0.0);
        let both = balancedness(&plan, &two, &workers).unwrap();
        assert!((both - (40.0 + 40.0 / 3.0) / 100.0).abs() < 1e-12, "layers add up: {both}");
        let idle = Load { window: MINUTE, layers: BTreeMap::new() };
        assert_eq!(balancedness(&plan, &idle, &workers), None);
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
