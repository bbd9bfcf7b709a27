//! `conclave bench serve` counts what a router really answered, and tells failures from answers.

use std::process::{Output, Stdio};

use conclave_tests::{
    cluster::Cluster,
    eventually::{eventually, soon},
    golden::Golden,
    process::{Signal, binary},
};
use rustix::process::{Pid, kill_process};
use serde_json::Value;
use tokio::process::Command;

#[tokio::test]
async fn every_request_and_every_token_is_counted() {
    let golden = Golden::named("v2_lite");
    let cluster = Cluster::builder(&golden.folder).workers(2).start().await;
    let address = cluster.router_address(0).await;

    let line = "--num-prompts 12 --input-len 20 --shared-prefix-len 5 --output-len 8 --max-concurrency 3 --warmup 1";
    let closed = report(&measured(&address, line).await);
    assert_eq!(closed["successful"], 12);
    assert_eq!((&closed["failed"], &closed["interrupted"], &closed["not_sent"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!((&closed["input_tokens"], &closed["output_tokens"]), (&(12 * 25).into(), &(12 * 8).into()));
    let peak = closed["peak_concurrency"].as_u64().expect("a number");
    assert!((1..=3).contains(&peak), "{peak} requests in flight, with at most 3 allowed");
    adds_up(&closed);
    are_ordered(&closed);

    // Lengths and times come from the seed alone, so two runs ask for the same, whatever the load.
    let line = "--num-prompts 10 --input-len 16 --input-range-ratio 0.5 --output-len 6 --output-range-ratio 0.5";
    let at_once = report(&measured(&address, &format!("{line} --seed 4")).await);
    let at_a_rate = report(&measured(&address, &format!("{line} --seed 4 --request-rate 200 --burstiness 0.5")).await);
    for open in [&at_once, &at_a_rate] {
        assert_eq!((&open["successful"], &open["failed_by_code"]), (&10.into(), &serde_json::json!({})));
        adds_up(open);
        are_ordered(open);
    }
    for tokens in ["input_tokens", "output_tokens"] {
        assert_eq!(at_once[tokens], at_a_rate[tokens], "{tokens}");
    }
}

#[tokio::test]
async fn a_router_that_dies_leaves_failures_with_their_codes_and_one_that_is_gone_a_clear_error() {
    let golden = Golden::named("v2_lite");
    let mut cluster = Cluster::builder(&golden.folder).start().await;
    let address = cluster.router_address(0).await;

    // More tokens than it can draw before it is killed, which is as soon as rows are computed.
    let dying = tokio::spawn(measured_owned(address.clone(), "--num-prompts 6 --input-len 8 --output-len 2500"));
    eventually("rows to be computed", async || (cluster.inventory(0).await.rows_total > 0).then_some(())).await;
    cluster.routers[0].kill().await;
    let output = soon("the end of a measurement", dying).await.expect("no panic");
    assert_eq!(output.status.code(), Some(1), "every request failed");
    let failed = report(&output);
    assert_eq!((&failed["successful"], &failed["failed"], &failed["ttft_ms"]), (&0.into(), &6.into(), &Value::Null));
    let by_code = failed["failed_by_code"].as_object().expect("an object");
    assert!(by_code.keys().all(|code| code.chars().all(|c| c.is_ascii_uppercase() || c == '_')), "{by_code:?}");
    assert_eq!(by_code.values().filter_map(Value::as_u64).sum::<u64>(), 6, "{by_code:?}");

    let output = measured(&address, "--num-prompts 1").await;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("cannot reach a router") && output.stdout.is_empty(), "{said}");
}

#[tokio::test]
async fn ctrl_c_ends_a_measurement_early_and_what_was_measured_is_told() {
    let golden = Golden::named("v2_lite");
    let cluster = Cluster::builder(&golden.folder).start().await;
    let address = cluster.router_address(0).await;

    // The first request leaves at once; the next would in days.
    let line = "--num-prompts 50 --request-rate 0.00001 --seed 1 --input-len 8 --output-len 1";
    let running = command(&address, line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let pid = running.id().and_then(|id| Pid::from_raw(id.cast_signed())).expect("a running process");
    eventually("rows to be computed", async || (cluster.inventory(0).await.rows_total > 0).then_some(())).await;
    kill_process(pid, Signal::INT).expect("a child can be signalled");
    let output = soon("the end of a measurement", running.wait_with_output()).await.expect("it can be awaited");

    // The signal may come before the one answer or after it.
    let told = report(&output);
    let successful = told["successful"].as_u64().expect("a number");
    assert_eq!(successful + told["interrupted"].as_u64().expect("a number"), 1);
    assert_eq!((&told["not_sent"], &told["failed"]), (&49.into(), &0.into()));
    assert_eq!(output.status.code(), Some(if successful == 1 { 130 } else { 1 }));
}

/// The real command against the router at `address`.
fn command(address: &str, line: &str) -> Command {
    let mut command = Command::new(binary("conclave"));
    command.args(["bench", "serve", "--json", "--endpoint", address]).args(line.split_whitespace());
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Its output, once it has ended.
async fn measured(address: &str, line: &str) -> Output {
    soon("the end of a measurement", command(address, line).output()).await.expect("the command runs")
}

async fn measured_owned(address: String, line: &'static str) -> Output {
    measured(&address, line).await
}

fn report(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("no JSON ({error}); on stderr: {said}"))
}

/// Rates are counts over the duration.
fn adds_up(report: &Value) {
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {}", report[key]));
    let all = number("input_tokens") + number("output_tokens");
    for (rate, count) in [
        ("request_throughput", number("successful")),
        ("output_throughput", number("output_tokens")),
        ("total_token_throughput", all),
    ] {
        let told = number(rate) * number("duration_s");
        assert!((told - count).abs() < 1e-6 * count, "{rate} times the duration is {told}, not {count}");
    }
}

fn are_ordered(report: &Value) {
    for kind in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "late_ms"] {
        let figures = ["p50", "p90", "p99", "max"].map(|key| report[kind][key].as_f64().expect("a number"));
        assert!(figures.is_sorted() && figures[0] >= 0.0, "{kind}: {figures:?}");
    }
    let max = |kind: &str| report[kind]["max"].as_f64().expect("a number");
    assert!(max("ttft_ms") <= max("e2e_ms"), "a first token comes before the end of its answer");
}
