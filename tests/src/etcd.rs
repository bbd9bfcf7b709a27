//! A real etcd of the test's own.
//!
//! In: nothing but the `etcd` program. Out: its address, and its death and return on demand. Never here: a test that is
//! skipped because etcd is missing, or an etcd that somebody else uses.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
};

use conclave_placement::store;
use tempfile::TempDir;

use crate::{
    eventually::eventually,
    process::{Process, Signal},
};

/// One etcd member on free ports, with its data in a folder of its own.
#[derive(Debug)]
pub struct EtcdProcess {
    process: Process,
    program: PathBuf,
    arguments: Vec<String>,
    address: String,
    folder: TempDir,
}

impl EtcdProcess {
    /// Starts one and awaits its first answer.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts one with `own` arguments and awaits its first answer.
    pub async fn start_with(own: &[&str]) -> Self {
        let [client, peer] = free_ports();
        let peer = format!("http://127.0.0.1:{peer}");
        let mut etcd = Self::spawn("test", client, &peer, &format!("test={peer}"), own);
        etcd.answers().await;
        etcd
    }

    /// Starts three that are one cluster and awaits the first answer of each.
    pub async fn start_three() -> [Self; 3] {
        let ports: [u16; 6] = free_ports();
        let peers = [3, 4, 5].map(|index: usize| format!("http://127.0.0.1:{}", ports[index]));
        let all: Vec<String> = peers.iter().enumerate().map(|(index, peer)| format!("test-{index}={peer}")).collect();
        let member =
            |index: usize| Self::spawn(&format!("test-{index}"), ports[index], &peers[index], &all.join(","), &[]);
        let mut members = [0, 1, 2].map(member);
        for member in &mut members {
            member.answers().await;
        }
        members
    }

    fn spawn(name: &str, client: u16, peer: &str, all: &str, own: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("conclave-etcd-").tempdir().expect("a temporary folder");
        let (program, mut arguments) = program();
        let address = format!("http://127.0.0.1:{client}");
        let data = folder.path().join("data").display().to_string();
        for (flag, value) in [
            ("name", name),
            ("data-dir", &data),
            ("listen-client-urls", &address),
            ("advertise-client-urls", &address),
            ("listen-peer-urls", peer),
            ("initial-advertise-peer-urls", peer),
            ("initial-cluster", all),
        ] {
            arguments.push(format!("--{flag}={value}"));
        }
        arguments.extend(own.iter().map(|&argument| argument.to_owned()));
        let process = Process::spawn("etcd", &program, &arguments, folder.path());
        Self { process, program, arguments, address, folder }
    }

    /// As the `--store` flag takes it.
    pub fn spec(&self) -> String {
        format!("etcd={}", self.address)
    }

    /// `http://127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sends it a signal, such as STOP and later CONT.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills it (SIGKILL). What it stored stays.
    pub async fn kill(&mut self) {
        self.process.kill().await;
    }

    /// Starts it again on the same data and ports, and awaits its first answer.
    pub async fn restart(&mut self) {
        self.process.kill().await;
        self.process = Process::spawn("etcd", &self.program, &self.arguments, self.folder.path());
        self.answers().await;
    }

    async fn answers(&mut self) {
        let (process, spec) = (&mut self.process, format!("etcd={}", self.address));
        eventually("etcd's first answer", async || {
            assert!(process.is_running(), "etcd ended while starting:\n{}", process.log());
            let store = store::connect(&spec).ok()?;
            store.get("/conclave-tests/is-etcd-there").await.ok()
        })
        .await;
    }
}

/// `etcd`, started so that it dies with the test even where the test dies of a signal: `setpriv` (util-linux) asks the
/// kernel for that. Where there is no setpriv, only an ordinary end of the test stops it.
fn program() -> (PathBuf, Vec<String>) {
    let etcd = on_path("etcd").unwrap_or_else(|| {
        panic!(
            "these tests need a real etcd and found no `etcd` program: run `make setup`, or install it \
             (Debian and Ubuntu: apt-get install etcd-server; elsewhere: a release of github.com/etcd-io/etcd on PATH)"
        )
    });
    match on_path("setpriv") {
        Some(setpriv) => (setpriv, vec!["--pdeathsig".into(), "KILL".into(), etcd.display().to_string()]),
        None => (etcd, Vec::new()),
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|candidate| Path::is_file(candidate))
}

/// Ports that are free now. All are held until all are known, so that they differ.
fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    held.map(|listener| listener.local_addr().expect("a bound listener has an address").port())
}
