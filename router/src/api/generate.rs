//! The `Generate` call, from its first byte to the task that carries the answer.
//!
//! In: a `GenerateRequest` and its metadata. Out: the stream of responses, or the failure that no stream was begun for.
//! Never here: what a field may hold (`validate`), what the engine tells (`stream`).

use std::time::Instant;

use conclave_proto::{
    inference::v1::{self as pb, generate_request::Input},
    status::Failure,
};
use tonic::Request;

use super::{
    Service,
    answer_text::{self, AnswerText},
    deadline,
    reply::{Answer, Prefill, Reply},
    stream::{self, Patience, Responses},
    structured, tokenize,
    validate::{self, Accepted},
};

impl Service {
    pub(super) async fn begin(&self, request: Request<pb::GenerateRequest>) -> Result<Responses, Failure> {
        let arrived = Instant::now();
        self.refuse_while_draining()?;
        let deadline = deadline::of_call(request.metadata(), self.limits.request_timeout, arrived)?;
        let mut request = request.into_inner();
        let (structured, grammars) = (request.structured.take(), self.grammars.clone());
        let (request, answers, prompt_text, resumed_stop) = self
            .on_text_thread(deadline, move |model, bounds| {
                let encode = |input| match input {
                    Input::Tokens(tokens) => Ok(tokens.ids),
                    Input::Prompt(text) => tokenize::prompt(model, bounds, "prompt", &text),
                    Input::Chat(chat) => tokenize::chat(model, bounds, chat),
                };
                let Accepted { mut request, stop_strings } = validate::accept(request, bounds, deadline, encode)?;
                request.constraint = structured::constraint(structured, model, &grammars, &request.resumed)?;
                let tokenizer = model.tokenizer.as_ref();
                let mut texts: Vec<_> = (0..request.answers)
                    .map(|_| AnswerText::new(tokenizer, &request.prompt, stop_strings.clone()))
                    .collect();
                // Resumed tokens are those of a single answer.
                let resumed_stop = texts[0].resume(&request.resumed)?;
                let prompt_text = match request.logprobs.prompt {
                    true => answer_text::of_prompt(tokenizer, &request.prompt)?,
                    false => Vec::new(),
                };
                let answers: Vec<_> = texts.into_iter().map(Answer::new).collect();
                Ok((request, answers, prompt_text, resumed_stop))
            })
            .await?;
        let reply = Reply {
            request_id: request.request_id.clone(),
            prompt_tokens: request.prompt.len(),
            seed: request.sampling.seed,
            logprobs: request.logprobs,
            answers,
            prompt_text,
            arrived,
            prefill: Prefill::default(),
        };
        if resumed_stop.is_some() || request.resumed.len() == request.stop.max_tokens {
            return Ok(stream::of(reply.already_complete(resumed_stop)?));
        }
        let answers = self.scheduler.submit(request)?;
        let scheduler = self.scheduler.clone();
        let patience = Patience { deadline, reader: stream::SLOW_READER };
        Ok(stream::open(reply, answers, patience, move || scheduler.waiting_for()))
    }
}
