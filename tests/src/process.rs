//! One child process: started, signalled, awaited, its output kept.
//!
//! In: a program and its arguments. Out: its exit status and what it said. Never here: a child that outlives the test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};
use tokio::process::{Child, Command};

use crate::eventually::soon;

/// Lines of a log that a failing test shows.
const SHOWN_LINES: usize = 60;

/// A running or ended child. Killed when dropped; then, in a failing test, the end of its output is printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`. Its output goes to `folder/name.log`, appended where a process of that name was there before.
    pub fn spawn(name: &str, program: &Path, arguments: &[String], folder: &Path) -> Self {
        let log = folder.join(format!("{name}.log"));
        let child = start(name, program, arguments, &log);
        Self { name: name.to_owned(), program: program.to_owned(), arguments: arguments.to_vec(), child, log }
    }

    /// Starts it once more, as it was started before. It must have ended.
    pub async fn again(&mut self) {
        self.ended().await;
        self.child = start(&self.name, &self.program, &self.arguments, &self.log);
    }

    /// Starts it once more with one more argument. It must have ended.
    pub async fn again_with(&mut self, argument: &str) {
        let flag = argument.split('=').next().unwrap_or(argument);
        self.arguments.retain(|other| other.split('=').next() != Some(flag));
        self.arguments.push(argument.to_owned());
        self.again().await;
    }

    /// The name it was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, while it was not awaited.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends `signal`; nothing happens where the process has ended already.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            kill_process(pid, signal).unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
        }
    }

    /// Kills it (SIGKILL) and awaits its end.
    pub async fn kill(&mut self) {
        soon(&format!("the end of {}", self.name), self.child.kill()).await.expect("a child can be killed");
    }

    /// Awaits its end by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        soon(&format!("{} to end", self.name), self.child.wait()).await.expect("a child can be awaited")
    }

    /// Asks it to leave (SIGTERM) and awaits its end.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// What it said last of `field`, as its log has it: `field=value`.
    pub fn told(&self, field: &str) -> Option<String> {
        let log = self.log();
        let value = log.split_whitespace().rev().find_map(|word| word.strip_prefix(field)?.strip_prefix('='));
        value.map(str::to_owned)
    }

    /// All it said so far.
    pub fn log(&self) -> String {
        if !self.log.is_file() {
            // A device that somebody put in its place has no end.
            return String::new();
        }
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let skipped = lines.len().saturating_sub(SHOWN_LINES);
            eprintln!("--- {} ({skipped} lines before these)\n{}", self.name, lines[skipped..].join("\n"));
        }
    }
}

fn start(name: &str, program: &Path, arguments: &[String], log: &Path) -> Child {
    let output = File::options().create(true).append(true).open(log).expect("a log file in the test's own folder");
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command.stdout(output.try_clone().expect("a second handle")).stderr(output);
    for (variable, _) in std::env::vars_os() {
        // What the person at the keyboard set for a cluster of their own is not for the test's.
        if variable.to_string_lossy().starts_with("CONCLAVE_") {
            command.env_remove(variable);
        }
    }
    command.spawn().unwrap_or_else(|error| panic!("cannot start {} as {name}: {error}", program.display()))
}

/// The folder that cargo builds into.
pub fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(3).expect("tests lie in target/PROFILE/deps").to_owned()
}

/// The project's own binary `name`, as `cargo build --workspace` left it beside this test.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    let binary = profile.join(name);
    assert!(
        binary.is_file(),
        "{} is missing: run `cargo build --workspace` first (cargo builds no other package's binaries for a test; \
         `make test` does both)",
        binary.display()
    );
    binary
}

/// The checkout's root.
pub fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the checkout").to_owned()
}
