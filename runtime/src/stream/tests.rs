//! Both ends together over real sockets, against a peer that answers, refuses, ends or does not read.

use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;
use tonic::service::Routes;
use tonic_health::server::health_reporter;

use super::{Driver, Front, HEADER, Handler, Inbound, Message, driven_here, open, serve};
use crate::server::MAX_INTERNAL_MESSAGE;
use crate::socket::Socket;
use crate::{channel, listen};

/// Answers each message with itself, as the metadata `act` says.
#[derive(Clone)]
struct Peer;

impl Handler for Peer {
    const PATH: &'static str = "/grpc.health.v1.Health/Test";

    fn accept(
        &self,
        metadata: &HeaderMap,
        mut messages: Inbound,
        driver: &Driver,
    ) -> Result<mpsc::Receiver<Bytes>, Status> {
        let act = metadata.get("act").and_then(|act| act.to_str().ok()).unwrap_or_default().to_owned();
        if act == "refuse" {
            return Err(Status::failed_precondition("not you"));
        }
        let (answers, stream) = mpsc::channel(2);
        driver.spawn(async move {
            if act == "sleep" {
                answers.closed().await;
            }
            while let Ok(Some(message)) = messages.next().await {
                if act == "end" || answers.send(framed(&message)).await.is_err() {
                    return;
                }
            }
        });
        Ok(stream)
    }
}

fn framed(body: &[u8]) -> Bytes {
    let mut message = Message::with_capacity(body.len());
    message.body().extend_from_slice(body);
    message.finish().unwrap()
}

const PATIENCE: Duration = Duration::from_secs(60);

/// Asks somebody else for the answer to each message.
#[derive(Clone)]
struct Asking(mpsc::Sender<(Bytes, oneshot::Sender<Bytes>)>);

impl Handler for Asking {
    const PATH: &'static str = Peer::PATH;

    fn accept(
        &self,
        _metadata: &HeaderMap,
        mut messages: Inbound,
        driver: &Driver,
    ) -> Result<mpsc::Receiver<Bytes>, Status> {
        let (answers, stream) = mpsc::channel(2);
        let Self(asked) = self.clone();
        driver.spawn(async move {
            while let Ok(Some(message)) = messages.next().await {
                let (answer, answered) = oneshot::channel();
                // Who is asked ends the stream.
                if asked.send((message, answer)).await.is_err() {
                    break;
                }
                answers.send(answered.await.unwrap()).await.unwrap();
            }
        });
        Ok(stream)
    }
}

/// A server with both kinds of socket.
async fn peer(name: &str) -> (String, String, DropGuard) {
    let name = format!("conclave-test/{name}/{}", std::process::id());
    let mut listener = listen::bind("127.0.0.1:0").unwrap();
    listener.also_at(&name).unwrap();
    let address = listener.local_addr.to_string();
    let (_, health) = health_reporter();
    let routes = Routes::new(Front { handler: Peer, rest: health });
    let stop = CancellationToken::new();
    tokio::spawn(serve(routes, listener, stop.clone(), Duration::ZERO));
    (address, name, stop.drop_guard())
}

async fn opened(socket: Socket, act: &str) -> Result<(super::Outbox, super::Inbox), Status> {
    open(socket, "peer", Peer::PATH, &[("act", act.to_owned())]).await
}

fn body(number: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + number) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_all_sizes_come_back_in_order_over_both_sockets() {
    let (address, name, _stop) = peer("sizes").await;
    for socket in [channel::tcp(&address).await.unwrap(), channel::local(&name).await.unwrap()] {
        let (outbox, mut inbox) = opened(socket, "").await.unwrap();
        // Beyond one frame, beyond the send buffer, and the largest there is.
        let sizes = [0, 1, 4091, 300_000, 5 << 20, 20 << 20, MAX_INTERNAL_MESSAGE, 7];
        let sending = tokio::spawn(async move {
            for (number, size) in sizes.into_iter().enumerate() {
                outbox.send(framed(&body(number, size))).await.unwrap();
            }
            outbox
        });
        for (number, size) in sizes.into_iter().enumerate() {
            assert!(inbox.next().await.unwrap().unwrap() == body(number, size), "message {number} of {size} bytes");
        }
        drop(sending.await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_looks_and_who_waits_find_each_message_once_between_them() {
    const MESSAGES: u32 = 2_000;
    let (address, _, _stop) = peer("lookout").await;
    let (outbox, mut inbox) = opened(channel::tcp(&address).await.unwrap(), "").await.unwrap();
    let lookout = outbox.look_out().unwrap();
    let (found, mut all) = mpsc::channel(16);
    let waiting = found.clone();
    tokio::spawn(async move {
        while let Ok(Some(message)) = inbox.next().await {
            waiting.send(message).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let message = lookout.next().await;
            found.send(message).await.unwrap();
        }
    });
    let sending = tokio::spawn(async move {
        for number in 0..MESSAGES {
            // Now and then one that comes in pieces.
            let mut body = vec![7; if number % 50 == 0 { 300_000 } else { 40 }];
            body.extend(number.to_le_bytes());
            outbox.send(framed(&body)).await.unwrap();
        }
        outbox
    });
    let mut numbers = Vec::new();
    while numbers.len() < MESSAGES as usize {
        let message = all.recv().await.unwrap();
        numbers.push(u32::from_le_bytes(message.last_chunk().copied().unwrap()));
    }
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..MESSAGES));
    drop(sending.await.unwrap());
}

#[tokio::test]
async fn who_looks_alone_finds_what_the_others_thread_was_not_told_of() {
    let (address, _, _stop) = peer("alone").await;
    // The connection's own runtime does nothing once the stream is open.
    let opening = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stream = runtime.block_on(async { opened(channel::tcp(&address).await.unwrap(), "").await.unwrap() });
        (runtime, stream)
    };
    let (asleep, (outbox, inbox)) = tokio::task::spawn_blocking(opening).await.unwrap();
    let lookout = outbox.look_out().unwrap();
    for body in [&b"one"[..], b"two"] {
        outbox.send(framed(body)).await.unwrap();
        assert_eq!(lookout.next().await, body);
    }
    drop(inbox);
    asleep.shutdown_background();
}

#[tokio::test]
async fn an_answer_leaves_on_the_thread_that_has_it_though_its_runtime_sleeps() {
    const MESSAGES: usize = 3;
    let (listening, address) = oneshot::channel();
    let (received, is_received) = std::sync::mpsc::channel::<()>();
    let answering = move || {
        let serves = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (asking, mut asked) = mpsc::channel(1);
        let listener = serves.block_on(async { listen::bind("127.0.0.1:0").unwrap() });
        listening.send(listener.local_addr.to_string()).unwrap();
        let (_, health) = health_reporter();
        let routes = Routes::new(Front { handler: Asking(asking), rest: health });
        serves.spawn(serve(routes, listener, CancellationToken::new(), Duration::ZERO));
        for _ in 0..MESSAGES {
            // The runtime is awake until the message is here, and not again before its answer has arrived.
            let (message, answer) = serves.block_on(asked.recv()).unwrap();
            driven_here(|| answer.send(framed(&message)).unwrap());
            is_received.recv().unwrap();
        }
    };
    let answering = thread::spawn(answering);
    let (outbox, mut inbox) = opened(channel::tcp(&address.await.unwrap()).await.unwrap(), "").await.unwrap();
    for number in 0..MESSAGES {
        outbox.send(framed(&body(number, 4096))).await.unwrap();
        let answer = timeout(PATIENCE, inbox.next()).await.expect("nobody waits for the runtime");
        assert_eq!(answer.unwrap().unwrap(), body(number, 4096));
        received.send(()).unwrap();
    }
    answering.join().unwrap();
}

#[tokio::test]
async fn who_serves_and_is_told_to_stop_answers_what_is_under_way_and_ends() {
    let listener = listen::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr.to_string();
    let (asking, mut asked) = mpsc::channel(1);
    let (_, health) = health_reporter();
    let routes = Routes::new(Front { handler: Asking(asking), rest: health });
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve(routes, listener, stop.clone(), Duration::from_secs(3600)));
    let idle = opened(channel::tcp(&address).await.unwrap(), "").await.unwrap();
    let (outbox, mut inbox) = opened(channel::tcp(&address).await.unwrap(), "").await.unwrap();
    outbox.send(framed(b"asked before")).await.unwrap();
    let (message, answer) = asked.recv().await.unwrap();
    stop.cancel();
    // The port is closed at once, and what had come is answered all the same.
    while channel::tcp(&address).await.is_ok() {}
    answer.send(framed(&message)).unwrap();
    assert_eq!(inbox.next().await.unwrap().unwrap(), &b"asked before"[..]);
    assert!(!serving.is_finished(), "streams may go on until they end");
    // Whoever answers ends them, and nobody here hangs up.
    drop(asked);
    let mut idle = idle;
    for (inbox, outbox) in [(&mut inbox, &outbox), (&mut idle.1, &idle.0)] {
        // One that waits for a message hears only then that nobody is there for it.
        let _ = outbox.send(framed(b"too late")).await;
        assert!(!matches!(timeout(PATIENCE, inbox.next()).await.unwrap(), Ok(Some(_))));
    }
    timeout(PATIENCE, serving).await.expect("nothing is open any more").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_while_who_looks_out_is_busy_is_read_all_the_same() {
    let (address, name, _stop) = peer("busy").await;
    for socket in [channel::tcp(&address).await.unwrap(), channel::local(&name).await.unwrap()] {
        let (outbox, mut inbox) = opened(socket, "").await.unwrap();
        let lookout = outbox.look_out().unwrap();
        let mut looking = Box::pin(lookout.next());
        assert!(futures::poll!(&mut looking).is_pending());
        // From here on nobody asks it whether it has found anything. The last does not go out at once, either.
        for size in [3, 4, 5 << 20] {
            outbox.send(framed(&body(size, size))).await.unwrap();
            assert!(inbox.next().await.unwrap().unwrap() == body(size, size), "{size} bytes");
        }
        drop(looking);
    }
}

#[tokio::test]
async fn who_looks_when_the_other_end_goes_away_waits_and_does_nothing_else() {
    let (address, _, stop) = peer("gone").await;
    let (outbox, mut inbox) = opened(channel::tcp(&address).await.unwrap(), "end").await.unwrap();
    let lookout = outbox.look_out().unwrap();
    outbox.send(framed(b"last words")).await.unwrap();
    drop(stop);
    // Both on this very thread: a look that never let go of it would be the end of the other.
    tokio::select! {
        message = lookout.next() => panic!("{message:?} from nobody"),
        ended = async { while inbox.next().await.is_ok_and(|message| message.is_some()) {} } => ended,
    }
    drop(inbox);
    let more = timeout(Duration::from_millis(50), lookout.next()).await;
    assert!(more.is_err(), "there is nothing more to find");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_senders_share_a_stream_and_no_message_is_torn() {
    let (address, _, _stop) = peer("senders").await;
    let (outbox, mut inbox) = opened(channel::tcp(&address).await.unwrap(), "").await.unwrap();
    for sender in 0..8u8 {
        let outbox = outbox.clone();
        tokio::spawn(async move {
            for _ in 0..50 {
                outbox.send(framed(&vec![sender; 40_000 + usize::from(sender)])).await.unwrap();
            }
        });
    }
    let mut counts = [0; 8];
    for _ in 0..8 * 50 {
        let message = inbox.next().await.unwrap().unwrap();
        let sender = message[0];
        assert!(message.len() == 40_000 + usize::from(sender) && message.iter().all(|byte| *byte == sender));
        counts[usize::from(sender)] += 1;
    }
    assert_eq!(counts, [50; 8]);
}

#[tokio::test]
async fn a_refusal_says_why_and_an_end_is_an_end() {
    let (address, name, _stop) = peer("refusal").await;
    let refusal = opened(channel::tcp(&address).await.unwrap(), "refuse").await.map(|_| ()).unwrap_err();
    assert_eq!((refusal.code(), refusal.message()), (tonic::Code::FailedPrecondition, "not you"));

    let (outbox, mut inbox) = opened(channel::local(&name).await.unwrap(), "end").await.unwrap();
    outbox.send(framed(b"last words")).await.unwrap();
    assert_eq!(inbox.next().await.unwrap(), None);
    drop(inbox);
    outbox.send(framed(b"too late")).await.unwrap_err();
    channel::local("conclave-test/nobody").await.map(|_| ()).unwrap_err();
}

#[tokio::test]
async fn who_is_not_read_waits_and_is_told_of_the_end() {
    let (address, _, _stop) = peer("backpressure").await;
    let (outbox, inbox) = opened(channel::tcp(&address).await.unwrap(), "sleep").await.unwrap();
    let large = framed(&vec![0; MAX_INTERNAL_MESSAGE - HEADER]);
    let sending = tokio::spawn(async move {
        for _ in 0..8 {
            outbox.send(large.clone()).await?;
        }
        Ok::<_, super::Closed>(())
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!sending.is_finished(), "what waits is bounded");
    drop(inbox);
    sending.await.unwrap().unwrap_err();
}
