//! However many workers, whichever way of combining, whichever router: the same tokens as one process alone.

use std::path::PathBuf;

use conclave_model::{
    checkpoint::Checkpoint,
    device::{Compute, init_thread},
    oracle::Oracle,
};
use conclave_proto::inference::v1::GenerateRequest;
use conclave_tests::{
    client::{Client, greedy, sampled, with_logprobs},
    cluster::Cluster,
    etcd::EtcdProcess,
    golden::Golden,
};

const DRAWN: u32 = 40;
/// By checkpoint, the numbers of workers it is served with.
const CLUSTERS: [(&str, &[usize]); 3] = [("v3", &[1, 2, 3, 5]), ("v2_lite", &[3]), ("v3_fp8", &[3])];
/// A bf16 row has 8 bits of precision; through the few layers of a golden model its logprobs stay this close.
const BF16_TOLERANCE: f32 = 0.5;

#[tokio::test]
async fn any_number_of_workers_and_either_combine_mode_give_the_single_process_s_tokens() {
    let etcd = EtcdProcess::start().await;
    for (name, numbers) in CLUSTERS {
        let golden = Golden::named(name);
        let prompts: Vec<Vec<u32>> = golden.cases.iter().map(|case| case.prompt.clone()).collect();
        let alone = answers_of_one_process(golden.folder.clone(), prompts.clone()).await;
        for &workers in numbers {
            let cluster = Cluster::builder(&golden.folder)
                .store(&etcd.spec())
                .workers(workers)
                .router(&["--combine=per-assignment"])
                .router(&["--combine=partial-sum"])
                .start()
                .await;
            for (router, mode) in ["per assignment", "partial sums"].iter().enumerate() {
                let client = cluster.client(router).await;
                for (prompt, expected) in prompts.iter().zip(&alone) {
                    let answer = client.generate(prompt, DRAWN).await;
                    assert_eq!(&answer.ids(), expected, "{name}, {workers} workers, {mode}");
                }
            }
            for index in 0..workers {
                let rows = cluster.inventory(index).await.rows_total;
                assert!(rows > 0, "{name}: worker {index} of {workers} had no part");
            }
        }
    }
}

#[tokio::test]
async fn any_router_continues_any_stream_with_the_same_draws() {
    let golden = Golden::named("v2_lite");
    let cluster = Cluster::builder(&golden.folder).workers(2).routers(2).start().await;
    let (here, there) = (cluster.client(0).await, cluster.client(1).await);
    let prompt = &golden.cases[0].prompt;

    let whole = draws(&here, sampled(prompt, DRAWN, 7)).await;
    assert_eq!(whole.len(), DRAWN as usize);
    assert_eq!(draws(&here, sampled(prompt, DRAWN, 7)).await, whole, "the same router again");
    assert_eq!(draws(&there, sampled(prompt, DRAWN, 7)).await, whole, "the other router");
    assert_ne!(draws(&here, sampled(prompt, DRAWN, 8)).await, whole, "another seed draws others");
    assert_ne!(draws(&here, greedy(prompt, DRAWN)).await, whole, "sampling is not greedy");

    for delivered in [1, 17, whole.len() - 1] {
        let (delivered, rest) = whole.split_at(delivered);
        let resumed = GenerateRequest { resume_tokens: delivered.to_vec(), ..sampled(prompt, DRAWN, 7) };
        assert_eq!(draws(&there, resumed).await, rest, "resumed after {} tokens", delivered.len());
    }
}

#[tokio::test]
async fn an_unasked_seed_is_told_and_repeats_the_answer() {
    let golden = Golden::named("v2_lite");
    let cluster = Cluster::builder(&golden.folder).start().await;
    let client = cluster.client(0).await;
    let mut request = sampled(&golden.cases[1].prompt, DRAWN, 0);
    request.sampling.as_mut().expect("sampling is set").seed = None;

    let first = client.answer(request.clone()).await;
    request.sampling.as_mut().expect("sampling is set").seed = Some(first.started.seed);
    assert_eq!(client.answer(request).await.ids(), first.ids());
}

#[tokio::test]
async fn rows_that_travel_in_bf16_come_close() {
    let golden = Golden::named("v3");
    let case = &golden.cases[1];
    let cluster = Cluster::builder(&golden.folder).workers(2).router(&["--wire=bf16"]).start().await;
    let answer = cluster.client(0).await.answer(with_logprobs(greedy(&case.prompt, DRAWN), 5)).await;
    assert_eq!(answer.tokens.len(), DRAWN as usize);
    let mut exact = true;
    for (position, token) in answer.started.prompt_logprobs[1..].iter().enumerate() {
        let (found, expected) = (token.logprob.expect("asked for"), case.logprobs(position)[token.id as usize]);
        let off = (found - expected).abs();
        assert!(off <= BF16_TOLERANCE, "position {position}: logprob {found}, reference {expected}");
        exact &= off <= 1e-5;
    }
    assert!(!exact, "the rows did not travel in bf16 at all");
}

/// In one process on a thread of its own, as libtorch wants it: greedy tokens after each of `prompts`.
async fn answers_of_one_process(checkpoint: PathBuf, prompts: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    let compute = move || {
        init_thread(1);
        let checkpoint = Checkpoint::open(&checkpoint).expect("a whole checkpoint");
        let oracle = Oracle::load(&checkpoint, Compute::REFERENCE).expect("the oracle loads");
        prompts.iter().map(|prompt| oracle.generate_greedy(prompt, DRAWN as usize)).collect()
    };
    tokio::task::spawn_blocking(compute).await.expect("the oracle answers")
}

async fn draws(client: &Client, request: GenerateRequest) -> Vec<u32> {
    client.answer(request).await.ids()
}
