//! What the engine's step waits for, while it waits.
//!
//! In: the exchange's word that an expert has no holder. Out: the same, to whoever must explain a missed deadline.
//! Never here: history.

use parking_lot::Mutex;

/// Empty while the step moves.
#[derive(Debug, Default)]
pub struct Stall(Mutex<Option<String>>);

impl Stall {
    /// The step waits for this.
    pub fn set(&self, reason: String) {
        *self.0.lock() = Some(reason);
    }

    /// It moves again.
    pub fn clear(&self) {
        self.0.lock().take();
    }

    /// What it waits for, if it does.
    pub fn reason(&self) -> Option<String> {
        self.0.lock().clone()
    }
}
