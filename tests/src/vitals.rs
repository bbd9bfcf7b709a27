//! What processes use: memory, descriptors.
//!
//! In: process ids. Out: readings of /proc, and how they grow over time. Never here: a process that ended read as one that
//! uses nothing.

use std::{collections::BTreeMap, fs, path::PathBuf};

use tokio::time::Instant;

/// Of one process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vitals {
    /// Resident memory that belongs to it alone: what is mapped from the checkpoint is the page cache's.
    pub anonymous_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

impl Vitals {
    /// Of `pid`, while it lives.
    pub fn of(pid: u32) -> Option<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(process.join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        let anonymous_kib = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        let descriptors = fs::read_dir(process.join("fd")).ok()?.count() as u64;
        Some(Self { anonymous_kib, descriptors })
    }
}

/// Readings of several processes over time.
#[derive(Debug)]
pub struct Course {
    begun: Instant,
    readings: BTreeMap<String, Vec<(f64, Vitals)>>,
}

/// How one process's use grows, by least squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// Resident memory of its own at the end.
    pub anonymous_kib: u64,
    /// Its growth.
    pub kib_per_minute: f64,
    /// Descriptors at the end.
    pub descriptors: u64,
    /// Their growth.
    pub descriptors_per_minute: f64,
}

impl Course {
    /// Nothing read yet.
    pub fn begin() -> Self {
        Self { begun: Instant::now(), readings: BTreeMap::new() }
    }

    /// Reads each process that lives.
    pub fn read(&mut self, processes: &[(String, u32)]) {
        let minutes = self.begun.elapsed().as_secs_f64() / 60.0;
        for (name, pid) in processes {
            if let Some(vitals) = Vitals::of(*pid) {
                self.readings.entry(name.clone()).or_default().push((minutes, vitals));
            }
        }
    }

    /// How each process's use grew.
    pub fn slopes(&self) -> BTreeMap<String, Slope> {
        let of = |readings: &Vec<(f64, Vitals)>| {
            let (_, last) = *readings.last()?;
            let slope = |of: fn(&Vitals) -> u64| {
                slope(&readings.iter().map(|(at, vitals)| (*at, of(vitals) as f64)).collect::<Vec<_>>())
            };
            Some(Slope {
                anonymous_kib: last.anonymous_kib,
                kib_per_minute: slope(|vitals| vitals.anonymous_kib),
                descriptors: last.descriptors,
                descriptors_per_minute: slope(|vitals| vitals.descriptors),
            })
        };
        self.readings.iter().filter_map(|(name, readings)| Some((name.clone(), of(readings)?))).collect()
    }
}

fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / count, y + point.1 / count));
    let (above, below) = points.iter().fold((0.0, 0.0), |(above, below), point| {
        let from_mean = point.0 - x;
        (above + from_mean * (point.1 - y), below + from_mean * from_mean)
    });
    if below > 0.0 { above / below } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_straight_line_has_its_own_slope() {
        assert!((slope(&[(0.0, 10.0), (1.0, 13.0), (2.0, 16.0)]) - 3.0).abs() < 1e-9);
        assert_eq!(slope(&[(1.0, 5.0)]), 0.0);
    }

    #[test]
    fn this_process_uses_something() {
        let vitals = Vitals::of(std::process::id()).expect("it lives");
        assert!(vitals.anonymous_kib > 0 && vitals.descriptors >= 3, "{vitals:?}");
    }
}
