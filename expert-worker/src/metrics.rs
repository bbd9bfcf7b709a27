//! Counters of this worker: the rooms count, `/metrics` and `GetInventory` read. Labels are bounded by the model's
//! layers and the closed set of refusals; nothing is labelled by router, expert or request.

use std::sync::atomic::AtomicU64;

use conclave_placement::ids::LayerIdx;
use conclave_runtime::admin::Registry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::batcher::Refusal;

const REASONS: [&str; 5] = ["busy", "draining", "not_resident", "invalid", "internal"];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Layer {
    layer: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone)]
pub struct Metrics {
    rows: Family<Layer, Counter>,
    refused: Family<Reason, Counter>,
    pub batches: Counter,
    pub non_finite: Counter,
    pub queue_seconds: Histogram,
    pub compute_seconds: Histogram,
    pub busy_seconds: Counter<f64, AtomicU64>,
    pub group_batches: Histogram,
    pub streams: Gauge,
    pub resident_experts: Gauge,
    pub resident_bytes: Gauge<u64, AtomicU64>,
    pub load_seconds: Histogram,
    pub load_failures: Counter,
}

impl Metrics {
    /// Makes the counters and registers them as `conclave_worker_*`. Those of `layers` are there before anything is counted:
    /// an autoscaler takes a worker without them for one that cannot be scraped.
    pub fn register(registry: &Registry, layers: &[LayerIdx]) -> Self {
        let seconds = || Histogram::new(exponential_buckets(50e-6, 2.0, 18));
        let metrics = Self {
            rows: Family::default(),
            refused: Family::default(),
            batches: Counter::default(),
            non_finite: Counter::default(),
            queue_seconds: seconds(),
            compute_seconds: seconds(),
            busy_seconds: Counter::default(),
            group_batches: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            streams: Gauge::default(),
            resident_experts: Gauge::default(),
            resident_bytes: Gauge::default(),
            load_seconds: Histogram::new(exponential_buckets(1e-3, 2.0, 16)),
            load_failures: Counter::default(),
        };
        for layer in layers {
            drop(metrics.rows.get_or_create(&Layer { layer: layer.0 }));
        }
        for reason in REASONS {
            drop(metrics.refused.get_or_create(&Reason { reason }));
        }
        let m = metrics.clone();
        let mut registry = registry.lock();
        let registry = registry.sub_registry_with_prefix("worker");
        registry.register("rows", "Assignments computed: one row through one expert counts one", m.rows);
        registry.register("refused", "Batches refused, by reason", m.refused);
        registry.register("batches", "Batches computed", m.batches);
        registry.register("non_finite_batches", "Batches whose output holds NaN or infinity", m.non_finite);
        registry.register("queue_seconds", "Time of a batch in the queue", m.queue_seconds);
        registry.register(
            "compute_seconds",
            "Time of a group, from the end of the one before where that was later than its start",
            m.compute_seconds,
        );
        registry.register("busy_seconds", "Time that the tensor thread computed", m.busy_seconds);
        registry.register("group_batches", "Batches computed together", m.group_batches);
        registry.register("streams", "Open exchange streams", m.streams);
        registry.register("resident_experts", "Experts held", m.resident_experts);
        registry.register("resident_bytes", "Bytes of the experts held", m.resident_bytes);
        registry.register("expert_load_seconds", "Time to load one expert", m.load_seconds);
        registry.register("expert_load_failures", "Experts that could not be loaded", m.load_failures);
        metrics
    }

    pub fn count_rows(&self, layer: u32, assignments: usize) {
        self.rows.get_or_create(&Layer { layer }).inc_by(assignments as u64);
    }

    /// Assignments computed on `layer` since start.
    pub fn rows_of(&self, layer: u32) -> u64 {
        self.rows.get(&Layer { layer }).map_or(0, |count| count.get())
    }

    pub fn count_refused(&self, refusal: &Refusal) {
        self.refused.get_or_create(&Reason { reason: reason(refusal) }).inc();
    }

    /// Batches refused since start, for whatever reason.
    pub fn refused_total(&self) -> u64 {
        let count = |reason| self.refused.get(&Reason { reason }).map_or(0, |count| count.get());
        REASONS.into_iter().map(count).sum()
    }
}

fn reason(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::Busy { .. } => "busy",
        Refusal::Draining => "draining",
        Refusal::NotResident(_) => "not_resident",
        Refusal::Invalid(_) => "invalid",
        Refusal::Internal(_) => "internal",
    }
}
