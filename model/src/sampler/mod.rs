//! From logits to a token.
//!
//! In: one row of logits, the parameters of a request, what it has so far. Out: a token id, and logprobs.
//! Never here: state between draws. Every draw comes from (seed, position), so any router can continue any stream.

mod masses;

use std::{borrow::Cow, collections::HashMap};

use crate::grammar::Mask;

/// How a request wants its tokens drawn. Ranges are checked where requests come in.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the most probable tokens that together reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this probable relative to the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides (or multiplies, where negative) logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off logits of tokens seen in the answer.
    pub presence_penalty: f32,
    /// Taken off for each time a token was seen in the answer.
    pub frequency_penalty: f32,
    /// Of the generator.
    pub seed: u64,
    /// Added to these tokens' logits.
    pub logit_bias: Vec<(u32, f32)>,
}

impl SamplingParams {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
        }
    }

    /// Whether it is the token with the greatest of the model's own logits, whatever was drawn before.
    pub fn takes_greatest(&self) -> bool {
        self.temperature == 0.0 && !self.penalises() && self.logit_bias.is_empty()
    }

    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// What a sequence has so far.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The prompt.
    pub prompt: &'a [u32],
    /// The answer so far; its length is the position that is drawn for.
    pub answer: &'a [u32],
    /// Tokens that may not be drawn here.
    pub forbidden: &'a [u32],
    /// The only tokens that may be drawn here, at least one; `None` is all. Where all of them are forbidden, they are not.
    pub allowed: Option<&'a Mask>,
}

/// Draws the next token from `logits`, `[vocab_size]`.
pub fn sample(logits: &[f32], params: &SamplingParams, context: Context<'_>) -> u32 {
    let logits = &*changed(logits, params, context);
    if params.temperature == 0.0 {
        return argmax(logits);
    }
    let masses = masses(logits, params);
    let uniform = uniform(params.seed, context.answer.len() as u64);
    let drawn = if params.top_k == 0 && params.top_p >= 1.0 {
        drawn_of_all(&masses, uniform)
    } else {
        drawn_of(&filter(&masses, params), uniform)
    };
    drawn.unwrap_or_else(|| argmax(logits))
}

/// Of each token: its probability relative to the most probable one, 0 where that is below `min_p`.
fn masses(logits: &[f32], params: &SamplingParams) -> Vec<f32> {
    let mut masses = vec![0.0; logits.len()];
    masses::of(logits, masses::greatest(logits), params.temperature, params.min_p, &mut masses);
    masses
}

/// The token at `uniform` of all mass, tokens in their order.
fn drawn_of_all(masses: &[f32], uniform: f64) -> Option<u32> {
    /// Summed up at once, so that only one such run is looked through.
    const RUN: usize = 512;
    let sums: Vec<f64> = masses.chunks(RUN).map(masses::sum).collect();
    let mut left = uniform * sums.iter().sum::<f64>();
    let mut last = None;
    for (nth, (run, sum)) in masses.chunks(RUN).zip(sums).enumerate() {
        if left >= sum {
            left -= sum;
            continue;
        }
        for (within, mass) in run.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
            last = Some((nth * RUN + within) as u32);
            left -= f64::from(*mass);
            if left < 0.0 {
                return last;
            }
        }
    }
    // Rounding may leave a crumb past the last one.
    last.or_else(|| masses.iter().rposition(|mass| *mass > 0.0).map(|token| token as u32))
}

/// The same of `candidates`, in their order.
fn drawn_of(candidates: &[(u32, f64)], uniform: f64) -> Option<u32> {
    let mut left = uniform * candidates.iter().map(|&(_, mass)| mass).sum::<f64>();
    for &(token, mass) in candidates {
        left -= mass;
        if left < 0.0 {
            return Some(token);
        }
    }
    candidates.last().map(|&(token, _)| token)
}

/// With penalties, biases and without what may not be drawn: a copy only where there is any of it.
fn changed<'a>(logits: &'a [f32], params: &SamplingParams, context: Context<'_>) -> Cow<'a, [f32]> {
    let mut logits = Cow::Borrowed(logits);
    if params.penalises() {
        penalise(logits.to_mut(), params, context);
    }
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.to_mut().get_mut(token as usize) {
            *logit += bias;
        }
    }
    if context.allowed.is_some() || !context.forbidden.is_empty() {
        restrict(logits.to_mut(), context);
    }
    logits
}

/// Takes away what may not be drawn.
fn restrict(logits: &mut [f32], context: Context<'_>) {
    let mut forbidden = context.forbidden;
    if let Some(allowed) = context.allowed {
        if allowed.is_within(forbidden) {
            forbidden = &[];
        }
        for (token, logit) in (0..).zip(logits.iter_mut()) {
            if !allowed.allows(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for &token in forbidden {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The index of the greatest value, the lowest of equals; 0 where none is a number.
pub fn argmax(values: &[f32]) -> u32 {
    let greatest = masses::greatest(values);
    // A line is looked through without a way out in its middle, which makes vectors of it.
    let has = |line: &[f32]| line.iter().fold(false, |any, value| any | (*value == greatest));
    let line = values.chunks(masses::LINE).position(has).unwrap_or(0);
    let first = line * masses::LINE;
    let within = values.get(first..).and_then(|rest| rest.iter().position(|value| *value == greatest));
    within.map_or(0, |within| first + within) as u32
}

/// Repetition (CTRL, arXiv 1909.05858, section 4.1), presence and frequency penalties.
fn penalise(logits: &mut [f32], params: &SamplingParams, context: Context<'_>) {
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = context.prompt.iter().chain(context.answer).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut counts: HashMap<u32, f32> = HashMap::new();
        for &token in context.answer {
            *counts.entry(token).or_default() += 1.0;
        }
        for (token, count) in counts {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * count;
            }
        }
    }
}

/// Top-k, then top-p: tokens with their masses, in an order that depends on the masses alone.
fn filter(masses: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let (keep, share) = (params.top_k as usize, f64::from(params.top_p));
    let total = masses::sum(masses);
    // What is below this is kept by neither, so the sorting is of few: the tail of a vocabulary is long.
    let least = match keep {
        // All tokens below together have less than what top-p leaves out.
        0 => ((1.0 - share) * total / masses.len() as f64) as f32,
        _ => below_the_kth(masses, keep),
    };
    let mut candidates: Vec<(u32, f64)> = (0u32..)
        .zip(masses)
        .filter(|&(_, &mass)| mass > 0.0 && mass >= least)
        .map(|(token, &mass)| (token, f64::from(mass)))
        .collect();
    let by_mass = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if keep > 0 && keep < candidates.len() {
        candidates.select_nth_unstable_by(keep, by_mass);
        candidates.truncate(keep);
    }
    if share < 1.0 {
        let of = if keep == 0 { total } else { candidates.iter().map(|&(_, mass)| mass).sum() };
        candidates = nucleus(candidates, share * of, by_mass);
    } else if keep > 0 {
        candidates.sort_unstable_by(by_mass);
    }
    candidates
}

/// A mass that at least `k` tokens reach: so many lines of them have one that does. 0 where there are not so many.
fn below_the_kth(masses: &[f32], k: usize) -> f32 {
    let mut lines = vec![0.0; masses.len().div_ceil(masses::LINE)];
    if k > lines.len() {
        return 0.0;
    }
    masses::greatest_of_lines(masses, &mut lines);
    *lines.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// The fewest candidates, most probable first, that together have `wanted` of the mass; all where they have less. A vocabulary's
/// nucleus is small, so only as many as are needed are sorted: a few at first, then ever more.
fn nucleus(
    mut candidates: Vec<(u32, f64)>,
    wanted: f64,
    by_mass: impl Fn(&(u32, f64), &(u32, f64)) -> std::cmp::Ordering + Copy,
) -> Vec<(u32, f64)> {
    let mut sorted = 64;
    loop {
        let all = sorted >= candidates.len();
        if all {
            candidates.sort_unstable_by(by_mass);
        } else {
            candidates.select_nth_unstable_by(sorted, by_mass);
            candidates[..sorted].sort_unstable_by(by_mass);
        }
        let mut reached = 0.0;
        let enough = candidates.iter().take(sorted).position(|&(_, mass)| {
            reached += mass;
            reached >= wanted
        });
        match enough {
            Some(last) => candidates.truncate(last + 1),
            None if all => {}
            None => {
                sorted *= 8;
                continue;
            }
        }
        return candidates;
    }
}

/// A number in [0, 1) that (seed, position) alone decide: SplitMix64's finaliser (Steele, Lea, Flood 2014) over both,
/// its top 53 bits as a fraction.
fn uniform(seed: u64, position: u64) -> f64 {
    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let key = mix(seed.wrapping_add(STEP));
    let bits = mix(key.wrapping_add(position.wrapping_add(1).wrapping_mul(STEP)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Log-probabilities as the model gave them, before penalties, temperature and filters.
#[derive(Clone, Copy, Debug)]
pub struct Logprobs<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> Logprobs<'a> {
    /// Over `logits`, `[vocab_size]`.
    pub fn new(logits: &'a [f32]) -> Self {
        let most = masses::greatest(logits);
        Self { logits, log_sum: f64::from(most) + masses::sum_of(logits, most).ln() }
    }

    /// Of one token.
    pub fn of(&self, token: u32) -> f32 {
        self.logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| (f64::from(logit) - self.log_sum) as f32)
    }

    /// The `n` most probable tokens, most probable first.
    pub fn top(&self, n: usize) -> Vec<(u32, f32)> {
        if n == 0 {
            return Vec::new();
        }
        let mut order: Vec<u32> = (0..self.logits.len() as u32).collect();
        let value = |token: &u32| self.logits[*token as usize];
        let by_logit = |a: &u32, b: &u32| value(b).total_cmp(&value(a)).then(a.cmp(b));
        if n < order.len() {
            order.select_nth_unstable_by(n, by_logit);
            order.truncate(n);
        }
        order.sort_unstable_by(by_logit);
        order.into_iter().map(|token| (token, self.of(token))).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draw(logits: &[f32], params: &SamplingParams, answer: &[u32]) -> u32 {
        sample(logits, params, Context { prompt: &[], answer, forbidden: &[], allowed: None })
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let params = SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::greedy() };
        let first: Vec<u32> = (0..20).map(|n| draw(&logits, &params, &vec![1; n])).collect();
        let second: Vec<u32> = (0..20).rev().map(|n| draw(&logits, &params, &vec![1; n])).collect();
        assert_eq!(first, second.into_iter().rev().collect::<Vec<_>>());
        let other = SamplingParams { seed: 8, ..params };
        assert_ne!(first, (0..20).map(|n| draw(&logits, &other, &vec![1; n])).collect::<Vec<_>>());
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 1.0, 2.0];
        let mut counts = [0usize; 3];
        for seed in 0..6000 {
            let params = SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() };
            counts[draw(&logits, &params, &[]) as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([0.0900, 0.2447, 0.6652]) {
            assert!((*count as f64 / 6000.0 - expected).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn penalties_bias_and_forbidden_tokens_move_the_greedy_choice() {
        let logits = [3.0f32, 2.9, 1.0];
        let greedy = SamplingParams::greedy();
        assert_eq!(draw(&logits, &greedy, &[]), 0);
        assert_eq!(draw(&logits, &SamplingParams { presence_penalty: 0.5, ..greedy.clone() }, &[0]), 1);
        assert_eq!(draw(&logits, &SamplingParams { frequency_penalty: 0.06, ..greedy.clone() }, &[0, 0]), 1);
        assert_eq!(draw(&logits, &SamplingParams { repetition_penalty: 1.5, ..greedy.clone() }, &[0]), 1);
        let context = Context { prompt: &[], answer: &[], forbidden: &[0, 1], allowed: None };
        assert_eq!(sample(&logits, &greedy, context), 2);
        assert_eq!(draw(&logits, &SamplingParams { logit_bias: vec![(2, 5.0)], ..greedy }, &[]), 2);
    }

    #[test]
    fn an_end_that_is_all_a_grammar_allows_is_drawn_even_where_it_is_forbidden() {
        let logits = [3.0f32, 2.9, 1.0];
        let mut allowed = Mask::empty(3);
        allowed.allow(2);
        let context = Context { prompt: &[], answer: &[], forbidden: &[2], allowed: Some(&allowed) };
        assert_eq!(sample(&logits, &SamplingParams::greedy(), context), 2);
        allowed.allow(1);
        let context = Context { prompt: &[], answer: &[], forbidden: &[2], allowed: Some(&allowed) };
        assert_eq!(sample(&logits, &SamplingParams::greedy(), context), 1);
    }

    proptest! {
        #[test]
        fn the_greatest_is_the_first_of_its_equals(
            values in prop::collection::vec(prop::sample::select(vec![f32::NAN, f32::NEG_INFINITY, -1.5, -0.0, 0.0, 2.0]), 1..100),
        ) {
            let numbers = values.iter().enumerate().filter(|(_, value)| !value.is_nan());
            let plain = numbers.fold(None, |best: Option<(usize, &f32)>, (index, value)| match best {
                Some((_, most)) if value <= most => best,
                _ => Some((index, value)),
            });
            prop_assert_eq!(argmax(&values) as usize, plain.map_or(0, |(index, _)| index));
        }
    }

    proptest! {
        #[test]
        fn only_allowed_tokens_are_drawn_whatever_the_filters(
            logits in prop::collection::vec(-50.0f32..50.0, 1..60),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 1..5),
            bias in -100.0f32..100.0,
            top_k in 0u32..3,
            top_p in 0.05f32..=1.0,
            min_p in 0.0f32..=1.0,
            temperature in 0.0f32..2.0,
            seed: u64,
        ) {
            let mut allowed = Mask::empty(logits.len());
            picks.iter().for_each(|pick| allowed.allow(pick.index(logits.len()) as u32));
            let logit_bias = vec![(0, bias)];
            let params =
                SamplingParams { temperature, top_p, top_k, min_p, seed, logit_bias, ..SamplingParams::greedy() };
            let context = Context { prompt: &[], answer: &[], forbidden: &[], allowed: Some(&allowed) };
            prop_assert!(allowed.allows(sample(&logits, &params, context)));
        }

        #[test]
        fn filters_keep_what_they_say(
            logits in prop::collection::vec(-5.0f32..5.0, 1..60),
            top_k in 0u32..10,
            top_p in 0.05f32..=1.0,
            min_p in 0.0f32..0.5,
            temperature in 0.1f32..2.0,
            seed: u64,
        ) {
            let params = SamplingParams { temperature, top_p, top_k, min_p, seed, ..SamplingParams::greedy() };
            let drawn = draw(&logits, &params, &[]) as usize;
            let better = logits.iter().filter(|&&logit| logit > logits[drawn]).count();
            if top_k > 0 {
                prop_assert!(better < top_k as usize);
            }
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert!(f64::from((logits[drawn] - max) / temperature).exp() >= f64::from(min_p));
            let mass = |logit: f32| f64::from((logit - max) / temperature).exp();
            let total: f64 = logits.iter().map(|&logit| mass(logit)).sum();
            let above: f64 = logits.iter().filter(|&&logit| logit > logits[drawn]).map(|&logit| mass(logit)).sum();
            prop_assert!(above / total < f64::from(top_p) + 1e-9);
        }

        #[test]
        fn logprobs_sum_to_one(logits in prop::collection::vec(-20.0f32..20.0, 1..60)) {
            let logprobs = Logprobs::new(&logits);
            let total: f64 = (0..logits.len() as u32).map(|token| f64::from(logprobs.of(token)).exp()).sum();
            prop_assert!((total - 1.0).abs() < 1e-4);
            let top = logprobs.top(3);
            prop_assert_eq!(top.len(), logits.len().min(3));
            prop_assert_eq!(top[0].0, argmax(&logits));
        }
    }
}
