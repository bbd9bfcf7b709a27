//! What lies between one process and the store: a [`Store`] whose calls and watches suffer what a network does.
//!
//! In: calls of the code under test, the weather over this process. Out: the depot's answers, late, lost before or lost
//! after they happened; watches that lag and end. Never here: a lie. What is answered did happen, in the store's order.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use conclave_placement::store::{
    CasOutcome, Entry, Error, Event, Expected, KeepAlive, LeaseId, Listing, Result, Store, Transaction, WatchStream,
    memory::MemoryStore,
};
use futures::{FutureExt, future::BoxFuture, stream};
use parking_lot::Mutex;
use rand::{Rng, rngs::SmallRng};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use crate::{depot::Order, scenario::chance_of};

/// Every call ends within this time, as those of the store of etcd do.
const CALL_LIMIT: Duration = Duration::from_secs(3);

/// What happens to everything that one process sends to the store.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Whether anything comes through at all.
    pub reachable: bool,
    /// Whether what is watched comes through.
    pub watching: bool,
    /// Of a thousand calls, how many are lost before and how many after they happened; as many are very late.
    pub losses: u32,
    /// Grows when all open watches of this process end.
    pub broken_watches: u32,
}

/// The store as one process sees it.
#[derive(Clone)]
pub struct Link {
    orders: mpsc::Sender<Order>,
    weather: watch::Receiver<Weather>,
    seed: u64,
    /// How often each thing was drawn for. So no call's fate depends on which other one came first.
    drawn: Arc<Mutex<BTreeMap<String, u32>>>,
}

/// Where a call is lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    None,
    BeforeItHappens,
    AfterItHappened,
}

/// What one call will suffer, drawn before it begins.
struct Fate {
    there: Duration,
    back: Duration,
    loss: Loss,
    /// A loss, or no way to the store, is noticed at once and not by silence.
    is_noticed: bool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Link")
    }
}

impl Link {
    pub fn new(orders: mpsc::Sender<Order>, weather: watch::Receiver<Weather>, seed: u64) -> Self {
        Self { orders, weather, seed, drawn: Arc::default() }
    }

    fn chance(&self, call: &str, key: &str) -> SmallRng {
        let purpose = format!("{call} {key}");
        let mut drawn = self.drawn.lock();
        let count = drawn.entry(purpose.clone()).or_default();
        *count += 1;
        chance_of(self.seed, &purpose, *count)
    }

    fn latency(&self, chance: &mut SmallRng) -> Duration {
        let losses = self.weather.borrow().losses;
        let slow = chance.random_ratio(losses, 1000);
        Duration::from_millis(if slow { chance.random_range(200..2000) } else { chance.random_range(1..30) })
    }

    fn fate(&self, call: &str, key: &str) -> Fate {
        let mut chance = self.chance(call, key);
        let (there, back) = (self.latency(&mut chance), self.latency(&mut chance));
        let losses = self.weather.borrow().losses;
        let loss = match chance.random_range(0..1000) {
            drawn if drawn < losses => Loss::BeforeItHappens,
            drawn if drawn < losses * 2 => Loss::AfterItHappened,
            _ => Loss::None,
        };
        Fate { there, back, loss, is_noticed: chance.random() }
    }

    /// Comes back when the weather allows.
    async fn wait_for(&self, allows: impl FnMut(&Weather) -> bool) {
        if self.weather.clone().wait_for(allows).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    async fn reach(&self) {
        self.wait_for(|weather| weather.reachable).await;
    }

    async fn call<T: Send + 'static>(
        &self,
        call: &'static str,
        key: &str,
        operation: impl FnOnce(MemoryStore) -> BoxFuture<'static, Result<T>> + Send + 'static,
    ) -> Result<T> {
        let fate = self.fate(call, key);
        let unavailable = |message: &str| Err(Error::Unavailable { call, message: message.to_owned() });
        if fate.is_noticed && !self.weather.borrow().reachable {
            sleep(fate.there).await;
            return unavailable("no way to the store");
        }
        let lost = async || match fate.is_noticed {
            true => unavailable("the connection broke"),
            false => std::future::pending().await,
        };
        let whole = async {
            sleep(fate.there).await;
            self.reach().await;
            if fate.loss == Loss::BeforeItHappens {
                return lost().await;
            }
            let (tell, told) = oneshot::channel();
            let order = Order::call(move |store| {
                async move {
                    let answer = operation(store).await;
                    // Whoever asked may be gone or tired of waiting. It happened all the same.
                    let _ = tell.send(answer);
                }
                .boxed()
            });
            if self.orders.send(order).await.is_err() {
                return unavailable("the store is gone");
            }
            let Ok(answer) = told.await else { return unavailable("the store is gone") };
            if fate.loss == Loss::AfterItHappened {
                return lost().await;
            }
            sleep(fate.back).await;
            self.reach().await;
            answer
        };
        timeout(CALL_LIMIT, whole).await.unwrap_or(Err(Error::Timeout { call, after: CALL_LIMIT }))
    }
}

/// A watch under way: the store's stream and how it comes here.
struct Watching {
    events: WatchStream,
    link: Link,
    chance: SmallRng,
    broken_before: u32,
}

impl Watching {
    async fn next(&mut self) -> Result<Vec<Event>> {
        let mut weather = self.link.weather.clone();
        let broken_before = self.broken_before;
        tokio::select! {
            biased;
            _ = weather.wait_for(|weather| weather.broken_watches != broken_before) => Err(Error::Closed),
            batch = async {
                let batch = self.events.next().await?;
                sleep(self.link.latency(&mut self.chance)).await;
                self.link.wait_for(|weather| weather.reachable && weather.watching).await;
                Ok(batch)
            } => batch,
        }
    }
}

#[async_trait::async_trait]
impl Store for Link {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let (key, named) = (key.to_owned(), key);
        self.call("get", named, |store| async move { store.get(&key).await }.boxed()).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        let (prefix, named) = (prefix.to_owned(), prefix);
        self.call("list", named, |store| async move { store.list(&prefix).await }.boxed()).await
    }

    async fn compare_and_put(
        &self,
        key: &str,
        expected: Expected,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome> {
        let (key, named) = (key.to_owned(), key);
        let put =
            move |store: MemoryStore| async move { store.compare_and_put(&key, expected, value, lease).await }.boxed();
        self.call("compare_and_put", named, put).await
    }

    async fn transact(&self, transaction: Transaction) -> Result<Option<i64>> {
        let named = transaction.puts.first().map_or(String::new(), |(key, _)| key.clone());
        let run = move |store: MemoryStore| async move { store.transact(transaction).await }.boxed();
        self.call("transact", &named, run).await
    }

    async fn put(&self, key: &str, value: Bytes, lease: Option<LeaseId>) -> Result<i64> {
        let (key, named) = (key.to_owned(), key);
        self.call("put", named, move |store| async move { store.put(&key, value, lease).await }.boxed()).await
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        let (key, named) = (key.to_owned(), key);
        self.call("delete", named, |store| async move { store.delete(&key).await }.boxed()).await
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<u64> {
        let (prefix, named) = (prefix.to_owned(), prefix);
        self.call("delete_prefix", named, |store| async move { store.delete_prefix(&prefix).await }.boxed()).await
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let (broken_before, chance) = (self.weather.borrow().broken_watches, self.chance("events", prefix));
        let (prefix, asked) = (prefix.to_owned(), prefix);
        let open = move |store: MemoryStore| async move { store.watch(&prefix, from_revision).await }.boxed();
        let events = self.call("watch", asked, open).await?;
        let watching = Watching { events, link: self.clone(), chance, broken_before };
        let batches = stream::unfold(Some(watching), |watching| async move {
            let mut watching = watching?;
            let batch = watching.next().await;
            let goes_on = batch.is_ok().then_some(watching);
            Some((batch, goes_on))
        });
        Ok(WatchStream::new(batches))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId> {
        self.call("grant", "", move |store| async move { store.grant(ttl).await }.boxed()).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<KeepAlive> {
        self.call("keep_alive", "", move |store| async move { store.keep_alive(lease).await }.boxed()).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.call("revoke", "", move |store| async move { store.revoke(lease).await }.boxed()).await
    }
}
