//! Load generators, each a process of its own. Protocol with the runner: the line `window` when the measured window
//! begins (connections stand and are warm), then one JSON line with a [`LoadReport`] when it ends.

mod bulk;
mod connect;
mod http;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// What the runner waits for before it reads the proxies' CPU time.
pub const WINDOW_LINE: &str = "window";

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadKind {
    /// Keep-alive requests, one after the other on each connection.
    Http,
    /// Connect, one request, close.
    Connect,
    /// Receive as much as comes, on parallel streams.
    Bulk,
}

#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    #[arg(long, value_enum)]
    pub kind: LoadKind,
    #[arg(long)]
    pub target: SocketAddr,
    /// Connections, or streams, at the same time.
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// Length of the measured window.
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Load before the window that is not measured.
    #[arg(long, default_value_t = 0.3)]
    pub warm_up: f64,
}

impl LoadArgs {
    fn window(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn warm_up(&self) -> Duration {
        Duration::from_secs_f64(self.warm_up)
    }
}

/// What one run measured, within its window only.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct LoadReport {
    pub seconds: f64,
    /// Requests or connections completed.
    pub completed: u64,
    pub errors: u64,
    pub bytes: u64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub max_ms: Option<f64>,
    /// `connect` only: the very first connection, before any other through the topology.
    pub first_ms: Option<f64>,
}

pub fn run(args: &LoadArgs) -> Result<()> {
    let report = match args.kind {
        LoadKind::Http => current_thread()?.block_on(http::run(args))?,
        LoadKind::Connect => current_thread()?.block_on(connect::run(args))?,
        LoadKind::Bulk => bulk::run(args)?,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

fn current_thread() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("build a runtime")
}

/// Length in bytes of the complete HTTP/1.1 response at the start of `data`, or `None` while more is to come.
fn response_length(data: &[u8]) -> Option<Result<usize>> {
    let head = data.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(data.get(..head)?);
    if !text.starts_with("HTTP/1.1 200 ") {
        return Some(Err(anyhow::anyhow!("unexpected answer: {}", text.lines().next().unwrap_or_default())));
    }
    let body = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let Some(body) = body else { return Some(Err(anyhow::anyhow!("an answer without Content-Length"))) };
    (data.len() >= head + body).then_some(Ok(head + body))
}

#[cfg(test)]
mod tests {
    use super::response_length;

    #[test]
    fn a_response_is_complete_with_its_last_body_byte() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc";
        assert_eq!(response_length(whole).unwrap().unwrap(), whole.len());
        assert!(response_length(&whole[..whole.len() - 1]).is_none());
        assert!(response_length(b"HTTP/1.1 200 OK\r\nContent-Le").is_none());
        assert!(response_length(b"HTTP/1.1 502 Bad\r\n\r\n").unwrap().is_err());
        assert!(response_length(b"HTTP/1.1 200 OK\r\n\r\n").unwrap().is_err());
    }
}
