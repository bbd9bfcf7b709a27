//! A simulated worker: the real reconciler, registration, view and drain, over weights that are only names.
//!
//! In: one worker of the scenario, its way to the store. Out: a life like that of the real process (`app` of
//! conclave-expert-worker is what this follows), told to the witness. Never here: a tensor, a socket, a decision.

use std::{sync::Arc, time::Duration};

use conclave_expert_worker::{
    loader::{Error, Weights},
    metrics::Metrics,
    reconcile,
    reconciler::{Budget, Reconciler},
    registration::Registration,
    residency::Resident,
};
use conclave_placement::{
    ids::{ExpertId, Incarnation, LayerIdx, WorkerId},
    keys::Keys,
    model_key,
    plan::Plan,
    state::{ClusterState, Residency, WorkerRecord, WorkerState},
    store::Store,
    view::View,
};
use conclave_runtime::{admin, tensor_thread};
use parking_lot::Mutex;
use rand::{Rng, rngs::SmallRng};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    link::{Link, Weather},
    scenario::{EXPERT_BYTES, Scenario, Worker},
    witness::{End, Witness},
};

/// How long a worker that leaves waits for others to take over.
const DRAIN_GRACE: Duration = Duration::from_secs(40);
/// How long taking an order out of the store may take.
const TIDY_GRACE: Duration = Duration::from_secs(2);

/// All that one run of a worker is made of.
pub struct Run {
    pub scenario: Arc<Scenario>,
    pub worker: Worker,
    pub keys: Keys,
    pub link: Link,
    pub weather: watch::Receiver<Weather>,
    pub chance: SmallRng,
    pub witness: Arc<Witness>,
    /// Takes for done what is only planned. For the proof that the witness would notice.
    pub is_credulous: bool,
}

impl Run {
    /// Until it is told to leave, and has left.
    pub async fn run(self) -> turmoil::Result {
        let (scenario, keys, id) = (&self.scenario, &self.keys, self.worker.id.clone());
        self.witness.began(&id);
        let store: Arc<dyn Store> = Arc::new(self.link);
        model_key::agree(&*store, keys, &scenario.model).await?;
        let end = CancellationToken::new();
        let view = View::start(Arc::clone(&store), keys.clone(), end.clone()).await?;
        let budget = Budget { expert_bytes: EXPERT_BYTES, bytes: self.worker.room as u64 * EXPERT_BYTES };
        let record = record(&self.worker, budget);
        let incarnation = record.incarnation;
        let registration = Registration::join(Arc::clone(&store), keys, scenario.ttl, record, end.clone()).await?;
        let (registration, resident) = (Arc::new(registration), Arc::new(Resident::default()));
        let weights = Names {
            worker: id.clone(),
            speed: self.worker.speed,
            chance: Mutex::new(self.chance),
            weather: self.weather,
            witness: Arc::clone(&self.witness),
        };
        let metrics = Metrics::register(&admin::registry(), &[]);
        let reconciler = Reconciler::new(weights, Arc::clone(&resident), Arc::clone(&registration), metrics, budget);
        let picture = if self.is_credulous { credulous(view.subscribe()) } else { view.subscribe() };
        let draining = CancellationToken::new();
        let mut reconciling = tokio::spawn(reconciler.run(picture, draining.clone()));

        let mut changes = view.subscribe();
        let ordered = |state: &Arc<ClusterState>| state.drains.get(&id) == Some(&incarnation);
        tokio::select! {
            ordered = changes.wait_for(ordered) => drop(ordered?),
            ended = &mut reconciling => return Err(format!("{id}: the reconciler ended: {ended:?}").into()),
        }
        draining.cancel();
        registration.drain();
        reconciling.await?;
        let end_of_it = hand_over(&id, &resident.snapshot().experts, &view).await;
        // Told before it is so: from here on nothing is answered.
        self.witness.ended(&id, end_of_it);
        if view.current().drains.contains_key(&id) {
            // The order stays where the store does not answer.
            let _ = timeout(TIDY_GRACE, store.delete(&keys.drain(&id))).await;
        }
        registration.leave().await;
        end.cancel();
        Ok(())
    }
}

fn record(worker: &Worker, budget: Budget) -> WorkerRecord {
    WorkerRecord {
        memory_budget: budget.bytes,
        locality: worker.locality.clone(),
        ..WorkerRecord::starting(worker.id.clone(), Incarnation::fresh(), format!("{}:1", worker.id))
    }
}

/// Waits until others hold what this worker does.
async fn hand_over(id: &WorkerId, here: &Residency, view: &View) -> End {
    let mut changes = view.subscribe();
    let handed_over = |state: &Arc<ClusterState>| reconcile::is_handed_over(id, here, state);
    match timeout(DRAIN_GRACE, changes.wait_for(handed_over)).await {
        Ok(Ok(state)) => {
            let stays = state.workers.values().any(|worker| worker.id != *id && !state.is_leaving(worker));
            if state.routers.is_empty() || !stays { End::Forced } else { End::HandedOver }
        }
        Ok(Err(_)) | Err(_) => End::Forced,
    }
}

/// A picture in which everybody has done what the plan asks already.
fn credulous(mut honest: watch::Receiver<Arc<ClusterState>>) -> watch::Receiver<Arc<ClusterState>> {
    let (tell, told) = watch::channel(believed(&honest.borrow_and_update().clone()));
    tokio::spawn(async move {
        while honest.changed().await.is_ok() {
            let state = honest.borrow_and_update().clone();
            tell.send_replace(believed(&state));
        }
    });
    told
}

fn believed(state: &Arc<ClusterState>) -> Arc<ClusterState> {
    let mut state = ClusterState::clone(state);
    let Some(plan) = state.plan.clone() else { return Arc::new(state) };
    let Plan { version, .. } = *plan;
    state.routers.values_mut().for_each(|router| router.plan_version = version);
    for worker in state.workers.values_mut() {
        worker.plan_version = version;
        worker.state = WorkerState::Serving;
        worker.resident = plan.assigned_to(&worker.id);
    }
    Arc::new(state)
}

/// Weights that are only names: they take time to come, and sometimes do not.
struct Names {
    worker: WorkerId,
    speed: f64,
    chance: Mutex<SmallRng>,
    weather: watch::Receiver<Weather>,
    witness: Arc<Witness>,
}

impl Names {
    fn time(&self) -> Duration {
        let mut chance = self.chance.lock();
        let slow = chance.random_bool(0.05);
        Duration::from_millis(if slow { chance.random_range(300..3000) } else { chance.random_range(5..200) })
    }
}

impl Weights for Names {
    async fn bring(&self, layer: LayerIdx, id: ExpertId) -> Result<(), Error> {
        self.witness.begins_to_load(&self.worker, (layer, id));
        let (time, losses) = (self.time(), self.weather.borrow().losses);
        sleep(time).await;
        if self.chance.lock().random_ratio(losses, 1000) {
            return Err(tensor_thread::Error::Panicked("as the seed wants it".into()).into());
        }
        self.witness.holds(&self.worker, (layer, id));
        Ok(())
    }

    async fn drop_expert(&self, layer: LayerIdx, id: ExpertId) -> Result<(), Error> {
        self.witness.lets_go(&self.worker, (layer, id));
        Ok(())
    }

    fn batches(&self) -> u64 {
        // As if somebody waited for this worker about half of the time.
        self.chance.lock().random_range(0..2)
    }

    async fn measure(&self, _layer: LayerIdx, _id: ExpertId) -> Result<f64, Error> {
        sleep(Duration::from_millis(20)).await;
        Ok(self.speed)
    }

    async fn close(self) {}
}
