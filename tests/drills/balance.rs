//! Experts move because of their load, or because somebody keeps moving them, while tokens are in flight.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use conclave_placement::{
    ids::{PlanVersion, WorkerId},
    plan::Plan,
    state::ClusterState,
    store::{CasOutcome, Expected},
};
use conclave_proto::inference::v1::{GenerateRequest, SamplingParams};
use conclave_tests::{
    client::{greedy, sampled},
    cluster::{Cluster, held_everywhere},
    drill::{Aim, Drill, Form},
    load::Work,
};

use crate::scene;

/// Tokens that are tried as everybody's favourite.
const TRIED: std::ops::Range<u32> = 20..32;

/// What was moved away is let go after two seconds.
const LET_GO: Duration = Duration::from_secs(3);

/// Answers in which only `token` ever comes: the gate sees nearly the same row each time and favours the same experts.
fn hot(token: u32, prompt: usize, count: u32) -> GenerateRequest {
    let logit_bias = HashMap::from([(token, 100.0)]);
    let sampling = SamplingParams { temperature: Some(0.0), logit_bias, ..SamplingParams::default() };
    GenerateRequest { sampling: Some(sampling), ..greedy(&vec![token; prompt], count) }
}

/// Assignments computed so far: per layer, by each worker.
type Rows = BTreeMap<u32, Vec<u64>>;

async fn rows(cluster: &Cluster) -> Rows {
    let mut rows = Rows::new();
    for worker in 0..cluster.workers.len() {
        for layer in cluster.inventory(worker).await.layers {
            let workers = rows.entry(layer.layer).or_insert_with(|| vec![0; cluster.workers.len()]);
            workers[worker] = layer.rows_total;
        }
    }
    rows
}

fn grown(before: &Rows, after: &Rows) -> Rows {
    let of = |(layer, after): (&u32, &Vec<u64>)| {
        let before = before.get(layer).cloned().unwrap_or_else(|| vec![0; after.len()]);
        (*layer, after.iter().zip(before).map(|(after, before)| after.saturating_sub(before)).collect())
    };
    after.iter().map(of).collect()
}

/// Mean over maximum of what workers computed of a layer, averaged over layers: 1 where all did the same.
fn balancedness(grown: &Rows) -> f64 {
    let of = |rows: &Vec<u64>| {
        let (sum, most) = (rows.iter().sum::<u64>() as f64, rows.iter().copied().max().unwrap_or(0).max(1) as f64);
        sum / rows.len() as f64 / most
    };
    let sum: f64 = grown.values().map(of).sum();
    (sum / grown.len() as f64 * 100.0).round() / 100.0
}

/// The token whose rows lie most unevenly on the workers.
async fn favourite(cluster: &Cluster) -> u32 {
    let client = cluster.client(0).await;
    let (mut worst, mut chosen) = (f64::INFINITY, TRIED.start);
    for token in TRIED {
        let before = rows(cluster).await;
        client.answer(hot(token, 4, 20)).await;
        let balancedness = balancedness(&grown(&before, &rows(cluster).await));
        if balancedness < worst {
            (worst, chosen) = (balancedness, token);
        }
    }
    chosen
}

/// Whether every worker has done what the plan says.
fn settled(state: &ClusterState) -> bool {
    let version = state.plan.as_ref().map_or(PlanVersion::NONE, |plan| plan.version);
    state.workers.values().all(|worker| worker.plan_version >= version)
}

fn version(cluster: &Cluster) -> PlanVersion {
    cluster.state().plan.as_ref().expect("a cluster that serves has a plan").version
}

#[tokio::test]
async fn a_skewed_load_is_spread() {
    let _alone = scene::alone().await;
    // Longer than the drill runs undisturbed.
    let period = Form::asked_for().pick("--rebalance-period=10", "--rebalance-period=40");
    let balancing = [period, "--rebalance-below=0", "--load-window=6", "--redundant-experts=4"];
    let cluster = scene::builder(4, 1).router(&balancing).start().await;
    let token = favourite(&cluster).await;
    let mut requests: Vec<GenerateRequest> = (1..7).map(|nth| hot(token, 4 * nth, 100)).collect();
    requests.extend((1..3).map(|seed| sampled(&[1, 2, 3], 100, seed)));
    let work = Work::of(requests, cluster.router_addresses().await).await;
    let aim = Aim::unnoticed("14", "skewed load: experts are moved by their load", 1);
    let mut drill = Drill::begin(aim, &cluster, work).await;
    let (planned, unmoved) = skew(&cluster, &drill).await;
    cluster.until("a rebalance", |state| state.plan.as_ref().is_some_and(|plan| plan.version > planned)).await;
    drill.fault();
    cluster.until("the workers to have done it", settled).await;
    drill.goes_on(LET_GO).await;
    drill.over();
    let (now, moved) = skew(&cluster, &drill).await;
    drill.note("balancedness", format!("{} → {}", balancedness(&unmoved), balancedness(&moved)));
    drill.note("rows", format!("{unmoved:?} → {moved:?}"));
    drill.note("plans", now.0 - planned.0);
    println!("{}", told(&cluster));
    drill.end().await;
    let (before, after) = (balancedness(&unmoved), balancedness(&moved));
    assert!(after > before, "balancedness went from {before} to {after}");
}

/// What workers compute of 2,000 tokens that come while no plan changes, and the plan.
async fn skew(cluster: &Cluster, drill: &Drill) -> (PlanVersion, Rows) {
    loop {
        let (planned, before) = (version(cluster), rows(cluster).await);
        drill.flows(2_000).await;
        let grown = grown(&before, &rows(cluster).await);
        if version(cluster) == planned {
            return (planned, grown);
        }
    }
}

#[tokio::test]
async fn experts_are_moved_again_and_again() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(4, 2).router(&["--rebalance-period=0"]).start().await;
    let mut drill =
        scene::begin(Aim::unnoticed("14", "every expert moved, again and again", 2).keeps(0.8), &cluster).await;
    let rounds = drill.form().pick(4, 20);
    drill.fault();
    for _ in 0..rounds {
        assert!(turn(&cluster).await, "another plan came first");
        cluster.until("the workers to have done it", settled).await;
        drill.flows(200).await;
    }
    drill.over();
    drill.note("plans", rounds);
    drill.end().await;
}

/// Two who rebalance at once, each from what it last saw: one plan wins each time, and no expert is ever nobody's.
#[tokio::test]
async fn two_rebalance_at_once() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(4, 2).routers(2).router(&["--rebalance-period=0"]).start().await;
    let mut drill = scene::begin(Aim::unnoticed("13", "two write plans at once, again and again", 2), &cluster).await;
    let mut changes = cluster.changes();
    let watched = tokio::spawn(async move {
        let mut abandoned = 0;
        while changes.changed().await.is_ok() {
            let state = changes.borrow_and_update().clone();
            abandoned += usize::from(!held_everywhere(&state, 1));
        }
        abandoned
    });
    let rounds = drill.form().pick(4, 20);
    drill.fault();
    let mut conflicts = 0;
    for _ in 0..rounds {
        let (one, other) = tokio::join!(turn(&cluster), turn(&cluster));
        conflicts += usize::from(!one) + usize::from(!other);
        cluster.until("the workers to have done it", settled).await;
        drill.flows(200).await;
    }
    drill.over();
    drill.note("plans", rounds);
    drill.note("conflicts", conflicts);
    drill.end().await;
    drop(cluster);
    let abandoned = watched.await.expect("a watch does not panic");
    assert_eq!(abandoned, 0, "states in which an expert was nobody's");
    assert!(conflicts >= rounds, "of two plans with one parent only one can be in force");
}

/// Publishes a plan by which each worker holds what its neighbour held. False where another plan came first.
async fn turn(cluster: &Cluster) -> bool {
    let key = cluster.keys.plan();
    let entry = cluster.store.get(&key).await.expect("the store answers").expect("a plan");
    let plan = Plan::decode(&entry.value).expect("a plan");
    let workers: Vec<WorkerId> = cluster.state().workers.keys().cloned().collect();
    let next = |worker: &WorkerId| {
        let index = workers.iter().position(|other| other == worker).expect("all workers live");
        workers[(index + 1) % workers.len()].clone()
    };
    let turned = |experts: &Vec<Vec<WorkerId>>| experts.iter().map(|held| held.iter().map(next).collect()).collect();
    let plan = Plan {
        version: PlanVersion(plan.version.0 + 1),
        parent: plan.version,
        policy: "drill".to_owned(),
        reason: "moves everything".to_owned(),
        layers: plan.layers.iter().map(|(layer, experts)| (*layer, turned(experts))).collect(),
    };
    let expected = Expected::ModRevision(entry.mod_revision);
    let stored = cluster.store.compare_and_put(&key, expected, plan.encode(), None).await.expect("the store answers");
    cluster
        .until("the plan to be seen", |state| state.plan.as_ref().is_some_and(|seen| seen.version >= plan.version))
        .await;
    matches!(stored, CasOutcome::Stored { .. })
}

/// Who holds the experts that rows go to, and how many rows a minute those are.
fn told(cluster: &Cluster) -> String {
    let (state, mut lines) = (cluster.state(), Vec::new());
    let (plan, load) = (state.plan.as_ref().expect("a plan"), state.load());
    lines.push(format!("plan {}: {}", plan.version.0, plan.reason));
    for (layer, expert, holders) in plan.iter() {
        let rows = load.rows(layer, expert);
        if rows * 50 > load.total() {
            let holders: Vec<&str> = holders.iter().map(WorkerId::as_str).collect();
            lines.push(format!(
                "layer {} expert {}: {rows} rows a minute at {}",
                layer.0,
                expert.0,
                holders.join(", ")
            ));
        }
    }
    lines.join("\n")
}
