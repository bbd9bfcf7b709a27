//! The weighted sum of what the experts returned. Pure.
//!
//! In: rows by slot, or partial sums by part. Out: one row each, f32. Never here: renormalising, rows left out.

/// Sums unweighted rows `[T*K, D]` with `weights` `[T, K]` in gate order, in f32: the result does not depend on which
/// worker computed what.
pub fn per_assignment(rows: &[f32], weights: &[f32], experts_per_row: usize, hidden: usize) -> Vec<f32> {
    let count = weights.len() / experts_per_row.max(1);
    let mut sums = vec![0.0; count * hidden];
    let slots = rows.chunks_exact(hidden).zip(weights);
    for (slot, (row, weight)) in slots.enumerate() {
        let start = slot / experts_per_row * hidden;
        for (sum, value) in sums[start..start + hidden].iter_mut().zip(row) {
            *sum += weight * value;
        }
    }
    sums
}

/// Adds one worker's weighted rows, which belong to `row_indices`, to `sums` `[T, D]`.
pub fn add_partial(sums: &mut [f32], row_indices: &[u32], rows: &[f32], hidden: usize) {
    for (index, row) in row_indices.iter().zip(rows.chunks_exact(hidden)) {
        let start = *index as usize * hidden;
        for (sum, value) in sums[start..start + hidden].iter_mut().zip(row) {
            *sum += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_ways_of_combining_agree(
            values in prop::collection::vec(-1.0f32..1.0, 4 * 3 * 2),
            weights in prop::collection::vec(0.0f32..1.0, 4 * 3),
            owner in prop::collection::vec(0usize..2, 12),
        ) {
            let (experts_per_row, hidden) = (3, 2);
            let whole = per_assignment(&values, &weights, experts_per_row, hidden);
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
                    add_partial(&mut sums, &[row], &partial, hidden);
                }
            }
            for (a, b) in whole.iter().zip(&sums) {
                prop_assert!((a - b).abs() < 1e-5);
            }
        }
    }
}
