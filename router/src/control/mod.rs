//! The placement controller: turns what is observed into a plan, on the one router that leads.
//!
//! In: the cluster's state, and whether this router leads. Out: plans in the store, by compare-and-swap on their parent.
//! Never here: the data path; a second opinion. A leader that lost its place loses the swap and does no harm.
//!
//! What is missing is placed at once. What could only be better placed is looked at from time to time, when a worker has
//! joined, or when the load is uneven, and never while the last plan is still being carried out.

mod policy;

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    election::Term,
    ids::RouterId,
    keys::Keys,
    load::layer_balancedness,
    plan::Plan,
    planner,
    publication::{self, publish},
    state::ClusterState,
    store::Store,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub use policy::{Policy, Rebalancing};

pub use crate::metrics::PlacementMetrics;
use policy::Urge;

/// After a failed write, before the next.
const RETRY: Duration = Duration::from_millis(500);
/// Looks for a better plan are at least this far apart, whatever the reason.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Where the load is uneven, experts may move so many times sooner than after a whole period.
const SOONER: u32 = 6;

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

/// When a better plan was looked for.
struct Looks {
    last: Instant,
    /// The last one was found, and may be one of several.
    found: bool,
    /// How many workers there were then.
    workers: usize,
}

impl Controller {
    /// Plans whenever this router leads and the cluster changes, until `stop`.
    pub async fn run(
        self,
        mut cluster: watch::Receiver<Arc<ClusterState>>,
        mut leads: watch::Receiver<Option<Term>>,
        stop: CancellationToken,
    ) {
        let mut looks = Looks { last: Instant::now(), found: false, workers: 0 };
        loop {
            let state = cluster.borrow_and_update().clone();
            let leading = leads.borrow_and_update().is_some();
            let wake = match leading {
                true => self.reconcile(&state, &mut looks).await,
                false => None,
            };
            if !leading {
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
    async fn reconcile(&self, state: &Arc<ClusterState>, looks: &mut Looks) -> Option<Instant> {
        if let (Some(plan), Some(load)) = (&state.plan, policy::known_load(state)) {
            let balance = layer_balancedness(plan, &load, &planner::candidates(state));
            self.metrics.observe(balance.into_iter().map(|(layer, ratio)| (layer.0, ratio)));
        }
        if let Some(plan) = self.next(state, false).await {
            return self.put(&plan).await;
        }
        let period = self.policy.rebalance.period;
        if period.is_zero() {
            return None;
        }
        let workers = state.workers.len();
        let wait = match self.policy.urge(state) {
            Urge::Unsettled => return None,
            _ if looks.found => LOOK_EVERY,
            // Of no use the last time; another one may be.
            Urge::Newcomer if looks.workers == workers => period,
            Urge::Newcomer => LOOK_EVERY,
            Urge::Uneven => period / SOONER,
            Urge::None => period,
        };
        let due = looks.last + wait;
        if due > Instant::now() {
            return Some(due);
        }
        let better = self.next(state, true).await;
        *looks = Looks { last: Instant::now(), found: better.is_some(), workers };
        match better {
            Some(plan) => self.put(&plan).await,
            None => Some(looks.last + period),
        }
    }

    /// The plan that is due, made where it may take its time.
    async fn next(&self, state: &Arc<ClusterState>, may_move: bool) -> Option<Plan> {
        let (policy, state) = (self.policy, Arc::clone(state));
        match tokio::task::spawn_blocking(move || policy.due(&state, may_move)).await {
            Ok(Ok(plan)) => plan,
            Ok(Err(error)) => {
                debug!(%error, "no plan");
                None
            }
            Err(error) => {
                error!(%error, "the planner panicked");
                None
            }
        }
    }

    /// Writes a plan; says when to try again where the store would not have it.
    async fn put(&self, plan: &Plan) -> Option<Instant> {
        match publish(&*self.store, &self.keys, plan, self.author.as_str()).await {
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
