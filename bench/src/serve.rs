//! What batching and the prefix cache are worth: a local cluster of one router and two workers, bf16, one run. Out:
//! decode tokens/s of 16 streams at once beside one stream, and the time to the first token of a long prompt beside
//! that of another prompt with the same beginning, sent after it. The sides are measured in turns.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};

use crate::cluster::{Cluster, WORKERS, measured};
use crate::prompts::Prompts;
use crate::stats::Samples;

const STREAMS: usize = 16;
const STREAM_PROMPT: usize = 32;
const STREAM_TOKENS: u32 = 48;
/// One stream and all streams take turns this often.
const TURNS: usize = 3;
/// Tokens that the two prompts of a pair begin with.
const PREFIX: usize = 1000;
/// Tokens after them, which differ.
const TAIL: usize = 16;
/// Enough to see that an answer goes on.
const TAIL_TOKENS: u32 = 2;
const PAIRS: usize = 5;

#[derive(Debug, Default)]
pub(crate) struct Report {
    model: String,
    /// Decode tokens/s.
    one_stream: Samples,
    all_streams: Samples,
    /// Milliseconds.
    first_time: Samples,
    repeated: Samples,
    /// Of the repeated prompt's tokens.
    cached_tokens: Samples,
}

/// Starts a cluster, measures, stops it.
pub(crate) async fn measure(model: &Path) -> anyhow::Result<Report> {
    measured(model, async |cluster| in_turns(cluster, model).await).await
}

async fn in_turns(cluster: &Cluster, model: &Path) -> anyhow::Result<Report> {
    let served = cluster.model().await?;
    let needed = PREFIX + TAIL + TAIL_TOKENS as usize;
    ensure!(needed <= served.context_tokens as usize, "the context of {} is below {needed} tokens", served.name);
    let mut prompts = Prompts::new(served.vocab_size);
    let mut report = Report::of(model);
    // Warms up.
    cluster.generate(&prompts.draw(STREAM_PROMPT), STREAM_TOKENS).await?;
    for turn in 1..=TURNS {
        eprintln!("serve: turn {turn} of {TURNS}, one stream, then {STREAMS}");
        for (streams, rate) in [(1, &mut report.one_stream), (STREAMS, &mut report.all_streams)] {
            rate.push(decode_rate(cluster, &mut prompts, streams, STREAM_PROMPT, STREAM_TOKENS).await?);
        }
    }
    for pair in 1..=PAIRS {
        eprintln!("serve: pair {pair} of {PAIRS}, {PREFIX} tokens seen first, then again");
        let prefix = prompts.draw(PREFIX);
        let first = cluster.generate(&[prefix.clone(), prompts.draw(TAIL)].concat(), TAIL_TOKENS).await?;
        let again = cluster.generate(&[prefix, prompts.draw(TAIL)].concat(), TAIL_TOKENS).await?;
        ensure!(first.cached_tokens == 0, "{} tokens of a fresh prompt were cached", first.cached_tokens);
        report.first_time.push(first.first_token.as_secs_f64() * 1e3);
        report.repeated.push(again.first_token.as_secs_f64() * 1e3);
        report.cached_tokens.push(f64::from(again.cached_tokens));
    }
    Ok(report)
}

/// Decode tokens/s of `streams` answers of `tokens` tokens that are begun together, all of them together.
pub(crate) async fn decode_rate(
    cluster: &Cluster,
    prompts: &mut Prompts,
    streams: usize,
    prompt_tokens: usize,
    tokens: u32,
) -> anyhow::Result<f64> {
    let prompts: Vec<_> = (0..streams).map(|_| prompts.draw(prompt_tokens)).collect();
    let answers = try_join_all(prompts.iter().map(|prompt| cluster.generate(prompt, tokens))).await?;
    let arrivals: Vec<_> = answers.into_iter().map(|answer| answer.arrivals).collect();
    rate_while_all_decode(&arrivals)
}

/// Tokens of all streams per second of the time in which all of them decode: from when the last stream's first token
/// has come until the first stream's last token comes. So neither prefills nor a thinning batch count.
fn rate_while_all_decode(arrivals: &[Vec<Instant>]) -> anyhow::Result<f64> {
    let from = arrivals.iter().filter_map(|stream| stream.first()).max().context("no stream")?;
    let until = arrivals.iter().filter_map(|stream| stream.last()).min().context("no stream")?;
    ensure!(from < until, "the streams never decoded at one time: more tokens are needed for that");
    let tokens = arrivals.iter().flatten().filter(|at| *at > from && *at <= until).count();
    Ok(tokens as f64 / (*until - *from).as_secs_f64())
}

impl Report {
    fn of(model: &Path) -> Self {
        Self { model: model.display().to_string(), ..Self::default() }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "model": self.model, "dtype": "bf16", "workers": WORKERS,
            "batching": {
                "streams": STREAMS, "prompt_tokens": STREAM_PROMPT, "tokens": STREAM_TOKENS,
                "one_stream_tokens_per_second": self.one_stream.to_json(),
                "all_streams_tokens_per_second": self.all_streams.to_json(),
                "all_over_one": self.gain(),
            },
            "prefix_cache": {
                "prefix_tokens": PREFIX, "tail_tokens": TAIL,
                "first_time_ms": self.first_time.to_json(), "repeated_ms": self.repeated.to_json(),
                "cached_tokens": self.cached_tokens.to_json(), "first_time_over_repeated": self.speedup(),
            },
        })
    }

    fn gain(&self) -> f64 {
        self.all_streams.median() / self.one_stream.median()
    }

    fn speedup(&self) -> f64 {
        self.first_time.median() / self.repeated.median()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, what: String, samples: &Samples| {
            let (median, least, most) = (samples.median(), samples.quantile(0.0), samples.quantile(1.0));
            writeln!(f, "{what:<62} {median:>9.1} {:>19}", format!("{least:.1}–{most:.1}"))
        };
        writeln!(f, "Serving {}, bf16, router and {WORKERS} workers, medians.", self.model)?;
        writeln!(f, "{:<62} {:>9} {:>19}", "Decode while all streams decode", "tokens/s", "range")?;
        row(f, "1 stream".to_owned(), &self.one_stream)?;
        row(f, format!("{STREAMS} streams, together"), &self.all_streams)?;
        writeln!(f, "{:<62} {:>9.2}", format!("{STREAMS} streams ÷ 1 stream"), self.gain())?;
        writeln!(f, "{:<62} {:>9} {:>19}", "Time to the first token", "ms", "range")?;
        row(f, format!("{PREFIX} tokens seen first, and {TAIL} of its own"), &self.first_time)?;
        row(f, format!("the same {PREFIX} tokens again, and {TAIL} others"), &self.repeated)?;
        writeln!(f, "{:<62} {:>9.2}", "first ÷ again", self.speedup())?;
        writeln!(f, "Of the {} tokens sent again, {:.0} were cached.", PREFIX + TAIL, self.cached_tokens.median())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_the_time_in_which_all_streams_decode_counts() {
        let start = Instant::now();
        let at = |milliseconds: &[u64]| milliseconds.iter().map(|ms| start + Duration::from_millis(*ms)).collect();
        // Together from 300 to 400 ms: after 300 come 350 and 400 of the first, 400 of the second.
        let streams: Vec<Vec<Instant>> = vec![at(&[100, 200, 350, 400]), at(&[300, 400, 900])];
        assert!((rate_while_all_decode(&streams).unwrap() - 30.0).abs() < 1e-9);
        let apart: Vec<Vec<Instant>> = vec![at(&[100, 200]), at(&[200, 300])];
        assert!(rate_while_all_decode(&apart).is_err());
        assert!(rate_while_all_decode(&[]).is_err());
    }
}
