//! The gate: which experts a row goes to, and with what weight.
//!
//! In: rows `[T, D]`. Out: a [`Routing`]. Never here: where an expert lives.
//!
//! Sources: DeepSeek-V2, arXiv 2405.04434, section 2.2 (softmax, group-limited greedy); DeepSeek-V3, arXiv 2412.19437,
//! section 2.1.2 (sigmoid with a bias for selection only). Scores are f32 in every format of the model.

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{self, Checkpoint},
    config::{GateKind, ModelConfig},
    device::Compute,
    kernels::{Isa, tensor},
    linear::Linear,
    transfer::fetched,
};

/// What the gate chose for T rows, K experts each.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// K.
    pub experts_per_row: usize,
    /// `[T, K]`, best first: the gate order that combine sums in.
    pub expert_ids: Vec<u16>,
    /// `[T, K]`.
    pub weights: Vec<f32>,
}

impl Routing {
    /// T.
    pub fn rows(&self) -> usize {
        self.expert_ids.len() / self.experts_per_row.max(1)
    }
}

/// One layer's gate.
#[derive(Debug)]
pub struct Gate {
    proj: Linear,
    rule: Rule,
}

/// How scores become a choice; everything but the products.
#[derive(Clone, Debug)]
pub struct Rule {
    kind: GateKind,
    top_k: usize,
    groups: usize,
    top_groups: usize,
    normalise: bool,
    scale: f32,
    /// Added to scores for the choice only; empty where the gate has none.
    bias: Vec<f32>,
}

impl Gate {
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        config: &ModelConfig,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let name = format!("model.layers.{layer}.mlp.gate");
        let experts = config.n_routed_experts;
        let compute = Compute { dtype: crate::device::Dtype::F32, ..compute };
        let proj = Linear::load(checkpoint, &name, [experts, config.hidden_size], false, compute)?;
        let bias = match config.gate {
            GateKind::SigmoidNoauxTc => {
                floats(&*checkpoint.load(&format!("{name}.e_score_correction_bias"), &[experts])?)
            }
            GateKind::SoftmaxGreedy | GateKind::SoftmaxGroupLimitedGreedy => Vec::new(),
        };
        Ok(Self { proj, rule: Rule::new(config, bias) })
    }

    /// Chooses for rows `[T, D]`, which come along as f32: experts are elsewhere, and a GPU is waited for once.
    pub(crate) fn route(&self, x: &Tensor) -> (Routing, Vec<f32>) {
        let logits = self.proj.forward(&wide(x)); // [T, E]
        let experts = logits.size()[1] as usize;
        let [logits, rows] = fetched([logits.contiguous(), x.contiguous()]);
        let mut routing = Routing { experts_per_row: self.rule.top_k, expert_ids: Vec::new(), weights: Vec::new() };
        for row in tensor::f32s(&logits).chunks_exact(experts) {
            for (expert, weight) in self.rule.choose(row) {
                routing.expert_ids.push(expert);
                routing.weights.push(weight);
            }
        }
        (routing, tensor::rows(&rows).to_f32(Isa::best()))
    }
}

/// As f32.
fn wide(x: &Tensor) -> Tensor {
    if x.device() != Device::Cpu {
        return x.to_kind(Kind::Float);
    }
    // libtorch's own conversion would wake its threads.
    Tensor::from_slice(&tensor::rows(&x.contiguous()).to_f32(Isa::best())).view(x.size().as_slice())
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_kind(Kind::Float).to_device(tch::Device::Cpu).contiguous();
    let mut values = vec![0.0; tensor.numel()];
    tensor.copy_data(&mut values, tensor.numel());
    values
}

impl Rule {
    /// That of `config`, with `bias` per expert or none.
    pub fn new(config: &ModelConfig, bias: Vec<f32>) -> Self {
        Self {
            kind: config.gate,
            top_k: config.num_experts_per_tok,
            groups: config.n_group,
            top_groups: config.topk_group,
            // transformers ignores norm_topk_prob under softmax; V2's published checkpoints all say false.
            normalise: config.norm_topk_prob && config.gate == GateKind::SigmoidNoauxTc,
            scale: config.routed_scaling_factor as f32,
            bias,
        }
    }

    /// From logits `[E]` of one row to its K experts, best first, with their weights.
    pub fn choose(&self, logits: &[f32]) -> Vec<(u16, f32)> {
        let scores = match self.kind {
            GateKind::SigmoidNoauxTc => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
            GateKind::SoftmaxGreedy | GateKind::SoftmaxGroupLimitedGreedy => softmax(logits),
        };
        let mut selection = scores.clone();
        for (selection, bias) in selection.iter_mut().zip(&self.bias) {
            *selection += bias;
        }
        if self.kind != GateKind::SoftmaxGreedy && self.groups > 1 {
            self.mask_groups(&mut selection);
        }
        let chosen = top(&selection, self.top_k);
        let sum: f32 = chosen.iter().map(|&expert| scores[expert]).sum();
        let norm = if self.normalise { sum + 1e-20 } else { 1.0 };
        chosen.into_iter().map(|expert| (expert as u16, scores[expert] / norm * self.scale)).collect()
    }

    /// Leaves the best groups; the others become minus infinity, so that none of them is chosen whatever the bias does.
    fn mask_groups(&self, selection: &mut [f32]) {
        let size = selection.len() / self.groups;
        let group_score = |group: &[f32]| match self.kind {
            // The sum of its two best.
            GateKind::SigmoidNoauxTc => top(group, 2).into_iter().map(|expert| group[expert]).sum(),
            GateKind::SoftmaxGreedy | GateKind::SoftmaxGroupLimitedGreedy => {
                group.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            }
        };
        let group_scores: Vec<f32> = selection.chunks_exact(size).map(group_score).collect();
        let kept = top(&group_scores, self.top_groups);
        for (group, scores) in selection.chunks_exact_mut(size).enumerate() {
            if !kept.contains(&group) {
                scores.fill(f32::NEG_INFINITY);
            }
        }
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f32 = exps.iter().sum();
    exps.into_iter().map(|exp| exp / sum).collect()
}

/// Indices of the `k` greatest, greatest first; of equals the lower index first.
fn top(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let by_value = |a: &usize, b: &usize| values[*b].total_cmp(&values[*a]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, by_value);
        order.truncate(k);
    }
    order.sort_unstable_by(by_value);
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(kind: GateKind, groups: usize, top_groups: usize, top_k: usize, bias: Vec<f32>) -> Rule {
        Rule { kind, top_k, groups, top_groups, normalise: kind == GateKind::SigmoidNoauxTc, scale: 2.5, bias }
    }

    #[test]
    fn masked_groups_are_never_chosen_even_when_the_bias_makes_kept_scores_negative() {
        // Group 0 wins by its two best; with a mask of 0.0 instead of -inf experts of group 1 would be picked.
        let bias = vec![-0.2, -0.2, -3.0, -3.0, -0.9, -0.9, -0.9, -0.9];
        let chosen = rule(GateKind::SigmoidNoauxTc, 2, 1, 3, bias).choose(&[1.0, 0.9, 0.8, 0.7, 0.0, 0.0, 0.0, 0.0]);
        let mut ids: Vec<u16> = chosen.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2]);
    }

    #[test]
    fn the_bias_moves_the_choice_and_not_the_weights() {
        let logits = [2.0, 1.0, 0.0, -1.0];
        let plain = rule(GateKind::SigmoidNoauxTc, 1, 1, 2, vec![0.0; 4]).choose(&logits);
        let biased = rule(GateKind::SigmoidNoauxTc, 1, 1, 2, vec![0.0, 0.0, 0.0, 5.0]).choose(&logits);
        assert_eq!(plain.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(biased.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [3, 0]);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let sum = sigmoid(2.0) + sigmoid(-1.0);
        assert!((biased[0].1 - sigmoid(-1.0) / sum * 2.5).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn k_distinct_experts_of_the_kept_groups_best_first(
            logits in prop::collection::vec(-4.0f32..4.0, 24),
            bias in prop::collection::vec(-1.0f32..1.0, 24),
            groups in prop::sample::select(vec![1usize, 2, 4, 8]),
            top_k in 1usize..4,
        ) {
            let top_groups = groups.div_ceil(2);
            let rule = rule(GateKind::SigmoidNoauxTc, groups, top_groups, top_k, bias);
            let chosen = rule.choose(&logits);
            prop_assert_eq!(chosen.len(), top_k);
            let mut ids: Vec<u16> = chosen.iter().map(|(id, _)| *id).collect();
            let used: std::collections::BTreeSet<usize> = ids.iter().map(|id| *id as usize / (24 / groups)).collect();
            prop_assert!(used.len() <= top_groups);
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), top_k);
            let total: f32 = chosen.iter().map(|(_, weight)| weight).sum();
            prop_assert!((total - 2.5).abs() < 1e-4);
        }
    }
}
