//! Who shares whose fate.
//!
//! In: the hosts and zones that workers name. Out: whether a copy on one worker would die with a copy on another. Never
//! here: a guess; a worker that names no host shares it with nobody.

use std::collections::HashMap;

use crate::planner::PlannerWorker;

/// Hosts and zones as numbers.
#[derive(Debug)]
pub(crate) struct Fates {
    host: Vec<usize>,
    zone: Vec<usize>,
    /// Whether any two workers share anything.
    pub(crate) shared: bool,
}

/// What a new holder must not share with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) host: bool,
    pub(crate) zone: bool,
}

impl Need {
    /// Whether anybody will do, or nobody need come.
    pub(crate) fn nothing(self) -> bool {
        !self.host && !self.zone
    }
}

/// How many different hosts and zones some workers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spread {
    pub(crate) hosts: usize,
    pub(crate) zones: usize,
}

impl Fates {
    pub(crate) fn of(workers: &[PlannerWorker]) -> Self {
        let host = number(workers.iter().map(|worker| worker.locality.host.as_str()));
        let zone = number(workers.iter().map(|worker| worker.locality.zone.as_str()));
        let repeats = |names: &[usize]| names.iter().enumerate().any(|(worker, name)| *name != worker);
        let shared = repeats(&host) || repeats(&zone);
        Self { host, zone, shared }
    }

    /// What a copy on `worker` would share with those on `holders`: nothing is 0, a zone 1, a host 2, both 3.
    pub(crate) fn common(&self, holders: &[usize], worker: usize) -> u8 {
        if !self.shared {
            return 0;
        }
        let shares = |names: &[usize]| holders.iter().any(|holder| names[*holder] == names[worker]);
        2 * u8::from(shares(&self.host)) + u8::from(shares(&self.zone))
    }

    /// How far those workers are spread, as far as anybody asks: more than `most` of either count as `most`.
    pub(crate) fn spread(&self, holders: impl Iterator<Item = usize> + Clone, most: usize) -> Spread {
        if !self.shared {
            let all = holders.take(most).count();
            return Spread { hosts: all, zones: all };
        }
        let distinct = |names: &[usize]| {
            let mut seen = Vec::new();
            for name in holders.clone().map(|holder| names[holder]) {
                if seen.len() == most {
                    break;
                }
                if !seen.contains(&name) {
                    seen.push(name);
                }
            }
            seen.len()
        };
        Spread { hosts: distinct(&self.host), zones: distinct(&self.zone) }
    }

    /// What a worker that takes the place of `leaves` among `holders` must bring for them to stay spread as they are.
    pub(crate) fn replacing(&self, holders: &[usize], leaves: usize, wanted: usize) -> Need {
        if !self.shared {
            return Need { host: false, zone: false };
        }
        let stay = holders.iter().copied().filter(|holder| *holder != leaves);
        let (before, after) = (self.spread(holders.iter().copied(), wanted), self.spread(stay, wanted));
        Need { host: after.hosts < before.hosts, zone: after.zones < before.zones }
    }

    /// Whether that worker brings what is needed.
    pub(crate) fn meets(&self, need: Need, holders: &[usize], leaves: usize, worker: usize) -> bool {
        let fresh = |names: &[usize]| holders.iter().all(|holder| *holder == leaves || names[*holder] != names[worker]);
        (!need.host || fresh(&self.host)) && (!need.zone || fresh(&self.zone))
    }
}

/// The index of the first worker of the same name; its own where it has none.
fn number<'a>(names: impl Iterator<Item = &'a str>) -> Vec<usize> {
    let mut first = HashMap::new();
    let numbered = names.enumerate();
    numbered.map(|(worker, name)| if name.is_empty() { worker } else { *first.entry(name).or_insert(worker) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planner::balanced::fixtures::workers;

    #[test]
    fn the_unnamed_share_nothing() {
        let mut all = workers(&[0; 5]);
        assert!(!Fates::of(&all).shared);
        for (worker, (host, zone)) in all.iter_mut().zip([("", "z"), ("h", "z"), ("h", ""), ("i", ""), ("", "")]) {
            (worker.locality.host, worker.locality.zone) = (host.to_owned(), zone.to_owned());
        }
        let fates = Fates::of(&all);
        assert_eq!([0, 2, 3, 4].map(|worker| fates.common(&[1], worker)), [1, 2, 0, 0]);
        assert_eq!(fates.spread([0, 1, 2, 4].into_iter(), 9), Spread { hosts: 3, zones: 3 });
        let may = |holders: &[usize], leaves, joins, wanted| {
            fates.meets(fates.replacing(holders, leaves, wanted), holders, leaves, joins)
        };
        assert!(may(&[1, 2], 2, 3, 2));
        assert!(!may(&[1, 3], 3, 2, 2), "both on one host");
        assert!(may(&[1, 3], 3, 2, 1), "one holder is all that is wanted");
    }
}
