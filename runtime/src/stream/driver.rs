//! What one connection has under way, driven by whoever has something for it. In: futures. Out: they end. Never here: one
//! future on two threads at once.
//!
//! As a rule a connection's own task drives it, once its runtime is told that something has come. A thread that has an answer
//! may do that itself ([`driven_here`]): all that the answer needs to leave is done on that thread, the system call included,
//! and nobody is woken for it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, fence};
use std::task::{Context, Poll, Wake, Waker};

use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::runtime::Handle;

/// How often all that is called for is gone through in one turn. Then others of the runtime have theirs.
const ROUNDS: usize = 16;

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection's. Clones are the same one.
#[derive(Clone)]
pub struct Driver(Arc<Shared>);

struct Shared {
    under_way: Mutex<FuturesUnordered<Work>>,
    /// Not begun yet.
    newcomers: Mutex<Vec<Work>>,
    /// Something is called for that nobody has gone through.
    called: AtomicBool,
    /// Somebody goes through it, and will look whether more has been called for.
    at_it: AtomicBool,
    /// The connection's task.
    task: AtomicWaker,
    /// What is driven on other threads belongs to it all the same.
    runtime: Handle,
}

thread_local! {
    /// Whom this thread drives in a moment, where it does.
    static HERE: RefCell<Option<Vec<Arc<Shared>>>> = const { RefCell::new(None) };
}

/// Does `work`, and after it, on this very thread, what that called for at any connection.
pub fn driven_here<T>(work: impl FnOnce() -> T) -> T {
    /// Also where `work` panics: others wait for what it called for.
    struct Scope;
    impl Drop for Scope {
        fn drop(&mut self) {
            for called in HERE.take().unwrap_or_default() {
                if std::thread::panicking() || called.turn().is_ready() {
                    called.task.wake();
                }
            }
        }
    }
    let around = HERE.replace(Some(Vec::new()));
    debug_assert!(around.is_none(), "once at a time");
    let _scope = Scope;
    work()
}

impl Driver {
    /// With nothing under way, for the runtime of the moment.
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared {
            under_way: Mutex::default(),
            newcomers: Mutex::default(),
            called: AtomicBool::new(false),
            at_it: AtomicBool::new(false),
            task: AtomicWaker::new(),
            runtime: Handle::current(),
        }))
    }

    /// Has `work` done beside what else is under way. A panic ends nothing but its own work.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let work = AssertUnwindSafe(work).catch_unwind().map(|ended| {
            if ended.is_err() {
                tracing::error!("what a connection had under way panicked");
            }
        });
        self.0.newcomers.lock().push(Box::pin(work));
        self.0.wake_by_ref();
    }

    /// The connection's task: drives until nothing is under way any more. What is, when this is dropped, is dropped too.
    pub(super) async fn run(self) {
        let own = Own(self.0);
        poll_fn(|cx| {
            own.0.task.register(cx.waker());
            own.0.turn()
        })
        .await;
    }
}

impl Shared {
    /// Goes through what is called for. Ready once nothing is under way. Where somebody else is at it, that one does so.
    fn turn(self: &Arc<Self>) -> Poll<()> {
        let waker = Waker::from(Arc::clone(self));
        let mut cx = Context::from_waker(&waker);
        let _entered = self.runtime.enter();
        for _ in 0..ROUNDS {
            let Some(mut under_way) = self.under_way.try_lock() else {
                self.called.store(true, SeqCst);
                // Either this sees that it was let go of, or who let go of it sees that it is called for.
                fence(SeqCst);
                if self.under_way.is_locked() {
                    return Poll::Pending;
                }
                continue;
            };
            self.at_it.store(true, SeqCst);
            self.called.store(false, SeqCst);
            under_way.extend(self.newcomers.lock().drain(..));
            let left = loop {
                match under_way.poll_next_unpin(&mut cx) {
                    Poll::Ready(Some(())) => {}
                    Poll::Ready(None) => break false,
                    Poll::Pending => break true,
                }
            };
            self.at_it.store(false, SeqCst);
            drop(under_way);
            fence(SeqCst);
            if !self.called.load(SeqCst) {
                return if left { Poll::Pending } else { Poll::Ready(()) };
            }
        }
        // The rest is the task's.
        self.task.wake();
        Poll::Pending
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.called.store(true, SeqCst);
        if self.at_it.load(SeqCst) {
            return;
        }
        let noted = |here: &RefCell<Option<Vec<Arc<Self>>>>| {
            let Some(called) = &mut *here.borrow_mut() else { return false };
            if !called.iter().any(|one| Arc::ptr_eq(one, self)) {
                called.push(Arc::clone(self));
            }
            true
        };
        // A thread that ends drives nothing any more.
        if !HERE.try_with(noted).unwrap_or(false) {
            self.task.wake();
        }
    }
}

/// The connection's task has it. Futures under way hold on to their driver, so with the task they must go.
struct Own(Arc<Shared>);

impl Drop for Own {
    fn drop(&mut self) {
        let under_way = std::mem::take(&mut *self.0.under_way.lock());
        let newcomers = std::mem::take(&mut *self.0.newcomers.lock());
        drop((under_way, newcomers));
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

/// What hyper has done for each request beside the connection.
impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Driver {
    fn execute(&self, work: F) {
        self.spawn(work);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread::{self, ThreadId};

    use tokio::sync::{mpsc, oneshot};
    use tokio::time::{Duration, timeout};

    use super::*;

    #[tokio::test]
    async fn what_a_thread_calls_for_is_done_there_before_it_goes_on() {
        let driver = Driver::new();
        let (answer, answered) = oneshot::channel();
        let (done, is_done) = std::sync::mpsc::channel::<ThreadId>();
        driver.spawn(async move {
            // A timer and a task of its own, as on the connection's runtime.
            let word = timeout(Duration::from_secs(60), answered).await.unwrap().unwrap();
            let beside = tokio::spawn(async move { word });
            done.send(thread::current().id()).unwrap();
            beside.await.unwrap();
        });
        let running = tokio::spawn(driver.run());
        // It has begun, and waits.
        tokio::task::yield_now().await;
        let there = thread::spawn(move || {
            driven_here(|| answer.send("word").unwrap());
            is_done.try_recv().map(|by| by == thread::current().id())
        });
        assert_eq!(there.join().unwrap(), Ok(true));
        running.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_that_is_called_for_is_forgotten_whoever_calls() {
        const EACH: usize = 3_000;
        let (driver, counted) = (Driver::new(), Arc::new(AtomicUsize::new(0)));
        let callers: Vec<_> = (0..4)
            .map(|caller| {
                let (sender, mut numbers) = mpsc::channel(1);
                let counted = Arc::clone(&counted);
                driver.spawn(async move {
                    while let Some(number) = numbers.recv().await {
                        counted.fetch_add(number, SeqCst);
                    }
                });
                move || {
                    for nth in 0..EACH {
                        let send = || while sender.try_send(1).is_err() {};
                        if (nth + caller) % 3 == 0 { send() } else { driven_here(send) }
                    }
                }
            })
            .collect();
        let running = tokio::spawn(driver.run());
        let callers: Vec<_> = callers.into_iter().map(thread::spawn).collect();
        // Each waits for room that only others' work gives it.
        timeout(Duration::from_secs(60), running).await.expect("no call is lost").unwrap();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        assert_eq!(counted.load(SeqCst), 4 * EACH);
    }

    #[tokio::test]
    async fn a_panic_ends_its_own_work_and_no_other() {
        let (driver, (done, is_done)) = (Driver::new(), oneshot::channel());
        driver.spawn(async { panic!("this one alone") });
        driver.spawn(async move { done.send(()).unwrap() });
        driver.run().await;
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn with_the_connections_task_goes_all_that_is_under_way() {
        let driver = Driver::new();
        let (held, gone) = oneshot::channel::<()>();
        let own = driver.clone();
        driver.spawn(async move {
            let _held = (held, own);
            std::future::pending().await
        });
        let running = tokio::spawn(driver.run());
        tokio::task::yield_now().await;
        running.abort();
        gone.await.unwrap_err();
    }
}
