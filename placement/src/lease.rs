//! A lease as its holder sees it: until when it surely lives, and when to renew it.
//!
//! In: the store's answers. Out: renewed, or lost. Never here: hope. The time it surely lives counts from before the
//! renewal was sent, and once that is over without an answer the lease counts as lost, whatever the store may say later.

use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Error, LeaseId, Result, Store};

#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: LeaseId,
    ttl: Duration,
    valid_until: Instant,
    next_beat: Instant,
}

impl Lease {
    pub(crate) async fn grant(store: &dyn Store, ttl: Duration) -> Result<Self> {
        let sent = Instant::now();
        let id = store.grant(ttl).await?;
        Ok(Self { id, ttl, valid_until: sent + ttl, next_beat: sent + ttl / 3 })
    }

    /// Comes back when it is time to renew.
    pub(crate) async fn due(&self) {
        tokio::time::sleep_until(self.next_beat).await;
    }

    /// Runs a call no longer than the lease surely lives.
    pub(crate) async fn within<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let answer = tokio::time::timeout_at(self.valid_until, call).await;
        answer.unwrap_or(Err(Error::LeaseLost(self.id)))
    }

    /// Renews the lease. A store that is away is no error while the lease surely lives: the next beat comes sooner.
    pub(crate) async fn beat(&mut self, store: &dyn Store) -> Result<()> {
        let sent = Instant::now();
        // A call that hangs must leave time for another one.
        let beat = async {
            let beat = tokio::time::timeout(self.ttl / 3, store.keep_alive(self.id)).await;
            beat.unwrap_or(Err(Error::Timeout { call: "keep_alive", after: self.ttl / 3 }))
        };
        match self.within(beat).await {
            Ok(kept) => {
                self.valid_until = sent + kept.remaining.min(self.ttl);
                self.next_beat = sent + self.ttl / 3;
                Ok(())
            }
            Err(error) if error.retryable() && Instant::now() < self.valid_until => {
                tracing::debug!(lease = %self.id, %error, "a lease could not be renewed yet");
                self.next_beat = Instant::now() + self.ttl / 10;
                Ok(())
            }
            Err(error) if error.retryable() => Err(Error::LeaseLost(self.id)),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn a_lease_whose_time_is_over_is_lost_for_good() {
        let store = MemoryStore::new();
        let mut lease = Lease::grant(&store, Duration::from_millis(30)).await.unwrap();
        store.put("k", "v".into(), Some(lease.id)).await.unwrap();
        let mut events = store.watch("k", store.list("k").await.unwrap().revision + 1).await.unwrap();
        events.next().await.unwrap();
        assert_eq!(lease.beat(&store).await, Err(Error::LeaseLost(lease.id)));
        let late = lease.within(std::future::pending::<Result<()>>());
        assert_eq!(late.await, Err(Error::LeaseLost(lease.id)), "and no call outlives it");
    }

    #[tokio::test]
    async fn a_renewed_lease_lives_longer() {
        let store = MemoryStore::new();
        let mut lease = Lease::grant(&store, Duration::from_secs(60)).await.unwrap();
        let before = lease.valid_until;
        lease.beat(&store).await.unwrap();
        assert!(lease.valid_until > before);
    }
}
