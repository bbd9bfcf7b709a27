//! The only crate that touches tensors: checkpoints, latent attention, the KV cache, gate, experts, sampler, tokenizer
//! and the wire's codecs.
//!
//! In: a checkpoint folder, token ids, rows from the wire. Out: hidden rows, routings, logits, drawn tokens.
//! Never here: sockets, async, threads other than libtorch's own and the one a chat template is rendered on, anything that
//! executes what a model folder holds.
//!
//! Shapes in comments use these letters:
//!
//! | letter | size |
//! |---|---|
//! | T | rows (tokens) in this call |
//! | S | tokens in a sequence's cache |
//! | D | `hidden_size` |
//! | I | an MLP's inner width |
//! | H | attention heads |
//! | N, R, V | per head: `qk_nope_head_dim`, `qk_rope_head_dim`, `v_head_dim` |
//! | C | `kv_lora_rank`, the latent |
//! | E, K | routed experts, chosen per token |

// A checkpoint, from files to weights.
pub mod config;
pub mod checkpoint;
pub mod generation;
pub mod tokenizer;
pub mod grammar;

// Where and how to compute, and how values get there.
pub mod device;
mod transfer;

// One forward pass, in the order a row meets the parts.
pub mod hidden;
pub(crate) mod kernels;
mod gpu;
#[cfg(test)]
#[path = "../tests/made_up_gpu/mod.rs"]
mod made_up_gpu;
mod linear;
mod norm;
mod rope;
pub mod cache;
pub mod batch;
mod mla;
pub mod gate;
pub mod expert;
mod block;
pub mod head;
pub mod transformer;
pub mod mtp;
pub mod sampler;

// What an expert worker computes, and how rows travel.
pub mod compute;
pub mod wire;

// The whole model in one process: what the cluster is tested against. And one expert as libtorch alone would have it: what
// ours is measured against.
pub mod oracle;
pub mod plain;

pub use hidden::Hidden;
