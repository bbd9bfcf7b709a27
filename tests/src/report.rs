//! A drill's figures, for people and for machines.
//!
//! In: what the drill found. Out: one line of JSON and one row of a table, printed and kept in `target/drills` (of the
//! short form, in `target/drills/short`); a panic where the aim was missed. Never here: a figure that was not measured (it
//! is a dash).

use std::{fs, time::Duration};

use serde_json::{Map, Value, json};

use crate::{drill::Form, process::target_folder};

/// Columns of the table that rows of reports make.
pub const HEADER: &str = "\
| # | drill | ok / failed / hung | tokens differing | longest stall before → after | detected | flow back | held again \
| tokens/s before / during / after | more |
|---|---|---|---|---|---|---|---|---|---|
";

/// What came of one drill.
#[derive(Clone, Debug)]
pub struct Report {
    /// Rows of the table of faults.
    pub rows: &'static str,
    /// What happened.
    pub what: &'static str,
    /// How long it was let run.
    pub form: Form,
    /// From the first request to the end of the last.
    pub seconds: Duration,
    /// Requests with their whole answer.
    pub ok: usize,
    /// Requests that ended with a status.
    pub failed: usize,
    /// Requests that ended in no way.
    pub hung: usize,
    /// Requests that their clients left.
    pub left: usize,
    /// How often one went on at another router.
    pub resumed: usize,
    /// Tokens in all.
    pub tokens: usize,
    /// Of them, those that an undisturbed run did not give.
    pub differing: usize,
    /// The longest silence of a stream that waited, before the fault and from it on.
    pub stalls: [Duration; 2],
    /// The 99th percentile of the time between two tokens before, during and after.
    pub p99: [Duration; 3],
    /// Tokens a second before, during and after.
    pub rates: [f64; 3],
    /// From the fault until a router first lost, hedged or was refused a batch; to 50 ms.
    pub detected: Option<Duration>,
    /// From the fault, over the longest stall where it was one, to the first second with nine tenths of the rate before.
    pub recovered: Option<Duration>,
    /// From the fault until each expert was held as often as wanted, where it had not been meanwhile.
    pub held_again: Option<Duration>,
    /// The first few reasons of failures.
    pub failures: Vec<String>,
    /// What must not be, on any machine.
    pub breaches: Vec<String>,
    /// Limits of time that were not kept.
    pub late: Vec<String>,
    /// Figures of the drill's own.
    pub notes: Map<String, Value>,
}

impl Report {
    /// Prints and keeps the figures. Panics where the aim was missed.
    pub fn publish(&self) {
        let (json, row) = (self.json(), self.row());
        println!("{json}\n{row}");
        for late in &self.late {
            println!("LATE: {late}");
        }
        // What `make test` finds in seconds never lies beside what `make drills` found in an hour.
        let folder = target_folder().join(self.form.pick("drills/short", "drills"));
        fs::create_dir_all(&folder).expect("the target folder can be written");
        let name = self.file_name();
        fs::write(folder.join("00-header.md"), HEADER).expect("a file in the target folder");
        fs::write(folder.join(format!("{name}.json")), format!("{json}\n")).expect("a file in the target folder");
        fs::write(folder.join(format!("{name}.md")), format!("{row}\n")).expect("a file in the target folder");
        assert!(self.breaches.is_empty(), "{}: {:#?}", self.what, self.breaches);
        assert!(self.late.is_empty() || self.form == Form::Short, "{}: {:#?}", self.what, self.late);
    }

    /// How much the routers' counter `name` grew.
    pub fn counted(&self, name: &str) -> f64 {
        self.notes.get(name).and_then(Value::as_f64).unwrap_or_else(|| panic!("no figure {name}: {:?}", self.notes))
    }

    fn file_name(&self) -> String {
        let first = self.rows.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        let words = self.what.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        format!("{first:0>2}-{}", words.collect::<Vec<_>>().join("-"))
    }

    fn json(&self) -> Value {
        let millis = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
        let rate = |rate: f64| rate.round();
        json!({
            "rows": self.rows,
            "drill": self.what,
            "form": self.form.pick("short", "full"),
            "seconds": self.seconds.as_secs_f64().round(),
            "requests": {
                "ok": self.ok, "failed": self.failed, "hung": self.hung, "left": self.left, "resumed": self.resumed,
            },
            "tokens": self.tokens,
            "tokens_differing": self.differing,
            "longest_stall_ms": {"before": millis(self.stalls[0]), "after": millis(self.stalls[1])},
            "p99_between_tokens_ms": self.p99.map(millis),
            "tokens_per_second": self.rates.map(rate),
            "detected_ms": self.detected.map(millis),
            "flow_back_ms": self.recovered.map(millis),
            "held_again_ms": self.held_again.map(millis),
            "failures": self.failures,
            "breaches": self.breaches,
            "late": self.late,
            "more": self.notes,
        })
    }

    /// As a row of the table under [`HEADER`].
    fn row(&self) -> String {
        let [before, after] = self.stalls.map(|stall| stall.as_millis());
        let seconds =
            |time: Option<Duration>| time.map_or("–".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()));
        let [fast, during, again] = self.rates.map(f64::round);
        let mut notes: Vec<String> = self.notes.iter().filter(|(_, value)| **value != json!(0.0)).map(note).collect();
        let p99 = self.p99.map(|p99| p99.as_millis());
        notes.push(format!("p99 {} / {} / {} ms", p99[0], p99[1], p99[2]));
        if self.resumed > 0 {
            notes.push(format!("resumed {}", self.resumed));
        }
        format!(
            "| {} | {} | {} / {} / {} | {} | {before} → {after} ms | {} | {} | {} | {fast} / {during} / {again} | {} |",
            self.rows,
            self.what,
            self.ok,
            self.failed,
            self.hung,
            self.differing,
            seconds(self.detected),
            seconds(self.recovered),
            seconds(self.held_again),
            notes.join(", "),
        )
    }
}

fn note((name, value): (&String, &Value)) -> String {
    let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    format!("{} {}", name.replace('_', " "), value.trim_end_matches(".0"))
}
