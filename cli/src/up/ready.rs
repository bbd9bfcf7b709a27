//! When a local cluster is ready, and the file that says so: a snapshot of the placement comes in, what is still
//! missing goes out. Pure, but for the file, which appears whole or not at all.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use conclave_placement::{ClusterState, ExpertId, LayerIdx, RouterId, WorkerId, WorkerState};
use serde::{Deserialize, Serialize};

/// Whom `up` started, and what they shall hold.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    pub routers: Vec<RouterId>,
    pub workers: Vec<WorkerId>,
    /// Copies of each expert.
    pub replicas: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not registered.
    Absent,
    Starting,
    Serving,
    Draining,
}

/// How far one worker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WorkerProgress {
    pub id: WorkerId,
    pub phase: Phase,
    /// Experts it holds of those assigned, over all layers.
    pub resident: usize,
    /// Experts the plan gives it; `None` without a plan.
    pub assigned: Option<usize>,
}

impl WorkerProgress {
    fn of(state: &ClusterState, id: &WorkerId) -> Self {
        let assigned = state.plan.as_ref().map(|plan| plan.assigned_to(id));
        let record = state.workers.get(id);
        let resident = match (&assigned, record) {
            (Some(assigned), Some(record)) => {
                assigned.iter().filter(|(layer, expert)| record.resident.contains(*layer, *expert)).count()
            }
            (None, Some(record)) => record.resident.len(),
            (_, None) => 0,
        };
        let phase = match record.map(|record| record.state) {
            None => Phase::Absent,
            Some(WorkerState::Starting) => Phase::Starting,
            Some(WorkerState::Serving) => Phase::Serving,
            Some(WorkerState::Draining) => Phase::Draining,
        };
        Self { id: id.clone(), phase, resident, assigned: assigned.map(|assigned| assigned.len()) }
    }

    /// A worker that the plan gives nothing (more workers than experts) has nothing to serve, and is done as it is.
    fn is_settled(&self) -> bool {
        self.phase == Phase::Serving || (self.phase == Phase::Starting && self.assigned == Some(0))
    }
}

/// How far a cluster is from serving.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Readiness {
    pub workers: Vec<WorkerProgress>,
    /// Experts of all layers; 0 while no model is known.
    pub experts: usize,
    /// Experts with fewer holders than wanted.
    pub short: usize,
    /// Routers that have not registered.
    pub absent_routers: Vec<RouterId>,
}

impl Readiness {
    pub(super) fn of(state: &ClusterState, expected: &Expected) -> Self {
        let workers = expected.workers.iter().map(|id| WorkerProgress::of(state, id)).collect();
        let wanted = expected.replicas.min(expected.workers.len());
        let all = experts(state);
        let short = all.iter().filter(|(layer, expert)| state.holders(*layer, *expert).count() < wanted).count();
        let absent = expected.routers.iter().filter(|id| !state.routers.contains_key(*id));
        Self { workers, experts: all.len(), short, absent_routers: absent.cloned().collect() }
    }

    /// Every worker serves, every expert has its copies, every router is registered. Whether routers are healthy only
    /// they can say.
    pub(super) fn is_complete(&self) -> bool {
        self.experts > 0
            && self.short == 0
            && self.absent_routers.is_empty()
            && self.workers.iter().all(WorkerProgress::is_settled)
    }

    /// What is missing, for a start that takes long; `unhealthy` names the routers that do not serve yet.
    pub(super) fn missing(&self, unhealthy: &[RouterId]) -> String {
        let mut missing = Vec::new();
        let absent = self.absent_routers.iter().map(|id| format!("{id} to register"));
        missing.extend(absent);
        for worker in self.workers.iter().filter(|worker| !worker.is_settled()) {
            missing.push(match worker.phase {
                Phase::Absent => format!("{} to register", worker.id),
                _ => format!("{} to serve", worker.id),
            });
        }
        if self.experts == 0 {
            missing.push("the model's identity".to_owned());
        } else if self.short > 0 {
            missing.push(format!("{} of {} experts to be resident", self.short, self.experts));
        }
        if missing.is_empty() {
            missing.extend(unhealthy.iter().map(|id| format!("{id} to say that it serves")));
        }
        missing.join(", ")
    }
}

/// Every routed expert of the model.
fn experts(state: &ClusterState) -> Vec<(LayerIdx, ExpertId)> {
    let Some(model) = &state.model else { return Vec::new() };
    let count = u16::try_from(model.experts).unwrap_or(u16::MAX);
    model.moe_layers.iter().flat_map(|layer| (0..count).map(|expert| (*layer, ExpertId(expert)))).collect()
}

/// The ready file's content. Its keys are a contract with scripts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// The first router's public address.
    pub(crate) inference: String,
    /// The first router's admin address.
    pub(crate) admin: String,
    pub(crate) routers: Vec<ReadyRouter>,
    pub(crate) workers: Vec<ReadyWorker>,
    /// The store, as `--store` takes it.
    pub(crate) store: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReadyRouter {
    pub(crate) pid: u32,
    pub(crate) inference: String,
    pub(crate) admin: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReadyWorker {
    pub(crate) id: String,
    pub(crate) pid: u32,
    pub(crate) address: String,
}

impl Ready {
    /// What to write about a complete cluster. `pid` tells the process of a name.
    ///
    /// # Errors
    /// Somebody expected is not registered.
    pub(super) fn of(
        state: &ClusterState,
        expected: &Expected,
        store: &str,
        pid: impl Fn(&str) -> Option<u32>,
    ) -> anyhow::Result<Self> {
        let mut routers = Vec::new();
        for id in &expected.routers {
            let (record, pid) = state.routers.get(id).zip(pid(id.as_str())).with_context(|| format!("{id} is gone"))?;
            let inference = reachable(&record.inference_address);
            routers.push(ReadyRouter { pid, inference, admin: reachable(&record.admin_address) });
        }
        let mut workers = Vec::new();
        for id in &expected.workers {
            let (record, pid) = state.workers.get(id).zip(pid(id.as_str())).with_context(|| format!("{id} is gone"))?;
            workers.push(ReadyWorker { id: id.to_string(), pid, address: reachable(&record.address) });
        }
        let first = routers.first().context("a cluster without a router")?;
        let (inference, admin) = (first.inference.clone(), first.admin.clone());
        Ok(Self { inference, admin, routers, workers, store: store.to_owned() })
    }

    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no ready file", path.display()))
    }

    /// Writes beside `path` and renames, so that whoever waits for the file never sees half of it.
    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let write = || {
            let mut file = std::fs::File::create(&temporary)?;
            file.write_all(serde_json::to_string(self)?.as_bytes())?;
            file.write_all(b"\n")?;
            std::fs::rename(&temporary, path)
        };
        write().map_err(|error: std::io::Error| {
            // The error is what matters, not what it left.
            let _ = std::fs::remove_file(&temporary);
            anyhow::Error::new(error).context(format!("cannot write the ready file {}", path.display()))
        })
    }
}

/// An address that a process of this machine can connect to: a listener on all interfaces is reached over loopback.
pub(crate) fn reachable(address: &str) -> String {
    let Ok(mut socket) = address.parse::<SocketAddr>() else { return address.to_owned() };
    match socket {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => socket.set_ip(std::net::Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => socket.set_ip(std::net::Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    socket.to_string()
}

#[cfg(test)]
pub(crate) mod tests;
