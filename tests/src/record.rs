//! What came of a load: every token of every request, and when.
//!
//! In: the streams' notes, and what each request is answered undisturbed. Out: counts, stalls, rates. Pure. Never here: a
//! verdict; what is good enough is the drill's to say.

use std::{ops::Range, time::Duration};

use tokio::time::Instant;

/// How wide the windows are by which throughput is judged.
const WINDOW: Duration = Duration::from_secs(1);
/// Between two windows that are looked at.
const STEP: Duration = Duration::from_millis(50);

/// One request, as its client saw it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Which of the load's requests.
    pub request: usize,
    /// When it was sent.
    pub begun: Instant,
    /// Each with the moment it came.
    pub tokens: Vec<(u32, Instant)>,
    /// How often it went on at another router.
    pub resumed: usize,
    /// How it ended.
    pub end: End,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With its whole answer, as the router says.
    Finished,
    /// With this status.
    Failed(String),
    /// Not at all: neither an answer nor a status came, long after its deadline.
    Hung,
    /// Its client left.
    Left,
}

/// Everything that a load saw.
#[derive(Clone, Debug)]
pub struct Record {
    /// When the first request was sent.
    pub begun: Instant,
    /// When the last one had ended.
    pub ended: Instant,
    /// What each request is answered undisturbed.
    pub expected: Vec<Vec<u32>>,
    /// All of them, in no order.
    pub asked: Vec<Asked>,
}

impl Asked {
    /// The tokens' ids.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.tokens.iter().map(|(id, _)| *id)
    }

    /// From each moment of life to the next: the request, then its tokens.
    fn gaps(&self) -> impl Iterator<Item = Range<Instant>> + '_ {
        let moments = || [self.begun].into_iter().chain(self.tokens.iter().map(|(_, at)| *at));
        moments().zip(moments().skip(1)).map(|(from, to)| from..to)
    }

    /// Tokens that are not what they should be, missing and surplus ones included where the answer claims to be whole.
    fn differing(&self, expected: &[u32]) -> usize {
        let wrong = self.ids().zip(expected).filter(|(came, should)| came != *should).count();
        let surplus = self.tokens.len().saturating_sub(expected.len());
        let missing = if self.end == End::Finished { expected.len().saturating_sub(self.tokens.len()) } else { 0 };
        wrong + surplus + missing
    }
}

impl Record {
    /// Requests that ended so.
    pub fn count(&self, end: impl Fn(&End) -> bool) -> usize {
        self.asked.iter().filter(|asked| end(&asked.end)).count()
    }

    /// The first few reasons why requests failed.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.asked.iter().filter_map(|asked| match &asked.end {
            End::Failed(why) => Some(why.clone()),
            _ => None,
        });
        failed.take(5).collect()
    }

    /// How often a request went on at another router.
    pub fn resumed(&self) -> usize {
        self.asked.iter().map(|asked| asked.resumed).sum()
    }

    /// Tokens of all requests.
    pub fn tokens(&self) -> usize {
        self.asked.iter().map(|asked| asked.tokens.len()).sum()
    }

    /// Tokens that differ from the undisturbed answers.
    pub fn differing(&self) -> usize {
        self.asked.iter().map(|asked| asked.differing(&self.expected[asked.request])).sum()
    }

    /// The longest time within which a request that waited for its next token got none, of those that ended in `within`.
    /// The first token counts from the request; what never came, and a pause between two requests, do not count.
    pub fn longest_stall(&self, within: &Range<Instant>) -> Range<Instant> {
        let gaps = self.asked.iter().flat_map(Asked::gaps).filter(|gap| within.contains(&gap.end));
        gaps.max_by_key(|gap| gap.end - gap.start).unwrap_or(within.start..within.start)
    }

    /// The time between two tokens of a request that `share` of those within `within` do not exceed.
    pub fn latency(&self, within: &Range<Instant>, share: f64) -> Duration {
        let inner = self.asked.iter().flat_map(|asked| asked.gaps().skip(1));
        let mut gaps: Vec<Duration> =
            inner.filter(|gap| within.contains(&gap.end)).map(|gap| gap.end - gap.start).collect();
        gaps.sort_unstable();
        let index = (gaps.len() as f64 * share).ceil() as usize;
        gaps.get(index.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// Tokens a second within `within`.
    pub fn rate(&self, within: &Range<Instant>) -> f64 {
        let seconds = within.end.saturating_duration_since(within.start).as_secs_f64();
        let came = self.asked.iter().flat_map(|asked| &asked.tokens).filter(|(_, at)| within.contains(at)).count();
        if seconds > 0.0 { came as f64 / seconds } else { 0.0 }
    }

    /// The beginning of the first second, not before `from`, in which at least `rate` tokens came.
    pub fn flows_again(&self, from: Instant, rate: f64) -> Option<Instant> {
        let starts = std::iter::successors(Some(from), |start| Some(*start + STEP));
        let mut starts = starts.take_while(|start| *start + WINDOW <= self.ended);
        starts.find(|start| self.rate(&(*start..*start + WINDOW)) >= rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(begun: Instant, tokens: &[(u32, u64)], end: End) -> Asked {
        let at = |(id, millis): &(u32, u64)| (*id, begun + Duration::from_millis(*millis));
        Asked { request: 0, begun, tokens: tokens.iter().map(at).collect(), resumed: 0, end }
    }

    #[tokio::test]
    async fn what_should_have_come_and_did_not_counts_only_where_the_answer_claims_to_be_whole() {
        let now = Instant::now();
        let record = |tokens: &[(u32, u64)], end| Record {
            begun: now,
            ended: now + Duration::from_secs(9),
            expected: vec![vec![7, 8, 9]],
            asked: vec![asked(now, tokens, end)],
        };
        assert_eq!(record(&[(7, 1), (8, 2), (9, 3)], End::Finished).differing(), 0);
        assert_eq!(record(&[(7, 1), (8, 2)], End::Finished).differing(), 1);
        assert_eq!(record(&[(7, 1), (8, 2)], End::Failed("why".into())).differing(), 0);
        assert_eq!(record(&[(7, 1), (5, 2), (9, 3), (9, 4)], End::Left).differing(), 2);
    }

    #[tokio::test]
    async fn a_stall_is_the_longest_silence_and_flow_returns_after_it() {
        let begun = Instant::now();
        let at = |millis| begun + Duration::from_millis(millis);
        let mut tokens: Vec<(u32, u64)> = (1..100).map(|nth| (0, nth * 10)).collect();
        tokens.extend((0..200).map(|nth| (0, 3_000 + nth * 10)));
        let asked = vec![asked(begun, &tokens, End::Finished)];
        let record = Record { begun, ended: at(5_000), expected: vec![vec![0; 299]], asked };
        assert_eq!(record.longest_stall(&(begun..at(5_000))), at(990)..at(3_000));
        let before = record.longest_stall(&(begun..at(990)));
        assert_eq!(before.end - before.start, Duration::from_millis(10), "all are alike");
        assert_eq!(record.flows_again(at(990), 90.0), Some(at(2_940)));
        assert_eq!(record.flows_again(at(990), 101.0), None);
        assert_eq!(record.latency(&(begun..at(990)), 0.99), Duration::from_millis(10));
    }
}
