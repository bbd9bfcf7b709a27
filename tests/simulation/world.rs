//! The world of one seed: hosts are started, broken and mended as the scenario says, and the witness is asked at each step.
//!
//! In: a scenario. Out: what happened, in numbers and as a story, and the first breach. Never here: a rule of the cluster.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use conclave_placement::{
    chance,
    ids::{Cluster, PlanVersion, RouterId, WorkerId},
    keys::Keys,
    plan::Plan,
    state::DrainOrder,
    store::{Store, memory::MemoryStore},
};
use futures::FutureExt;
use parking_lot::Mutex;
use rand::RngCore;
use tokio::sync::{mpsc, watch};

use crate::{
    depot::{self, ORDERS, Order},
    link::{Link, Weather},
    log::Errors,
    router,
    scenario::{Fault, Scenario, chance_of},
    witness::{End, Tally, Witness},
    worker,
};

/// How far all clocks move in one step. They never differ by more.
const TICK: Duration = Duration::from_millis(20);
/// How long a cluster that is left alone may take to settle.
const PATIENCE: Duration = Duration::from_secs(150);
/// How often it is looked at meanwhile, in steps.
const LOOK_EVERY: u32 = 10;
/// How long nothing may change for it to count as settled, beside the time in which experts may move.
const STILL: Duration = Duration::from_secs(4);

const CALM: Weather = Weather { reachable: true, watching: true, losses: 0, broken_watches: 0 };

/// What is wrong on purpose, for the proof that it would be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// Workers let go of what is planned elsewhere, whoever holds it.
    CredulousWorkers,
    /// Workers have half of the memory that they tell of.
    Boasting,
    /// Somebody writes a plan that does not follow the one in force.
    LooseCannon,
    /// A planner drops an expert.
    Forgetful,
    /// A planner gives an expert to a worker that is not there.
    Haunted,
}

/// How a seed went.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub tally: Tally,
    /// What was broken, if anything.
    pub breach: Option<String>,
    /// The latest of what happened.
    pub story: String,
}

/// Lives through one scenario.
pub fn live(scenario: Scenario, sabotage: Sabotage) -> Outcome {
    let scenario = Arc::new(scenario);
    let witness = Arc::new(Witness::new(Arc::clone(&scenario)));
    let seed = scenario.seed;
    // Names of runs and waits between tries are drawn from it.
    chance::repeat(seed);
    let errors = Errors(Arc::clone(&witness));
    let outcome =
        tracing::subscriber::with_default(errors, || World::new(scenario, Arc::clone(&witness), sabotage).run());
    let breach = outcome.err().or_else(|| witness.breach());
    Outcome { seed, tally: witness.tally(), breach, story: witness.story() }
}

struct World {
    scenario: Arc<Scenario>,
    witness: Arc<Witness>,
    keys: Keys,
    sabotage: Sabotage,
    sim: turmoil::Sim<'static>,
    orders: mpsc::Sender<Order>,
    weather: BTreeMap<String, watch::Sender<Weather>>,
    favourite: watch::Sender<u16>,
    /// What must be undone, and when.
    mending: Vec<(Duration, Mend)>,
    faults: std::vec::IntoIter<(Duration, Fault)>,
}

enum Mend {
    Start(String),
    Reach(String),
    Watch(String),
}

fn router_id(place: usize) -> RouterId {
    RouterId::parse(&format!("r{place}")).expect("a valid name")
}

impl World {
    fn new(scenario: Arc<Scenario>, witness: Arc<Witness>, sabotage: Sabotage) -> Self {
        let mut builder = turmoil::Builder::new();
        let lifetime = scenario.calm_again + PATIENCE + Duration::from_secs(60);
        builder.tick_duration(TICK).simulation_duration(lifetime).rng_seed(scenario.seed).enable_random_order();
        let mut sim = builder.build();
        let keys = Keys::new(&Cluster::parse("simulated").expect("a valid name"));
        let (orders, taken) = mpsc::channel(ORDERS);
        let taken = Mutex::new(Some(taken));
        let (seen, seen_keys) = (Arc::clone(&witness), keys.clone());
        sim.host("store", move || {
            let taken = taken.lock().take();
            let (keys, witness) = (seen_keys.clone(), Arc::clone(&seen));
            async move {
                match taken {
                    Some(taken) => depot::run(taken, keys, witness).await,
                    None => Err("the store does not crash here".into()),
                }
            }
        });
        let faults = scenario.faults.clone().into_iter();
        let favourite = watch::Sender::new(0);
        let (weather, mending) = (BTreeMap::new(), Vec::new());
        Self { scenario, witness, keys, sabotage, sim, orders, weather, favourite, mending, faults }
    }

    fn run(mut self) -> Result<(), String> {
        self.witness.tell(self.scenario.to_string());
        for place in 0..self.scenario.routers {
            self.add_router(place);
        }
        let mut waiting: Vec<usize> = (0..self.scenario.workers.len()).collect();
        while self.sim.elapsed() < self.scenario.calm_again {
            let now = self.sim.elapsed();
            let (due, later) = waiting.into_iter().partition(|place| self.scenario.workers[*place].starts <= now);
            waiting = later;
            let due: Vec<usize> = due;
            due.into_iter().for_each(|place| self.add_worker(place));
            while let Some((_, fault)) = self.faults.as_slice().first().filter(|(at, _)| *at <= now).copied() {
                self.faults.next();
                self.strike(fault);
            }
            self.mend(now);
            self.step()?;
        }
        match self.sabotage {
            Sabotage::LooseCannon => self.write_orphan(),
            Sabotage::Forgetful => self.write_holders(Vec::new()),
            Sabotage::Haunted => self.write_holders(vec![WorkerId::parse("ghost").expect("a valid name")]),
            Sabotage::None | Sabotage::CredulousWorkers | Sabotage::Boasting => {}
        }
        self.mend(Duration::MAX);
        self.weather.values().for_each(|weather| weather.send_modify(|weather| weather.losses = 0));
        self.witness.tell("calm again");
        self.settle()
    }

    fn step(&mut self) -> Result<(), String> {
        self.witness.tick(self.sim.elapsed());
        self.sim.step().map_err(|error| format!("a process failed: {error}"))?;
        self.witness.breach().map_or(Ok(()), Err)
    }

    /// Goes on until the cluster is as it should be, and stays so.
    fn settle(&mut self) -> Result<(), String> {
        let patience = self.sim.elapsed() + PATIENCE;
        let still = STILL + self.scenario.policy.rebalance.period * 2;
        let mut since = self.sim.elapsed();
        let mut plan = None;
        loop {
            for _ in 0..LOOK_EVERY {
                self.step()?;
            }
            self.somebody_must_work();
            let (now, state) = (self.sim.elapsed(), self.witness.state());
            let unsettled = self.witness.unsettled();
            let version = state.plan.as_ref().map(|plan| plan.version);
            if unsettled.is_some() || version != plan {
                since = now;
                plan = version;
            }
            if now - since >= still {
                return Ok(());
            }
            if now > patience {
                let what = unsettled.unwrap_or_else(|| format!("plans keep coming, the latest is {plan:?}"));
                self.witness.tell(format!("in the end: {}", self.witness.holdings()));
                return Err(format!("not settled after {PATIENCE:?}: {what}"));
            }
        }
    }

    fn weather_over(&mut self, name: &str) -> watch::Receiver<Weather> {
        let rough = Weather { losses: self.scenario.losses, ..CALM };
        self.weather.entry(name.to_owned()).or_insert_with(|| watch::Sender::new(rough)).subscribe()
    }

    fn add_worker(&mut self, place: usize) {
        let mut worker = self.scenario.workers[place].clone();
        if self.sabotage == Sabotage::Boasting && worker.room > 0 {
            worker.room *= 2;
        }
        let name = worker.id.to_string();
        let (scenario, witness, keys) = (Arc::clone(&self.scenario), Arc::clone(&self.witness), self.keys.clone());
        let (orders, weather) = (self.orders.clone(), self.weather_over(&name));
        let (runs, is_credulous) = (Mutex::new(0), self.sabotage == Sabotage::CredulousWorkers);
        self.sim.host(name.clone(), move || {
            let run = next(&runs);
            let link = Link::new(
                orders.clone(),
                weather.clone(),
                chance_of(scenario.seed, &format!("{name} link"), run).next_u64(),
            );
            let run = worker::Run {
                scenario: Arc::clone(&scenario),
                worker: worker.clone(),
                keys: keys.clone(),
                link,
                weather: weather.clone(),
                chance: chance_of(scenario.seed, &name, run),
                witness: Arc::clone(&witness),
                is_credulous,
            };
            run.run()
        });
    }

    fn add_router(&mut self, place: usize) {
        let id = router_id(place);
        let name = id.to_string();
        let (scenario, witness, keys) = (Arc::clone(&self.scenario), Arc::clone(&self.witness), self.keys.clone());
        let (orders, weather) = (self.orders.clone(), self.weather_over(&name));
        let (runs, favourite) = (Mutex::new(0), self.favourite.subscribe());
        self.sim.host(name.clone(), move || {
            let run = next(&runs);
            let link = Link::new(
                orders.clone(),
                weather.clone(),
                chance_of(scenario.seed, &format!("{name} link"), run).next_u64(),
            );
            let run = router::Run {
                scenario: Arc::clone(&scenario),
                id: id.clone(),
                keys: keys.clone(),
                link,
                favourite: favourite.clone(),
                chance: chance_of(scenario.seed, &name, run),
                witness: Arc::clone(&witness),
            };
            run.run()
        });
    }

    fn strike(&mut self, fault: Fault) {
        self.witness.tell(format!("{fault:?}"));
        let now = self.sim.elapsed();
        let worker = |place: usize| self.scenario.workers[place].id.clone();
        match fault {
            Fault::CrashWorker { worker: place, down } => {
                let id = worker(place);
                if self.crash(id.as_str(), now + down) {
                    self.witness.ended(&id, End::Crashed);
                }
            }
            Fault::CrashRouter { router, down } => self.crash_router(&router_id(router), now + down),
            Fault::CrashLeader { down } => {
                if let Some(leader) = self.witness.state().leader {
                    self.crash_router(&leader, now + down);
                }
            }
            Fault::CutWorker { worker: place, off } => self.cut(worker(place).as_str(), now + off),
            Fault::CutRouter { router, off } => self.cut(router_id(router).as_str(), now + off),
            Fault::LagWorker { worker: place, off } => self.lag(worker(place).as_str(), now + off),
            Fault::LagRouter { router, off } => self.lag(router_id(router).as_str(), now + off),
            Fault::BreakWatches => {
                self.weather.values().for_each(|weather| weather.send_modify(|weather| weather.broken_watches += 1));
            }
            Fault::PauseStore { time } => self.order(Order::Pause(time)),
            Fault::CompactStore => self.compact(),
            Fault::DrainWorker { worker: place } => self.drain(place),
            Fault::StartWorker { worker: place } => {
                let name = worker(place).to_string();
                if self.weather.contains_key(&name) && !self.sim.is_host_running(&*name) {
                    self.sim.bounce(name);
                }
            }
            Fault::DeleteWorkerRecord { worker: place } => {
                let key = self.keys.worker(&worker(place));
                self.do_in_store(async move |store| drop(store.delete(&key).await));
            }
            Fault::ShiftLoad => self.favourite.send_modify(|favourite| *favourite += 3),
        }
    }

    /// What was broken and is to be whole again by now.
    fn mend(&mut self, now: Duration) {
        let (due, later) = std::mem::take(&mut self.mending).into_iter().partition(|(at, _)| *at <= now);
        self.mending = later;
        let due: Vec<(Duration, Mend)> = due;
        for (_, mend) in due {
            match mend {
                // It may have been started meanwhile.
                Mend::Start(name) if self.is_running(&name) => {}
                Mend::Start(name) => self.sim.bounce(name),
                Mend::Watch(name) => self.weather[&name].send_modify(|weather| weather.watching = true),
                Mend::Reach(name) => self.weather[&name].send_modify(|weather| weather.reachable = true),
            }
        }
    }

    /// Starts a worker where none is left.
    fn somebody_must_work(&mut self) {
        let names: Vec<String> = self.scenario.workers.iter().map(|worker| worker.id.to_string()).collect();
        let left = names.iter().any(|name| self.is_running(name));
        if let (false, Some(name)) = (left, names.first()) {
            self.sim.bounce(name.as_str());
        }
    }

    fn is_running(&mut self, name: &str) -> bool {
        self.weather.contains_key(name) && self.sim.is_host_running(name)
    }

    /// Ends a process at once, and starts it again later. False where there is none.
    fn crash(&mut self, name: &str, until: Duration) -> bool {
        let running = self.is_running(name);
        if running {
            self.sim.crash(name);
            self.mending.push((until, Mend::Start(name.to_owned())));
        }
        running
    }

    fn crash_router(&mut self, id: &RouterId, until: Duration) {
        if self.crash(id.as_str(), until) {
            self.witness.leads(id, false);
        }
    }

    fn cut(&mut self, name: &str, until: Duration) {
        if let Some(weather) = self.weather.get(name) {
            weather.send_modify(|weather| weather.reachable = false);
            self.mending.push((until, Mend::Reach(name.to_owned())));
        }
    }

    fn lag(&mut self, name: &str, until: Duration) {
        if let Some(weather) = self.weather.get(name) {
            weather.send_modify(|weather| weather.watching = false);
            self.mending.push((until, Mend::Watch(name.to_owned())));
        }
    }

    fn drain(&self, place: usize) {
        let id = &self.scenario.workers[place].id;
        let Some(record) = self.witness.state().workers.remove(id) else { return };
        let (key, order) = (self.keys.drain(id), DrainOrder { incarnation: record.incarnation }.encode());
        self.do_in_store(async move |store| drop(store.put(&key, order, None).await));
    }

    /// Writes a plan that takes no notice of the one in force.
    fn write_orphan(&self) {
        let Some(plan) = self.witness.state().plan else { return };
        self.write(&Plan { parent: PlanVersion::NONE, ..Plan::clone(&plan) });
    }

    /// Writes a plan that follows the one in force, and gives the first expert to those.
    fn write_holders(&self, holders: Vec<WorkerId>) {
        let Some(plan) = self.witness.state().plan else { return };
        let (parent, version) = (plan.version, PlanVersion(plan.version.0 + 1));
        let mut next = Plan { parent, version, ..Plan::clone(&plan) };
        if let Some(first) = next.layers.values_mut().next().and_then(|experts| experts.first_mut()) {
            *first = holders;
        }
        self.write(&next);
    }

    fn write(&self, plan: &Plan) {
        let (key, value) = (self.keys.plan(), plan.encode());
        self.do_in_store(async move |store| drop(store.put(&key, value, None).await));
    }

    fn compact(&self) {
        let prefix = self.keys.prefix().to_owned();
        self.do_in_store(async move |store| {
            if let Ok(listing) = store.list(&prefix).await {
                // Refused where everything before is forgotten already.
                let _ = store.compact(listing.revision);
            }
        });
    }

    fn do_in_store<F: Future<Output = ()> + Send + 'static>(
        &self,
        work: impl FnOnce(MemoryStore) -> F + Send + 'static,
    ) {
        self.order(Order::call(move |store| work(store).boxed()));
    }

    fn order(&self, order: Order) {
        if self.orders.try_send(order).is_err() {
            self.witness.tell("the store has too much to do for that");
        }
    }
}

/// Counts the runs of a process.
fn next(runs: &Mutex<u32>) -> u32 {
    let mut runs = runs.lock();
    *runs += 1;
    *runs
}
