//! Kernels of our own on NVIDIA GPUs.
//!
//! In: a GPU. Out: functions that were compiled for it, to be launched. Never here: what is computed; [`experts`] and
//! [`attention`] know that. [`copies`] has what goes there and comes back beside them.
//!
//! libtorch's own way to compile as a program starts is used: NVRTC, which its `libcaffe2_nvrtc.so` brings along with the
//! driver's functions. Where that cannot be had, or the GPU is older than compute capability 8.0, libtorch computes.

// Functions of NVIDIA's libraries are called, and kernels read and write memory: each use says why it is sound.
#![allow(unsafe_code)]

pub(crate) mod attention;
pub(crate) mod copies;
pub(crate) mod experts;

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use parking_lot::Mutex;

use crate::device::{Compute, Device, Dtype};

/// `cudaDevAttrComputeCapabilityMajor` and `-Minor`.
const CAPABILITY: [c_int; 2] = [75, 76];
/// BF16 in tensor cores.
const LEAST_CAPABILITY: c_int = 8;
/// Threads of one block; as in `common.cu`.
const THREADS: c_uint = 256;

/// Why kernels, or streams, cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A library or one of its functions is missing.
    #[error("{0}")]
    Library(#[from] libloading::Error),
    /// One of NVIDIA's functions did not do it.
    #[error("{function} failed with {code}{}{log}", if log.is_empty() { "" } else { ": " })]
    Failed {
        /// Its name.
        function: &'static str,
        /// What it returned.
        code: c_int,
        /// What the compiler said.
        log: String,
    },
    /// An older GPU.
    #[error("compute capability {0}.{1} is below {LEAST_CAPABILITY}.0")]
    TooOld(c_int, c_int),
}

type SetDevice = unsafe extern "C" fn(c_int) -> c_int;
type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
type Launch = unsafe extern "C" fn(
    *mut c_void,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    *mut c_void,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_int;

/// Compiled kernels on one GPU. They stay for as long as the process.
#[derive(Debug)]
pub(crate) struct Module {
    library: Library,
    set_device: SetDevice,
    launch: Launch,
    gpu: c_int,
    module: *mut c_void,
}

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    function: *mut c_void,
    /// Bytes of shared memory that are asked for as it is launched.
    shared: c_uint,
}

/// What there is once on each GPU, made when it is first asked for.
#[derive(Debug)]
pub(crate) struct PerGpu<T: 'static>(Mutex<BTreeMap<usize, Option<&'static T>>>);

impl<T> PerGpu<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// Kernels for `compute`, which compute BF16. `None` where there are none, which is told once, with `instead`.
    pub(crate) fn of(
        &self,
        compute: Compute,
        compile: impl FnOnce(usize) -> Result<T, Error>,
        instead: &str,
    ) -> Option<&'static T> {
        let (Device::Cuda(index), Dtype::Bf16) = (compute.device, compute.dtype) else { return None };
        self.on(index, compile, ("kernels of our own", instead))
    }

    /// That of GPU `index`. `None` where it cannot be made, which is told once: `what` is missing, and what is done instead.
    pub(crate) fn on(
        &self,
        index: usize,
        make: impl FnOnce(usize) -> Result<T, Error>,
        (what, instead): (&str, &str),
    ) -> Option<&'static T> {
        *self.0.lock().entry(index).or_insert_with(|| match make(index) {
            Ok(made) => Some(Box::leak(Box::new(made))),
            Err(error) => {
                tracing::warn!(%error, "no {what} on cuda:{index}: {instead}");
                None
            }
        })
    }
}

// SAFETY: handles of the driver, which may be used by any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Module {
    /// Compiles `source`, called `name`, with what all share before it, for GPU `index`, which [is open](crate::device::Device::open).
    pub(crate) fn compile(index: usize, name: &str, source: &str) -> Result<Self, Error> {
        let gpu = c_int::try_from(index).unwrap_or(c_int::MAX);
        // SAFETY: libtorch's own library, found on this binary's run path and meant to be opened. The process's own symbols
        // are searched too, among them those of the CUDA runtime, which were loaded with RTLD_GLOBAL. The signatures are those
        // of CUDA 12 and later, and what is written goes to the variables given.
        unsafe {
            let library = Library::open(Some("libcaffe2_nvrtc.so"), RTLD_NOW | RTLD_GLOBAL)?;
            let runtime = Library::this();
            let set_device = *runtime.get::<SetDevice>(b"cudaSetDevice\0")?;
            let get_attribute = *runtime.get::<GetAttribute>(b"cudaDeviceGetAttribute\0")?;
            // Makes the GPU's context this thread's.
            check("cudaSetDevice", set_device(gpu))?;
            let mut capability = [0; 2];
            for (value, attribute) in capability.iter_mut().zip(CAPABILITY) {
                check("cudaDeviceGetAttribute", get_attribute(value, attribute, gpu))?;
            }
            let [major, minor] = capability;
            if major < LEAST_CAPABILITY {
                return Err(Error::TooOld(major, minor));
            }
            let launch = *library.get::<Launch>(b"cuLaunchKernel\0")?;
            let source = [include_str!("common.cu"), include_str!("instructions.cu"), source].concat();
            let binary = compiled(&library, name, &source, &format!("sm_{major}{minor}"))?;
            let load =
                library.get::<unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> c_int>(b"cuModuleLoadData\0")?;
            let mut module = ptr::null_mut();
            check("cuModuleLoadData", load(&raw mut module, binary.as_ptr().cast()))?;
            Ok(Self { set_device, launch, gpu, module, library })
        }
    }

    /// The kernel called `name`.
    pub(crate) fn kernel(&self, name: &CStr) -> Result<Kernel, Error> {
        type GetFunction = unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> c_int;
        let mut function = ptr::null_mut();
        // SAFETY: the signature is that of CUDA 3.2 and later; the module is this one's, and only the variable is written.
        unsafe {
            let get_function = self.library.get::<GetFunction>(b"cuModuleGetFunction\0")?;
            check("cuModuleGetFunction", get_function(&raw mut function, self.module, name.as_ptr()))?;
        }
        Ok(Kernel { function, shared: 0 })
    }

    /// The same with `bytes` of shared memory more than it declares.
    pub(crate) fn kernel_with_shared(&self, name: &CStr, bytes: usize) -> Result<Kernel, Error> {
        type SetAttribute = unsafe extern "C" fn(*mut c_void, c_int, c_int) -> c_int;
        /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
        const MOST_SHARED: c_int = 8;
        let kernel = self.kernel(name)?;
        let shared = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the signature is that of CUDA 9 and later; the function is this module's.
        unsafe {
            let set_attribute = self.library.get::<SetAttribute>(b"cuFuncSetAttribute\0")?;
            check("cuFuncSetAttribute", set_attribute(kernel.function, MOST_SHARED, shared))?;
        }
        Ok(Kernel { shared: shared.unsigned_abs(), ..kernel })
    }

    /// Has `kernel` run with `grid` blocks, after all that libtorch was asked for by this thread, and before all that it will
    /// be: both use the stream that a thread has from the start. Waits for nothing.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's own parameters, and the memory that those point to is on this GPU, is as
    /// large as the kernel takes it to be, and is libtorch's, which gives it to nobody else before the kernel has run.
    pub(crate) unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        arguments: &mut [*mut c_void],
    ) -> Result<(), Error> {
        let [x, y, z] = grid.map(|blocks| c_uint::try_from(blocks).unwrap_or(c_uint::MAX));
        let (stream, extra) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the caller's.
        unsafe {
            check("cudaSetDevice", (self.set_device)(self.gpu))?;
            let status = (self.launch)(
                kernel.function,
                x,
                y,
                z,
                THREADS,
                1,
                1,
                kernel.shared,
                stream,
                arguments.as_mut_ptr(),
                extra,
            );
            check("cuLaunchKernel", status)
        }
    }
}

/// `source` as machine code of `architecture`.
///
/// # Safety
/// `library` is, or leads to, an NVRTC of version 11.1 or later.
unsafe fn compiled(library: &Library, name: &str, source: &str, architecture: &str) -> Result<Vec<u8>, Error> {
    // What holds a zero is told by the compiler: it gets nothing of it.
    let [name, source] = [name, source].map(|text| CString::new(text).unwrap_or_default());
    type Program = *mut c_void;
    type Strings = *const *const c_char;
    type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
    type Bytes = unsafe extern "C" fn(Program, *mut u8) -> c_int;
    // SAFETY: signatures of NVRTC 11.1 and later; strings end with a zero, and buffers are as large as was asked for.
    unsafe {
        let create = library.get::<unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            Strings,
            Strings,
        ) -> c_int>(b"nvrtcCreateProgram\0")?;
        let compile =
            library.get::<unsafe extern "C" fn(Program, c_int, Strings) -> c_int>(b"nvrtcCompileProgram\0")?;
        let destroy = library.get::<unsafe extern "C" fn(*mut Program) -> c_int>(b"nvrtcDestroyProgram\0")?;
        let read = |size: &[u8], bytes: &[u8], program: Program| -> Result<Vec<u8>, Error> {
            let mut length = 0;
            check("NVRTC's size", library.get::<Size>(size)?(program, &raw mut length))?;
            let mut buffer = vec![0; length];
            check("NVRTC's output", library.get::<Bytes>(bytes)?(program, buffer.as_mut_ptr()))?;
            Ok(buffer)
        };
        let mut program = ptr::null_mut();
        let created = create(&raw mut program, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null());
        check("nvrtcCreateProgram", created)?;
        let options = [format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
        let options: Vec<CString> = options.into_iter().filter_map(|option| CString::new(option).ok()).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let outcome = match compile(program, options.len() as c_int, options.as_ptr()) {
            0 => read(b"nvrtcGetCUBINSize\0", b"nvrtcGetCUBIN\0", program),
            code => {
                let log = read(b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0", program)?;
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
                Err(Error::Failed { function: "nvrtcCompileProgram", code, log })
            }
        };
        destroy(&raw mut program);
        outcome
    }
}

fn check(function: &'static str, code: c_int) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::Failed { function, code, log: String::new() }) }
}

/// Where an argument of a kernel lies.
fn argument<T>(value: &mut T) -> *mut c_void {
    (&raw mut *value).cast()
}
