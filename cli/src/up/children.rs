//! The processes of a local cluster: program and flags come in, running children with their last log lines and exit
//! statuses go out. Every child is in a process group of its own, so that a terminal's Ctrl-C reaches only `up`, which
//! stops them in order; and dies with `up` whatever happens. Nothing is restarted here.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::future;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::progress::Console;

/// Lines kept of each child, for when it dies.
const TAIL_LINES: usize = 20;

/// The rest of a longer line is dropped.
const MAX_LINE_BYTES: usize = 4096;

/// What workers are left at least after the routers took their time to drain.
const LAST_GRACE: Duration = Duration::from_secs(2);

/// Several processes share one machine: OpenMP threads that spin between products would starve the neighbours.
const QUIET_OPENMP: [(&str, &str); 3] =
    [("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Router,
    Worker,
}

/// A child to be.
#[derive(Debug)]
pub(super) struct Spec {
    pub name: String,
    pub role: Role,
    pub program: PathBuf,
    pub args: Vec<OsString>,
}

/// A child that was started.
pub(super) struct Child {
    pub name: String,
    pub role: Role,
    pub pid: u32,
    /// Set once it has ended; until then its pid is ours to signal.
    pub ended: Option<String>,
    process: tokio::process::Child,
    tail: Arc<Mutex<VecDeque<String>>>,
    log: JoinHandle<()>,
}

impl Child {
    /// Its last log lines, once they have all arrived.
    pub(super) async fn tail(&mut self) -> Vec<String> {
        // The pipe closes with the process; a grandchild that kept it open shall not hold us.
        let _ = timeout(Duration::from_millis(500), &mut self.log).await;
        self.tail.lock().iter().cloned().collect()
    }
}

/// All children, in the order they were started.
pub(super) struct Children {
    all: Vec<Child>,
    console: Console,
    verbose: bool,
}

impl Children {
    /// Children whose warnings, or with `verbose` all log lines, go to `console`.
    pub(super) fn new(console: Console, verbose: bool) -> Self {
        Self { all: Vec::new(), console, verbose }
    }

    /// Starts one. Call it on the main thread: the kernel's parent-death signal follows the thread that started a child.
    pub(super) fn spawn(&mut self, spec: Spec) -> anyhow::Result<()> {
        let mut command = Command::new(&spec.program);
        command
            .args(&spec.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            // One address cannot be that of every child.
            .env_remove("CONCLAVE_ADVERTISE");
        for (name, value) in QUIET_OPENMP {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        let start = || format!("cannot start {} for {}", spec.program.display(), spec.name);
        let mut process = command.spawn().with_context(start)?;
        let pid = process.id().with_context(start)?;
        let stderr = process.stderr.take().with_context(start)?;
        let tail = Arc::new(Mutex::new(VecDeque::with_capacity(TAIL_LINES)));
        let sink = Sink {
            name: spec.name.clone(),
            tail: Arc::clone(&tail),
            console: self.console.clone(),
            verbose: self.verbose,
        };
        let log = tokio::spawn(sink.follow(stderr));
        self.all.push(Child { name: spec.name, role: spec.role, pid, ended: None, process, tail, log });
        Ok(())
    }

    pub(super) fn get(&mut self, index: usize) -> &mut Child {
        &mut self.all[index]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Child> {
        self.all.iter()
    }

    /// How many of a role still run.
    pub(super) fn alive(&self, role: Role) -> usize {
        self.all.iter().filter(|child| child.role == role && child.ended.is_none()).count()
    }

    /// The next child to end, by index. Waits for ever when none is left. Can be dropped at any time.
    pub(super) async fn next_exit(&mut self) -> usize {
        let running = self.all.iter_mut().enumerate().filter(|(_, child)| child.ended.is_none());
        let exits: Vec<_> =
            running.map(|(index, child)| Box::pin(async move { (index, child.process.wait().await) })).collect();
        if exits.is_empty() {
            return future::pending().await;
        }
        let ((index, status), ..) = future::select_all(exits).await;
        self.all[index].ended = Some(describe(status));
        index
    }

    /// SIGTERM to the routers; when they are gone, to the workers that their last requests needed. Whoever is left
    /// after `grace` gets SIGKILL.
    pub(super) async fn stop(&mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        for role in [Role::Router, Role::Worker] {
            self.signal(role, Signal::TERM);
            let deadline = deadline.max(Instant::now() + LAST_GRACE);
            while self.alive(role) > 0 {
                if timeout_at(deadline, self.next_exit()).await.is_err() {
                    break;
                }
            }
            for child in self.all.iter().filter(|child| child.role == role && child.ended.is_none()) {
                self.console.line(&format!("{} did not stop in time: killed", child.name));
            }
            self.signal(role, Signal::KILL);
        }
        self.reap().await;
    }

    /// SIGKILL to all.
    pub(super) async fn kill(&mut self) {
        for role in [Role::Router, Role::Worker] {
            self.signal(role, Signal::KILL);
        }
        self.reap().await;
    }

    /// Waits for children that were killed. The kernel may take a moment to free a large one's memory.
    async fn reap(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.all.iter().any(|child| child.ended.is_none()) {
            if timeout_at(deadline, self.next_exit()).await.is_err() {
                break;
            }
        }
    }

    /// Only to children that were not reaped: their pids cannot belong to anybody else.
    fn signal(&self, role: Role, signal: Signal) {
        for child in self.all.iter().filter(|child| child.role == role && child.ended.is_none()) {
            if let Some(group) = child.process.id().and_then(|pid| Pid::from_raw(pid as i32)) {
                // It may have ended meanwhile, which is what the signal asks for.
                let _ = kill_process_group(group, signal);
            }
        }
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("exit status unknown: {error}"),
    }
}

/// Where a child's log lines go.
struct Sink {
    name: String,
    tail: Arc<Mutex<VecDeque<String>>>,
    console: Console,
    verbose: bool,
}

impl Sink {
    /// Reads until the pipe closes, whatever comes: a child must never block on a full pipe.
    async fn follow(self, stderr: ChildStderr) {
        let mut reader = BufReader::new(stderr);
        while let Some(line) = next_line(&mut reader).await {
            if self.verbose || is_worth_showing(&line) {
                self.console.line(&format!("{} | {line}", self.name));
            }
            let mut tail = self.tail.lock();
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(line);
        }
    }
}

/// The next line without its end, cut at [`MAX_LINE_BYTES`]; `None` at the end of the stream or a read error.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    loop {
        let available = reader.fill_buf().await.ok()?;
        if available.is_empty() {
            return (!line.is_empty()).then(|| String::from_utf8_lossy(&line).into_owned());
        }
        let end = available.iter().position(|byte| *byte == b'\n');
        let piece = &available[..end.unwrap_or(available.len())];
        let room = MAX_LINE_BYTES.saturating_sub(line.len());
        line.extend_from_slice(&piece[..piece.len().min(room)]);
        let used = end.map_or(available.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() {
            return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    }
}

/// Whether a log line is a warning, an error, or no log line at all (a linker's complaint, an abort's message).
fn is_worth_showing(line: &str) -> bool {
    let level = match line.split_once("\"level\":\"") {
        Some((_, rest)) if line.starts_with('{') => rest.split('"').next(),
        _ => line.split_whitespace().nth(1),
    };
    !line.is_empty() && !matches!(level, Some("INFO" | "DEBUG" | "TRACE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_is_shown() {
        for quiet in [
            "2026-01-01T00:00:00.000000Z  INFO ready address=127.0.0.1:1",
            r#"{"timestamp":"2026-01-01T00:00:00Z","level":"DEBUG","message":"a WARN inside"}"#,
            "",
        ] {
            assert!(!is_worth_showing(quiet), "{quiet}");
        }
        for trouble in [
            "2026-01-01T00:00:00.000000Z  WARN the store is away",
            r#"{"timestamp":"2026-01-01T00:00:00Z","level":"ERROR","message":"INFO"}"#,
            "error while loading shared libraries: libtorch_cpu.so",
        ] {
            assert!(is_worth_showing(trouble), "{trouble}");
        }
    }

    #[tokio::test]
    async fn long_lines_are_cut_and_the_last_needs_no_end() {
        let text = format!("one\n{}\nlast", "x".repeat(3 * MAX_LINE_BYTES));
        let mut reader = BufReader::with_capacity(100, text.as_bytes());
        assert_eq!(next_line(&mut reader).await.unwrap(), "one");
        assert_eq!(next_line(&mut reader).await.unwrap().len(), MAX_LINE_BYTES);
        assert_eq!(next_line(&mut reader).await.unwrap(), "last");
        assert_eq!(next_line(&mut reader).await, None);
    }

    fn shell(name: &str, role: Role, script: &str) -> Spec {
        Spec { name: name.to_owned(), role, program: "/bin/sh".into(), args: vec!["-c".into(), script.into()] }
    }

    #[tokio::test]
    async fn a_child_that_dies_leaves_its_status_and_last_lines() {
        let mut children = Children::new(Console::silent(), false);
        children
            .spawn(shell("worker-0", Role::Worker, "for i in $(seq 30); do echo line $i >&2; done; exit 3"))
            .unwrap();
        let index = children.next_exit().await;
        let child = children.get(index);
        assert_eq!(child.ended.as_deref(), Some("exit status: 3"));
        let tail = child.tail().await;
        assert_eq!((tail.len(), tail[0].as_str(), tail[19].as_str()), (20, "line 11", "line 30"));
    }

    /// Every child of `scripts`, once it said so.
    async fn started(scripts: [(&str, Role, &str); 2]) -> Children {
        let mut children = Children::new(Console::silent(), false);
        for (name, role, script) in scripts {
            children.spawn(shell(name, role, script)).unwrap();
        }
        while children.iter().any(|child| child.tail.lock().is_empty()) {
            tokio::task::yield_now().await;
        }
        children
    }

    #[tokio::test]
    async fn a_polite_child_leaves_by_itself() {
        let polite = "trap 'exit 0' TERM; echo set >&2; while :; do sleep 1 & wait; done";
        let children = [("worker-0", Role::Worker, polite), ("router-0", Role::Router, polite)];
        let mut children = started(children).await;
        children.stop(Duration::from_secs(60)).await;
        assert_eq!((children.alive(Role::Router), children.alive(Role::Worker)), (0, 0));
        assert!(children.iter().all(|child| child.ended.as_deref() == Some("exit status: 0")));
    }

    // Time is paused: it jumps to the deadline once everybody waits.
    #[tokio::test(start_paused = true)]
    async fn the_deaf_are_killed() {
        let deaf = "trap '' TERM; echo set >&2; while :; do sleep 1; done";
        let mut children = started([("worker-0", Role::Worker, deaf), ("router-0", Role::Router, deaf)]).await;
        children.stop(Duration::from_secs(10)).await;
        // The jump may outrun the kernel's report of a death; the deaths themselves are certain.
        tokio::time::resume();
        children.reap().await;
        assert!(children.iter().all(|child| child.ended.as_deref() == Some("signal: 9 (SIGKILL)")));
    }
}
