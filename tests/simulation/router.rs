//! A simulated router: the real controller, election, view and load report, and nothing that serves anybody.
//!
//! In: one router of the scenario, its way to the store, the traffic. Out: a life like that of the real process (`app` and
//! `registration` of conclave-router are what this follows). Never here: a tensor, a socket, a decision.

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    election::Election,
    ids::{Incarnation, PlanVersion, RouterId},
    keys::Keys,
    membership::Membership,
    model_key,
    state::{ClusterState, RouterRecord},
    store::Store,
    view::View,
};
use conclave_router::{
    control::{Controller, PlacementMetrics},
    load::{Reporter, SentRows},
};
use rand::{Rng, rngs::SmallRng};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{link::Link, scenario::Scenario, witness::Witness};

/// How long load is remembered.
const WINDOW: Duration = Duration::from_secs(6);
/// Rows are counted this often.
const TRAFFIC: Duration = Duration::from_millis(500);
/// Rows of a layer's favourite expert each time. The second has half of them, the third a third.
const FAVOURITE: usize = 24;

/// All that one run of a router is made of.
pub struct Run {
    pub scenario: Arc<Scenario>,
    pub id: RouterId,
    pub keys: Keys,
    pub link: Link,
    /// Which expert is a layer's favourite.
    pub favourite: watch::Receiver<u16>,
    pub chance: SmallRng,
    pub witness: Arc<Witness>,
}

impl Run {
    /// Until it crashes.
    pub async fn run(self) -> turmoil::Result {
        let (scenario, keys, id) = (&self.scenario, &self.keys, &self.id);
        let store: Arc<dyn Store> = Arc::new(self.link);
        model_key::agree(&*store, keys, &scenario.model).await?;
        let end = CancellationToken::new();
        let view = View::start(Arc::clone(&store), keys.clone(), end.clone()).await?;
        let record = RouterRecord::starting(id.clone(), Incarnation::fresh(), [format!("{id}:1"), format!("{id}:2")]);
        let (key, value, incarnation) = (keys.router(id), record.encode(), record.incarnation);
        let membership = Membership::join(Arc::clone(&store), key, scenario.ttl, value, end.clone()).await?;
        let election = Election::run(Arc::clone(&store), keys, id.clone(), incarnation, scenario.ttl, end.clone());
        let layers = scenario.model.moe_layers.iter().map(|layer| layer.0 as usize);
        let sent = Arc::new(SentRows::new(layers, scenario.model.experts as usize));
        let _reporter = Reporter::start(Arc::clone(&sent), (Arc::clone(&store), keys), id, (scenario.ttl, WINDOW));
        let controller = Controller {
            store: Arc::clone(&store),
            keys: keys.clone(),
            author: id.clone(),
            policy: scenario.policy,
            metrics: Arc::new(PlacementMetrics::default()),
        };
        tokio::select! {
            () = controller.run(view.subscribe(), election.is_leader(), end.clone()) => {
                Err(format!("{id}: the controller ended").into())
            }
            never = follow(view.subscribe(), record, &membership, self.chance) => never,
            never = traffic(scenario, &sent, self.favourite) => never,
            never = tell_leader(election.is_leader(), id, &self.witness) => never,
        }
    }
}

/// Moves on to each plan, some time after it has heard of it.
async fn follow(
    mut state: watch::Receiver<Arc<ClusterState>>,
    mut record: RouterRecord,
    membership: &Membership,
    mut chance: SmallRng,
) -> turmoil::Result {
    let version = |state: &Arc<ClusterState>| state.plan.as_ref().map_or(PlanVersion::NONE, |plan| plan.version);
    loop {
        let before = record.plan_version;
        drop(state.wait_for(|state| version(state) != before).await?);
        sleep(Duration::from_millis(chance.random_range(1..1000))).await;
        record.plan_version = version(&state.borrow());
        membership.publish(record.encode());
    }
}

/// Rows by Zipf's law. The same each time, so that what settles can be told from what does not.
async fn traffic(scenario: &Scenario, sent: &SentRows, favourite: watch::Receiver<u16>) -> turmoil::Result {
    let experts = scenario.model.experts as u16;
    loop {
        let first = *favourite.borrow();
        for layer in &scenario.model.moe_layers {
            for rank in 0..experts {
                let expert = (first + rank + layer.0 as u16) % experts;
                let rows = FAVOURITE / (usize::from(rank) + 1);
                sent.count(layer.0, &vec![expert; rows]);
            }
        }
        sleep(TRAFFIC).await;
    }
}

async fn tell_leader(
    mut leads: watch::Receiver<Option<conclave_placement::election::Term>>,
    id: &RouterId,
    witness: &Witness,
) -> turmoil::Result {
    loop {
        witness.leads(id, leads.borrow_and_update().is_some());
        leads.changed().await?;
    }
}
