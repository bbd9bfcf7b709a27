//! The policy: who takes part in a step, with how many tokens. Pure.
//!
//! In: what each sequence still has to compute. Out: grants that keep the limits.
//! Never here: time, randomness, anything that remembers.

/// What one step may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of all sequences together; at least one.
    pub tokens: usize,
    /// Sequences; at least one.
    pub sequences: usize,
}

/// A sequence that could take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its place in the engine's list.
    pub index: usize,
    /// Tokens whose rows are not computed yet; at least one.
    pub pending: usize,
    /// Whether it has drawn a token already, in this process.
    pub decoding: bool,
    /// Higher first.
    pub priority: i32,
}

/// A sequence that takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its place in the engine's list.
    pub index: usize,
    /// Of its pending tokens, the first so many.
    pub tokens: usize,
}

/// Decodes first, then prefill in chunks; within each, by priority and then in the order given. What is decoding keeps
/// its place until it is finished, so nobody who started is overtaken for ever.
pub fn choose(candidates: &[Candidate], limits: Limits) -> Vec<Grant> {
    let mut order: Vec<&Candidate> = candidates.iter().collect();
    order.sort_by_key(|candidate| (!candidate.decoding, std::cmp::Reverse(candidate.priority)));
    let mut left = limits.tokens.max(1);
    let mut grants = Vec::new();
    for candidate in order.into_iter().take(limits.sequences.max(1)) {
        let tokens = candidate.pending.min(left);
        if tokens == 0 {
            break;
        }
        left -= tokens;
        grants.push(Grant { index: candidate.index, tokens });
    }
    grants
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (1usize..200, any::<bool>(), -2i32..3);
        prop::collection::vec(one, 0..20).prop_map(|list| {
            let candidate = |(index, (pending, decoding, priority))| {
                let pending = if decoding { 1 } else { pending };
                Candidate { index, pending, decoding, priority }
            };
            list.into_iter().enumerate().map(candidate).collect()
        })
    }

    proptest! {
        #[test]
        fn a_step_keeps_its_limits_and_always_moves(
            candidates in candidates(), tokens in 1usize..300, sequences in 1usize..10,
        ) {
            let grants = choose(&candidates, Limits { tokens, sequences });
            prop_assert!(grants.iter().map(|grant| grant.tokens).sum::<usize>() <= tokens);
            prop_assert!(grants.len() <= sequences);
            prop_assert_eq!(grants.is_empty(), candidates.is_empty());
            for grant in &grants {
                prop_assert!(grant.tokens >= 1 && grant.tokens <= candidates[grant.index].pending);
            }
        }

        #[test]
        fn everybody_finishes_whatever_their_order(mut candidates in candidates(), tokens in 1usize..100) {
            // Each sequence here draws two tokens after its prefill.
            let mut drawn = vec![0; candidates.len()];
            let work: usize = candidates.iter().map(|candidate| candidate.pending + 2).sum();
            for _ in 0..=work {
                let grants = choose(&candidates, Limits { tokens, sequences: 4 });
                if grants.is_empty() {
                    break;
                }
                for grant in grants {
                    let Some(candidate) = candidates.iter_mut().find(|c| c.index == grant.index) else { continue };
                    candidate.pending -= grant.tokens;
                    if candidate.pending == 0 {
                        drawn[candidate.index] += 1;
                        (candidate.decoding, candidate.pending) = (true, 1);
                    }
                }
                candidates.retain(|candidate| drawn[candidate.index] < 2);
            }
            prop_assert!(candidates.is_empty());
        }
    }
}
