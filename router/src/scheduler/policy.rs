//! The policy: who takes part in a step, with how many tokens, and who must give up its blocks for it. Pure.
//!
//! In: what each sequence has and still needs. Out: a [`Step`] that keeps the limits.
//! Never here: a clock, randomness, anything that remembers.
//!
//! Sequences are ordered by when they are due: their arrival, less a second for each point of priority. So who came
//! first goes first within a priority, a higher one overtakes, and nobody is overtaken for ever.

use conclave_model::cache::BLOCK_TOKENS;

use super::blocks::blocks_for;

/// What one step may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of all sequences together; at least one.
    pub tokens: usize,
    /// Sequences that hold blocks, and sequences of a step; at least one.
    pub sequences: usize,
}

/// A sequence that is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its place in the engine's list.
    pub index: usize,
    /// When it is due; the order among all. Lower goes first, and gives up its blocks last.
    pub due: i64,
    /// Whether it may take part now; one whose reader is behind may not.
    pub ready: bool,
    /// Tokens whose rows are computed, prefix hits included.
    pub computed: usize,
    /// Tokens it has; more than are computed.
    pub tokens: usize,
    /// Where its blocks stand.
    pub standing: Standing,
}

/// What a sequence has of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It holds blocks.
    Running {
        /// So many.
        held: usize,
        /// Of them, those that would be free without it.
        own: usize,
        /// Whether it has drawn a token since it began.
        decoding: bool,
    },
    /// It holds none. `computed` is what the prefix cache has of it.
    Waiting {
        /// Blocks of that which nobody holds, so that taking them leaves fewer free.
        unheld: usize,
    },
}

/// A sequence that takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its place in the engine's list.
    pub index: usize,
    /// Of its tokens that are not computed, the first so many.
    pub tokens: usize,
}

/// One step's work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Who takes part: decodes first, then the others, each in the order they are due.
    pub grants: Vec<Grant>,
    /// Who gives up its blocks before that, to be computed again later.
    pub preempted: Vec<usize>,
}

/// Plans a step: the running first, the rest of the budget for those who wait. `free` blocks are held by nobody.
pub fn choose(candidates: &[Candidate], limits: Limits, free: usize) -> Step {
    let mut order: Vec<&Candidate> = candidates.iter().collect();
    order.sort_by_key(|candidate| (candidate.due, candidate.index));
    let mut running: Vec<&Candidate> = order.iter().copied().filter(|candidate| candidate.is_running()).collect();
    // Who cannot use its blocks now is the first to give them up.
    running.sort_by_key(|candidate| !candidate.ready);
    let mut left = Left { tokens: limits.tokens.max(1), free };
    let mut step = Step::default();
    let mut granted = grant_running(&running, limits.sequences.max(1), &mut left, &mut step.preempted);
    if step.preempted.is_empty() {
        let waiting = order.into_iter().filter(|candidate| !candidate.is_running());
        let places = limits.sequences.max(1).saturating_sub(running.len());
        admit(waiting, places, running.len(), &mut left, &mut granted);
    }
    granted.sort_by_key(|(candidate, _)| !candidate.is_decoding());
    step.grants = granted.into_iter().map(|(candidate, tokens)| Grant { index: candidate.index, tokens }).collect();
    step
}

/// What is not given out yet.
struct Left {
    tokens: usize,
    free: usize,
}

/// Those who hold blocks. Tokens go to decodes first, then to prefills; blocks go to who is due first, and where too few
/// are free, whoever is due last gives up its own.
fn grant_running<'a>(
    running: &[&'a Candidate],
    most: usize,
    left: &mut Left,
    preempted: &mut Vec<usize>,
) -> Vec<(&'a Candidate, usize)> {
    let mut wanted: Vec<usize> = vec![0; running.len()];
    let mut places = most;
    for decoding in [true, false] {
        for (place, candidate) in running.iter().enumerate() {
            if candidate.ready && candidate.is_decoding() == decoding && places > 0 {
                wanted[place] = candidate.pending().min(left.tokens);
                left.tokens -= wanted[place];
                places -= usize::from(wanted[place] > 0);
            }
        }
    }
    let mut last = running.len();
    let mut granted = Vec::new();
    for place in 0..running.len() {
        if place >= last {
            break;
        }
        let candidate = running[place];
        let need = |tokens| blocks_for(candidate.computed + tokens).saturating_sub(candidate.held());
        while need(wanted[place]) > left.free && last > place + 1 {
            last -= 1;
            preempted.push(running[last].index);
            left.free += running[last].own();
            left.tokens += std::mem::take(&mut wanted[last]);
        }
        if need(wanted[place]) > left.free {
            // Nobody is left to take from: as far as the blocks reach, perhaps not at all.
            let room = (candidate.held() + left.free) * BLOCK_TOKENS;
            let fits = room.saturating_sub(candidate.computed).min(wanted[place]);
            left.tokens += wanted[place] - fits;
            wanted[place] = fits;
        }
        if wanted[place] > 0 {
            left.free -= need(wanted[place]);
            granted.push((candidate, wanted[place]));
        }
    }
    granted
}

/// Those who wait, strictly in order: each only if all it has fits, with a block to grow for everyone who runs.
fn admit<'a>(
    waiting: impl Iterator<Item = &'a Candidate>,
    places: usize,
    running: usize,
    left: &mut Left,
    granted: &mut Vec<(&'a Candidate, usize)>,
) {
    let mut runs = running;
    for candidate in waiting.filter(|candidate| candidate.ready).take(places) {
        let Standing::Waiting { unheld } = candidate.standing else { continue };
        let found = candidate.computed.div_ceil(BLOCK_TOKENS);
        let need = |tokens: usize| blocks_for(tokens) - found + unheld;
        if left.tokens == 0 || need(candidate.tokens) + runs > left.free {
            return;
        }
        let tokens = candidate.pending().min(left.tokens);
        left.tokens -= tokens;
        // What it needs later is kept for it in this step only; later steps see it among the running.
        left.free -= need(candidate.tokens);
        runs += 1;
        granted.push((candidate, tokens));
    }
}

impl Candidate {
    fn pending(&self) -> usize {
        self.tokens - self.computed
    }

    fn is_running(&self) -> bool {
        matches!(self.standing, Standing::Running { .. })
    }

    fn is_decoding(&self) -> bool {
        matches!(self.standing, Standing::Running { decoding: true, .. })
    }

    fn held(&self) -> usize {
        match self.standing {
            Standing::Running { held, .. } => held,
            Standing::Waiting { .. } => 0,
        }
    }

    fn own(&self) -> usize {
        match self.standing {
            Standing::Running { own, .. } => own,
            Standing::Waiting { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sequence of a simulated engine: nothing is shared, nothing cached.
    #[derive(Clone, Debug)]
    struct Simulated {
        arrives: usize,
        due: i64,
        tokens: usize,
        ends_at: usize,
        computed: usize,
        held: usize,
        decoding: bool,
        first_step: Option<usize>,
    }

    impl Simulated {
        fn candidate(&self, index: usize) -> Candidate {
            let (computed, tokens, due) = (self.computed, self.tokens, self.due);
            let standing = if self.held > 0 {
                Standing::Running { held: self.held, own: self.held, decoding: self.decoding }
            } else {
                Standing::Waiting { unheld: 0 }
            };
            Candidate { index, due, ready: true, computed, tokens, standing }
        }

        fn is_finished(&self) -> bool {
            self.tokens >= self.ends_at
        }
    }

    const BLOCKS: usize = 12;

    /// Prompts and answers of all sizes up to the whole cache, arriving over time with priorities.
    fn arrivals() -> impl Strategy<Value = Vec<Simulated>> {
        let one = (0usize..60, 1usize..700, 1usize..60, -2i64..3).prop_map(|(arrives, prompt, answer, priority)| {
            let due = arrives as i64 * 1_000 - priority * 10_000;
            let ends_at = (prompt + answer).min(BLOCKS * BLOCK_TOKENS);
            Simulated { arrives, due, tokens: prompt, ends_at, computed: 0, held: 0, decoding: false, first_step: None }
        });
        prop::collection::vec(one, 1..14)
    }

    /// Checks one step against the limits and carries it out. The number of tokens computed.
    fn carry_out(step: &Step, now: usize, limits: Limits, all: &mut [Simulated]) -> Result<usize, TestCaseError> {
        for &index in &step.preempted {
            let sequence = &mut all[index];
            prop_assert!(sequence.held > 0);
            (sequence.held, sequence.computed, sequence.decoding) = (0, 0, false);
        }
        prop_assert!(step.grants.iter().map(|grant| grant.tokens).sum::<usize>() <= limits.tokens);
        prop_assert!(step.grants.len() <= limits.sequences);
        for grant in &step.grants {
            let sequence = &mut all[grant.index];
            prop_assert!(grant.tokens >= 1 && sequence.computed + grant.tokens <= sequence.tokens);
            sequence.first_step.get_or_insert(now);
            sequence.computed += grant.tokens;
            sequence.held = blocks_for(sequence.computed).max(sequence.held);
            if sequence.computed == sequence.tokens {
                sequence.tokens += 1;
                sequence.decoding = true;
            }
        }
        let held: usize = all.iter().map(|sequence| sequence.held).sum();
        prop_assert!(held <= BLOCKS, "{held} blocks of {BLOCKS} are held");
        prop_assert!(all.iter().filter(|sequence| sequence.held > 0).count() <= limits.sequences);
        Ok(step.grants.iter().map(|grant| grant.tokens).sum())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn limits_hold_and_everybody_finishes_in_order(
            mut all in arrivals(), tokens in 1usize..300, sequences in 1usize..6,
        ) {
            let limits = Limits { tokens, sequences };
            let mut now = 0;
            while all.iter().any(|sequence| !sequence.is_finished()) {
                prop_assert!(now < 100_000, "somebody starves: {all:?}");
                let here = |sequence: &Simulated| sequence.arrives <= now && !sequence.is_finished();
                let candidates: Vec<Candidate> =
                    all.iter().enumerate().filter(|(_, s)| here(s)).map(|(index, s)| s.candidate(index)).collect();
                let held: usize = all.iter().map(|sequence| sequence.held).sum();
                let step = choose(&candidates, limits, BLOCKS - held);
                prop_assert!(candidates.is_empty() || !step.grants.is_empty(), "a step without anybody");
                carry_out(&step, now, limits, &mut all)?;
                all.iter_mut().filter(|sequence| sequence.is_finished()).for_each(|sequence| sequence.held = 0);
                now += 1;
            }
            // Who was there at the same time started in the order they were due.
            for a in &all {
                for b in &all {
                    let (Some(first), Some(second)) = (a.first_step, b.first_step) else { continue };
                    if a.due < b.due && a.arrives <= second {
                        prop_assert!(first <= second, "{a:?} was due before {b:?} and began later");
                    }
                }
            }
        }
    }

    fn running(index: usize, computed: usize, decoding: bool) -> Candidate {
        let held = blocks_for(computed);
        let standing = Standing::Running { held, own: held, decoding };
        Candidate { index, due: index as i64, ready: true, computed, tokens: computed + 1, standing }
    }

    #[test]
    fn decodes_come_before_prefills_and_prefills_take_what_is_left() {
        let prefill = Candidate { tokens: 900, ..running(0, 64, false) };
        let step = choose(&[prefill, running(1, 70, true)], Limits { tokens: 100, sequences: 8 }, 20);
        assert_eq!(step.grants, [Grant { index: 1, tokens: 1 }, Grant { index: 0, tokens: 99 }]);
    }

    #[test]
    fn the_youngest_gives_up_its_blocks_and_the_oldest_goes_on() {
        let all = [running(0, 128, true), running(1, 64, true), running(2, 100, true)];
        let step = choose(&all, Limits { tokens: 100, sequences: 8 }, 0);
        assert_eq!(step.preempted, [2]);
        assert_eq!(step.grants, [Grant { index: 0, tokens: 1 }, Grant { index: 1, tokens: 1 }]);
    }

    #[test]
    fn who_cannot_take_part_gives_up_its_blocks_first() {
        let behind = Candidate { ready: false, ..running(0, 64, true) };
        let step = choose(&[behind, running(1, 64, true)], Limits { tokens: 100, sequences: 8 }, 0);
        assert_eq!((step.preempted, step.grants), (vec![0], vec![Grant { index: 1, tokens: 1 }]));
    }

    #[test]
    fn a_prompt_found_in_the_cache_counts_only_what_is_missing() {
        let standing = Standing::Waiting { unheld: 2 };
        let waiting = Candidate { index: 0, due: 0, ready: true, computed: 128, tokens: 130, standing };
        let limits = Limits { tokens: 100, sequences: 8 };
        assert_eq!(choose(&[waiting], limits, 3).grants, [Grant { index: 0, tokens: 2 }]);
        assert!(choose(&[waiting], limits, 2).grants.is_empty());
    }
}
