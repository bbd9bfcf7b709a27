//! One real etcd of one member, on free ports and in a folder of its own. It dies with whoever started it.
//!
//! In: the `etcd` on the path. Out: an address. Never here: a silent skip; without etcd the story fails and says how to get
//! one.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use conclave_placement::store::Store;
use conclave_placement::store::etcd::EtcdStore;
use tempfile::TempDir;

pub(crate) struct EtcdProcess {
    child: Child,
    folder: TempDir,
    ports: (u16, u16),
}

impl EtcdProcess {
    /// Starts it and waits until it answers.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let mut last = None;
        // A port that is free now may be taken a moment later.
        for _ in 0..5 {
            let folder = tempfile::tempdir().context("a folder for etcd")?;
            let ports = free_ports()?;
            let mut etcd = Self { child: spawn(folder.path(), ports)?, folder, ports };
            match etcd.ready().await {
                Ok(()) => return Ok(etcd),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("etcd was never started")?)
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.0)
    }

    pub(crate) fn store(&self) -> EtcdStore {
        EtcdStore::new(vec![self.endpoint()])
    }

    /// As `kill -9`.
    pub(crate) fn kill(&mut self) {
        // Either fails only if it is dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Kills it and starts it again on the same folder and ports.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.child = spawn(self.folder.path(), self.ports)?;
        self.ready().await
    }

    /// Stops it from running without ending it: connections stay open and nobody answers. The kernel stops a process's
    /// threads one by one after the signal was sent, so this comes back when the last of them stands.
    pub(crate) async fn pause(&self) -> anyhow::Result<()> {
        self.signal("-STOP")?;
        for _ in 0..600 {
            if self.stands_still()? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bail!("etcd does not stop")
    }

    fn stands_still(&self) -> anyhow::Result<bool> {
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
            // The state follows the name, which is in brackets and may hold anything.
            let state = stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('T'));
            if state != Some(true) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(crate) fn resume(&self) -> anyhow::Result<()> {
        self.signal("-CONT")
    }

    fn signal(&self, signal: &str) -> anyhow::Result<()> {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().context("kill")?;
        anyhow::ensure!(status.success(), "kill {signal} failed");
        Ok(())
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let store = self.store();
        for _ in 0..600 {
            if let Some(status) = self.child.try_wait()? {
                bail!("etcd ended at once: {status}");
            }
            if store.get("ready?").await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("etcd does not answer at {}", self.endpoint())
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_ports() -> anyhow::Result<(u16, u16)> {
    let [one, other] = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok((one.local_addr()?.port(), other.local_addr()?.port()))
}

fn spawn(folder: &Path, (client, peer): (u16, u16)) -> anyhow::Result<Child> {
    let client = format!("http://127.0.0.1:{client}");
    let peer = format!("http://127.0.0.1:{peer}");
    // Where there is `setpriv`, etcd ends even if the test is killed.
    let has_setpriv = Command::new("setpriv").arg("--version").stdout(Stdio::null()).status().is_ok();
    let mut command = match has_setpriv {
        true => Command::new("setpriv"),
        false => Command::new("etcd"),
    };
    if has_setpriv {
        which_etcd()?;
        command.args(["--pdeathsig", "KILL", "etcd"]);
    }
    command
        .args(["--name", "story", "--log-level", "error", "--logger", "zap"])
        .arg("--data-dir")
        .arg(folder)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("story={peer}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().context(MISSING)
}

const MISSING: &str =
    "this test needs a real etcd: `apt-get install etcd-server`, or put etcd 3.4 or newer on the path";

fn which_etcd() -> anyhow::Result<()> {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.context(MISSING).map(|_| ())
}
