//! What a wait for company would bring, measured on a simulated clock with the real batcher: routers go through their
//! layers in a circle, each with micro-batches that compute attention between two answers; the worker pays for each expert
//! once a group and a little for each row, as measured (1.09 ms for one row of an expert of 2048 x 1408, 1.16 for sixteen).
//! `cargo test -p conclave-expert-worker a_wait -- --nocapture` prints the table.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use conclave_model::compute::ExpertBatch;
use tokio::sync::oneshot;

use super::{Batcher, PASSED_OVER, Pending};

const LAYERS: u32 = 12;
/// Experts of a layer on this worker, and how many of them a row uses.
const EXPERTS: u64 = 32;
const PER_ROW: u64 = 3;
const EXPERT_US: u64 = 1090;
const ROW_US: u64 = 5;
/// What a router needs between an answer and its next batch: attention, gate, wire; and how far that varies.
const BETWEEN_US: (u64, u64) = (600, 400);
const SIMULATED_US: u64 = 4_000_000;
const SEEDS: u64 = 8;

struct Traveller {
    layer: u32,
    rows: u64,
    /// When it sends its next batch; `None` while it waits for an answer.
    sends_at: Option<u64>,
    answer: Option<oneshot::Receiver<super::Answer>>,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Rows a second that leave the worker, and the mean time from a batch's sending to its answer, milliseconds.
fn simulate(travellers: u64, rows: u64, wait_us: u64, may_pass: u32, seed: u64) -> [f64; 2] {
    let (start, mut random) = (Instant::now(), Random(seed * 7919 + travellers * 97 + rows));
    let at = |us: u64| start + Duration::from_micros(us);
    let mut all: Vec<Traveller> = (0..travellers)
        .map(|_| Traveller {
            layer: random.below(LAYERS.into()) as u32,
            rows,
            sends_at: Some(random.below(20_000)),
            answer: None,
        })
        .collect();
    let mut batcher = Batcher::new(1024);
    batcher.may_pass = may_pass;
    let (mut now, mut done, mut waited, mut batches) = (0, 0, 0, 0);
    while now < SIMULATED_US {
        for (nth, traveller) in (0u32..).zip(&mut all) {
            if traveller.sends_at.is_some_and(|sends_at| sends_at <= now) {
                let (answer, receiver) = oneshot::channel();
                let uses = traveller.rows * PER_ROW;
                let batch = ExpertBatch {
                    layer: traveller.layer,
                    rows: traveller.rows as usize,
                    // Who sent it.
                    hidden: vec![nth as f32],
                    expert_ids: (0..uses).map(|_| random.below(EXPERTS) as u16).collect(),
                    row_ids: (0..uses).map(|use_| (use_ / PER_ROW) as u32).collect(),
                    weights: None,
                };
                let arrived = at(traveller.sends_at.take().unwrap_or(now));
                batcher.push(Pending { batch, arrived, deadline: at(u64::MAX / 4), answer }).unwrap();
                traveller.answer = Some(receiver);
            }
        }
        let next = all.iter().filter_map(|traveller| traveller.sends_at).min();
        let oldest = batcher.waiting.front().map(|pending| (pending.arrived - start).as_micros() as u64);
        match oldest {
            None => now = next.unwrap_or(SIMULATED_US),
            // It waits until somebody comes or the time is up: it does not know who else there is.
            Some(oldest) if now < oldest + wait_us => {
                now = next.unwrap_or(u64::MAX).min(oldest + wait_us).max(now + 1);
            }
            Some(_) => {
                let group = batcher.take(at(now)).group;
                let experts: BTreeSet<u16> =
                    group.iter().flat_map(|pending| pending.batch.expert_ids.clone()).collect();
                let uses: usize = group.iter().map(|pending| pending.batch.expert_ids.len()).sum();
                now += experts.len() as u64 * EXPERT_US + uses as u64 * ROW_US;
                for pending in group {
                    let traveller = &mut all[pending.batch.hidden[0] as usize];
                    done += traveller.rows;
                    batches += 1;
                    waited += now - (pending.arrived - start).as_micros() as u64;
                    traveller.layer = (traveller.layer + 1) % LAYERS;
                    traveller.sends_at = Some(now + BETWEEN_US.0 + random.below(BETWEEN_US.1));
                    traveller.answer = None;
                }
            }
        }
    }
    [done as f64 * 1e6 / now as f64, waited as f64 / 1e3 / f64::from(batches.max(1))]
}

/// The mean over seeds.
fn mean(travellers: u64, rows: u64, wait_us: u64, may_pass: u32) -> [f64; 2] {
    let runs = (0..SEEDS).map(|seed| simulate(travellers, rows, wait_us, may_pass, seed));
    runs.fold([0.0; 2], |sum, run| [sum[0] + run[0] / SEEDS as f64, sum[1] + run[1] / SEEDS as f64])
}

#[test]
fn the_order_brings_much_and_a_wait_for_company_little_or_less_than_nothing() {
    println!("rows/s (ms from sending to answer) by how long a batch waits for company");
    let waits = [0, 100, 250, 500, 1000, 2000];
    for (travellers, rows) in [(1, 1), (2, 1), (2, 8), (4, 4), (8, 4), (16, 4)] {
        let by_order = [("oldest batch first", 0), ("lowest layer first", PASSED_OVER)].map(|(order, may_pass)| {
            let rates = waits.map(|wait| mean(travellers, rows, wait, may_pass));
            let cells: Vec<String> =
                waits.iter().zip(rates).map(|(wait, [rate, ms])| format!("{wait} us: {rate:.0} ({ms:.1})")).collect();
            println!("{travellers:>2} micro-batches of {rows} rows, {order}: {}", cells.join(", "));
            rates.map(|[rate, _]| rate)
        });
        let [oldest, lowest] = by_order;
        assert!(lowest[0] > 0.99 * oldest[0], "{travellers}: the lowest layer first {}, else {}", lowest[0], oldest[0]);
        let best = lowest.iter().copied().fold(0.0, f64::max);
        assert!(lowest[0] > 0.95 * best, "{travellers}: {} rows/s without a wait, {best} with the best", lowest[0]);
    }
}
