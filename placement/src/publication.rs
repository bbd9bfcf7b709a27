//! Publishing a plan, and remembering it.
//!
//! In: a plan and its author. Out: the plan in force, if its parent was; and its place in the history. Never here: an
//! opinion on the plan. Whoever publishes has linted it.

use std::time::SystemTime;

use crate::codec::DecodeError;
use crate::ids::PlanVersion;
use crate::keys::Keys;
use crate::plan::{PastPlan, Plan};
use crate::store::{CasOutcome, Error as StoreError, Expected, Store};

/// Past plans that are kept.
pub const REMEMBERED: u64 = 32;
/// Older ones that are deleted with each plan though they should be gone.
const FORGOTTEN_AGAIN: u64 = 3;

/// Why a plan was not published.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store did not take it, or may have: see [`StoreError::retryable`].
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is in force is not the plan's parent.
    #[error("plan {plan} follows {parent}, and {current} is in force")]
    Superseded {
        /// The plan's version.
        plan: PlanVersion,
        /// The plan it was made from.
        parent: PlanVersion,
        /// What is in force; 0 where there is none.
        current: PlanVersion,
    },
    /// What is in force cannot be read, so nobody can say whether it is the parent.
    #[error("the plan in force cannot be read: {0}")]
    Unreadable(#[from] DecodeError),
}

/// Makes `plan` the target if its parent is what is in force. A plan that is published stays published though its place in
/// the history could not be written.
pub async fn publish(store: &dyn Store, keys: &Keys, plan: &Plan, author: &str) -> Result<(), Error> {
    let key = keys.plan();
    let current = store.get(&key).await?;
    let version = match &current {
        Some(entry) => Plan::decode(&entry.value)?.version,
        None => PlanVersion::NONE,
    };
    let superseded = |current| Error::Superseded { plan: plan.version, parent: plan.parent, current };
    if version != plan.parent {
        return Err(superseded(version));
    }
    let expected = current.map_or(Expected::Absent, |entry| Expected::ModRevision(entry.mod_revision));
    match store.compare_and_put(&key, expected, plan.encode(), None).await? {
        CasOutcome::Stored { .. } => {}
        CasOutcome::Conflict { current } => {
            let current = current.and_then(|entry| Plan::decode(&entry.value).ok());
            return Err(superseded(current.map_or(PlanVersion::NONE, |plan| plan.version)));
        }
    }
    if let Err(error) = remember(store, keys, plan, author).await {
        tracing::warn!(version = plan.version.0, %error, "the history lacks a plan");
    }
    Ok(())
}

async fn remember(store: &dyn Store, keys: &Keys, plan: &Plan, author: &str) -> Result<(), StoreError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let written_unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let past = PastPlan { plan: plan.clone(), author: author.to_owned(), written_unix_ms };
    store.put(&keys.past_plan(plan.version), past.encode(), None).await?;
    // Not the last one alone: one that could not be deleted then goes now.
    let forgotten = plan.version.0.saturating_sub(REMEMBERED);
    for version in forgotten.saturating_sub(FORGOTTEN_AGAIN).max(1)..=forgotten {
        store.delete(&keys.past_plan(PlanVersion(version))).await?;
    }
    Ok(())
}

/// The plans that were in force, oldest first. One that cannot be read is left out, and logged.
pub async fn history(store: &dyn Store, keys: &Keys) -> Result<Vec<PastPlan>, StoreError> {
    let listing = store.list(keys.history()).await?;
    let read = |entry: &crate::store::Entry| match PastPlan::decode(&entry.value) {
        Ok(past) => Some(past),
        Err(error) => {
            tracing::warn!(key = entry.key, %error, "a past plan cannot be read");
            None
        }
    };
    Ok(listing.entries.iter().filter_map(read).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ids::Cluster;
    use crate::store::memory::MemoryStore;

    fn plan(version: u64, parent: u64) -> Plan {
        Plan {
            version: PlanVersion(version),
            parent: PlanVersion(parent),
            policy: "test".into(),
            reason: format!("plan {version}"),
            layers: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn a_plan_is_published_on_its_parent_only_and_remembered_for_a_while() {
        let (store, keys) = (MemoryStore::new(), Keys::new(&Cluster::parse("c").unwrap()));
        publish(&store, &keys, &plan(1, 0), "r").await.unwrap();
        let late = publish(&store, &keys, &plan(1, 0), "stale").await.unwrap_err();
        assert_eq!(late.to_string(), "plan 1 follows 0, and 1 is in force");
        let last = 2 * REMEMBERED;
        for version in 2..=last {
            publish(&store, &keys, &plan(version, version - 1), "r").await.unwrap();
        }
        let past = history(&store, &keys).await.unwrap();
        assert_eq!(past.len() as u64, REMEMBERED);
        let newest = past.last().unwrap();
        assert_eq!((newest.plan.version, newest.author.as_str()), (PlanVersion(last), "r"));
        assert!(past.iter().all(|past| past.author != "stale" && past.written_unix_ms > 0));
    }
}
