//! Where one decode step's time goes, at 1 and at 16 streams of a local cluster. In: a checkpoint. Out: milliseconds a step
//! by phase, from the router's own counters before and after, beside the whole step. The router's own phases follow one
//! another; those of the workers' batches run beside each other and beside the shared expert, so all together may exceed
//! the step.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Context;
use futures::future::try_join_all;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Figures, WORKERS, measured};
use crate::prompts::Prompts;

const STREAMS: [usize; 2] = [1, 16];
const PROMPT: usize = 8;
/// Drawn by each stream: so many that the prompts' own step does not show.
const TOKENS: u32 = 96;
/// In the order of a step, with whose time it is.
const PHASES: [(&str, &str); 13] = [
    ("attention", "router"),
    ("dense", "router"),
    ("gate", "router"),
    ("plan", "router"),
    ("encode", "router"),
    ("shared", "router"),
    ("wire", "a batch each"),
    ("queue", "a batch each"),
    ("expert", "a batch each"),
    ("decode", "a batch each"),
    ("combine", "router"),
    ("head", "router"),
    ("sample", "router"),
];

#[derive(Debug)]
pub(crate) struct Report {
    model: String,
    columns: Vec<Column>,
}

/// One number of streams; seconds of all steps.
#[derive(Debug)]
struct Column {
    streams: usize,
    steps: f64,
    batches: f64,
    step: f64,
    compute: f64,
    away: f64,
    phases: Vec<f64>,
}

/// Starts a cluster, measures, stops it.
pub(crate) async fn measure(model: &Path) -> anyhow::Result<Report> {
    measured(model, async |cluster| {
        let mut prompts = Prompts::new(cluster.model().await?.vocab_size);
        decode(cluster, &mut prompts, 1).await?;
        let mut columns = Vec::new();
        for streams in STREAMS {
            eprintln!("phases: {streams} streams");
            let before = cluster.figures().await?;
            decode(cluster, &mut prompts, streams).await?;
            columns.push(Column::between(streams, &before, &cluster.figures().await?)?);
        }
        Ok(Report { model: model.display().to_string(), columns })
    })
    .await
}

async fn decode(cluster: &Cluster, prompts: &mut Prompts, streams: usize) -> anyhow::Result<()> {
    let prompts: Vec<_> = (0..streams).map(|_| prompts.draw(PROMPT)).collect();
    try_join_all(prompts.iter().map(|prompt| cluster.generate(prompt, TOKENS))).await?;
    Ok(())
}

impl Column {
    fn between(streams: usize, before: &Figures, after: &Figures) -> anyhow::Result<Self> {
        let grown = |name: &str| {
            let read = |figures: &BTreeMap<String, f64>| {
                figures.get(name).copied().with_context(|| format!("the router counts no {name}"))
            };
            anyhow::Ok(read(after)? - read(before)?)
        };
        let phase = |(name, _): &(&str, &str)| grown(&format!("conclave_phase_seconds_total{{phase=\"{name}\"}}"));
        Ok(Self {
            streams,
            steps: grown("conclave_engine_steps_total")?,
            batches: grown("conclave_dispatch_batches_total")?,
            step: grown("conclave_engine_step_seconds_total")?,
            compute: grown("conclave_engine_compute_seconds_total")?,
            away: grown("conclave_engine_away_seconds_total")?,
            phases: PHASES.iter().map(phase).collect::<anyhow::Result<_>>()?,
        })
    }

    fn per_step(&self, seconds: f64) -> f64 {
        seconds * 1e3 / self.steps
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let columns = self.columns.iter().map(|column| {
            let ms = |seconds: f64| column.per_step(seconds);
            let phases: serde_json::Map<_, _> =
                PHASES.iter().zip(&column.phases).map(|((name, _), seconds)| ((*name).to_owned(), ms(*seconds).into())).collect();
            json!({
                "streams": column.streams, "steps": column.steps, "batches_a_step": column.batches / column.steps,
                "step_ms": ms(column.step), "compute_ms": ms(column.compute), "away_ms": ms(column.away), "phase_ms": phases,
            })
        });
        json!({ "model": self.model, "dtype": "bf16", "workers": WORKERS, "columns": columns.collect::<Vec<_>>() })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "A decode step of {}, bf16, router and {WORKERS} workers: ms a step, means over all steps.",
            self.model
        )?;
        let mut line = |name: &str, whose: &str, seconds: &dyn Fn(&Column) -> f64| {
            write!(f, "{name:<10} {whose:<32}")?;
            for column in &self.columns {
                let seconds = seconds(column);
                let (ms, share) = (column.per_step(seconds), 100.0 * seconds / column.step);
                write!(f, " {:>20}", format!("{ms:.2} ({share:.0} %)"))?;
            }
            writeln!(f)
        };
        for (index, (name, whose)) in PHASES.iter().enumerate() {
            line(name, whose, &|column| column.phases[index])?;
        }
        line("computing", "router, all of it", &|column| column.compute)?;
        line("away", "shared, and rows until all back", &|column| column.away)?;
        line("step", "all of it", &|column| column.step)?;
        for Column { streams, steps, batches, .. } in &self.columns {
            writeln!(f, "{streams} streams: {steps:.0} steps, {:.1} batches a step.", batches / steps)?;
        }
        Ok(())
    }
}
