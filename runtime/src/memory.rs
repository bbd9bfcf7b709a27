//! Amounts of memory: as operators write them, and what this machine has left.
//!
//! In: text, `/proc/meminfo`, this process's cgroup. Out: bytes. Never here: an allocation.

use std::{fmt, fs, str::FromStr};

/// A number of bytes, written as one or with KiB, MiB, GiB or TiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(pub u64);

/// A size nobody can read.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no size: write bytes, or a number with KiB, MiB, GiB or TiB")]
pub struct BadMemory(String);

const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

impl FromStr for Memory {
    type Err = BadMemory;

    fn from_str(text: &str) -> Result<Self, BadMemory> {
        let unit = UNITS.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, 1u64 << shift)));
        let (number, unit) = unit.unwrap_or((text, 1));
        let bytes = number.trim_end().parse().ok().and_then(|number: u64| number.checked_mul(unit));
        bytes.map(Self).ok_or_else(|| BadMemory(text.to_owned()))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes that this process may still use without anything being swapped or killed: what the machine has available, or less
/// where its cgroup (version 2) leaves less. `None` where neither can be read.
pub fn available() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| field(&text, "MemAvailable:"));
    let number = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    let cgroup = number("memory.max").zip(number("memory.current")).map(|(max, used)| max.saturating_sub(used));
    [machine, cgroup].into_iter().flatten().min()
}

/// A line of `/proc/meminfo`, whose unit is kB throughout.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [("0", 0), ("1024", 1024), ("3KiB", 3072), ("16GiB", 16 << 30), ("2 TiB", 2 << 40)] {
            assert_eq!(text.parse::<Memory>().unwrap().0, bytes, "{text}");
        }
        for bad in ["", "GiB", "1GB", "-1", "1.5GiB", "99999999999TiB"] {
            assert!(bad.parse::<Memory>().is_err(), "{bad:?} should be refused");
        }
    }

    #[test]
    fn what_is_available_is_some_of_what_there_is() {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let available = available().unwrap();
        assert!(available > 0 && available <= field(&text, "MemTotal:").unwrap());
    }
}
