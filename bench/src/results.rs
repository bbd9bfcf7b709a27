//! What was measured: each mode's table and JSON come in, one JSON object or a page of Markdown goes out. No
//! figure is computed here.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value};

use crate::machine::Machine;

/// Of one mode.
#[derive(Debug)]
pub(crate) struct Section {
    /// The subcommand that measures it alone.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// A table, or why there is none.
    pub(crate) text: String,
    pub(crate) json: Value,
}

/// One object, a key a mode.
pub(crate) fn as_json(machine: &Machine, sections: &[Section]) -> String {
    let mut all = Map::from_iter([("machine".to_owned(), machine.to_json())]);
    all.extend(sections.iter().map(|section| (section.name.to_owned(), section.json.clone())));
    format!("{:#}\n", Value::Object(all))
}

/// Writes `file` anew: the machine, then a section a mode.
pub(crate) fn write(file: &Path, machine: &Machine, sections: &[Section]) -> anyhow::Result<()> {
    let mut page = String::from(
        "# Benchmarks\n\n\
         Written by `make bench`; what each table is, and how to have it alone, says [bench/README.md](../bench/README.md).\n\
         Everything was measured in one run on one machine, both sides of each ratio in turns; only ratios carry over to\n\
         other machines.\n\n",
    );
    // The profile of Cargo.toml: there is only one.
    let _ = writeln!(page, "{machine}. Built with opt-level 2 and overflow checks, {}.\n", today());
    if let Some(warning) = machine.warning() {
        let _ = writeln!(page, "{warning}\n");
    }
    for Section { name, title, text, .. } in sections {
        let _ = writeln!(page, "## {title}\n\n`conclave-bench {name}`\n\n```\n{}\n```\n", text.trim_end());
    }
    std::fs::write(file, page.trim_end().to_owned() + "\n").with_context(|| format!("cannot write {}", file.display()))
}

/// The date, as the system's own program tells it.
fn today() -> String {
    let told = std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]).output().ok();
    told.and_then(|told| String::from_utf8(told.stdout).ok())
        .map_or_else(|| "on an unknown day".to_owned(), |date| date.trim().to_owned())
}
