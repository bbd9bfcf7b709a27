//! Who holds which block of the KV cache, and what the blocks that nobody holds still remember. Plain data.
//!
//! In: wishes for blocks, hashes of what is in them. Out: [`Block`]s, which give themselves back when they are dropped.
//! Never here: tensors, sequences, a decision who must wait.
//!
//! A full block is published under the hash of all tokens up to its end. While somebody holds it, others may share it;
//! when nobody does, it keeps its content until its memory is needed, the least recently used first. (vLLM's prefix cache
//! works alike; its design notes name the pieces.)

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
};

use conclave_model::cache::BLOCK_TOKENS;
use sha2::{Digest, Sha256};

/// Names the tokens from a sequence's start to a block's end, and the salt.
pub type PrefixHash = [u8; 32];

/// The hash that a sequence's first block follows on. Within one process only tokens change what a block holds, and the
/// salt who may share it.
pub fn root_hash(salt: &str) -> PrefixHash {
    Sha256::digest(salt.as_bytes()).into()
}

/// The hash of the block that holds `tokens` and follows on `parent`.
pub fn block_hash(parent: &PrefixHash, tokens: &[u32]) -> PrefixHash {
    let mut hash = Sha256::new_with_prefix(parent);
    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    hash.finalize().into()
}

/// Blocks that `tokens` tokens need.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// All blocks. Cheap to clone; lives on the engine's thread.
#[derive(Clone, Debug)]
pub struct BlockPool(Rc<RefCell<State>>);

/// One hold on one block. Clones share it; the last to be dropped gives it back.
#[derive(Debug)]
pub struct Block {
    id: u32,
    pool: BlockPool,
}

#[derive(Debug)]
struct State {
    /// By block.
    slots: Vec<Slot>,
    /// Blocks that nobody holds and that remember nothing.
    empty: BTreeSet<u32>,
    /// Blocks that nobody holds and that could be found again, by when they were given back.
    remembered: BTreeMap<u64, u32>,
    by_hash: HashMap<PrefixHash, u32>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    holders: usize,
    hash: Option<PrefixHash>,
    given_back: u64,
}

impl BlockPool {
    /// `blocks` blocks, all empty.
    pub fn new(blocks: usize) -> Self {
        let ids = 0..u32::try_from(blocks).unwrap_or(u32::MAX);
        Self(Rc::new(RefCell::new(State {
            slots: vec![Slot::default(); ids.len()],
            empty: ids.collect(),
            remembered: BTreeMap::new(),
            by_hash: HashMap::new(),
            clock: 0,
        })))
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.0.borrow().slots.len()
    }

    /// How many nobody holds.
    pub fn free(&self) -> usize {
        let state = self.0.borrow();
        state.empty.len() + state.remembered.len()
    }

    /// A block to write to; `None` where all are held. The one behind `after` where that is empty, since a sequence whose
    /// blocks lie in a row is read in place; for a first block, one with room behind it.
    pub fn take(&self, after: Option<u32>) -> Option<Block> {
        let mut state = self.0.borrow_mut();
        let next = after.map(|last| last + 1).filter(|next| state.empty.contains(next));
        let id = match next.or_else(|| state.start_of_room()) {
            Some(id) => {
                state.empty.remove(&id);
                id
            }
            None => state.forget_oldest()?,
        };
        state.slots[id as usize].holders = 1;
        drop(state);
        Some(Block { id, pool: self.clone() })
    }

    /// Whether a block is remembered under `hash`, and whether somebody holds it.
    pub fn peek(&self, hash: &PrefixHash) -> Option<bool> {
        let state = self.0.borrow();
        state.by_hash.get(hash).map(|&id| state.slots[id as usize].holders > 0)
    }

    /// The block published under `hash`, if it is still remembered.
    pub fn find(&self, hash: &PrefixHash) -> Option<Block> {
        let mut state = self.0.borrow_mut();
        let id = *state.by_hash.get(hash)?;
        let Slot { holders, given_back, .. } = state.slots[id as usize];
        if holders == 0 {
            state.remembered.remove(&given_back);
        }
        state.slots[id as usize].holders += 1;
        drop(state);
        Some(Block { id, pool: self.clone() })
    }
}

impl State {
    /// An empty block: the middle of the widest gap, so that who starts there and who ends before it both have room to
    /// grow; or the gap's start, where nobody ends before it.
    fn start_of_room(&self) -> Option<u32> {
        let (mut widest, mut gap) = (0..0u32, 0..0u32);
        for &id in &self.empty {
            gap = if gap.end == id && !gap.is_empty() { gap.start..id + 1 } else { id..id + 1 };
            if gap.len() > widest.len() {
                widest = gap.clone();
            }
        }
        let middle = widest.start + widest.len() as u32 / 2;
        if widest.is_empty() {
            None
        } else if widest.start == 0 {
            Some(0)
        } else {
            Some(middle)
        }
    }

    fn forget_oldest(&mut self) -> Option<u32> {
        let (_, id) = self.remembered.pop_first()?;
        if let Some(hash) = self.slots[id as usize].hash.take() {
            self.by_hash.remove(&hash);
        }
        Some(id)
    }
}

impl Block {
    /// Its place in the cache.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether nobody else holds it.
    pub fn is_own(&self) -> bool {
        self.pool.0.borrow().slots[self.id as usize].holders == 1
    }

    /// Lets others find this block, which is full and never written again. Where another holds the same, that one is found.
    pub fn publish(&self, hash: PrefixHash) {
        let mut state = self.pool.0.borrow_mut();
        let slot = &state.slots[self.id as usize];
        if slot.hash.is_none() && !state.by_hash.contains_key(&hash) {
            state.slots[self.id as usize].hash = Some(hash);
            state.by_hash.insert(hash, self.id);
        }
    }
}

impl Clone for Block {
    fn clone(&self) -> Self {
        self.pool.0.borrow_mut().slots[self.id as usize].holders += 1;
        Self { id: self.id, pool: self.pool.clone() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut state = self.pool.0.borrow_mut();
        state.clock += 1;
        let clock = state.clock;
        let slot = &mut state.slots[self.id as usize];
        slot.holders -= 1;
        if slot.holders > 0 {
            return;
        }
        slot.given_back = clock;
        if slot.hash.is_some() {
            state.remembered.insert(clock, self.id);
        } else {
            state.empty.insert(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(of: u32) -> PrefixHash {
        block_hash(&root_hash(""), &[of])
    }

    #[test]
    fn a_sequence_grows_in_place_and_others_leave_it_room() {
        let pool = BlockPool::new(16);
        let mut first = vec![pool.take(None).expect("free")];
        let other = pool.take(None).expect("free");
        for _ in 0..5 {
            first.push(pool.take(first.last().map(Block::id)).expect("free"));
        }
        assert_eq!(first.iter().map(Block::id).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(other.id(), 8);
    }

    #[test]
    fn what_nobody_holds_is_found_again_until_its_memory_is_needed() {
        let pool = BlockPool::new(3);
        let blocks: Vec<Block> = (0..3).map(|_| pool.take(None).expect("free")).collect();
        blocks.iter().zip(0..).for_each(|(block, n)| block.publish(hash(n)));
        assert!(pool.take(None).is_none());
        drop(blocks);
        assert_eq!(pool.free(), 3);
        // Using the first makes the second the oldest.
        let first = pool.find(&hash(0)).expect("remembered");
        assert_eq!(pool.free(), 2);
        drop(first);
        let taken = pool.take(None).expect("free");
        assert!(pool.find(&hash(1)).is_none());
        assert!(pool.find(&hash(0)).is_some() && pool.find(&hash(2)).is_some());
        drop(taken);
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn hashes_tell_tokens_their_place_and_the_salt_apart() {
        let root = root_hash("");
        let other = block_hash(&root, &[1, 2]);
        assert_ne!(other, block_hash(&root, &[2, 1]));
        assert_ne!(other, block_hash(&other, &[1, 2]));
        assert_ne!(other, block_hash(&root_hash("salt"), &[1, 2]));
        assert_eq!(other, block_hash(&root_hash(""), &[1, 2]));
    }

    proptest! {
        #![proptest_config(ProptestConfig { max_shrink_iters: 1_000, ..ProptestConfig::with_cases(4) })]

        /// A model beside the pool: who holds what, as plain lists. 10,000 operations each.
        #[test]
        fn no_block_leaks_and_none_is_held_by_two_who_write(
            operations in prop::collection::vec((0u8..6, any::<u16>()), 10_000),
        ) {
            let pool = BlockPool::new(24);
            let mut held: Vec<Block> = Vec::new();
            let mut published: HashMap<u32, u32> = HashMap::new();
            for (operation, choice) in operations {
                let some = |held: &[Block]| choice as usize % held.len().max(1);
                match operation {
                    0 | 1 => {
                        let ids: BTreeSet<u32> = held.iter().map(Block::id).collect();
                        match pool.take(held.last().map(Block::id).filter(|_| choice % 2 == 0)) {
                            Some(block) => {
                                prop_assert!(!ids.contains(&block.id()), "taken twice");
                                published.remove(&block.id());
                                held.push(block);
                            }
                            None => prop_assert_eq!(ids.len(), 24, "refused though some are free"),
                        }
                    }
                    2 if !held.is_empty() => {
                        let block = &held[some(&held)];
                        let name = u32::from(choice % 32);
                        if !published.contains_key(&block.id()) && !published.values().any(|&taken| taken == name) {
                            published.insert(block.id(), name);
                        }
                        block.publish(hash(name));
                    }
                    3 => {
                        let name = u32::from(choice % 32);
                        let expected = published.iter().find(|(_, taken)| **taken == name).map(|(id, _)| *id);
                        let found = pool.find(&hash(name));
                        prop_assert_eq!(found.as_ref().map(Block::id), expected);
                        held.extend(found);
                    }
                    4 if !held.is_empty() => held.push(held[some(&held)].clone()),
                    _ if !held.is_empty() => drop(held.swap_remove(some(&held))),
                    _ => {}
                }
                let ids: BTreeSet<u32> = held.iter().map(Block::id).collect();
                prop_assert_eq!(pool.free(), 24 - ids.len());
                if let Some(block) = held.last() {
                    prop_assert_eq!(block.is_own(), held.iter().filter(|other| other.id() == block.id()).count() == 1);
                }
                // Bounds how long an operation takes to check, not what is checked.
                held.truncate(200);
            }
            drop(held);
            prop_assert_eq!(pool.free(), 24);
        }
    }
}
