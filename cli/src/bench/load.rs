//! The generator: a workload comes in, each request leaves at its time on a task of its own, samples come back in the
//! order in which requests ended. One loop owns all of it, so what is in flight is known exactly; it never waits for an
//! answer while a request is due and may leave.

use std::time::Duration;

use anyhow::{bail, ensure};
use conclave_proto::inference::v1 as pb;
use conclave_proto::inference::v1::inference_client::InferenceClient;
use indicatif::{ProgressBar, ProgressStyle};
use pb::generate_request::Input;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::request::{self, Ending, Sample};
use super::workload::{Planned, Workload};
use crate::client;

/// A router allows 128 streams on one connection; with more in flight, requests would queue in this client unseen.
const STREAMS_A_CONNECTION: usize = 100;

/// What to send, and how.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) endpoint: String,
    /// Connected to it, so that no request pays for that.
    pub(super) client: InferenceClient<Channel>,
    /// In flight at once.
    pub(super) max_concurrency: Option<usize>,
    pub(super) temperature: f32,
    pub(super) ignore_eos: bool,
    /// Of each request.
    pub(super) timeout: Duration,
    pub(super) workload: Workload,
}

impl Load {
    /// Sends `count` requests one after the other and forgets them. One that fails ends the run: nothing that follows
    /// would be worth measuring.
    pub(super) async fn warm_up(&self, count: u32, stop: &CancellationToken) -> anyhow::Result<()> {
        let bar = bar("warming up", u64::from(count));
        for planned in self.workload.warm_up(count) {
            let now = (Instant::now(), Duration::ZERO);
            let sample =
                request::ask(self.client.clone(), self.request(planned), now, self.timeout, stop.clone()).await;
            if let Ending::Failed(_, sentence) = sample.ending {
                bail!("a request to warm up failed: {sentence}");
            }
            ensure!(!stop.is_cancelled(), "interrupted before anything was measured");
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Sends everything, or what is due until `stop`, and waits for every answer, or until `stop`.
    pub(super) async fn run(&self, stop: &CancellationToken) -> anyhow::Result<Vec<Sample>> {
        let plan = self.workload.plan();
        let bar = bar("requests", plan.len() as u64);
        let mut plan = plan.into_iter().peekable();
        let mut connections = Connections::new(&self.endpoint, self.client.clone());
        let mut asked = JoinSet::new();
        let mut samples = Vec::new();
        let start = Instant::now();
        loop {
            let may_send = !stop.is_cancelled() && self.max_concurrency.is_none_or(|cap| asked.len() < cap);
            let due = plan.peek().filter(|_| may_send).map(|planned| start + planned.due);
            tokio::select! {
                // Whatever ended frees a slot before the next request looks for one.
                biased;
                Some(ended) = asked.join_next() => {
                    let (connection, sample) = ended?;
                    connections.release(connection);
                    samples.push(sample);
                    bar.inc(1);
                }
                () = until(due), if due.is_some() => {
                    let Some(planned) = plan.next() else { continue };
                    let (connection, client) = connections.take()?;
                    let request = self.request(planned);
                    let ask = request::ask(client, request, (start, planned.due), self.timeout, stop.clone());
                    asked.spawn(async move { (connection, ask.await) });
                }
                () = stop.cancelled(), if due.is_some() => {}
                else => break,
            }
        }
        bar.finish_and_clear();
        Ok(samples)
    }

    fn request(&self, planned: Planned) -> pb::GenerateRequest {
        let seed = self.workload.seed.wrapping_add(u64::from(planned.index));
        pb::GenerateRequest {
            input: Some(Input::Tokens(pb::TokenIds { ids: self.workload.prompt(planned) })),
            sampling: Some(pb::SamplingParams {
                temperature: Some(self.temperature),
                seed: Some(seed),
                ..Default::default()
            }),
            stop: Some(pb::StopParams {
                max_tokens: Some(planned.output),
                ignore_eos: self.ignore_eos,
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Forever without an instant.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// As many connections as the requests in flight need.
struct Connections {
    endpoint: String,
    /// Each with its requests in flight.
    open: Vec<(InferenceClient<Channel>, usize)>,
}

impl Connections {
    fn new(endpoint: &str, first: InferenceClient<Channel>) -> Self {
        Self { endpoint: endpoint.to_owned(), open: vec![(first, 0)] }
    }

    /// The one with the fewest requests, or a new one where all are full. It is to be released by its number.
    fn take(&mut self) -> anyhow::Result<(usize, InferenceClient<Channel>)> {
        let idlest = (0..self.open.len()).min_by_key(|index| self.open[*index].1);
        let index = match idlest.filter(|index| self.open[*index].1 < STREAMS_A_CONNECTION) {
            Some(index) => index,
            None => {
                self.open.push((client::connect_lazily(&self.endpoint)?, 0));
                self.open.len() - 1
            }
        };
        let (client, in_flight) = &mut self.open[index];
        *in_flight += 1;
        Ok((index, client.clone()))
    }

    fn release(&mut self, index: usize) {
        if let Some((_, in_flight)) = self.open.get_mut(index) {
            *in_flight = in_flight.saturating_sub(1);
        }
    }
}

/// Progress on a terminal, nothing elsewhere.
fn bar(what: &'static str, length: u64) -> ProgressBar {
    if length == 0 {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length).with_prefix(what);
    if let Ok(style) = ProgressStyle::with_template("{prefix:>10} {bar:32} {pos}/{len}, {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_connection_gets_a_second_beside_it() {
        let nobody = "127.0.0.1:1";
        let mut connections = Connections::new(nobody, client::connect_lazily(nobody).unwrap());
        let mut taken: Vec<usize> = (0..STREAMS_A_CONNECTION).map(|_| connections.take().unwrap().0).collect();
        assert!(taken.iter().all(|index| *index == 0));
        taken.extend((0..STREAMS_A_CONNECTION).map(|_| connections.take().unwrap().0));
        assert_eq!(taken.iter().filter(|index| **index == 1).count(), STREAMS_A_CONNECTION);
        connections.release(0);
        assert_eq!(connections.take().unwrap().0, 0);
    }
}
