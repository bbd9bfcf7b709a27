//! Golden models: for each family's shape, a cluster of three worker processes says what `transformers` says.

use std::sync::Arc;

use conclave_model::{
    cache::SequenceCache,
    checkpoint::Checkpoint,
    device::{Compute, init_thread},
    transformer::Transformer,
    wire::Encoding,
};
use conclave_placement::view::View;
use conclave_proto::inference::v1::Token;
use conclave_router::{
    engine::pass::{self, Machine, Spent},
    load::SentRows,
    moe::{Exchange, Hedging, Mode},
    workers::Workers,
};
use conclave_tests::{
    client::{Client, greedy, with_logprobs},
    cluster::Cluster,
    etcd::EtcdProcess,
    eventually::PATIENCE,
    golden::{Case, Golden},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Of every logit at every position of a prompt.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// The promise is logits within 1e-4. A logprob is one logit less a mean of all, so it may be off by twice that.
const LOGPROB_TOLERANCE: f32 = 2e-4;
/// As many as the contract allows: more values to compare at each position.
const TOP: u32 = 20;

#[tokio::test]
async fn a_cluster_of_three_workers_says_what_the_reference_says() {
    let etcd = EtcdProcess::start().await;
    for golden in Golden::all() {
        let cluster = Cluster::builder(&golden.folder).store(&etcd.spec()).workers(3).start().await;
        let client = cluster.client(0).await;
        for case in &golden.cases {
            says_the_same(&golden.name, case, &client).await;
        }
        for index in 0..3 {
            assert!(cluster.inventory(index).await.rows_total > 0, "{}: worker {index} had no part", golden.name);
        }
    }
}

/// The API gives the best logprobs only. So here the router's own pieces stand in this process, and three worker
/// processes compute for them: nothing is between a logit and its comparison.
#[tokio::test]
async fn every_logit_of_a_cluster_of_three_workers_is_the_reference_s() {
    init_thread(1);
    let etcd = EtcdProcess::start().await;
    for golden in Golden::all() {
        let cluster = Cluster::builder(&golden.folder).store(&etcd.spec()).workers(3).start().await;
        let checkpoint = Checkpoint::open(&golden.folder).expect("a whole checkpoint");
        let transformer = Transformer::load(&checkpoint, Compute::REFERENCE, |_| {}).expect("the router's half loads");
        let end = CancellationToken::new();
        let view = View::start(Arc::clone(&cluster.store), cluster.keys.clone(), end.clone()).await.expect("a view");
        let hidden = transformer.config().hidden_size;
        let exchange = |mode| Exchange {
            hedging: Some(Hedging::default()),
            sent: Arc::new(SentRows::new(std::iter::empty(), 0)),
            workers: Workers::start(view.subscribe(), hidden, end.clone()).expect("a thread"),
            mode,
            encoding: Encoding::F32,
            hidden,
            patience: PATIENCE,
            stall: Arc::default(),
        };
        // Whole prompts and pieces of them; both ways of combining.
        for (mode, rows) in [(Mode::PerAssignment, usize::MAX), (Mode::PartialSum, 7)] {
            let exchange = exchange(mode);
            let mut worst = 0.0f32;
            for case in &golden.cases {
                worst = worst.max(furthest_logit(&transformer, &exchange, case, rows).await);
            }
            println!("{}, {mode:?}: worst logit difference {worst:e}", golden.name);
            assert!(worst <= LOGIT_TOLERANCE, "{}, {mode:?}: a logit is off by {worst}", golden.name);
        }
        for index in 0..3 {
            assert!(cluster.inventory(index).await.rows_total > 0, "{}: worker {index} had no part", golden.name);
        }
        end.cancel();
    }
}

/// Computes a prompt, at most `rows` at a time: how far the logit is off that is furthest from the reference's.
async fn furthest_logit(transformer: &Transformer, exchange: &Exchange, case: &Case, rows: usize) -> f32 {
    let mut cache =
        SequenceCache::new(transformer.config(), transformer.compute(), transformer.config().num_hidden_layers);
    let mut found = Vec::new();
    for tokens in case.prompt.chunks(rows) {
        found.extend(forward(transformer, exchange, tokens, &mut cache).await);
    }
    let expected = case.logits.concat();
    assert_eq!(found.len(), expected.len(), "a logit for each token of the vocabulary at each position");
    let off = found.iter().zip(&expected).map(|(found, expected)| (found - expected).abs());
    // A logit that is no number is further off than any.
    off.fold(0.0, |worst, off| if off.is_nan() { f32::INFINITY } else { worst.max(off) })
}

/// The router's forward pass for one sequence; logits of all rows.
async fn forward(
    transformer: &Transformer,
    exchange: &Exchange,
    tokens: &[u32],
    cache: &mut SequenceCache,
) -> Vec<f32> {
    let segment = cache.extend(tokens.len());
    let machine = Machine { transformer, exchange, cache: cache.blocks() };
    let passed = pass::forward(machine, &[segment], tokens, Instant::now() + PATIENCE, &Spent::default()).await;
    let x = passed.unwrap_or_else(|error| panic!("{error}"));
    transformer.logits(&x, &(0..tokens.len()).collect::<Vec<_>>())
}

async fn says_the_same(name: &str, case: &Case, client: &Client) {
    let count = u32::try_from(case.greedy.len()).expect("a short answer");
    let answer = client.answer(with_logprobs(greedy(&case.prompt, count), TOP)).await;
    let context = format!("{name}, prompt of {} tokens", case.prompt.len());
    assert_eq!(answer.ids(), case.greedy, "{context}: greedy tokens");

    let prompt = &answer.started.prompt_logprobs;
    assert_eq!(prompt.len(), case.prompt.len(), "{context}: one logprob entry per prompt token");
    assert_eq!(prompt[0].logprob, None, "{context}: nothing predicts the first token");
    // Position p predicts token p + 1; the last one of the prompt predicts the first token of the answer.
    for (position, token) in prompt[1..].iter().chain(&answer.tokens[..1]).enumerate() {
        let expected = case.logprobs(position);
        compare(&format!("{context}, position {position}"), token, &expected);
    }
}

fn compare(context: &str, token: &Token, expected: &[f32]) {
    let own = token.logprob.unwrap_or_else(|| panic!("{context}: no logprob"));
    assert_eq!(token.top.len(), TOP as usize, "{context}: as many as asked for");
    let pairs = [(token.id, own)].into_iter().chain(token.top.iter().map(|top| (top.id, top.logprob)));
    for (id, found) in pairs {
        let expected = expected[id as usize];
        let off = (found - expected).abs();
        assert!(off <= LOGPROB_TOLERANCE, "{context}, token {id}: logprob {found}, reference {expected}, off by {off}");
    }
    let best = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!((token.top[0].logprob - best).abs() <= LOGPROB_TOLERANCE, "{context}: the top list opens with the best");
}
