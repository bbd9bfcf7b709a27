//! `down(silu(gate(x)) * up(x))` of one or several networks over one team: a layer's routed experts are computed side by
//! side, so that a token's few experts are one piece of work and not one each. In: rows per network. Out: f32 or BF16 rows.
//! Never here: which rows, whose rows, what they weigh.

use super::{
    isa::Isa,
    matrix::Matrix,
    operand::{Format, Operand, Source},
    product::{self, Job, Out, STRIP, Work, fetch_first, following, place, products, run_all},
    rowwise,
};
use crate::device::Dtype;

/// One network and the rows that go through it.
#[derive(Clone, Copy)]
pub(crate) struct Network<'a> {
    /// `[I, D]`
    pub(crate) gate: Matrix<'a>,
    /// `[I, D]`
    pub(crate) up: Matrix<'a>,
    /// `[D, I]`
    pub(crate) down: Matrix<'a>,
    /// `[n, D]`
    pub(crate) x: Source<'a>,
    /// `[n, D]`
    pub(crate) out: Out<'a>,
}

/// Computes all of `networks`. Between the two halves values are BF16 where the model computes in that, else f32.
///
/// # Safety
/// Every network's `out` has room for its rows, which nobody else touches meanwhile.
pub(crate) unsafe fn swiglu(isa: Isa, dtype: Dtype, networks: &[Network<'_>]) {
    let lay_out = |network: &Network<'_>, matrix: &Matrix<'_>| {
        Operand::gathered(Format::of(isa, dtype, matrix), network.gate.inner, network.x)
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
        .map(|(Network { down, .. }, x)| Operand::empty(Format::of(isa, dtype, down), x.rows, down.inner))
        .collect();

    let work: Vec<Work> =
        networks.iter().zip(&for_gate).map(|(network, x)| Work::of(&network.gate, x, networks.len())).collect();
    run_all(&work, &|index, strips, rows| {
        let Network { gate, up, .. } = &networks[index];
        let (x, between) = (&for_gate[index], &between[index]);
        let x_up = for_up[index].as_ref().unwrap_or(x);
        product::with_two(|one, two| {
            fetch_first(gate, &strips, x);
            fetch_first(up, &strips, x_up);
            let (x, x_up) = (x.view(rows.clone()), x_up.view(rows.clone()));
            for strip in strips.clone() {
                let (first, outs) = place(strip, gate.out);
                let gated = one.strip(isa, gate, strip, following(gate, strip, &strips), &x);
                let raised = two.strip(isa, up, strip, following(up, strip, &strips), &x_up);
                rowwise::silu_times(isa, gated, raised);
                between.put_all(rows.clone(), (first, outs), gated, STRIP);
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

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::{super::reference, *};
    use crate::kernels::{
        Rows,
        product::tests::{Stored, numbers, stored},
        team,
    };

    struct Weights {
        parts: [Stored; 3],
        hidden: usize,
        inner: usize,
    }

    impl Weights {
        fn new(seed: u64, hidden: usize, inner: usize, which: usize) -> Self {
            let part = |number: u64, out, inner| stored(&numbers(seed ^ number, out * inner), out, inner, which);
            Self { parts: [part(1, inner, hidden), part(2, inner, hidden), part(3, hidden, inner)], hidden, inner }
        }

        fn matrices(&self) -> [Matrix<'_>; 3] {
            let [gate, up, down] = &self.parts;
            let (hidden, inner) = (self.hidden, self.inner);
            [gate.matrix(inner, hidden), up.matrix(inner, hidden), down.matrix(hidden, inner)]
        }
    }

    /// The formula in f64, but for what lies between the halves, which is rounded as the model's format says.
    fn plainly(weights: &Weights, x: &[f32], dtype: Dtype) -> (Vec<f64>, Vec<f64>) {
        let [gate, up, down] = weights.matrices();
        let gated = reference::product(x, &gate);
        let between: Vec<f32> = gated
            .iter()
            .zip(reference::product(x, &up))
            .map(|(gate, up)| {
                let value = (gate / (1.0 + (-gate).exp()) * up) as f32;
                if dtype == Dtype::Bf16 { bf16::from_f32(value).to_f32() } else { value }
            })
            .collect();
        (reference::product(&between, &down), reference::magnitude(&between, &down))
    }

    fn compute(isa: Isa, dtype: Dtype, networks: &[(&Weights, &[f32])]) -> Vec<Vec<f32>> {
        let mut out: Vec<Vec<f32>> = networks.iter().map(|(_, x)| vec![f32::NAN; x.len()]).collect();
        let rows: Vec<_> = networks
            .iter()
            .map(|(weights, x)| |row: usize| Rows::F32(&x[row * weights.hidden..][..weights.hidden]))
            .collect();
        let networks: Vec<Network<'_>> = networks
            .iter()
            .zip(&rows)
            .zip(&mut out)
            .map(|(((weights, x), row), out)| {
                let [gate, up, down] = weights.matrices();
                let x = Source { rows: x.len() / weights.hidden, row };
                Network { gate, up, down, x, out: Out::F32(out.as_mut_ptr()) }
            })
            .collect();
        // SAFETY: as many values come out as went in.
        unsafe { swiglu(isa, dtype, &networks) };
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn networks_side_by_side_compute_what_the_formula_says_and_what_each_would_alone(
            seed: u64,
            hidden in 2usize..200,
            inner in 2usize..200,
            rows in prop::collection::vec(1usize..40, 1..4),
            which in 0usize..3,
            f32_model: bool,
        ) {
            team::gather(2);
            let dtype = if f32_model { Dtype::F32 } else { Dtype::Bf16 };
            let weights: Vec<Weights> =
                (0..rows.len()).map(|nth| Weights::new(seed ^ (nth as u64) << 8, hidden, inner, which)).collect();
            let x: Vec<Vec<f32>> = rows
                .iter()
                .map(|rows| numbers(!seed, rows * hidden).iter().map(|x| bf16::from_f32(*x).to_f32()).collect())
                .collect();
            for isa in Isa::available() {
                let networks: Vec<_> = weights.iter().zip(&x).map(|(weights, x)| (weights, x.as_slice())).collect();
                let together = compute(isa, dtype, &networks);
                for ((weights, x), together) in networks.iter().zip(&together) {
                    let (right, most) = plainly(weights, x, dtype);
                    // What lies between is rounded to one of two neighbours, in rare cases to the other.
                    let bound = if dtype == Dtype::Bf16 { 4e-3 } else { 4e-6 };
                    for ((ours, right), most) in together.iter().zip(right).zip(most) {
                        prop_assert!((f64::from(*ours) - right).abs() <= bound * most + 1e-6, "{isa:?}: {ours} {right}");
                    }
                    let last = &x[x.len() - hidden..];
                    let alone = compute(isa, dtype, &[(weights, last)]);
                    prop_assert_eq!(&alone[0][..], &together[together.len() - hidden..], "{:?}", isa);
                }
            }
        }
    }
}
