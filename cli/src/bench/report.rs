//! What is told in the end: samples come in, a report goes out, as a table for people or as JSON for scripts. Pure:
//! whatever was not measured is left out or null, never zero.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::distribution::Distribution;
use super::request::{Ending, Sample};
use crate::generate::code_name;
use crate::terminal;

/// What was asked for: the part of the report that is known before the run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Conditions {
    pub(super) model: String,
    pub(super) endpoint: String,
    pub(super) num_prompts: usize,
    /// Requests a second, or "inf".
    #[serde(serialize_with = "number_or_inf")]
    pub(super) request_rate: f64,
    pub(super) burstiness: f64,
    pub(super) max_concurrency: Option<u32>,
    pub(super) input_len: u32,
    pub(super) output_len: u32,
    pub(super) shared_prefix_len: u32,
    pub(super) seed: u64,
}

/// The keys are a contract with scripts. Tokens and times are those of successful requests alone.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    conditions: Conditions,
    successful: usize,
    failed: usize,
    /// By gRPC status code.
    failed_by_code: BTreeMap<String, usize>,
    /// In flight when the run was stopped.
    interrupted: usize,
    /// Not yet due, or waiting for a slot, when the run was stopped.
    not_sent: usize,
    /// From the start to the end of the last request.
    duration_s: f64,
    peak_concurrency: usize,
    input_tokens: u64,
    /// Of the input tokens, those found in the prefix cache.
    cached_tokens: u64,
    /// Of 1.
    cached_share: Option<f64>,
    output_tokens: u64,
    /// Successful requests a second.
    request_throughput: Option<f64>,
    /// Tokens a second.
    output_throughput: Option<f64>,
    /// Tokens a second, input and output together.
    total_token_throughput: Option<f64>,
    ttft_ms: Option<Distribution>,
    tpot_ms: Option<Distribution>,
    itl_ms: Option<Distribution>,
    e2e_ms: Option<Distribution>,
    /// From a request's due time to its sending, of every request that was sent.
    late_ms: Option<Distribution>,
    /// By code, what one of the failed requests was told.
    #[serde(skip)]
    examples: BTreeMap<String, String>,
}

impl Report {
    pub(super) fn of(conditions: Conditions, samples: &[Sample]) -> Self {
        let mut failed_by_code = BTreeMap::new();
        let mut examples = BTreeMap::new();
        for sample in samples {
            if let Ending::Failed(code, sentence) = &sample.ending {
                *failed_by_code.entry(code_name(*code)).or_insert(0) += 1;
                examples.entry(code_name(*code)).or_insert_with(|| sentence.clone());
            }
        }
        let good: Vec<&Sample> = samples.iter().filter(|sample| sample.is_successful()).collect();
        let interrupted = samples.iter().filter(|sample| sample.ending == Ending::Interrupted).count();
        let duration_s = samples.iter().map(|sample| sample.ended).max().unwrap_or_default().as_secs_f64();
        let input_tokens: u64 = good.iter().map(|sample| u64::from(sample.prompt_tokens)).sum();
        let cached_tokens: u64 = good.iter().map(|sample| u64::from(sample.cached_tokens)).sum();
        let output_tokens: u64 = good.iter().map(|sample| sample.output_tokens() as u64).sum();
        let per_second = |count: u64| (duration_s > 0.0).then(|| count as f64 / duration_s);
        Self {
            successful: good.len(),
            failed: failed_by_code.values().sum(),
            interrupted,
            not_sent: conditions.num_prompts.saturating_sub(samples.len()),
            duration_s,
            peak_concurrency: peak_concurrency(samples),
            input_tokens,
            cached_tokens,
            cached_share: (input_tokens > 0).then(|| cached_tokens as f64 / input_tokens as f64),
            output_tokens,
            request_throughput: per_second(good.len() as u64),
            output_throughput: per_second(output_tokens),
            total_token_throughput: per_second(input_tokens + output_tokens),
            ttft_ms: distribution(good.iter().filter_map(|sample| sample.first_token())),
            tpot_ms: distribution(good.iter().filter_map(|sample| sample.per_output_token())),
            itl_ms: distribution(good.iter().flat_map(|sample| sample.gaps())),
            e2e_ms: distribution(good.iter().map(|sample| sample.ended.saturating_sub(sample.sent))),
            late_ms: distribution(samples.iter().map(|sample| sample.sent.saturating_sub(sample.due))),
            conditions,
            failed_by_code,
            examples,
        }
    }

    pub(super) fn successful(&self) -> usize {
        self.successful
    }

    /// By code, what one of the requests that failed with it was told.
    pub(super) fn examples(&self) -> &BTreeMap<String, String> {
        &self.examples
    }

    pub(super) fn text(&self) -> String {
        let per_second = |figure: Option<f64>| figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.2}"));
        let share = self.cached_share.map(|share| format!(", {:.1} % cached", share * 100.0));
        let facts = [
            ("requests", self.endings()),
            ("duration", terminal::duration(Duration::from_secs_f64(self.duration_s))),
            ("peak concurrency", self.peak_concurrency.to_string()),
            ("input tokens", format!("{}{}", self.input_tokens, share.unwrap_or_default())),
            ("output tokens", self.output_tokens.to_string()),
            ("requests/s", per_second(self.request_throughput)),
            ("output tokens/s", per_second(self.output_throughput)),
            ("all tokens/s", per_second(self.total_token_throughput)),
        ];
        let facts = facts.map(|(name, value)| vec![name.to_owned(), value]);
        let mut times = vec![["ms", "mean", "p50", "p90", "p99", "max"].map(str::to_owned).to_vec()];
        let measured = [
            ("TTFT", &self.ttft_ms),
            ("TPOT", &self.tpot_ms),
            ("ITL", &self.itl_ms),
            ("E2E", &self.e2e_ms),
            ("late", &self.late_ms),
        ];
        for (name, distribution) in measured {
            let Some(Distribution { mean, p50, p90, p99, max }) = distribution else { continue };
            let cells = [mean, p50, p90, p99, max].map(|figure| format!("{figure:.2}"));
            times.push([name.to_owned()].into_iter().chain(cells).collect());
        }
        let (facts, times) = (terminal::table(&facts), terminal::table(&times));
        format!("{}\n\n{facts}\n{times}", self.conditions.sentence())
    }

    fn endings(&self) -> String {
        let mut text = format!("{} successful, {} failed", self.successful, self.failed);
        if self.failed > 0 {
            let codes: Vec<String> =
                self.failed_by_code.iter().map(|(code, count)| format!("{count} {code}")).collect();
            text.push_str(&format!(" ({})", codes.join(", ")));
        }
        if self.interrupted + self.not_sent > 0 {
            text.push_str(&format!(", {} interrupted, {} not sent", self.interrupted, self.not_sent));
        }
        text
    }
}

impl Conditions {
    fn sentence(&self) -> String {
        let pace = match (self.request_rate.is_finite(), self.max_concurrency) {
            (true, None) => format!("{} a second", self.request_rate),
            (true, Some(cap)) => format!("{} a second, at most {cap} in flight", self.request_rate),
            (false, None) => "all at once".to_owned(),
            (false, Some(cap)) => format!("{cap} in flight"),
        };
        format!("{} at {}: {}, {pace}", self.model, self.endpoint, terminal::plural(self.num_prompts, "request"))
    }
}

fn distribution(times: impl Iterator<Item = Duration>) -> Option<Distribution> {
    Distribution::of(times.map(|time| time.as_secs_f64() * 1e3).collect())
}

/// The most requests that were in flight at one time. One that ends when another begins was not beside it.
fn peak_concurrency(samples: &[Sample]) -> usize {
    let mut changes: Vec<(Duration, i64)> =
        samples.iter().flat_map(|sample| [(sample.sent, 1), (sample.ended, -1)]).collect();
    changes.sort_unstable();
    let (mut now, mut peak) = (0_i64, 0_i64);
    for (_, change) in changes {
        now += change;
        peak = peak.max(now);
    }
    usize::try_from(peak).unwrap_or_default()
}

/// JSON has no infinity.
fn number_or_inf<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if number.is_finite() { serializer.serialize_f64(*number) } else { serializer.serialize_str("inf") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tonic::Code;

    use super::super::request::tests::sample;
    use super::*;

    fn conditions(num_prompts: usize) -> Conditions {
        Conditions {
            model: "tiny".to_owned(),
            endpoint: "127.0.0.1:7400".to_owned(),
            num_prompts,
            request_rate: f64::INFINITY,
            burstiness: 1.0,
            max_concurrency: None,
            input_len: 10,
            output_len: 3,
            shared_prefix_len: 0,
            seed: 0,
        }
    }

    fn failed(code: Code) -> Sample {
        Sample { ending: Ending::Failed(code, "no".to_owned()), ..sample(&[(50, 1)]) }
    }

    fn between(sent: u64, ended: u64) -> Sample {
        let (sent, ended) = (Duration::from_millis(sent), Duration::from_millis(ended));
        Sample { sent, ended, ..sample(&[]) }
    }

    #[test]
    fn only_whole_answers_count_as_measured() {
        let cached = Sample { cached_tokens: 5, ..sample(&[(300, 1), (400, 2)]) };
        let interrupted = Sample { ending: Ending::Interrupted, ..sample(&[(900, 1)]) };
        let samples = [sample(&[(100, 1), (200, 2)]), cached, failed(Code::Unavailable), interrupted];
        let report = Report::of(conditions(6), &samples);
        assert_eq!((report.successful, report.failed, report.interrupted, report.not_sent), (2, 1, 1, 2));
        assert_eq!((report.input_tokens, report.cached_tokens, report.output_tokens), (20, 5, 6));
        assert_eq!((report.duration_s, report.cached_share), (0.9, Some(0.25)));
        assert_eq!((report.request_throughput, report.output_throughput), (Some(2.0 / 0.9), Some(6.0 / 0.9)));
        assert_eq!(report.total_token_throughput, Some(26.0 / 0.9));
        let p50 = |distribution: Option<Distribution>| distribution.unwrap().p50;
        assert_eq!((p50(report.ttft_ms), p50(report.tpot_ms), p50(report.itl_ms)), (200.0, 50.0, 50.0));
    }

    #[test]
    fn failures_are_told_by_their_code() {
        let samples = [failed(Code::Unavailable), failed(Code::ResourceExhausted), failed(Code::Unavailable)];
        let report = Report::of(conditions(3), &samples);
        assert_eq!(report.endings(), "0 successful, 3 failed (1 RESOURCE_EXHAUSTED, 2 UNAVAILABLE)");
        assert_eq!(report.examples().len(), 2);
        assert_eq!((report.ttft_ms, report.cached_share), (None, None));
    }

    #[test]
    fn nothing_measured_is_told_as_such() {
        let report = Report::of(conditions(3), &[]);
        let value = serde_json::to_value(&report).unwrap();
        assert_eq!(value["request_rate"], "inf");
        assert_eq!(
            (&value["ttft_ms"], &value["request_throughput"]),
            (&serde_json::Value::Null, &serde_json::Value::Null)
        );
        assert!(report.text().contains("0 successful, 0 failed, 0 interrupted, 3 not sent"), "{}", report.text());
    }

    #[test]
    fn who_leaves_when_another_comes_was_not_beside_it() {
        assert_eq!(peak_concurrency(&[between(0, 10), between(10, 20), between(20, 30)]), 1);
        assert_eq!(peak_concurrency(&[between(0, 30), between(10, 20), between(15, 40)]), 3);
        assert_eq!(peak_concurrency(&[]), 0);
    }

    proptest! {
        #[test]
        fn every_request_has_one_ending(endings in prop::collection::vec(0..4_u8, 0..40), more in 0_usize..5) {
            let of = |ending: &u8| match ending {
                0 => sample(&[(10, 1), (20, 1)]),
                1 => failed(Code::Unavailable),
                2 => failed(Code::DeadlineExceeded),
                _ => Sample { ending: Ending::Interrupted, ..sample(&[]) },
            };
            let samples: Vec<Sample> = endings.iter().map(of).collect();
            let report = Report::of(conditions(samples.len() + more), &samples);
            let told = report.successful + report.failed + report.interrupted + report.not_sent;
            prop_assert_eq!(told, samples.len() + more);
            prop_assert_eq!(report.failed_by_code.values().sum::<usize>(), report.failed);
            prop_assert!(report.peak_concurrency <= samples.len());
        }
    }
}
