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

/// One worker's weighted rows.
#[derive(Clone, Debug)]
pub struct Partial {
    /// The first of its slots in the routing: what is added in this order does not depend on who answered first.
    pub first_slot: u32,
    /// The rows of the layer that they belong to, each below T, ascending and each once.
    pub rows: Vec<u32>,
    /// As it came, a row for each.
    pub answer: Rows,
}

/// Sums the rows at `places` `[T*K]` with `weights` `[T, K]` in gate order, in f32: the result does not depend on which
/// worker computed what.
pub fn per_assignment(
    answers: &[Rows],
    places: &[Place],
    weights: &[f32],
    experts_per_row: usize,
    hidden: usize,
) -> Vec<f32> {
    row_by_row(weights.len() / experts_per_row.max(1), hidden, |row, sums| {
        let slots = row * experts_per_row..(row + 1) * experts_per_row;
        for (place, weight) in places[slots.clone()].iter().zip(&weights[slots]) {
            answers[place.answer as usize].add_weighted(place.row as usize, *weight, sums);
        }
    })
}

/// Sums what belongs to each of `rows` rows (T), in the order of their first slots.
pub fn partial_sums(mut partials: Vec<Partial>, rows: usize, hidden: usize) -> Vec<f32> {
    partials.sort_unstable_by_key(|partial| partial.first_slot);
    // Of each, how many rows have been added.
    let mut added = vec![0; partials.len()];
    let sums = row_by_row(rows, hidden, |row, sums| {
        for (partial, added) in partials.iter().zip(&mut added) {
            if partial.rows.get(*added) == Some(&(row as u32)) {
                // Once a value is itself.
                partial.answer.add_weighted(*added, 1.0, sums);
                *added += 1;
            }
        }
    });
    debug_assert!(partials.iter().zip(added).all(|(partial, added)| added == partial.rows.len()), "no row is left out");
    sums
}

/// `rows` rows of sums from zero, each whole before the next begins: it stays in the nearest cache while what belongs to it
/// passes, and memory is written once.
fn row_by_row(rows: usize, hidden: usize, mut add: impl FnMut(usize, &mut [f32])) -> Vec<f32> {
    let mut sums = Vec::with_capacity(rows * hidden);
    for row in 0..rows {
        sums.resize((row + 1) * hidden, 0.0);
        add(row, &mut sums[row * hidden..]);
    }
    sums
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
            let partials = [0, 1].map(|worker| {
                let (mut has, mut sums) = (Vec::new(), Vec::new());
                for row in 0..4u32 {
                    let slots = (row as usize * experts_per_row..).take(experts_per_row);
                    let slots: Vec<usize> = slots.filter(|slot| owner[*slot] == worker).collect();
                    if !slots.is_empty() {
                        has.push(row);
                        let sum = |d| slots.iter().map(|slot| weights[*slot] * values[slot * hidden + d]).sum::<f32>();
                        sums.extend((0..hidden).map(sum));
                    }
                }
                Partial { first_slot: worker as u32, rows: has, answer: rows(&sums, hidden) }
            });
            let sums = partial_sums(partials.into(), 4, hidden);
            prop_assert_eq!(sums.len(), whole.len());
            for (a, b) in whole.iter().zip(&sums) {
                prop_assert!((a - b).abs() < 1e-5);
            }
        }
    }
}
