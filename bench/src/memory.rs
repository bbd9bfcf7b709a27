//! The memory of a process: its number comes in, what is resident of it goes out, its own apart from pages of files. As
//! Linux counts them.

use anyhow::Context;
use serde_json::{Value, json};

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) all: u64,
    /// In no file: what the process really adds to the machine's load.
    pub(crate) anonymous: u64,
}

impl Resident {
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let file = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
        Self::parse(&text).with_context(|| format!("{file} tells no Rss or no Anonymous"))
    }

    fn parse(rollup: &str) -> Option<Self> {
        let bytes = |key: &str| {
            let value = rollup.lines().find_map(|line| line.strip_prefix(key))?;
            Some(value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
        };
        Some(Self { all: bytes("Rss:")?, anonymous: bytes("Anonymous:")? })
    }

    /// Mapped files, shared with whoever else maps them.
    pub(crate) fn files(&self) -> u64 {
        self.all.saturating_sub(self.anonymous)
    }

    pub(crate) fn to_json(self) -> Value {
        json!({ "bytes": self.all, "anonymous_bytes": self.anonymous, "file_bytes": self.files() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollup_is_read_by_its_names() {
        let text = "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:   20 kB\nPss:   8 kB\nAnonymous:    12 kB\n";
        let resident = Resident::parse(text).unwrap();
        assert_eq!((resident.all, resident.anonymous, resident.files()), (20 << 10, 12 << 10, 8 << 10));
        assert_eq!(Resident::parse("Rss: 20 kB"), None);
    }
}
