//! Checksums of what crosses the network between routers and workers: CRC-32 (IEEE 802.3).
//!
//! In: a message of `conclave.expert.v1`. Out: the sum over all that decides what is computed, or what was. Never here: what
//! to do about a difference.
//!
//! TCP's own sum lets one damaged segment in some ten thousand pass, and network cards that compute it cannot vouch for the
//! memory it was computed in. A damaged row is still numbers, and nobody would notice.

use crc32fast::Hasher;

use crate::expert::v1::{DispatchBatch, Returned};

/// What of a batch decides the result, wherever its bytes lie.
#[derive(Clone, Copy, Debug)]
pub struct Dispatched<'a> {
    /// `batch_id`.
    pub batch_id: u64,
    /// `layer` and `rows`.
    pub counts: [u32; 2],
    /// `encoding`, `mode` and `return_encoding`.
    pub kinds: [i32; 3],
    /// `expert_ids`, `row_ids`, `weights`, `scales` and `hidden`.
    pub fields: [&'a [u8]; 5],
}

impl Dispatched<'_> {
    /// The sum over all of it.
    pub fn checksum(&self) -> u32 {
        let mut sum = Hasher::new();
        sum.update(&self.batch_id.to_le_bytes());
        self.counts.iter().for_each(|number| sum.update(&number.to_le_bytes()));
        self.kinds.iter().for_each(|number| sum.update(&number.to_le_bytes()));
        for bytes in self.fields {
            sum.update(&(bytes.len() as u64).to_le_bytes());
            sum.update(bytes);
        }
        sum.finalize()
    }
}

/// Over everything but what only logs read: the plan's version and the time that is left.
pub fn of_dispatch(batch: &DispatchBatch) -> u32 {
    let dispatched = Dispatched {
        batch_id: batch.batch_id,
        counts: [batch.layer, batch.rows],
        kinds: [batch.encoding, batch.mode, batch.return_encoding],
        fields: [&batch.expert_ids, &batch.row_ids, &batch.weights, &batch.scales, &batch.hidden],
    };
    dispatched.checksum()
}

/// Over an answer's rows and whose they are.
pub fn of_returned(batch_id: u64, returned: &Returned) -> u32 {
    of_rows(batch_id, returned.encoding, &returned.rows)
}

/// As [`of_returned`], rows that are not in a message of their own.
pub fn of_rows(batch_id: u64, encoding: i32, rows: &[u8]) -> u32 {
    let mut sum = Hasher::new();
    sum.update(&batch_id.to_le_bytes());
    sum.update(&encoding.to_le_bytes());
    sum.update(rows);
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
