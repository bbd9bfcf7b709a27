//! Golden models: for each family's shape, a cluster of three worker processes says what `transformers` says.

use conclave_proto::inference::v1::Token;
use conclave_tests::{
    client::{Client, greedy, with_logprobs},
    cluster::Cluster,
    etcd::EtcdProcess,
    golden::{Case, Golden},
};

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
