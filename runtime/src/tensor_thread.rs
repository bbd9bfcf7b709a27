//! Threads that own state which must not be shared: libtorch's thread counts and no-grad mode are per thread, and a
//! kernel must not sit on the thread that serves the network. Jobs come in over a bounded queue, their results go out to
//! whoever awaits them. A job's panic fails that job alone; no job is ever run on a tokio thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::{mpsc, oneshot};

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the queue of this thread is full")]
    Busy,
    #[error("this thread has ended")]
    Closed,
    #[error("panic: {0}")]
    Panicked(String),
}

/// Why a thread did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError<E> {
    #[error("cannot start thread {name}: {source}")]
    Thread { name: String, source: std::io::Error },
    #[error("thread {name} could not set up its state: {source}")]
    Init { name: String, source: E },
    #[error("thread {name} panicked while setting up its state: {message}")]
    Panicked { name: String, message: String },
}

/// A thread that owns an `S`. `S` is made and dropped on it, so it need not be `Send`. Dropping the handle lets the
/// thread end after the jobs that are already queued.
#[derive(Debug)]
pub struct TensorThread<S> {
    jobs: mpsc::Sender<Job<S>>,
    ended: oneshot::Receiver<()>,
}

impl<S: 'static> TensorThread<S> {
    /// Starts the thread and waits until `init` has made its state there. At most `queue` jobs wait (at least one).
    pub async fn spawn<E: Send + 'static>(
        name: &str,
        queue: usize,
        init: impl FnOnce() -> Result<S, E> + Send + 'static,
    ) -> Result<Self, SpawnError<E>> {
        let (jobs, mut queued) = mpsc::channel::<Job<S>>(queue.max(1));
        let (started, starting) = oneshot::channel();
        let (ending, ended) = oneshot::channel();
        let run = move || {
            // Held until the state has been dropped: `close` waits for it.
            let _ending = ending;
            let mut state = match catch_unwind(AssertUnwindSafe(init)) {
                Ok(Ok(state)) => {
                    let _ = started.send(Ok(()));
                    state
                }
                // A caller that no longer waits for the start needs no thread either.
                Ok(Err(error)) => return drop(started.send(Err(Ok(error)))),
                Err(panic) => return drop(started.send(Err(Err(panic_message(&*panic))))),
            };
            while let Some(job) = queued.blocking_recv() {
                job(&mut state);
            }
        };
        let name = name.to_owned();
        if let Err(source) = std::thread::Builder::new().name(name.clone()).spawn(run) {
            return Err(SpawnError::Thread { name, source });
        }
        match starting.await {
            Ok(Ok(())) => Ok(Self { jobs, ended }),
            Ok(Err(Ok(source))) => Err(SpawnError::Init { name, source }),
            Ok(Err(Err(message))) => Err(SpawnError::Panicked { name, message }),
            Err(_) => Err(SpawnError::Panicked { name, message: "the thread vanished".to_owned() }),
        }
    }

    /// Runs `job` on the thread, after those queued before it; waits while the queue is full. A job whose caller went
    /// away while it was queued still runs.
    pub async fn run<R: Send + 'static>(&self, job: impl FnOnce(&mut S) -> R + Send + 'static) -> Result<R, Error> {
        let (job, answer) = isolated(job);
        self.jobs.send(job).await.map_err(|_| Error::Closed)?;
        answer.await
    }

    /// As [`TensorThread::run`], but fails with [`Error::Busy`] at once where the queue is full. The job is queued when
    /// this returns; the future only waits for its result.
    pub fn try_run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> Result<Answer<R>, Error> {
        let (job, answer) = isolated(job);
        self.jobs.try_send(job).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => Error::Busy,
            mpsc::error::TrySendError::Closed(_) => Error::Closed,
        })?;
        Ok(answer)
    }

    /// Takes no more jobs, lets the queued ones finish, and waits until the state has been dropped.
    pub async fn close(self) {
        let Self { jobs, ended } = self;
        drop(jobs);
        // The sender is never used: its end is the message.
        let _ = ended.await;
    }
}

/// What a job will have returned, or why it did not. Dropping it does not stop the job.
#[derive(Debug)]
pub struct Answer<R>(oneshot::Receiver<Result<R, Error>>);

impl<R> Future for Answer<R> {
    type Output = Result<R, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|answer| answer.map_err(|_| Error::Closed)?)
    }
}

/// Wraps a job so that its panic becomes its result.
fn isolated<S, R: Send + 'static>(job: impl FnOnce(&mut S) -> R + Send + 'static) -> (Job<S>, Answer<R>) {
    let (reply, answer) = oneshot::channel();
    let job = move |state: &mut S| {
        let result = catch_unwind(AssertUnwindSafe(|| job(state)));
        // Nobody may be waiting any more.
        let _ = reply.send(result.map_err(|panic| Error::Panicked(panic_message(&*panic))));
    };
    (Box::new(job), Answer(answer))
}

/// Runs the future that `make` returns on a thread of its own, under a current-thread tokio runtime and a `LocalSet`,
/// so the future need not be `Send` and may `spawn_local`. The returned future waits for its end; a panic on the
/// thread is an error there.
pub fn spawn_local<F: Future>(
    name: &str,
    make: impl FnOnce() -> F + Send + 'static,
) -> std::io::Result<Answer<F::Output>>
where
    F::Output: Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (reply, answer) = oneshot::channel();
    let run = move || {
        let all = || tokio::task::LocalSet::new().block_on(&runtime, async { make().await });
        let result = catch_unwind(AssertUnwindSafe(all));
        let _ = reply.send(result.map_err(|panic| Error::Panicked(panic_message(&*panic))));
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(Answer(answer))
}

/// What a panic said, where it said anything printable.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "panic without a message".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::rc::Rc;

    use super::*;

    #[tokio::test]
    async fn a_panic_fails_its_own_job_and_no_other() {
        let thread = TensorThread::spawn("counter", 4, || Ok::<_, Infallible>(0)).await.unwrap();
        assert_eq!(
            thread
                .run(|n| {
                    *n += 1;
                    *n
                })
                .await
                .unwrap(),
            1
        );
        let error = thread.run(|_: &mut i32| panic!("out of range")).await.map(|(): ()| ()).unwrap_err();
        assert!(matches!(&error, Error::Panicked(message) if message == "out of range"), "{error}");
        assert_eq!(
            thread
                .run(|n| {
                    *n += 1;
                    *n
                })
                .await
                .unwrap(),
            2
        );
    }

    #[tokio::test]
    async fn a_full_queue_is_busy_and_drains() {
        let thread = TensorThread::spawn("slow", 1, || Ok::<_, Infallible>(())).await.unwrap();
        let (release, hold) = std::sync::mpsc::channel::<()>();
        let (entered, inside) = oneshot::channel();
        let first = thread
            .try_run(move |()| {
                let _ = entered.send(());
                let _ = hold.recv();
            })
            .unwrap();
        inside.await.unwrap();
        let second = thread.try_run(|()| 2).unwrap();
        assert!(matches!(thread.try_run(|()| 3).map(|_| ()), Err(Error::Busy)));
        release.send(()).unwrap();
        first.await.unwrap();
        assert_eq!(second.await.unwrap(), 2);
    }

    #[tokio::test]
    async fn close_waits_for_queued_jobs_and_for_the_state() {
        struct State(Option<oneshot::Sender<()>>, #[allow(dead_code)] Rc<()>);
        impl Drop for State {
            fn drop(&mut self) {
                let _ = self.0.take().map(|dropped| dropped.send(()));
            }
        }
        let (dropped, mut gone) = oneshot::channel();
        let init = move || Ok::<_, Infallible>(State(Some(dropped), Rc::new(())));
        let thread = TensorThread::spawn("state", 4, init).await.unwrap();
        let job = thread.try_run(|_| 7).unwrap();
        thread.close().await;
        assert!(gone.try_recv().is_ok());
        assert_eq!(job.await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_state_that_cannot_be_made_is_reported() {
        let error = TensorThread::<()>::spawn("bad", 1, || Err("no memory")).await.unwrap_err();
        assert_eq!(error.to_string(), "thread bad could not set up its state: no memory");
    }

    #[tokio::test]
    async fn a_local_thread_runs_what_is_not_send_and_reports_its_panic() {
        let sum = spawn_local("engine", || async {
            let shared = Rc::new(20);
            let other = Rc::clone(&shared);
            *shared + tokio::task::spawn_local(async move { *other + 2 }).await.unwrap()
        });
        assert_eq!(sum.unwrap().await.unwrap(), 42);
        let broken = spawn_local("engine", || async { panic!("broken engine") });
        assert!(
            matches!(broken.unwrap().await.map(|(): ()| ()), Err(Error::Panicked(message)) if message == "broken engine")
        );
    }
}
