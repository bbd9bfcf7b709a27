//! What an expert worker computes: gather rows, one SwiGLU per expert over its rows, scatter.
//!
//! In: checked batches of one layer, and the experts that are here. Out: for each batch, rows in its own order.
//! Never here: a missing expert skipped. Either every assignment is computed or the caller is told.

use std::collections::BTreeMap;

use crate::{
    expert::Expert,
    hidden::Hidden,
    kernels::{
        Isa, Rows, Source,
        product::Out,
        swiglu::{Network, swiglu},
    },
};

/// Rows of one layer that one router sent at once.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertBatch {
    /// Layer of the model.
    pub layer: u32,
    /// n.
    pub rows: usize,
    /// f32 `[n, D]`.
    pub hidden: Vec<f32>,
    /// Expert of each assignment, `[A]`.
    pub expert_ids: Vec<u16>,
    /// Row of each assignment, `[A]`, each below n.
    pub row_ids: Vec<u32>,
    /// `[A]` where the answer is one weighted sum per row; `None` where it is one unweighted row per assignment.
    pub weights: Option<Vec<f32>>,
}

/// Why nothing was computed.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// It went away between the check and the computation.
    #[error("expert {0} is not resident")]
    NotResident(u16),
    /// The batch contradicts itself.
    #[error("batch of {rows} rows with {hidden} values and assignments {expert_ids}/{row_ids} contradicts itself")]
    Inconsistent {
        /// n.
        rows: usize,
        /// Values.
        hidden: usize,
        /// Length of one list.
        expert_ids: usize,
        /// Length of the other.
        row_ids: usize,
    },
}

/// One row of one batch that goes through an expert.
struct Assignment {
    batch: usize,
    /// Of the assignment in the batch.
    index: usize,
    row: usize,
}

/// Computes `batches`, which share a layer, together: each expert sees its rows of all of them in one product.
///
/// Returns per batch f32 `[A, D]`, or `[n, D]` where it carries weights.
pub fn run<'a>(batches: &[&ExpertBatch], resident: &dyn Fn(u16) -> Option<&'a Expert>) -> Result<Vec<Vec<f32>>, Error> {
    let mut by_expert: BTreeMap<u16, Vec<Assignment>> = BTreeMap::new();
    for (batch, ExpertBatch { rows, hidden, expert_ids, row_ids, .. }) in batches.iter().enumerate() {
        if expert_ids.len() != row_ids.len() || row_ids.iter().any(|&row| row as usize >= *rows) {
            let (hidden, expert_ids, row_ids) = (hidden.len(), expert_ids.len(), row_ids.len());
            return Err(Error::Inconsistent { rows: *rows, hidden, expert_ids, row_ids });
        }
        for (index, (&expert, &row)) in expert_ids.iter().zip(row_ids).enumerate() {
            let assignment = Assignment { batch, index, row: row as usize };
            by_expert.entry(expert).or_default().push(assignment);
        }
    }

    let mut experts = Vec::with_capacity(by_expert.len());
    for (&id, assignments) in &by_expert {
        experts.push((resident(id).ok_or(Error::NotResident(id))?, assignments));
    }
    let Some((any, _)) = experts.first() else {
        return Ok(batches
            .iter()
            .map(|batch| vec![0.0; if batch.weights.is_some() { batch.hidden.len() } else { 0 }])
            .collect());
    };
    let hidden = any.hidden_size();
    let mut outputs: Vec<Vec<f32>> =
        batches.iter().map(|batch| Vec::with_capacity(batch.expert_ids.len() * hidden)).collect();
    let row = |assignment: &Assignment| {
        &batches[assignment.batch].hidden[assignment.row * hidden..(assignment.row + 1) * hidden]
    };
    if experts.iter().all(|(expert, assignments)| expert.by_kernels(assignments.len())) {
        by_kernels(&experts, &row, batches, &mut outputs, hidden);
    } else {
        by_libtorch(&experts, &row, batches, &mut outputs, hidden);
    }
    Ok(batches.iter().zip(outputs).map(|(batch, output)| weigh(batch, output, hidden)).collect())
}

/// All experts as one piece of work, each row from where it lies to where it belongs.
fn by_kernels<'a>(
    experts: &[(&Expert, &Vec<Assignment>)],
    row: &(dyn Fn(&Assignment) -> &'a [f32] + Sync),
    batches: &[&ExpertBatch],
    outputs: &mut [Vec<f32>],
    hidden: usize,
) {
    let Some((any, _)) = experts.first() else { return };
    let starts: Vec<*mut f32> = outputs.iter_mut().map(Vec::as_mut_ptr).collect();
    let place = |Assignment { batch, index, .. }: &Assignment| starts[*batch].wrapping_add(index * hidden);
    let places: Vec<Vec<*mut f32>> =
        experts.iter().map(|(_, assignments)| assignments.iter().map(place).collect()).collect();
    let rows: Vec<_> =
        experts.iter().map(|(_, assignments)| move |nth: usize| Rows::F32(row(&assignments[nth]))).collect();
    let networks: Vec<Network<'_>> = experts
        .iter()
        .zip(&rows)
        .zip(&places)
        .map(|(((expert, assignments), row), places)| {
            expert.network(Source { rows: assignments.len(), row }, Out::Scattered(places))
        })
        .collect();
    // SAFETY: every assignment has a row of its own in the outputs, for which there is room and which nobody else touches
    // until this returns; then all rows of all batches are written, since each has its assignments in one expert or another.
    #[allow(unsafe_code)]
    unsafe {
        swiglu(Isa::best(), any.compute().dtype, &networks);
        for (output, batch) in outputs.iter_mut().zip(batches) {
            output.set_len(batch.expert_ids.len() * hidden);
        }
    }
}

/// One copy to the device and one back, whatever the number of experts: between them a GPU is never waited for.
fn by_libtorch<'a>(
    experts: &[(&Expert, &Vec<Assignment>)],
    row: &dyn Fn(&Assignment) -> &'a [f32],
    batches: &[&ExpertBatch],
    outputs: &mut [Vec<f32>],
    hidden: usize,
) {
    let Some((any, _)) = experts.first() else { return };
    let assignments = || experts.iter().flat_map(|(_, assignments)| assignments.iter());
    let gathered: Vec<f32> = assignments().flat_map(|assignment| row(assignment).iter().copied()).collect();
    let rows = Hidden::from_rows(&gathered, hidden, any.compute());
    let mut first = 0;
    let parts: Vec<Hidden> = experts
        .iter()
        .map(|(expert, assignments)| {
            let part = expert.forward(&rows.run(first, assignments.len()));
            first += assignments.len();
            part
        })
        .collect();
    let computed = Hidden::one_after_the_other(&parts).to_rows();
    for (output, batch) in outputs.iter_mut().zip(batches) {
        output.resize(batch.expert_ids.len() * hidden, 0.0);
    }
    for (row, Assignment { batch, index, .. }) in computed.chunks_exact(hidden).zip(assignments()) {
        outputs[*batch][index * hidden..(index + 1) * hidden].copy_from_slice(row);
    }
}

/// Per row the weighted sum over its assignments, in the batch's order, where weights are given.
fn weigh(batch: &ExpertBatch, output: Vec<f32>, hidden: usize) -> Vec<f32> {
    let Some(weights) = &batch.weights else { return output };
    let mut sums = vec![0.0; batch.rows * hidden];
    for ((row, weight), values) in batch.row_ids.iter().zip(weights).zip(output.chunks_exact(hidden)) {
        let start = *row as usize * hidden;
        for (sum, value) in sums[start..start + hidden].iter_mut().zip(values) {
            *sum += weight * value;
        }
    }
    sums
}
