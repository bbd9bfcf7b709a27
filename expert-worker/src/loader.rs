//! The loader: the names of experts come in, their weights are mapped from the checkpoint and handed to the tensor
//! thread, or taken from it. It runs on a thread of its own, so loading never delays a batch. It chooses nothing: see
//! `reconcile`.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use conclave_model::checkpoint::{self, Checkpoint};
use conclave_model::device::{Compute, init_thread};
use conclave_model::expert::Expert;
use conclave_placement::ids::{ExpertId, LayerIdx};
use conclave_runtime::tensor_thread::{self, SpawnError, TensorThread};

use crate::executor::Executor;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error("loader thread: {0}")]
    Thread(#[from] tensor_thread::Error),
}

/// Where weights come from and go to. The worker's own is [`Loader`]; a simulation has one without tensors.
pub trait Weights: Send + Sync + 'static {
    /// Makes an expert ready to be computed with.
    fn bring(&self, layer: LayerIdx, id: ExpertId) -> impl Future<Output = Result<(), Error>> + Send;

    /// Drops an expert. Batches that still wait for it are refused.
    fn drop_expert(&self, layer: LayerIdx, id: ExpertId) -> impl Future<Output = Result<(), Error>> + Send;

    /// Batches computed so far: while this grows, somebody waits for this worker.
    fn batches(&self) -> u64;

    /// Measures how many rows a second go through one expert that is here.
    fn measure(&self, layer: LayerIdx, id: ExpertId) -> impl Future<Output = Result<f64, Error>> + Send;

    /// Ends what reads weights. Experts that are here stay.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The thread that reads weights, and the executor they go to.
#[derive(Debug)]
pub struct Loader {
    thread: TensorThread<Arc<Checkpoint>>,
    executor: Arc<Executor>,
    compute: Compute,
}

impl Loader {
    pub async fn start(
        checkpoint: Arc<Checkpoint>,
        compute: Compute,
        executor: Arc<Executor>,
    ) -> Result<Self, SpawnError<Infallible>> {
        let init = move || {
            init_thread(1);
            Ok(checkpoint)
        };
        Ok(Self { thread: TensorThread::spawn("loader", 1, init).await?, executor, compute })
    }
}

impl Weights for Loader {
    async fn bring(&self, layer: LayerIdx, id: ExpertId) -> Result<(), Error> {
        let compute = self.compute;
        let load = move |checkpoint: &mut Arc<Checkpoint>| Expert::load(checkpoint, layer.0, id.0.into(), compute);
        let expert = self.thread.run(load).await??;
        Ok(self.executor.install(layer, id, expert).await?)
    }

    async fn drop_expert(&self, layer: LayerIdx, id: ExpertId) -> Result<(), Error> {
        Ok(self.executor.remove(layer, id).await?)
    }

    fn batches(&self) -> u64 {
        self.executor.batches()
    }

    async fn measure(&self, layer: LayerIdx, id: ExpertId) -> Result<f64, Error> {
        Ok(self.executor.measure(layer, id).await?)
    }

    async fn close(self) {
        self.thread.close().await;
    }
}

/// Opens a checkpoint and digests it, off the threads that serve: its headers are read and checked whole.
pub async fn open(dir: &Path) -> Result<(Arc<Checkpoint>, checkpoint::Identity), Error> {
    let dir = dir.to_owned();
    let open = move || -> Result<_, checkpoint::Error> {
        let checkpoint = Checkpoint::open(&dir)?;
        let identity = checkpoint.identity()?;
        Ok((Arc::new(checkpoint), identity))
    };
    let opened = tokio::task::spawn_blocking(open).await;
    Ok(opened.map_err(|error| tensor_thread::Error::Panicked(error.to_string()))??)
}
