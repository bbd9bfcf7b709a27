//! Which gate a model has. In: `scoring_func`, `topk_method` and the group sizes. Out: a `GateKind`, or an error for a
//! pair that no model of these families has. Never here: the gate's mathematics.

use super::{Error, Family, Fields, ModelConfig};

/// How a token's experts are chosen and weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateKind {
    /// Top-k of the softmax (V2-Lite).
    SoftmaxGreedy,
    /// Top-k of the softmax within the groups whose best expert is best (V2).
    SoftmaxGroupLimitedGreedy,
    /// Top-k of sigmoid plus bias within the groups whose two best experts are best; weights without the bias (V3, K2).
    SigmoidNoauxTc,
}

/// `transformers` 5 leaves `scoring_func` out of both families and `topk_method` out of V3: the family decides then.
pub(super) fn parse(fields: &Fields<'_>, family: Family) -> Result<GateKind, Error> {
    let (scoring_otherwise, method_otherwise) = match family {
        Family::DeepseekV2 => ("softmax", "greedy"),
        Family::DeepseekV3 | Family::KimiK2 => ("sigmoid", "noaux_tc"),
    };
    let scoring = fields.string("scoring_func")?.unwrap_or(scoring_otherwise);
    let method = fields.string("topk_method")?.unwrap_or(method_otherwise);
    match (scoring, method) {
        ("softmax", "greedy") => Ok(GateKind::SoftmaxGreedy),
        ("softmax", "group_limited_greedy") => Ok(GateKind::SoftmaxGroupLimitedGreedy),
        ("sigmoid", "noaux_tc") => Ok(GateKind::SigmoidNoauxTc),
        ("softmax" | "sigmoid", method) => {
            let supported = "greedy or group_limited_greedy with softmax, noaux_tc with sigmoid";
            Err(fields.unsupported("topk_method", method, supported))
        }
        (scoring, _) => Err(fields.unsupported("scoring_func", scoring, "softmax, sigmoid")),
    }
}

/// The groups must divide the experts, and the groups kept must hold enough of them.
pub(super) fn check_groups(fields: &Fields<'_>, config: &ModelConfig) -> Result<(), Error> {
    let ModelConfig { n_group, topk_group, n_routed_experts, num_experts_per_tok, .. } = *config;
    if config.gate == GateKind::SoftmaxGreedy {
        return Ok(());
    }
    if !n_routed_experts.is_multiple_of(n_group) {
        return Err(fields.out_of_range(
            "n_group",
            n_group,
            &format!("a divisor of n_routed_experts = {n_routed_experts}"),
        ));
    }
    if topk_group > n_group {
        return Err(fields.out_of_range("topk_group", topk_group, &format!("1 to n_group = {n_group}")));
    }
    let in_group = n_routed_experts / n_group;
    if config.gate == GateKind::SigmoidNoauxTc && n_group > 1 && in_group < 2 {
        let allowed =
            format!("at most n_routed_experts / 2 = {}: a group is scored by its best two", n_routed_experts / 2);
        return Err(fields.out_of_range("n_group", n_group, &allowed));
    }
    let reachable = topk_group * in_group;
    if num_experts_per_tok > reachable {
        let allowed = format!("1 to {reachable}, the experts of topk_group = {topk_group} groups");
        return Err(fields.out_of_range("num_experts_per_tok", num_experts_per_tok, &allowed));
    }
    Ok(())
}
