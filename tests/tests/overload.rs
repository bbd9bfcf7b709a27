//! More is asked for than can be done: who may wait, who is turned away and told when to come back, and that nothing is
//! computed for nobody.
//!
//! A router without workers computes as slowly as can be: the first request is in a step, waiting for experts, and with
//! `--max-sequences=1` everybody else waits.

use std::time::Duration;

use conclave_tests::{
    client::{Client, explain, greedy},
    cluster::Cluster,
    eventually::{PATIENCE, eventually},
    golden::Golden,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

const ONE_AT_A_TIME: &str = "--max-sequences=1";

#[track_caller]
fn is_full(status: &Status) {
    let told = explain(status);
    assert_eq!(status.code(), Code::ResourceExhausted, "{told}");
    let details = status.get_error_details();
    assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some("QUEUE_FULL"), "{told}");
    assert!(details.retry_info().is_some_and(|info| info.retry_delay.is_some()), "{told}");
}

async fn begin(client: &Client) -> Result<conclave_tests::client::Answering, Status> {
    client.begin(greedy(&[3, 4, 5], 2), PATIENCE).await
}

#[tokio::test]
async fn no_more_wait_than_may_and_who_leaves_makes_room_at_once() {
    let golden = Golden::named("v3_tied");
    let cluster =
        Cluster::builder(&golden.folder).workers(0).router(&[ONE_AT_A_TIME, "--max-waiting=2"]).launch().await;
    let client = cluster.client(0).await;

    // One is computed, once the engine has taken it; two wait.
    let mut accepted = Vec::new();
    while accepted.len() < 3 {
        let next = async || match begin(&client).await {
            Ok(answering) => Some(answering),
            Err(status) => {
                is_full(&status);
                None
            }
        };
        accepted.push(eventually("a place", next).await);
    }
    is_full(&begin(&client).await.expect_err("two wait already"));

    // The engine's step goes on and on: it is not the engine that notices.
    drop(accepted.pop());
    let status = eventually("the place of who left", async || begin(&client).await.ok()).await;
    is_full(&begin(&client).await.expect_err("two wait again"));
    drop((accepted, status));
}

#[tokio::test]
async fn a_request_whose_time_was_up_while_it_waited_is_never_computed() {
    let golden = Golden::named("v3_tied");
    let mut cluster = Cluster::builder(&golden.folder).workers(0).router(&[ONE_AT_A_TIME]).launch().await;
    let client = cluster.client(0).await;

    let first = client.begin(greedy(&[3], 1), PATIENCE).await.expect("nobody waits");
    let long = greedy(&[3; 48], 1);
    let status = client.ask(long.clone(), Duration::from_secs(1)).await.expect_err("nobody computes");
    assert!(matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{}", explain(&status));

    cluster.add_worker();
    first.rest().await.expect("it had time enough");
    // Whoever waits behind the long request would wait for its rows too.
    client.generate(&[3], 1).await;
    let without = cluster.inventory(0).await.rows_total;
    client.answer(long).await;
    let with = cluster.inventory(0).await.rows_total;
    assert!(without < with - without, "{without} rows for two tokens, and {} for 48", with - without);
}
