//! What `up` shows while weights load: the readiness of the cluster comes in, bars on a terminal or plain lines
//! elsewhere go out, all on stderr. Nothing is decided here.

use std::sync::Arc;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::ready::{Phase, Readiness, WorkerProgress};
use crate::terminal;

/// Stderr, shared by everything that writes while bars are drawn. Clones write to the same place.
#[derive(Clone)]
pub(super) struct Console {
    bars: Arc<Mutex<Option<MultiProgress>>>,
    silent: bool,
}

impl Console {
    pub(super) fn stderr() -> Self {
        let bars = MultiProgress::new();
        let bars = if bars.is_hidden() { None } else { Some(bars) };
        Self { bars: Arc::new(Mutex::new(bars)), silent: false }
    }

    #[cfg(test)]
    pub(super) fn silent() -> Self {
        Self { bars: Arc::new(Mutex::new(None)), silent: true }
    }

    /// One line, above the bars if there are any.
    pub(super) fn line(&self, line: &str) {
        if self.silent {
            return;
        }
        match &*self.bars.lock() {
            // A terminal that went away has no use for the line.
            Some(bars) => drop(bars.println(line)),
            None => terminal::warn(line),
        }
    }

    /// Takes the bars away; lines go on.
    pub(super) fn end_bars(&self) {
        if let Some(bars) = self.bars.lock().take() {
            let _ = bars.clear();
        }
    }
}

/// The start-up as it proceeds.
pub(super) struct Progress {
    console: Console,
    bars: Vec<ProgressBar>,
    /// For each worker what was last said in plain lines.
    said: Vec<String>,
}

impl Progress {
    pub(super) fn new(console: &Console, workers: usize) -> Self {
        let mut bars = Vec::new();
        if let Some(multi) = &*console.bars.lock() {
            let style = ProgressStyle::with_template("{prefix:>10} {bar:32} {msg}");
            for index in 0..workers {
                let bar = multi.add(ProgressBar::new(1));
                if let Ok(style) = &style {
                    bar.set_style(style.clone());
                }
                bar.set_prefix(format!("worker-{index}"));
                bar.enable_steady_tick(Duration::from_millis(250));
                bars.push(bar);
            }
        }
        Self { console: console.clone(), bars, said: vec![String::new(); workers] }
    }

    pub(super) fn show(&mut self, readiness: &Readiness) {
        for (index, worker) in readiness.workers.iter().enumerate() {
            if let Some(bar) = self.bars.get(index) {
                bar.set_length(worker.assigned.unwrap_or(1).max(1) as u64);
                bar.set_position(worker.resident as u64);
                bar.set_message(sentence(worker, worker.resident));
            } else {
                self.say(index, worker);
            }
        }
    }

    /// A plain line for a new phase or another quarter of the experts, not for each expert.
    fn say(&mut self, index: usize, worker: &WorkerProgress) {
        let text = sentence(worker, worker.resident - worker.resident % quarter(worker));
        if worker.phase != Phase::Absent && self.said[index] != text {
            self.console.line(&format!("{}: {text}", worker.id));
            self.said[index] = text;
        }
    }
}

/// Quarters of what it was given, but never less than one.
fn quarter(worker: &WorkerProgress) -> usize {
    match worker.assigned {
        // The rest of the last quarter counts too.
        Some(assigned) if worker.resident < assigned => (assigned / 4).max(1),
        _ => 1,
    }
}

fn sentence(worker: &WorkerProgress, resident: usize) -> String {
    match (worker.phase, worker.assigned) {
        (Phase::Absent, _) => "starting".to_owned(),
        (Phase::Starting | Phase::Serving, None) => "registered, no plan yet".to_owned(),
        (Phase::Starting, Some(assigned)) => format!("{resident} of {assigned} experts resident"),
        (Phase::Serving, Some(assigned)) if resident >= assigned => {
            format!("serving, {}", terminal::plural(assigned, "expert"))
        }
        (Phase::Serving, Some(assigned)) => format!("serving, {resident} of {assigned} experts resident"),
        (Phase::Draining, _) => "leaving".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use conclave_placement::WorkerId;

    use super::*;

    #[test]
    fn plain_lines_come_by_quarters() {
        let mut worker = WorkerProgress {
            id: WorkerId::parse("worker-0").unwrap(),
            phase: Phase::Starting,
            resident: 0,
            assigned: Some(40),
        };
        let mut lines = Vec::new();
        for resident in 0..=40 {
            worker.resident = resident;
            lines.push(sentence(&worker, resident - resident % quarter(&worker)));
        }
        lines.dedup();
        let said: Vec<&str> = lines.iter().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(said, ["0", "10", "20", "30", "40"]);
    }
}
