//! What an expert worker computes: gather rows, one SwiGLU per expert over its rows, scatter.
//!
//! In: checked batches of one layer, and the experts that are here. Out: for each batch, rows in its own order.
//! Never here: a missing expert skipped. Either every assignment is computed or the caller is told.

mod computed;
mod device;
mod grouped;
mod started;

use std::collections::BTreeMap;

use crate::{
    expert::Expert,
    gpu,
    kernels::{
        Isa, Rows, Source,
        product::Out,
        swiglu::{Network, swiglu},
    },
};

pub use computed::Computed;
use device::{Way, on_device};
pub(crate) use grouped::Slot;
pub use grouped::side_by_side;
pub use started::Started;

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

impl ExpertBatch {
    fn inconsistent(&self) -> Error {
        let (hidden, expert_ids, row_ids) = (self.hidden.len(), self.expert_ids.len(), self.row_ids.len());
        Error::Inconsistent { rows: self.rows, hidden, expert_ids, row_ids }
    }
}

/// Why nothing was computed.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A kernel of ours could not be launched.
    #[error("the GPU does not compute: {0}")]
    Gpu(String),
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
/// Returns per batch `[A, D]`, or `[n, D]` where it carries weights.
pub fn run<'a>(batches: &[&ExpertBatch], resident: &dyn Fn(u16) -> Option<&'a Expert>) -> Result<Vec<Computed>, Error> {
    Ok(start(batches, resident)?.finish())
}

/// The same, not waited for: a GPU computes them when this returns. On the processor they are computed then.
pub fn start<'a>(batches: &[&ExpertBatch], resident: &dyn Fn(u16) -> Option<&'a Expert>) -> Result<Started, Error> {
    start_by(Way::Best, batches, resident)
}

/// As [`run`], with BF16 weights without our kernels on a GPU, which are measured against this and compared with it; in products of
/// groups where experts lie side by side.
pub fn run_by_libtorch<'a>(
    batches: &[&ExpertBatch],
    resident: &dyn Fn(u16) -> Option<&'a Expert>,
) -> Result<Vec<Computed>, Error> {
    Ok(start_by(Way::Libtorch, batches, resident)?.finish())
}

fn start_by<'a>(
    way: Way,
    batches: &[&ExpertBatch],
    resident: &dyn Fn(u16) -> Option<&'a Expert>,
) -> Result<Started, Error> {
    let by_expert = plan(batches)?;
    let mut experts = Vec::with_capacity(by_expert.len());
    for (&id, assignments) in &by_expert {
        experts.push((resident(id).ok_or(Error::NotResident(id))?, assignments));
    }
    let Some((any, _)) = experts.first().copied() else {
        let rows = |batch: &ExpertBatch| vec![0.0; if batch.weights.is_some() { batch.hidden.len() } else { 0 }].into();
        return Ok(Started::finished(batches.iter().map(|batch| rows(batch)).collect()));
    };
    let hidden = any.hidden_size();
    if let Some(batch) = batches.iter().find(|batch| batch.hidden.len() != batch.rows * hidden) {
        return Err(batch.inconsistent());
    }
    let by_ours = experts.iter().all(|(expert, assignments)| expert.by_kernels(assignments.len()));
    if by_ours && way == Way::Best {
        let outputs = by_kernels(any, &experts, batches, hidden);
        let weighed = batches.iter().zip(outputs).map(|(batch, output)| match &batch.weights {
            Some(weights) => weigh(output, batch.rows, &batch.row_ids, weights, hidden),
            None => output,
        });
        return Ok(Started::finished(weighed.collect()));
    }
    Ok(Started::leaving(on_device(any, &experts, batches, hidden, way)?, batches, hidden))
}

impl From<gpu::Error> for Error {
    fn from(error: gpu::Error) -> Self {
        Self::Gpu(error.to_string())
    }
}

/// Which rows each expert gets.
fn plan(batches: &[&ExpertBatch]) -> Result<BTreeMap<u16, Vec<Assignment>>, Error> {
    let mut by_expert: BTreeMap<u16, Vec<Assignment>> = BTreeMap::new();
    for (batch, given) in batches.iter().enumerate() {
        let ExpertBatch { rows, expert_ids, row_ids, .. } = given;
        if expert_ids.len() != row_ids.len() || row_ids.iter().any(|&row| row as usize >= *rows) {
            return Err(given.inconsistent());
        }
        for (index, (&expert, &row)) in expert_ids.iter().zip(row_ids).enumerate() {
            let assignment = Assignment { batch, index, row: row as usize };
            by_expert.entry(expert).or_default().push(assignment);
        }
    }
    Ok(by_expert)
}

impl Assignment {
    /// Its row's values, of which there are `hidden`.
    fn values<'a>(&self, batches: &[&'a ExpertBatch], hidden: usize) -> &'a [f32] {
        &batches[self.batch].hidden[self.row * hidden..(self.row + 1) * hidden]
    }
}

/// All experts as one piece of work, each row from where it lies to where it belongs. `any` is one of them.
fn by_kernels(
    any: &Expert,
    experts: &[(&Expert, &Vec<Assignment>)],
    batches: &[&ExpertBatch],
    hidden: usize,
) -> Vec<Computed> {
    let mut outputs: Vec<Vec<f32>> =
        batches.iter().map(|batch| Vec::with_capacity(batch.expert_ids.len() * hidden)).collect();
    let starts: Vec<*mut f32> = outputs.iter_mut().map(Vec::as_mut_ptr).collect();
    let place = |Assignment { batch, index, .. }: &Assignment| starts[*batch].wrapping_add(index * hidden);
    let places: Vec<Vec<*mut f32>> =
        experts.iter().map(|(_, assignments)| assignments.iter().map(place).collect()).collect();
    let rows: Vec<_> = experts
        .iter()
        .map(|(_, assignments)| move |nth: usize| Rows::F32(assignments[nth].values(batches, hidden)))
        .collect();
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
    outputs.into_iter().map(Computed::from).collect()
}

/// For each of `rows` the weighted sum over its assignments, in their order.
fn weigh(computed: Computed, rows: usize, row_ids: &[u32], weights: &[f32], hidden: usize) -> Computed {
    let mut sums = vec![0.0; rows * hidden];
    for ((row, weight), values) in row_ids.iter().zip(weights).zip(computed.into_f32().chunks_exact(hidden)) {
        let start = *row as usize * hidden;
        for (sum, value) in sums[start..start + hidden].iter_mut().zip(values) {
            *sum += weight * value;
        }
    }
    sums.into()
}
