//! One group is prepared while another computes, where something else than this thread computes. In: groups, as they come. Out: each
//! one finished, in the order in which it was started. Never here: a group that is still under way when a turn ends.

/// What a turn does.
pub(super) trait Work {
    /// What was started.
    type Group;
    /// Starts what waits. `None` where nothing does.
    fn start(&mut self) -> Option<Self::Group>;
    /// The same while another group computes, where that is worth it.
    fn start_beside(&mut self) -> Option<Self::Group>;
    /// Whether to finish it takes no waiting.
    fn is_ready(&self, group: &Self::Group) -> bool;
    fn finish(&mut self, group: Self::Group);
}

/// One turn: the group that waits, and those that come while one is under way, two of them at once. A group that is ready once it was
/// started, as on a processor, has its turn for itself.
pub(super) fn turn(work: &mut impl Work) {
    let Some(mut computing) = work.start() else { return };
    let mut next = None;
    loop {
        if next.is_none() && !work.is_ready(&computing) {
            next = work.start_beside();
            if next.is_none() {
                std::hint::spin_loop();
            }
            continue;
        }
        work.finish(computing);
        match next.take() {
            Some(group) => computing = group,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Groups wait from some look on, and are ready after some more.
    #[derive(Default)]
    struct Looked {
        looks: std::cell::Cell<usize>,
        /// When it comes, and how many looks it takes from its start on.
        coming: std::collections::VecDeque<(usize, usize)>,
        said: Vec<Said>,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Said {
        Started(usize),
        Finished(usize),
    }

    impl Work for Looked {
        /// Its number, and the look at which it is ready.
        type Group = (usize, usize);

        fn start(&mut self) -> Option<Self::Group> {
            let looks = self.looks.get();
            let (_, takes) = *self.coming.front().filter(|(from, _)| *from <= looks)?;
            self.coming.pop_front();
            let number = self.said.iter().filter(|said| matches!(said, Said::Started(_))).count();
            self.said.push(Said::Started(number));
            Some((number, looks + takes))
        }

        fn start_beside(&mut self) -> Option<Self::Group> {
            self.start()
        }

        fn is_ready(&self, (_, at): &Self::Group) -> bool {
            self.looks.set(self.looks.get() + 1);
            self.looks.get() > *at
        }

        fn finish(&mut self, (number, at): Self::Group) {
            self.looks.set(self.looks.get().max(at));
            self.said.push(Said::Finished(number));
        }
    }

    fn said(coming: impl IntoIterator<Item = (usize, usize)>) -> Vec<Said> {
        let mut work = Looked { coming: coming.into_iter().collect(), ..Looked::default() };
        turn(&mut work);
        work.said
    }

    #[test]
    fn who_comes_while_one_computes_is_started_before_that_one_is_finished() {
        use Said::{Finished, Started};
        assert_eq!(said([(0, 9), (3, 9)]), [Started(0), Started(1), Finished(0), Finished(1)]);
        assert_eq!(said([(0, 9), (0, 9), (0, 9)])[..4], [Started(0), Started(1), Finished(0), Started(2)]);
    }

    #[test]
    fn what_is_ready_at_once_has_its_turn_for_itself() {
        assert_eq!(said([(0, 0), (0, 0)]), [Said::Started(0), Said::Finished(0)]);
        assert_eq!(said([]), []);
    }

    proptest! {
        /// Whatever comes when, and however long it takes: all that is started is finished in the same turn, in order, and two are
        /// under way at most.
        #[test]
        fn a_turn_leaves_nothing_under_way(coming in prop::collection::vec((0usize..30, 0usize..20), 1..40)) {
            let mut from = 0;
            let first = std::iter::once((0, coming[0].1));
            let coming = first.chain(coming[1..].iter().map(|(after, takes)| { from += after; (from, *takes) }));
            let said = said(coming);
            let numbers = |started: bool| said.iter().filter_map(move |said| match said {
                Said::Started(number) => started.then_some(*number),
                Said::Finished(number) => (!started).then_some(*number),
            });
            prop_assert!(numbers(true).eq(0..said.len() / 2) && numbers(false).eq(0..said.len() / 2));
            let mut under_way = 0usize;
            for said in &said {
                under_way = match said { Said::Started(_) => under_way + 1, Said::Finished(_) => under_way - 1 };
                prop_assert!(under_way <= 2);
            }
        }
    }
}
