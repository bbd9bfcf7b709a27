//! The weighted sum of what the experts returned, straight from the bytes that came. Pure.
//!
//! In: answers and where in them each slot's row lies, or partial sums by part. Out: one row each, f32.
//! Never here: renormalising, rows left out, a copy of a row.

use conclave_model::wire::Rows;

/// Where one slot's row lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Among the answers.
    pub answer: u32,
    /// Within it.
    pub row: u32,
}

/// Sums the rows at `places` `[T*K]` with `weights` `[T, K]` in gate order, in f32: the result does not depend on which
/// worker computed what. One row of sums stays in the nearest cache while its K rows pass.
pub fn per_assignment(
    answers: &[Rows],
    places: &[Place],
    weights: &[f32],
    experts_per_row: usize,
    hidden: usize,
) -> Vec<f32> {
    let experts_per_row = experts_per_row.max(1);
    let mut sums = vec![0.0; weights.len() / experts_per_row * hidden];
    let slots = places.chunks_exact(experts_per_row).zip(weights.chunks_exact(experts_per_row));
    for (sums, (places, weights)) in sums.chunks_exact_mut(hidden.max(1)).zip(slots) {
        for (place, weight) in places.iter().zip(weights) {
            answers[place.answer as usize].add_weighted(place.row as usize, *weight, sums);
        }
    }
    sums
}

/// Adds one worker's weighted rows, which belong to `row_indices`, to `sums` `[T, D]`.
pub fn add_partial(sums: &mut [f32], row_indices: &[u32], rows: &Rows, hidden: usize) {
    for (nth, index) in row_indices.iter().enumerate() {
        // Once a value is itself.
        rows.add_weighted(nth, 1.0, &mut sums[*index as usize * hidden..][..hidden]);
    }
}

#[cfg(test)]
mod tests {
    use conclave_model::wire::{self, Encoding};
    use proptest::prelude::*;

    use super::*;

    fn rows(values: &[f32], hidden: usize) -> Rows {
        let (bytes, _) = wire::encode(values, hidden, Encoding::F32);
        Rows::new(Encoding::F32, bytes, values.len() / hidden, hidden).unwrap()
    }

    proptest! {
        #[test]
        fn both_ways_of_combining_agree(
            values in prop::collection::vec(-1.0f32..1.0, 4 * 3 * 2),
            weights in prop::collection::vec(0.0f32..1.0, 4 * 3),
            owner in prop::collection::vec(0usize..2, 12),
        ) {
            let (experts_per_row, hidden) = (3, 2);
            // Each worker's answer: its rows in slot order.
            let mut returned = [Vec::new(), Vec::new()];
            let places: Vec<Place> = owner.iter().zip(values.chunks_exact(hidden)).map(|(&owner, row)| {
                let at = returned[owner].len() / hidden;
                returned[owner].extend_from_slice(row);
                Place { answer: owner as u32, row: at as u32 }
            }).collect();
            let answers = returned.map(|values| rows(&values, hidden));
            let whole = per_assignment(&answers, &places, &weights, experts_per_row, hidden);
            let mut plain = vec![0.0; whole.len()];
            for (slot, row) in values.chunks_exact(hidden).enumerate() {
                for (d, value) in row.iter().enumerate() {
                    plain[slot / experts_per_row * hidden + d] += weights[slot] * value;
                }
            }
            prop_assert_eq!(&whole, &plain, "in gate order, whoever had what");
            let mut sums = vec![0.0; whole.len()];
            for worker in 0..2 {
                for row in 0..4u32 {
                    let mut partial = vec![0.0; hidden];
                    for slot in (row as usize * 3)..(row as usize * 3 + 3) {
                        if owner[slot] == worker {
                            for d in 0..hidden {
                                partial[d] += weights[slot] * values[slot * hidden + d];
                            }
                        }
                    }
                    add_partial(&mut sums, &[row], &rows(&partial, hidden), hidden);
                }
            }
            for (a, b) in whole.iter().zip(&sums) {
                prop_assert!((a - b).abs() < 1e-5);
            }
        }
    }
}
