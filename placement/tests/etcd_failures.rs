//! A real etcd that dies, stops, forgets and comes back, and a cluster that goes on.
//!
//! In: faults. Out: the last known state while etcd is away, and the whole truth soon after it is back.

#![allow(clippy::unwrap_used, reason = "a story fails where it stands")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use conclave_placement::Store;
use conclave_placement::election::Election;
use conclave_placement::membership::Membership;
use conclave_placement::store::Error;
use conclave_placement::view::View;
use conclave_placement::{Incarnation, PlanVersion, RouterId, WorkerId};
use support::etcd_process::EtcdProcess;
use support::{keys, soon, until, worker};
use tokio_util::sync::CancellationToken;

const TTL: Duration = Duration::from_secs(3);

struct Cluster {
    store: Arc<dyn Store>,
    view: View,
    member: Membership,
    worker: WorkerId,
    _token: tokio_util::sync::DropGuard,
}

/// A worker that is registered and seen, through one store client, as in a real process.
async fn cluster(etcd: &EtcdProcess) -> anyhow::Result<Cluster> {
    let store: Arc<dyn Store> = Arc::new(etcd.store());
    let token = CancellationToken::new();
    let view = View::start(store.clone(), keys(), token.clone()).await?;
    let record = worker("a", 1);
    let key = keys().worker(&record.id);
    let member = Membership::join(store.clone(), key, TTL, record.encode(), token.clone()).await?;
    let cluster = Cluster { store, view, member, worker: record.id, _token: token.drop_guard() };
    cluster.sees(1).await;
    Ok(cluster)
}

impl Cluster {
    fn publish(&self, plan: u64) {
        self.member.publish(worker(self.worker.as_str(), plan).encode());
    }

    async fn sees(&self, plan: u64) {
        let plan = PlanVersion(plan);
        let seen = |state: &Arc<conclave_placement::ClusterState>| {
            state.workers.get(&self.worker).is_some_and(|worker| worker.plan_version == plan)
        };
        until(&format!("plan {plan} is seen"), self.view.subscribe(), seen).await;
    }
}

#[tokio::test]
async fn everything_recovers_from_an_etcd_that_was_killed_and_started_again() -> anyhow::Result<()> {
    let mut etcd = EtcdProcess::start().await?;
    let cluster = cluster(&etcd).await?;
    let router = RouterId::parse("r")?;
    let token = CancellationToken::new();
    let election = Election::run(cluster.store.clone(), &keys(), router, Incarnation::fresh(), TTL, token);
    until("leads", election.is_leader(), Option::is_some).await;

    etcd.kill();
    let away = cluster.store.get("any").await.unwrap_err();
    assert!(away.retryable(), "{away}");
    cluster.publish(2);
    until("stops claiming", cluster.member.registered(), |registered| !registered).await;
    until("steps down", election.is_leader(), Option::is_none).await;
    cluster.sees(1).await;

    etcd.restart().await?;
    until("registers again", cluster.member.registered(), |registered| *registered).await;
    cluster.sees(2).await;
    cluster.publish(3);
    cluster.sees(3).await;
    until("leads again", election.is_leader(), Option::is_some).await;
    election.resign().await;
    cluster.member.leave().await;
    assert_eq!(cluster.store.list(keys().prefix()).await?.entries, [], "nothing stays behind");
    Ok(())
}

#[tokio::test]
async fn a_paused_etcd_is_noticed_and_missed_by_nobody_once_it_runs_again() -> anyhow::Result<()> {
    let etcd = EtcdProcess::start().await?;
    let cluster = cluster(&etcd).await?;
    etcd.pause().await?;
    let silent = cluster.store.get("any").await.unwrap_err();
    assert!(matches!(silent, Error::Timeout { .. }), "{silent}");
    cluster.publish(2);
    until("stops claiming", cluster.member.registered(), |registered| !registered).await;
    cluster.sees(1).await;
    etcd.resume()?;
    until("registers again", cluster.member.registered(), |registered| *registered).await;
    cluster.sees(2).await;
    Ok(())
}

#[tokio::test]
async fn a_revoked_lease_is_replaced() -> anyhow::Result<()> {
    let etcd = EtcdProcess::start().await?;
    let cluster = cluster(&etcd).await?;
    let key = keys().worker(&cluster.worker);
    let lease = cluster.store.get(&key).await?.and_then(|entry| entry.lease).expect("it is registered");
    cluster.store.revoke(lease).await?;
    until("the worker has gone", cluster.view.subscribe(), |state| state.workers.is_empty()).await;
    cluster.sees(1).await;
    assert_ne!(cluster.store.get(&key).await?.and_then(|entry| entry.lease), Some(lease));
    Ok(())
}

#[tokio::test]
async fn a_view_survives_compaction_and_lost_data() -> anyhow::Result<()> {
    let etcd = EtcdProcess::start().await?;
    let cluster = cluster(&etcd).await?;
    for plan in 2..20 {
        cluster.publish(plan);
        cluster.sees(plan).await;
    }
    let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await?;
    client.compact(cluster.store.list("").await?.revision, None).await?;
    cluster.publish(20);
    cluster.sees(20).await;

    // Somebody wipes the cluster's folder: the record comes back by itself.
    cluster.store.delete_prefix(keys().prefix()).await?;
    until("the worker has gone", cluster.view.subscribe(), |state| state.workers.is_empty()).await;
    cluster.sees(20).await;
    Ok(())
}

#[tokio::test]
async fn leaving_does_not_wait_for_an_etcd_that_is_gone() -> anyhow::Result<()> {
    let mut etcd = EtcdProcess::start().await?;
    let cluster = cluster(&etcd).await?;
    etcd.kill();
    soon("leaving", cluster.member.leave()).await;
    Ok(())
}

#[tokio::test]
async fn one_address_that_never_answers_costs_no_call_and_no_lease() -> anyhow::Result<()> {
    let etcd = EtcdProcess::start().await?;
    // It is connected to, by the kernel, and that is all.
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let spec = format!("etcd=http://{},{}", deaf.local_addr()?, etcd.endpoint());
    let store = conclave_placement::store::connect(&spec)?;
    let token = CancellationToken::new();
    let view = View::start(store.clone(), keys(), token.clone()).await?;
    let record = worker("a", 1);
    let key = keys().worker(&record.id);
    let member = Membership::join(store, key, TTL, record.encode(), token.clone()).await?;
    let cluster =
        Cluster { store: Arc::new(etcd.store()), view, member, worker: record.id, _token: token.drop_guard() };
    cluster.sees(1).await;
    until("is registered", cluster.member.registered(), |registered| *registered).await;
    let mut registered = cluster.member.registered();
    let lost = tokio::time::timeout(2 * TTL, registered.wait_for(|registered| !registered)).await;
    assert!(lost.is_err(), "the lease is kept alive at the other address");
    cluster.publish(2);
    cluster.sees(2).await;
    Ok(())
}
