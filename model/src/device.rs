//! Where and how to compute: device, number format, and whether a row's bits may depend on its neighbours.
//!
//! In: what flags say. Out: a [`Compute`], and threads made ready for libtorch.
//! Never here: a device chosen silently; what cannot be had is an error.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::kernels;

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that is none of ours.
    #[error("{what} '{given}' is unknown: use {expected}")]
    Unknown {
        /// Device, dtype or numerics.
        what: &'static str,
        /// What was given.
        given: String,
        /// What there is.
        expected: &'static str,
    },
    /// CUDA's half of libtorch could not be opened.
    #[error("libtorch_cuda.so could not be opened (the CUDA wheels are installed only where there is a GPU): {0}")]
    CudaLibrary(String),
    /// The CUDA runtime does not say how much memory is free.
    #[error("how much GPU memory is free cannot be read: {0}")]
    FreeMemory(String),
    /// It was opened, and finds no such GPU.
    #[error("cuda:{index} is not there: libtorch sees {found} GPU(s)")]
    NoSuchGpu {
        /// Asked for.
        index: usize,
        /// How many there are.
        found: i64,
    },
}

/// Where tensors live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The processor.
    Cpu,
    /// One GPU, by CUDA's index.
    Cuda(usize),
}

/// The format that products are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats.
    Bf16,
}

/// Whether a row's bits may depend on what else was computed with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// They may, in the last places.
    Fast,
    /// They do not. Our own kernels on the processor need do nothing for it but leave products of many rows to nobody else;
    /// on a GPU experts in BF16 go through kernels of our own, other products run in fixed row tiles, attention row by row.
    Reproducible,
}

/// How a process computes. The same for all its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Where.
    pub device: Device,
    /// In which format.
    pub dtype: Dtype,
    /// How strictly.
    pub numerics: Numerics,
}

impl Compute {
    /// Plain f32 on the processor: the reference.
    pub const REFERENCE: Self = Self { device: Device::Cpu, dtype: Dtype::F32, numerics: Numerics::Fast };

    /// Strictly where that costs nothing and nothing else was asked for: on the processor our kernels give every row its own
    /// bits anyway, on GPUs it takes products of one fixed size.
    pub fn new(device: Device, dtype: Dtype, numerics: Option<Numerics>) -> Self {
        let numerics = numerics.unwrap_or(match device {
            Device::Cpu => Numerics::Reproducible,
            Device::Cuda(_) => Numerics::Fast,
        });
        Self { device, dtype, numerics }
    }

    /// In words, for the log: `cpu (amx), bf16, reproducible`.
    pub fn describe(self) -> String {
        let how = match self.device {
            Device::Cpu => format!("cpu ({})", kernels::Isa::best().name()),
            Device::Cuda(_) => self.device.to_string(),
        };
        format!("{how}, {}, {}", self.dtype, self.numerics)
    }

    pub(crate) fn kind(self) -> tch::Kind {
        match self.dtype {
            Dtype::F32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }

    pub(crate) fn torch_device(self) -> tch::Device {
        match self.device {
            Device::Cpu => tch::Device::Cpu,
            Device::Cuda(index) => tch::Device::Cuda(index),
        }
    }
}

impl Device {
    /// Makes the device usable in this process; call it before the first tensor is made.
    pub fn open(self) -> Result<(), Error> {
        let Self::Cuda(index) = self else { return Ok(()) };
        open_cuda_library()?;
        let found = tch::Cuda::device_count();
        if (index as i64) < found { Ok(()) } else { Err(Error::NoSuchGpu { index, found }) }
    }
}

impl Device {
    /// Bytes that are free on this GPU, as the CUDA runtime that libtorch brings tells them. To be called after
    /// [`open`](Self::open).
    ///
    /// # Errors
    /// This is no GPU, or the runtime cannot be asked.
    #[allow(unsafe_code)]
    pub fn free_memory(self) -> Result<u64, Error> {
        let Self::Cuda(index) = self else { return Err(Error::FreeMemory("this is no GPU".to_owned())) };
        type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
        type SetDevice = unsafe extern "C" fn(i32) -> i32;
        let unreadable = |error: libloading::Error| Error::FreeMemory(error.to_string());
        let index = i32::try_from(index).map_err(|_| Error::NoSuchGpu { index, found: tch::Cuda::device_count() })?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: the process's own symbols are searched, among them those of the CUDA runtime, which `open` has loaded with
        // RTLD_GLOBAL; both functions have had these signatures since CUDA 3.2, and write only to the two numbers given.
        let status = unsafe {
            let process = libloading::os::unix::Library::this();
            let set_device = process.get::<SetDevice>(b"cudaSetDevice\0").map_err(unreadable)?;
            let mem_get_info = process.get::<MemGetInfo>(b"cudaMemGetInfo\0").map_err(unreadable)?;
            match set_device(index) {
                0 => mem_get_info(&raw mut free, &raw mut total),
                failed => failed,
            }
        };
        if status == 0 { Ok(free as u64) } else { Err(Error::FreeMemory(format!("CUDA error {status}"))) }
    }

    /// Whether libtorch multiplies groups of rows by a matrix each in one launch here: in BF16, on GPUs of compute capability 9
    /// and 10 (`aten/src/ATen/native/cuda/GroupedBlas.cpp`). `false` where that cannot be found out.
    #[allow(unsafe_code)]
    pub(crate) fn has_grouped_products(self) -> bool {
        /// `cudaDevAttrComputeCapabilityMajor`.
        const MAJOR: i32 = 75;
        type GetAttribute = unsafe extern "C" fn(*mut i32, i32, i32) -> i32;
        let Self::Cuda(index) = self else { return false };
        let Ok(index) = i32::try_from(index) else { return false };
        let mut major = 0i32;
        // SAFETY: as `free_memory`'s; the function has had this signature since CUDA 5, and writes only to the number given.
        let status = unsafe {
            match libloading::os::unix::Library::this().get::<GetAttribute>(b"cudaDeviceGetAttribute\0") {
                Ok(get_attribute) => get_attribute(&raw mut major, MAJOR, index),
                Err(_) => return false,
            }
        };
        status == 0 && matches!(major, 9 | 10)
    }
}

/// One binary serves both devices: CUDA's half of libtorch registers itself with the other when it is opened.
#[allow(unsafe_code)]
fn open_cuda_library() -> Result<(), Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    for name in ["libc10_cuda.so", "libtorch_cuda.so"] {
        // SAFETY: libtorch's own libraries, found on this binary's run path; their initialisers register kernels and
        // are meant to run on being opened. The handles are leaked, so nothing is ever unloaded.
        let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
        std::mem::forget(library.map_err(|error| Error::CudaLibrary(error.to_string()))?);
    }
    Ok(())
}

/// Readies the calling thread for tensor work: no gradients, and `threads` for libtorch's own parallel loops
/// (0: as many as there are cores). Both are per thread in libtorch, so every thread that computes calls this once.
pub fn init_thread(threads: usize) {
    std::mem::forget(tch::no_grad_guard());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { cores } else { threads };
    // Ours are the process's, and those who only load or draw need none.
    if threads > 1 {
        kernels::team::gather(threads);
    }
    // libtorch sets a thread's count lazily to whatever any thread of the process last asked for. Asking first makes that
    // happen now, so that what is set here stays.
    tch::get_num_threads();
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let unknown = || Error::Unknown { what: "device", given: text.to_owned(), expected: "cpu or cuda:N" };
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            Some(("cuda", index)) => index.parse().map(Self::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::Unknown { what: "dtype", given: text.to_owned(), expected: "f32 or bf16" }),
        }
    }
}

impl FromStr for Numerics {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "fast" => Ok(Self::Fast),
            "reproducible" => Ok(Self::Reproducible),
            _ => {
                let expected = "fast or reproducible";
                Err(Error::Unknown { what: "numerics", given: text.to_owned(), expected })
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fast => "fast",
            Self::Reproducible => "reproducible",
        })
    }
}

impl TryFrom<String> for Device {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_its_own_count_whatever_others_ask_for() {
        let (ready, wait) = std::sync::mpsc::sync_channel(0);
        let (go, may_go) = std::sync::mpsc::sync_channel::<()>(0);
        let first = std::thread::spawn(move || {
            init_thread(2);
            ready.send(()).expect("the test waits");
            may_go.recv().expect("the test goes on");
            // The first parallel loop is where libtorch would take the other's count.
            let _ = tch::Tensor::ones([512, 512], (tch::Kind::Float, tch::Device::Cpu)).exp();
            tch::get_num_threads()
        });
        wait.recv().expect("the thread is ready");
        std::thread::spawn(|| init_thread(1)).join().expect("no panic");
        go.send(()).expect("the thread waits");
        assert_eq!(first.join().expect("no panic"), 2);
    }

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for name in ["cpu", "cuda:0", "cuda:11"] {
            assert_eq!(name.parse::<Device>().expect("known").to_string(), name);
        }
        for name in ["gpu", "cuda", "cuda:", "cuda:x", "cpu:0", ""] {
            assert!(name.parse::<Device>().is_err(), "{name}");
        }
        assert!("f16".parse::<Dtype>().expect_err("unknown").to_string().contains("f32 or bf16"));
    }
}
