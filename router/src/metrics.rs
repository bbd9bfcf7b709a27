//! This router's counters, as Prometheus sees them.
//!
//! In: the pool's own counters, read when somebody scrapes; what the engine tells after each step. Out: metric families.
//! Never here: a label whose values are not bounded.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use conclave_runtime::admin::Registry;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
    },
};

use crate::{
    engine::pass::Spent,
    phases::Phase,
    scheduler::{
        blocks::BlockPool,
        policy::{Candidate, Grant, Standing},
    },
    workers::{Counters, Workers},
};

/// Reads the pool's counters at each scrape.
#[derive(Debug)]
struct Dispatches(Workers);

/// Adds this router's families to `registry`.
pub(crate) fn register(registry: &Registry, workers: Workers) {
    registry.lock().register_collector(Box::new(Dispatches(workers)));
}

impl Collector for Dispatches {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Counters { rows, batches, refused, lost, corrupt, late, hedges, hedges_won, phases } = self.0.counters();
        let families: [(&str, &str, &AtomicU64); 8] = [
            ("dispatch_rows", "Rows sent to expert workers, once per worker they went to", rows),
            ("dispatch_batches", "Batches sent to expert workers", batches),
            ("dispatch_refused", "Batches that an expert worker refused", refused),
            ("dispatch_lost", "Batches lost with their stream or to their deadline", lost),
            ("dispatch_hedges", "Batches that were late and sent to other expert workers too", hedges),
            ("dispatch_hedges_won", "Of them, those that the others answered first", hedges_won),
            ("combine_corrupt", "Answers of a wrong size, or with values that are no numbers", corrupt),
            ("combine_late", "Answers that nobody waited for any more", late),
        ];
        for (name, help, counter) in families {
            let counter = ConstCounter::new(counter.load(Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let help = "Time by phase of a step; of wire, queue, expert and decode the sum over batches, which run beside each other";
        let mut family = encoder.encode_descriptor("phase_seconds", help, None, MetricType::Counter)?;
        for (phase, name) in Phase::ALL {
            ConstCounter::new(phases.spent(phase).as_secs_f64()).encode(family.encode_family(&[("phase", name)])?)?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Layer {
    layer: u32,
}

/// What the controller sees and does, on the router that leads.
#[derive(Debug, Default)]
pub struct PlacementMetrics {
    balancedness: Family<Layer, Gauge<f64, AtomicU64>>,
    /// Copies that living workers are to hold and do not hold yet.
    pub(crate) on_their_way: Gauge,
    /// Plans that this router published.
    pub(crate) published: Counter,
}

impl PlacementMetrics {
    /// Makes them and registers them as `conclave_placement_*`.
    pub(crate) fn register(registry: &Registry) -> Arc<Self> {
        let all = Arc::new(Self::default());
        let mut registry = registry.lock();
        let registry = registry.sub_registry_with_prefix("placement");
        registry.register(
            "balancedness",
            "Per layer, mean over maximum of the rows that workers have, by speed: on the router that leads, by its plan",
            all.balancedness.clone(),
        );
        registry.register(
            "copies_on_their_way",
            "Copies of experts that living workers are to hold and do not hold yet: on the router that leads",
            all.on_their_way.clone(),
        );
        registry.register("plans", "Plans that this router published", all.published.clone());
        Arc::clone(&all)
    }

    /// Per layer; what is not in it is not known any more.
    pub(crate) fn balance(&self, layers: Vec<(u32, f64)>) {
        self.balancedness.clear();
        for (layer, ratio) in layers {
            self.balancedness.get_or_create(&Layer { layer }).set(ratio);
        }
    }

    /// This router leads no more, so another one tells.
    pub(crate) fn forget(&self) {
        self.balancedness.clear();
        self.on_their_way.set(0);
    }
}

/// What the engine did.
#[derive(Debug, Default)]
pub struct EngineCounters {
    running: Gauge,
    waiting: Gauge,
    blocks: Gauge,
    blocks_held: Gauge,
    steps: Counter,
    micro_batches: Counter,
    step_seconds: Counter<f64, AtomicU64>,
    compute_seconds: Counter<f64, AtomicU64>,
    away_seconds: Counter<f64, AtomicU64>,
    rows: Counter,
    prefix_queried: Counter,
    prefix_found: Counter,
    preempted: Counter,
    drafted: Counter,
    accepted: Counter,
}

impl EngineCounters {
    /// Makes the counters and registers them as `conclave_engine_*`.
    pub(crate) fn register(registry: &Registry) -> Arc<Self> {
        let all = Arc::new(Self::default());
        let mut registry = registry.lock();
        let registry = registry.sub_registry_with_prefix("engine");
        registry.register("sequences_running", "Sequences that hold blocks", all.running.clone());
        registry.register("sequences_waiting", "Sequences that hold none", all.waiting.clone());
        registry.register("cache_blocks", "Blocks of the latent cache", all.blocks.clone());
        registry.register("cache_blocks_held", "Of them, those that sequences hold", all.blocks_held.clone());
        registry.register("steps", "Forward passes", all.steps.clone());
        registry.register(
            "micro_batches",
            "Parts that steps were computed in, one or two each",
            all.micro_batches.clone(),
        );
        registry.register("step_seconds", "Time in steps", all.step_seconds.clone());
        registry.register("compute_seconds", "Of it, computing on this router", all.compute_seconds.clone());
        registry.register(
            "away_seconds",
            "From rows leaving for experts to the last coming back, of all micro-batches: what exceeds step_seconds less \
             compute_seconds was overlapped",
            all.away_seconds.clone(),
        );
        registry.register("rows", "Rows computed, recomputed ones included", all.rows.clone());
        registry.register("prefix_queried_tokens", "Tokens looked for in the prefix cache", all.prefix_queried.clone());
        registry.register("prefix_found_tokens", "Of them, those found", all.prefix_found.clone());
        registry.register("preemptions", "Sequences that gave up their blocks", all.preempted.clone());
        registry.register(
            "drafted_tokens",
            "Tokens that the draft module proposed and a step checked",
            all.drafted.clone(),
        );
        registry.register("accepted_tokens", "Of them, those that were right", all.accepted.clone());
        Arc::clone(&all)
    }

    pub(crate) fn observe(&self, candidates: &[Candidate], pool: &BlockPool) {
        let waits = |candidate: &&Candidate| matches!(candidate.standing, Standing::Waiting { .. });
        let waiting = candidates.iter().filter(waits).count();
        let set = |gauge: &Gauge, value: usize| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&self.waiting, waiting);
        set(&self.running, candidates.len() - waiting);
        set(&self.blocks, pool.total());
        set(&self.blocks_held, pool.total() - pool.free());
    }

    pub(crate) fn preempted(&self, sequences: usize) {
        self.preempted.inc_by(sequences as u64);
    }

    pub(crate) fn looked_for_prefix(&self, tokens: usize, found: usize) {
        self.prefix_queried.inc_by(tokens as u64);
        self.prefix_found.inc_by(found as u64);
    }

    /// Whether a draft was right, where one was checked.
    pub(crate) fn drafted(&self, right: Option<bool>) {
        self.drafted.inc_by(u64::from(right.is_some()));
        self.accepted.inc_by(u64::from(right == Some(true)));
    }

    pub(crate) fn stepped(&self, took: Duration, spent: &Spent, micro_batches: usize, grants: &[Grant]) {
        self.steps.inc();
        self.micro_batches.inc_by(micro_batches as u64);
        self.rows.inc_by(grants.iter().map(|grant| grant.tokens as u64).sum());
        self.step_seconds.inc_by(took.as_secs_f64());
        self.compute_seconds.inc_by(spent.compute().as_secs_f64());
        self.away_seconds.inc_by(spent.away().as_secs_f64());
    }
}
