//! What clients speak to: `conclave.inference.v1.Inference`.
//!
//! In: gRPC calls. Out: checked requests to the scheduler; streams and answers to clients. Never here: tensors, the
//! placement, a request that waits beyond its deadline; no prost type leaves this folder.

mod answer_text;
mod deadline;
mod generate;
mod grammars;
mod model_info;
mod reply;
mod stop_strings;
mod stream;
mod structured;
#[cfg(test)]
mod test_model;
mod tokenize;
mod validate;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use conclave_model::{
    checkpoint::Identity,
    config::ModelConfig,
    generation::GenerationConfig,
    tokenizer::{ChatTemplate, Tokenizer},
};
use conclave_proto::{
    inference::v1::{
        self as pb,
        inference_server::{Inference, InferenceServer},
    },
    status::Failure,
};
use conclave_runtime::server::{MAX_PUBLIC_REQUEST, MAX_PUBLIC_RESPONSE};
use tokio::{sync::Semaphore, task, time};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::scheduler;
use grammars::Grammars;
use validate::{Bounds, Defaults};

/// While a router drains, another one may be tried at once; this one is back no sooner.
const DRAINING_RETRY: Duration = Duration::from_secs(1);

/// The model that this router serves, as far as clients see it.
#[derive(Debug)]
pub struct ServedModel {
    /// What clients call it.
    pub name: String,
    /// Its architecture.
    pub config: ModelConfig,
    /// What workers must match.
    pub identity: Identity,
    /// Without one, only token ids come in and go out.
    pub tokenizer: Option<Tokenizer>,
    /// Without one, chats are refused.
    pub chat_template: Option<ChatTemplate>,
    /// Sampling defaults and end-of-sequence tokens.
    pub generation: GenerationConfig,
}

/// What a router grants any request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest that an answer may take; what a client gets that names no deadline.
    pub request_timeout: Duration,
    /// Tokens of one sequence, prompt and answer together, that there is memory for.
    pub context_tokens: usize,
    /// Answers to one request that can be computed at once.
    pub answers_max: usize,
}

/// What the service is built from.
#[derive(Debug)]
pub struct ApiState {
    /// Served for as long as the process lives.
    pub model: Arc<ServedModel>,
    /// Where checked requests go.
    pub scheduler: scheduler::Handle,
    /// What any request is granted.
    pub limits: Limits,
    /// Once cancelled, new answers are refused; those under way go on.
    pub draining: CancellationToken,
}

/// The service itself.
#[derive(Debug)]
pub struct Service {
    model: Arc<ServedModel>,
    bounds: Arc<Bounds>,
    scheduler: scheduler::Handle,
    limits: Limits,
    draining: CancellationToken,
    /// Tokenising is computation: as many at a time as there are cores.
    text_slots: Arc<Semaphore>,
    grammars: Arc<Grammars>,
}

impl Service {
    /// The service over this state.
    pub fn new(state: ApiState) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            bounds: Arc::new(Bounds::new(&state.model, state.limits)),
            model: state.model,
            scheduler: state.scheduler,
            limits: state.limits,
            draining: state.draining,
            text_slots: Arc::new(Semaphore::new(cores)),
            grammars: Arc::default(),
        }
    }

    /// Ready to be added to a public server, with the limits of its messages set.
    pub fn into_server(self) -> InferenceServer<Self> {
        InferenceServer::new(self)
            .max_decoding_message_size(MAX_PUBLIC_REQUEST)
            .max_encoding_message_size(MAX_PUBLIC_RESPONSE)
    }

    fn refuse_while_draining(&self) -> Result<(), Failure> {
        if self.draining.is_cancelled() {
            return Err(Failure::unavailable("DRAINING", "this router is shutting down", DRAINING_RETRY));
        }
        Ok(())
    }

    /// Runs `job`, which may tokenise much text, where it holds up no other call. Its panic fails this call alone.
    async fn on_text_thread<R: Send + 'static>(
        &self,
        deadline: Instant,
        job: impl FnOnce(&ServedModel, &Bounds) -> Result<R, Failure> + Send + 'static,
    ) -> Result<R, Failure> {
        let (model, bounds) = (self.model.clone(), self.bounds.clone());
        let slots = self.text_slots.clone();
        let run = async move {
            let slot = slots.acquire_owned().await.map_err(|_| Failure::internal("the tokenizer is closed"))?;
            let job = task::spawn_blocking(move || {
                let _slot = slot;
                job(&model, &bounds)
            });
            job.await.unwrap_or_else(|_| Err(Failure::internal("the tokenizer failed on this request")))
        };
        time::timeout_at(deadline.into(), run).await.unwrap_or_else(|_| Err(deadline::passed(None)))
    }

    /// Answers a call that is nothing but text and token ids.
    async fn text_call<Q: Send + 'static, R: Send + 'static>(
        &self,
        request: Request<Q>,
        job: fn(&ServedModel, &Bounds, Q) -> Result<R, Failure>,
    ) -> Result<Response<R>, Status> {
        let deadline = deadline::of_call(request.metadata(), self.limits.request_timeout, Instant::now())?;
        let request = request.into_inner();
        let answer = self.on_text_thread(deadline, move |model, bounds| job(model, bounds, request)).await?;
        Ok(Response::new(answer))
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = stream::Responses;

    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        Ok(Response::new(self.begin(request).await?))
    }

    async fn tokenize(&self, request: Request<pb::TokenizeRequest>) -> Result<Response<pb::TokenizeResponse>, Status> {
        self.text_call(request, tokenize::tokenize).await
    }

    async fn detokenize(
        &self,
        request: Request<pb::DetokenizeRequest>,
    ) -> Result<Response<pb::DetokenizeResponse>, Status> {
        self.text_call(request, tokenize::detokenize).await
    }

    async fn get_model(&self, _: Request<pb::GetModelRequest>) -> Result<Response<pb::GetModelResponse>, Status> {
        Ok(Response::new(model_info::describe(&self.model, &self.bounds)))
    }
}

impl Bounds {
    fn new(model: &ServedModel, limits: Limits) -> Self {
        let own = &model.generation.eos_token_ids;
        Self {
            name: model.name.clone(),
            context_tokens: model.config.max_position_embeddings.min(limits.context_tokens),
            vocab_size: model.config.vocab_size,
            answers_max: limits.answers_max.clamp(1, validate::ANSWERS_MAX),
            has_tokenizer: model.tokenizer.is_some(),
            // The generation config speaks of answers, the config of the model in general.
            eos_token_ids: if own.is_empty() { model.config.eos_token_ids.clone() } else { own.clone() },
            defaults: Defaults::new(&model.generation),
        }
    }
}

#[cfg(test)]
mod tests;
