//! The witness: what really is in the store, what workers really hold, and which promise was broken.
//!
//! In: every event of the store in order, every expert that comes or goes. Out: the first breach, and what led to it.
//! Never here: anything that the code under test could see.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use conclave_placement::{
    ids::{ExpertId, LayerIdx, RouterId, WorkerId},
    keys::{Keys, Slot},
    plan::Plan,
    state::{ClusterState, DrainOrder, LeaderRecord, Residency, RouterRecord, WorkerRecord},
    store::Event,
};
use conclave_router::control::FIRST_PLAN_WITHIN;
use parking_lot::Mutex;

use crate::{judge, scenario::Scenario};

/// What is remembered of what led to a breach.
const REMEMBERED: usize = 200;
/// How old a picture a leader may plan by: one that was cut off and lagged after that, and a call that took its time.
const OLDEST: Duration = Duration::from_secs(20);
/// How long calls, watches and pictures may lag behind beside the leases.
const LAG: Duration = Duration::from_secs(6);

/// Sees everything, from all hosts.
pub struct Witness {
    scenario: Arc<Scenario>,
    seen: Mutex<Seen>,
}

struct Seen {
    now: Duration,
    state: ClusterState,
    /// What the cluster was like at any moment of the last [`OLDEST`] since the plan in force was written, and from when on:
    /// what a leader may have planned by.
    moments: VecDeque<(Duration, ClusterState)>,
    held: BTreeMap<WorkerId, Residency>,
    /// When a copy of an expert was last lost in a way that no rule could prevent.
    lost: BTreeMap<(LayerIdx, ExpertId), Duration>,
    leading: BTreeMap<RouterId, bool>,
    breach: Option<String>,
    story: VecDeque<(Duration, String)>,
    tally: Tally,
}

/// What happened, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub plans: u64,
    pub loaded: u64,
    pub let_go: u64,
    pub left: u64,
}

/// How a worker came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It handed over what it held.
    HandedOver,
    /// It had nobody to hand over to, or its time was over.
    Forced,
    Crashed,
}

impl Witness {
    pub fn new(scenario: Arc<Scenario>) -> Self {
        let seen = Seen {
            now: Duration::ZERO,
            state: ClusterState::empty(),
            moments: VecDeque::new(),
            held: BTreeMap::new(),
            lost: BTreeMap::new(),
            leading: BTreeMap::new(),
            breach: None,
            story: VecDeque::new(),
            tally: Tally::default(),
        };
        Self { scenario, seen: Mutex::new(seen) }
    }

    pub fn tick(&self, now: Duration) {
        self.seen.lock().now = now;
    }

    /// Something that happened, for people.
    pub fn tell(&self, what: impl Into<String>) {
        self.seen.lock().tell(what.into());
    }

    /// A promise that was broken.
    pub fn accuse(&self, what: String) {
        self.seen.lock().accuse(what);
    }

    pub fn breach(&self) -> Option<String> {
        self.seen.lock().breach.clone()
    }

    pub fn tally(&self) -> Tally {
        self.seen.lock().tally
    }

    /// The latest of what happened, one line each.
    pub fn story(&self) -> String {
        let seen = self.seen.lock();
        let line = |(at, what): &(Duration, String)| format!("  {:7.3} {what}\n", at.as_secs_f64());
        seen.story.iter().map(line).collect()
    }

    /// What each worker holds.
    pub fn holdings(&self) -> String {
        let seen = self.seen.lock();
        let experts = |held: &Residency| {
            held.iter().map(|(layer, expert)| format!("{layer}/{expert}")).collect::<Vec<_>>().join(" ")
        };
        let lines = seen.held.iter().map(|(id, held)| format!("{id} holds {}", experts(held)));
        lines.collect::<Vec<_>>().join("; ")
    }

    /// The store's own state, at this moment.
    pub fn state(&self) -> ClusterState {
        self.seen.lock().state.clone()
    }

    /// An event of the store.
    pub fn saw(&self, keys: &Keys, event: Event) {
        let mut seen = self.seen.lock();
        let Some(slot) = keys.slot(event.key()) else { return };
        seen.state.revision = event.revision();
        let value = match event {
            Event::Put(entry) => Some(entry.value),
            Event::Delete { .. } => None,
        };
        match (slot, value) {
            (Slot::Plan, Some(value)) => match Plan::decode(&value) {
                Ok(plan) => self.saw_plan(&mut seen, plan),
                Err(error) => seen.accuse(format!("the plan in the store cannot be read: {error}")),
            },
            (Slot::Plan, None) => seen.accuse("the plan was deleted".into()),
            (Slot::Worker(id), value) => {
                let record = value.and_then(|value| WorkerRecord::decode(&value).ok());
                seen.saw_worker(id, record);
            }
            (Slot::Router(id), value) => {
                match value.and_then(|value| RouterRecord::decode(&value).ok()) {
                    Some(record) => seen.state.routers.insert(id, record),
                    None => seen.state.routers.remove(&id),
                };
            }
            (Slot::Drain(id), value) => {
                match value.and_then(|value| DrainOrder::decode(&value).ok()) {
                    Some(order) => seen.state.drains.insert(id, order.incarnation),
                    None => seen.state.drains.remove(&id),
                };
                seen.remember_moment();
            }
            (Slot::Leader, value) => {
                let leader = value.and_then(|value| LeaderRecord::decode(&value).ok());
                seen.state.leader = leader.map(|leader| leader.router);
                let said = format!("leader in the store: {:?}", seen.state.leader);
                seen.tell(said);
            }
            (Slot::Model | Slot::Load(_), _) => {}
        }
    }

    fn saw_plan(&self, seen: &mut Seen, plan: Plan) {
        seen.tally.plans += 1;
        let said = format!("plan {} ({}): {}", plan.version, plan.reason, judge::shown(&plan));
        seen.tell(said);
        seen.forget_moments();
        let moments = seen.moments.iter().rev().map(|(_, moment)| moment);
        // The first plan waits for workers, but not for ever.
        let least = if seen.now < FIRST_PLAN_WITHIN { self.scenario.policy.min_workers } else { 1 };
        let faults = judge::faults(&self.scenario, &plan, seen.state.plan.as_deref(), least, moments);
        if let Some(fault) = faults {
            seen.accuse(fault);
        }
        seen.state.plan = Some(Arc::new(plan));
        seen.moments.clear();
        seen.remember_moment();
    }

    /// A worker's process has begun, and holds nothing.
    pub fn began(&self, worker: &WorkerId) {
        let mut seen = self.seen.lock();
        seen.tell(format!("{worker} begins"));
        seen.held.insert(worker.clone(), Residency::new());
    }

    /// A worker has room for another expert, or should have.
    pub fn begins_to_load(&self, worker: &WorkerId, expert: (LayerIdx, ExpertId)) {
        let mut seen = self.seen.lock();
        let (layer, id) = expert;
        let held = seen.held.entry(worker.clone()).or_default();
        if held.contains(layer, id) {
            return;
        }
        let count = held.len() + 1;
        let room = self.scenario.workers.iter().find(|known| known.id == *worker).map_or(0, |known| known.room);
        if room > 0 && count > room {
            seen.accuse(format!("{worker} takes {count} experts into memory, {room} fit"));
        }
    }

    pub fn holds(&self, worker: &WorkerId, (layer, expert): (LayerIdx, ExpertId)) {
        let mut seen = self.seen.lock();
        seen.tally.loaded += 1;
        seen.tell(format!("{worker} has {layer}/{expert}"));
        seen.held.entry(worker.clone()).or_default().insert(layer, expert);
    }

    /// A worker lets an expert go.
    pub fn lets_go(&self, worker: &WorkerId, (layer, expert): (LayerIdx, ExpertId)) {
        let mut seen = self.seen.lock();
        seen.tally.let_go += 1;
        seen.tell(format!("{worker} lets go of {layer}/{expert}"));
        if !seen.held.get_mut(worker).is_some_and(|held| held.remove(layer, expert)) {
            return;
        }
        if !seen.is_held(layer, expert) && !seen.was_lost(layer, expert, self.scenario.ttl * 2 + LAG) {
            seen.accuse(format!("{worker} let go of {layer}/{expert}, which nobody else holds"));
        }
    }

    /// A worker's process has ended, and with it all that it held.
    pub fn ended(&self, worker: &WorkerId, end: End) {
        let mut seen = self.seen.lock();
        seen.tell(format!("{worker} ended: {end:?}"));
        seen.tally.left += u64::from(end != End::Crashed);
        let held = seen.held.remove(worker).unwrap_or_default();
        for (layer, expert) in held.iter() {
            let now = seen.now;
            if end != End::HandedOver {
                seen.lost.insert((layer, expert), now);
            } else if !seen.is_held(layer, expert) && !seen.was_lost(layer, expert, self.scenario.ttl * 2 + LAG) {
                seen.accuse(format!("{worker} left with {layer}/{expert}, which nobody else holds"));
            }
        }
    }

    pub fn leads(&self, router: &RouterId, leads: bool) {
        self.seen.lock().leading.insert(router.clone(), leads);
    }

    /// Whether all is as it should be in a cluster that was left alone for long enough; else what is not.
    pub fn unsettled(&self) -> Option<String> {
        let seen = self.seen.lock();
        judge::unsettled(&self.scenario, &seen.state, &seen.held, &seen.leading)
    }
}

impl Seen {
    fn tell(&mut self, what: String) {
        if self.story.len() == REMEMBERED {
            self.story.pop_front();
        }
        self.story.push_back((self.now, what));
    }

    /// A promise that was broken. The first one counts.
    fn accuse(&mut self, what: String) {
        self.tell(format!("BREACH: {what}"));
        self.breach.get_or_insert(what);
    }

    fn saw_worker(&mut self, id: WorkerId, record: Option<WorkerRecord>) {
        match record {
            Some(record) => {
                self.tell(format!("{id} is {:?}, acted on {}", record.state, record.plan_version));
                self.state.workers.insert(id, record);
            }
            None => {
                self.tell(format!("{id} is gone from the store"));
                self.state.workers.remove(&id);
            }
        }
        self.remember_moment();
    }

    fn remember_moment(&mut self) {
        self.forget_moments();
        self.moments.push_back((self.now, self.state.clone()));
    }

    /// A moment lasts until the next one begins.
    fn forget_moments(&mut self) {
        while self.moments.get(1).is_some_and(|(next, _)| self.now.saturating_sub(*next) > OLDEST) {
            self.moments.pop_front();
        }
    }

    fn is_held(&self, layer: LayerIdx, expert: ExpertId) -> bool {
        self.held.values().any(|held| held.contains(layer, expert))
    }

    /// Whether a copy was lost so lately that nobody need have heard of it.
    fn was_lost(&self, layer: LayerIdx, expert: ExpertId, lately: Duration) -> bool {
        self.lost.get(&(layer, expert)).is_some_and(|at| self.now.saturating_sub(*at) <= lately)
    }
}
