//! Copies beside kernels: a stream for what goes to a GPU, and one for what comes back.
//!
//! In: tensors on one side. Out: the same on the other, as if libtorch's own stream had copied them. Never here: a wait for the
//! GPU, but in [`Event::wait`].
//!
//! A GPU does what one stream is told one after the other, and has engines of their own for copies. So rows of the next batch can
//! go there, and those of the last one come back, while it computes: if they do so on other streams, and streams wait for each other
//! where one reads what another writes. Waiting is theirs; it costs some microseconds, so what is small goes on libtorch's own.
//!
//! All memory is libtorch's. What it gives away on a stream it may give away again, on that stream, as soon as it is dropped here:
//! whoever reads it on another must be waited for first. [`Copies::send`] sees to that on the way there; on the way back
//! [`Leaving`](crate::transfer::Leaving) keeps what is read.

use std::collections::VecDeque;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use libloading::os::unix::Library;
use parking_lot::Mutex;
use tch::{Device, Tensor};

use super::{Error, PerGpu, SetDevice, check};

/// What is copied in less time than streams need to wait for each other stays on libtorch's own: bytes.
const ASIDE: usize = 256 << 10;
/// Copies to a GPU that kernels may not have read yet, and their bytes, both at most. The next one waits for the oldest of them;
/// one that is larger by itself goes in line.
const AHEAD: usize = 4;
const AHEAD_BYTES: usize = 64 << 20;

/// `cudaEventDisableTiming`.
const NO_TIMES: c_uint = 2;
/// `cudaErrorNotReady`.
const NOT_READY: c_int = 600;

/// The two streams of one GPU.
#[derive(Debug)]
pub(crate) struct Copies {
    cuda: Cuda,
    gpu: c_int,
    towards: Stream,
    back: Stream,
    /// What has gone there, the oldest first.
    ahead: Mutex<VecDeque<Ahead>>,
    /// Those that nobody uses.
    events: Mutex<Vec<Handle>>,
}

/// Memory of the stream that goes there, and when libtorch's own has read it.
#[derive(Debug)]
struct Ahead {
    tensor: Tensor,
    read: Event,
}

/// A stream, or libtorch's own where it is null: the one that a thread has from the start.
#[derive(Clone, Copy, Debug)]
struct Stream(*mut c_void);

const MAIN: Stream = Stream(ptr::null_mut());

/// CUDA's name of an event.
#[derive(Clone, Copy, Debug)]
struct Handle(*mut c_void);

// SAFETY: names that CUDA gave out, which any thread may use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: as above.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Functions of the CUDA runtime, and of libtorch's C interface.
#[derive(Clone, Copy, Debug)]
struct Cuda {
    set_device: SetDevice,
    create_event: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> c_int,
    record: unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int,
    query: unsafe extern "C" fn(*mut c_void) -> c_int,
    wait_for: unsafe extern "C" fn(*mut c_void) -> c_int,
    wait_on_stream: unsafe extern "C" fn(*mut c_void, *mut c_void, c_uint) -> c_int,
    last_error: unsafe extern "C" fn() -> c_int,
    use_stream: unsafe extern "C" fn(*mut c_void, i32) -> i32,
}

impl Copies {
    /// Those of `device`. `None` on the processor, and where there are none: libtorch's own stream copies then.
    pub(crate) fn of(device: Device) -> Option<&'static Self> {
        static OPENED: PerGpu<Copies> = PerGpu::new();
        let Device::Cuda(index) = device else { return None };
        OPENED.on(index, Self::open, ("streams for copies", "kernels wait for them"))
    }

    fn open(index: usize) -> Result<Self, Error> {
        let gpu = c_int::try_from(index).unwrap_or(c_int::MAX);
        type Pooled = unsafe extern "C" fn(bool, i32, *mut *mut c_void) -> i32;
        // SAFETY: the process's own symbols are searched, among them those of the CUDA runtime and of libtorch's half for it,
        // which `Device::open` has loaded with RTLD_GLOBAL. The signatures are those of CUDA 12 and later, and of libtorch's
        // stable C interface (`torch/csrc/stable/c/shim.h`); what is written goes to the variables given.
        unsafe {
            let process = Library::this();
            let cuda = Cuda {
                set_device: *process.get(b"cudaSetDevice\0")?,
                create_event: *process.get(b"cudaEventCreateWithFlags\0")?,
                record: *process.get(b"cudaEventRecord\0")?,
                query: *process.get(b"cudaEventQuery\0")?,
                wait_for: *process.get(b"cudaEventSynchronize\0")?,
                wait_on_stream: *process.get(b"cudaStreamWaitEvent\0")?,
                last_error: *process.get(b"cudaGetLastError\0")?,
                use_stream: *process.get(b"torch_set_current_cuda_stream\0")?,
            };
            let pooled = process.get::<Pooled>(b"torch_get_cuda_stream_from_pool\0")?;
            let stream = || {
                let mut stream = ptr::null_mut();
                check("torch_get_cuda_stream_from_pool", pooled(false, gpu, &raw mut stream))?;
                Ok::<_, Error>(Stream(stream))
            };
            let (towards, back) = (stream()?, stream()?);
            Ok(Self { cuda, gpu, towards, back, ahead: Mutex::default(), events: Mutex::default() })
        }
    }

    /// `tensor`, which is on the processor, on the GPU. libtorch's stream waits for it; the processor does not.
    pub(crate) fn send(&'static self, tensor: &Tensor) -> Result<Tensor, Error> {
        let pinned = pinned(tensor, self.device());
        if !(ASIDE..=AHEAD_BYTES).contains(&bytes(tensor)) {
            return Ok(there(&pinned, self.device()));
        }
        let mut ahead = self.ahead.lock();
        // What is dropped here is written again by the next copies, which come after kernels have read it.
        let held = |ahead: &VecDeque<Ahead>| ahead.iter().map(|Ahead { tensor, .. }| bytes(tensor)).sum::<usize>();
        while ahead.len() >= AHEAD || held(&ahead) + bytes(tensor) > AHEAD_BYTES {
            let Some(oldest) = ahead.front() else { break };
            self.after(self.towards, &oldest.read)?;
            ahead.pop_front();
        }
        let tensor = self.upon(self.towards, || there(&pinned, self.device()))?;
        let arrived = self.event(self.towards)?;
        self.after(MAIN, &arrived)?;
        // In memory of libtorch's own stream, which knows who else reads it. A GPU's memory is so much quicker than the way to it
        // that one more copy there is little.
        let sent = copied(&tensor);
        ahead.push_back(Ahead { read: self.event(MAIN)?, tensor });
        Ok(sent)
    }

    /// `tensors`, which are on the GPU, on the processor once the event has come. They must be kept until then.
    pub(crate) fn fetch<const N: usize>(&'static self, tensors: &[Tensor; N]) -> Result<([Tensor; N], Event), Error> {
        let copies = || tensors.each_ref().map(here);
        if tensors.iter().map(bytes).sum::<usize>() < ASIDE {
            return Ok((copies(), self.event(MAIN)?));
        }
        let computed = self.event(MAIN)?;
        self.after(self.back, &computed)?;
        let copies = self.upon(self.back, copies)?;
        Ok((copies, self.event(self.back)?))
    }

    fn device(&self) -> Device {
        Device::Cuda(self.gpu.unsigned_abs() as usize)
    }

    /// What `stream` has been told by now, as something that can be waited for.
    fn event(&'static self, stream: Stream) -> Result<Event, Error> {
        self.make_current()?;
        let unused = self.events.lock().pop();
        let handle = match unused {
            Some(handle) => handle,
            None => {
                let mut event = ptr::null_mut();
                // SAFETY: only the variable is written.
                let status = unsafe { (self.cuda.create_event)(&raw mut event, NO_TIMES) };
                self.cuda.done("cudaEventCreateWithFlags", status)?;
                Handle(event)
            }
        };
        let event = Event { handle, copies: self };
        // SAFETY: an event and a stream of this GPU, which is the thread's now.
        self.cuda.done("cudaEventRecord", unsafe { (self.cuda.record)(handle.0, stream.0) })?;
        Ok(event)
    }

    /// Has `stream` wait for `event` before all that it will be told.
    fn after(&self, stream: Stream, event: &Event) -> Result<(), Error> {
        self.make_current()?;
        // SAFETY: as above; no flags.
        self.cuda.done("cudaStreamWaitEvent", unsafe { (self.cuda.wait_on_stream)(stream.0, event.handle.0, 0) })
    }

    /// What `work` makes, by libtorch on `stream`.
    fn upon<T>(&self, stream: Stream, work: impl FnOnce() -> T) -> Result<T, Error> {
        /// Gives the thread libtorch's own stream again, whatever became of the work.
        struct Returns<'a>(&'a Copies);
        impl Drop for Returns<'_> {
            fn drop(&mut self) {
                // SAFETY: as below.
                let status = unsafe { (self.0.cuda.use_stream)(MAIN.0, self.0.gpu) };
                // Kernels would go on beside what they read: better none go on. Where the work has panicked too, the process ends.
                assert_eq!(status, 0, "libtorch's own stream cannot be returned to");
            }
        }
        // SAFETY: a stream of this GPU, or none for libtorch's own.
        let status = unsafe { (self.cuda.use_stream)(stream.0, self.gpu) };
        self.cuda.done("torch_set_current_cuda_stream", status)?;
        let _returns = Returns(self);
        Ok(work())
    }

    /// Makes this GPU the thread's, which CUDA takes the null stream to be on.
    fn make_current(&self) -> Result<(), Error> {
        // SAFETY: a number.
        self.cuda.done("cudaSetDevice", unsafe { (self.cuda.set_device)(self.gpu) })
    }
}

impl Cuda {
    /// As [`check`], and nobody else is told: CUDA keeps a thread's last error, and libtorch takes it for its own.
    fn done(&self, function: &'static str, status: c_int) -> Result<(), Error> {
        if status != 0 {
            // SAFETY: it has no arguments.
            unsafe { (self.last_error)() };
        }
        check(function, status)
    }
}

/// A point in what a stream was told.
#[derive(Debug)]
pub(crate) struct Event {
    handle: Handle,
    copies: &'static Copies,
}

impl Event {
    /// Whether the stream has come there.
    pub(crate) fn has_come(&self) -> Result<bool, Error> {
        // SAFETY: an event of this process.
        let status = unsafe { (self.copies.cuda.query)(self.handle.0) };
        match self.copies.cuda.done("cudaEventQuery", status) {
            Err(_) if status == NOT_READY => Ok(false),
            outcome => outcome.map(|()| true),
        }
    }

    /// Waits until it has.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: as above.
        self.copies.cuda.done("cudaEventSynchronize", unsafe { (self.copies.cuda.wait_for)(self.handle.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // Streams that wait for it wait for what it stood for when they were told.
        self.copies.events.lock().push(self.handle);
    }
}

/// `tensor` in memory that a GPU reads by itself. libtorch keeps it until that has been done.
pub(crate) fn pinned(tensor: &Tensor, gpu: Device) -> Tensor {
    // `pin_memory` without its check for tensors that are pinned already: with a device named, both warn each time.
    tensor.internal_pin_memory(gpu)
}

/// `pinned` on `gpu`, by the thread's stream.
pub(crate) fn there(pinned: &Tensor, gpu: Device) -> Tensor {
    pinned.to_device_(gpu, pinned.kind(), true, false)
}

/// `tensor`, which is on a GPU, on the processor once the thread's stream has come there; in pinned memory.
pub(crate) fn here(tensor: &Tensor) -> Tensor {
    tensor.to_device_(Device::Cpu, tensor.kind(), true, false)
}

/// The same on the same GPU, a copy.
fn copied(tensor: &Tensor) -> Tensor {
    tensor.to_device_(tensor.device(), tensor.kind(), true, true)
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use tch::Kind;

    use super::*;
    use crate::{
        made_up_gpu,
        transfer::{Leaving, leaving, sent},
    };

    /// A real GPU would hide a wait that is missing: this is only tested on one that is made up.
    #[test]
    fn copies_beside_kernels_are_what_copies_in_line_would_be() {
        if !made_up_gpu::is_here() {
            return made_up_gpu::again("this test wants none but that");
        }
        // SAFETY: its own functions: which of its streams are in a hurry, and which call from now on fails.
        let (hurry, fail) = unsafe {
            type OfNumber = unsafe extern "C" fn(c_int);
            let process = Library::this();
            let function = |name: &[u8]| *process.get::<OfNumber>(name).expect("its function");
            (function(b"hurry\0"), function(b"fail\0"))
        };
        let copies = Copies::of(Device::Cuda(0)).expect("streams are to be had");
        for (streams, who) in [(0, "nobody"), (1, "kernels"), (2, "copies"), (3, "everybody")] {
            // SAFETY: a number.
            unsafe { hurry(streams) };
            for seed in 0..4 {
                go_back_and_forth(copies, seed, &format!("{who} in a hurry, seed {seed}"));
            }
        }
        // SAFETY: numbers.
        unsafe { hurry(0) };
        is_asked_until_it_is_here(copies);
        for nth in 0..20 {
            // SAFETY: a number.
            unsafe { fail(nth) };
            let values = Tensor::full([ASIDE as i64], f64::from(nth), (Kind::Float, Device::Cpu));
            let [back] = leaving([sent(values.shallow_clone(), copies.device())]).wait();
            assert_eq!(back, values, "call {nth} fails");
        }
    }

    fn is_asked_until_it_is_here(copies: &'static Copies) {
        let values = Tensor::full([ASIDE as i64], 3.0, (Kind::Float, Device::Cpu));
        let leaving = leaving([copies.send(&values).expect("it is sent")]);
        assert!(!leaving.have_arrived(), "nothing was done so far");
        let asked = (0..1000).find(|_| leaving.have_arrived());
        assert!(asked.is_some(), "whoever asks lets time go by");
        let [here] = leaving.wait();
        assert_eq!(here, values);
    }

    /// Sends and fetches tensors in any order, keeps some, and lets go of others at any time.
    fn go_back_and_forth(copies: &'static Copies, seed: u64, what: &str) {
        let mut random = StdRng::seed_from_u64(seed);
        // Values of four bytes: in line, just beside, and rarely so many that few of them may go ahead.
        let [small, just, more, many] = [16, ASIDE as i64 / 4, ASIDE as i64 / 2, AHEAD_BYTES as i64 / 12];
        let sizes = [small, just, just, just, more, more, more, just - 1, small, just, more, many];
        let mut there: Vec<(Tensor, f32)> = Vec::new();
        let mut back: Vec<(Leaving<2>, [f32; 2])> = Vec::new();
        let check = |(leaving, values): (Leaving<2>, [f32; 2])| {
            for (tensor, value) in leaving.wait().iter().zip(values) {
                let right = tensor.eq(f64::from(value)).all().int64_value(&[]) == 1;
                assert!(tensor.device() == Device::Cpu && right, "{what}: {value} is {tensor:?}");
            }
        };
        for step in 0..60 {
            match random.random_range(0..6) {
                0..3 => {
                    let value = (seed * 100 + step) as f32;
                    let size = sizes[random.random_range(0..sizes.len())];
                    let tensor = Tensor::full([size], f64::from(value), (Kind::Float, Device::Cpu));
                    there.push((copies.send(&tensor).expect(what), value));
                }
                3 if !there.is_empty() => drop(there.swap_remove(random.random_range(0..there.len()))),
                4 if !there.is_empty() => {
                    let [one, other] = [0; 2].map(|_| &there[random.random_range(0..there.len())]);
                    // What leaves is made by kernels, and nobody else's.
                    back.push((leaving([copied(&one.0), copied(&other.0)]), [one.1, other.1]));
                }
                _ if !back.is_empty() => check(back.swap_remove(random.random_range(0..back.len()))),
                _ => {}
            }
        }
        back.into_iter().for_each(check);
        for (tensor, value) in there {
            check((leaving([copied(&tensor), tensor]), [value; 2]));
        }
    }
}
