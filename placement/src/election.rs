//! The election of the router that runs the controller.
//!
//! In: one candidate and the key `leader`. Out: whether this candidate leads now. Never here: safety of the plan. Two
//! routers may both believe for a moment that they lead; only who has the store's present term can write a plan.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backoff::Backoff;
use crate::ids::{Incarnation, RouterId};
use crate::keys::Keys;
use crate::lease::Lease;
use crate::membership::LEAVE_TIMEOUT;
use crate::state::LeaderRecord;
use crate::store::{CasOutcome, Event, Expected, LeaseId, Result, Store};

/// One time of leading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// The lease that the leadership lives under.
    pub lease: LeaseId,
    /// The store's revision at which it was won: later terms have larger ones.
    pub revision: i64,
}

/// A candidate. Dropping it, or cancelling its token, resigns.
#[derive(Debug)]
pub struct Election {
    term: watch::Receiver<Option<Term>>,
    task: JoinHandle<()>,
    resign: DropGuard,
}

impl Election {
    /// Stands for election until the token is cancelled.
    pub fn run(
        store: Arc<dyn Store>,
        keys: &Keys,
        router: RouterId,
        incarnation: Incarnation,
        ttl: Duration,
        token: CancellationToken,
    ) -> Self {
        let token = token.child_token();
        let (announce, term) = watch::channel(None);
        let value = LeaderRecord { router, incarnation }.encode();
        let mut candidate = Candidate { store, key: keys.leader(), value, ttl, announce, lease: None };
        let resign = token.clone().drop_guard();
        let task = tokio::spawn(async move {
            token.run_until_cancelled(candidate.run()).await;
            candidate.announce.send_replace(None);
            candidate.revoke().await;
        });
        Self { term, task, resign }
    }

    /// The current term while this candidate leads; `None` while it does not, or cannot know.
    pub fn is_leader(&self) -> watch::Receiver<Option<Term>> {
        self.term.clone()
    }

    /// Steps down, so that another candidate need not wait for the lease to expire.
    pub async fn resign(self) {
        drop(self.resign);
        // The task bounds itself; the margin only covers a runtime that is slow to run it.
        let _ = timeout(LEAVE_TIMEOUT * 2, self.task).await;
    }
}

struct Candidate {
    store: Arc<dyn Store>,
    key: String,
    value: Bytes,
    ttl: Duration,
    announce: watch::Sender<Option<Term>>,
    /// The lease of the latest campaign, to be revoked when it is of no more use.
    lease: Option<LeaseId>,
}

impl Candidate {
    async fn run(&mut self) {
        let mut backoff = Backoff::new();
        loop {
            match self.campaign().await {
                Ok(Some((lease, revision))) => {
                    backoff.reset();
                    self.lead(lease, revision).await;
                }
                Ok(None) => backoff.reset(),
                Err(error) => {
                    tracing::debug!(%error, "standing for election must wait");
                    backoff.wait().await;
                }
            }
        }
    }

    /// Waits while somebody leads, then tries to. `None` when another candidate was quicker.
    async fn campaign(&mut self) -> Result<Option<(Lease, i64)>> {
        self.revoke().await;
        let now = self.store.list(&self.key).await?;
        if now.entries.iter().any(|entry| entry.key == self.key) {
            self.wait_for_vacancy(now.revision + 1).await?;
        }
        let lease = Lease::grant(&*self.store, self.ttl).await?;
        self.lease = Some(lease.id);
        let put = self.store.compare_and_put(&self.key, Expected::Absent, self.value.clone(), Some(lease.id));
        match put.await? {
            CasOutcome::Stored { revision } => Ok(Some((lease, revision))),
            CasOutcome::Conflict { .. } => Ok(None),
        }
    }

    async fn wait_for_vacancy(&self, from: i64) -> Result<()> {
        let mut events = self.store.watch(&self.key, from).await?;
        loop {
            let batch = events.next().await?;
            let latest = batch.iter().rfind(|event| event.key() == self.key);
            if matches!(latest, Some(Event::Delete { .. })) {
                return Ok(());
            }
        }
    }

    /// Leads for as long as the lease surely lives and the key is its own.
    async fn lead(&mut self, mut lease: Lease, revision: i64) {
        tracing::info!(revision, "leading");
        self.announce.send_replace(Some(Term { lease: lease.id, revision }));
        loop {
            lease.due().await;
            if lease.beat(&*self.store).await.is_err() {
                break;
            }
            // Deleted by hand: the lease would live on and nobody would lead. An error says nothing about the key.
            if let Ok(entry) = lease.within(self.store.get(&self.key)).await
                && entry.is_none_or(|entry| entry.lease != Some(lease.id))
            {
                break;
            }
        }
        self.announce.send_replace(None);
        tracing::warn!(revision, "no longer leading");
    }

    async fn revoke(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        match timeout(LEAVE_TIMEOUT, self.store.revoke(lease)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%lease, %error, "a lease is left to expire by itself"),
            Err(_) => tracing::debug!(%lease, "the store is away, a lease is left to expire by itself"),
        }
    }
}
