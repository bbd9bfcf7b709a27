//! Products with stored weights, on the processor.
//!
//! In: rows of activations, and weights where and as they are stored: f32 or BF16 in place in the mapped file, FP8 with
//! its block scales. Out: rows. Never here: a weight copied or expanded beyond what a core's own cache holds; a row whose bits
//! depend on how many rows came along, on which thread computed it, or in which order.
//!
//! That last promise is kept by giving every output one order of summation: over the inner dimension, in steps that the
//! instruction set fixes. Rows and outputs are only ever divided between steps, never within a sum. Two instruction sets
//! may differ in the last places; two processors with the same one do not.
//!
//! Reading order: [`isa`] says what this processor can do, [`team`] divides work over threads, [`matrix`] and [`operand`]
//! are the two sides of a product, [`reference`] says plainly what a product is; [`lanes`], [`pairs`] and [`tiles`] (the last two by way of [`e4m3`]) compute
//! it with vectors of f32, with dot products of BF16 pairs, and with AMX; [`product`] and [`swiglu`] put it to use. Then what
//! goes row by row: [`rowwise`], and [`attention`] over the latent cache; [`tensor`] is the door to libtorch's memory.

// Vector registers, tiles and threads that share memory: this is the room for it. Each use says why it is sound.
#![allow(unsafe_code)]

pub(crate) mod isa;
pub(crate) mod team;
pub(crate) mod matrix;
pub(crate) mod operand;
#[cfg(test)]
mod reference;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod e4m3;
#[cfg(target_arch = "x86_64")]
mod pairs;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub(crate) mod product;
pub(crate) mod swiglu;
pub(crate) mod rowwise;
pub(crate) mod attention;
pub(crate) mod tensor;

pub(crate) use isa::Isa;
pub(crate) use matrix::Matrix;
pub(crate) use operand::{Format, Operand, Rows, Source};

/// The first `count` values of what a thread keeps from product to product, whatever they are.
fn grown(kept: &mut Vec<f32>, count: usize) -> &mut [f32] {
    if kept.len() < count {
        kept.resize(count, 0.0);
    }
    &mut kept[..count]
}
