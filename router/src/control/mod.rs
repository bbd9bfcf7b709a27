//! The placement controller: turns what is observed into a plan, on the one router that leads.
//!
//! In: the cluster's state, and whether this router leads. Out: plans in the store, by compare-and-swap on their parent.
//! Never here: the data path; a second opinion. A leader that lost its place loses the swap and does no harm.
//!
//! What is missing is placed at once, unless most workers are missing: then they are given a moment to come back. What could
//! only be better placed is looked at from time to time, when a worker has joined, or when the load is uneven, and never
//! while the last plan is still being carried out. Which plan it should be is `placement::policy`'s to say.

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    election::Term,
    ids::RouterId,
    keys::Keys,
    lint::Severity,
    load::{Load, layer_balancedness},
    plan::Plan,
    planner,
    policy::{self, Policy, Urge},
    publication::{self, publish},
    state::ClusterState,
    store::Store,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use crate::metrics::PlacementMetrics;

/// After a failed write, before the next.
const RETRY: Duration = Duration::from_millis(500);
/// Looks for a better plan are at least this far apart, whatever the reason.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Where the load is uneven, experts may move so many times sooner than after a whole period.
const SOONER: u32 = 6;
/// Where most workers went at once, they may come back for so long before their experts are placed elsewhere.
const COME_BACK: Duration = Duration::from_secs(5);
/// How long the first plan waits for all of the workers that it should wait for, once the first of them is there.
pub const FIRST_PLAN_WITHIN: Duration = Duration::from_secs(60);
/// What the linter says of one plan, in the log.
const NOTES_LOGGED: usize = 5;

/// The controller of one router.
#[derive(Debug)]
pub struct Controller {
    /// Where plans go.
    pub store: Arc<dyn Store>,
    /// Under which keys.
    pub keys: Keys,
    /// Who signs them.
    pub author: RouterId,
    /// How they are made.
    pub policy: Policy,
    /// What is told of them.
    pub metrics: Arc<PlacementMetrics>,
}

/// What the controller remembers between two looks.
#[derive(Default)]
struct Memory {
    /// When a better plan was looked for.
    last: Option<Instant>,
    /// The last one was found, and may be one of several.
    found: bool,
    /// How many workers there were then.
    workers: usize,
    /// The balancedness that was the best there was.
    reached: Option<f64>,
    /// The last load of which enough was known: a lull is no reason to forget it.
    load: Option<Arc<Load>>,
    /// Until when workers that went all at once may come back.
    come_back: Option<Instant>,
    /// Until when the first plan waits for all workers.
    first_plan: Option<Instant>,
    /// Why there is no plan, as it was said last: said once.
    trouble: Option<String>,
}

impl Controller {
    /// Plans whenever this router leads and the cluster changes, until `stop`.
    pub async fn run(
        self,
        mut cluster: watch::Receiver<Arc<ClusterState>>,
        mut leads: watch::Receiver<Option<Term>>,
        stop: CancellationToken,
    ) {
        let mut memory = Memory::default();
        loop {
            let state = cluster.borrow_and_update().clone();
            let term = *leads.borrow_and_update();
            let wake = match term {
                Some(term) => self.reconcile(&state, &mut memory, term).await,
                None => None,
            };
            if term.is_none() {
                memory = Memory::default();
                self.metrics.forget();
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = cluster.changed() => if changed.is_err() { return },
                changed = leads.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
        }
    }

    /// Publishes the next plan if one is due. Says when to look again though nothing has changed.
    async fn reconcile(&self, state: &Arc<ClusterState>, memory: &mut Memory, term: Term) -> Option<Instant> {
        self.observe(state, memory);
        if let Some(until) = memory.waits_for_workers(state, &self.policy) {
            return Some(until);
        }
        if let Some(plan) = self.next(state, memory, false).await {
            return self.put(&plan, term).await;
        }
        let period = self.policy.rebalance.period;
        if period.is_zero() {
            return None;
        }
        let last = *memory.last.get_or_insert_with(Instant::now);
        let urge = self.policy.urge(state, memory.load.as_deref());
        let due = last + memory.pause(urge, self.policy.rebalance.gain, period, state.workers.len())?;
        if due > Instant::now() {
            return Some(due);
        }
        let better = self.next(state, memory, true).await;
        memory.last = Some(Instant::now());
        memory.found = better.is_some();
        memory.workers = state.workers.len();
        memory.reached = if let Urge::Uneven(balance) = urge { Some(balance) } else { None };
        match better {
            Some(plan) => self.put(&plan, term).await,
            None => Some(Instant::now() + period),
        }
    }

    /// Remembers the load, and tells how the plan stands to it.
    fn observe(&self, state: &ClusterState, memory: &mut Memory) {
        let known = policy::known_load(state);
        let balance = state.plan.as_ref().zip(known.as_ref()).map(|(plan, load)| {
            let balance = layer_balancedness(plan, load, &planner::candidates(state));
            balance.into_iter().map(|(layer, ratio)| (layer.0, ratio)).collect()
        });
        self.metrics.balance(balance.unwrap_or_default());
        if known.is_some() {
            memory.load = known.map(Arc::new);
        }
        let on_their_way = state.plan.as_ref().map_or(0, |plan| policy::on_their_way(plan, state));
        self.metrics.on_their_way.set(i64::try_from(on_their_way).unwrap_or(i64::MAX));
    }

    /// The plan that is due, made where it may take its time.
    async fn next(&self, state: &Arc<ClusterState>, memory: &mut Memory, may_move: bool) -> Option<Plan> {
        let (policy, state, load) = (self.policy, Arc::clone(state), memory.load.clone());
        let made = tokio::task::spawn_blocking(move || policy.due(&state, load.as_deref(), may_move)).await;
        let trouble = match made {
            Ok(Ok(Some(linted))) => {
                log(&linted);
                if linted.is_sound() {
                    memory.trouble = None;
                    return Some(linted.plan);
                }
                "the plan that was made is not sound".to_owned()
            }
            Ok(Ok(None)) => {
                memory.trouble = None;
                return None;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => {
                error!(%panic, "the planner panicked");
                return None;
            }
        };
        if memory.trouble.as_ref() != Some(&trouble) {
            warn!(trouble, "no plan can be made");
            memory.trouble = Some(trouble);
        }
        None
    }

    /// Writes a plan; says when to try again where the store would not have it.
    async fn put(&self, plan: &Plan, term: Term) -> Option<Instant> {
        match publish(&*self.store, &self.keys, plan, self.author.as_str(), Some(term)).await {
            Ok(()) => {
                self.metrics.published.inc();
                info!(version = plan.version.0, policy = %plan.policy, reason = %plan.reason, "plan published");
            }
            Err(superseded @ publication::Error::Superseded { .. }) => info!(%superseded, "another plan came first"),
            Err(error) => {
                warn!(%error, "plan could not be written");
                return Some(Instant::now() + RETRY);
            }
        }
        None
    }
}

impl Memory {
    /// Until when nothing is planned, because most workers have yet to come, or went at once and may come back.
    fn waits_for_workers(&mut self, state: &ClusterState, policy: &Policy) -> Option<Instant> {
        if !policy.lacks_workers(state) || state.workers.is_empty() {
            self.first_plan = None;
        } else {
            let now = Instant::now();
            let until = *self.first_plan.get_or_insert(now + FIRST_PLAN_WITHIN);
            if until > now {
                return Some(until);
            }
            let (there, wanted) = (state.workers.len(), policy.min_workers);
            warn!(
                there,
                wanted, "the first plan has waited long enough for workers: it is made for those that are there"
            );
        }
        if !policy::is_decimated(state) {
            self.come_back = None;
            return None;
        }
        let until = *self.come_back.get_or_insert_with(|| {
            warn!(workers = state.workers.len(), "most workers are gone: they may come back before experts are moved");
            Instant::now() + COME_BACK
        });
        (until > Instant::now()).then_some(until)
    }

    /// How long after the last look the next one is due; `None` while it is not.
    fn pause(&self, urge: Urge, gain: f64, period: Duration, workers: usize) -> Option<Duration> {
        let fell = |balance: f64| self.reached.is_none_or(|reached| balance < reached - gain);
        Some(match urge {
            Urge::Unsettled(_) => return None,
            _ if self.found => LOOK_EVERY,
            Urge::Newcomer if self.workers != workers => LOOK_EVERY,
            // Where nothing better was found, it must be worse than it was then.
            Urge::Uneven(balance) if fell(balance) => period / SOONER,
            // Of no use the last time; another one may be.
            Urge::Newcomer | Urge::Uneven(_) | Urge::None => period,
        })
    }
}

/// The worst that the linter says of a plan.
fn log(linted: &policy::Linted) {
    let version = linted.plan.version.0;
    let grave = linted.notes.iter().filter(|note| note.severity >= Severity::Warning);
    for note in grave.clone().take(NOTES_LOGGED) {
        warn!(version, %note, "plan");
    }
    if let Some(more) = grave.count().checked_sub(NOTES_LOGGED).filter(|more| *more > 0) {
        warn!(version, more, "plan: see `conclave placement lint`");
    }
}

#[cfg(test)]
mod tests;
