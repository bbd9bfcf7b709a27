//! The edge to `conclave.expert.v1`: what the router sends and gets, to and from prost types.
//!
//! In: a [`Dispatch`], or a worker's message. Out: the other side's form, every length checked.
//! Never here: what to do about a refusal.

use std::time::Duration;

use bytes::Bytes;
use conclave_model::wire::{self, Encoding};
use conclave_proto::{expert::v1 as pb, integrity};

/// Rows for one worker.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// Layer of the model.
    pub layer: u32,
    /// For the worker's logs.
    pub plan_version: u64,
    /// How the rows travel, both ways.
    pub encoding: Encoding,
    /// n.
    pub rows: usize,
    /// `[n, hidden]`.
    pub hidden: Bytes,
    /// For the 8-bit encoding.
    pub scales: Bytes,
    /// Per assignment.
    pub expert_ids: Vec<u16>,
    /// Per assignment, below n.
    pub row_ids: Vec<u32>,
    /// Per assignment, where one weighted row per row sent is wanted back.
    pub weights: Option<Vec<f32>>,
}

impl Dispatch {
    /// Rows that come back.
    pub fn returned_rows(&self) -> usize {
        if self.weights.is_some() { self.rows } else { self.expert_ids.len() }
    }

    /// As it goes out, with `batch_id` on this stream and `left` until nobody waits any more.
    pub(super) fn to_message(&self, batch_id: u64, left: Duration) -> pb::DispatchBatch {
        let mode = match self.weights {
            Some(_) => pb::CombineMode::PartialSum,
            None => pb::CombineMode::PerAssignment,
        };
        // Outputs come back as wide as the router computes: 8 bits are for the way out only.
        let back = match self.encoding {
            Encoding::F32 => Encoding::F32,
            Encoding::Bf16 | Encoding::Fp8Block128 => Encoding::Bf16,
        };
        let weights = self.weights.as_deref().unwrap_or_default();
        let mut message = pb::DispatchBatch {
            batch_id,
            layer: self.layer,
            plan_version: self.plan_version,
            deadline_us: u64::try_from(left.as_micros()).unwrap_or(u64::MAX),
            encoding: to_proto(self.encoding).into(),
            rows: self.rows as u32,
            hidden: self.hidden.clone(),
            scales: self.scales.clone(),
            expert_ids: self.expert_ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
            row_ids: self.row_ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
            weights: weights.iter().flat_map(|weight| weight.to_le_bytes()).collect(),
            mode: mode.into(),
            return_encoding: to_proto(back).into(),
            checksum: None,
        };
        message.checksum = Some(integrity::of_dispatch(&message));
        message
    }
}

/// What became of a dispatch.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Computed: f32 `[returned rows, hidden]`, finite.
    Rows(Vec<f32>),
    /// Not computed, and the worker says why.
    Refused(Refusal),
    /// The stream broke, the deadline passed, or the answer could not be believed.
    Lost(String),
}

/// Why a worker computed nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its queue is full; there may be room after this.
    Busy(Duration),
    /// It is leaving.
    Draining,
    /// It lacks these experts.
    NotResident(Vec<u32>),
    /// It says the batch contradicts itself or the model.
    Invalid(String),
    /// It failed.
    Internal(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Busy(_) => f.write_str("busy"),
            Self::Draining => f.write_str("draining"),
            Self::NotResident(experts) => write!(f, "experts {experts:?} are not resident"),
            Self::Invalid(message) => write!(f, "invalid: {message}"),
            Self::Internal(message) => write!(f, "internal: {message}"),
        }
    }
}

/// An answer as it came, checked against its checksum and what was asked: `rows` of `hidden` values.
pub(super) fn from_message(message: pb::CombineBatch, rows: usize, hidden: usize) -> Result<Reply, String> {
    let pb::CombineBatch { batch_id, outcome, checksum, .. } = message;
    match outcome.ok_or("an answer without an outcome")? {
        pb::combine_batch::Outcome::Refused(refused) => Ok(Reply::Refused(refusal(refused))),
        pb::combine_batch::Outcome::Returned(returned) => {
            if checksum.is_some_and(|sum| sum != integrity::of_returned(batch_id, &returned)) {
                return Err("rows were damaged on their way".to_owned());
            }
            let encoding = match returned.encoding() {
                pb::Encoding::F32 => Encoding::F32,
                pb::Encoding::Bf16 => Encoding::Bf16,
                other => return Err(format!("rows came back as {}", other.as_str_name())),
            };
            let rows = wire::decode(encoding, &returned.rows, &[], rows, hidden).map_err(|error| error.to_string())?;
            if wire::all_finite(&rows) {
                Ok(Reply::Rows(rows))
            } else {
                Err("rows came back with values that are no numbers".to_owned())
            }
        }
    }
}

fn refusal(refused: pb::Refused) -> Refusal {
    match refused.reason() {
        pb::RefusedReason::Busy => Refusal::Busy(Duration::from_micros(refused.retry_after_us)),
        pb::RefusedReason::Draining => Refusal::Draining,
        pb::RefusedReason::NotResident => Refusal::NotResident(refused.missing_experts),
        pb::RefusedReason::Invalid => Refusal::Invalid(refused.message),
        pb::RefusedReason::Internal | pb::RefusedReason::Unspecified => Refusal::Internal(refused.message),
    }
}

fn to_proto(encoding: Encoding) -> pb::Encoding {
    match encoding {
        Encoding::F32 => pb::Encoding::F32,
        Encoding::Bf16 => pb::Encoding::Bf16,
        Encoding::Fp8Block128 => pb::Encoding::Fp8E4m3Block128,
    }
}
