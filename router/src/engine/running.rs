//! One sequence in the engine: its tokens, its blocks, who reads it.
//!
//! In: a submission; grants; what steps computed. Out: segments to compute.
//! Never here: other sequences, tensors; what is drawn and told is `draw`'s.

use std::{cell::Cell, rc::Rc, sync::Arc};

use conclave_model::{
    batch::Segment,
    cache::{BLOCK_TOKENS, KvCache},
    grammar::Constraint,
    sampler::SamplingParams,
};
use conclave_proto::status::Failure;
use tokio::time::Instant;

use crate::{
    scheduler::{
        Submission, Waiting,
        blocks::{Block, BlockPool, PrefixHash, block_hash, blocks_for, root_hash},
        policy::{Candidate, Standing},
    },
    sequence::{Event, EventSender, Stopped, TokenLogprob, ValidRequest},
};

/// Events that one step may bring for one answer: two tokens, the start and the finish.
const EVENTS_A_STEP: usize = 4;

/// The other end of a request: one for all its answers.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    pub(super) events: EventSender,
    stopped: Arc<Stopped>,
    /// Told that the request failed: nothing may follow.
    pub(super) failed: Rc<Cell<bool>>,
}

/// A sequence in the engine.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) request: Arc<ValidRequest>,
    /// Which of the request's answers this is.
    pub(super) answer: usize,
    /// The request's, with the answer's own seed.
    pub(super) sampling: SamplingParams,
    /// What the answer's text must look like, as far as it is drawn.
    pub(super) constraint: Option<Constraint>,
    pub(super) reader: Reader,
    /// The prompt, then resumed tokens, then drawn ones.
    pub(super) tokens: Vec<u32>,
    /// What the draft module takes the next token to be.
    pub(super) draft: Option<u32>,
    /// Rows that are final, in `blocks`.
    pub(super) computed: usize,
    blocks: Vec<Block>,
    /// Of the full blocks of `tokens`, as far as they were needed.
    hashes: Vec<PrefixHash>,
    /// Full blocks that others can find.
    published: usize,
    pub(super) cached_tokens: Option<usize>,
    pub(super) prompt_logprobs: Vec<TokenLogprob>,
    pub(super) times: Times,
    /// Its place among those that wait, until its first step.
    waiting: Option<Waiting>,
    isolated: bool,
    pub(super) over: bool,
}

/// When what happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) submitted: Instant,
    pub(super) first_step: Option<Instant>,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Option<Instant>,
}

impl Running {
    pub(super) fn new(submission: Submission) -> Self {
        let Submission { mut request, events, submitted, stopped, waiting } = submission;
        let times = Times { submitted, first_step: None, first_token: None, last_token: None };
        Self {
            answer: 0,
            sampling: request.sampling.clone(),
            constraint: request.constraint.take(),
            reader: Reader { events, stopped, failed: Rc::default() },
            tokens: [request.prompt.as_slice(), &request.resumed].concat(),
            request: Arc::new(request),
            draft: None,
            computed: 0,
            blocks: Vec::new(),
            hashes: Vec::new(),
            published: 0,
            cached_tokens: None,
            prompt_logprobs: Vec::new(),
            times,
            waiting: Some(waiting),
            isolated: false,
            over: false,
        }
    }

    /// Finished, failed, not wanted, out of time, or with nobody listening.
    pub(super) fn is_over(&mut self) -> bool {
        if !self.over && self.deadline() <= Instant::now() {
            self.fail(Failure::deadline("the request's deadline passed"));
        }
        self.over
            || self.reader.failed.get()
            || self.reader.events.is_closed()
            || self.reader.stopped.is_stopped(self.answer)
    }

    /// Fails the whole request, this answer and its siblings.
    pub(super) fn fail(&mut self, failure: Failure) {
        self.over = true;
        if !self.reader.failed.replace(true) {
            // Room is there or the reader is gone: a sequence without room is not computed.
            let _ = self.reader.events.try_send(Event::Failed(failure));
        }
    }

    pub(super) fn deadline(&self) -> Instant {
        self.request.deadline.into()
    }

    /// The answer so far, resumed tokens included.
    pub(super) fn answered(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// Tokens that are known and whose rows are not computed, at least one.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether its next step may check a guess: it decodes, and may draw two tokens more.
    pub(super) fn wants_draft(&self) -> bool {
        self.pending() == 1 && self.answered().len() + 2 <= self.request.stop.max_tokens
    }

    /// Whether logits of the prompt's own rows are wanted still.
    pub(super) fn wants_prompt_logprobs(&self) -> bool {
        self.request.logprobs.prompt && self.times.first_token.is_none()
    }

    /// A step with this sequence in it failed, and it may be the reason: its next step is its own.
    pub(super) fn isolate(&mut self) {
        self.isolated = true;
        self.draft = None;
        // A row whose logits were not drawn from is computed again.
        self.computed = self.computed.min(self.tokens.len() - 1);
    }

    pub(super) fn is_isolated(&self) -> bool {
        self.isolated
    }

    /// As the policy sees it, with times counted from `epoch`.
    pub(super) fn candidate(&mut self, index: usize, epoch: Instant, pool: &BlockPool) -> Candidate {
        let micros = self.times.submitted.saturating_duration_since(epoch).as_micros();
        let due = i64::try_from(micros).unwrap_or(i64::MAX) - i64::from(self.request.priority) * 1_000_000;
        let ready = self.reader.events.capacity() >= EVENTS_A_STEP * self.request.answers;
        let (computed, standing) = if self.blocks.is_empty() {
            let (found, unheld) = self.findable(pool);
            (found * BLOCK_TOKENS, Standing::Waiting { unheld })
        } else {
            let own = self.blocks.iter().filter(|block| block.is_own()).count();
            let decoding = self.times.first_token.is_some() && self.pending() == 1;
            (self.computed, Standing::Running { held: self.blocks.len(), own, decoding })
        };
        let tokens = self.tokens.len() + usize::from(self.draft.is_some());
        Candidate { index, due, ready, computed, tokens, standing }
    }

    /// Leading blocks that the cache remembers, and how many of them nobody holds.
    fn findable(&mut self, pool: &BlockPool) -> (usize, usize) {
        let (mut found, mut unheld) = (0, 0);
        for block in 0..self.blocks_to_find() {
            let Some(held) = pool.peek(&self.hash(block)) else { break };
            found += 1;
            unheld += usize::from(!held);
        }
        (found, unheld)
    }

    /// Full blocks but the last row, whose logits are needed; none where the prompt's logits are.
    fn blocks_to_find(&self) -> usize {
        if self.wants_prompt_logprobs() { 0 } else { (self.tokens.len() - 1) / BLOCK_TOKENS }
    }

    /// Of block `block`, which is full of known tokens.
    fn hash(&mut self, block: usize) -> PrefixHash {
        while self.hashes.len() <= block {
            let parent = self.hashes.last().copied().unwrap_or_else(|| root_hash(&self.request.cache_salt));
            let start = self.hashes.len() * BLOCK_TOKENS;
            self.hashes.push(block_hash(&parent, &self.tokens[start..start + BLOCK_TOKENS]));
        }
        self.hashes[block]
    }

    /// When it is let in: takes the blocks that the cache remembers of it. How many tokens were looked for, and found.
    pub(super) fn find_prefix(&mut self, pool: &BlockPool) -> Option<(usize, usize)> {
        if !self.blocks.is_empty() {
            return None;
        }
        for block in 0..self.blocks_to_find() {
            let Some(found) = pool.find(&self.hash(block)) else { break };
            self.blocks.push(found);
        }
        self.published = self.blocks.len();
        self.computed = self.blocks.len() * BLOCK_TOKENS;
        let prompt = self.request.prompt.len();
        self.cached_tokens.get_or_insert(self.computed.min(prompt));
        Some((self.tokens.len(), self.computed))
    }

    /// Takes the blocks that its next `rows` rows need. False where they are not to be had.
    pub(super) fn reserve(&mut self, rows: usize, pool: &BlockPool, cache: &KvCache) -> bool {
        while self.blocks.len() < blocks_for(self.computed + rows) {
            let Some(block) = pool.take(self.blocks.last().map(Block::id)) else { return false };
            cache.clear(block.id());
            self.blocks.push(block);
        }
        true
    }

    /// Gives up its blocks, to be computed again later. Its reader only sees a pause.
    pub(super) fn preempt(&mut self) {
        self.blocks.clear();
        self.published = 0;
        self.computed = 0;
        self.draft = None;
        if self.times.first_token.is_none() {
            self.prompt_logprobs.clear();
        }
    }

    /// Its next `rows` rows, for a pass; their tokens are added to `tokens`.
    pub(super) fn segment(&mut self, rows: usize, now: Instant, tokens: &mut Vec<u32>) -> Segment {
        self.times.first_step.get_or_insert(now);
        self.waiting = None;
        if rows <= self.pending() {
            self.draft = None;
        }
        let known = self.tokens[self.computed..].iter().copied();
        tokens.extend(known.chain(self.draft).take(rows));
        Segment { rows, start: self.computed, blocks: self.blocks.iter().map(Block::id).collect() }
    }

    /// `rows` more rows are final. Their full blocks can be found by others from now on.
    pub(super) fn advance(&mut self, rows: usize) {
        self.isolated = false;
        self.computed += rows;
        for block in self.published..self.computed / BLOCK_TOKENS {
            let hash = self.hash(block);
            self.blocks[block].publish(hash);
            self.published = block + 1;
        }
    }

    /// Another answer to the same request, when the prompt is computed and nothing is drawn. Full blocks are shared, the
    /// last one is copied; where no block is left for that, its rows are computed again.
    pub(super) fn sibling(&self, answer: usize, pool: &BlockPool, cache: &KvCache) -> Self {
        let mut sampling = self.sampling.clone();
        sampling.seed = self.request.sampling.seed.wrapping_add(answer as u64);
        let full = self.computed / BLOCK_TOKENS;
        let mut blocks = self.blocks[..full].to_vec();
        let mut computed = full * BLOCK_TOKENS;
        if let Some(last) = self.blocks.get(full).filter(|_| self.computed > computed)
            && let Some(own) = pool.take(blocks.last().map(Block::id))
        {
            cache.copy_block(last.id(), own.id());
            blocks.push(own);
            computed = self.computed;
        }
        Self {
            request: Arc::clone(&self.request),
            answer,
            sampling,
            constraint: self.constraint.as_ref().map(Constraint::fork),
            reader: self.reader.clone(),
            tokens: self.tokens.clone(),
            draft: None,
            computed,
            blocks,
            hashes: self.hashes.clone(),
            published: full,
            cached_tokens: self.cached_tokens,
            prompt_logprobs: Vec::new(),
            times: self.times,
            waiting: None,
            isolated: false,
            over: false,
        }
    }
}
