//! Stories of experts that come, fail to come and go, without tensors, in time that passes at once.

use std::collections::HashMap;

use conclave_placement::ids::Cluster;
use conclave_placement::keys::Keys;
use conclave_placement::state::WorkerRecord;
use conclave_placement::store::memory::MemoryStore;
use conclave_runtime::tensor_thread;
use parking_lot::Mutex;

use super::*;
use crate::reconcile::tests::{cluster, plan, worker};

const LAYER: LayerIdx = LayerIdx(1);
const EXPERT_BYTES: u64 = 10;

/// Weights of which some cannot be read for so many attempts.
#[derive(Debug, Default)]
struct Flaky {
    fails: Mutex<HashMap<u16, u32>>,
    attempts: Mutex<Vec<u16>>,
}

impl Weights for Arc<Flaky> {
    async fn bring(&self, _: LayerIdx, id: ExpertId) -> Result<(), Error> {
        self.attempts.lock().push(id.0);
        match self.fails.lock().get_mut(&id.0).filter(|left| **left > 0) {
            Some(left) => {
                *left -= 1;
                Err(Error::Thread(tensor_thread::Error::Panicked("a bad sector".to_owned())))
            }
            None => Ok(()),
        }
    }

    async fn drop_expert(&self, _: LayerIdx, _: ExpertId) -> Result<(), Error> {
        Ok(())
    }

    fn batches(&self) -> u64 {
        0
    }

    async fn measure(&self, _: LayerIdx, _: ExpertId) -> Result<f64, Error> {
        Ok(1000.0)
    }

    async fn close(self) {}
}

/// A reconciler that follows what the test shows it.
struct Following {
    weights: Arc<Flaky>,
    registration: Arc<Registration>,
    view: watch::Sender<Arc<ClusterState>>,
}

impl Following {
    async fn start(fails: &[(u16, u32)], room: u64) -> Self {
        let weights = Arc::new(Flaky { fails: Mutex::new(fails.iter().copied().collect()), ..Flaky::default() });
        let keys = Keys::new(&Cluster::parse("c").unwrap());
        let record = WorkerRecord { resident: Residency::new(), ..worker("a", 0, &[]) };
        let (ttl, stop) = (Duration::from_secs(3600), CancellationToken::new());
        let joined = Registration::join(Arc::new(MemoryStore::new()), &keys, ttl, record, stop.clone()).await;
        let registration = Arc::new(joined.unwrap());
        let metrics = Metrics::register(&conclave_runtime::admin::registry(), &[LAYER]);
        let budget = Budget { expert_bytes: EXPERT_BYTES, bytes: room * EXPERT_BYTES };
        let resident = Arc::new(Resident::default());
        let reconciler = Reconciler::new(Arc::clone(&weights), resident, Arc::clone(&registration), metrics, budget);
        let (view, changes) = watch::channel(Arc::new(ClusterState::empty()));
        tokio::spawn(reconciler.run(changes, stop));
        Self { weights, registration, view }
    }

    /// Shows a plan in which expert `e` belongs to `holders[e]`, that the router follows and `others` have acted on.
    async fn shows(&self, version: u64, holders: &[&[&str]], others: Vec<WorkerRecord>) {
        self.view.send_replace(Arc::new(cluster(others, plan(version, holders), version)));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }

    /// What the cluster is told: what is here, what failed, the plan that was acted on.
    fn told(&self) -> (Vec<u16>, Vec<u16>, u64) {
        let record = self.registration.record();
        let experts = |of: &Residency| of.iter().map(|(_, expert)| expert.0).collect();
        (experts(&record.resident), experts(&record.failing), record.plan_version.0)
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_told_when_it_fails_again_and_tried_until_it_comes() {
    let following = Following::start(&[(1, 3)], 0).await;
    following.shows(1, &[&["a"], &["a"], &["a"]], vec![]).await;
    assert_eq!(following.told(), (vec![0, 2], vec![], 1), "the others come; the first failure may be a moment's");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(following.told(), (vec![0, 2], vec![1], 1));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(following.told(), (vec![0, 1, 2], vec![], 1));
    assert_eq!(*following.weights.attempts.lock(), [0, 1, 2, 1, 1, 1], "nothing is tried once it is here");
}

#[tokio::test(start_paused = true)]
async fn no_more_is_loaded_than_memory_holds_and_the_rest_when_something_has_gone() {
    let following = Following::start(&[], 2).await;
    following.shows(1, &[&["a"], &["a"]], vec![]).await;
    assert_eq!(following.told().0, [0, 1]);
    // Expert 0 moves to b, and 2 comes in its place: not before b has it, and the 2 s are over in which routers may hear.
    let moved: [&[&str]; 3] = [&["b"], &["a"], &["a"]];
    following.shows(2, &moved, vec![worker("b", 1, &[])]).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(following.told().0, [0, 1], "nobody else has it");
    following.shows(2, &moved, vec![worker("b", 2, &[0])]).await;
    assert_eq!((following.told().0, following.weights.attempts.lock().len()), (vec![1], 2), "still answered for");
    tokio::time::sleep(RETIRE_GRACE).await;
    assert_eq!(following.told().0, [1, 2]);
}
