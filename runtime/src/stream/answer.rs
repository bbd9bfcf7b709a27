//! The other end of a stream: a request's body comes in and is read as messages, answers go out as the response's body.
//! What the one path means that is answered so is not known here; all others are tonic's.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as _, Frame};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;

use super::assembly::Assembly;
use super::driver::Driver;

/// Answers one method's streams.
pub trait Handler: Clone + Send + Sync + 'static {
    /// "/package.Service/Method".
    const PATH: &'static str;

    /// Accepts a stream, whose answers go out as they come, header and all, or refuses it. What is to be done for it is
    /// `driver`'s.
    fn accept(&self, metadata: &HeaderMap, messages: Inbound, driver: &Driver)
    -> Result<mpsc::Receiver<Bytes>, Status>;
}

/// A tonic service of which one method is answered by a [`Handler`].
#[derive(Clone, Debug)]
pub struct Front<H, S> {
    pub handler: H,
    pub rest: S,
}

impl<H, S: NamedService> NamedService for Front<H, S> {
    const NAME: &'static str = S::NAME;
}

impl<H, S> Service<Request<Body>> for Front<H, S>
where
    H: Handler,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.rest.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path() != H::PATH {
            return Box::pin(self.rest.call(request));
        }
        let (parts, body) = request.into_parts();
        let accepted = match parts.extensions.get::<Driver>() {
            Some(driver) => self.handler.accept(&parts.headers, Inbound::new(body), driver),
            None => Err(Status::internal("streams are not served by this listener")),
        };
        let response = accepted.map_or_else(Status::into_http, respond);
        Box::pin(std::future::ready(Ok(response)))
    }
}

/// Messages of one request.
#[derive(Debug)]
pub struct Inbound {
    body: Body,
    assembly: Assembly,
}

impl Inbound {
    pub fn new(body: Body) -> Self {
        Self { body, assembly: Assembly::default() }
    }

    /// The next message; `None` where the caller has ended the stream in order. May be dropped half-way.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if let Some(message) = self.assembly.next()? {
                return Ok(Some(message));
            }
            match std::future::poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await {
                // Trailers of a request say nothing.
                Some(Ok(frame)) => self.assembly.push(frame.into_data().unwrap_or_default()),
                Some(Err(status)) => return Err(status),
                None if self.assembly.is_empty() => return Ok(None),
                None => return Err(Status::internal("the stream ended within a message")),
            }
        }
    }
}

/// A response whose messages are `answers`, header and all; it ends in order when they do.
fn respond(answers: mpsc::Receiver<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::new(Answers { answers, ended: false }));
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
    response
}

struct Answers {
    answers: mpsc::Receiver<Bytes>,
    ended: bool,
}

impl http_body::Body for Answers {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.answers.poll_recv(cx).map(|answer| {
            Some(Ok(answer.map(Frame::data).unwrap_or_else(|| {
                self.ended = true;
                let ok = (http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
                Frame::trailers(HeaderMap::from_iter([ok]))
            })))
        })
    }
}
