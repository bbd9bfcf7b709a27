//! What a process tells whoever scrapes it.
//!
//! In: an admin address. Out: single figures of `/metrics`. Never here: a guess where a figure is missing.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::eventually::soon;

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
