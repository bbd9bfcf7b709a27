//! The reconciler: pictures of the cluster come in, and what is resident follows the plan in them, one expert at a time.
//! Each is told to the cluster as soon as it can be computed with, and no longer told before it goes. It decides nothing
//! (`reconcile` does), never makes a batch wait, and never holds more than the memory budget.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use conclave_placement::ids::{ExpertId, LayerIdx, PlanVersion, RouterId};
use conclave_placement::plan::Plan;
use conclave_placement::state::{ClusterState, Residency};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::failures::Failures;
use crate::loader::{Error, Weights};
use crate::metrics::Metrics;
use crate::reconcile::{self, Enough, Routers};
use crate::registration::Registration;
use crate::residency::Resident;

/// How often a growing residency is published while loading.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// How long an expert that is no longer told to the cluster is still answered for: a router that has not heard by then
/// is told NOT_RESIDENT, and asks another.
const RETIRE_GRACE: Duration = Duration::from_secs(2);
/// While batches are computed, loading rests this many times as long as it worked, and at most that long: it competes
/// with them for memory bandwidth, and on a CPU for cores.
const REST: (u32, Duration) = (2, Duration::from_secs(1));
/// A router that has not moved on to a plan for so long holds up nothing any more: it may be one that cannot read the plan.
/// What it still asks for is refused, and it asks another.
const ROUTERS_FOLLOW_WITHIN: Duration = Duration::from_secs(120);

/// Makes what is resident follow the plan.
#[derive(Debug)]
pub struct Reconciler<W> {
    weights: W,
    resident: Arc<Resident>,
    registration: Arc<Registration>,
    metrics: Metrics,
    budget: Budget,
    /// What the latest plan gives this worker: a plan is long, and pictures come more often than plans.
    assigned: (PlanVersion, Residency),
    /// Since when that plan is known here.
    assigned_at: Instant,
    /// Routers that were said to follow no plan after this.
    named: HashSet<RouterId>,
    /// What could not be loaded.
    failures: Failures,
    /// What retires, and when it is over; soonest first.
    retiring: VecDeque<(Instant, LayerIdx, ExpertId)>,
}

/// Memory for experts.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Bytes that one resident expert takes.
    pub expert_bytes: u64,
    /// Bytes that experts may take; 0 for no limit.
    pub bytes: u64,
}

/// What has come and is not told yet.
struct News {
    /// From when on it is to be told.
    due: Instant,
    any: bool,
}

/// How one pass over a plan ended.
#[derive(Debug, PartialEq, Eq)]
enum Pass {
    /// Everything is here that could be loaded.
    Done,
    /// Something must wait for memory that is being freed.
    Full,
    /// A newer plan, or the end.
    Interrupted,
}

impl Budget {
    /// How many more experts fit beside `bytes`.
    fn room(self, bytes: u64) -> usize {
        match self.bytes {
            0 => usize::MAX,
            budget => usize::try_from(budget.saturating_sub(bytes) / self.expert_bytes.max(1)).unwrap_or(usize::MAX),
        }
    }
}

impl<W: Weights> Reconciler<W> {
    pub fn new(
        weights: W,
        resident: Arc<Resident>,
        registration: Arc<Registration>,
        metrics: Metrics,
        budget: Budget,
    ) -> Self {
        let assigned = (PlanVersion::NONE, Residency::new());
        Self {
            weights,
            resident,
            registration,
            metrics,
            budget,
            assigned,
            assigned_at: Instant::now(),
            named: HashSet::new(),
            failures: Failures::default(),
            retiring: VecDeque::new(),
        }
    }

    /// Follows the plan until `stop`. The experts stay where they are then.
    pub async fn run(mut self, mut view: watch::Receiver<Arc<ClusterState>>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let state = view.borrow_and_update().clone();
            let pass = match &state.plan {
                Some(plan) => self.follow(plan, &state, &view, &stop).await,
                None => Pass::Done,
            };
            if pass == Pass::Interrupted {
                continue;
            }
            let enough = if pass == Pass::Full { Enough::One } else { Enough::All };
            // Loading may have taken long; letting go needs the newest picture, and the plan that was followed.
            let newest = view.borrow().clone();
            let has_room_now = match &newest.plan {
                Some(plan) if plan.version == self.assigned.0 => self.let_go(plan, &newest, enough).await,
                Some(_) => continue,
                None => false,
            };
            if pass == Pass::Full && has_room_now {
                continue;
            }
            let gone = self.retiring.front().map(|(at, ..)| *at);
            // What failed may have no room now: looking for it again and again would not make any.
            let retry = self.failures.next(&self.assigned.1).map(|at| at.max(Instant::now() + PUBLISH_EVERY));
            let wake = gone.into_iter().chain(retry).min();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                changed = view.changed() => if changed.is_err() { break },
                () = sleep_until(wake) => {}
            }
        }
        self.weights.close().await;
    }

    /// Loads what `plan` gives this worker and it lacks.
    async fn follow(
        &mut self,
        plan: &Plan,
        state: &ClusterState,
        view: &watch::Receiver<Arc<ClusterState>>,
        stop: &CancellationToken,
    ) -> Pass {
        if self.assigned.0 != plan.version {
            let id = self.registration.record().id;
            self.assigned = (plan.version, plan.assigned_to(&id));
            self.assigned_at = Instant::now();
            self.named.clear();
        }
        self.revive();
        let here = self.resident.snapshot();
        let lacking = reconcile::lacking(&self.assigned.1, &here.experts, state, self.budget.room(here.bytes));
        let (started, mut loaded) = (Instant::now(), 0);
        // The first expert is published at once: it makes this worker a serving one.
        let mut news = News { due: if here.count == 0 { started } else { started + PUBLISH_EVERY }, any: false };
        for (layer, expert) in lacking.load {
            let newer = view.borrow().plan.as_ref().is_some_and(|newest| newest.version != plan.version);
            if newer || stop.is_cancelled() {
                self.publish();
                return Pass::Interrupted;
            }
            if !self.failures.may_try((layer, expert), Instant::now()) {
                continue;
            }
            let now = view.borrow().clone();
            match self.bring((layer, expert), &now, &mut news, stop).await {
                Ok(()) => {
                    loaded += 1;
                    self.failures.succeeded((layer, expert));
                }
                Err(error) => {
                    self.failures.failed((layer, expert), Instant::now());
                    self.metrics.load_failures.inc();
                    tracing::error!(%layer, %expert, %error, "an expert could not be loaded");
                }
            }
        }
        self.publish();
        // Also where something is missing: what is here stays for as long as this plan is in force, so others may let go of
        // it. Two full workers would otherwise wait for each other for ever.
        let is_news = self.registration.acted_on(plan.version);
        if lacking.too_many > 0 {
            if self.retiring.is_empty() {
                let (experts, budget) = (lacking.too_many, self.budget.bytes);
                tracing::error!(plan = %plan.version, experts, budget, "the plan gives more experts than memory allows");
            }
            return Pass::Full;
        }
        if is_news {
            let (resident, seconds) = (self.resident.snapshot().count, started.elapsed().as_secs_f64());
            tracing::info!(plan = %plan.version, loaded, resident, seconds, "experts follow the plan");
        }
        Pass::Done
    }

    /// One expert: read, then on the tensor thread, then said to be here. What came before it is told meanwhile.
    async fn bring(
        &self,
        (layer, id): (LayerIdx, ExpertId),
        state: &ClusterState,
        news: &mut News,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        let (started, batches) = (Instant::now(), self.weights.batches());
        let mut bringing = std::pin::pin!(self.weights.bring(layer, id));
        loop {
            tokio::select! {
                biased;
                brought = &mut bringing => break brought?,
                // A file system that hangs must not hold up the end.
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep_until(news.due), if news.any => self.tell(news),
            }
        }
        self.resident.insert(layer, id, self.budget.expert_bytes);
        let took = started.elapsed();
        news.any = true;
        self.tell_if_due(news);
        self.metrics.load_seconds.observe(took.as_secs_f64());
        if !self.registration.is_measured() {
            match self.weights.measure(layer, id).await {
                Ok(speed) => self.registration.is_as_fast_as(speed),
                Err(error) => tracing::warn!(%error, "an expert could not be measured"),
            }
        }
        // Streams may be waiting for an expert that nobody else has: then there is nothing to be gentle with.
        let wanted_now = !reconcile::is_served(state, layer, id);
        if self.weights.batches() > batches && !wanted_now {
            let rest = (took * REST.0).min(REST.1);
            // Never beyond when the cluster is to hear of it.
            let until = (Instant::now() + rest).min(news.due.max(Instant::now()));
            stop.run_until_cancelled(tokio::time::sleep_until(until)).await;
            self.tell_if_due(news);
            stop.run_until_cancelled(tokio::time::sleep_until(started + took + rest)).await;
        }
        Ok(())
    }

    fn tell(&self, news: &mut News) {
        self.publish();
        *news = News { due: Instant::now() + PUBLISH_EVERY, any: false };
    }

    fn tell_if_due(&self, news: &mut News) {
        if news.any && news.due <= Instant::now() {
            self.tell(news);
        }
    }

    /// What retires and is wanted again need not be loaded.
    fn revive(&mut self) {
        let assigned = &self.assigned.1;
        let resident = &self.resident;
        self.retiring
            .retain(|(_, layer, expert)| !(assigned.contains(*layer, *expert) && resident.revive(*layer, *expert)));
    }

    /// Retires what may go, and drops what retired long enough ago. Whether anything was dropped.
    async fn let_go(&mut self, plan: &Plan, state: &ClusterState, enough: Enough) -> bool {
        let now = Instant::now();
        self.failures.forget(now);
        // Without the store this picture may be old: whoever should have an expert may be gone by now.
        let is_current = self.registration.is_registered();
        let routers = self.routers(plan, state);
        let mut dropped = false;
        while let Some((_, layer, expert)) = self.retiring.front().copied().filter(|(at, ..)| *at <= now) {
            self.retiring.pop_front();
            let it = Residency::from_iter([(layer, expert)]);
            if !is_current {
                self.retiring.push_back((now + RETIRE_GRACE, layer, expert));
            } else if reconcile::releasable(plan, &self.assigned.1, &it, state, (Enough::One, routers)).is_empty() {
                // Whoever had it has gone meanwhile.
                self.resident.revive(layer, expert);
            } else {
                self.resident.forget(layer, expert, self.budget.expert_bytes);
                dropped = true;
                if let Err(error) = self.weights.drop_expert(layer, expert).await {
                    tracing::error!(%layer, %expert, %error, "an expert could not be dropped");
                }
            }
        }
        if is_current {
            let here = self.resident.snapshot();
            let goes = reconcile::releasable(plan, &self.assigned.1, &here.experts, state, (enough, routers));
            for (layer, expert) in goes.iter() {
                self.resident.retire(layer, expert);
                self.retiring.push_back((now + RETIRE_GRACE, layer, expert));
            }
            if !goes.is_empty() {
                tracing::info!(plan = %plan.version, experts = goes.len(), "experts moved away");
            }
        }
        self.publish();
        dropped
    }

    /// Whether routers that lag are still waited for; those that are not, are named, once for each plan.
    fn routers(&mut self, plan: &Plan, state: &ClusterState) -> Routers {
        if self.assigned_at.elapsed() < ROUTERS_FOLLOW_WITHIN {
            return Routers::AreWaitedFor;
        }
        for router in state.routers.values().filter(|router| router.plan_version < plan.version) {
            if self.named.insert(router.id.clone()) {
                tracing::warn!(router = %router.id, plan = %plan.version, "a router does not follow, and is waited for no longer");
            }
        }
        Routers::HadTheirTime
    }

    fn publish(&self) {
        let snapshot = self.resident.snapshot();
        self.metrics.resident_experts.set(i64::try_from(snapshot.count).unwrap_or(i64::MAX));
        self.metrics.resident_bytes.set(snapshot.bytes);
        self.registration.hold(&snapshot.experts, self.failures.told());
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
