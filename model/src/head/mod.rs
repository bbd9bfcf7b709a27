//! From the last hidden rows to what is said of the next token. In: normed rows `[T, D]`. Out: logits of the whole
//! vocabulary, or only the greatest of each row. Never here: a draw; a greatest one that all logits would not show,
//! but for the chance that [`screen`] states.

mod kernels;
mod screen;

use std::sync::Arc;

use screen::{Screen, Seen};
use tch::Tensor;

use crate::{
    device::Device, hidden::Hidden, kernels::Isa, kernels::tensor, linear::Linear, sampler::argmax, wire::all_finite,
};

/// The head of a model, `[vocab_size, D]`.
#[derive(Debug)]
pub(crate) struct Head {
    linear: Linear,
    screen: Option<Arc<Screen>>,
}

/// The token with the greatest logit, the lowest of equals. The logit is no number where one of those that were
/// computed is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Greatest {
    /// Its id.
    pub token: u32,
    /// As [`logits`](crate::transformer::Transformer::logits) has it.
    pub logit: f32,
}

impl Greatest {
    /// Of a whole row of logits.
    pub fn of(logits: &[f32]) -> Self {
        let token = argmax(logits);
        Self { token, logit: if all_finite(logits) { logits[token as usize] } else { f32::NAN } }
    }
}

impl Head {
    /// On the processor a screen is made here, a bit more than a quarter of what the head is in BF16.
    pub(crate) fn new(linear: Linear) -> Self {
        let here = linear.compute().device == Device::Cpu;
        let screen = here.then(|| Screen::of(&linear.matrix())).flatten();
        Self { linear, screen: screen.map(Arc::new) }
    }

    /// Another hold on the same head.
    pub(crate) fn share(&self) -> Self {
        Self { linear: self.linear.share(), screen: self.screen.clone() }
    }

    /// `[T, vocab_size]`, f32.
    pub(crate) fn logits(&self, x: &Tensor) -> Vec<f32> {
        Hidden(self.linear.forward(x)).to_rows()
    }

    /// Of each row of `x`. Where there is a screen, few logits are computed, and the screen is what is read.
    pub(crate) fn greatest(&self, x: &Tensor) -> Vec<Greatest> {
        let (x, rows) = (x.contiguous(), x.size()[0]);
        let screen = self.screen.as_ref().filter(|_| Screen::suits(Isa::best(), rows as usize));
        let seen = screen.map(|screen| screen.look(&tensor::rows(&x).to_f32(Isa::best())));
        let seen = seen.unwrap_or_else(|| (0..rows).map(|_| None).collect());
        let few = |(row, seen): (i64, Option<Seen>)| self.among_few(&x.narrow(0, row, 1), &seen?);
        let mut found: Vec<Option<Greatest>> = (0..).zip(seen).map(few).collect();
        let left: Vec<u32> = (0..).zip(&found).filter_map(|(row, found)| found.is_none().then_some(row)).collect();
        if !left.is_empty() {
            let rows = if left.len() == found.len() { x } else { tensor::gathered(&x, &left) };
            let logits = self.logits(&rows);
            for (row, logits) in left.iter().zip(logits.chunks_exact(self.linear.out())) {
                found[*row as usize] = Some(Greatest::of(logits));
            }
        }
        found.into_iter().flatten().collect()
    }

    /// Of one row, of which that has been seen; `None` where all its logits are to be computed.
    fn among_few(&self, x: &Tensor, seen: &Seen) -> Option<Greatest> {
        let among = |tokens: &[u32]| {
            let Greatest { token, logit } = Greatest::of(&self.linear.some_outputs(x, tokens));
            Greatest { token: tokens[token as usize], logit }
        };
        let likeliest = among(&[seen.likeliest]);
        let candidates = seen.not_below(likeliest.logit)?;
        candidates.contains(&likeliest.token).then(|| among(&candidates))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::Kind;

    use super::*;
    use crate::{
        checkpoint::{Stored, Weight},
        device::{Compute, Dtype, Numerics, init_thread},
    };

    fn head(weight: &Tensor, dtype: Dtype) -> Head {
        let compute = Compute { device: Device::Cpu, dtype, numerics: Numerics::Reproducible };
        Head::new(Linear::new(Stored::Plain(Weight::owned(weight.shallow_clone())), None, compute))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn the_greatest_is_the_one_that_all_logits_show(
            seed: i64,
            vocab in 1i64..1500,
            inner in 1i64..300,
            rows in 1i64..6,
            spread in 0u32..4,
            bf16: bool,
        ) {
            init_thread(2);
            tch::manual_seed(seed);
            let (kind, dtype) = if bf16 { (Kind::BFloat16, Dtype::Bf16) } else { (Kind::Float, Dtype::F32) };
            let draw = |rows: i64| Tensor::randn([rows, inner], (Kind::Float, tch::Device::Cpu));
            let (weight, x) = match spread {
                // As they are drawn; some far larger; many alike to the bit; all next to nothing.
                0 => (draw(vocab), draw(rows)),
                1 => (draw(vocab) * draw(vocab).exp(), draw(rows) * (draw(rows) * 3.0).exp()),
                2 => (draw(3).repeat([vocab / 3 + 1, 1]).narrow(0, 0, vocab), draw(rows)),
                _ => (draw(vocab) * 1e-30, draw(rows) * 1e-6),
            };
            let (head, x) = (head(&weight.to_kind(Kind::BFloat16), dtype), x.to_kind(kind));
            prop_assert!(head.screen.is_some());
            let right: Vec<Greatest> = head.logits(&x).chunks_exact(vocab as usize).map(Greatest::of).collect();
            prop_assert_eq!(head.greatest(&x), right);
        }
    }

    #[test]
    fn few_logits_are_computed_of_a_large_vocabulary() {
        init_thread(2);
        tch::manual_seed(1);
        let draw = |rows: i64| Tensor::randn([rows, 512], (Kind::Float, tch::Device::Cpu));
        let head = head(&draw(20_000).to_kind(Kind::BFloat16), Dtype::Bf16);
        let x = draw(3).to_kind(Kind::BFloat16);
        let values = tensor::rows(&x).to_f32(Isa::best());
        let screen = head.screen.as_ref().expect("numbers have a screen");
        for (row, seen) in (0..).zip(screen.look(&values)) {
            let seen = seen.expect("rows are numbers");
            let logits = head.logits(&x.narrow(0, row, 1));
            let candidates = seen.not_below(logits[seen.likeliest as usize]).expect("they are few");
            assert!(candidates.len() < 1_000 && candidates.contains(&seen.likeliest), "{candidates:?}");
        }
    }

    #[test]
    fn what_is_no_number_is_told() {
        init_thread(1);
        let ones = Tensor::ones([40, 64], (Kind::BFloat16, tch::Device::Cpu));
        let x = ones.narrow(0, 0, 1).copy();
        assert_eq!(head(&ones, Dtype::Bf16).greatest(&x), [Greatest { token: 0, logit: 64.0 }]);
        let _ = x.get(0).get(5).fill_(f64::INFINITY);
        assert!(head(&ones, Dtype::Bf16).greatest(&x)[0].logit.is_nan());
        let _ = ones.get(7).get(3).fill_(f64::NAN);
        let spoilt = head(&ones, Dtype::Bf16);
        assert!(spoilt.screen.is_none() && spoilt.greatest(&ones.narrow(0, 0, 1))[0].logit.is_nan());
    }
}
