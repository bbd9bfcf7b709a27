//! SwiGLU networks: a dense layer's, the shared expert's, and a routed expert's are the same shape of thing.
//!
//! In: rows `[n, D]`. Out: rows `[n, D]`, unweighted. Never here: which rows, whose rows, what they weigh.

use tch::Tensor;

use crate::{
    checkpoint::{self, Checkpoint, Stored, Weight},
    compute::{self, Slot},
    config::ModelConfig,
    device::{Compute, Device, Numerics},
    gpu::{
        self,
        experts::{Format, Kernels},
    },
    hidden::Hidden,
    kernels::{
        Isa, Source,
        product::Out,
        swiglu::{Network, swiglu},
        tensor,
    },
    linear::Linear,
};

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    compute: Compute,
}

impl Mlp {
    /// Reads `<name>.{gate,up,down}_proj`, `[I, D]`, `[I, D]` and `[D, I]`.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        hidden: usize,
        inner: usize,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        Self::of([hidden, inner], compute, |part, size| {
            Linear::load(checkpoint, &format!("{name}.{part}"), size, false, compute)
        })
    }

    /// Of what `load` gives for each part and its size.
    fn of<E>(
        [hidden, inner]: [usize; 2],
        compute: Compute,
        load: impl Fn(&str, [usize; 2]) -> Result<Linear, E>,
    ) -> Result<Self, E> {
        Ok(Self {
            gate: load("gate_proj", [inner, hidden])?,
            up: load("up_proj", [inner, hidden])?,
            down: load("down_proj", [hidden, inner])?,
            compute,
        })
    }

    /// `[n, D]` to `[n, D]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        if self.for_libtorch(x.size()[0]) {
            let activated = self.gate.forward(x).silu() * self.up.forward(x);
            return self.down.forward(&activated);
        }
        let x = x.contiguous();
        let y = Tensor::empty(x.size().as_slice(), (x.kind(), tch::Device::Cpu));
        let (rows, hidden) = (tensor::rows(&x), x.size()[1] as usize);
        let row = |row: usize| rows.part(row * hidden, hidden);
        let network = self.network(Source { rows: x.size()[0] as usize, row: &row }, tensor::out(&y));
        // SAFETY: `y` is as large as `x`, and nobody else's yet.
        #[allow(unsafe_code)]
        unsafe {
            swiglu(Isa::best(), self.compute.dtype, &[network]);
        }
        y
    }

    fn for_libtorch(&self, rows: i64) -> bool {
        [&self.gate, &self.up, &self.down].into_iter().all(|linear| linear.for_libtorch(rows).is_some())
    }

    fn network<'a>(&'a self, x: Source<'a>, out: Out<'a>) -> Network<'a> {
        Network { gate: self.gate.matrix(), up: self.up.matrix(), down: self.down.matrix(), x, out }
    }
}

/// One routed expert: the unit of placement, of failure and of scaling.
#[derive(Debug)]
pub struct Expert {
    mlp: Mlp,
    compute: Compute,
    hidden: usize,
    /// Where it lies among its layer's, if they are computed together.
    slot: Option<Slot>,
}

impl Expert {
    /// Maps expert `expert` of layer `layer`, and nothing else of the checkpoint, and reads it: on this thread, so that the one
    /// that computes does not wait for a disk.
    pub fn load(checkpoint: &Checkpoint, layer: u32, expert: u32, compute: Compute) -> Result<Self, checkpoint::Error> {
        let config: &ModelConfig = checkpoint.config();
        let name = format!("model.layers.{layer}.mlp.experts.{expert}");
        let (hidden, inner) = (config.hidden_size, config.moe_intermediate_size);
        let mlp = match checkpoint.expert_format(layer as usize, expert as usize, compute) {
            None => Mlp::load(checkpoint, &name, hidden, inner, compute)?,
            Some(_) => Mlp::of([hidden, inner], compute, |part, size| {
                Linear::load_as_stored(checkpoint, &format!("{name}.{part}"), size, compute)
            })?,
        };
        for (part, linear) in [("gate", &mlp.gate), ("up", &mlp.up), ("down", &mlp.down)] {
            let tensor = format!("{name}.{part}_proj.weight");
            linear.fetch().map_err(|error| checkpoint.unreadable(&tensor, &error))?;
        }
        Ok(Self { mlp, compute, hidden, slot: None })
    }

    /// D.
    pub fn hidden_size(&self) -> usize {
        self.hidden
    }

    /// How it computes.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Rows `[n, D]` to rows `[n, D]`.
    ///
    /// # Errors
    /// A GPU's kernel could not be launched.
    pub fn forward(&self, rows: &Hidden) -> Result<Hidden, compute::Error> {
        let own_bits = self.compute.numerics == Numerics::Reproducible;
        if let Some((kernels, _)) = self.kernels().filter(|(_, format)| *format != Format::Bf16 || own_bits) {
            let all: Vec<usize> = (0..rows.rows()).collect();
            return Ok(kernels.forward(rows, &[self], &[all.len()], &all, &all)?);
        }
        Ok(Hidden(self.mlp.forward(&rows.0)))
    }

    /// The kernels on a GPU that can compute it, and how they read its weights.
    pub(crate) fn kernels(&self) -> Option<(&'static Kernels, Format)> {
        let [gate, up, down] = self.on_gpu()?.map(|part| part.format);
        let suits = gate == up && up == down && Kernels::suit(self.hidden, self.inner_size(), gate);
        Kernels::of(self.compute).filter(|_| suits).map(|kernels| (kernels, gate))
    }

    /// Gate, up and down as those read them.
    pub(crate) fn on_gpu(&self) -> Option<[gpu::experts::Matrix; 3]> {
        let Mlp { gate, up, down, .. } = &self.mlp;
        Some([gate.on_gpu()?, up.on_gpu()?, down.on_gpu()?])
    }

    /// Bytes of its weights in the format that they have here.
    pub fn bytes(&self) -> u64 {
        let Mlp { gate, up, down, .. } = &self.mlp;
        [gate, up, down].into_iter().map(Linear::bytes).sum()
    }

    /// I.
    pub(crate) fn inner_size(&self) -> usize {
        self.mlp.down.inner() as usize
    }

    /// Gate and up `[I, D]`, down `[D, I]`, if they are plain numbers.
    pub(crate) fn weights(&self) -> Option<[&Tensor; 3]> {
        let Mlp { gate, up, down, .. } = &self.mlp;
        Some([gate.plain()?, up.plain()?, down.plain()?])
    }

    /// Lets go of two weights and reads the same numbers there from now on. It lies nowhere among others until it is told.
    pub(crate) fn read_gate_and_up_from(&mut self, gate: &Tensor, up: &Tensor) {
        let at = |place: &Tensor| Linear::new(Stored::Plain(Weight::owned(place.shallow_clone())), None, self.compute);
        (self.mlp.gate, self.mlp.up, self.slot) = (at(gate), at(up), None);
    }

    /// The same for the third; with it all of them are in `slot`.
    pub(crate) fn take_slot(&mut self, down: &Tensor, slot: Slot) {
        self.mlp.down = Linear::new(Stored::Plain(Weight::owned(down.shallow_clone())), None, self.compute);
        self.slot = Some(slot);
    }

    /// Where it lies among its layer's.
    pub(crate) fn slot(&self) -> Option<&Slot> {
        self.slot.as_ref()
    }

    /// One whose weights mean nothing.
    #[cfg(test)]
    pub(crate) fn drawn(hidden: usize, inner: usize, compute: Compute) -> Self {
        let draw = |out: usize, inner: usize| {
            let values = Tensor::randn([out as i64, inner as i64], (tch::Kind::Float, tch::Device::Cpu)) * 0.2;
            Linear::new(Stored::Plain(Weight::owned(values.to_kind(compute.kind()))), None, compute)
        };
        let mlp = Mlp { gate: draw(inner, hidden), up: draw(inner, hidden), down: draw(hidden, inner), compute };
        Self { mlp, compute, hidden, slot: None }
    }

    /// The same in FP8, with a scale per block of `block` by `block`.
    #[cfg(test)]
    pub(crate) fn drawn_in_fp8(hidden: usize, inner: usize, block: usize, compute: Compute) -> Self {
        let draw = |[out, inner]: [usize; 2]| {
            // Every code but those that are no number.
            let codes = Tensor::randint(256, [out as i64, inner as i64], (tch::Kind::Uint8, tch::Device::Cpu));
            let codes = codes.masked_fill(&codes.bitwise_and(0x7f).eq(0x7f), 0x80);
            let scales = Tensor::rand(
                [(out.div_ceil(block) * inner.div_ceil(block)) as i64],
                (tch::Kind::Float, tch::Device::Cpu),
            );
            let (codes, scales) = (Weight::owned(codes), Weight::owned(scales * 1e-3 + 1e-4));
            Linear::as_stored(Stored::Fp8 { codes, scales, block }, compute)
        };
        let mlp = Mlp { gate: draw([inner, hidden]), up: draw([inner, hidden]), down: draw([hidden, inner]), compute };
        Self { mlp, compute, hidden, slot: None }
    }

    /// Whether our own kernels compute `rows` rows, so that several experts can be computed as one piece of work.
    pub(crate) fn by_kernels(&self, rows: usize) -> bool {
        self.compute.device == Device::Cpu && !self.mlp.for_libtorch(rows as i64)
    }

    /// As kernels see it, with rows `[n, D]` and where what becomes of them goes.
    pub(crate) fn network<'a>(&'a self, x: Source<'a>, out: Out<'a>) -> Network<'a> {
        self.mlp.network(x, out)
    }
}
