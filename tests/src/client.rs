//! A client of one router, as short as the stories need it.
//!
//! In: token ids, or a whole `GenerateRequest`. Out: an [`Answer`], or several, or the status that a refused request got.
//! Never here: retries, or a wait without an end.

use std::time::Duration;

use conclave_proto::inference::v1::{
    Finished, GenerateRequest, GenerateResponse, GetModelRequest, GetModelResponse, LogprobParams, SamplingParams,
    Started, StopParams, Token, TokenIds, generate_request::Input, generate_response::Event,
    inference_client::InferenceClient,
};
use tonic::{Request, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

use crate::eventually::{PATIENCE, soon};

/// A connection to one router's public port.
#[derive(Clone, Debug)]
pub struct Client {
    inference: InferenceClient<Channel>,
}

/// A whole answer; with n > 1, one of them.
#[derive(Clone, Debug)]
pub struct Answer {
    /// How the router took the request.
    pub started: Started,
    /// As they came.
    pub tokens: Vec<Token>,
    /// How it ended.
    pub finished: Finished,
}

impl Answer {
    /// The tokens' ids.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// The text, held-back text included.
    pub fn text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).chain([self.finished.trailing_text.as_str()]).collect()
    }
}

/// `count` greedy tokens after `prompt`, wherever the model would end.
pub fn greedy(prompt: &[u32], count: u32) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::Tokens(TokenIds { ids: prompt.to_vec() })),
        sampling: Some(SamplingParams { temperature: Some(0.0), ..SamplingParams::default() }),
        stop: Some(StopParams { max_tokens: Some(count), ignore_eos: true, ..StopParams::default() }),
        ..GenerateRequest::default()
    }
}

/// `count` tokens drawn at temperature 1 after `prompt`, with `seed`.
pub fn sampled(prompt: &[u32], count: u32, seed: u64) -> GenerateRequest {
    let sampling = SamplingParams { temperature: Some(1.0), seed: Some(seed), ..SamplingParams::default() };
    GenerateRequest { sampling: Some(sampling), ..greedy(prompt, count) }
}

/// `request`, with every logprob there is.
pub fn with_logprobs(request: GenerateRequest, top: u32) -> GenerateRequest {
    GenerateRequest { logprobs: Some(LogprobParams { sampled: true, top, prompt: true }), ..request }
}

impl Client {
    /// Connects to `address` (host:port).
    pub async fn connect(address: &str) -> Self {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("a host and a port");
        let channel = channel.tcp_nodelay(true).connect_timeout(PATIENCE).connect().await;
        let channel = channel.unwrap_or_else(|error| panic!("cannot connect to the router at {address}: {error}"));
        Self { inference: InferenceClient::new(channel).max_decoding_message_size(64 << 20) }
    }

    /// The generated client, for calls that the stories make once.
    pub fn raw(&self) -> InferenceClient<Channel> {
        self.inference.clone()
    }

    /// What is served.
    pub async fn model(&self) -> GetModelResponse {
        let mut inference = self.inference.clone();
        soon("GetModel", inference.get_model(GetModelRequest {})).await.expect("GetModel answers").into_inner()
    }

    /// Sends `request` and returns its stream once it has begun, or why it was refused.
    pub async fn begin(&self, request: GenerateRequest, deadline: Duration) -> Result<Answering, Status> {
        let n = request.n.unwrap_or(1);
        let mut request = Request::new(request);
        request.set_timeout(deadline);
        let mut inference = self.inference.clone();
        let stream = soon("a stream to begin", inference.generate(request)).await?.into_inner();
        Ok(Answering { stream, started: None, answers: vec![Part::default(); n.max(1) as usize] })
    }

    /// The whole answer to `request`, or why there is none.
    pub async fn ask(&self, request: GenerateRequest, deadline: Duration) -> Result<Answer, Status> {
        self.begin(request, deadline).await?.rest().await
    }

    /// The whole answer to `request`, which must be one.
    pub async fn answer(&self, request: GenerateRequest) -> Answer {
        self.ask(request, PATIENCE).await.unwrap_or_else(|status| panic!("no answer: {}", explain(&status)))
    }

    /// Every answer to `request`, by index.
    pub async fn answers(&self, request: GenerateRequest) -> Vec<Answer> {
        let answers = async { self.begin(request, PATIENCE).await?.all().await };
        answers.await.unwrap_or_else(|status| panic!("no answers: {}", explain(&status)))
    }

    /// `count` greedy tokens after `prompt`.
    pub async fn generate(&self, prompt: &[u32], count: u32) -> Answer {
        self.answer(greedy(prompt, count)).await
    }
}

/// One answer or several on their way.
#[derive(Debug)]
pub struct Answering {
    stream: Streaming<GenerateResponse>,
    started: Option<Started>,
    answers: Vec<Part>,
}

/// What has come of one answer so far.
#[derive(Clone, Debug, Default)]
struct Part {
    tokens: Vec<Token>,
    finished: Option<Finished>,
}

impl Answering {
    /// Reads until at least `count` tokens of the first answer have come in all.
    pub async fn tokens(&mut self, count: usize) -> Result<&[Token], Status> {
        while self.answers[0].tokens.len() < count {
            assert!(self.step().await?, "the stream ended after {} of {count} tokens", self.answers[0].tokens.len());
        }
        Ok(&self.answers[0].tokens)
    }

    /// Reads to the end of the one answer that was asked for.
    pub async fn rest(self) -> Result<Answer, Status> {
        let mut answers = self.all().await?;
        assert_eq!(answers.len(), 1, "one answer was asked for");
        Ok(answers.remove(0))
    }

    /// Reads to the end of every answer.
    pub async fn all(mut self) -> Result<Vec<Answer>, Status> {
        while self.step().await? {}
        let started = self.started.expect("a stream without an error opens with Started");
        let whole = |part: Part| Answer {
            started: started.clone(),
            tokens: part.tokens,
            finished: part.finished.expect("a stream without an error has a Finished for each answer"),
        };
        Ok(self.answers.into_iter().map(whole).collect())
    }

    /// Reads one message; false at the end of the stream. Checks the order that the contract promises.
    async fn step(&mut self) -> Result<bool, Status> {
        let Some(response) = soon("the next message of an answer", self.stream.message()).await? else {
            return Ok(false);
        };
        assert!(self.answers.iter().any(|part| part.finished.is_none()), "nothing comes after the last Finished");
        match response.event.expect("every message carries an event") {
            Event::Started(started) => {
                assert!(self.started.is_none(), "Started comes once");
                self.started = Some(started);
            }
            Event::Tokens(tokens) => self.open(tokens.index).tokens.extend(tokens.tokens),
            Event::Finished(finished) => {
                let part = self.open(finished.index);
                part.finished = Some(finished);
            }
        }
        Ok(true)
    }

    /// The answer that a message is about.
    fn open(&mut self, index: u32) -> &mut Part {
        assert!(self.started.is_some(), "Started comes first");
        let part = self.answers.get_mut(index as usize).expect("no more answers than were asked for");
        assert!(part.finished.is_none(), "nothing of an answer comes after its Finished");
        part
    }
}

/// A status with its details, for a person.
pub fn explain(status: &Status) -> String {
    format!("{:?}: {} ({:?})", status.code(), status.message(), status.get_error_details())
}
