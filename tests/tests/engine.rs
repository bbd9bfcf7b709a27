//! The serving engine: whatever else is computed, and however little memory there is, each request gets what it would get
//! alone.

use conclave_model::{
    cache::KvCache,
    checkpoint::Checkpoint,
    config::ModelConfig,
    device::{Compute, init_thread},
    oracle::Oracle,
};
use conclave_proto::inference::v1::{GenerateRequest, SamplingParams};
use conclave_tests::{
    client::{Client, greedy, sampled, with_logprobs},
    cluster::Cluster,
    etcd::EtcdProcess,
    eventually::{PATIENCE, eventually},
    golden::Golden,
    metrics::figure,
};
use futures::future::join_all;
use tokio::task::JoinSet;

const REQUESTS: u64 = 32;
/// The cache of a crowded router: one request of the longest kind takes nearly all of it.
const BLOCKS: usize = 6;

/// A prompt of `length` tokens that `seed` decides.
fn prompt(config: &ModelConfig, length: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((state >> 33) % config.vocab_size as u64).expect("a small vocabulary")
    };
    (0..length).map(|_| draw()).collect()
}

/// Prompts of 1 to 200 tokens; every third begins with the same 130.
fn crowd(config: &ModelConfig) -> Vec<GenerateRequest> {
    let request = |index: u64| {
        let own = prompt(config, 1 + (index as usize * 37) % 70, index + 1);
        let shared = if index.is_multiple_of(3) { prompt(config, 130, 1_000) } else { Vec::new() };
        greedy(&[shared, own].concat(), 100 + u32::try_from(index % 5).expect("small") * 6)
    };
    (0..REQUESTS).map(request).collect()
}

fn ids(request: &GenerateRequest) -> Vec<u32> {
    use conclave_proto::inference::v1::generate_request::Input;
    match &request.input {
        Some(Input::Tokens(tokens)) => tokens.ids.clone(),
        other => panic!("no token ids: {other:?}"),
    }
}

/// What a process of its own makes of each request.
async fn alone(golden: &Golden, requests: Vec<GenerateRequest>) -> Vec<Vec<u32>> {
    let folder = golden.folder.clone();
    let compute = move || {
        init_thread(1);
        let checkpoint = Checkpoint::open(&folder).expect("a whole checkpoint");
        let oracle = Oracle::load(&checkpoint, Compute::REFERENCE).expect("the oracle loads");
        let count = |request: &GenerateRequest| request.stop.as_ref().and_then(|stop| stop.max_tokens).expect("set");
        requests.iter().map(|request| oracle.generate_greedy(&ids(request), count(request) as usize)).collect()
    };
    tokio::task::spawn_blocking(compute).await.expect("the oracle answers")
}

fn small_cache(config: &ModelConfig, layers: usize) -> String {
    format!("--kv-memory={}", BLOCKS * KvCache::block_bytes(config, Compute::REFERENCE, layers))
}

async fn admin(cluster: &Cluster) -> String {
    let address = async || cluster.state().routers.values().next().map(|router| router.admin_address.clone());
    eventually("a router to register", address).await
}

async fn nothing_is_held(address: &str) {
    eventually("every block to be given back", async || {
        let held = figure(address, "conclave_engine_cache_blocks_held").await;
        // The gauges are set between steps: one more request makes the engine look again.
        (held == 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn in_a_crowd_each_request_of_a_v3_model_gets_what_it_would_get_alone() {
    crowd_on(|name| name.starts_with("v3")).await;
}

#[tokio::test]
async fn in_a_crowd_each_request_of_another_model_gets_what_it_would_get_alone() {
    crowd_on(|name| !name.starts_with("v3")).await;
}

async fn crowd_on(chosen: impl Fn(&str) -> bool) {
    let etcd = EtcdProcess::start().await;
    for golden in Golden::all().into_iter().filter(|golden| chosen(&golden.name)) {
        let checkpoint = Checkpoint::open(&golden.folder).expect("a whole checkpoint");
        let config = checkpoint.config();
        let cache = small_cache(config, config.layers());
        let limits =
            ["--max-batched-tokens=48", "--max-sequences=8", "--micro-batch-rows=1", "--speculative=mtp", &cache];
        let cluster = Cluster::builder(&golden.folder).store(&etcd.spec()).workers(2).router(&limits).start().await;
        let client = cluster.client(0).await;
        let requests = crowd(config);
        let expected = alone(&golden, requests.clone()).await;
        let answers = join_all(requests.into_iter().map(|request| client.answer(request))).await;
        for (index, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
            assert_eq!(&answer.ids(), expected, "{}, request {index}", golden.name);
        }

        let address = admin(&cluster).await;
        let total = async |name: &str| figure(&address, &format!("conclave_engine_{name}_total")).await;
        assert!(total("preemptions").await > 0.0, "{}: nobody had to give up its blocks", golden.name);
        assert!(total("prefix_found_tokens").await > 0.0, "{}: no prefix was found", golden.name);
        assert!(total("micro_batches").await > total("steps").await, "{}: no step was divided", golden.name);
        // Who of a crowd finds the shared prefix at its start is a matter of luck; who asks twice alone does.
        let twice = || client.answer(crowd(config).swap_remove(0));
        let (_, again) = (twice().await, twice().await);
        assert!(again.started.cached_tokens >= 128, "{}: not told", golden.name);
        if config.mtp_layer().is_some() {
            let (drafted, accepted) = (total("drafted_tokens").await, total("accepted_tokens").await);
            println!("{}: {accepted} of {drafted} guesses were right", golden.name);
            assert!(accepted > 0.0 && accepted < drafted, "{}: both kinds of guesses occur", golden.name);
        } else {
            assert_eq!(total("drafted_tokens").await, 0.0, "{}: nothing to guess with", golden.name);
        }
    }
}

#[tokio::test]
async fn reproducible_bits_do_not_depend_on_who_else_is_computed() {
    let golden = Golden::named("v3_mtp");
    let checkpoint = Checkpoint::open(&golden.folder).expect("a whole checkpoint");
    let config = checkpoint.config();
    let cache = small_cache(config, config.layers());
    let crowded =
        ["--numerics=reproducible", "--max-batched-tokens=40", "--max-sequences=8", "--micro-batch-rows=1", &cache];
    let cluster = Cluster::builder(&golden.folder)
        .workers(3)
        .worker_arguments(&["--numerics=reproducible"])
        .router(&["--numerics=reproducible"])
        .router(&[&crowded[..], &["--speculative=mtp"]].concat())
        .start()
        .await;
    let (quiet, crowd_client) = (cluster.client(0).await, cluster.client(1).await);
    let logprobs = |request: GenerateRequest| {
        let mut request = with_logprobs(request, 5);
        request.logprobs.as_mut().expect("just set").prompt = false;
        request
    };
    let requests: Vec<GenerateRequest> = crowd(config).into_iter().map(logprobs).collect();
    // Steps of those alone who want no logprobs look for the greatest logit only.
    let (together, tokens_only) = tokio::join!(
        join_all(requests.iter().map(|request| crowd_client.answer(request.clone()))),
        join_all(crowd(config).into_iter().map(|request| crowd_client.answer(request))),
    );
    for (index, (request, (together, tokens_only))) in
        requests.into_iter().zip(together.into_iter().zip(tokens_only)).enumerate()
    {
        let alone = quiet.answer(request).await;
        assert_eq!(bits(&alone), bits(&together), "request {index}");
        assert_eq!(tokens_only.ids(), alone.ids(), "request {index} without logprobs");
    }
}

/// A token's id, its logprob's bits, and those of the most probable ones.
type Bits = (u32, u32, Vec<(u32, u32)>);

fn bits(answer: &conclave_tests::client::Answer) -> Vec<Bits> {
    let top = |token: &conclave_proto::inference::v1::Token| {
        token.top.iter().map(|top| (top.id, top.logprob.to_bits())).collect()
    };
    answer.tokens.iter().map(|token| (token.id, token.logprob.expect("asked for").to_bits(), top(token))).collect()
}

#[tokio::test]
async fn each_of_n_answers_is_what_its_own_seed_gives() {
    let golden = Golden::named("v2_lite");
    let cluster = Cluster::builder(&golden.folder).start().await;
    let client = cluster.client(0).await;
    // A prompt that ends inside a block, and one that ends with it.
    for length in [70, 128] {
        let prompt = prompt(Checkpoint::open(&golden.folder).expect("whole").config(), length, 3);
        let several = client.answers(GenerateRequest { n: Some(5), ..sampled(&prompt, 20, 40) }).await;
        assert_eq!(several.len(), 5);
        for (seed, answer) in (40..).zip(&several) {
            let single = client.answer(sampled(&prompt, 20, seed)).await;
            assert_eq!(answer.ids(), single.ids(), "a prompt of {length}, seed {seed}");
        }
    }
    let address = admin(&cluster).await;
    client.generate(&[1], 1).await;
    nothing_is_held(&address).await;
}

#[tokio::test]
async fn a_prefix_is_found_again_by_those_of_the_same_salt() {
    let golden = Golden::named("v3");
    let cluster = Cluster::builder(&golden.folder).start().await;
    let client = cluster.client(0).await;
    let prompt = prompt(Checkpoint::open(&golden.folder).expect("whole").config(), 200, 5);
    let salted = |salt: &str| GenerateRequest { cache_salt: salt.to_owned(), ..greedy(&prompt, 5) };
    let first = client.answer(salted("")).await;
    assert_eq!(first.started.cached_tokens, 0);
    let again = client.answer(salted("")).await;
    assert_eq!((again.started.cached_tokens, again.ids()), (192, first.ids()));
    let other = client.answer(salted("mine")).await;
    assert_eq!((other.started.cached_tokens, other.ids()), (0, first.ids()));
    // The prompt's logprobs need every row computed.
    let told = client.answer(with_logprobs(salted(""), 1)).await;
    assert_eq!((told.started.cached_tokens, told.started.prompt_logprobs.len()), (0, 200));
}

#[tokio::test]
async fn a_thousand_streams_dropped_at_random_leave_nothing_behind() {
    let golden = Golden::named("v3");
    let checkpoint = Checkpoint::open(&golden.folder).expect("a whole checkpoint");
    let cache = small_cache(checkpoint.config(), checkpoint.config().num_hidden_layers);
    let cluster = Cluster::builder(&golden.folder).workers(2).router(&["--max-sequences=8", &cache]).start().await;
    let client = cluster.client(0).await;
    let kept = crowd(checkpoint.config());
    let expected = alone(&golden, kept.clone()).await;
    let mut dropped = JoinSet::new();
    let mut survivors = kept.into_iter().zip(expected);
    for index in 0..1_000u64 {
        let request = GenerateRequest {
            n: Some(1 + u32::try_from(index % 3).expect("small")),
            sampling: Some(SamplingParams { temperature: Some(1.0), ..SamplingParams::default() }),
            ..greedy(&prompt(checkpoint.config(), 1 + (index as usize * 7) % 90, index), 60)
        };
        dropped.spawn(drop_after(client.clone(), request, index as usize % 7));
        if index % 32 == 31 {
            if let Some((request, expected)) = survivors.next() {
                assert_eq!(client.answer(request).await.ids(), expected, "beside those that are dropped");
            }
            while dropped.len() > 60 {
                dropped.join_next().await;
            }
        }
    }
    while let Some(done) = dropped.join_next().await {
        done.expect("no client fails");
    }
    let address = admin(&cluster).await;
    eventually("every sequence to be gone", async || {
        client.generate(&[1], 1).await;
        let gone = figure(&address, "conclave_engine_sequences_waiting").await <= 1.0;
        gone.then_some(())
    })
    .await;
    nothing_is_held(&address).await;
}

/// Reads some messages of an answer and leaves.
async fn drop_after(client: Client, request: GenerateRequest, tokens: usize) {
    // A queue that is full refuses; that too must leave nothing behind.
    if let Ok(mut stream) = client.begin(request, PATIENCE).await {
        let _ = stream.tokens(tokens).await;
    }
}
