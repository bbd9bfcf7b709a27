//! Checksums of what crosses the network between routers and workers: CRC-32 (IEEE 802.3).
//!
//! In: a message of `conclave.expert.v1`. Out: the sum over all that decides what is computed, or what was. Never here: what
//! to do about a difference.
//!
//! TCP's own sum lets one damaged segment in some ten thousand pass, and network cards that compute it cannot vouch for the
//! memory it was computed in. A damaged row is still numbers, and nobody would notice.

use crc32fast::Hasher;

use crate::expert::v1::{DispatchBatch, Returned};

/// Over everything but what only logs read: the plan's version and the time that is left.
pub fn of_dispatch(batch: &DispatchBatch) -> u32 {
    let mut sum = Hasher::new();
    sum.update(&batch.batch_id.to_le_bytes());
    for number in [batch.layer, batch.rows] {
        sum.update(&number.to_le_bytes());
    }
    for number in [batch.encoding, batch.mode, batch.return_encoding] {
        sum.update(&number.to_le_bytes());
    }
    for bytes in [&batch.expert_ids, &batch.row_ids, &batch.weights, &batch.scales, &batch.hidden] {
        sum.update(&(bytes.len() as u64).to_le_bytes());
        sum.update(bytes);
    }
    sum.finalize()
}

/// Over an answer's rows and whose they are.
pub fn of_returned(batch_id: u64, returned: &Returned) -> u32 {
    let mut sum = Hasher::new();
    sum.update(&batch_id.to_le_bytes());
    sum.update(&returned.encoding.to_le_bytes());
    sum.update(&returned.rows);
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> DispatchBatch {
        let bytes = |length: usize| vec![7u8; length].into();
        DispatchBatch {
            batch_id: 1,
            layer: 2,
            plan_version: 3,
            deadline_us: 4,
            encoding: 1,
            rows: 1,
            hidden: bytes(32),
            scales: bytes(0),
            expert_ids: bytes(4),
            row_ids: bytes(8),
            weights: bytes(8),
            mode: 2,
            return_encoding: 1,
            checksum: None,
        }
    }

    /// One change to a batch.
    type Change = fn(&mut DispatchBatch);

    #[test]
    fn whatever_decides_the_result_changes_the_sum() {
        let sum = of_dispatch(&batch());
        let decisive: [Change; 9] = [
            |batch| batch.batch_id = 9,
            |batch| batch.layer = 9,
            |batch| batch.rows = 9,
            |batch| batch.mode = 1,
            |batch| batch.return_encoding = 2,
            |batch| batch.expert_ids = vec![7, 7, 7, 6].into(),
            |batch| batch.hidden = [vec![7; 31], vec![6]].concat().into(),
            // The same bytes in other places.
            |batch| (batch.row_ids, batch.weights) = (vec![7; 16].into(), vec![].into()),
            |batch| batch.scales = vec![7].into(),
        ];
        for (number, change) in decisive.into_iter().enumerate() {
            let mut changed = batch();
            change(&mut changed);
            assert_ne!(of_dispatch(&changed), sum, "change {number}");
        }
        let mut same = batch();
        (same.plan_version, same.deadline_us, same.checksum) = (8, 9, Some(sum));
        assert_eq!(of_dispatch(&same), sum, "what only logs read");
    }

    #[test]
    fn an_answer_to_another_batch_has_another_sum() {
        let returned = Returned { encoding: 1, rows: vec![1, 2, 3, 4].into() };
        let other = Returned { encoding: 1, rows: vec![1, 2, 3, 5].into() };
        assert_ne!(of_returned(1, &returned), of_returned(2, &returned));
        assert_ne!(of_returned(1, &returned), of_returned(1, &other));
    }
}
