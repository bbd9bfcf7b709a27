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
    stream::{self, Answer, Progress, Responses},
    tokenize,
    validate::{self, Accepted},
};

impl Service {
    pub(super) async fn begin(&self, request: Request<pb::GenerateRequest>) -> Result<Responses, Failure> {
        let arrived = Instant::now();
        self.refuse_while_draining()?;
        let deadline = deadline::of_call(request.metadata(), self.limits.request_timeout, arrived)?;
        let request = request.into_inner();
        let (request, text, prompt_text, resumed_stop) = self
            .on_text_thread(deadline, move |model, bounds| {
                let encode = |input| match input {
                    Input::Tokens(tokens) => Ok(tokens.ids),
                    Input::Prompt(text) => tokenize::prompt(model, bounds, "prompt", &text),
                    Input::Chat(chat) => tokenize::chat(model, bounds, chat),
                };
                let Accepted { request, stop_strings } = validate::accept(request, bounds, deadline, encode)?;
                let tokenizer = model.tokenizer.as_ref();
                let mut text = AnswerText::new(tokenizer, &request.prompt, stop_strings);
                let resumed_stop = text.resume(&request.resumed)?;
                let prompt_text = match request.logprobs.prompt {
                    true => answer_text::of_prompt(tokenizer, &request.prompt)?,
                    false => Vec::new(),
                };
                Ok((request, text, prompt_text, resumed_stop))
            })
            .await?;
        let answer = Answer {
            request_id: request.request_id.clone(),
            prompt_tokens: request.prompt.len(),
            seed: request.sampling.seed,
            logprobs: request.logprobs,
            text,
            prompt_text,
            arrived,
            progress: Progress::default(),
        };
        if resumed_stop.is_some() || request.resumed.len() == request.stop.max_tokens {
            return answer.already_complete(resumed_stop);
        }
        let events = tokio::time::timeout_at(deadline.into(), self.scheduler.submit(request))
            .await
            .map_err(|_| deadline::passed(self.scheduler.waiting_for()))??;
        let scheduler = self.scheduler.clone();
        Ok(stream::open(answer, events, deadline, move || scheduler.waiting_for()))
    }
}
