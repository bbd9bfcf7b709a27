//! Which way a worker is reached, and by which it is not.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use conclave_placement::state::LocalSocket;
use conclave_proto::expert::EXCHANGE_PATH;
use conclave_runtime::{
    listen,
    stream::{self, Driver, Front, Handler, Inbound},
};
use http::{HeaderMap, Request, Response};
use tokio::time::timeout;
use tonic::{
    Status,
    body::Body,
    codegen::{Context, Poll, Service},
    server::NamedService,
    service::Routes,
};

use super::*;

/// Accepts streams, answers nothing, and tells the name of each stream's listener.
#[derive(Clone)]
struct Accepting {
    name: &'static str,
    accepted: mpsc::Sender<&'static str>,
    refuses: bool,
}

impl Handler for Accepting {
    const PATH: &'static str = EXCHANGE_PATH;

    fn accept(
        &self,
        _metadata: &HeaderMap,
        _messages: Inbound,
        driver: &Driver,
    ) -> Result<mpsc::Receiver<Bytes>, Status> {
        if self.refuses {
            return Err(Status::failed_precondition("another worker"));
        }
        let (answers, stream) = mpsc::channel(1);
        let held = self.clone();
        driver.spawn(async move {
            let _ = held.accepted.send(held.name).await;
            answers.closed().await;
        });
        Ok(stream)
    }
}

/// The methods that are not called here.
#[derive(Clone)]
struct Nothing;

impl NamedService for Nothing {
    const NAME: &'static str = "conclave.expert.v1.ExpertWorker";
}

impl Service<Request<Body>> for Nothing {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _request: Request<Body>) -> Self::Future {
        std::future::ready(Ok(Status::unimplemented("nothing").into_http()))
    }
}

/// Serves at a port of its own, and at `local` where it is named; returns the port's address.
fn serve(handler: Accepting, local: Option<&str>, stop: &CancellationToken) -> String {
    let mut listener = listen::bind("127.0.0.1:0").unwrap();
    if let Some(local) = local {
        listener.also_at(local).unwrap();
    }
    let address = listener.local_addr.to_string();
    let routes = Routes::new(Front { handler, rest: Nothing });
    tokio::spawn(stream::serve(routes, listener, stop.clone(), Duration::ZERO));
    address
}

#[tokio::test]
async fn a_worker_of_this_host_is_reached_by_its_socket_and_by_its_address_where_that_fails() {
    let stop = CancellationToken::new();
    let (accepted, mut streams) = mpsc::channel(4);
    let accepting = |name, refuses| Accepting { name, accepted: accepted.clone(), refuses };
    let name = |kind: &str| format!("conclave-test/{kind}/{}", std::process::id());
    let network = serve(accepting("network", false), None, &stop);
    serve(accepting("socket", false), Some(&name("socket")), &stop);
    serve(accepting("another", true), Some(&name("another")), &stop);

    let here = listen::boot_id().unwrap();
    let elsewhere = "00000000-0000-0000-0000-000000000000".to_owned();
    let cases = [
        (Some((here.clone(), name("socket"))), "socket"),
        (None, "network"),
        (Some((elsewhere, name("socket"))), "network"),
        // In another network namespace, or gone.
        (Some((here.clone(), name("nobody"))), "network"),
        // Somebody else's by now.
        (Some((here, name("another"))), "network"),
    ];
    for (local, expected) in cases {
        let worker = WorkerRecord {
            local: local.map(|(boot_id, name)| LocalSocket { boot_id, name }),
            state: WorkerState::Serving,
            ..WorkerRecord::starting(WorkerId::parse("w").unwrap(), Incarnation::fresh(), network.clone())
        };
        let workers = [(worker.id.clone(), worker.clone())].into();
        let state = ClusterState { workers, ..ClusterState::empty() };
        let (_cluster, watched) = watch::channel(Arc::new(state));
        let end = CancellationToken::new();
        let pool = Workers::start(watched, 4, end.clone()).unwrap();
        let reached = timeout(Duration::from_secs(20), streams.recv()).await.unwrap().unwrap();
        assert_eq!(reached, expected, "{:?}", worker.local);
        pool.watch().wait_for(|snapshot| snapshot.workers.len() == 1).await.unwrap();
        end.cancel();
    }
    stop.cancel();
}
