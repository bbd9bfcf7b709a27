//! The estimate against engines that are simulated: time is a number here.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const LONG: Duration = Duration::from_secs(3600);

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// An engine that starts one request every `service`, and clients who ask every `arrival` and wait `patience`.
struct Simulation {
    service: Duration,
    arrival: Duration,
    patience: Duration,
    bound: usize,
}

#[derive(Debug, Default)]
struct Outcome {
    /// Started with at least `service` left.
    in_time: usize,
    /// Started too late for an answer.
    too_late: usize,
    /// Left the queue unserved.
    expired: usize,
    refused: usize,
}

impl Simulation {
    /// What happened after `warm_up`, until `end`.
    fn run(&self, warm_up: Duration, end: Duration) -> Outcome {
        let zero = Instant::now();
        let mut admission = Admission::new(self.bound);
        let (mut line, mut outcome) = (VecDeque::new(), Outcome::default());
        let (mut arrival, mut free) = (Duration::ZERO, Duration::ZERO);
        while arrival < end {
            if let Some(&came) = line.front().filter(|&&came: &&Duration| free.max(came) <= arrival) {
                line.pop_front();
                let now = free.max(came);
                let left = (came + self.patience).saturating_sub(now);
                let counts = now >= warm_up;
                if left.is_zero() {
                    admission.left(zero + came + self.patience);
                    outcome.expired += usize::from(counts);
                    continue;
                }
                admission.started(zero + now);
                let count = if left >= self.service { &mut outcome.in_time } else { &mut outcome.too_late };
                *count += usize::from(counts);
                free = now + self.service;
                continue;
            }
            match admission.admit(zero + arrival, self.patience) {
                Ok(()) => line.push_back(arrival),
                Err(_) => outcome.refused += usize::from(arrival >= warm_up),
            }
            arrival += self.arrival;
        }
        outcome
    }
}

#[test]
fn ten_times_too_much_leaves_the_useful_work_as_it_is() {
    let simulation = Simulation { service: ms(300), arrival: ms(30), patience: ms(10_000), bound: 256 };
    // The queue that had built up before anything was known is gone after one patience.
    let outcome = simulation.run(ms(12_000), ms(132_000));
    let capacity = 120_000 / 300;
    assert!(outcome.in_time * 10 >= capacity * 9, "{outcome:?} of {capacity}");
    assert_eq!((outcome.too_late, outcome.expired), (0, 0), "{outcome:?}");
    assert!(outcome.refused > 8 * capacity, "{outcome:?}");
}

#[test]
fn who_comes_less_often_than_they_are_served_is_never_refused() {
    let simulation = Simulation { service: ms(300), arrival: ms(310), patience: ms(1_000), bound: 4 };
    let outcome = simulation.run(Duration::ZERO, ms(60_000));
    assert_eq!((outcome.refused, outcome.too_late, outcome.expired), (0, 0, 0));
}

#[test]
fn starts_of_the_same_step_are_counted_together() {
    let zero = Instant::now();
    let mut admission = Admission::new(1_000);
    for _ in 0..1_000 {
        admission.admit(zero, LONG).unwrap();
    }
    // Every eight seconds, a step takes 32 of them: a start every quarter of a second.
    for step in 0..10 {
        for _ in 0..32 {
            admission.started(zero + ms(8_000) * step);
        }
    }
    let now = zero + ms(72_001);
    let Err(Refusal::Late { wait, .. }) = admission.admit(now, ms(1_000)) else { panic!("many wait") };
    assert_eq!(wait, RETRY_MAX.min(ms(250) * u32::try_from(admission.waiting()).unwrap()));
    assert_eq!(admission.pace(now), Some(0.25));
}

#[test]
fn as_many_wait_as_may_and_a_place_given_up_is_free_at_once() {
    let now = Instant::now();
    let mut admission = Admission::new(2);
    for _ in 0..2 {
        admission.admit(now, ms(1)).expect("nothing is known that speaks against it");
    }
    assert_eq!(admission.admit(now, LONG), Err(Refusal::Full));
    admission.left(now);
    assert_eq!(admission.admit(now, LONG), Ok(()));
    admission.started(now);
    assert_eq!(admission.admit(now, LONG), Ok(()));
}

/// Ten waited; one started every two seconds, until one is left.
fn overloaded(zero: Instant) -> (Admission, Instant) {
    let mut admission = Admission::new(100);
    for _ in 0..10 {
        admission.admit(zero, LONG).unwrap();
    }
    for start in 0..9 {
        admission.started(zero + ms(2_000) * start);
    }
    (admission, zero + ms(16_000))
}

#[test]
fn who_is_refused_is_told_when_there_is_less_to_wait_for() {
    let (mut admission, now) = overloaded(Instant::now());
    assert_eq!(admission.admit(now, ms(4_000)), Ok(()), "one waits, two seconds of four");
    let (wait, retry_after) = (ms(4_000), ms(2_500));
    assert_eq!(admission.admit(now, ms(3_000)), Err(Refusal::Late { wait, retry_after }));
    let retry_after = RETRY_MIN;
    assert_eq!(admission.admit(now, ms(7_990)), Err(Refusal::Late { wait, retry_after }));
}

#[test]
fn an_engine_that_starts_nobody_is_noticed() {
    let (mut admission, now) = overloaded(Instant::now());
    assert_eq!(admission.admit(now, ms(5_000)), Ok(()));
    admission.left(now);
    assert!(admission.admit(now + ms(10_000), ms(5_000)).is_err(), "nobody started for ten seconds");
}

#[test]
fn after_an_overload_what_was_learnt_is_forgotten() {
    let (mut admission, now) = overloaded(Instant::now());
    admission.started(now + ms(2_000));
    // At once, it still holds for whoever would be second.
    let soon = now + ms(2_100);
    assert_eq!(admission.admit(soon, ms(1_000)), Ok(()), "nobody waits");
    assert!(admission.admit(soon, ms(1_000)).is_err());
    admission.left(soon);
    // After a while without anybody waiting, it does not.
    let later = now + ms(10_000);
    for _ in 0..100 {
        assert_eq!(admission.admit(later, ms(1_000)), Ok(()));
    }
}

proptest! {
    #[test]
    fn the_bound_holds_and_an_empty_queue_takes_anybody(
        bound in 1_usize..20,
        happenings in prop::collection::vec((0_u8..3, 0_u64..5_000, 0_u64..20_000), 0..200),
    ) {
        let mut now = Instant::now();
        let mut admission = Admission::new(bound);
        let mut waiting = 0_usize;
        for (what, later, patience) in happenings {
            now += ms(later);
            match what {
                0 if waiting > 0 => {
                    admission.started(now);
                    waiting -= 1;
                }
                1 if waiting > 0 => {
                    admission.left(now);
                    waiting -= 1;
                }
                _ => match admission.admit(now, ms(patience)) {
                    Ok(()) => waiting += 1,
                    Err(Refusal::Full) => prop_assert_eq!(waiting, bound),
                    Err(Refusal::Late { retry_after, .. }) => {
                        prop_assert!(waiting > 0);
                        prop_assert!((RETRY_MIN..=RETRY_MAX).contains(&retry_after));
                    }
                },
            }
            prop_assert_eq!(admission.waiting(), waiting);
            prop_assert!(waiting <= bound);
        }
    }

    #[test]
    fn whatever_the_overload_nobody_is_computed_for_nothing_once_it_is_known(
        service in 50_u64..2_000, times in 2_u64..20, patience in 5_u64..60,
    ) {
        let simulation = Simulation {
            service: ms(service),
            arrival: ms(service / times),
            patience: ms(service * patience),
            bound: 256,
        };
        let warm_up = ms(service * (patience + 10));
        let outcome = simulation.run(warm_up, warm_up + ms(service * 200));
        prop_assert_eq!((outcome.too_late, outcome.expired), (0, 0));
        prop_assert!(outcome.in_time >= 180, "{:?}", outcome);
    }
}
