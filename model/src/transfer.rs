//! Values on their way to a GPU and back.
//!
//! In: tensors on one side. Out: the same on the other. Never here: a wait on the way out; on the way back there is one, for
//! everything that comes back at once.
//!
//! A GPU reads and writes memory that stays in its place by itself, while the processor goes on. libtorch has a pool of such
//! memory and keeps each piece until the GPU is through with it.

use tch::{Device, Tensor, kind::Element};

/// `values` `[n]` on `device`.
pub(crate) fn placed<T: Element>(values: &[T], device: Device) -> Tensor {
    sent(Tensor::from_slice(values), device)
}

/// `tensor`, which is on the processor, on `device`.
pub(crate) fn sent(tensor: Tensor, device: Device) -> Tensor {
    match device {
        Device::Cpu => tensor,
        // `pin_memory` without its check for tensors that are pinned already: with a device named, both warn each time.
        gpu => tensor.internal_pin_memory(gpu).to_device_(gpu, tensor.kind(), true, false),
    }
}

/// Contiguous `tensors`, which are all in one place, on the processor. Here a GPU is waited for, until it has computed the
/// last of them.
pub(crate) fn fetched<const N: usize>(tensors: [Tensor; N]) -> [Tensor; N] {
    let Some(Device::Cuda(gpu)) = tensors.first().map(Tensor::device) else { return tensors };
    let here = tensors.map(|tensor| tensor.to_device_(Device::Cpu, tensor.kind(), true, false));
    tch::Cuda::synchronize(gpu as i64);
    here
}
