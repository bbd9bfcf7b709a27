//! One request: it goes to the router, and the times at which its answer's parts arrive come back as a [`Sample`],
//! whatever happens to it. Nothing is tried twice.

use std::time::Duration;

use conclave_proto::inference::v1 as pb;
use conclave_proto::inference::v1::inference_client::InferenceClient;
use pb::generate_response::Event;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::client;

/// What one request came to.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    /// Since the start: when it was to be sent.
    pub(super) due: Duration,
    /// Since the start: when it was.
    pub(super) sent: Duration,
    /// Since the start.
    pub(super) ended: Duration,
    pub(super) prompt_tokens: u32,
    /// Of the prompt's tokens, those found in the prefix cache.
    pub(super) cached_tokens: u32,
    /// Per message with tokens: when it came, since `sent`, and how many tokens it brought.
    pub(super) messages: Vec<(Duration, usize)>,
    pub(super) ending: Ending,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ending {
    /// The whole answer came.
    Finished,
    /// What the status was, and what it means for people.
    Failed(Code, String),
    /// Given up when the run was stopped.
    Interrupted,
}

impl Sample {
    pub(super) fn is_successful(&self) -> bool {
        self.ending == Ending::Finished
    }

    pub(super) fn output_tokens(&self) -> usize {
        self.messages.iter().map(|(_, tokens)| tokens).sum()
    }

    /// From sending to the first token; none where no token came.
    pub(super) fn first_token(&self) -> Option<Duration> {
        self.messages.first().map(|(at, _)| *at)
    }

    /// Between the first token and the last, per token after the first; none where fewer than two came.
    pub(super) fn per_output_token(&self) -> Option<Duration> {
        let ((first, _), (last, _)) = (self.messages.first()?, self.messages.last()?);
        let after_first = u32::try_from(self.output_tokens().checked_sub(1)?).ok()?;
        last.saturating_sub(*first).checked_div(after_first)
    }

    /// The time from each token to the next: one fewer than there are tokens. A message's tokens arrive together, so a
    /// message of k tokens is the gap since the message before it, once, and k - 1 gaps of zero: the sum of the gaps is
    /// the time between the first and the last token, however the router groups them.
    pub(super) fn gaps(&self) -> impl Iterator<Item = Duration> + '_ {
        let times = self.messages.iter().flat_map(|(at, tokens)| std::iter::repeat_n(*at, *tokens));
        let next = times.clone().skip(1);
        times.zip(next).map(|(one, next)| next.saturating_sub(one))
    }
}

/// Sends `request`, due at `due` after `start`, and reads its answer to the end, for at most `timeout`.
pub(super) async fn ask(
    mut client: InferenceClient<Channel>,
    request: pb::GenerateRequest,
    (start, due): (Instant, Duration),
    timeout: Duration,
    stop: CancellationToken,
) -> Sample {
    let sent = Instant::now();
    let mut sample = Sample {
        due,
        sent: sent - start,
        ended: Duration::ZERO,
        prompt_tokens: 0,
        cached_tokens: 0,
        messages: Vec::new(),
        ending: Ending::Interrupted,
    };
    let mut request = Request::new(request);
    // The router keeps a margin below it, so its own status, which says more, comes first.
    request.set_timeout(timeout);
    let answer = async {
        let mut stream = client.generate(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            match message.event {
                Some(Event::Started(started)) => {
                    sample.prompt_tokens = started.prompt_tokens;
                    sample.cached_tokens = started.cached_tokens;
                }
                Some(Event::Tokens(tokens)) if !tokens.tokens.is_empty() => {
                    sample.messages.push((sent.elapsed(), tokens.tokens.len()));
                }
                Some(Event::Finished(_)) => return Ok(()),
                _ => {}
            }
        }
        Err(Status::internal("the answer ended without its last event"))
    };
    let outcome = tokio::select! {
        outcome = tokio::time::timeout(timeout, answer) => Some(outcome),
        () = stop.cancelled() => None,
    };
    sample.ending = match outcome {
        None => Ending::Interrupted,
        Some(Ok(Ok(()))) => Ending::Finished,
        Some(Ok(Err(status))) if sent.elapsed() < timeout => failed(&status),
        // The clock's word stands: tonic's own timer, which may be first, says CANCELLED.
        Some(_) => failed(&Status::deadline_exceeded("the answer was not complete")),
    };
    sample.ended = start.elapsed();
    sample
}

fn failed(status: &Status) -> Ending {
    Ending::Failed(status.code(), client::sentence(status))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::bench) fn sample(messages: &[(u64, usize)]) -> Sample {
        Sample {
            due: Duration::ZERO,
            sent: Duration::ZERO,
            ended: Duration::from_millis(messages.last().map_or(0, |(at, _)| *at)),
            prompt_tokens: 10,
            cached_tokens: 0,
            messages: messages.iter().map(|(at, tokens)| (Duration::from_millis(*at), *tokens)).collect(),
            ending: Ending::Finished,
        }
    }

    #[test]
    fn tokens_of_one_message_are_nothing_apart() {
        let sample = sample(&[(100, 2), (130, 1), (160, 3)]);
        let gaps: Vec<u128> = sample.gaps().map(|gap| gap.as_millis()).collect();
        assert_eq!(gaps, [0, 30, 30, 0, 0]);
        assert_eq!(sample.first_token(), Some(Duration::from_millis(100)));
        assert_eq!(sample.per_output_token(), Some(Duration::from_millis(12)));
    }

    #[test]
    fn one_token_has_no_time_per_further_token_and_none_has_no_first() {
        let one = sample(&[(100, 1)]);
        assert_eq!((one.output_tokens(), one.per_output_token(), one.gaps().count()), (1, None, 0));
        let none = sample(&[]);
        assert_eq!((none.first_token(), none.per_output_token(), none.gaps().count()), (None, None, 0));
    }

    proptest! {
        #[test]
        fn gaps_are_one_fewer_than_tokens_and_sum_up_to_the_decode(
            mut times in prop::collection::vec(0_u64..10_000, 1..30), tokens in prop::collection::vec(1_usize..5, 30),
        ) {
            times.sort_unstable();
            let messages: Vec<_> = times.iter().copied().zip(tokens).collect();
            let sample = sample(&messages);
            prop_assert_eq!(sample.gaps().count(), sample.output_tokens() - 1);
            let whole = Duration::from_millis(times[times.len() - 1] - times[0]);
            prop_assert_eq!(sample.gaps().sum::<Duration>(), whole);
        }
    }
}
