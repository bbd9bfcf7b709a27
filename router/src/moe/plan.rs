//! Which rows go to which worker. Pure: no clock, no network, no tensors.
//!
//! In: assignments (this row, that expert) and who holds what. Out: one [`Part`] per worker that gets anything.
//! Never here: an assignment dropped or doubled. Each is in exactly one part, or the plan fails naming its expert.

use std::collections::BTreeMap;

use crate::workers::Holders;

/// One row's use of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Its place in the routing, `row * K + k`.
    pub slot: u32,
    /// Row of the step's batch.
    pub row: u32,
    /// Chosen expert.
    pub expert: u16,
}

/// What one message may hold, so that neither it nor its answer outgrows what the wire takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// Rows sent.
    pub rows: usize,
    /// Assignments, where each sends a row back.
    pub assignments: usize,
}

/// What one worker gets in one message. Assignments are in slot order; each of its rows is listed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index into the snapshot's workers.
    pub worker: u32,
    /// Rows of the step's batch, ascending.
    pub rows: Vec<u32>,
    /// Its assignments.
    pub assignments: Vec<Assignment>,
    /// Per assignment, the position of its row in `rows`.
    pub row_ids: Vec<u32>,
}

/// Whether a worker may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// As any other.
    Ready,
    /// Only where there is nobody else: it is late with an answer.
    Avoided,
    /// Not now.
    Excluded,
}

/// Nobody who can be asked holds this expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoHolder {
    /// Which one.
    pub expert: u16,
}

/// Rows of one expert below which they are not divided between replicas: from here on computing takes longer than reading the
/// weights once more, which the other replica would do while it waits.
const PIECE: u32 = 32;

/// Assigns `assignments` (in slot order) to holders.
///
/// The rows of an expert go to one replica, for reading its weights is the cost, and sixteen rows cost as one; where there are
/// many, in pieces of [`PIECE`] rows or more, which several replicas may share. Pieces are taken from the most rows to the
/// fewest, and each goes to the holder that would be done first, by its `speed` and what it has so far; one that the plan
/// wants there before one that holds it still, and one that is late after all others. Where all that is equal, `turn`
/// decides, which should be another number each time: otherwise the first by name would get every row of a step that has few.
pub fn plan<'a>(
    assignments: &[Assignment],
    holders: impl Fn(u16) -> Holders<'a>,
    standing: impl Fn(u32) -> Standing,
    speed: impl Fn(u32) -> f64,
    turn: u32,
    most: Most,
) -> Result<Vec<Part>, NoHolder> {
    let mut rows_of: BTreeMap<u16, u32> = BTreeMap::new();
    for assignment in assignments {
        *rows_of.entry(assignment.expert).or_default() += 1;
    }
    let mut pieces: Vec<(u16, u32)> = rows_of.into_iter().flat_map(|(expert, rows)| pieces(expert, rows)).collect();
    pieces.sort_by_key(|&(expert, rows)| (std::cmp::Reverse(rows), expert));

    let mut load: BTreeMap<u32, u32> = BTreeMap::new();
    // Per expert, its pieces: to whom, and how many rows are left of it.
    let mut chosen: BTreeMap<u16, Vec<(u32, u32)>> = BTreeMap::new();
    for (expert, rows) in pieces {
        let Holders { planned, spare } = holders(expert);
        let able = planned.iter().map(|worker| (false, *worker)).chain(spare.iter().map(|worker| (true, *worker)));
        let able = able.map(|(spare, worker)| ((standing(worker), spare), worker));
        let able = able.filter(|((standing, _), _)| *standing != Standing::Excluded);
        let done = |worker: u32| f64::from(load.get(&worker).copied().unwrap_or(0) + rows) / speed(worker);
        let first = able.min_by(|(one, a), (other, b)| {
            one.cmp(other).then_with(|| done(*a).total_cmp(&done(*b))).then((a ^ turn).cmp(&(b ^ turn)))
        });
        let (_, worker) = first.ok_or(NoHolder { expert })?;
        *load.entry(worker).or_default() += rows;
        chosen.entry(expert).or_default().push((worker, rows));
    }

    let mut parts: BTreeMap<u32, Vec<Part>> = BTreeMap::new();
    for assignment in assignments {
        let Some(worker) = chosen.get_mut(&assignment.expert).and_then(take) else { continue };
        let parts = parts.entry(worker).or_default();
        let fits = |part: &&mut Part| part.takes(assignment.row, most);
        match parts.last_mut().filter(fits) {
            Some(part) => part.add(*assignment),
            None => {
                let mut part = Part { worker, rows: Vec::new(), assignments: Vec::new(), row_ids: Vec::new() };
                part.add(*assignment);
                parts.push(part);
            }
        }
    }
    Ok(parts.into_values().flatten().collect())
}

/// So many rows of an expert, in as many pieces of [`PIECE`] rows or more as they make, as equal as can be.
fn pieces(expert: u16, rows: u32) -> impl Iterator<Item = (u16, u32)> {
    let count = (rows / PIECE).max(1);
    (0..count).map(move |piece| (expert, rows / count + u32::from(piece < rows % count)))
}

/// Whose the next row of an expert is. The pieces hold exactly its rows, so there is one for each.
fn take(pieces: &mut Vec<(u32, u32)>) -> Option<u32> {
    let (worker, left) = pieces.last_mut()?;
    let worker = *worker;
    *left -= 1;
    if *left == 0 {
        pieces.pop();
    }
    Some(worker)
}

impl Part {
    fn takes(&self, row: u32, most: Most) -> bool {
        let rows = self.rows.len() + usize::from(self.rows.last() != Some(&row));
        rows <= most.rows && self.assignments.len() < most.assignments
    }

    fn add(&mut self, assignment: Assignment) {
        if self.rows.last() != Some(&assignment.row) {
            self.rows.push(assignment.row);
        }
        self.row_ids.push(self.rows.len() as u32 - 1);
        self.assignments.push(assignment);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_assignment_is_in_one_part_at_a_holder(
            routing in prop::collection::vec(prop::collection::btree_set(0u16..12, 3), 1..160),
            holders in prop::collection::vec(prop::collection::btree_set(0u32..5, 0..4), 12),
            excluded in prop::collection::vec(0u32..5, 0..2),
            rows in 1usize..8,
            turn in any::<u32>(),
            most_assignments in 1usize..20,
        ) {
            let most = Most { rows, assignments: most_assignments };
            let assignments: Vec<Assignment> = routing.iter().flatten().enumerate()
                .map(|(slot, &expert)| Assignment { slot: slot as u32, row: slot as u32 / 3, expert })
                .collect();
            let holders: Vec<Vec<u32>> = holders.into_iter().map(|set| set.into_iter().collect()).collect();
            let able = |expert: u16| holders[expert as usize].iter().any(|worker| !excluded.contains(worker));
            let held = |expert: u16| {
                let (planned, spare) = holders[expert as usize].split_at(holders[expert as usize].len() / 2);
                Holders { planned, spare }
            };
            let standing = |worker| if excluded.contains(&worker) { Standing::Excluded } else { Standing::Ready };
            match plan(&assignments, held, standing, |worker| f64::from(worker + 1), turn, most) {
                Err(NoHolder { expert }) => prop_assert!(!able(expert)),
                Ok(parts) => {
                    let mut slots: Vec<u32> = Vec::new();
                    for part in &parts {
                        prop_assert!(!excluded.contains(&part.worker));
                        prop_assert!(part.rows.len() <= most.rows && part.assignments.len() <= most.assignments);
                        prop_assert!(part.rows.windows(2).all(|pair| pair[0] < pair[1]), "each row once");
                        for (assignment, &row) in part.assignments.iter().zip(&part.row_ids) {
                            prop_assert_eq!(part.rows[row as usize], assignment.row);
                            prop_assert!(holders[assignment.expert as usize].contains(&part.worker));
                            slots.push(assignment.slot);
                        }
                    }
                    slots.sort_unstable();
                    prop_assert_eq!(slots, (0..assignments.len() as u32).collect::<Vec<_>>());
                    prop_assert!(parts.windows(2).all(|pair| pair[0].worker <= pair[1].worker));
                }
            }
        }
    }

    #[test]
    fn replicas_share_the_rows() {
        let assignments: Vec<Assignment> =
            (0..8).map(|slot| Assignment { slot, row: slot, expert: slot as u16 % 4 }).collect();
        let most = Most { rows: 100, assignments: 100 };
        let held = |_| Holders { planned: &[0, 1], spare: &[] };
        let rows = |speeds: [f64; 2]| {
            let parts = plan(&assignments, held, |_| Standing::Ready, |worker| speeds[worker as usize], 0, most);
            parts.expect("held").iter().map(|part| part.rows.len()).collect::<Vec<_>>()
        };
        assert_eq!(rows([1.0, 1.0]), [4, 4]);
        assert_eq!(rows([3.1, 1.0]), [6, 2], "a faster one takes more");
    }

    #[test]
    fn many_rows_of_one_expert_are_divided_and_few_are_not() {
        let most = Most { rows: 1000, assignments: 1000 };
        let held = |_| Holders { planned: &[0, 1], spare: &[] };
        let rows = |count: u32, speeds: [f64; 2]| {
            let assignments: Vec<Assignment> =
                (0..count).map(|slot| Assignment { slot, row: slot, expert: 3 }).collect();
            let parts = plan(&assignments, held, |_| Standing::Ready, |worker| speeds[worker as usize], 0, most);
            parts.expect("held").iter().map(|part| part.rows.len()).collect::<Vec<_>>()
        };
        assert_eq!(rows(2 * PIECE - 1, [1.0, 1.0]), [63]);
        assert_eq!(rows(2 * PIECE, [1.0, 1.0]), [32, 32]);
        assert_eq!(rows(300, [1.0, 1.0]).iter().sum::<usize>(), 300);
        assert_eq!(rows(256, [3.1, 1.0]), [192, 64], "by speed");
    }

    #[test]
    fn single_rows_are_taken_in_turns() {
        let assignments = [Assignment { slot: 0, row: 0, expert: 0 }];
        let (held, most) = (|_| Holders { planned: &[0, 2, 5], spare: &[] }, Most { rows: 100, assignments: 100 });
        let mut counts = [0; 6];
        for turn in 0..64 {
            let parts = plan(&assignments, held, |_| Standing::Ready, |_| 1.0, turn, most).expect("held");
            counts[parts[0].worker as usize] += 1;
        }
        assert!([0, 2, 5].iter().all(|worker| counts[*worker] >= 12), "{counts:?}");
    }

    #[test]
    fn planned_holders_come_before_spare_ones_and_late_ones_last() {
        let assignments = [Assignment { slot: 0, row: 0, expert: 0 }];
        let most = Most { rows: 100, assignments: 100 };
        let chosen = |standings: [Standing; 3]| {
            let held = |_| Holders { planned: &[2], spare: &[0, 1] };
            let parts = plan(&assignments, held, |worker| standings[worker as usize], |_| 1.0, 0, most);
            parts.map(|parts| parts[0].worker)
        };
        use Standing::{Avoided, Excluded, Ready};
        assert_eq!(chosen([Ready, Ready, Ready]), Ok(2));
        assert_eq!(chosen([Ready, Ready, Avoided]), Ok(0));
        assert_eq!(chosen([Avoided, Ready, Excluded]), Ok(1));
        assert_eq!(chosen([Avoided, Avoided, Avoided]), Ok(2), "late is better than nobody");
        assert_eq!(chosen([Excluded, Excluded, Excluded]), Err(NoHolder { expert: 0 }));
    }
}
