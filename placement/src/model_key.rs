//! The key `model`: which model a cluster serves, written once by whoever comes first.
//!
//! In: the identity of the checkpoint here. Out: agreement, or the field that differs. Never here: a change. A cluster that
//! is to serve another model is another cluster.

use std::fmt::Debug;
use std::sync::Arc;

use crate::codec::DecodeError;
use crate::keys::Keys;
use crate::state::{ClusterState, ModelIdentity};
use crate::store::{self, CasOutcome, Expected, Store};
use tokio::sync::watch;

/// Between two attempts to reach a store that is away.
const AGREE_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// Why a process must not join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Another model: its experts would answer for the wrong weights.
    #[error("the cluster serves another model: {field} is {cluster} there and {here} here")]
    Differs {
        /// The first field that differs.
        field: &'static str,
        /// Its value in this process.
        here: String,
        /// Its value in the cluster.
        cluster: String,
    },
    /// The key holds something that is no identity.
    #[error("the cluster's model key cannot be read: {0}")]
    Unreadable(#[from] DecodeError),
    /// The store is away or refuses; see [`store::Error::retryable`].
    #[error("the cluster's model key cannot be compared: {0}")]
    Store(#[from] store::Error),
}

/// Writes the cluster's identity if there is none, and compares with it if there is.
///
/// Neither the name, which is for people, nor `expert_bytes`, which follows from the dtype a process computes in, decides.
pub async fn ensure_model(store: &dyn Store, keys: &Keys, model: &ModelIdentity) -> Result<(), IdentityError> {
    match store.compare_and_put(&keys.model(), Expected::Absent, model.encode(), None).await? {
        CasOutcome::Stored { .. } => Ok(()),
        CasOutcome::Conflict { current: Some(entry) } => compare(model, &ModelIdentity::decode(&entry.value)?),
        // Deleted between the comparison and the read of it. Whoever deletes the model of a running cluster tries again.
        CasOutcome::Conflict { current: None } => Err(IdentityError::Store(store::Error::Closed)),
    }
}

/// [`ensure_model`], waiting for a store that is away for as long as it is. Says so once.
pub async fn agree(store: &dyn Store, keys: &Keys, model: &ModelIdentity) -> Result<(), IdentityError> {
    let mut told = false;
    loop {
        match ensure_model(store, keys, model).await {
            Err(IdentityError::Store(error)) if error.retryable() => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "waiting for the store");
                }
                tokio::time::sleep(AGREE_AGAIN).await;
            }
            agreed => return agreed,
        }
    }
}

/// Writes the identity again whenever the store has lost it, as long as `cluster` is told of: a store that was wiped would
/// otherwise stay without a model, and so without a plan, until some process starts anew.
pub async fn keep(
    store: Arc<dyn Store>,
    keys: Keys,
    model: ModelIdentity,
    mut cluster: watch::Receiver<Arc<ClusterState>>,
) {
    while cluster.wait_for(|state| state.model.is_none()).await.is_ok() {
        tracing::warn!("the store has lost the cluster's model, it is written again");
        if let Err(error) = agree(&*store, &keys, &model).await {
            // Somebody with another model was faster. This process serves what its peers serve, and joins nothing new.
            tracing::error!(%error, "the cluster's model is another one now");
        }
        // Until the view has seen it, or lost it once more.
        tokio::time::sleep(AGREE_AGAIN).await;
    }
}

fn compare(here: &ModelIdentity, cluster: &ModelIdentity) -> Result<(), IdentityError> {
    fn same<T: PartialEq + Debug>(field: &'static str, here: &T, cluster: &T) -> Result<(), IdentityError> {
        if here == cluster {
            return Ok(());
        }
        Err(IdentityError::Differs { field, here: format!("{here:?}"), cluster: format!("{cluster:?}") })
    }
    same("layers", &here.layers, &cluster.layers)?;
    same("moe_layers", &here.moe_layers, &cluster.moe_layers)?;
    same("experts", &here.experts, &cluster.experts)?;
    same("config_digest", &here.config_digest, &cluster.config_digest)?;
    same("checkpoint_digest", &here.checkpoint_digest, &cluster.checkpoint_digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Cluster, LayerIdx};
    use crate::store::memory::MemoryStore;

    fn model() -> ModelIdentity {
        ModelIdentity {
            name: "tiny".into(),
            config_digest: "c0".into(),
            checkpoint_digest: "d0".into(),
            layers: 2,
            moe_layers: vec![LayerIdx(1)],
            experts: 4,
            expert_bytes: 64,
        }
    }

    #[tokio::test]
    async fn the_first_decides_and_whoever_differs_is_told_where() {
        let store = MemoryStore::new();
        let keys = Keys::new(&Cluster::parse("c").unwrap());
        ensure_model(&store, &keys, &model()).await.unwrap();
        let renamed = ModelIdentity { name: "other name".into(), expert_bytes: 128, ..model() };
        ensure_model(&store, &keys, &renamed).await.unwrap();

        let other = ModelIdentity { checkpoint_digest: "d1".into(), ..model() };
        let error = ensure_model(&store, &keys, &other).await.unwrap_err();
        let says = "the cluster serves another model: checkpoint_digest is \"d0\" there and \"d1\" here";
        assert_eq!(error.to_string(), says);

        store.put(&keys.model(), "no identity".into(), None).await.unwrap();
        let unreadable = ensure_model(&store, &keys, &model()).await.unwrap_err();
        assert!(matches!(unreadable, IdentityError::Unreadable(_)));
    }
}
