//! Publishing a plan, and remembering it.
//!
//! In: a plan, its author, and the term he leads in, if he does. Out: the plan in force and its place in the history, in one
//! transaction, if its parent was in force and the term is the present one. Never here: an opinion on the plan. Whoever
//! publishes has linted it.

use std::time::SystemTime;

use crate::codec::DecodeError;
use crate::election::Term;
use crate::ids::PlanVersion;
use crate::keys::Keys;
use crate::plan::{PastPlan, Plan};
use crate::store::{Entry, Error as StoreError, Expected, Store, Transaction};

/// Past plans that are kept.
pub const REMEMBERED: u64 = 32;

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
    /// The author leads no longer.
    #[error("plan {plan} is by a router that leads no longer")]
    Deposed {
        /// The plan's version.
        plan: PlanVersion,
    },
    /// What is in force cannot be read, so nobody can say whether it is the parent.
    #[error("the plan in force cannot be read: {0}")]
    Unreadable(#[from] DecodeError),
}

/// Makes `plan` the target if its parent is what is in force, and with a `fence` only while that term lasts. A plan that is
/// in force already, as it may be after an answer that was lost, is published.
pub async fn publish(
    store: &dyn Store,
    keys: &Keys,
    plan: &Plan,
    author: &str,
    fence: Option<Term>,
) -> Result<(), Error> {
    let (key, value) = (keys.plan(), plan.encode());
    let is_own = |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.value == value);
    let current = store.get(&key).await?;
    if is_own(&current) {
        return Ok(());
    }
    follows(plan, &current)?;
    let expected = current.map_or(Expected::Absent, |entry| Expected::ModRevision(entry.mod_revision));
    let mut conditions = vec![(key.clone(), expected)];
    // The leader's key is put once in a term.
    conditions.extend(fence.map(|term| (keys.leader(), Expected::ModRevision(term.revision))));
    let past = PastPlan { plan: plan.clone(), author: author.to_owned(), written_unix_ms: unix_ms() };
    let puts = vec![(key.clone(), value.clone()), (keys.past_plan(plan.version), past.encode())];
    // All that is too old, so that nothing stays that an earlier call should have deleted.
    let oldest = (plan.version.0 + 1).saturating_sub(REMEMBERED);
    let deletes = Some((keys.history().to_owned(), keys.past_plan(PlanVersion(oldest))));
    if store.transact(Transaction { conditions, puts, deletes }).await?.is_some() {
        return Ok(());
    }
    let current = store.get(&key).await?;
    if is_own(&current) {
        return Ok(());
    }
    follows(plan, &current)?;
    Err(Error::Deposed { plan: plan.version })
}

/// Whether the plan's parent is what is in force.
fn follows(plan: &Plan, current: &Option<Entry>) -> Result<(), Error> {
    let current = match current {
        Some(entry) => Plan::decode(&entry.value)?.version,
        None => PlanVersion::NONE,
    };
    match current == plan.parent {
        true => Ok(()),
        false => Err(Error::Superseded { plan: plan.version, parent: plan.parent, current }),
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
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
    use crate::store::LeaseId;
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
        publish(&store, &keys, &plan(1, 0), "r", None).await.unwrap();
        let late = Plan { reason: "another".into(), ..plan(1, 0) };
        let late = publish(&store, &keys, &late, "stale", None).await.unwrap_err();
        assert_eq!(late.to_string(), "plan 1 follows 0, and 1 is in force");
        // What a version of this program that deleted one at a time has left.
        let forgotten = PastPlan { plan: plan(1, 0), author: "stale".into(), written_unix_ms: 1 };
        store.put(&keys.past_plan(PlanVersion::NONE), forgotten.encode(), None).await.unwrap();
        let last = 2 * REMEMBERED;
        for version in 2..=last {
            publish(&store, &keys, &plan(version, version - 1), "r", None).await.unwrap();
        }
        let past = history(&store, &keys).await.unwrap();
        assert_eq!(past.len() as u64, REMEMBERED);
        let newest = past.last().unwrap();
        assert_eq!((newest.plan.version, newest.author.as_str()), (PlanVersion(last), "r"));
        assert!(past.iter().all(|past| past.author != "stale" && past.written_unix_ms > 0));
    }

    #[tokio::test]
    async fn a_plan_that_was_published_though_the_answer_was_lost_is_published() {
        let (store, keys) = (MemoryStore::new(), Keys::new(&Cluster::parse("c").unwrap()));
        publish(&store, &keys, &plan(1, 0), "r", None).await.unwrap();
        let revision = store.get(&keys.plan()).await.unwrap().unwrap().mod_revision;
        publish(&store, &keys, &plan(1, 0), "r", None).await.unwrap();
        assert_eq!(store.get(&keys.plan()).await.unwrap().unwrap().mod_revision, revision);
        assert_eq!(history(&store, &keys).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn who_leads_no_longer_publishes_nothing() {
        let (store, keys) = (MemoryStore::new(), Keys::new(&Cluster::parse("c").unwrap()));
        let lease = LeaseId(1);
        let [former, present] = [
            store.put(&keys.leader(), "one".into(), None).await.unwrap(),
            store.put(&keys.leader(), "two".into(), None).await.unwrap(),
        ]
        .map(|revision| Some(Term { lease, revision }));
        let deposed = publish(&store, &keys, &plan(1, 0), "former", former).await.unwrap_err();
        assert!(matches!(deposed, Error::Deposed { plan: PlanVersion(1) }), "{deposed}");
        assert_eq!(history(&store, &keys).await.unwrap(), []);
        publish(&store, &keys, &plan(1, 0), "present", present).await.unwrap();
        store.delete(&keys.leader()).await.unwrap();
        let late = publish(&store, &keys, &plan(2, 1), "present", present).await.unwrap_err();
        assert!(matches!(late, Error::Deposed { .. }), "{late}");
    }
}
