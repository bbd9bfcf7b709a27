//! One answer on its way through a grammar.
//!
//! In: the answer's tokens, in order. Out: which tokens may come next. Never here: the grammar's text, other answers.

use llguidance::{Matcher, api::StopReason};

use super::{Error, Mask, Vocabulary, guarded, reason};

/// How far an answer has come. An answer's siblings are [`fork`](Self::fork)s.
pub struct Constraint {
    matcher: Matcher,
    /// Logits of the model.
    size: usize,
    /// Stands for the end of the text.
    end: u32,
    taken: usize,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").field("taken", &self.taken).finish_non_exhaustive()
    }
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        self.fork()
    }
}

impl Constraint {
    pub(super) fn new(mut matcher: Matcher, vocabulary: &Vocabulary) -> Result<Self, Error> {
        // Lets it see whether it is complete before the first token.
        matcher.consume_tokens(&[]).map_err(|error| failure(&error.to_string()))?;
        Ok(Self { matcher, size: vocabulary.size(), end: vocabulary.end(), taken: 0 })
    }

    /// A sibling that has come as far. It shares what was learnt about the grammar, and its bounds, with this one.
    pub fn fork(&self) -> Self {
        Self { matcher: self.matcher.clone(), ..*self }
    }

    /// One that has come as far and shares nothing.
    pub(super) fn detached(&self) -> Result<Self, Error> {
        let matcher = guarded(|| Ok(self.matcher.deep_clone())).map_err(|reason| Error::Failed(reason.message))?;
        Ok(Self { matcher, ..*self })
    }

    /// The tokens that may come next; `ends` are among them where the text may end. Empty where the text is complete and
    /// `ends` is empty: there is nothing to draw any more.
    ///
    /// # Errors
    /// `TooLarge` when the grammar reaches a bound here, `Invalid` when no token of the vocabulary goes on with it.
    pub fn allowed(&mut self, ends: &[u32]) -> Result<Mask, Error> {
        let (mut mask, may_end) = if self.is_complete() {
            (Mask::empty(self.size), true)
        } else {
            let computed = self.matcher.compute_mask();
            let bits = computed.map_err(|error| failure(&error.to_string()))?;
            (Mask::of(&bits, self.size), bits.is_allowed(self.end))
        };
        if may_end {
            ends.iter().for_each(|&end| mask.allow(end));
        }
        Ok(mask)
    }

    /// Takes the next token of the answer, which must be one that is allowed; not the one that ends it.
    ///
    /// # Errors
    /// `Unfit` when it is not, `TooLarge` when the grammar reaches a bound.
    pub fn take(&mut self, token: u32) -> Result<(), Error> {
        if token as usize >= self.size || self.is_complete() {
            return Err(Error::Unfit { at: self.taken });
        }
        let taken = self.matcher.try_consume_tokens(&[token]);
        if taken.map_err(|error| failure(&error.to_string()))? != 1 {
            return Err(Error::Unfit { at: self.taken });
        }
        self.taken += 1;
        Ok(())
    }

    /// Takes the tokens of an answer that goes on after them.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn resume(&mut self, tokens: &[u32]) -> Result<(), Error> {
        tokens.iter().try_for_each(|&token| self.take(token))
    }

    /// Whether the text fits as it is and nothing can be added to it.
    pub fn is_complete(&self) -> bool {
        !self.matcher.is_error() && self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }

    /// Whether the text fits as it is.
    ///
    /// # Errors
    /// As [`allowed`](Self::allowed).
    pub fn may_end(&mut self) -> Result<bool, Error> {
        if self.is_complete() {
            return Ok(true);
        }
        let accepting = self.matcher.is_accepting();
        accepting.map_err(|error| failure(&error.to_string()))
    }
}

/// What the library's error means for an answer.
fn failure(error: &str) -> Error {
    let message = reason(error);
    if message.starts_with("panic") {
        return Error::Failed(message);
    }
    if message.starts_with(&StopReason::NoExtensionBias.to_string()) {
        return Error::Invalid("fits no text that this model could write".to_owned());
    }
    Error::TooLarge(format!("is too much work at this place of the answer: {message}"))
}
