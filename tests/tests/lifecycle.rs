//! Coming and going: what leaves, leaves nothing behind; what the store forgets, registers again.

use std::{collections::BTreeSet, path::Path};

use conclave_model::{checkpoint::Checkpoint, device::Compute};
use conclave_placement::{
    ids::WorkerId,
    state::{DrainOrder, WorkerState},
    store::{self, Store},
};
use conclave_tests::{
    client::{Client, greedy},
    cluster::Cluster,
    etcd::EtcdProcess,
    eventually::{PATIENCE, eventually},
    golden::{Case, Golden},
    process::{Process, Signal, binary},
};
use etcd_client::GetOptions;
use serde_json::Value;
use tempfile::TempDir;

const DRAWN: u32 = 300;

#[tokio::test]
async fn who_is_asked_to_leave_takes_its_keys_along() {
    let golden = Golden::named("v3_tied");
    let mut cluster = Cluster::builder(&golden.folder).workers(2).routers(2).start().await;
    for process in cluster.routers.iter_mut().chain(&mut cluster.workers) {
        let status = process.terminate().await;
        assert!(status.success(), "{} ended with {status}", process.name());
    }
    let left = cluster.store.list(cluster.keys.prefix()).await.expect("the store answers").entries;
    let left: BTreeSet<String> = left.into_iter().map(|entry| entry.key).collect();
    assert_eq!(left, BTreeSet::from([cluster.keys.model(), cluster.keys.plan()]), "what has no owner stays, no more");
}

#[tokio::test]
async fn serving_outlives_etcd_and_everybody_registers_again() {
    let golden = Golden::named("v3");
    let prompt = &golden.cases[0].prompt;
    let mut cluster = Cluster::builder(&golden.folder).workers(2).start().await;
    let client = cluster.client(0).await;
    let undisturbed = client.generate(prompt, DRAWN).await.ids();

    let mut answer = client.begin(greedy(prompt, DRAWN), PATIENCE).await.expect("a stream begins");
    answer.tokens(10).await.expect("the first tokens come");
    cluster.etcd.as_mut().expect("its own").kill().await;
    assert_eq!(answer.rest().await.expect("the stream finishes").ids(), undisturbed, "the stream in flight");
    assert_eq!(client.generate(prompt, DRAWN).await.ids(), undisturbed, "a request without etcd");

    cluster.etcd.as_mut().expect("its own").restart().await;
    // Leases outlive an etcd that restarts soon enough. These did not.
    let address = cluster.etcd.as_ref().expect("its own").address();
    let mut etcd = etcd_client::Client::connect([address], None).await.expect("etcd is back");
    let before = eventually("two workers, a router, its load and a leader", async || {
        Some(leased_keys(&mut etcd, cluster.keys.prefix()).await).filter(|keys| keys.len() == 5)
    })
    .await;
    for (_, lease) in &before {
        // Another key of the same lease may have had it revoked.
        let _ = etcd.lease_revoke(*lease).await;
    }
    eventually("all to register again", async || {
        let now = leased_keys(&mut etcd, cluster.keys.prefix()).await;
        let same_keys = now.iter().map(|(key, _)| key).eq(before.iter().map(|(key, _)| key));
        let same_leases = now.iter().any(|(_, lease)| before.iter().any(|(_, old)| old == lease));
        (same_keys && !same_leases).then_some(())
    })
    .await;
    assert_eq!(client.generate(prompt, DRAWN).await.ids(), undisturbed, "after all registered again");
}

#[tokio::test]
async fn a_signal_ends_a_drain_that_an_operator_ordered_and_that_cannot_end() {
    let golden = Golden::named("v3");
    let checkpoint = Checkpoint::open(&golden.folder).expect("a golden model opens");
    let config = checkpoint.config();
    let experts = config.moe_layers().count() * config.n_routed_experts;
    // Room for half of them each: nobody could take over what the other holds.
    let memory = experts.div_ceil(2) as u64 * checkpoint.resident_expert_bytes(Compute::REFERENCE);
    let arguments = [format!("--memory={memory}"), "--drain-grace=1".to_owned()];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut cluster = Cluster::builder(&golden.folder).workers(2).worker_arguments(&arguments).start().await;
    let worker = WorkerId::parse("worker-0").expect("a name");
    let order = DrainOrder { incarnation: cluster.state().workers[&worker].incarnation };
    cluster.store.put(&cluster.keys.drain(&worker), order.encode(), None).await.expect("the store answers");
    cluster.until("the drain to begin", |state| state.workers[&worker].state == WorkerState::Draining).await;
    let client = cluster.client(0).await;
    client.generate(&golden.cases[0].prompt, 8).await.ids();
    assert!(cluster.workers[0].is_running(), "an order alone has all the time it needs");
    let status = cluster.workers[0].terminate().await;
    assert_eq!(status.code(), Some(1), "experts were left behind");
    cluster.worker_gone(0).await;
    assert!(cluster.state().drains.is_empty(), "the order was carried out as well as could be");
}

async fn leased_keys(etcd: &mut etcd_client::Client, prefix: &str) -> BTreeSet<(String, i64)> {
    let listing = etcd.get(prefix, Some(GetOptions::new().with_prefix())).await.expect("etcd answers");
    let leased = listing.kvs().iter().filter(|entry| entry.lease() != 0);
    leased.map(|entry| (entry.key_str().expect("keys are text").to_owned(), entry.lease())).collect()
}

/// `conclave up` with two workers on a golden model.
struct Up {
    process: Process,
    folder: TempDir,
}

impl Up {
    fn start(golden: &Golden, store: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut arguments = vec!["up".to_owned()];
        for (flag, value) in [
            ("model", golden.folder.display().to_string().as_str()),
            ("workers", "2"),
            ("listen", "127.0.0.1:0"),
            ("dtype", "f32"),
            ("store", store),
            ("ready-file", &folder.path().join("ready.json").display().to_string()),
        ] {
            arguments.push(format!("--{flag}={value}"));
        }
        Self { process: Process::spawn("up", &binary("conclave"), &arguments, folder.path()), folder }
    }

    async fn ready(&mut self) -> Value {
        let file = self.folder.path().join("ready.json");
        let process = &mut self.process;
        eventually("the ready file", async || {
            assert!(process.is_running(), "`conclave up` ended while starting");
            let text = std::fs::read(&file).ok()?;
            Some(serde_json::from_slice(&text).expect("the ready file appears whole"))
        })
        .await
    }

    fn pid(&self) -> u32 {
        self.process.pid().expect("not awaited yet")
    }

    /// Ctrl-C, and its end; returns the exit status.
    async fn interrupted(&mut self) -> Option<i32> {
        self.process.signal(Signal::INT);
        let status = self.process.ended().await;
        assert!(!self.folder.path().join("ready.json").exists(), "the ready file speaks of a cluster that is gone");
        status.code()
    }
}

#[tokio::test]
async fn up_says_where_it_serves_and_leaves_nothing_behind() {
    let golden = Golden::named("v3_tied");
    let etcd = EtcdProcess::start().await;
    let store = store::connect(&etcd.spec()).expect("etcd answers");
    for spec in ["embedded".to_owned(), etcd.spec()] {
        let mut up = Up::start(&golden, &spec);
        let ready = up.ready().await;
        let pids = told(&ready, &up);
        answers(&golden.cases[0], ready["inference"].as_str().expect("an address")).await;
        if spec != "embedded" {
            assert!(!keys(&*store).await.is_empty(), "a cluster on etcd registers there");
        }
        assert_eq!(up.interrupted().await, Some(0), "{spec}");
        assert_eq!(alive(&pids), BTreeSet::new(), "processes left by Ctrl-C, {spec}");
        assert_eq!(keys(&*store).await, Vec::<String>::new(), "keys left by Ctrl-C, {spec}");
    }
}

/// Checks the ready file against what runs; returns every process that it names.
fn told(ready: &Value, up: &Up) -> BTreeSet<u32> {
    let (routers, workers) =
        (ready["routers"].as_array().expect("routers"), ready["workers"].as_array().expect("workers"));
    assert_eq!((routers.len(), workers.len()), (1, 2), "{ready}");
    for address in [&ready["inference"], &ready["admin"], &routers[0]["inference"], &workers[1]["address"]] {
        let address = address.as_str().unwrap_or_else(|| panic!("an address is missing: {ready}"));
        assert!(address.parse::<std::net::SocketAddr>().is_ok_and(|address| address.port() != 0), "{address}");
    }
    assert_eq!(ready["inference"], routers[0]["inference"]);
    assert_eq!(ready["admin"], routers[0]["admin"]);
    assert!(ready["store"].is_string() && workers.iter().all(|worker| worker["id"].is_string()), "{ready}");
    let pid = |process: &Value| u32::try_from(process["pid"].as_u64().expect("a pid")).expect("a pid");
    let pids: BTreeSet<u32> = routers.iter().chain(workers).map(pid).collect();
    assert_eq!(pids, children(up.pid()), "the processes that are told are the children");
    pids
}

async fn answers(case: &Case, address: &str) {
    assert_eq!(Client::connect(address).await.generate(&case.prompt, 24).await.ids(), case.greedy);
}

#[tokio::test]
async fn ctrl_c_at_any_moment_of_the_start_leaves_nothing_behind() {
    let golden = Golden::named("v3_tied");
    let etcd = EtcdProcess::start().await;
    let store = store::connect(&etcd.spec()).expect("etcd answers");
    for moment in ["", "/model", "/workers/", "/plan"] {
        let mut up = Up::start(&golden, &etcd.spec());
        let pids =
            eventually("the first child", async || Some(children(up.pid())).filter(|children| !children.is_empty()));
        let mut pids = pids.await;
        eventually(&format!("a key {moment:?}"), async || {
            let there = moment.is_empty() || keys(&*store).await.iter().any(|key| key.contains(moment));
            there.then_some(())
        })
        .await;
        pids.extend(children(up.pid()));
        let status = up.interrupted().await;
        // 0 where the last moment already was that of readiness.
        assert!(matches!(status, Some(0 | 130)), "{status:?} at {moment:?}");
        assert_eq!(alive(&pids), BTreeSet::new(), "processes left by Ctrl-C at {moment:?}");
        assert_eq!(keys(&*store).await, Vec::<String>::new(), "keys left by Ctrl-C at {moment:?}");
    }
}

#[tokio::test]
async fn the_children_of_a_killed_up_end_with_it() {
    let golden = Golden::named("v3_tied");
    let mut up = Up::start(&golden, "embedded");
    let ready = up.ready().await;
    let pids = told(&ready, &up);
    up.process.kill().await;
    eventually("the orphans to end", async || alive(&pids).is_empty().then_some(())).await;
}

/// Every key of every cluster in `store`.
async fn keys(store: &dyn Store) -> Vec<String> {
    let entries = store.list("/conclave/").await.expect("the store answers").entries;
    entries.into_iter().map(|entry| entry.key).collect()
}

/// State and parent of process `pid`, as the kernel tells them.
fn state_and_parent(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name in parentheses may hold anything, parentheses too.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Those of `pids` that still run. A zombie does not.
fn alive(pids: &BTreeSet<u32>) -> BTreeSet<u32> {
    pids.iter().copied().filter(|&pid| state_and_parent(pid).is_some_and(|(state, _)| state != 'Z')).collect()
}

fn children(parent: u32) -> BTreeSet<u32> {
    let processes = std::fs::read_dir("/proc").expect("these stories are told on Linux");
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| state_and_parent(pid).is_some_and(|(_, its)| its == parent)).collect()
}
