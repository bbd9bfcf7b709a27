//! Tensors over a file's own pages. In: an open safetensors file and a tensor's place in it. Out: a `Weight` that reads
//! the mapped pages, so that processes on one host share them and only what is used is ever resident. Never here: a map
//! wider than the one tensor asked for, a write to a mapped page, the meaning of FP8 codes.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::Arc;

use memmap2::{Advice, Mmap, MmapOptions};
use tch::{Device, Kind, Tensor};

use super::safetensors::Located;

/// A tensor of a checkpoint, with the mapping it reads if it has no memory of its own.
///
/// It is read-only: a mapped one must not be changed in place. Views of it (`narrow`, `view`, `shallow_clone`) are good
/// as long as it lives; what must live longer is copied.
#[derive(Debug)]
pub struct Weight {
    // Declared before the map, so that it goes first.
    tensor: Tensor,
    map: Option<Arc<Mmap>>,
}

impl Weight {
    /// A tensor that has its own memory.
    pub fn owned(tensor: Tensor) -> Self {
        Self { tensor, map: None }
    }

    /// Maps `located`'s bytes and no others, rounded outwards to whole pages. Copied instead if the file does not align
    /// them for their kind, which the format allows.
    pub(super) fn map(file: &File, located: &Located, kind: Kind) -> Result<Self, String> {
        let size: Vec<i64> = located.shape.iter().map(|&dim| dim as i64).collect();
        if located.bytes == 0 {
            return Ok(Self::owned(Tensor::zeros(size.as_slice(), (kind, Device::Cpu))));
        }
        let map = map_range(file, located).map_err(|error| format!("cannot be mapped: {error}"))?;
        if !map.as_ptr().addr().is_multiple_of(kind.elt_size_in_bytes()) {
            let copy =
                tch::no_grad(|| Tensor::f_from_data_size(&map, &size, kind)).map_err(|error| error.to_string())?;
            return Ok(Self::owned(copy));
        }
        // Read ahead now, beside whatever else is being loaded, rather than page by page under the first row. Advice only:
        // a file system that does not take it reads later.
        let _ = map.advise(Advice::WillNeed);
        let tensor = over(&map, &size, kind)?;
        Ok(Self { tensor, map: Some(Arc::new(map)) })
    }

    /// Another hold on the same memory.
    pub(crate) fn share(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), map: self.map.clone() }
    }

    /// The same values as `kind` on `device`. Itself if it is that already; else a copy, and the map is let go.
    pub fn to(self, kind: Kind, device: Device) -> Self {
        if self.tensor.kind() == kind && self.tensor.device() == device {
            return self;
        }
        Self::owned(tch::no_grad(|| self.tensor.to_device_(device, kind, false, false)))
    }

    /// Reads its pages now, so that nobody waits for them later. Whoever calls this waits, and hears of a disk that cannot be
    /// read: later, a page that does not come would end the process.
    pub(crate) fn fetch(&self) -> io::Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        match map.advise(Advice::PopulateRead) {
            // A kernel before 5.14 does not know of it. There, pages come when they are needed.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            outcome => outcome,
        }
    }

    /// Whether it reads a file's pages rather than memory of its own.
    pub fn is_mapped(&self) -> bool {
        self.map.is_some()
    }
}

impl Deref for Weight {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

/// Maps a tensor's bytes, for reading.
#[allow(unsafe_code)]
pub(super) fn map_range(file: &File, located: &Located) -> io::Result<Mmap> {
    let length = usize::try_from(located.bytes).map_err(io::Error::other)?;
    // SAFETY: the map is read-only and private. Its range was checked to lie within the file when the file was opened.
    // That nobody rewrites or truncates a checkpoint while it is served is asked of the operator: every server that maps
    // weights asks it, and a file replaced by renaming, as downloads and rsync do, keeps the old pages.
    unsafe { MmapOptions::new().offset(located.offset).len(length).map(file) }
}

/// A tensor over a map's bytes, without a copy.
#[allow(unsafe_code)]
fn over(map: &Mmap, size: &[i64], kind: Kind) -> Result<Tensor, String> {
    // SAFETY: the map holds `size`'s product of `kind`'s elements (the safetensors header was checked to say so), its
    // start is aligned for `kind` (checked by the caller), and every bit pattern is a value of the float kinds and bytes
    // used here. The caller keeps the map for as long as the tensor.
    unsafe { Tensor::f_from_blob(map.as_ptr(), size, &[], kind, Device::Cpu) }.map_err(|error| error.to_string())
}
