//! A waker for work that may be done already. In: whoever is to be woken. Out: a waker that wakes it, but for what is rung
//! quietly. Nothing is remembered of that: who rings quietly does the work.
//!
//! HTTP/2 calls for its connection's task whenever something is handed to it, and for a stream's reader whenever something
//! arrives, also on the thread of somebody who is about to write or to read it. Such a call wakes a thread for nothing,
//! and takes longer than the work.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Wake, Waker};

use futures::task::AtomicWaker;

#[derive(Debug)]
pub(super) struct Bell {
    inner: Arc<Inner>,
    waker: Waker,
}

#[derive(Debug, Default)]
struct Inner {
    sleeper: AtomicWaker,
    quiet: AtomicBool,
}

impl Default for Bell {
    fn default() -> Self {
        let inner = Arc::<Inner>::default();
        Self { waker: Waker::from(Arc::clone(&inner)), inner }
    }
}

impl Bell {
    /// Who is woken from now on.
    pub(super) fn listen(&self, sleeper: &Waker) {
        self.inner.sleeper.register(sleeper);
    }

    /// What rings it.
    pub(super) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Wakes nobody during `work`, on whatever thread it is rung. What it was rung for by others must be seen to afterwards.
    pub(super) fn quietly<T>(&self, work: impl FnOnce() -> T) -> T {
        self.inner.quiet.store(true, SeqCst);
        let done = work();
        self.inner.quiet.store(false, SeqCst);
        done
    }
}

impl Wake for Inner {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.quiet.load(SeqCst) {
            self.sleeper.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::task::noop_waker;

    use super::*;

    #[test]
    fn it_wakes_who_listens_but_for_what_is_rung_quietly() {
        let (bell, sleeper) = (Bell::default(), Bell::default());
        bell.listen(sleeper.waker());
        let woken = || {
            // Whoever was woken is no longer registered.
            let registered = sleeper.inner.sleeper.take().is_some();
            sleeper.listen(&noop_waker());
            !registered
        };
        sleeper.listen(&noop_waker());
        bell.quietly(|| bell.waker().wake_by_ref());
        assert!(!woken());
        bell.waker().wake_by_ref();
        assert!(woken());
    }
}
