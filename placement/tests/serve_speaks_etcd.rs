//! The embedded store answers as etcd does, to etcd's own client, beyond what our store client asks.
//!
//! In: what `etcdctl` sends for get, put, del, watch, lease, member list and endpoint status. Out: etcd's answers.

#![allow(clippy::unwrap_used, reason = "a story fails where it stands")]

mod support;

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, EventType, GetOptions, PutOptions, SortOrder, SortTarget, Txn,
    TxnOp, TxnOpResponse, WatchOptions,
};
use support::{served, soon};
use tonic::Code;

async fn client() -> (support::Served, Client) {
    let served = served().await;
    let client = Client::connect([&served.address], None).await.unwrap();
    (served, client)
}

fn code<T>(outcome: Result<T, Error>) -> Code {
    match outcome.err().expect("it should be refused") {
        Error::GRpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn ranges_are_limited_sorted_counted_and_stripped() {
    let (_served, mut client) = client().await;
    for (name, value) in [("b", "1"), ("a", "3"), ("c", "2")] {
        client.put(name, value, None).await.unwrap();
    }
    let names =
        |got: &etcd_client::GetResponse| -> String { got.kvs().iter().map(|pair| pair.key_str().unwrap()).collect() };
    let all = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!((names(&all).as_str(), all.count(), all.more()), ("abc", 3, false));
    let range = client.get("a", Some(GetOptions::new().with_range("c"))).await.unwrap();
    assert_eq!(names(&range), "ab");
    let limited = client.get("a", Some(GetOptions::new().with_from_key().with_limit(2))).await.unwrap();
    assert_eq!((names(&limited).as_str(), limited.count(), limited.more()), ("ab", 3, true));
    let by_value = GetOptions::new().with_all_keys().with_sort(SortTarget::Value, SortOrder::Descend);
    assert_eq!(names(&client.get("", Some(by_value)).await.unwrap()), "acb");
    let keys_only = client.get("", Some(GetOptions::new().with_all_keys().with_keys_only())).await.unwrap();
    assert!(keys_only.kvs().iter().all(|pair| pair.value().is_empty()));
    let counted = client.get("", Some(GetOptions::new().with_all_keys().with_count_only())).await.unwrap();
    assert_eq!((counted.count(), counted.kvs().len()), (3, 0));
    let now = all.header().unwrap().revision();
    assert_eq!(code(client.get("a", Some(GetOptions::new().with_revision(now + 9))).await), Code::OutOfRange);
    assert_eq!(code(client.get("a", Some(GetOptions::new().with_revision(now - 1))).await), Code::Unimplemented);
}

#[tokio::test]
async fn puts_and_deletes_can_tell_what_was_there() {
    let (_served, mut client) = client().await;
    client.put("k", "one", None).await.unwrap();
    let put = client.put("k", "two", Some(PutOptions::new().with_prev_key())).await.unwrap();
    assert_eq!(put.prev_key().unwrap().value(), b"one");
    let gone = client.delete("k", Some(DeleteOptions::new().with_prev_key())).await.unwrap();
    assert_eq!((gone.deleted(), gone.prev_kvs()[0].value()), (1, &b"two"[..]));
    assert_eq!(code(client.put("", "v", None).await), Code::InvalidArgument);
    assert_eq!(code(client.put(vec![0xff], "v", None).await), Code::InvalidArgument);
    assert_eq!(code(client.put("k", "v", Some(PutOptions::new().with_lease(77))).await), Code::NotFound);
}

#[tokio::test]
async fn transactions_compare_everything_and_happen_at_one_revision() {
    let (_served, mut client) = client().await;
    client.put("k", "5", None).await.unwrap();
    let cases = [
        (Compare::version("k", CompareOp::Equal, 1), true),
        (Compare::version("k", CompareOp::Greater, 1), false),
        (Compare::create_revision("k", CompareOp::NotEqual, 0), true),
        (Compare::mod_revision("k", CompareOp::Less, 2), false),
        (Compare::value("k", CompareOp::Equal, "5"), true),
        (Compare::value("k", CompareOp::Less, "4"), false),
        (Compare::value("absent", CompareOp::NotEqual, "5"), false),
        (Compare::create_revision("absent", CompareOp::Equal, 0), true),
        (Compare::lease("k", CompareOp::Equal, 0), true),
    ];
    for (number, (compare, expected)) in cases.into_iter().enumerate() {
        let done = client.txn(Txn::new().when([compare])).await.unwrap();
        assert_eq!(done.succeeded(), expected, "case {number}");
    }
    let ops = [TxnOp::put("x", "1", None), TxnOp::get("x", None), TxnOp::delete("k", None), TxnOp::put("y", "2", None)];
    let done = client.txn(Txn::new().and_then(ops)).await.unwrap();
    let responses = done.op_responses();
    let TxnOpResponse::Get(got) = &responses[1] else { panic!("{responses:?}") };
    assert_eq!(got.kvs()[0].value(), b"1", "a read sees the puts before it");
    let written = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    let revision = done.header().unwrap().revision();
    assert!(written.kvs().iter().all(|pair| pair.mod_revision() == revision) && written.kvs().len() == 2);
    let twice = Txn::new().and_then([TxnOp::put("x", "1", None), TxnOp::put("x", "2", None)]);
    assert_eq!(code(client.txn(twice).await), Code::InvalidArgument);
    let nested = Txn::new().and_then([TxnOp::txn(Txn::new())]);
    assert_eq!(code(client.txn(nested).await), Code::Unimplemented);
}

#[tokio::test]
async fn one_stream_carries_many_watches_that_can_be_cancelled() {
    let (_served, mut client) = client().await;
    client.put("a/1", "old", None).await.unwrap();
    let mut stream = client.watch("a/", Some(WatchOptions::new().with_prefix().with_prev_key())).await.unwrap();
    let first = stream.message().await.unwrap().unwrap();
    assert!(first.created());
    stream.watch("b", None).await.unwrap();
    let second = stream.message().await.unwrap().unwrap();
    assert!(second.created() && second.watch_id() != first.watch_id());

    client.put("b", "v", None).await.unwrap();
    assert_eq!(stream.message().await.unwrap().unwrap().watch_id(), second.watch_id());
    client.delete("a/1", None).await.unwrap();
    let gone = stream.message().await.unwrap().unwrap();
    let event = &gone.events()[0];
    assert_eq!((gone.watch_id(), event.event_type()), (first.watch_id(), EventType::Delete));
    assert_eq!(event.prev_kv().unwrap().value(), b"old");

    stream.cancel(second.watch_id()).await.unwrap();
    let cancelled = stream.message().await.unwrap().unwrap();
    assert!(cancelled.canceled() && cancelled.watch_id() == second.watch_id());
    client.put("b", "unseen", None).await.unwrap();
    stream.request_progress().await.unwrap();
    let progress = stream.message().await.unwrap().unwrap();
    assert!(progress.events().is_empty() && progress.header().unwrap().revision() >= 5);
}

#[tokio::test]
async fn leases_tell_their_time_and_their_keys() {
    let (_served, mut client) = client().await;
    let lease = client.lease_grant(50, None).await.unwrap();
    client.put("k", "v", Some(PutOptions::new().with_lease(lease.id()))).await.unwrap();
    let options = etcd_client::LeaseTimeToLiveOptions::new().with_keys();
    let told = client.lease_time_to_live(lease.id(), Some(options)).await.unwrap();
    assert_eq!((told.granted_ttl(), told.keys()), (50, &[b"k".to_vec()][..]));
    assert!((1..=50).contains(&told.ttl()));
    let (mut keeper, mut kept) = client.lease_keep_alive(lease.id()).await.unwrap();
    keeper.keep_alive().await.unwrap();
    assert_eq!(kept.message().await.unwrap().unwrap().ttl(), 50);
    assert_eq!(client.leases().await.unwrap().leases().len(), 1);
    client.lease_revoke(lease.id()).await.unwrap();
    assert_eq!(client.lease_time_to_live(lease.id(), None).await.unwrap().ttl(), -1);
    assert_eq!(code(client.lease_revoke(lease.id()).await), Code::NotFound);
    keeper.keep_alive().await.unwrap();
    assert_eq!(kept.message().await.unwrap().unwrap().ttl(), 0, "a stream that goes on says that the lease is gone");
}

#[tokio::test]
async fn it_says_what_it_is() {
    let (served, mut client) = client().await;
    let members = client.member_list().await.unwrap();
    assert_eq!(members.members()[0].client_urls(), std::slice::from_ref(&served.address));
    let status = client.status().await.unwrap();
    assert!(status.version().contains("conclave-embedded") && status.leader() == members.members()[0].id());
}

#[tokio::test]
async fn open_watches_end_when_the_server_does() {
    let (served, mut client) = client().await;
    let mut stream = client.watch("k", None).await.unwrap();
    assert!(stream.message().await.unwrap().unwrap().created());
    drop(served);
    let ended = soon("the stream ends", stream.message()).await;
    assert!(matches!(ended, Ok(None) | Err(_)), "{ended:?}");
    tokio::time::timeout(Duration::from_secs(30), async { while client.get("k", None).await.is_ok() {} })
        .await
        .unwrap();
}
