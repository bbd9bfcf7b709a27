//! A few threads that compute together. In: a number of tasks and what to do for each. Out: all done. Never here: a task
//! done twice or by nobody; which thread takes which task decides nothing about its result.
//!
//! A product of one token takes a few dozen microseconds, so waking a thread must not take as long: members look for work
//! for a moment before they go to sleep. One team serves the whole process. Two threads that want it at once do not wait
//! for each other: the second does its tasks alone.

use std::{
    hint::spin_loop,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, Thread},
};

use parking_lot::{Mutex, MutexGuard};

/// How often a member looks for work before it lets others have the processor: some µs, as its process has company.
const LOOKS: u32 = 50;
/// And how often it does that before it sleeps. Waking it takes longer than many a product.
const YIELDS: u32 = 200;
/// How often the caller looks whether the others are done before it lets others run.
const LOOKS_AT_END: u32 = 100;

/// The next task of work that has none left, whatever its number.
const CLOSED: u64 = u32::MAX as u64;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Does `task(0)` to `task(tasks - 1)`, each once, on this thread and those of the team that have time.
pub(crate) fn run(tasks: usize, task: &Task<'_>) {
    let team = TEAM.get();
    match team.and_then(|team| team.lead.try_lock().map(|lead| (team, lead))) {
        Some((team, lead)) if tasks > 1 && !team.members.is_empty() => team.run(lead, tasks, task),
        _ => (0..tasks).for_each(task),
    }
}

/// Wakes the members that sleep, since there will be work soon: they are awake when it is there.
pub(crate) fn rouse() {
    if let Some(team) = TEAM.get() {
        team.shared
            .sleeping
            .iter()
            .zip(&team.members)
            .filter(|(sleeping, _)| sleeping.load(Relaxed))
            .for_each(|(_, member)| member.unpark());
    }
}

/// Threads that compute here, the caller's among them.
pub(crate) fn threads() -> usize {
    TEAM.get().map_or(1, |team| team.members.len() + 1)
}

/// Makes the process's team, of `threads` threads with the caller's. The first call decides.
pub(crate) fn gather(threads: usize) {
    TEAM.get_or_init(|| Team::of(threads));
}

static TEAM: OnceLock<Team> = OnceLock::new();

struct Team {
    shared: Arc<Shared>,
    members: Vec<Thread>,
    /// Held by whoever has work done.
    lead: Mutex<()>,
}

struct Shared {
    /// Which work (upper half) and its next task (lower half): a task is taken by counting up.
    next: AtomicU64,
    tasks: AtomicUsize,
    done: AtomicUsize,
    /// A pointer to the caller's fat pointer to the task.
    task: AtomicPtr<()>,
    panicked: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

impl Team {
    fn of(threads: usize) -> Self {
        let others = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            next: AtomicU64::new(0),
            tasks: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            task: AtomicPtr::new(std::ptr::null_mut()),
            panicked: AtomicBool::new(false),
            sleeping: (0..others).map(|_| AtomicBool::new(false)).collect(),
        });
        let member = |number| {
            let shared = Arc::clone(&shared);
            let named = thread::Builder::new().name(format!("kernel-{number}"));
            // A team that cannot have a thread is smaller, and does the same.
            named.spawn(move || shared.serve(number)).ok().map(|handle| handle.thread().clone())
        };
        let members = (0..others).map_while(member).collect();
        Self { shared, members, lead: Mutex::new(()) }
    }

    fn run(&self, _lead: MutexGuard<'_, ()>, tasks: usize, task: &Task<'_>) {
        let shared = &*self.shared;
        let last = shared.next.load(Relaxed) >> 32;
        // Closed first: whoever still looks at the last work must not take its end for part of this one.
        shared.next.store(last << 32 | CLOSED, SeqCst);
        shared.tasks.store(tasks, Relaxed);
        shared.done.store(0, Relaxed);
        shared.task.store((&raw const task).cast_mut().cast(), Relaxed);
        // What a member finds under this work's number was written before it.
        shared.next.store((last + 1) << 32, SeqCst);
        for (sleeping, member) in shared.sleeping.iter().zip(&self.members) {
            if sleeping.load(SeqCst) {
                member.unpark();
            }
        }
        while shared.do_one() {}
        // What is left is under way on other threads.
        let mut looks = 0;
        while shared.done.load(Acquire) < tasks {
            looks += 1;
            if looks < LOOKS_AT_END { spin_loop() } else { thread::yield_now() }
        }
        if shared.panicked.swap(false, Relaxed) {
            panic!("a kernel panicked");
        }
    }
}

impl Shared {
    /// Takes a task of the present work and does it; `false` where none is left.
    fn do_one(&self) -> bool {
        let mut seen = self.next.load(Acquire);
        loop {
            let index = (seen & CLOSED) as usize;
            let task = self.task.load(Relaxed);
            if index >= self.tasks.load(Relaxed) {
                return false;
            }
            match self.next.compare_exchange_weak(seen, seen + 1, AcqRel, Acquire) {
                Ok(_) => {
                    // SAFETY: the task was taken, so its work is not done, and `run` keeps the pointer's target, which
                    // lives on its stack, until all taken tasks are done. The pointer was read for this very work: it is
                    // only written while work is closed, and then no task could have been taken.
                    let task = unsafe { &*task.cast::<&Task<'_>>() };
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| task(index)));
                    if outcome.is_err() {
                        self.panicked.store(true, Relaxed);
                    }
                    self.done.fetch_add(1, Release);
                    return true;
                }
                Err(now) => seen = now,
            }
        }
    }

    fn serve(&self, number: usize) {
        let mut looks = 0;
        loop {
            let seen = self.next.load(SeqCst);
            if self.do_one() {
                looks = 0;
                continue;
            }
            looks += 1;
            if looks < LOOKS + YIELDS {
                if looks < LOOKS {
                    spin_loop();
                } else {
                    thread::yield_now();
                }
                continue;
            }
            self.sleeping[number].store(true, SeqCst);
            // Work that came between the look and the note is seen here; work that comes later wakes.
            if self.next.load(SeqCst) >> 32 == seen >> 32 {
                thread::park();
            }
            self.sleeping[number].store(false, SeqCst);
            looks = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once_whoever_calls() {
        gather(3);
        let callers: Vec<_> = (0..3)
            .map(|caller| {
                thread::spawn(move || {
                    for round in 0..500 {
                        let tasks = (round * 7 + caller) % 40;
                        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        run(tasks, &|task| {
                            counts[task].fetch_add(1, Relaxed);
                        });
                        assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "round {round}");
                    }
                })
            })
            .collect();
        callers.into_iter().for_each(|caller| caller.join().expect("no task is lost"));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        gather(3);
        let work = || run(8, &|task| assert_ne!(task, 5));
        assert!(std::panic::catch_unwind(work).is_err());
        run(8, &|_| {});
    }
}
