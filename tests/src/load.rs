//! A steady load: some streams, each asking the same few requests over and over.
//!
//! In: requests, what each is answered undisturbed, and the routers. Out: a [`Record`] of every token and the moment it
//! came. Never here: a panic on what a router does wrong (that is what is recorded), or a request without a deadline.
//! Where there are several routers, a stream that breaks goes on at the next one with `resume_tokens`, as clients should.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use conclave_proto::inference::v1::{GenerateRequest, generate_response::Event, inference_client::InferenceClient};
use futures::future::join_all;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, transport::Channel};

use crate::{
    client::{Client, explain, greedy, sampled},
    eventually::eventually,
    golden::Golden,
    record::{Asked, End, Record},
};

/// Streams that ask at the same time unless told otherwise.
pub const STREAMS: usize = 8;
/// Of each answer: long enough that faults meet answers half-way, short enough that many begin and end meanwhile.
const TOKENS: u32 = 100;
/// How long a request may take in all. A router knows it, and answers by then with what hinders it.
const DEADLINE: Duration = Duration::from_secs(60);
/// What has no end this long after its deadline hangs.
const GRACE: Duration = Duration::from_secs(10);
/// Between a failure and the next try.
const PAUSE: Duration = Duration::from_millis(50);

/// What is asked, of whom, and what must come.
#[derive(Clone, Debug)]
pub struct Work {
    requests: Vec<GenerateRequest>,
    expected: Vec<Vec<u32>>,
    routers: Vec<String>,
    streams: usize,
    deadline: Duration,
    leave_every: Option<usize>,
}

impl Work {
    /// Half greedy, half drawn with a seed, after the golden model's prompts.
    pub async fn usual(golden: &Golden, routers: Vec<String>) -> Self {
        let prompts = golden.cases.iter().map(|case| &case.prompt);
        let both = |(seed, prompt): (u64, &Vec<u32>)| [greedy(prompt, TOKENS), sampled(prompt, TOKENS, seed)];
        let work = Self::of((1..).zip(prompts).flat_map(both).collect(), routers).await;
        for (case, answer) in golden.cases.iter().zip(work.expected.iter().step_by(2)) {
            let shared = case.greedy.len().min(answer.len());
            assert_eq!(answer[..shared], case.greedy[..shared], "undisturbed, and already not what the reference says");
        }
        work
    }

    /// These requests; asks each once, undisturbed, to know what must come.
    pub async fn of(requests: Vec<GenerateRequest>, routers: Vec<String>) -> Self {
        let client = Client::connect(&routers[0]).await;
        let answers = join_all(requests.iter().map(|request| client.answer(request.clone()))).await;
        let expected = answers.iter().map(crate::client::Answer::ids).collect();
        Self { requests, expected, routers, streams: STREAMS, deadline: DEADLINE, leave_every: None }
    }

    /// How many streams at once.
    pub fn streams(self, streams: usize) -> Self {
        Self { streams, ..self }
    }

    /// How long each request may take.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Of each stream, every n-th request is left by its client after some tokens.
    pub fn leave_every(self, n: usize) -> Self {
        Self { leave_every: Some(n), ..self }
    }
}

/// A load that runs. Dropped, its clients are gone at once.
#[derive(Debug)]
pub struct Load {
    begun: Instant,
    tokens: Arc<AtomicU64>,
    stop: CancellationToken,
    streams: JoinSet<Vec<Asked>>,
    work: Arc<Work>,
}

impl Load {
    /// Begins to ask.
    pub fn start(work: Work) -> Self {
        let (work, tokens, stop) = (Arc::new(work), Arc::new(AtomicU64::new(0)), CancellationToken::new());
        let mut streams = JoinSet::new();
        for index in 0..work.streams {
            let stream = Stream::new(work.clone(), tokens.clone(), index);
            streams.spawn(stream.run(stop.clone()));
        }
        Self { begun: Instant::now(), tokens, stop, streams, work }
    }

    /// Tokens that came so far.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Relaxed)
    }

    /// Waits until so many more tokens have come.
    pub async fn flows(&self, more: u64) {
        let enough = self.tokens() + more;
        eventually("tokens to flow", async || (self.tokens() >= enough).then_some(())).await;
    }

    /// Begins no further request, awaits the end of those under way, and tells what came.
    pub async fn stop(mut self) -> Record {
        self.stop.cancel();
        let mut asked = Vec::new();
        while let Some(stream) = self.streams.join_next().await {
            asked.extend(stream.expect("a stream records failures and has none of its own"));
        }
        Record { begun: self.begun, ended: Instant::now(), expected: self.work.expected.clone(), asked }
    }
}

/// One client that asks again and again.
struct Stream {
    work: Arc<Work>,
    tokens: Arc<AtomicU64>,
    routers: Vec<InferenceClient<Channel>>,
    /// The router it speaks to.
    router: usize,
    /// Requests so far, begun at another one in each stream.
    asked: usize,
}

/// Why an attempt ended before its answer.
enum Break {
    Failed(Status),
    Silent,
    Left,
}

impl Stream {
    fn new(work: Arc<Work>, tokens: Arc<AtomicU64>, index: usize) -> Self {
        let client = |address: &String| {
            let endpoint = Channel::from_shared(format!("http://{address}")).expect("a host and a port");
            InferenceClient::new(endpoint.tcp_nodelay(true).connect_timeout(Duration::from_secs(2)).connect_lazy())
        };
        let routers: Vec<_> = work.routers.iter().map(client).collect();
        Self { router: index % routers.len(), routers, work, tokens, asked: index }
    }

    async fn run(mut self, stop: CancellationToken) -> Vec<Asked> {
        let mut all = Vec::new();
        while !stop.is_cancelled() {
            let asked = self.ask().await;
            if let End::Failed(_) = asked.end {
                // A client that is refused does not ask again at once.
                stop.run_until_cancelled(sleep(PAUSE)).await;
            }
            all.push(asked);
        }
        all
    }

    /// One request to its end, over as many routers as it takes.
    async fn ask(&mut self) -> Asked {
        let request = self.asked % self.work.requests.len();
        let leaves = self.work.leave_every.is_some_and(|n| self.asked % n == n - 1);
        self.asked += 1;
        let deadline = Instant::now() + self.work.deadline;
        let mut asked = Asked { request, begun: Instant::now(), tokens: Vec::new(), resumed: 0, end: End::Finished };
        loop {
            let leave_after = leaves.then_some(self.asked % TOKENS as usize);
            let followed = timeout_at(deadline + GRACE, self.follow(&mut asked, deadline, leave_after)).await;
            match followed.unwrap_or(Err(Break::Silent)) {
                Ok(()) => return asked,
                Err(Break::Left) => asked.end = End::Left,
                Err(Break::Silent) => asked.end = End::Hung,
                Err(Break::Failed(status)) if self.may_go_on(&status) && Instant::now() < deadline => {
                    self.router = (self.router + 1) % self.routers.len();
                    asked.resumed += 1;
                    sleep(PAUSE).await;
                    continue;
                }
                Err(Break::Failed(status)) => asked.end = End::Failed(explain(&status)),
            }
            return asked;
        }
    }

    /// Whether another router may do better: this one is gone, or going.
    fn may_go_on(&self, status: &Status) -> bool {
        let gone = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal);
        gone && self.routers.len() > 1
    }

    /// Asks for what is left of an answer, and notes each token as it comes.
    async fn follow(&self, asked: &mut Asked, deadline: Instant, leave_after: Option<usize>) -> Result<(), Break> {
        let resume_tokens = asked.ids().collect();
        let request = GenerateRequest { resume_tokens, ..self.work.requests[asked.request].clone() };
        let mut request = Request::new(request);
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        let mut router = self.routers[self.router].clone();
        let mut stream = router.generate(request).await.map_err(Break::Failed)?.into_inner();
        loop {
            let message = stream.message().await.map_err(Break::Failed)?;
            let Some(message) = message else {
                return Err(Break::Failed(Status::internal("the stream ended without its last word")));
            };
            match message.event {
                Some(Event::Tokens(tokens)) => {
                    let now = Instant::now();
                    self.tokens.fetch_add(tokens.tokens.len() as u64, Relaxed);
                    asked.tokens.extend(tokens.tokens.iter().map(|token| (token.id, now)));
                }
                Some(Event::Finished(_)) => return Ok(()),
                Some(Event::Started(_)) | None => {}
            }
            if leave_after.is_some_and(|count| asked.tokens.len() >= count) {
                return Err(Break::Left);
            }
        }
    }
}
