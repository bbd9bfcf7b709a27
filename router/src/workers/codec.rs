//! The edge to `conclave.expert.v1`: what the router sends and gets, to and from prost types.
//!
//! In: a [`Dispatch`], or a worker's message. Out: the other side's form, every length checked.
//! Never here: what to do about a refusal.

use std::{ops::Range, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use conclave_model::wire::{Encoded, Encoding, Rows};
use conclave_proto::{expert::v1 as pb, integrity};
use conclave_runtime::stream::{Message, TooLong};
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};

/// Rows for one worker, in the message they leave in. Only what the stream decides is missing from it.
#[derive(Debug)]
pub struct Dispatch {
    message: Message,
    /// Where in it the bytes of `expert_ids`, `row_ids`, `weights`, `scales` and `hidden` lie.
    fields: [Range<usize>; 5],
    layer: u32,
    kinds: [i32; 3],
    rows: usize,
    assignments: usize,
    weighted: bool,
}

/// What goes into a [`Dispatch`], wherever it lies.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// Layer of the model.
    pub layer: u32,
    /// For the worker's logs.
    pub plan_version: u64,
    /// `[T, D]`, of which some are sent. Answers come back as they travel, but never in 8 bits.
    pub source: &'a Encoded,
    /// Those, each below T.
    pub rows: &'a [u32],
    /// Per assignment, below the number of rows sent.
    pub row_ids: &'a [u32],
}

/// What a message holds besides its bytes fields, at most.
const SMALL_FIELDS: usize = 128;

impl Dispatch {
    /// Each row is copied from where it was encoded. `expert_ids` and `weights` are per assignment, the latter
    /// where one weighted row per row sent is wanted back.
    pub fn new(
        contents: Contents<'_>,
        expert_ids: impl ExactSizeIterator<Item = u16>,
        weights: Option<impl ExactSizeIterator<Item = f32>>,
    ) -> Self {
        let Contents { layer, plan_version, source, rows, row_ids } = contents;
        let encoding = source.encoding();
        let (assignments, weighted) = (expert_ids.len(), weights.is_some());
        let mode = if weighted { pb::CombineMode::PartialSum } else { pb::CombineMode::PerAssignment };
        // Outputs come back as wide as the router computes: 8 bits are for the way out only.
        let back = if encoding == Encoding::F32 { Encoding::F32 } else { Encoding::Bf16 };
        let kinds = [to_proto(encoding).into(), mode.into(), to_proto(back).into()];
        let small = pb::DispatchBatch {
            layer,
            plan_version,
            encoding: kinds[0],
            rows: rows.len() as u32,
            mode: kinds[1],
            return_encoding: kinds[2],
            ..Default::default()
        };
        let [value_bytes, scale_bytes] = source.row_bytes().map(|bytes| bytes * rows.len());
        let mut message = Message::with_capacity(SMALL_FIELDS + 10 * assignments + value_bytes + scale_bytes);
        let body = message.body();
        small.encode_raw(body);
        let expert_ids = field(body, 9, 2 * assignments, expert_ids.map(u16::to_le_bytes));
        let row_ids = field(body, 10, 4 * row_ids.len(), row_ids.iter().map(|id| id.to_le_bytes()));
        let weights = weights.map_or(0..0, |weights| field(body, 11, 4 * weights.len(), weights.map(f32::to_le_bytes)));
        let scales = field(body, 8, scale_bytes, rows.iter().map(|&row| source.scales(row)));
        let values = field(body, 7, value_bytes, rows.iter().map(|&row| source.values(row)));
        let fields = [expert_ids, row_ids, weights, scales, values];
        Self { message, fields, layer, kinds, rows: rows.len(), assignments, weighted }
    }

    /// Rows sent.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Uses of an expert that are asked for.
    pub fn assignments(&self) -> usize {
        self.assignments
    }

    /// Rows that come back.
    pub fn returned_rows(&self) -> usize {
        if self.weighted { self.rows } else { self.assignments }
    }

    /// As it goes out, with `batch_id` on this stream and `left` until nobody waits any more.
    pub(super) fn finish(mut self, batch_id: u64, left: Duration) -> Result<Bytes, TooLong> {
        let body = self.message.body();
        let dispatched = integrity::Dispatched {
            batch_id,
            counts: [self.layer, self.rows as u32],
            kinds: self.kinds,
            fields: self.fields.map(|field| &body[field]),
        };
        let checksum = dispatched.checksum();
        // Fields may come in any order.
        let deadline_us = u64::try_from(left.as_micros()).unwrap_or(u64::MAX);
        let last = pb::DispatchBatch { batch_id, deadline_us, checksum: Some(checksum), ..Default::default() };
        last.encode_raw(body);
        self.message.finish()
    }
}

/// Appends a bytes field of `items`, `length` bytes together. Says where they lie.
fn field(body: &mut BytesMut, tag: u32, length: usize, items: impl Iterator<Item: AsRef<[u8]>>) -> Range<usize> {
    encode_key(tag, WireType::LengthDelimited, body);
    encode_varint(length as u64, body);
    let start = body.len();
    items.for_each(|item| body.put_slice(item.as_ref()));
    debug_assert_eq!(body.len() - start, length, "as long as was said before");
    start..body.len()
}

/// What became of a dispatch.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Computed: as many rows as were asked for, of numbers only.
    Rows(Rows),
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

/// An answer as it came, its length, checksum and values not looked at yet. Its rows are a slice of `bytes`.
pub(super) fn read(bytes: Bytes) -> Result<pb::CombineBatch, String> {
    pb::CombineBatch::decode(bytes).map_err(|error| error.to_string())
}

/// An answer checked against its checksum and what was asked: `rows` of `hidden` values.
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
            let rows = Rows::new(encoding, returned.rows, rows, hidden).map_err(|error| error.to_string())?;
            if rows.all_finite() {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the message that prost would have written.
        #[test]
        fn a_dispatch_is_read_as_what_went_in(
            picked in prop::collection::vec(0u32..9, 1..9),
            encoding in prop::sample::select(vec![Encoding::F32, Encoding::Bf16, Encoding::Fp8Block128]),
            weighted: bool,
            (layer, batch_id, left) in (0u32..70, any::<u64>(), 0u64..u64::MAX),
        ) {
            let hidden = 130;
            let source: Vec<f32> = (0..9 * hidden).map(|n| (n % 97) as f32 - 48.0).collect();
            let row_ids: Vec<u32> = (0..picked.len() as u32).rev().collect();
            let ids: Vec<u16> = (0..picked.len() as u16).map(|id| id * 300).collect();
            let weights: Vec<f32> = ids.iter().map(|id| f32::from(*id) / 7.0).collect();
            let encoded = Encoded::new(&source, hidden, encoding).unwrap();
            let contents = Contents { layer, plan_version: 3, source: &encoded, rows: &picked, row_ids: &row_ids };
            let dispatch = Dispatch::new(contents, ids.iter().copied(), weighted.then(|| weights.iter().copied()));
            let sent = dispatch.finish(batch_id, Duration::from_micros(left)).unwrap();
            let read = pb::DispatchBatch::decode(sent.slice(conclave_runtime::stream::HEADER..)).unwrap();

            let gathered: Vec<f32> =
                picked.iter().flat_map(|&row| source[row as usize * hidden..][..hidden].to_vec()).collect();
            let (values, scales) = conclave_model::wire::encode(&gathered, hidden, encoding);
            let mode = if weighted { pb::CombineMode::PartialSum } else { pb::CombineMode::PerAssignment };
            let back = if encoding == Encoding::F32 { Encoding::F32 } else { Encoding::Bf16 };
            let weights = if weighted { weights } else { Vec::new() };
            let mut expected = pb::DispatchBatch {
                batch_id,
                layer,
                plan_version: 3,
                deadline_us: left,
                encoding: to_proto(encoding).into(),
                rows: picked.len() as u32,
                hidden: values,
                scales,
                expert_ids: ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
                row_ids: row_ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
                weights: weights.iter().flat_map(|weight| weight.to_le_bytes()).collect(),
                mode: mode.into(),
                return_encoding: to_proto(back).into(),
                checksum: None,
            };
            expected.checksum = Some(integrity::of_dispatch(&expected));
            prop_assert_eq!(read, expected);
        }
    }
}
