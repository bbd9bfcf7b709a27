//! A tokenizer as grammars see it: a tree of the bytes of its tokens.
//!
//! In: a tokenizer, the size of the model's vocabulary. Out: what grammars are compiled against; built once per model.
//! Never here: special and added tokens, and ids that the model has but the tokenizer does not: no grammar allows those.

use std::sync::Arc;

use llguidance::{
    ParserFactory,
    api::ParserLimits,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

use super::{Error, guarded};
use crate::tokenizer::Tokenizer;

/// Longer tokens (runs of spaces) do not fit into the tree: it counts a token's bytes in ten bits.
const TOKEN_BYTES_MAX: usize = 1_000;
/// The tree numbers tokens in 24 bits.
const VOCABULARY_MAX: usize = 8 << 20;

/// What keeps any grammar within bounds, whatever its text says. Per token: about 14 ms of lexing and 3 ms of parsing
/// on a slow core, where ordinary grammars take well below one.
pub(super) fn limits() -> ParserLimits {
    ParserLimits {
        // How many ways of reading the text so far are followed at once.
        max_items_in_row: 2_000,
        // Work on the regular expressions while compiling, at some 50,000 a millisecond.
        initial_lexer_fuel: 1_000_000,
        // Work on them per token, at some 14,000 a millisecond.
        step_lexer_fuel: 200_000,
        // Work on the rules per token, at some 20,000 a millisecond.
        step_max_items: 50_000,
        // Of one or two kilobytes each, kept until the request is over.
        max_lexer_states: 20_000,
        // Symbols in all rules.
        max_grammar_size: 100_000,
        precompute_large_lexemes: true,
        // Otherwise an error quotes the whole grammar.
        verbose_errors: false,
    }
}

/// The bytes of every token. Cheap to clone.
#[derive(Clone)]
pub struct Vocabulary {
    factory: Arc<ParserFactory>,
    size: usize,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// The vocabulary of a model with `size` logits, some of which may have no token.
    ///
    /// # Errors
    /// `Vocabulary` when the tokenizer's tokens have no bytes of their own, or it is larger than any known one.
    pub fn new(tokenizer: &Tokenizer, size: usize) -> Result<Self, Error> {
        if size > VOCABULARY_MAX {
            return Err(Error::Vocabulary(format!("{size} tokens are more than {VOCABULARY_MAX}")));
        }
        let tokens = tokenizer.token_bytes().map_err(|error| Error::Vocabulary(error.to_string()))?;
        let mut words: Vec<Vec<u8>> = tokens.into_iter().take(size).map(Option::unwrap_or_default).collect();
        // A token without bytes is in no tree. The last is one that no model draws: it stands for the end.
        words.resize(size + 1, Vec::new());
        words.iter_mut().filter(|bytes| bytes.len() > TOKEN_BYTES_MAX).for_each(Vec::clear);
        let build = || {
            let ids = u32::try_from(words.len()).unwrap_or(u32::MAX);
            let trie = TokTrie::from(&TokRxInfo::new(ids, ids - 1), &words);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = SlicedBiasComputer::general_slices();
            let factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices);
            let mut factory = factory.map_err(|error| error.to_string())?;
            factory.quiet();
            *factory.limits_mut() = limits();
            Ok(factory)
        };
        let factory = guarded(build).map_err(|reason| Error::Vocabulary(reason.message))?;
        Ok(Self { factory: Arc::new(factory), size })
    }

    /// Logits of the model.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The id that stands for the end of a text; the first that the model does not have.
    pub(super) fn end(&self) -> u32 {
        self.factory.tok_env().tok_trie().eos_token()
    }

    pub(super) fn factory(&self) -> &ParserFactory {
        &self.factory
    }
}
