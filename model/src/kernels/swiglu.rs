//! `down(silu(gate(x)) * up(x))` of one or several networks over one team: a layer's routed experts are computed side by
//! side, so that a token's few experts are one piece of work and not one each. In: rows per network. Out: f32 or BF16 rows.
//! Never here: which rows, whose rows, what they weigh.

use super::{
    isa::Isa,
    matrix::Matrix,
    operand::{Format, Operand, Rows},
    product::{self, Job, Out, STRIP, Work, following, place, products, run_all},
    rowwise,
};
use crate::device::Dtype;

/// One network and the rows that go through it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network<'a> {
    /// `[I, D]`
    pub(crate) gate: Matrix<'a>,
    /// `[I, D]`
    pub(crate) up: Matrix<'a>,
    /// `[D, I]`
    pub(crate) down: Matrix<'a>,
    /// `[n, D]`
    pub(crate) x: Rows<'a>,
    /// `[n, D]`
    pub(crate) out: Out,
}

/// Computes all of `networks`. Between the two halves values are BF16 where the model computes in that, else f32.
///
/// # Safety
/// Every network's `out` has room for its rows, which nobody else touches meanwhile.
pub(crate) unsafe fn swiglu(isa: Isa, dtype: Dtype, networks: &[Network<'_>]) {
    let lay_out = |network: &Network<'_>, matrix: &Matrix<'_>| {
        Operand::of(Format::of(isa, dtype, matrix), network.x, network.gate.inner)
    };
    let for_gate: Vec<Operand> = networks.iter().map(|network| lay_out(network, &network.gate)).collect();
    // Both are stored alike, as a rule.
    let for_up: Vec<Option<Operand>> = networks
        .iter()
        .zip(&for_gate)
        .map(|(network, x)| {
            let same = Format::of(isa, dtype, &network.up) == x.format;
            if same { None } else { Some(lay_out(network, &network.up)) }
        })
        .collect();
    let between: Vec<Operand> = networks
        .iter()
        .zip(&for_gate)
        .map(|(Network { down, .. }, x)| Operand::zeros(Format::of(isa, dtype, down), x.rows, down.inner))
        .collect();

    let work: Vec<Work> =
        networks.iter().zip(&for_gate).map(|(network, x)| Work::of(&network.gate, x.rows, networks.len())).collect();
    run_all(&work, &|index, strips| {
        let Network { gate, up, .. } = &networks[index];
        let (x, between) = (&for_gate[index], &between[index]);
        let x_up = for_up[index].as_ref().unwrap_or(x);
        product::with_two(|one, two| {
            for strip in strips.clone() {
                let (first, outs) = place(strip, gate.out);
                let gated = one.strip(isa, gate, strip, following(gate, strip, &strips), x);
                let raised = two.strip(isa, up, strip, following(up, strip, &strips), x_up);
                rowwise::silu_times(isa, gated, raised);
                for row in 0..x.rows {
                    between.put(row, first, &gated[row * STRIP..][..outs]);
                }
            }
        });
    });

    let jobs: Vec<Job<'_>> = networks
        .iter()
        .zip(&between)
        .map(|(Network { down, out, .. }, x)| Job {
            x,
            matrix: *down,
            bias: None,
            out: *out,
            stride: down.out,
            offset: 0,
        })
        .collect();
    // SAFETY: the caller's.
    unsafe { products(isa, &jobs) };
}
