//! What a reader must know of the machine before believing a figure: processor, what it can compute with, memory,
//! kernel, and how busy it was when the run began. Read from Linux's files; what one of them does not say is left out.

use std::fmt;

use serde_json::{Value, json};

/// Instructions that decide which kernels run.
const FLAGS: [&str; 9] =
    ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"];

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    processor: Option<String>,
    flags: Vec<&'static str>,
    memory_gib: Option<f64>,
    kernel: Option<String>,
    /// Runnable tasks over the last minute.
    load: Option<f64>,
}

impl Machine {
    pub(crate) fn now() -> Self {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let of_cpu = |key: &str| cpus.lines().find_map(|line| value_of(line, key));
        let known: Vec<&str> = of_cpu("flags").unwrap_or_default().split_whitespace().collect();
        let memory = read("/proc/meminfo");
        let kib = memory.lines().find_map(|line| value_of(line, "MemTotal")?.strip_suffix(" kB")?.parse::<f64>().ok());
        let (kernel, load) = (read("/proc/sys/kernel/osrelease"), read("/proc/loadavg"));
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            processor: of_cpu("model name").map(str::to_owned),
            flags: FLAGS.into_iter().filter(|flag| known.contains(flag)).collect(),
            memory_gib: kib.map(|kib| kib / f64::from(1 << 20)),
            kernel: Some(kernel.trim().to_owned()).filter(|kernel| !kernel.is_empty()),
            load: load.split_whitespace().next().and_then(|first| first.parse().ok()),
        }
    }

    /// What a reader is to be told where the machine had other things to do.
    pub(crate) fn warning(&self) -> Option<String> {
        let load = self.load.filter(|load| *load > 0.5 * self.cores as f64)?;
        Some(format!(
            "This machine was busy when the run began (load {load:.1} on {} cores): take the ratios as rough.\n\
             Who spins while waiting, as transformers' OpenMP threads do, suffers most.",
            self.cores
        ))
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "cores": self.cores, "processor": self.processor, "flags": self.flags, "memory_gib": self.memory_gib,
            "kernel": self.kernel, "load_before": self.load,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cores, processor, flags, memory_gib, kernel, load } = self;
        write!(f, "{cores} cores of {}", processor.as_deref().unwrap_or("an unnamed processor"))?;
        if !flags.is_empty() {
            write!(f, " ({})", flags.join(", "))?;
        }
        memory_gib.iter().try_for_each(|gib| write!(f, ", {gib:.1} GiB of memory"))?;
        kernel.iter().try_for_each(|kernel| write!(f, ", Linux {kernel}"))?;
        load.iter().try_for_each(|load| write!(f, ", load {load:.2} when the run began"))
    }
}

/// What follows `key` and a colon, where the line begins with them.
fn value_of<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    Some(line.strip_prefix(key)?.trim_start().strip_prefix(':')?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_stands_behind_its_key_and_a_colon() {
        assert_eq!(value_of("model name\t: Some CPU", "model name"), Some("Some CPU"));
        assert_eq!(value_of("MemTotal:       24 kB", "MemTotal"), Some("24 kB"));
        assert_eq!(value_of("flags_more : x", "flags"), None);
    }
}
