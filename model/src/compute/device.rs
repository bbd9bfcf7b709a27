//! Experts of one layer on a GPU, or in libtorch's products on the processor. In: checked batches and the rows that each
//! expert gets of them. Out: for each batch a row per assignment, on its way. Never here: a GPU waited for.
//!
//! Each row goes to the device once and each result comes back once, whatever the number of experts; the device puts rows in the
//! experts' order and results in the batches'. There are three ways through the experts: our own kernels, products of groups,
//! and one expert after the other.

use std::borrow::Cow;

use super::{Assignment, Error, ExpertBatch, grouped};
use crate::{device::Numerics, expert::Expert, gpu::experts::Kernels, hidden::Hidden, transfer::Leaving};

/// Which of the ways may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The quickest that there is.
    Best,
    /// libtorch's alone.
    Libtorch,
}

/// `any` is one of `experts`, in whose order come the rows that they see. Returns one tensor of all batches' rows, one batch after
/// the other.
pub(super) fn on_device(
    any: &Expert,
    experts: &[(&Expert, &Vec<Assignment>)],
    batches: &[&ExpertBatch],
    hidden: usize,
    way: Way,
) -> Result<Leaving<1>, Error> {
    let all: Cow<'_, [f32]> = match batches {
        [one] => Cow::Borrowed(&one.hidden),
        several => Cow::Owned(several.iter().flat_map(|batch| &batch.hidden).copied().collect()),
    };
    let (first_rows, first_places) =
        (firsts(batches, |batch| batch.rows), firsts(batches, |batch| batch.expert_ids.len()));
    let assignments = || experts.iter().flat_map(|(_, assignments)| assignments.iter());
    let order: Vec<usize> = assignments().map(|Assignment { batch, row, .. }| first_rows[*batch] + row).collect();
    let places: Vec<usize> =
        assignments().map(|Assignment { batch, index, .. }| first_places[*batch] + index).collect();
    let rows = Hidden::from_rows(&all, hidden, any.compute());
    let (each, counts): (Vec<&Expert>, Vec<usize>) =
        experts.iter().map(|(expert, assignments)| (*expert, assignments.len())).unzip();
    let computed = match kernels_for(&each, &counts).filter(|_| way == Way::Best) {
        Some(kernels) => kernels.forward(&rows, &each, &counts, &order, &places)?,
        None => {
            let rows = rows.at(&order);
            let in_experts_order = match grouped::forward(&rows, &each, &counts) {
                Some(computed) => computed,
                None => one_by_one(&rows, &each, &counts)?,
            };
            let mut from = vec![0; places.len()];
            places.iter().enumerate().for_each(|(nth, place)| from[*place] = nth);
            in_experts_order.at(&from)
        }
    };
    Ok(computed.leaving())
}

/// Our own, where they can compute all of `experts` and are the quickest, or give rows bits of their own where that is asked for.
fn kernels_for(experts: &[&Expert], counts: &[usize]) -> Option<&'static Kernels> {
    let any = experts.first()?;
    let (kernels, format) = any.kernels()?;
    let alike = experts.iter().all(|expert| expert.kernels().is_some_and(|(_, other)| other == format));
    // Groups are of BF16 alone, and rows of them have other bits in other company.
    let no_groups =
        any.compute().numerics == Numerics::Reproducible || experts.iter().any(|expert| expert.slot().is_none());
    (alike && (no_groups || Kernels::beat_groups(counts))).then_some(kernels)
}

/// Where each batch begins among all, each as long as `len` says.
fn firsts(batches: &[&ExpertBatch], len: impl Fn(&ExpertBatch) -> usize) -> Vec<usize> {
    let next = |end: &mut usize, batch: &&ExpertBatch| {
        let first = *end;
        *end += len(batch);
        Some(first)
    };
    batches.iter().scan(0, next).collect()
}

/// As [`grouped::forward`], wherever the experts lie.
fn one_by_one(rows: &Hidden, experts: &[&Expert], counts: &[usize]) -> Result<Hidden, Error> {
    let mut first = 0;
    let part = |(expert, count): (&&Expert, &usize)| {
        let part = expert.forward(&rows.run(first, *count));
        first += count;
        part
    };
    Ok(Hidden::one_after_the_other(&experts.iter().zip(counts).map(part).collect::<Result<Vec<_>, _>>()?))
}
