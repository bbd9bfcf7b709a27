//! When a request's time is up, and what its client is told then.
//!
//! In: the call's `grpc-timeout`, the router's own limit. Out: an instant, and the failure for when it passes.
//! Never here: waiting.

use std::time::{Duration, Instant};

use conclave_proto::status::Failure;
use tonic::metadata::MetadataMap;

/// The most time that is kept back for the way home.
const MARGIN_MAX: Duration = Duration::from_millis(500);
/// The longest that any request may take, whatever the configuration says: an instant must be able to hold it.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);
/// When to try again for an expert that nobody holds: a controller has re-placed it by then, or will not soon.
const HOLDER_RETRY: Duration = Duration::from_secs(1);

/// The instant by which an answer must be complete: the client's timeout less a margin (a tenth, at most half a
/// second), so that our status arrives before the client's own clock ends the call with a vague one; never later than `limit`.
/// A client that names no timeout gets `limit`.
///
/// # Errors
/// `InvalidArgument` for a malformed header, `DeadlineExceeded` for one that leaves no time at all.
pub(super) fn of_call(metadata: &MetadataMap, limit: Duration, now: Instant) -> Result<Instant, Failure> {
    let limit = limit.min(LIMIT_MAX);
    let Some(header) = metadata.get("grpc-timeout") else { return Ok(now + limit) };
    let timeout = header
        .to_str()
        .ok()
        .and_then(parse)
        .ok_or_else(|| Failure::invalid("grpc-timeout", "must be 1 to 8 digits and one of H, M, S, m, u, n"))?;
    if timeout.is_zero() {
        return Err(Failure::deadline("the deadline had passed when the request arrived"));
    }
    let margin = (timeout / 10).min(MARGIN_MAX);
    Ok(now + (timeout - margin).min(limit))
}

/// Reads the header's value, as the gRPC specification over HTTP/2 writes it: `TimeoutValue TimeoutUnit`.
fn parse(value: &str) -> Option<Duration> {
    let unit_at = value.len().checked_sub(1)?;
    let (digits, unit) = value.split_at_checked(unit_at)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Eight digits: no unit below can overflow.
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// What a client is told whose deadline passed. `waiting_for` is what the engine's step waits for, if for anything:
/// then the cluster was at fault, not the request's length, and trying again may help.
pub(super) fn passed(waiting_for: Option<String>) -> Failure {
    match waiting_for {
        Some(what) => Failure::unavailable("NO_EXPERT_HOLDER", what, HOLDER_RETRY),
        None => Failure::deadline("the deadline passed before the answer was complete"),
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::status::ErrorKind;
    use proptest::prelude::*;

    use super::*;

    fn of(header: &'static str, limit: Duration) -> Result<Duration, Failure> {
        let now = Instant::now();
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", header.parse().unwrap());
        of_call(&metadata, limit, now).map(|deadline| deadline - now)
    }

    const LIMIT: Duration = Duration::from_secs(600);

    #[test]
    fn every_unit_is_read_and_a_margin_kept() {
        assert_eq!(of("1H", Duration::from_secs(9_999)).unwrap(), Duration::from_millis(3_599_500));
        assert_eq!(of("2M", LIMIT).unwrap(), Duration::from_millis(119_500));
        assert_eq!(of("1S", LIMIT).unwrap(), Duration::from_millis(900));
        assert_eq!(of("100m", LIMIT).unwrap(), Duration::from_millis(90));
        assert_eq!(of("100u", LIMIT).unwrap(), Duration::from_micros(90));
        assert_eq!(of("100n", LIMIT).unwrap(), Duration::from_nanos(90));
    }

    #[test]
    fn no_timeout_and_an_endless_one_get_the_routers_limit() {
        let now = Instant::now();
        assert_eq!(of_call(&MetadataMap::new(), LIMIT, now).unwrap(), now + LIMIT);
        assert_eq!(of("99999999H", LIMIT).unwrap(), LIMIT);
    }

    #[test]
    fn a_malformed_timeout_is_refused_and_a_spent_one_said_so() {
        for bad in ["", "S", "5", "5x", "-5S", "+5S", "5 S", "123456789S", "1.5S"] {
            assert_eq!(of(bad, LIMIT).unwrap_err().kind, ErrorKind::InvalidArgument, "{bad:?}");
        }
        assert_eq!(of("0S", LIMIT).unwrap_err().kind, ErrorKind::DeadlineExceeded);
    }

    #[test]
    fn a_deadline_spent_on_a_missing_expert_may_be_tried_again() {
        let failure = passed(Some("expert 3 of layer 1 has no holder".to_owned()));
        assert_eq!((failure.kind, failure.reason), (ErrorKind::Unavailable, "NO_EXPERT_HOLDER"));
        assert_eq!(failure.retry_after, Some(HOLDER_RETRY));
        assert_eq!(passed(None).kind, ErrorKind::DeadlineExceeded);
    }

    proptest! {
        #[test]
        fn no_header_panics(value in ".*") {
            let _ = parse(&value);
        }

        #[test]
        fn what_grpc_writes_is_read(count in 0_u64..100_000_000) {
            prop_assert_eq!(parse(&format!("{count}m")), Some(Duration::from_millis(count)));
        }
    }
}
