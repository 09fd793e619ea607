//! New connections: connect, one request, its answer's first byte (the latency), the rest, close; without a pause.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};

use super::{LoadArgs, LoadReport, WINDOW_LINE, response_length};
use crate::samples::Samples;

const REQUEST: &[u8] = b"GET /1k HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";

/// After a failure: a topology that refuses at once must not become a loop that starves it.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(5);

pub(super) async fn run(args: &LoadArgs) -> Result<LoadReport> {
    let (target, count) = (args.target, args.connections);
    let (warm_up, window) = (args.warm_up(), args.window());
    // The very first one is told apart: through a mesh it may have to build what the others then find.
    let first = once(target).await?;
    LocalSet::new()
        .run_until(async move {
            let samples = Rc::new(RefCell::new(Samples::default()));
            let (measuring, errors) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
            let mut running = JoinSet::new();
            let end = Instant::now() + warm_up + window;
            for _ in 0..count {
                let (samples, measuring, errors) = (samples.clone(), measuring.clone(), errors.clone());
                running.spawn_local(async move {
                    let connections = async {
                        loop {
                            let measured = measuring.get();
                            match once(target).await {
                                Ok(latency) if measured => samples.borrow_mut().record(latency),
                                Ok(_) => {}
                                Err(_) => {
                                    errors.set(errors.get() + u64::from(measured));
                                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                                }
                            }
                        }
                    };
                    let _: Result<(), _> = tokio::time::timeout_at(end.into(), connections).await;
                });
            }
            tokio::time::sleep(warm_up).await;
            println!("{WINDOW_LINE}");
            let begin = Instant::now();
            measuring.set(true);
            while running.join_next().await.is_some() {}
            let mut samples = samples.borrow_mut();
            Ok(LoadReport {
                seconds: begin.elapsed().as_secs_f64(),
                completed: samples.len() as u64,
                errors: errors.get(),
                p50_ms: samples.quantile_ms(0.5),
                p99_ms: samples.quantile_ms(0.99),
                max_ms: samples.quantile_ms(1.0),
                first_ms: Some(first.as_secs_f64() * 1e3),
                ..LoadReport::default()
            })
        })
        .await
}

/// Time from the connect to the answer's first byte.
async fn once(target: SocketAddr) -> Result<Duration> {
    let begin = Instant::now();
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(REQUEST).await?;
    let mut answer = Vec::with_capacity(4096);
    let mut first_byte = None;
    while stream.read_buf(&mut answer).await? > 0 {
        first_byte.get_or_insert_with(|| begin.elapsed());
    }
    let complete = matches!(response_length(&answer), Some(Ok(length)) if length == answer.len());
    match first_byte {
        Some(latency) if complete => Ok(latency),
        _ => bail!("an incomplete answer of {} bytes", answer.len()),
    }
}
