//! This router's counters, as Prometheus sees them.
//!
//! In: the pool's own counters, read when somebody scrapes. Out: metric families.
//! Never here: a label whose values are not bounded.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use conclave_runtime::admin::Registry;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::counter::ConstCounter,
};

use crate::workers::{Counters, Workers};

/// Reads the pool's counters at each scrape.
#[derive(Debug)]
struct Dispatches(Workers);

/// Adds this router's families to `registry`.
pub(crate) fn register(registry: &Registry, workers: Workers) {
    registry.lock().register_collector(Box::new(Dispatches(workers)));
}

impl Collector for Dispatches {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Counters { rows, batches, refused, lost, corrupt, late } = self.0.counters();
        let families: [(&str, &str, &AtomicU64); 6] = [
            ("dispatch_rows", "Rows sent to expert workers, once per worker they went to", rows),
            ("dispatch_batches", "Batches sent to expert workers", batches),
            ("dispatch_refused", "Batches that an expert worker refused", refused),
            ("dispatch_lost", "Batches lost with their stream or to their deadline", lost),
            ("combine_corrupt", "Answers of a wrong size, or with values that are no numbers", corrupt),
            ("combine_late", "Answers that nobody waited for any more", late),
        ];
        for (name, help, counter) in families {
            let counter = ConstCounter::new(counter.load(Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}
