//! One forward pass: embed, then per layer attention here and experts elsewhere, then logits.
//!
//! In: sequences and how many of their pending tokens to compute. Out: logits for each.
//! Never here: drawing, choosing. A pass that fails leaves rows behind in the caches; the caller rewinds them.

use conclave_model::transformer::{FeedForward, Segment, Transformer};
use tokio::time::Instant;

use super::running::{Running, StepLogits};
use crate::moe::{Exchange, exchange};

/// Computes `batch`, complete or not at all, before `deadline`.
pub(super) async fn forward(
    transformer: &Transformer,
    exchange: &Exchange,
    batch: &mut [(&mut Running, usize)],
    deadline: Instant,
) -> Result<Vec<StepLogits>, exchange::Error> {
    let (mut tokens, mut positions) = (Vec::new(), Vec::new());
    for (sequence, count) in batch.iter() {
        let (start, next) = sequence.next_tokens(*count);
        positions.extend(start as i64..(start + next.len()) as i64);
        tokens.extend(next);
    }
    let positions = transformer.positions(&positions);
    let mut x = transformer.embed(&tokens);
    for block in transformer.blocks() {
        let mut segments: Vec<Segment<'_>> =
            batch.iter_mut().map(|(sequence, rows)| Segment { rows: *rows, cache: &mut sequence.cache }).collect();
        x = block.attend(&x, &positions, &mut segments);
        let normed = block.normed(&x);
        x = match block.feed_forward() {
            FeedForward::Dense(dense) => dense.forward(&x, &normed),
            FeedForward::Moe(moe) => {
                let routing = moe.route(&normed);
                let rows = normed.to_rows();
                // The exchange is polled first: its rows are on their way while the shared expert is computed here.
                let (routed, shared) = tokio::join!(
                    biased;
                    exchange.routed(block.layer() as u32, &rows, &routing, deadline),
                    async { moe.shared(&normed) }
                );
                moe.finish(&x, &routed?, shared)
            }
        };
    }
    let mut logits = Vec::with_capacity(batch.len());
    let mut start = 0;
    for (sequence, rows) in batch.iter() {
        let first = if sequence.wants_all_logits() { start } else { start + rows - 1 };
        let values = transformer.logits(&x, &(first..start + rows).collect::<Vec<_>>());
        logits.push(StepLogits { values, vocab: transformer.config().vocab_size });
        start += rows;
    }
    Ok(logits)
}
