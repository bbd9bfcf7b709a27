//! One layer's experts as grouped products: as few launches as one expert takes, whatever their number. For this their
//! weights lie side by side in memory. In: a layer's experts; rows in the experts' order. Out: rows. Never here: which rows
//! an expert gets.
//!
//! A product's group is the run of rows that one expert gets; where it ends is read on the GPU itself, so nothing is waited
//! for. libtorch has these products for BF16 on GPUs of compute capability 9 and 10; on others it goes through the groups one
//! by one and waits for the GPU before, so there experts stay by themselves.

use tch::{Kind, Tensor};

use crate::{
    device::{Compute, Dtype, Numerics},
    expert::Expert,
    hidden::Hidden,
    transfer::placed,
};

/// Sizes that the products want whole multiples of: 16 bytes of BF16.
const ALIGNED: usize = 8;
/// Groups that one product takes.
const MOST_GROUPS: usize = 1023;

/// Where one expert's weights lie among its layer's: gate and up one after the other, down by itself.
#[derive(Debug)]
pub(crate) struct Slot {
    /// `[S, 2I, D]`
    gate_up: Tensor,
    /// `[S, D, I]`
    down: Tensor,
    /// Below S.
    index: usize,
}

/// Lays the weights of `experts`, all that are here of one layer, side by side where that makes their products quicker. To be
/// called anew after some have come or gone: what a layer no longer needs is let go with that.
///
/// For as long as it takes, two thirds of the layer's weights are in memory twice. Where there is no room for that, experts
/// stay where they are until the next time, and compute the same one by one; so does the memory of one that has gone, if it
/// lay among them.
pub fn side_by_side(experts: &mut [&mut Expert]) {
    let worthwhile = |expert: &Expert| {
        let Compute { device, dtype, numerics } = expert.compute();
        (dtype, numerics) == (Dtype::Bf16, Numerics::Fast) && device.has_grouped_products()
    };
    if experts.first().is_some_and(|expert| worthwhile(expert)) {
        lay_out(experts);
    }
}

/// As [`side_by_side`], whether or not it is worthwhile. `false` where they stayed as they were.
pub(super) fn lay_out(experts: &mut [&mut Expert]) -> bool {
    let Some((hidden, inner)) = experts.first().map(|expert| (expert.hidden_size(), expert.inner_size())) else {
        return false;
    };
    if !hidden.is_multiple_of(ALIGNED) || !inner.is_multiple_of(ALIGNED) || experts.len() > MOST_GROUPS {
        return false;
    }
    let gates_and_ups: Option<Vec<[&Tensor; 2]>> =
        experts.iter().map(|expert| expert.weights().map(|[gate, up, _]| [gate, up])).collect();
    let Some(gate_up) = gates_and_ups.and_then(|parts| stacked(parts.as_flattened(), [2 * inner, hidden])) else {
        return false;
    };
    // Theirs go before room for the third is asked for.
    for (index, expert) in experts.iter_mut().enumerate() {
        let both = gate_up.get(index as i64);
        expert.read_gate_and_up_from(&both.narrow(0, 0, inner as i64), &both.narrow(0, inner as i64, inner as i64));
    }
    let downs: Option<Vec<&Tensor>> = experts.iter().map(|expert| expert.weights().map(|[.., down]| down)).collect();
    let Some(down) = downs.and_then(|parts| stacked(&parts, [hidden, inner])) else { return false };
    for (index, expert) in experts.iter_mut().enumerate() {
        let slot = Slot { gate_up: gate_up.shallow_clone(), down: down.shallow_clone(), index };
        expert.take_slot(&down.get(index as i64), slot);
    }
    true
}

/// `parts` one after the other, as matrices `[out, inner]`. `None` where there is no room for them.
fn stacked(parts: &[&Tensor], [out, inner]: [usize; 2]) -> Option<Tensor> {
    let all = tch::no_grad(|| Tensor::f_cat(parts, 0)).ok()?;
    Some(all.view([-1, out as i64, inner as i64]))
}

/// Rows `[A, D]` through `experts`, the first `counts[0]` of them through the first and so on, to rows `[A, D]`. `None` where
/// the experts do not lie side by side in this order.
pub(super) fn forward(rows: &Hidden, experts: &[&Expert], counts: &[usize]) -> Option<Hidden> {
    let slots: Vec<&Slot> = experts.iter().map(|expert| expert.slot()).collect::<Option<_>>()?;
    let first = slots.first()?;
    let together = slots.iter().all(|slot| slot.gate_up.data_ptr() == first.gate_up.data_ptr());
    if !together || !slots.is_sorted_by(|one, next| one.index < next.index) {
        return None;
    }
    let (groups, inner) = (first.down.size()[0] as usize, first.down.size()[2]);
    let mut ends = vec![0i32; groups];
    for (slot, count) in slots.iter().zip(counts) {
        ends[slot.index] = i32::try_from(*count).ok()?;
    }
    // Each group ends where the next one begins, those without rows too.
    let mut end = 0i32;
    for group in &mut ends {
        end = end.checked_add(*group)?;
        *group = end;
    }
    debug_assert_eq!(i64::from(end), rows.0.size()[0], "every row is in one group");
    let ends = placed(&ends, rows.0.device());
    let product =
        |x: &Tensor, weights: &Tensor| x.internal_grouped_mm(&weights.transpose(1, 2), Some(&ends), None, None::<Kind>);
    let both = product(&rows.0, &first.gate_up); // [A, 2I]
    let between = both.narrow(1, 0, inner).silu() * both.narrow(1, inner, inner);
    Some(Hidden(product(&between, &first.down)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        compute::{Computed, ExpertBatch, grouped, run, run_by_libtorch},
        device::Device,
    };

    const HIDDEN: usize = 24;
    const INNER: usize = 16;

    fn some_experts(count: usize, seed: i64, dtype: Dtype) -> Vec<Expert> {
        tch::manual_seed(seed);
        let compute = Compute { device: Device::Cpu, dtype, numerics: Numerics::Fast };
        (0..count).map(|_| Expert::drawn(HIDDEN, INNER, compute)).collect()
    }

    /// One row, or more, for each of `expert_ids`.
    fn batch(expert_ids: Vec<u16>, rows: usize) -> ExpertBatch {
        let row_ids = (0..expert_ids.len()).map(|nth| (nth % rows) as u32).collect();
        let hidden = (0..rows * HIDDEN).map(|nth| ((nth * 37 % 64) as f32 - 32.0) / 32.0).collect();
        ExpertBatch { layer: 0, rows, hidden, expert_ids, row_ids, weights: None }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn experts_side_by_side_compute_what_each_would_by_itself(
            seed: u32,
            ids in prop::collection::vec(0u16..6, 1..40),
            more in prop::collection::vec(0u16..6, 0..5),
            rows in 1usize..8,
            f32_model: bool,
        ) {
            let dtype = if f32_model { Dtype::F32 } else { Dtype::Bf16 };
            let mut experts = some_experts(6, seed.into(), dtype);
            let (one, other) = (batch(ids, rows), batch(more, rows));
            let batches = [&one, &other];
            let right = run(&batches, &|id| experts.get(id as usize)).expect("all are here");
            prop_assert!(lay_out(&mut experts.iter_mut().collect::<Vec<_>>()));
            let (nothing, last) = (Hidden::from_rows(&[0.0; HIDDEN], HIDDEN, experts[5].compute()), [&experts[5]]);
            prop_assert!(grouped::forward(&nothing, &last, &[1]).is_some(), "they are computed as groups");
            let ours = run_by_libtorch(&batches, &|id| experts.get(id as usize)).expect("all are here");
            // What lies between is BF16 in one and f32 in the other, or is added up in another order.
            let bound = if f32_model { 1e-5 } else { 2e-2 };
            let values = |each: &Vec<Computed>| each.iter().flat_map(Computed::to_f32).collect::<Vec<_>>();
            for (ours, right) in values(&ours).iter().zip(&values(&right)) {
                prop_assert!((ours - right).abs() <= bound * right.abs().max(1.0), "{ours} {right}");
            }
            let again = run(&batches, &|id| experts.get(id as usize)).expect("all are here");
            prop_assert_eq!(again, right, "each by itself computes what it did");
        }
    }

    #[test]
    fn who_comes_is_laid_beside_the_others_and_who_goes_leaves_no_hole() {
        let mut experts = some_experts(4, 5, Dtype::Bf16);
        let all = batch(vec![0, 1, 2, 3, 1], 2);
        let right = run(&[&all], &|id| experts.get(id as usize)).expect("all are here");
        assert!(lay_out(&mut experts[..3].iter_mut().collect::<Vec<_>>()));
        let refs: Vec<&Expert> = experts.iter().collect();
        let rows = Hidden::from_rows(&all.hidden, HIDDEN, experts[0].compute());
        assert!(grouped::forward(&rows, &refs[2..], &[1, 1]).is_none(), "the fourth lies elsewhere");
        assert!(grouped::forward(&rows, &[refs[1], refs[0]], &[1, 1]).is_none(), "rows are in another order");
        assert!(grouped::forward(&rows, &[refs[0], refs[2]], &[1, 1]).is_some());

        let gone = experts.remove(1);
        assert!(lay_out(&mut experts.iter_mut().collect::<Vec<_>>()));
        assert_eq!(
            experts.iter().map(|expert| expert.slot().map(|slot| slot.index)).collect::<Vec<_>>(),
            [Some(0), Some(1), Some(2)]
        );
        assert_eq!(experts[0].slot().map(|slot| slot.down.size()), Some(vec![3, HIDDEN as i64, INNER as i64]));
        experts.insert(1, gone);
        let again = run(&[&all], &|id| experts.get(id as usize)).expect("all are here");
        assert_eq!(again, right);
    }

    #[test]
    fn sizes_that_grouped_products_do_not_take_stay_by_themselves() {
        let compute = Compute { device: Device::Cpu, dtype: Dtype::Bf16, numerics: Numerics::Fast };
        let mut odd = Expert::drawn(HIDDEN, 12, compute);
        assert!(!lay_out(&mut [&mut odd]) && odd.slot().is_none());
        assert!(!lay_out(&mut []));
    }
}
