//! The edge: a `DispatchBatch` from the network comes in, a checked [`ExpertBatch`] goes out, or a sentence that says
//! what contradicts what. Every length is checked against the counts before a value is looked at; nothing is allocated
//! beyond what the message itself holds. Residency and time are not judged here.

use conclave_model::compute::ExpertBatch;
use conclave_model::wire::{self, Encoding};
use conclave_placement::ids::LayerIdx;
use conclave_proto::expert::v1 as pb;
use conclave_runtime::channel::MAX_INTERNAL_MESSAGE;

/// What an answer needs besides its rows.
const ANSWER_OVERHEAD: usize = 1024;

/// What a batch must fit.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Values per row.
    pub hidden: usize,
    /// Routed experts per MoE layer.
    pub experts: u32,
    /// Ascending.
    pub moe_layers: Vec<LayerIdx>,
}

/// A batch that makes sense.
#[derive(Debug, PartialEq)]
pub struct Decoded {
    pub batch: ExpertBatch,
    /// How the rows shall go back: F32 or BF16.
    pub return_encoding: Encoding,
}

/// Checks `message` and decodes its rows. The error is for the sender's log.
pub fn decode(message: &pb::DispatchBatch, shape: &Shape) -> Result<Decoded, String> {
    let encoding = encoding("encoding", message.encoding)?;
    let return_encoding = encoding_back(message.return_encoding)?;
    if shape.moe_layers.binary_search(&LayerIdx(message.layer)).is_err() {
        return Err(format!("layer {} has no routed experts", message.layer));
    }
    let rows = message.rows as usize;
    if rows == 0 {
        return Err("rows is 0".to_owned());
    }
    length("hidden", &message.hidden, rows, encoding.row_bytes(shape.hidden))?;
    length("scales", &message.scales, rows, encoding.scale_bytes(shape.hidden))?;

    let expert_ids = expert_ids(message, shape)?;
    let assignments = expert_ids.len();
    if assignments > rows.saturating_mul(shape.experts as usize) {
        return Err(format!("{assignments} assignments for {rows} rows: more than {} experts each", shape.experts));
    }
    let row_ids = row_ids(message, assignments)?;
    let weights = weights(message, assignments)?;

    let returned = if weights.is_some() { rows } else { assignments };
    let bytes = returned.saturating_mul(return_encoding.row_bytes(shape.hidden));
    if bytes > MAX_INTERNAL_MESSAGE - ANSWER_OVERHEAD {
        return Err(format!("an answer of {returned} rows is larger than {MAX_INTERNAL_MESSAGE} bytes"));
    }
    let hidden = wire::decode(encoding, &message.hidden, &message.scales, rows, shape.hidden)
        .map_err(|error| format!("hidden: {error}"))?;
    let batch = ExpertBatch { layer: message.layer, rows, hidden, expert_ids, row_ids, weights };
    Ok(Decoded { batch, return_encoding })
}

fn encoding(field: &str, number: i32) -> Result<Encoding, String> {
    match pb::Encoding::try_from(number) {
        Ok(pb::Encoding::F32) => Ok(Encoding::F32),
        Ok(pb::Encoding::Bf16) => Ok(Encoding::Bf16),
        Ok(pb::Encoding::Fp8E4m3Block128) => Ok(Encoding::Fp8Block128),
        Ok(pb::Encoding::Unspecified) | Err(_) => Err(format!("{field} {number} is unknown")),
    }
}

fn encoding_back(number: i32) -> Result<Encoding, String> {
    match encoding("return_encoding", number)? {
        Encoding::Fp8Block128 => Err("return_encoding must be F32 or BF16".to_owned()),
        encoding => Ok(encoding),
    }
}

/// `bytes` must hold `count` items of `each` bytes.
fn length(field: &str, bytes: &[u8], count: usize, each: usize) -> Result<(), String> {
    match count.checked_mul(each) {
        Some(expected) if expected == bytes.len() => Ok(()),
        _ => Err(format!("{field} has {} bytes, expected {count} x {each}", bytes.len())),
    }
}

fn expert_ids(message: &pb::DispatchBatch, shape: &Shape) -> Result<Vec<u16>, String> {
    let (ids, rest) = message.expert_ids.as_chunks::<2>();
    if ids.is_empty() || !rest.is_empty() {
        return Err(format!(
            "expert_ids has {} bytes, expected 2 per assignment and at least one",
            message.expert_ids.len()
        ));
    }
    let ids: Vec<u16> = ids.iter().map(|id| u16::from_le_bytes(*id)).collect();
    match ids.iter().find(|id| u32::from(**id) >= shape.experts) {
        Some(id) => Err(format!("expert {id} of {} experts", shape.experts)),
        None => Ok(ids),
    }
}

fn row_ids(message: &pb::DispatchBatch, assignments: usize) -> Result<Vec<u32>, String> {
    length("row_ids", &message.row_ids, assignments, 4)?;
    let ids: Vec<u32> = message.row_ids.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
    match ids.iter().find(|id| **id >= message.rows) {
        Some(id) => Err(format!("row {id} of {} rows", message.rows)),
        None => Ok(ids),
    }
}

fn weights(message: &pb::DispatchBatch, assignments: usize) -> Result<Option<Vec<f32>>, String> {
    match pb::CombineMode::try_from(message.mode) {
        Ok(pb::CombineMode::PerAssignment) if message.weights.is_empty() => Ok(None),
        Ok(pb::CombineMode::PerAssignment) => Err("weights are for PARTIAL_SUM only".to_owned()),
        Ok(pb::CombineMode::PartialSum) => {
            length("weights", &message.weights, assignments, 4)?;
            let weights: Vec<f32> =
                message.weights.as_chunks::<4>().0.iter().map(|weight| f32::from_le_bytes(*weight)).collect();
            match weights.iter().position(|weight| !weight.is_finite()) {
                Some(at) => Err(format!("weight {at} is not finite")),
                None => Ok(Some(weights)),
            }
        }
        Ok(pb::CombineMode::Unspecified) | Err(_) => Err(format!("mode {} is unknown", message.mode)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shape() -> Shape {
        Shape { hidden: 4, experts: 8, moe_layers: vec![LayerIdx(1), LayerIdx(2)] }
    }

    fn le<const N: usize>(items: impl IntoIterator<Item = [u8; N]>) -> bytes::Bytes {
        items.into_iter().flatten().collect()
    }

    /// Two rows; row 1 goes to experts 7 and 0, row 0 to expert 7.
    fn good() -> pb::DispatchBatch {
        pb::DispatchBatch {
            checksum: None,
            batch_id: 9,
            layer: 2,
            plan_version: 1,
            deadline_us: 1000,
            encoding: pb::Encoding::F32.into(),
            rows: 2,
            hidden: le((0..8).map(|n| (n as f32).to_le_bytes())),
            scales: bytes::Bytes::new(),
            expert_ids: le([7u16, 0, 7].map(u16::to_le_bytes)),
            row_ids: le([1u32, 1, 0].map(u32::to_le_bytes)),
            weights: bytes::Bytes::new(),
            mode: pb::CombineMode::PerAssignment.into(),
            return_encoding: pb::Encoding::Bf16.into(),
        }
    }

    #[test]
    fn a_good_batch_is_read_as_it_was_sent() {
        let decoded = decode(&good(), &shape()).unwrap();
        assert_eq!(decoded.batch.hidden, (0..8).map(|n| n as f32).collect::<Vec<_>>());
        assert_eq!((decoded.batch.expert_ids, decoded.batch.row_ids), (vec![7, 0, 7], vec![1, 1, 0]));
        assert_eq!((decoded.return_encoding, decoded.batch.weights), (Encoding::Bf16, None));

        let mut partial = good();
        partial.mode = pb::CombineMode::PartialSum.into();
        partial.weights = le([0.5f32, 0.25, 1.0].map(f32::to_le_bytes));
        let decoded = decode(&partial, &shape()).unwrap();
        assert_eq!(decoded.batch.weights, Some(vec![0.5, 0.25, 1.0]));
    }

    #[test]
    fn each_contradiction_is_named() {
        type Spoil = fn(&mut pb::DispatchBatch);
        let cases: [(Spoil, &str); 17] = [
            (|b| b.encoding = 0, "encoding 0"),
            (|b| b.encoding = 77, "encoding 77"),
            (|b| b.return_encoding = 0, "return_encoding 0"),
            (|b| b.return_encoding = pb::Encoding::Fp8E4m3Block128.into(), "F32 or BF16"),
            (|b| b.layer = 0, "layer 0"),
            (|b| b.rows = 0, "rows is 0"),
            (|b| b.rows = 3, "hidden has 32 bytes, expected 3 x 16"),
            (|b| b.rows = u32::MAX, "hidden"),
            (|b| b.scales = le([[0u8; 4]]), "scales"),
            (|b| b.expert_ids = bytes::Bytes::new(), "expert_ids"),
            (|b| b.expert_ids = le([[0u8; 5]]), "expert_ids"),
            (|b| b.expert_ids = le([7u16, 8, 7].map(u16::to_le_bytes)), "expert 8 of 8"),
            (|b| b.row_ids = le([[0u8; 8]]), "row_ids"),
            (|b| b.row_ids = le([0u32, 2, 1].map(u32::to_le_bytes)), "row 2 of 2"),
            (|b| b.mode = 0, "mode 0"),
            (|b| b.weights = le([[0u8; 12]]), "PARTIAL_SUM only"),
            (
                |b| {
                    b.mode = pb::CombineMode::PartialSum.into();
                    b.weights = le([0.0, f32::NAN, 1.0].map(f32::to_le_bytes));
                },
                "weight 1",
            ),
        ];
        for (spoil, expected) in cases {
            let mut batch = good();
            spoil(&mut batch);
            let message = decode(&batch, &shape()).unwrap_err();
            assert!(message.contains(expected), "{message:?} should name {expected:?}");
        }
    }

    #[test]
    fn a_small_request_cannot_ask_for_a_huge_answer() {
        let mut batch = good();
        batch.expert_ids = le((0..17).map(|_| 7u16.to_le_bytes()));
        batch.row_ids = le((0..17).map(|_| 0u32.to_le_bytes()));
        assert!(decode(&batch, &shape()).unwrap_err().contains("17 assignments for 2 rows"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            numbers in (0u32..4, 0i32..5, 0u32..6, 0i32..4, 0i32..4),
            hidden in prop::collection::vec(any::<u8>(), 0..40),
            scales in prop::collection::vec(any::<u8>(), 0..16),
            ids in prop::collection::vec(any::<u8>(), 0..16),
            row_ids in prop::collection::vec(any::<u8>(), 0..16),
            weights in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            let (layer, encoding, rows, mode, return_encoding) = numbers;
            let batch = pb::DispatchBatch {
                layer, encoding, rows, mode, return_encoding,
                hidden: hidden.into(), scales: scales.into(), expert_ids: ids.into(),
                row_ids: row_ids.into(), weights: weights.into(), ..good()
            };
            if let Ok(Decoded { batch, .. }) = decode(&batch, &shape()) {
                prop_assert_eq!(batch.hidden.len(), batch.rows * 4);
                prop_assert!(batch.row_ids.iter().all(|row| (*row as usize) < batch.rows));
                prop_assert_eq!(batch.row_ids.len(), batch.expert_ids.len());
            }
        }
    }
}
