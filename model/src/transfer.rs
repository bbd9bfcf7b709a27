//! Values on their way to a GPU and back.
//!
//! In: tensors on one side. Out: the same on the other. Never here: a wait on the way out, unless a copy failed; on the way back
//! there is one, for everything that comes back at once.
//!
//! A GPU reads and writes memory that stays in its place by itself, while the processor goes on. libtorch has a pool of such
//! memory and keeps each piece until the GPU is through with it. What is large goes beside what the GPU computes
//! ([`gpu::copies`](crate::gpu::copies)).

use tch::{Device, Tensor, kind::Element};

use crate::gpu::{
    self,
    copies::{Copies, Event, here, pinned, there},
};

/// `values` `[n]` on `device`.
pub(crate) fn placed<T: Element>(values: &[T], device: Device) -> Tensor {
    sent(Tensor::from_slice(values), device)
}

/// `tensor`, which is on the processor, on `device`.
pub(crate) fn sent(tensor: Tensor, device: Device) -> Tensor {
    let Device::Cuda(gpu) = device else { return tensor };
    let sent = beside(gpu, |copies| copies.send(&tensor));
    sent.unwrap_or_else(|| there(&pinned(&tensor, device), device))
}

/// Contiguous `tensors`, which are all in one place, on the processor. Here a GPU is waited for, until it has computed them.
pub(crate) fn fetched<const N: usize>(tensors: [Tensor; N]) -> [Tensor; N] {
    leaving(tensors).wait()
}

/// As [`fetched`], but it is not waited for so far.
pub(crate) fn leaving<const N: usize>(tensors: [Tensor; N]) -> Leaving<N> {
    let Some(Device::Cuda(gpu)) = tensors.first().map(Tensor::device) else {
        return Leaving { here: tensors, on_gpu: None };
    };
    let (copies, arrived) = match beside(gpu, |copies| copies.fetch(&tensors)) {
        Some((copies, arrived)) => (copies, Some(arrived)),
        None => (tensors.each_ref().map(here), None),
    };
    Leaving { here: copies, on_gpu: Some(OnGpu { gpu, arrived, _read: Vec::from(tensors) }) }
}

/// Tensors that a GPU computes and copies to the processor.
#[derive(Debug)]
pub(crate) struct Leaving<const N: usize> {
    /// Not to be read before they have arrived.
    here: [Tensor; N],
    /// `None` where there is nothing to wait for.
    on_gpu: Option<OnGpu>,
}

#[derive(Debug)]
struct OnGpu {
    gpu: usize,
    /// `None` where all that the GPU does has to be waited for.
    arrived: Option<Event>,
    /// What is copied must not be given to anybody else meanwhile.
    _read: Vec<Tensor>,
}

impl<const N: usize> Leaving<N> {
    /// Whether they are here, so that [`wait`](Self::wait) does not. `true` also where only waiting would tell.
    pub(crate) fn have_arrived(&self) -> bool {
        let arrived = self.on_gpu.as_ref().and_then(|on_gpu| on_gpu.arrived.as_ref());
        arrived.is_none_or(|arrived| arrived.has_come().unwrap_or(true))
    }

    /// The tensors, here.
    pub(crate) fn wait(self) -> [Tensor; N] {
        if let Some(OnGpu { gpu, arrived, .. }) = &self.on_gpu
            && arrived.as_ref().is_none_or(|arrived| arrived.wait().is_err())
        {
            // A GPU that has failed says so here, in libtorch's words.
            tch::Cuda::synchronize(*gpu as i64);
        }
        self.here
    }
}

/// What `copy` has begun beside what the GPU computes. `None` where it has to go in line: there are no streams for it, or it failed. Then
/// all that was begun is waited for, and a GPU that is to blame says so here, in libtorch's words.
fn beside<T>(gpu: usize, copy: impl FnOnce(&'static Copies) -> Result<T, gpu::Error>) -> Option<T> {
    match copy(Copies::of(Device::Cuda(gpu))?) {
        Ok(begun) => Some(begun),
        Err(error) => {
            tracing::warn!(%error, "a copy beside what cuda:{gpu} computes failed: it is made once more, in line");
            tch::Cuda::synchronize(gpu as i64);
            None
        }
    }
}
