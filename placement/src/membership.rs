//! Membership: one process's record in the store, kept there for as long as the process lives.
//!
//! In: a key and the latest value. Out: that value under the key, under a lease that a background task renews. Never
//! here: a reason to stop serving. When the store is away or the lease is lost, the member stops claiming, goes on
//! serving, and registers again as soon as it can. On leaving, the lease is revoked, so no stale key stays behind.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backoff::Backoff;
use crate::lease::Lease;
use crate::store::{CasOutcome, Entry, Error, Expected, LeaseId, Result, Store};

/// How long leaving may take; after that the lease is left to expire by itself.
pub const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Leases of earlier tries that are remembered as ours: a put that timed out may have happened under one of them.
const MAX_LEASES: usize = 8;

/// A record in the store. Dropping it leaves too, without waiting for it.
#[derive(Debug)]
pub struct Membership {
    value: watch::Sender<Bytes>,
    registered: watch::Receiver<bool>,
    task: JoinHandle<()>,
    leave: DropGuard,
}

impl Membership {
    /// Registers `initial` under `key`, waiting for a store that is away until it comes or the token is cancelled. Takes the
    /// key over from whoever has it: a process that starts again under its name replaces its own remains.
    ///
    /// Cancelling the token is the same as [`Membership::leave`].
    pub async fn join(
        store: Arc<dyn Store>,
        key: String,
        ttl: Duration,
        initial: Bytes,
        token: CancellationToken,
    ) -> Result<Self> {
        let token = token.child_token();
        let (value, latest) = watch::channel(initial);
        let (claim, registered) = watch::channel(false);
        let mut member = Member { store, key, ttl, latest, claim, ours: Vec::new() };
        let joined = token.run_until_cancelled(member.join()).await;
        let registration = match joined {
            Some(Ok(registration)) => registration,
            refused_or_cancelled => {
                member.revoke_all().await;
                return Err(refused_or_cancelled.and_then(std::result::Result::err).unwrap_or(Error::Closed));
            }
        };
        let leave = token.clone().drop_guard();
        let task = tokio::spawn(async move {
            token.run_until_cancelled(member.serve(registration)).await;
            member.claim.send_replace(false);
            member.revoke_all().await;
        });
        Ok(Self { value, registered, task, leave })
    }

    /// Replaces the value. Does not wait for the store: of several values in a row the last one arrives for sure.
    pub fn publish(&self, value: Bytes) {
        self.value.send_replace(value);
    }

    /// Whether the record surely is in the store now.
    pub fn registered(&self) -> watch::Receiver<bool> {
        self.registered.clone()
    }

    /// Takes the record out of the store, within [`LEAVE_TIMEOUT`].
    pub async fn leave(self) {
        drop(self.leave);
        // The task bounds itself; the margin only covers a runtime that is slow to run it.
        if timeout(LEAVE_TIMEOUT * 2, self.task).await.is_err() {
            tracing::warn!("leaving the cluster took too long, the lease will expire by itself");
        }
    }
}

/// The background half.
struct Member {
    store: Arc<dyn Store>,
    key: String,
    ttl: Duration,
    latest: watch::Receiver<Bytes>,
    claim: watch::Sender<bool>,
    ours: Vec<LeaseId>,
}

struct Registration {
    lease: Lease,
    revision: i64,
}

/// Why a registration ended.
enum Lost {
    /// The lease or the key is gone, or the store is.
    Gone,
    /// Somebody else put the key.
    Displaced,
}

impl Member {
    /// The first registration.
    async fn join(&mut self) -> Result<Registration> {
        let mut backoff = Backoff::new();
        loop {
            match self.take().await {
                Ok(registration) => return Ok(registration),
                Err(error) if error.retryable() || matches!(error, Error::LeaseLost(_)) => {
                    tracing::warn!(key = self.key, %error, "registering waits for the store");
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn take(&mut self) -> Result<Registration> {
        let (lease, value) = self.begin().await?;
        let revision = self.store.put(&self.key, value, Some(lease.id)).await?;
        Ok(Registration { lease, revision })
    }

    /// Keeps the record there for ever. Dropped when the member leaves.
    async fn serve(&mut self, mut registration: Registration) {
        loop {
            self.claim.send_replace(true);
            tracing::info!(key = self.key, lease = %registration.lease.id, "registered");
            let why = self.hold(&mut registration).await;
            self.claim.send_replace(false);
            match why {
                Lost::Gone => tracing::warn!(key = self.key, "registration lost, serving goes on, registering again"),
                Lost::Displaced => {
                    tracing::error!(key = self.key, "another process took this registration, waiting for it to go");
                }
            }
            registration = self.register_again().await;
        }
    }

    /// Renews the lease and publishes new values until the registration is lost.
    async fn hold(&mut self, registration: &mut Registration) -> Lost {
        let mut stale = false;
        loop {
            let changed = tokio::select! {
                biased;
                () = registration.lease.due() => false,
                changed = self.latest.changed(), if !stale => changed.is_ok(),
            };
            if !changed {
                if registration.lease.beat(&*self.store).await.is_err() {
                    return Lost::Gone;
                }
                match self.look(registration).await {
                    Ok(()) => {}
                    Err(lost) => return lost,
                }
            }
            if changed || stale {
                match self.update(registration).await {
                    Ok(written) => stale = !written,
                    Err(lost) => return lost,
                }
            }
        }
    }

    /// A lease can live while its key is gone: somebody deleted it by hand, or another process of the same name put it.
    async fn look(&self, registration: &Registration) -> std::result::Result<(), Lost> {
        match registration.lease.within(self.store.get(&self.key)).await {
            Ok(Some(entry)) if entry.lease == Some(registration.lease.id) => Ok(()),
            Ok(Some(entry)) if !self.is_ours(&entry) => Err(Lost::Displaced),
            Ok(_) => Err(Lost::Gone),
            Err(error) => {
                tracing::debug!(key = self.key, %error, "the registration could not be looked at");
                Ok(())
            }
        }
    }

    /// Writes the latest value; `false` when the store is away and it must be tried again at the next beat.
    async fn update(&mut self, registration: &mut Registration) -> std::result::Result<bool, Lost> {
        let value = self.latest.borrow_and_update().clone();
        // The second try is for a first one of ours that was stored though its answer was lost.
        for _ in 0..2 {
            let expected = Expected::ModRevision(registration.revision);
            let lease = Some(registration.lease.id);
            match self.store.compare_and_put(&self.key, expected, value.clone(), lease).await {
                Ok(CasOutcome::Stored { revision }) => {
                    registration.revision = revision;
                    return Ok(true);
                }
                Ok(CasOutcome::Conflict { current: Some(entry) }) if self.is_ours(&entry) => {
                    registration.revision = entry.mod_revision;
                }
                Ok(CasOutcome::Conflict { current: Some(_) }) => return Err(Lost::Displaced),
                Ok(CasOutcome::Conflict { current: None }) | Err(Error::LeaseLost(_)) => return Err(Lost::Gone),
                Err(error) => {
                    tracing::warn!(key = self.key, %error, "a new value could not be published yet");
                    return Ok(false);
                }
            }
        }
        Ok(false)
    }

    async fn register_again(&mut self) -> Registration {
        let mut backoff = Backoff::new();
        loop {
            match self.try_again().await {
                Ok(Some(registration)) => return registration,
                Ok(None) => {}
                Err(error) => tracing::debug!(key = self.key, %error, "registering again must wait"),
            }
            backoff.wait().await;
        }
    }

    /// One try; `None` while somebody else's record is there.
    async fn try_again(&mut self) -> Result<Option<Registration>> {
        let expected = match self.store.get(&self.key).await? {
            None => Expected::Absent,
            Some(entry) if self.is_ours(&entry) => Expected::ModRevision(entry.mod_revision),
            Some(_) => return Ok(None),
        };
        let (lease, value) = self.begin().await?;
        match self.store.compare_and_put(&self.key, expected, value, Some(lease.id)).await? {
            CasOutcome::Stored { revision } => Ok(Some(Registration { lease, revision })),
            CasOutcome::Conflict { .. } => Ok(None),
        }
    }

    /// A new lease, remembered as ours before anything is put under it, and the value to put.
    async fn begin(&mut self) -> Result<(Lease, Bytes)> {
        let lease = Lease::grant(&*self.store, self.ttl).await?;
        if self.ours.len() == MAX_LEASES {
            self.ours.remove(0);
        }
        self.ours.push(lease.id);
        Ok((lease, self.latest.borrow_and_update().clone()))
    }

    fn is_ours(&self, entry: &Entry) -> bool {
        entry.lease.is_some_and(|lease| self.ours.contains(&lease))
    }

    async fn revoke_all(&mut self) {
        // The newest first: it is the one that has the key.
        let revoke = async {
            for lease in self.ours.drain(..).rev() {
                self.store.revoke(lease).await?;
            }
            Ok::<(), Error>(())
        };
        match timeout(LEAVE_TIMEOUT, revoke).await {
            Ok(Ok(())) => tracing::info!(key = self.key, "left"),
            Ok(Err(error)) => tracing::warn!(key = self.key, %error, "the lease will expire by itself"),
            Err(_) => tracing::warn!(key = self.key, "the store is away, the lease will expire by itself"),
        }
    }
}
