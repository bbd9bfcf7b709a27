//! Sends a layer's rows to the workers that hold their experts, and stays until every row is back.
//!
//! In: normed rows and their routing. Out: each row's weighted sum, f32 `[T, D]`, by one `round` of asking.
//! Never here: an answer without all its parts.

use std::{fmt, sync::Arc, time::Duration};

use conclave_model::{
    gate::Routing,
    wire::{self, Encoded, Encoding, NotFinite},
};
use conclave_runtime::channel::MAX_INTERNAL_MESSAGE;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tower::retry::budget::{Budget, TpsBudget};

use super::{
    plan::{Assignment, Most},
    round::Round,
};
use crate::{load::SentRows, phases::Phase, stall::Stall, workers::Workers};

/// Batches that may be sent twice: this share of all, and this many a second whatever that is, counted over so long.
const HEDGES: (f32, u32, Duration) = (0.2, 10, Duration::from_secs(10));

/// What comes back from a worker, and so who does the weighted sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One unweighted row per assignment; the router sums in gate order, so placement does not show in the result.
    PerAssignment,
    /// One weighted row per row sent: fewest bytes.
    PartialSum,
}

/// The router's end of dispatch and combine.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// Who can be asked.
    pub workers: Workers,
    /// What comes back.
    pub mode: Mode,
    /// How rows go out.
    pub encoding: Encoding,
    /// D.
    pub hidden: usize,
    /// How long a worker may take for one batch before it is suspect.
    pub patience: Duration,
    /// What may be sent twice; `None` where nothing may.
    pub hedging: Option<Hedging>,
    /// What went where, for the planner.
    pub sent: Arc<SentRows>,
    /// Where it is told that a step waits.
    pub stall: Arc<Stall>,
}

/// A bound on batches that are sent to a second worker because the first is late. What must be sent again because nobody
/// computed it is not bounded by it (docs/adr/0004): that would fail a request that another replica could serve.
#[derive(Clone)]
pub struct Hedging(Arc<TpsBudget>);

impl Default for Hedging {
    fn default() -> Self {
        let (share, per_second, window) = HEDGES;
        Self(Arc::new(TpsBudget::new(window, per_second, share)))
    }
}

impl fmt::Debug for Hedging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hedging")
    }
}

impl Hedging {
    /// A batch was sent the first time.
    pub(super) fn sent(&self) {
        self.0.deposit();
    }

    /// Whether one may be sent the second time.
    pub(super) fn may(&self) -> bool {
        self.0.withdraw()
    }
}

/// Why a layer's sum is not complete.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The deadline came first.
    #[error("layer {layer} was not complete at its deadline: {waiting_for}")]
    Deadline {
        /// Where the step stood.
        layer: u32,
        /// What it waited for.
        waiting_for: String,
    },
    /// Rows that are no numbers must not leave: every worker's answer would be none either, and all would be distrusted.
    #[error("layer {layer} was reached with values that are no numbers")]
    NotFinite {
        /// Where the step stood.
        layer: u32,
    },
    /// Workers call the batch itself wrong, two of them or the only one twice; no other would think better of it.
    #[error("layer {layer}: {message}")]
    Invalid {
        /// Where the step stood.
        layer: u32,
        /// As the worker put it.
        message: String,
    },
}

impl Exchange {
    /// The sum over each row's experts for `rows` `[T, D]` of `layer`, before `deadline`.
    pub async fn routed(
        &self,
        layer: u32,
        rows: &[f32],
        routing: &Routing,
        deadline: Instant,
    ) -> Result<Vec<f32>, Error> {
        if !wire::all_finite(&routing.weights) {
            return Err(Error::NotFinite { layer });
        }
        let encode = || Encoded::new(rows, self.hidden, self.encoding);
        let rows = self.workers.counters().phases.timed(Phase::Encode, encode);
        let rows = rows.map_err(|NotFinite| Error::NotFinite { layer })?;
        self.sent.count(layer, &routing.expert_ids);
        let per_row = routing.experts_per_row;
        let todo = (0u32..)
            .zip(&routing.expert_ids)
            .map(|(slot, &expert)| Assignment { slot, row: slot / per_row as u32, expert })
            .collect();
        // What a failed step waited for stays told, for requests whose deadline passes at the same moment; the next step
        // that can be planned clears it.
        Round::new(self, layer, &rows, routing, deadline, todo).run().await
    }

    /// What fits into one message and its answer, with room for ids and weights.
    pub(super) fn most(&self) -> Most {
        let room = MAX_INTERNAL_MESSAGE / 2;
        let out = self.encoding.row_bytes(self.hidden) + self.encoding.scale_bytes(self.hidden);
        // Answers are at most f32.
        let back = Encoding::F32.row_bytes(self.hidden);
        match self.mode {
            Mode::PerAssignment => Most { rows: (room / out).max(1), assignments: (room / back).max(1) },
            Mode::PartialSum => Most { rows: (room / back.max(out)).max(1), assignments: room / 16 },
        }
    }
}
