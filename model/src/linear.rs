//! A matrix product with a stored weight.
//!
//! In: rows `[T, in]`. Out: rows `[T, out]`. Never here: a weight copied because of the batch it meets.
//!
//! On the processor our own kernels read the weight as it is stored, and no row depends on another. libtorch computes on
//! GPUs, and on processors where it is quicker products of many rows, if rows may depend on each other.

use tch::{Kind, Tensor};

use crate::{
    checkpoint::{self, Checkpoint, Stored, Weight},
    device::{Compute, Device, Dtype, Numerics},
    gpu,
    kernels::{
        Format, Isa, Matrix, Operand,
        product::{Job, products},
        tensor,
    },
};

/// `y = x W^T + b`, `W: [out, in]` as checkpoints store it.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Stored,
    bias: Option<Weight>,
    /// Columns of the result.
    out: i64,
    compute: Compute,
}

/// From this many rows on libtorch's products, whose rows depend on their number, cost less than ours on processors without
/// AMX.
const LIBTORCH_FROM_ROWS: i64 = 32;
/// The fixed shape that reproducible products run in on a GPU.
///
/// libtorch picks another summation order for other row counts: f32 rows change their bits at 1, 16 and 512 rows, bf16
/// rows at more than 32 and, in some shapes, at 1. So every product has the same number of rows, padded with zeros.
/// In bf16 sixteen rows cost as one, since reading the weight is the cost; in f32 they do not, so tiles are smaller.
const TILE_ROWS: (i64, i64) = (8, 16);
/// A product of fewer columns depends on where in the tile a row stands, so weights are padded to this many.
const TILE_COLUMNS: i64 = 16;

impl Linear {
    /// Reads `<name>.weight` `[out, in]`, and `<name>.bias` `[out]` where `bias` says there is one.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        size: [usize; 2],
        bias: bool,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let weight = format!("{name}.weight");
        let weight = match compute.device {
            Device::Cpu => checkpoint.load_stored(&weight, size)?,
            Device::Cuda(_) => Stored::Plain(checkpoint.load(&weight, &size)?),
        };
        let bias = if bias { Some(checkpoint.load(&format!("{name}.bias"), &[size[0]])?) } else { None };
        Ok(Self::new(weight, bias, compute))
    }

    /// The same without a bias, in the format that it is stored in, for experts' kernels on a GPU.
    pub(crate) fn load_as_stored(
        checkpoint: &Checkpoint,
        name: &str,
        size: [usize; 2],
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        Ok(Self::as_stored(checkpoint.load_stored(&format!("{name}.weight"), size)?, compute))
    }

    /// `weight` where it is to be computed with, in its own format.
    pub(crate) fn as_stored(weight: Stored, compute: Compute) -> Self {
        let weight = weight.on(compute.torch_device());
        let [out, _] = weight.size();
        Self { weight, bias: None, out, compute }
    }

    /// As kernels on a GPU read it; `None` where they cannot.
    pub(crate) fn on_gpu(&self) -> Option<gpu::experts::Matrix> {
        let address = |weight: &Weight| weight.data_ptr().cast_const();
        let (format, weight, scales) = match &self.weight {
            Stored::Plain(weight) => (gpu::experts::Format::Bf16, weight, std::ptr::null()),
            Stored::Fp8 { codes, scales, block } => {
                (gpu::experts::Format::Fp8 { block: *block }, codes, address(scales))
            }
        };
        let readable = matches!(weight.device(), tch::Device::Cuda(_))
            && matches!(weight.kind(), Kind::BFloat16 | Kind::Uint8)
            && weight.is_contiguous();
        readable.then(|| gpu::experts::Matrix { format, values: address(weight), scales })
    }

    /// Reads the weight's pages now, see [`Weight::fetch`].
    pub(crate) fn fetch(&self) -> std::io::Result<()> {
        self.weight.fetch()
    }

    pub(crate) fn new(weight: Stored, bias: Option<Weight>, compute: Compute) -> Self {
        let place = |weight: Weight| weight.to(compute.kind(), compute.torch_device());
        let weight = match weight {
            // Read as it is: BF16 is f32's upper half.
            Stored::Plain(weight) if compute.device == Device::Cpu && weight.kind() == Kind::BFloat16 => {
                Stored::Plain(weight)
            }
            Stored::Plain(weight) => Stored::Plain(place(weight)),
            fp8 => fp8,
        };
        let [out, _] = weight.size();
        // Kernels add it in f32; libtorch wants it as it wants all.
        let bias = bias.map(|bias| match compute.device {
            Device::Cpu => bias.to(Kind::Float, tch::Device::Cpu),
            Device::Cuda(_) => place(bias),
        });
        match tile(compute) {
            Some(_) if out < TILE_COLUMNS => Self { weight: padded(weight, out), bias, out, compute },
            _ => Self { weight, bias, out, compute },
        }
    }

    /// Bytes of the weight, its scales included.
    pub(crate) fn bytes(&self) -> u64 {
        let of = |weight: &Weight| (weight.numel() * weight.kind().elt_size_in_bytes()) as u64;
        match &self.weight {
            Stored::Plain(weight) => of(weight),
            Stored::Fp8 { codes, scales, .. } => of(codes) + of(scales),
        }
    }

    /// Another hold on the same weight.
    pub(crate) fn share(&self) -> Self {
        Self { weight: self.weight.share(), bias: self.bias.as_ref().map(Weight::share), ..*self }
    }

    /// The weight as kernels read it. Panics on a GPU.
    pub(crate) fn matrix(&self) -> Matrix<'_> {
        self.weight.matrix()
    }

    /// The weight `[out, in]`, if it is plain numbers.
    pub(crate) fn plain(&self) -> Option<&Tensor> {
        match &self.weight {
            Stored::Plain(weight) => Some(weight),
            Stored::Fp8 { .. } => None,
        }
    }

    /// How it computes.
    pub(crate) fn compute(&self) -> Compute {
        self.compute
    }

    /// Columns of the result.
    pub(crate) fn out(&self) -> usize {
        self.out as usize
    }

    /// Columns `outs` of the product of one row, `[1, in]`, as they are among all, f32. On the processor, of a plain weight
    /// without a bias.
    pub(crate) fn some_outputs(&self, x: &Tensor, outs: &[u32]) -> Vec<f32> {
        let Stored::Plain(weight) = &self.weight else { unreachable!("only plain weights are asked for some rows") };
        let weight = Stored::Plain(Weight::owned(tensor::gathered(weight, outs)));
        let some = Self { weight, bias: None, out: outs.len() as i64, compute: self.compute };
        let [y] = side_by_side([&some], x);
        tensor::rows(&y).to_f32(Isa::best())
    }

    /// Columns of its rows.
    pub(crate) fn inner(&self) -> i64 {
        self.weight.size()[1]
    }

    /// Whether products of `rows` rows are left to libtorch, and the weight for them.
    pub(crate) fn for_libtorch(&self, rows: i64) -> Option<&Tensor> {
        match (&self.weight, self.compute.device) {
            (Stored::Plain(weight), Device::Cuda(_)) => Some(weight),
            (Stored::Plain(weight), Device::Cpu) => {
                let (isa, dtype) = (Isa::best(), self.compute.dtype);
                let quick = match dtype {
                    Dtype::F32 => true,
                    // Without AVX-512, libtorch has no products in BF16 worth the name.
                    Dtype::Bf16 => !matches!(isa, Isa::Avx2 | Isa::Portable),
                };
                let better = rows >= LIBTORCH_FROM_ROWS
                    && self.compute.numerics == Numerics::Fast
                    && weight.kind() == self.compute.kind()
                    && quick
                    && Format::of(isa, dtype, &self.matrix()) != Format::Tiles;
                if better { Some(weight) } else { None }
            }
            (Stored::Fp8 { .. }, _) => None,
        }
    }

    /// `[T, in]` to `[T, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        match (self.for_libtorch(x.size()[0]), tile(self.compute)) {
            (None, _) => {
                let [y] = side_by_side([self], x);
                y
            }
            (Some(weight), None) => self.product(x, weight),
            (Some(weight), Some(tile)) => self.tiled(x, weight, tile),
        }
    }

    /// `[T, in]` through each of `linears`, on the processor as one piece of work: threads meet once for all of them.
    pub(crate) fn forward_all<const N: usize>(linears: [&Self; N], x: &Tensor) -> [Tensor; N] {
        if linears.iter().any(|linear| linear.for_libtorch(x.size()[0]).is_some()) {
            return linears.map(|linear| linear.forward(x));
        }
        side_by_side(linears, x)
    }

    fn product(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(x.kind()));
        x.linear(weight, bias.as_ref())
    }

    fn tiled(&self, x: &Tensor, weight: &Tensor, tile: i64) -> Tensor {
        let rows = x.size()[0];
        let part = |start| {
            let here = tile.min(rows - start);
            let padded = x.narrow(0, start, here).constant_pad_nd([0, 0, 0, tile - here]);
            padded.linear(weight, None::<&Tensor>).narrow(0, 0, here).narrow(1, 0, self.out)
        };
        let parts: Vec<Tensor> = (0..rows).step_by(tile as usize).map(part).collect();
        let y = Tensor::cat(&parts, 0);
        match &self.bias {
            Some(bias) => y + &**bias,
            None => y,
        }
    }
}

/// `[T, in]` through each of `linears`, by our own kernels.
fn side_by_side<const N: usize>(linears: [&Linear; N], x: &Tensor) -> [Tensor; N] {
    let x = x.contiguous();
    let formats = linears.map(|linear| Format::of(Isa::best(), linear.compute.dtype, &linear.matrix()));
    let lay_out = |format| Operand::of(format, tensor::rows(&x), linears[0].matrix().inner);
    let laid_out = lay_out(formats[0]);
    // All are stored alike, as a rule.
    let otherwise = formats.map(|format| if format == formats[0] { None } else { Some(lay_out(format)) });
    let y = linears.map(|linear| Tensor::empty([x.size()[0], linear.out], (x.kind(), tch::Device::Cpu)));
    let job = |nth: usize| {
        let (linear, matrix) = (linears[nth], linears[nth].matrix());
        let bias = linear.bias.as_ref().map(|bias| tensor::f32s(bias));
        let x = otherwise[nth].as_ref().unwrap_or(&laid_out);
        Job { x, matrix, bias, out: tensor::out(&y[nth]), stride: matrix.out, offset: 0 }
    };
    let jobs: [Job<'_>; N] = std::array::from_fn(job);
    // SAFETY: each of `y` is `[T, out]`, and nobody else's yet.
    #[allow(unsafe_code)]
    unsafe {
        products(Isa::best(), &jobs);
    }
    y
}

/// Rows of every product, where that is fixed.
fn tile(compute: Compute) -> Option<i64> {
    match (compute.device, compute.numerics, compute.dtype) {
        (Device::Cpu, ..) | (_, Numerics::Fast, _) => None,
        (_, Numerics::Reproducible, Dtype::F32) => Some(TILE_ROWS.0),
        (_, Numerics::Reproducible, Dtype::Bf16) => Some(TILE_ROWS.1),
    }
}

fn padded(weight: Stored, out: i64) -> Stored {
    match weight {
        Stored::Plain(weight) => Stored::Plain(Weight::owned(weight.constant_pad_nd([0, 0, 0, TILE_COLUMNS - out]))),
        fp8 => fp8,
    }
}
