//! What one connection has under way, driven by whoever has something for it. In: futures. Out: they end. Never here: one
//! future on two threads at once.
//!
//! As a rule a connection's own task drives it, once its runtime is told that something has come. A thread that has an answer
//! may do that itself ([`driven_here`]): what the answer needs to leave is done on that thread, the system call included, and
//! nobody is woken for it, unless somebody is at it already or there is much more to do.

use std::cell::RefCell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Poll, Wake, Waker};

use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::word::{lock_or_leave, was_left};

/// How often the task goes through all that is called for before others of its runtime have their turn.
const ROUNDS: usize = 16;
/// And how often another thread does, which has other things to do. An answer takes two: HTTP/2 calls for the connection.
const ROUNDS_ELSEWHERE: usize = 4;

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection's. Clones are the same one.
#[derive(Clone)]
pub struct Driver(Arc<Shared>);

struct Shared {
    /// `None` once nothing more will be: with the connection's task.
    under_way: Mutex<Option<FuturesUnordered<Work>>>,
    /// Not begun yet; `None` likewise.
    newcomers: Mutex<Option<Vec<Work>>>,
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

/// Does `work`, and after it, on this very thread, what that called for at any connection; but not more than an answer takes.
pub fn driven_here<T>(work: impl FnOnce() -> T) -> T {
    /// Also where `work` panics: others wait for what it called for.
    struct Scope;
    impl Drop for Scope {
        fn drop(&mut self) {
            for called in HERE.take().unwrap_or_default() {
                let go_through = || !std::thread::panicking() && called.turn(ROUNDS_ELSEWHERE).is_pending();
                if !catch_unwind(AssertUnwindSafe(go_through)).unwrap_or(false) {
                    // The end is for the task to see to, and so is what went wrong.
                    called.task.wake();
                }
            }
        }
    }
    // Whoever is at it further out drives what is called for here as well.
    let outermost = HERE.with_borrow_mut(|here| {
        let outermost = here.is_none();
        here.get_or_insert_default();
        outermost
    });
    // Only made where it is wanted: it drives when it goes.
    let _scope = outermost.then(|| Scope);
    work()
}

impl Driver {
    /// With nothing under way, for the runtime of the moment.
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared {
            under_way: Mutex::new(Some(FuturesUnordered::new())),
            newcomers: Mutex::new(Some(Vec::new())),
            called: AtomicBool::new(false),
            at_it: AtomicBool::new(false),
            task: AtomicWaker::new(),
            runtime: Handle::current(),
        }))
    }

    /// Has `work` done beside what else is under way, or not at all once the connection's task has gone. A panic ends nothing
    /// but its own work.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let work = AssertUnwindSafe(work).catch_unwind().map(|ended| {
            if ended.is_err() {
                tracing::error!("what a connection had under way panicked");
            }
        });
        if let Some(newcomers) = &mut *self.0.newcomers.lock() {
            newcomers.push(Box::pin(work));
        }
        self.0.wake_by_ref();
    }

    /// The connection's task: drives until nothing is under way any more. What is, when this is dropped, is dropped too.
    pub(super) fn run(self) -> impl Future<Output = ()> + Send {
        let own = Own(self.0);
        poll_fn(move |cx| {
            own.0.task.register(cx.waker());
            own.0.turn(ROUNDS)
        })
    }
}

impl Shared {
    /// Goes through what is called for, `rounds` times at most; the rest is the task's. Ready once nothing is under way. Where
    /// somebody else is at it, that one does so.
    fn turn(self: &Arc<Self>, rounds: usize) -> Poll<()> {
        let waker = Waker::from(Arc::clone(self));
        let mut cx = Context::from_waker(&waker);
        let _entered = self.runtime.enter();
        for _ in 0..rounds {
            let Some(mut under_way) = lock_or_leave(&self.under_way, &self.called) else { return Poll::Pending };
            let Some(all) = under_way.as_mut() else { return Poll::Ready(()) };
            let at_it = AtIt::begin(&self.at_it);
            self.called.store(false, SeqCst);
            all.extend(self.newcomers.lock().iter_mut().flat_map(std::mem::take));
            let left = loop {
                match all.poll_next_unpin(&mut cx) {
                    Poll::Ready(Some(())) => {}
                    Poll::Ready(None) => break false,
                    Poll::Pending => break true,
                }
            };
            drop((at_it, under_way));
            if !was_left(&self.called) {
                return if left { Poll::Pending } else { Poll::Ready(()) };
            }
        }
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

/// Somebody is, as long as this lives. What is called for meanwhile wakes nobody, so it must end however that ends.
struct AtIt<'a>(&'a AtomicBool);

impl<'a> AtIt<'a> {
    fn begin(at_it: &'a AtomicBool) -> Self {
        at_it.store(true, SeqCst);
        Self(at_it)
    }
}

impl Drop for AtIt<'_> {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
    }
}

/// The connection's task has it. Futures under way hold on to their driver, so with the task they must go.
struct Own(Arc<Shared>);

impl Drop for Own {
    fn drop(&mut self) {
        let mut under_way = self.0.under_way.lock();
        let all = (under_way.take(), self.0.newcomers.lock().take());
        drop(under_way);
        drop(all);
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

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn what_a_thread_calls_for_is_done_there_before_it_goes_on() {
        let driver = Driver::new();
        let (answer, answered) = oneshot::channel();
        let (done, is_done) = std::sync::mpsc::channel::<ThreadId>();
        driver.spawn(async move {
            // A timer and a task of its own, as on the connection's runtime.
            let word = timeout(PATIENCE, answered).await.unwrap().unwrap();
            let beside = tokio::spawn(async move { word });
            done.send(thread::current().id()).unwrap();
            beside.await.unwrap();
        });
        let running = tokio::spawn(driver.run());
        // It has begun, and waits.
        tokio::task::yield_now().await;
        let there = thread::spawn(move || {
            let (within, around) = driven_here(|| {
                driven_here(|| answer.send("word").unwrap());
                // Of two around each other the outer one drives, and is not kept from it by the end of the inner one.
                driven_here(|| ());
                (is_done.try_recv().is_ok(), is_done)
            });
            (within, around.try_recv().map(|by| by == thread::current().id()))
        });
        assert_eq!(there.join().unwrap(), (false, Ok(true)));
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
                        let send = || {
                            while sender.try_send(1).is_err() {
                                thread::yield_now();
                            }
                        };
                        if (nth + caller) % 3 == 0 { send() } else { driven_here(send) }
                    }
                }
            })
            .collect();
        let running = tokio::spawn(driver.run());
        let callers: Vec<_> = callers.into_iter().map(thread::spawn).collect();
        // Each waits for room that only others' work gives it.
        timeout(PATIENCE, running).await.expect("no call is lost").unwrap();
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
    async fn with_the_connections_task_goes_all_that_is_under_way_and_all_that_comes_later() {
        let driver = Driver::new();
        let own = driver.clone();
        let held = |held: oneshot::Sender<()>| {
            let own = own.clone();
            async move {
                let _held = (held, own);
                std::future::pending::<()>().await;
            }
        };
        let (before, gone) = oneshot::channel();
        driver.spawn(held(before));
        let running = tokio::spawn(driver.run());
        tokio::task::yield_now().await;
        running.abort();
        timeout(PATIENCE, gone).await.expect("nobody holds it").unwrap_err();
        let (after, gone) = oneshot::channel();
        own.spawn(held(after));
        timeout(PATIENCE, gone).await.expect("nobody holds it").unwrap_err();
    }

    /// What waits for `word` in a driver whose task runs, and that task.
    async fn waiting(word: oneshot::Receiver<()>, turns: usize) -> tokio::task::JoinHandle<()> {
        let driver = Driver::new();
        driver.spawn(async move {
            word.await.unwrap();
            for _ in 0..turns {
                // Calls for itself at once, and not by the runtime, whose own turns these are not.
                let mut again = true;
                poll_fn(|cx| {
                    cx.waker().wake_by_ref();
                    if std::mem::take(&mut again) { Poll::Pending } else { Poll::Ready(()) }
                })
                .await;
            }
        });
        let running = tokio::spawn(driver.run());
        tokio::task::yield_now().await;
        running
    }

    #[tokio::test]
    async fn what_ends_elsewhere_or_is_too_much_there_is_for_the_task_to_finish() {
        for turns in [0, 100] {
            let (word, is_said) = oneshot::channel();
            let running = waiting(is_said, turns).await;
            thread::spawn(move || driven_here(|| word.send(()).unwrap())).join().unwrap();
            timeout(PATIENCE, running).await.expect("the task is told").unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_called_for_before_a_panic_is_done_all_the_same_and_within_another_too() {
        let (word, is_said) = oneshot::channel();
        let running = waiting(is_said, 0).await;
        let panicked = thread::spawn(move || {
            driven_here(|| {
                word.send(()).unwrap();
                panic!("after the word");
            })
        });
        panicked.join().unwrap_err();
        timeout(PATIENCE, running).await.expect("the task is told").unwrap();

        let (word, is_said) = oneshot::channel();
        let running = waiting(is_said, 0).await;
        let within = thread::spawn(move || driven_here(|| driven_here(|| word.send(()).unwrap())));
        within.join().unwrap();
        timeout(PATIENCE, running).await.expect("the outer one drives").unwrap();
    }
}
