//! What people and pipes see: text and bytes counts come in, lines on stdout leave. A model's text cannot move the
//! cursor of a terminal. Nothing here knows what the text is about.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Stdout, flushed after every piece so that an answer is seen as it is drawn.
pub(crate) struct Output {
    terminal: bool,
    out: io::Stdout,
}

impl Output {
    pub(crate) fn stdout() -> Self {
        let out = io::stdout();
        Self { terminal: out.is_terminal(), out }
    }

    /// Writes `text` as it is to a pipe, and without control characters to a terminal.
    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        let mut out = self.out.lock();
        if self.terminal {
            out.write_all(printable(text).as_bytes())?;
        } else {
            out.write_all(text.as_bytes())?;
        }
        out.flush()
    }

    pub(crate) fn line(&mut self, text: &str) -> io::Result<()> {
        let mut out = self.out.lock();
        writeln!(out, "{text}")?;
        out.flush()
    }
}

/// A line on stderr. Whoever closed it does not want to hear that either.
pub(crate) fn warn(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// `text` without what a terminal would obey: escape sequences begin with a control character, so those are replaced.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// `1536` as "1.5 KiB".
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 10.0 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

/// `1234567` as "1.23 M".
pub(crate) fn count(number: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(1_000_000_000_000, "T"), (1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")];
    match UNITS.iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", number as f64 / *size as f64),
        None => number.to_string(),
    }
}

/// A duration in the unit people would choose.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s => format!("{:.1} ms", s * 1e3),
    }
}

/// "1 worker", "3 workers".
pub(crate) fn plural(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Rows of cells as left-aligned columns, two spaces apart, without trailing blanks.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_cannot_move_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb\r\n\tc\u{9b}d"), "a\u{fffd}[2Jb\u{fffd}\n\tc\u{fffd}d");
    }

    #[test]
    fn sizes_read_like_sizes() {
        assert_eq!(
            [bytes(0), bytes(1536), bytes(25 << 20), bytes(u64::MAX)],
            ["0 B", "1.5 KiB", "25 MiB", "16384 PiB"]
        );
        assert_eq!([count(999), count(134_515_008), count(671_000_000_000)], ["999", "134.52 M", "671.00 B"]);
        assert_eq!(duration(Duration::from_micros(1500)), "1.5 ms");
        assert_eq!([plural(1, "worker"), plural(4, "worker")], ["1 worker", "4 workers"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "b".to_owned()], vec!["long".to_owned(), String::new()]];
        assert_eq!(table(&rows), "a     b\nlong\n");
    }
}
