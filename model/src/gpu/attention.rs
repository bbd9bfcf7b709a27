//! Attention of few rows by our own kernels on a GPU, `attention.cu`.
//!
//! In: what the projections made, and where rows and keys lie. Out: latents in the cache; sums of latents. Never here: a key
//! moved before it is read; rows of a long prompt, which share keys and are libtorch's.

use tch::{Kind, Tensor};

use super::{Error, Kernel, Module, PerGpu, argument};
use crate::{cache::BLOCK_TOKENS, device::Compute};

/// Heads of a block of threads, and blocks of the cache that it goes through: as the kernels'.
const HEADS: usize = 16;
const SPAN: usize = 8;
/// Shared memory that a block of threads may have on every GPU since compute capability 8.0.
const MOST_SHARED: usize = 99 << 10;
/// Each of 8 warps sums up as many tiles of 8 latents.
const LATENTS: usize = 64;
const MOST_LATENTS: usize = 512;

/// A model's attention in numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sizes {
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) latent: usize,
}

/// The rows that are computed, as kernels look them up.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// On the GPU: for each row where its table begins here, how many keys it sees, and which row of the pass it is; then the
    /// tables.
    pub(crate) table: Tensor,
    pub(crate) rows: usize,
    /// Blocks of the longest table.
    pub(crate) blocks: usize,
}

/// The kernels of one GPU.
#[derive(Debug)]
pub(crate) struct Kernels {
    module: Module,
    remember: Kernel,
    attend: Kernel,
    combine: Kernel,
}

impl Kernels {
    /// Those for `compute`, see [`PerGpu::of`], where they can compute attention of these sizes.
    pub(crate) fn of(compute: Compute, sizes: Sizes) -> Option<&'static Self> {
        static COMPILED: PerGpu<Kernels> = PerGpu::new();
        let Sizes { nope, rope, latent, .. } = sizes;
        let suits = latent.is_multiple_of(LATENTS)
            && latent <= MOST_LATENTS
            && rope.is_multiple_of(16)
            && nope.is_multiple_of(8)
            && shared_bytes(sizes) <= MOST_SHARED;
        let kernels = || COMPILED.of(compute, Self::compile, "libtorch computes attention");
        if suits { kernels() } else { None }
    }

    fn compile(index: usize) -> Result<Self, Error> {
        let source = concat!(include_str!("attention.cu"), "\0");
        // The line above ends with the only zero there is.
        let source = std::ffi::CStr::from_bytes_with_nul(source.as_bytes()).unwrap_or(c"");
        let module = Module::compile(index, c"attention.cu", source)?;
        Ok(Self {
            remember: module.kernel(c"remember")?,
            attend: module.kernel_with_shared(c"attend", MOST_SHARED)?,
            combine: module.kernel(c"combine")?,
            module,
        })
    }

    /// Norms the latents of `kv` `[T, C+R]` by `weight` `[C]` and `eps`, turns its keys and those of `q` `[T, H, N+R]`, in place,
    /// by `turns` f32 `[T, 1, R/2, 2]`, and puts latents and keys into rows `slots` `[T]` of `cache` `[., C+R]`.
    pub(crate) fn remember(
        &self,
        sizes: Sizes,
        [q, kv]: [&Tensor; 2],
        (weight, eps): (&Tensor, f32),
        (turns, interleaved): (&Tensor, bool),
        slots: &Tensor,
        cache: &Tensor,
    ) -> Result<(), Error> {
        let Sizes { heads, nope, rope, latent } = sizes;
        let rows = kv.size()[0] as usize;
        for (tensor, kind, values) in [
            (q, Kind::BFloat16, rows * heads * (nope + rope)),
            (kv, Kind::BFloat16, rows * (latent + rope)),
            (weight, Kind::BFloat16, latent),
            (turns, Kind::Float, rows * rope),
            (slots, Kind::Int64, rows),
        ] {
            assert!(tensor.is_contiguous() && tensor.kind() == kind && tensor.numel() == values, "{tensor:?}");
        }
        assert!(cache.is_contiguous() && cache.kind() == Kind::BFloat16);
        let mut pointers = [q, kv, weight, turns, slots, cache].map(Tensor::data_ptr);
        let mut eps = eps;
        let mut numbers = [heads, nope, rope, latent, usize::from(interleaved)].map(|number| number as i32);
        let arguments = pointers.iter_mut().map(argument).chain([argument(&mut eps)]);
        let mut arguments: Vec<_> = arguments.chain(numbers.iter_mut().map(argument)).collect();
        // SAFETY: twelve values as the kernel declares them; sizes were checked above, and slots are places in the cache, as for
        // every way of computing.
        unsafe { self.module.launch(self.remember, [rows, 1, 1], &mut arguments) }
    }

    /// Of the rows in `lookup`: `queries` `[H, n, C]` of latents, and what of `q` `[T, H, N+R]` carries positions, over the keys
    /// in `cache`, to sums of latents `[H, n, C]`.
    pub(crate) fn attend(
        &self,
        sizes: Sizes,
        [queries, q]: [&Tensor; 2],
        scale: f64,
        lookup: &Lookup,
        cache: &Tensor,
    ) -> Result<Tensor, Error> {
        let Sizes { heads, nope, rope, latent } = sizes;
        let rows = lookup.rows;
        assert!(queries.is_contiguous() && queries.numel() == heads * rows * latent, "{queries:?}");
        assert!([queries, q, cache].iter().all(|tensor| tensor.kind() == Kind::BFloat16 && tensor.is_contiguous()));
        let out = queries.empty_like();
        let spans = lookup.blocks.div_ceil(SPAN);
        // Needed where there are several.
        let (apart, float) = (if spans > 1 { spans * rows * heads } else { 0 }, (Kind::Float, q.device()));
        let parts = Tensor::empty([apart as i64, latent as i64], float);
        let stats = Tensor::empty([apart as i64, 2], float);
        let mut pointers = [queries, q, cache, &lookup.table, &out, &parts, &stats].map(Tensor::data_ptr);
        let mut scale = scale as f32;
        let mut numbers = [heads, nope, rope, latent].map(|number| number as i32);
        let arguments = pointers.iter_mut().map(argument).chain([argument(&mut scale)]);
        let mut arguments: Vec<_> = arguments.chain(numbers.iter_mut().map(argument)).collect();
        // SAFETY: twelve values as the kernel declares them; sizes were checked above, and tables hold blocks of the cache, as
        // for every way of computing.
        unsafe { self.module.launch(self.attend, [rows, heads.div_ceil(HEADS), spans], &mut arguments)? };
        if spans > 1 {
            let mut pointers = [&lookup.table, &parts, &stats, &out].map(Tensor::data_ptr);
            let mut latent = latent as i32;
            let mut arguments: Vec<_> = pointers.iter_mut().map(argument).chain([argument(&mut latent)]).collect();
            // SAFETY: five values as the kernel declares them, of what was written just now.
            unsafe { self.module.launch(self.combine, [rows, heads, 1], &mut arguments)? };
        }
        Ok(out)
    }
}

/// As `attend` divides it: keys, queries, weights, scores and three numbers a head.
fn shared_bytes(Sizes { rope, latent, .. }: Sizes) -> usize {
    let line = latent + rope + 8;
    2 * (BLOCK_TOKENS + HEADS) * line + 2 * HEADS * (BLOCK_TOKENS + 8) + 4 * HEADS * (BLOCK_TOKENS + 3)
}
