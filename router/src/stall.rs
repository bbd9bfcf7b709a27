//! What the engine's step waits for, while it waits.
//!
//! In: the exchange's word that an expert has no holder. Out: the same, to whoever must explain a missed deadline.
//! Never here: more history than a deadline needs that passed just after the wait was over: it was missed for the same reason.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// A deadline that passes so soon after a wait was missed because of it.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Empty while the step moves.
#[derive(Debug, Default)]
pub struct Stall(Mutex<Wait>);

#[derive(Debug, Default)]
struct Wait {
    reason: Option<String>,
    over: Option<Instant>,
}

impl Stall {
    /// The step waits for this.
    pub fn set(&self, reason: String) {
        *self.0.lock() = Wait { reason: Some(reason), over: None };
    }

    /// It moves again.
    pub fn clear(&self) {
        let mut wait = self.0.lock();
        if wait.reason.is_some() && wait.over.is_none() {
            wait.over = Some(Instant::now());
        }
    }

    /// What it waits for, if it does, or did a moment ago.
    pub fn reason(&self) -> Option<String> {
        let wait = self.0.lock();
        let recent = wait.over.is_none_or(|over| over.elapsed() < AFTERMATH);
        wait.reason.clone().filter(|_| recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_wait_is_told_until_a_moment_after_it_is_over() {
        let stall = Stall::default();
        stall.clear();
        assert_eq!(stall.reason(), None);
        stall.set("an expert".to_owned());
        tokio::time::advance(10 * AFTERMATH).await;
        assert_eq!(stall.reason().as_deref(), Some("an expert"));
        stall.clear();
        tokio::time::advance(AFTERMATH / 2).await;
        // It goes on moving: that does not make it longer ago.
        stall.clear();
        assert_eq!(stall.reason().as_deref(), Some("an expert"));
        tokio::time::advance(AFTERMATH).await;
        assert_eq!(stall.reason(), None);
    }
}
