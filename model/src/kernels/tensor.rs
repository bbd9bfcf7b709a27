//! The door between libtorch's tensors and the kernels. In: tensors on the processor. Out: their memory as slices, for as long
//! as they are borrowed; or some rows of it. Never here: a device other than the processor.

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::{operand::Rows, product::Out, team};

/// The values of an f32 tensor. Panics where it is another kind of tensor.
pub(crate) fn f32s(tensor: &Tensor) -> &[f32] {
    slice(tensor, Kind::Float)
}

/// The values of a BF16 tensor.
pub(crate) fn bf16s(tensor: &Tensor) -> &[bf16] {
    slice(tensor, Kind::BFloat16)
}

/// The values of a tensor of bytes.
pub(crate) fn bytes(tensor: &Tensor) -> &[u8] {
    slice(tensor, Kind::Uint8)
}

/// BF16 values as two bytes each, in memory's order: that of the wire, as of the files that tensors are mapped from.
pub(crate) fn bytes_of_each(values: &[bf16]) -> &[[u8; 2]] {
    // SAFETY: a `bf16` is two bytes without a gap, any of which is a `u8`, and those need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

/// The values of a tensor in a format that models compute in.
pub(crate) fn rows(tensor: &Tensor) -> Rows<'_> {
    match tensor.kind() {
        Kind::Float => Rows::F32(f32s(tensor)),
        _ => Rows::Bf16(bf16s(tensor)),
    }
}

/// A tensor's memory, to be written to. The tensor must be kept, and not be read meanwhile.
pub(crate) fn out(tensor: &Tensor) -> Out<'static> {
    check(tensor, tensor.kind());
    match tensor.kind() {
        Kind::Float => Out::F32(tensor.data_ptr().cast()),
        Kind::BFloat16 => Out::Bf16(tensor.data_ptr().cast()),
        kind => panic!("kernels write no {kind:?}"),
    }
}

/// Rows `rows` of a matrix `[n, columns]`, `[rows, columns]`; by the team: libtorch would wake its own threads, and they do not go
/// to sleep soon.
pub(crate) fn gathered(matrix: &Tensor, rows: &[u32]) -> Tensor {
    /// What a thread takes at once.
    const AT_ONCE: usize = 16;
    let columns = matrix.size()[1];
    let gathered = Tensor::empty([rows.len() as i64, columns], (matrix.kind(), Device::Cpu));
    let (all, to, columns) = (self::rows(matrix), out(&gathered), columns as usize);
    team::run(rows.len().div_ceil(AT_ONCE), &|part| {
        for (at, row) in rows.iter().enumerate().skip(part * AT_ONCE).take(AT_ONCE) {
            // SAFETY: row `at`, which is this task's alone.
            unsafe { to.copy(at * columns, all.part(*row as usize * columns, columns)) };
        }
    });
    gathered
}

fn slice<T>(tensor: &Tensor, kind: Kind) -> &[T] {
    check(tensor, kind);
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: a contiguous tensor on the processor of `kind`, whose values are `T`s, as the three functions above pair
    // them; the tensor keeps the memory for as long as it is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast_const().cast(), tensor.numel()) }
}

fn check(tensor: &Tensor, kind: Kind) {
    assert!(
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous(),
        "kernels read contiguous {kind:?} on the processor, not {tensor:?}"
    );
}
