//! What a process tells whoever scrapes it.
//!
//! In: an admin address. Out: single figures of `/metrics`, or all of them. Never here: a guess where a figure is missing.

use std::{collections::BTreeMap, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::eventually::soon;

/// How long a scrape may take where nobody minds its absence.
const GLANCE: Duration = Duration::from_secs(1);

/// Samples by name, labels included.
pub type Figures = BTreeMap<String, f64>;

/// Every sample of a process that answers at once; `None` where it does not.
pub async fn figures(address: &str) -> Option<Figures> {
    let text = timeout(GLANCE, scrape(address)).await.ok()?.ok()?;
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Some(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
}

/// The value of the one sample called `name`, which must be there.
pub async fn figure(address: &str, name: &str) -> f64 {
    let text = soon("a scrape", scrape(address)).await.unwrap_or_else(|error| panic!("{address}/metrics: {error}"));
    let sample = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = sample.unwrap_or_else(|| panic!("{address}/metrics has no {name}:\n{text}"));
    value.trim().parse().unwrap_or_else(|_| panic!("{name} is {value}"))
}

async fn scrape(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}
