//! Compiled grammars, shared by the calls that ask for the same one.
//!
//! In: grammar specs. Out: compiled grammars. Never here: more of them than a fixed number and size; an error that is
//! remembered; the vocabulary before somebody asks for a grammar.

use std::{collections::HashMap, sync::OnceLock};

use conclave_model::{
    grammar::{Error, Grammar, GrammarSpec, Vocabulary},
    tokenizer::Tokenizer,
};
use parking_lot::Mutex;

/// A compiled grammar is some hundred kilobytes.
const GRAMMARS_MAX: usize = 64;
/// Text of all specs together: they are compared with whole.
const SPEC_BYTES_MAX: usize = 1 << 20;

/// The grammars used last.
#[derive(Debug, Default)]
pub(super) struct Grammars {
    /// Built once, at the first grammar: it takes most of a second and some ten megabytes for 128 thousand tokens.
    vocabulary: OnceLock<Result<Vocabulary, Error>>,
    compiled: Mutex<Compiled>,
}

impl Grammars {
    /// The grammar of `spec` for a model with `vocab_size` logits. Always of the same model. Blocks while it compiles;
    /// two calls with one new spec both compile it.
    ///
    /// # Errors
    /// As [`Vocabulary::new`] and [`Grammar::compile`].
    pub(super) fn get(&self, tokenizer: &Tokenizer, vocab_size: usize, spec: GrammarSpec) -> Result<Grammar, Error> {
        if let Some(grammar) = self.compiled.lock().get(&spec) {
            return Ok(grammar);
        }
        let vocabulary = self.vocabulary.get_or_init(|| Vocabulary::new(tokenizer, vocab_size)).as_ref();
        let grammar = Grammar::compile(vocabulary.map_err(Error::clone)?, &spec)?;
        self.compiled.lock().insert(spec, grammar.clone());
        Ok(grammar)
    }
}

#[derive(Debug, Default)]
struct Compiled {
    by_spec: HashMap<GrammarSpec, Entry>,
    bytes: usize,
    /// Counts uses: the entry with the lowest has not been used for longest.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    grammar: Grammar,
    used: u64,
}

impl Compiled {
    fn get(&mut self, spec: &GrammarSpec) -> Option<Grammar> {
        self.clock += 1;
        let entry = self.by_spec.get_mut(spec)?;
        entry.used = self.clock;
        Some(entry.grammar.clone())
    }

    fn insert(&mut self, spec: GrammarSpec, grammar: Grammar) {
        self.clock += 1;
        let bytes = spec.len();
        if self.by_spec.insert(spec, Entry { grammar, used: self.clock }).is_none() {
            self.bytes += bytes;
        }
        while self.by_spec.len() > GRAMMARS_MAX || self.bytes > SPEC_BYTES_MAX {
            // A few dozen to look at, after a compilation that took far longer.
            let oldest = self.by_spec.iter().min_by_key(|(_, entry)| entry.used).map(|(spec, _)| spec.clone());
            let Some(oldest) = oldest else { return };
            self.by_spec.remove(&oldest);
            self.bytes -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_model, *};

    fn regex(pattern: String) -> GrammarSpec {
        GrammarSpec::Regex(pattern)
    }

    fn holds(grammars: &Grammars, spec: &GrammarSpec) -> bool {
        grammars.compiled.lock().by_spec.contains_key(spec)
    }

    #[test]
    fn the_grammars_used_last_are_kept() {
        let (grammars, tokenizer) = (Grammars::default(), test_model::byte_tokenizer());
        let get = |spec: &GrammarSpec| grammars.get(&tokenizer, 260, spec.clone()).unwrap();
        let first = regex("a".to_owned());
        get(&first);
        let second = regex("b".to_owned());
        get(&second);
        for other in 0..GRAMMARS_MAX - 1 {
            get(&first);
            get(&regex(format!("c{other}")));
        }
        assert!(holds(&grammars, &first) && !holds(&grammars, &second));
        assert_eq!(grammars.compiled.lock().by_spec.len(), GRAMMARS_MAX);
        get(&second);
        assert!(holds(&grammars, &second));
    }

    #[test]
    fn large_specs_make_room_for_each_other() {
        let (grammars, tokenizer) = (Grammars::default(), test_model::byte_tokenizer());
        let large = |digit: usize| {
            GrammarSpec::Choice((0..256).map(|at| format!("{digit}{at:03}{}", "x".repeat(1_020))).collect())
        };
        for digit in 0..6 {
            grammars.get(&tokenizer, 260, large(digit)).unwrap();
        }
        let compiled = grammars.compiled.lock();
        assert_eq!(compiled.by_spec.len(), 4);
        assert_eq!(compiled.bytes, compiled.by_spec.keys().map(GrammarSpec::len).sum::<usize>());
        assert!(compiled.by_spec.contains_key(&large(5)) && !compiled.by_spec.contains_key(&large(1)));
    }

    #[test]
    fn an_error_is_found_anew_each_time() {
        let (grammars, tokenizer) = (Grammars::default(), test_model::byte_tokenizer());
        for _ in 0..2 {
            assert!(matches!(grammars.get(&tokenizer, 260, regex("a(".to_owned())), Err(Error::Invalid(_))));
        }
        assert!(grammars.compiled.lock().by_spec.is_empty());
        grammars.get(&tokenizer, 260, regex("a".to_owned())).unwrap();
    }
}
