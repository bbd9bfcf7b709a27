//! The store's own host: one store in memory, whose leases run by this host's clock and no other.
//!
//! In: orders from all processes and from the world's driver, over one bounded channel. Out: their answers; every change, in
//! order, to the witness. Never here: a fault, except that all orders may have to wait for a while.

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    keys::Keys,
    store::{Store, memory::MemoryStore},
};
use futures::future::BoxFuture;
use tokio::{sync::mpsc, time::sleep};

use crate::witness::Witness;

/// Orders that may wait; more wait where they come from.
pub const ORDERS: usize = 256;

type Call = Box<dyn FnOnce(MemoryStore) -> BoxFuture<'static, ()> + Send>;

/// What the depot is asked for.
pub enum Order {
    /// Something to do with the store, at one moment.
    Call(Call),
    /// To answer nobody for a while. What is asked meanwhile happens afterwards, though nobody waits for it any more.
    Pause(Duration),
}

impl Order {
    pub fn call(call: impl FnOnce(MemoryStore) -> BoxFuture<'static, ()> + Send + 'static) -> Self {
        Self::Call(Box::new(call))
    }
}

/// Runs until nobody can ask any more.
pub async fn run(mut orders: mpsc::Receiver<Order>, keys: Keys, witness: Arc<Witness>) -> turmoil::Result {
    let store = MemoryStore::new();
    let mut events = store.watch(keys.prefix(), 1).await?;
    let witnessing = async move {
        loop {
            match events.next().await {
                Ok(events) => events.into_iter().for_each(|event| witness.saw(&keys, event)),
                Err(error) => return Err(error.into()),
            }
        }
    };
    let serving = async move {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Call(call) => call(store.clone()).await,
                Order::Pause(time) => sleep(time).await,
            }
        }
        Ok(())
    };
    tokio::select! {
        // First what has happened, then what happens next.
        biased;
        ended = witnessing => ended,
        ended = serving => ended,
    }
}
