//! What is left of a cluster when far more is asked of it than it can do. In: a checkpoint, served by one router and two
//! workers. Out: by offered load, from half of the measured capacity to ten times as much, how many requests a second are
//! answered whole within their deadlines (goodput), and what became of the others. Requests arrive whether or not earlier
//! ones were answered, each with a deadline as clients set them; nothing that was refused is sent again.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use conclave_proto::inference::v1 as pb;
use conclave_proto::inference::v1::generate_response::Event;
use conclave_proto::inference::v1::inference_client::InferenceClient;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::cluster::{Cluster, WORKERS, measured};
use crate::prompts::Prompts;
use crate::stats::Samples;

const PROMPT: usize = 16;
const TOKENS: u32 = 8;
/// In flight while the capacity is measured: as many as a step takes by default.
const FULL: usize = 32;
/// The capacity is counted for so long, after as long again to get going.
const CAPACITY: Duration = Duration::from_secs(15);
/// Offered loads, in capacities.
const LOADS: [f64; 6] = [0.5, 0.8, 1.0, 2.0, 5.0, 10.0];
/// All loads are offered this often, one after the other: a machine that slows down slows each of them.
const ROUNDS: usize = 2;
/// Deadlines, in median answers of a full cluster: one half of the clients is patient, the other is less so.
const DEADLINES: [f64; 2] = [3.0, 6.0];
/// And no deadline is shorter.
const LEAST_DEADLINE: Duration = Duration::from_secs(1);
/// Each load is counted for so many of the longest deadlines, after one more to get going.
const COUNTED: u32 = 2;
/// A router takes 128 streams on one connection; more would queue in this client unseen.
const CONNECTIONS: usize = 16;

/// What became of one request.
#[derive(Debug, Clone)]
struct Ended {
    at: Instant,
    took: Duration,
    outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Whole,
    /// Turned away at once: the cluster said that it would not be answered in time.
    Refused,
    /// Its deadline passed.
    Late,
    /// What its status said.
    Failed(String),
}

/// One offered load, all rounds together.
#[derive(Debug, Clone, Default)]
struct Row {
    /// In capacities.
    load: f64,
    counted: Duration,
    /// Requests that were due in the time that is counted; the others are those that ended in it.
    offered: usize,
    refused: usize,
    late: usize,
    failed: Vec<String>,
    whole_ms: Samples,
    refused_ms: Samples,
}

#[derive(Debug)]
pub(crate) struct Report {
    model: String,
    /// Answers a second with as many requests in flight as a step takes.
    capacity: f64,
    /// Of them, the median.
    answer: Duration,
    deadlines: [Duration; 2],
    rows: Vec<Row>,
}

/// Starts a cluster, measures its capacity, then each load in turn, stops it.
pub(crate) async fn measure(model: &Path) -> anyhow::Result<Report> {
    measured(model, async |cluster| by_load(cluster, model).await).await
}

async fn by_load(cluster: &Cluster, model: &Path) -> anyhow::Result<Report> {
    let mut prompts = Prompts::new(cluster.model().await?.vocab_size);
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(cluster.client().await?);
    }
    eprintln!("overload: capacity, {FULL} requests in flight");
    let (capacity, answer) = capacity(&clients, &mut prompts).await?;
    let deadlines = DEADLINES.map(|factor| answer.mul_f64(factor).max(LEAST_DEADLINE));
    let mut rows = LOADS.map(|load| Row { load, ..Row::default() }).to_vec();
    for round in 1..=ROUNDS {
        for row in &mut rows {
            eprintln!(
                "overload: round {round} of {ROUNDS}, {} times the capacity of {capacity:.1} requests/s",
                row.load
            );
            offer(&clients, &mut prompts, row, capacity, deadlines).await?;
        }
    }
    Ok(Report { model: model.display().to_string(), capacity, answer, deadlines, rows })
}

/// Answers a second with [`FULL`] requests always in flight, and how long the median one takes.
async fn capacity(clients: &[InferenceClient<Channel>], prompts: &mut Prompts) -> anyhow::Result<(f64, Duration)> {
    let no_deadline = Duration::from_secs(300);
    let from = Instant::now() + CAPACITY;
    let until = from + CAPACITY;
    let mut asked = JoinSet::new();
    let mut took = Samples::default();
    let mut sent = 0;
    while Instant::now() < until {
        while asked.len() < FULL {
            asked.spawn(ask(clients[sent % clients.len()].clone(), prompts.draw(PROMPT), no_deadline));
            sent += 1;
        }
        let ended: Ended = asked.join_next().await.context("nothing is in flight")??;
        ensure!(ended.outcome == Outcome::Whole, "a request without any load failed: {:?}", ended.outcome);
        if ended.at >= from && ended.at < until {
            took.push(ended.took.as_secs_f64());
        }
    }
    while asked.join_next().await.is_some() {}
    ensure!(took.count() > 0, "no request was answered within {CAPACITY:?}");
    Ok((took.count() as f64 / CAPACITY.as_secs_f64(), Duration::from_secs_f64(took.median())))
}

/// Sends the row's load times `capacity` requests a second, at random (Poisson), and counts what ended after a first deadline.
async fn offer(
    clients: &[InferenceClient<Channel>],
    prompts: &mut Prompts,
    row: &mut Row,
    capacity: f64,
    deadlines: [Duration; 2],
) -> anyhow::Result<()> {
    let longest = deadlines[0].max(deadlines[1]);
    let mut random = StdRng::seed_from_u64(0);
    let from = Instant::now() + longest;
    let until = from + longest * COUNTED;
    let (mut asked, mut ended, mut sent) = (JoinSet::new(), Vec::new(), 0);
    let mut due = Instant::now();
    while due < until {
        tokio::select! {
            () = tokio::time::sleep_until(due) => {
                let deadline = deadlines[sent % deadlines.len()];
                asked.spawn(ask(clients[sent % clients.len()].clone(), prompts.draw(PROMPT), deadline));
                sent += 1;
                row.offered += usize::from(due >= from);
                due += Duration::from_secs_f64(-(1.0 - random.random::<f64>()).ln() / (row.load * capacity));
            }
            Some(one) = asked.join_next() => ended.push(one?),
        }
    }
    // What is in flight ends within its deadline, outside of the time that is counted; the next load finds the cluster idle.
    while let Some(one) = asked.join_next().await {
        ended.push(one?);
    }
    row.counted += until - from;
    ended.into_iter().filter(|one| one.at >= from && one.at < until).for_each(|one| row.add(one));
    Ok(())
}

/// One answer of [`TOKENS`] tokens, to its end or its deadline.
async fn ask(mut client: InferenceClient<Channel>, prompt: Vec<u32>, deadline: Duration) -> Ended {
    let mut request = Request::new(pb::GenerateRequest {
        input: Some(pb::generate_request::Input::Tokens(pb::TokenIds { ids: prompt })),
        sampling: Some(pb::SamplingParams { temperature: Some(0.0), ..Default::default() }),
        stop: Some(pb::StopParams { max_tokens: Some(TOKENS), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    });
    request.set_timeout(deadline);
    let began = Instant::now();
    let answer = async {
        let mut stream = client.generate(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            if let Some(Event::Finished(_)) = message.event {
                return Ok(());
            }
        }
        Err(tonic::Status::internal("the answer ended without its last event"))
    };
    let outcome = match tokio::time::timeout(deadline, answer).await {
        Ok(Ok(())) => Outcome::Whole,
        Ok(Err(status)) if status.code() == Code::ResourceExhausted => Outcome::Refused,
        // tonic's own timer says CANCELLED.
        Ok(Err(status)) if matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) => Outcome::Late,
        Ok(Err(status)) => Outcome::Failed(format!("{:?}: {}", status.code(), status.message())),
        Err(_) => Outcome::Late,
    };
    Ended { at: Instant::now(), took: began.elapsed(), outcome }
}

impl Row {
    fn add(&mut self, ended: Ended) {
        let ms = ended.took.as_secs_f64() * 1e3;
        match ended.outcome {
            Outcome::Whole => self.whole_ms.push(ms),
            Outcome::Refused => {
                self.refused += 1;
                self.refused_ms.push(ms);
            }
            Outcome::Late => self.late += 1,
            Outcome::Failed(why) => self.failed.push(why),
        }
    }

    /// Requests a second.
    fn offered(&self) -> f64 {
        self.offered as f64 / self.counted.as_secs_f64()
    }

    fn goodput(&self) -> f64 {
        self.whole_ms.count() as f64 / self.counted.as_secs_f64()
    }
}

impl Report {
    /// The most that any load brought.
    fn peak(&self) -> f64 {
        self.rows.iter().map(|row| row.goodput()).fold(f64::NAN, f64::max)
    }

    /// Goodput at the heaviest load, of the peak.
    fn kept(&self) -> f64 {
        self.rows.last().map_or(f64::NAN, |row| row.goodput() / self.peak())
    }

    pub(crate) fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "load": row.load, "offered_per_second": row.offered(), "goodput_per_second": row.goodput(),
                "of_peak": row.goodput() / self.peak(), "refused": row.refused, "late": row.late, "failed": row.failed.len(), "failures": row.failed,
                "whole_ms": row.whole_ms.to_json(), "refused_ms": row.refused_ms.to_json(),
            })
        });
        json!({
            "model": self.model, "dtype": "bf16", "workers": WORKERS, "prompt_tokens": PROMPT, "tokens": TOKENS,
            "capacity_per_second": self.capacity, "answer_ms": self.answer.as_secs_f64() * 1e3,
            "deadlines_ms": self.deadlines.map(|deadline| deadline.as_secs_f64() * 1e3),
            "rows": rows.collect::<Vec<_>>(), "peak_per_second": self.peak(), "goodput_at_most_load_over_peak": self.kept(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [one, other] = self.deadlines.map(|deadline| deadline.as_secs_f64());
        writeln!(
            f,
            "Overload of {}, bf16, router and {WORKERS} workers: prompts of {PROMPT} tokens, answers of {TOKENS},",
            self.model
        )?;
        writeln!(
            f,
            "sent at random whether or not earlier ones are answered, deadlines of {one:.1} and {other:.1} s in turns, no retries;"
        )?;
        writeln!(f, "each load was offered {ROUNDS} times, in turns.")?;
        writeln!(
            f,
            "Capacity, {FULL} in flight: {:.1} answers/s, the median one after {:.2} s.",
            self.capacity,
            self.answer.as_secs_f64()
        )?;
        writeln!(
            f,
            "{:>10} {:>11} {:>9} {:>7} {:>8} {:>6} {:>7} {:>15} {:>15} {:>16}",
            "× capacity",
            "offered/s",
            "good/s",
            "÷ peak",
            "refused",
            "late",
            "failed",
            "whole p50, ms",
            "whole p90, ms",
            "refused p50, ms"
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:>10} {:>11.1} {:>9.1} {:>7.2} {:>8} {:>6} {:>7} {:>15.0} {:>15.0} {:>16.1}",
                row.load,
                row.offered(),
                row.goodput(),
                row.goodput() / self.peak(),
                row.refused,
                row.late,
                row.failed.len(),
                row.whole_ms.median(),
                row.whole_ms.p90(),
                row.refused_ms.median()
            )?;
        }
        for row in self.rows.iter().filter(|row| !row.failed.is_empty()) {
            writeln!(f, "At {} times the capacity one that failed was told: {}", row.load, row.failed[0])?;
        }
        let most = LOADS[LOADS.len() - 1];
        writeln!(f, "Goodput at {most} times the capacity ÷ peak goodput: {:.2}", self.kept())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodput_counts_whole_answers_alone() {
        let mut row = Row { offered: 5, counted: Duration::from_secs(2), ..Row::default() };
        let failed = Outcome::Failed("why".to_owned());
        for outcome in [Outcome::Whole, Outcome::Whole, Outcome::Refused, Outcome::Late, failed] {
            row.add(Ended { at: Instant::now(), took: Duration::from_millis(10), outcome });
        }
        assert_eq!((row.offered(), row.goodput()), (2.5, 1.0));
        assert_eq!((row.refused, row.late, row.failed.len()), (1, 1, 1));
    }
}
