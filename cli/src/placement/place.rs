//! Where a cluster's state is: flags, environment or a ready file come in, a store and what it tells of one cluster goes
//! out. Nothing is written here.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use conclave_placement::view::View;
use conclave_placement::{Cluster, ClusterState, Keys, Store, store};
use tokio_util::sync::CancellationToken;

use crate::up::ready::{Ready, reachable};

/// How long a store may take to tell of a cluster.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Every cluster's keys lie under it.
const ROOT: &str = "/conclave/";

/// Which cluster in which store.
#[derive(Debug, clap::Args)]
pub(super) struct Where {
    /// The store; without it CONCLAVE_STORE, else etcd=http://127.0.0.1:2379.
    #[arg(long, value_name = "etcd=URL")]
    store: Option<String>,
    /// The cluster; without it CONCLAVE_CLUSTER, else the only one in the store.
    #[arg(long, value_name = "NAME")]
    cluster: Option<Cluster>,
    /// Take the store and the cluster from what `conclave up --ready-file` wrote.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["store", "cluster"])]
    ready_file: Option<PathBuf>,
}

/// A cluster that was found.
pub(super) struct Found {
    pub(super) store: Arc<dyn Store>,
    pub(super) cluster: Cluster,
    pub(super) keys: Keys,
    /// As it was then.
    pub(super) state: ClusterState,
}

impl Where {
    pub(super) async fn find(&self) -> anyhow::Result<Found> {
        let ready = self.ready_file.as_deref().map(Ready::read).transpose()?;
        let (spec, named) = match &ready {
            Some(ready) => (ready.store.clone(), None),
            None => self.spec_and_cluster()?,
        };
        let store = store::connect(&spec)?;
        let (cluster, state) = match tokio::time::timeout(TIMEOUT, find(&store, named, ready.as_ref())).await {
            Ok(found) => found.with_context(|| format!("cannot tell what {spec} holds"))?,
            Err(_) => bail!("the store {spec} does not answer"),
        };
        Ok(Found { store, keys: Keys::new(&cluster), cluster, state })
    }

    /// The store's spec and the cluster, as servers would understand the same environment. It is read here, not by clap,
    /// for which a variable would contradict `--ready-file` as the flag does.
    fn spec_and_cluster(&self) -> anyhow::Result<(String, Option<Cluster>)> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let store = self.store.clone().or_else(|| variable("CONCLAVE_STORE"));
        let cluster = match (&self.cluster, variable("CONCLAVE_CLUSTER")) {
            (Some(cluster), _) => Some(cluster.clone()),
            (None, Some(name)) => Some(Cluster::parse(&name)?),
            (None, None) => None,
        };
        Ok((store.unwrap_or_else(|| "etcd=http://127.0.0.1:2379".to_owned()), cluster))
    }
}

/// The cluster that was named, or the one whose router the ready file names, or the only one there is.
async fn find(
    store: &Arc<dyn Store>,
    named: Option<Cluster>,
    ready: Option<&Ready>,
) -> anyhow::Result<(Cluster, ClusterState)> {
    let candidates = match named {
        Some(cluster) => vec![cluster],
        None => {
            let listing = store.list(ROOT).await?;
            clusters(listing.entries.iter().map(|entry| entry.key.as_str()))
        }
    };
    let mut found = Vec::new();
    for cluster in candidates {
        let state = look(store, &cluster).await?;
        if ready.is_none_or(|ready| serves_at(&state, &ready.inference)) {
            found.push((cluster, state));
        }
    }
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|(cluster, _)| cluster.as_str()).collect();
        bail!("the store holds several clusters, choose one with --cluster: {}", names.join(", "));
    }
    found.pop().context("there is no cluster in this store")
}

async fn look(store: &Arc<dyn Store>, cluster: &Cluster) -> anyhow::Result<ClusterState> {
    // A view would wait for a store that is away; a person wants to hear why.
    store.get(&Keys::new(cluster).model()).await?;
    let token = CancellationToken::new();
    let _ended = token.clone().drop_guard();
    let view = View::start(Arc::clone(store), Keys::new(cluster), token).await?;
    Ok(ClusterState::clone(&view.current()))
}

fn serves_at(state: &ClusterState, inference: &str) -> bool {
    state.routers.values().any(|router| reachable(&router.inference_address) == inference)
}

/// The names in keys like `/conclave/<name>/…`, each once.
fn clusters<'a>(keys: impl Iterator<Item = &'a str>) -> Vec<Cluster> {
    let names = keys.filter_map(|key| key.strip_prefix(ROOT)?.split_once('/'));
    let names: BTreeSet<&str> = names.map(|(name, _)| name).collect();
    names.into_iter().filter_map(|name| Cluster::parse(name).ok()).collect()
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
