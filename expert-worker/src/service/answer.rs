//! The edge, outwards: rows or a refusal come in, the `CombineBatch` that says so goes out as the bytes of its message.
//! Rows are encoded where they leave from; no other buffer holds them.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use conclave_model::compute::Computed;
use conclave_model::wire::Encoding;
use conclave_proto::expert::v1 as pb;
use conclave_proto::integrity;
use conclave_runtime::stream::{Message, TooLong};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use super::micros;
use crate::batcher::Refusal;

/// What an answer holds besides its rows, at most.
const SMALL_FIELDS: usize = 96;
/// Longest text of a refusal, characters: who sent nonsense need not get it back.
const MAX_REASON: usize = 1024;

/// Rows of `hidden` values for batch `batch_id`, and the microseconds they took in the queue and in the making.
pub(super) fn returned(
    batch_id: u64,
    rows: &Computed,
    hidden: usize,
    encoding: Encoding,
    [queue_us, compute_us]: [u64; 2],
) -> Result<Bytes, TooLong> {
    let kind = match encoding {
        Encoding::F32 => pb::Encoding::F32,
        Encoding::Bf16 => pb::Encoding::Bf16,
        Encoding::Fp8Block128 => pb::Encoding::Fp8E4m3Block128,
    };
    let length = encoding.row_bytes(hidden) * (rows.values() / hidden.max(1));
    let mut message = Message::with_capacity(SMALL_FIELDS + length);
    let body = message.body();
    // `returned`, field 2 of the answer: its encoding, and its rows as field 2 of it.
    let encoding_field = pb::Returned { encoding: kind.into(), rows: Bytes::new() };
    let inner = encoding_field.encoded_len() + 1 + encoded_len_varint(length as u64) + length;
    encode_key(2, WireType::LengthDelimited, body);
    encode_varint(inner as u64, body);
    encoding_field.encode_raw(body);
    encode_key(2, WireType::LengthDelimited, body);
    encode_varint(length as u64, body);
    let start = body.len();
    body.put_bytes(0, length);
    rows.encode(hidden, encoding, &mut body[start..]);
    let checksum = Some(integrity::of_rows(batch_id, kind.into(), &body[start..]));
    pb::CombineBatch { batch_id, outcome: None, queue_us, compute_us, checksum }.encode_raw(body);
    message.finish()
}

/// Why batch `batch_id` gets no rows.
pub(super) fn refused(batch_id: u64, refusal: Refusal, [queue_us, compute_us]: [u64; 2]) -> Bytes {
    let outcome = Some(pb::combine_batch::Outcome::Refused(reason(refusal)));
    let answer = pb::CombineBatch { batch_id, checksum: None, outcome, queue_us, compute_us };
    let mut message = Message::with_capacity(answer.encoded_len());
    answer.encode_raw(message.body());
    // A refusal is short: its texts are ours and cut, and no more experts are missing than a layer has.
    message.finish().unwrap_or_default()
}

fn reason(refusal: Refusal) -> pb::Refused {
    use pb::RefusedReason as Reason;
    let (reason, mut message, missing_experts, retry_after) = match refusal {
        Refusal::Busy { message, retry_after } => (Reason::Busy, message.to_owned(), Vec::new(), retry_after),
        Refusal::Draining => (Reason::Draining, "this worker is leaving".to_owned(), Vec::new(), Duration::ZERO),
        Refusal::NotResident(missing) => {
            let missing = missing.into_iter().map(u32::from).collect();
            (Reason::NotResident, "experts are not here".to_owned(), missing, Duration::ZERO)
        }
        Refusal::Invalid(message) => (Reason::Invalid, message, Vec::new(), Duration::ZERO),
        Refusal::Internal(message) => (Reason::Internal, message, Vec::new(), Duration::ZERO),
    };
    if let Some((end, _)) = message.char_indices().nth(MAX_REASON) {
        message.truncate(end);
    }
    pb::Refused { reason: reason.into(), missing_experts, retry_after_us: micros(retry_after), message }
}

#[cfg(test)]
mod tests {
    use conclave_model::wire;
    use conclave_runtime::stream::HEADER;

    use super::*;

    #[test]
    fn an_answer_is_read_as_what_went_in() {
        let values: Vec<f32> = (0..3 * 5).map(|n| n as f32).collect();
        for (encoding, kind) in [(Encoding::F32, pb::Encoding::F32), (Encoding::Bf16, pb::Encoding::Bf16)] {
            for count in [0, 3] {
                let values = &values[..count * 5];
                let sent = returned(7, &values.to_vec().into(), 5, encoding, [8, 9]).unwrap();
                let returned = pb::Returned { encoding: kind.into(), rows: wire::encode(values, 5, encoding).0 };
                let checksum = Some(integrity::of_returned(7, &returned));
                let outcome = Some(pb::combine_batch::Outcome::Returned(returned));
                let expected = pb::CombineBatch { batch_id: 7, outcome, queue_us: 8, compute_us: 9, checksum };
                assert_eq!(pb::CombineBatch::decode(sent.slice(HEADER..)).unwrap(), expected);
            }
        }
    }

    #[test]
    fn a_refusal_is_read_as_what_went_in() {
        let sent = refused(7, Refusal::NotResident(vec![3, 9]), [8, 9]);
        let read = pb::CombineBatch::decode(sent.slice(HEADER..)).unwrap();
        let Some(pb::combine_batch::Outcome::Refused(read)) = read.outcome else { panic!("{read:?}") };
        assert_eq!((read.reason(), read.missing_experts), (pb::RefusedReason::NotResident, vec![3, 9]));
    }
}
