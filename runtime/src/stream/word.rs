//! Two threads that come for one thing, of which neither waits. In: a lock. Out: the lock, or word left with whoever has it.
//! Nothing that somebody came for is forgotten: either who came sees that it was let go of, or who let go of it sees the word.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, fence};

use parking_lot::{Mutex, MutexGuard};

/// The lock; `None` where somebody else has it, who will see by [`was_left`] that more is wanted.
pub(super) fn lock_or_leave<'a, T>(lock: &'a Mutex<T>, word: &AtomicBool) -> Option<MutexGuard<'a, T>> {
    loop {
        if let Some(locked) = lock.try_lock() {
            return Some(locked);
        }
        word.store(true, SeqCst);
        fence(SeqCst);
        if lock.is_locked() {
            return None;
        }
    }
}

/// Whether more is wanted than was when `word` was last taken back. To be asked after the lock was let go of.
pub(super) fn was_left(word: &AtomicBool) -> bool {
    fence(SeqCst);
    word.load(SeqCst)
}
