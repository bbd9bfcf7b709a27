//! How fast this machine reads memory: nothing comes in, bytes per second go out. Threads sum a buffer that no cache holds,
//! each its own part. The fastest of several passes counts: this is a limit, and what else the machine does only hides it.

use std::time::Instant;

/// Of the buffer; no larger than a quarter of what is free, so that nothing is pushed out for it.
const MOST: u64 = 4 << 30;
const PASSES: usize = 5;
/// Sums that do not wait for each other.
const LANES: usize = 32;

/// Bytes a second with `threads` threads.
pub(crate) fn read(threads: usize) -> f64 {
    let bytes = MOST.min(available().unwrap_or(MOST) / 4) as usize;
    let part = bytes / 8 / threads.max(1);
    // Written to, so that each page is a page of its own and not the one zero page.
    let mut buffer = vec![1u64; part * threads.max(1)];
    buffer.iter_mut().step_by(512).for_each(|word| *word = 2);
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let began = Instant::now();
        let total = std::thread::scope(|scope| {
            let summing: Vec<_> = buffer.chunks_exact(part).map(|part| scope.spawn(|| sum(part))).collect();
            summing.into_iter().map(|thread| thread.join().unwrap_or_default()).fold(0, u64::wrapping_add)
        });
        std::hint::black_box(total);
        best = best.min(began.elapsed().as_secs_f64());
    }
    (buffer.len() * 8) as f64 / best
}

fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let mut lines = words.chunks_exact(LANES);
    for line in &mut lines {
        for (lane, word) in lanes.iter_mut().zip(line) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(lines.remainder()).fold(0, |sum, word| sum.wrapping_add(*word))
}

fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.trim().strip_suffix(" kB")?;
    Some(kib.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_in_the_sum() {
        for count in [0, 1, LANES - 1, LANES, 3 * LANES + 7] {
            let words: Vec<u64> = (0..count as u64).collect();
            assert_eq!(sum(&words), words.iter().sum::<u64>());
        }
    }
}
