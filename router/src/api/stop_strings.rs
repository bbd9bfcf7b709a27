//! Stop strings across token boundaries: which text may leave, and when the answer is over.
//!
//! In: the answer's text, piece by piece. Out: the text that no stop string can claim any more. Never here: tokens;
//! a part of a stop string let out; a result that depends on how the text was cut into pieces.

/// Holds text back for as long as it may turn out to begin a stop string.
///
/// The stop string that is complete first ends the answer; of several which are complete at the same character, the
/// longest. What comes before it is the answer.
#[derive(Clone, Debug)]
pub(super) struct HoldBack {
    stops: Vec<String>,
    /// The longest end of the text so far that begins a stop string: shorter than the longest of them.
    held: String,
}

/// What one more piece of text brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Released {
    /// May leave now.
    pub(super) text: String,
    /// The stop string that is complete: the answer ended with `text`.
    pub(super) stop: Option<String>,
}

impl HoldBack {
    /// For these stop strings, none of them empty.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece of the answer's text. Not to be called after a stop string was found.
    pub(super) fn push(&mut self, piece: &str) -> Released {
        if self.stops.is_empty() {
            return Released { text: piece.to_owned(), stop: None };
        }
        self.held.push_str(piece);
        // Whatever ends in this piece begins in `held`, so nothing before it needs to be looked at again.
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, stop)))
            .min_by_key(|&(end, start, _)| (end, start));
        if let Some((_, start, stop)) = first {
            let stop = stop.clone();
            self.held.truncate(start);
            return Released { text: self.take(), stop: Some(stop) };
        }
        let kept = self.held.split_off(self.open_from());
        Released { text: std::mem::replace(&mut self.held, kept), stop: None }
    }

    /// The text still held, when nothing comes after it.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of `held` begins that a stop string begins with; its length where there is none.
    fn open_from(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What left piece by piece, what was held at the end, and what stopped it.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, Option<String>) {
        let mut hold_back = HoldBack::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut left = Vec::new();
        for piece in pieces {
            let released = hold_back.push(piece);
            left.push(released.text);
            if released.stop.is_some() {
                return (left, String::new(), released.stop);
            }
        }
        (left, hold_back.take(), None)
    }

    #[test]
    fn without_stop_strings_everything_leaves_at_once() {
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into()], String::new(), None));
    }

    #[test]
    fn a_stop_string_over_three_pieces_never_shows() {
        let (left, _, stop) = run(&["\nUser:"], &["Paris.", "\n", "Us", "er: more"]);
        assert_eq!(left, ["Paris.", "", "", ""]);
        assert_eq!(stop.as_deref(), Some("\nUser:"));
    }

    #[test]
    fn a_false_alarm_leaves_late_but_whole() {
        assert_eq!(run(&["abc"], &["xa", "b", "d"]), (vec!["x".into(), "".into(), "abd".into()], String::new(), None));
        assert_eq!(run(&["abc"], &["xab"]), (vec!["x".into()], "ab".into(), None));
    }

    #[test]
    fn the_one_complete_first_wins_and_of_those_the_longest() {
        assert_eq!(run(&["abcd", "bc"], &["abcd"]), (vec!["a".into()], String::new(), Some("bc".into())));
        assert_eq!(run(&["c", "abc"], &["ab", "c"]), (vec!["".into(), "".into()], String::new(), Some("abc".into())));
    }

    #[test]
    fn a_stop_string_may_begin_inside_a_false_alarm() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).0.concat(), "a");
        assert_eq!(run(&["éa"], &["ééa"]).0.concat(), "é");
    }

    /// The specification: grow the text by characters, and look at its end.
    fn naive(stops: &[String], text: &str) -> (String, Option<String>) {
        for (at, character) in text.char_indices() {
            let seen = &text[..at + character.len_utf8()];
            let ending = stops.iter().filter(|stop| seen.ends_with(stop.as_str())).max_by_key(|stop| stop.len());
            if let Some(stop) = ending {
                return (seen[..seen.len() - stop.len()].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn pieces_give_what_the_whole_text_gives(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,4}", 0..12),
        ) {
            let text = pieces.concat();
            let (answer, stop) = naive(&stops, &text);
            let borrowed: Vec<_> = stops.iter().map(String::as_str).collect();
            let (left, held, found) = run(&borrowed, &pieces.iter().map(String::as_str).collect::<Vec<_>>());
            prop_assert_eq!(&(left.concat() + &held), &answer);
            prop_assert_eq!(found, stop);
            // Nothing that left early belongs to a stop string: every beginning of what left begins the answer too.
            let mut sent = String::new();
            for piece in left {
                sent.push_str(&piece);
                prop_assert!(answer.starts_with(&sent));
            }
        }

        #[test]
        fn no_more_is_held_than_a_stop_string_can_claim(
            stops in prop::collection::vec("[ab]{1,4}", 1..4),
            pieces in prop::collection::vec("[abc]{0,4}", 0..12),
        ) {
            let mut hold_back = HoldBack::new(stops.clone());
            for piece in &pieces {
                if hold_back.push(piece).stop.is_some() {
                    break;
                }
                let held = &hold_back.held;
                let begun = stops.iter().any(|stop| stop.starts_with(held.as_str()) && stop.len() > held.len());
                prop_assert!(held.is_empty() || begun);
            }
        }
    }
}
