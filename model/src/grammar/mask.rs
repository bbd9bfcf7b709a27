//! A set of tokens. In: what a grammar allows. Out: whether a token is in it. Never here: how it came about.

use llguidance::toktrie::SimpleVob;

/// The tokens that may be drawn at one position: one bit per token of the model's vocabulary, 32 to a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    words: Vec<u32>,
    size: usize,
}

impl Mask {
    /// The empty set over a vocabulary of `size` tokens.
    pub fn empty(size: usize) -> Self {
        Self { words: vec![0; size.div_ceil(32)], size }
    }

    /// Takes the first `size` bits.
    pub(super) fn of(bits: &SimpleVob, size: usize) -> Self {
        let mut mask = Self::empty(size);
        for (word, &bits) in mask.words.iter_mut().zip(bits.as_slice()) {
            *word = bits;
        }
        if let (Some(last), rest @ 1..) = (mask.words.last_mut(), size % 32) {
            *last &= (1 << rest) - 1;
        }
        mask
    }

    /// Adds a token of the vocabulary.
    pub fn allow(&mut self, token: u32) {
        let token = token as usize;
        if token < self.size {
            self.words[token / 32] |= 1 << (token % 32);
        }
    }

    /// Whether `token` is in the set.
    pub fn allows(&self, token: u32) -> bool {
        (token as usize) < self.size && self.words[token as usize / 32] & (1 << (token % 32)) != 0
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many are.
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The tokens in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        (0..self.size as u32).filter(|&token| self.allows(token))
    }

    /// Whether no token is left in the set without `others`.
    pub fn is_within(&self, others: &[u32]) -> bool {
        let mut left = self.words.clone();
        for &other in others {
            if let Some(word) = left.get_mut(other as usize / 32) {
                *word &= !(1 << (other % 32));
            }
        }
        left.iter().all(|&word| word == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_mask_is_a_set(
            size in 1usize..100,
            tokens in prop::collection::btree_set(0u32..100, 0..20),
            others in prop::collection::btree_set(0u32..120, 0..20),
        ) {
            let mut mask = Mask::empty(size);
            tokens.iter().for_each(|&token| mask.allow(token));
            let held: BTreeSet<u32> = tokens.into_iter().filter(|&token| (token as usize) < size).collect();
            prop_assert_eq!(&mask.iter().collect::<BTreeSet<_>>(), &held);
            prop_assert_eq!((mask.len(), mask.is_empty()), (held.len(), held.is_empty()));
            let others: Vec<u32> = others.into_iter().collect();
            prop_assert_eq!(mask.is_within(&others), held.iter().all(|token| others.contains(token)));
        }

        #[test]
        fn bits_beyond_the_vocabulary_are_dropped(size in 1usize..100) {
            let mask = Mask::of(&SimpleVob::alloc_ones(140), size);
            prop_assert_eq!(mask.len(), size);
            prop_assert!(!mask.allows(size as u32));
        }
    }
}
