//! Keep-alive requests: every connection stands and has answered once before the window begins, so percentiles show
//! requests and not handshakes. A request still open at the end counts with the time it has waited, so a stall shows.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};

use super::{LoadArgs, LoadReport, WINDOW_LINE, response_length};
use crate::samples::Samples;

/// 256 full handshakes in a chain of four at 250/s take a second; ten are for a machine under load.
const SET_UP_LIMIT: Duration = Duration::from_secs(20);

const REQUEST: &[u8] = b"GET /1k HTTP/1.1\r\nHost: bench\r\n\r\n";

#[derive(Debug, Default)]
struct Shared {
    samples: RefCell<Samples>,
    measuring: Cell<bool>,
    errors: Cell<u64>,
}

pub(super) async fn run(args: &LoadArgs) -> Result<LoadReport> {
    let shared = Rc::new(Shared::default());
    let target = args.target;
    let count = args.connections;
    let (warm_up, window) = (args.warm_up(), args.window());
    LocalSet::new()
        .run_until(async move {
            let mut opening = JoinSet::new();
            for _ in 0..count {
                opening.spawn_local(async move {
                    let mut connection = Connection::open(target).await?;
                    connection.request().await?;
                    anyhow::Ok(connection)
                });
            }
            let mut connections = Vec::with_capacity(count);
            let opened = async {
                while let Some(connection) = opening.join_next().await {
                    connections.push(connection??);
                }
                anyhow::Ok(())
            };
            tokio::time::timeout(SET_UP_LIMIT, opened)
                .await
                .with_context(|| format!("{count} connections did not stand within {SET_UP_LIMIT:?}"))??;

            let mut running = JoinSet::new();
            let end = Instant::now() + warm_up + window;
            for connection in connections {
                running.spawn_local(drive(connection, shared.clone(), end));
            }
            tokio::time::sleep(warm_up).await;
            println!("{WINDOW_LINE}");
            let begin = Instant::now();
            shared.measuring.set(true);
            while running.join_next().await.is_some() {}
            let seconds = begin.elapsed().as_secs_f64();

            let mut samples = shared.samples.borrow_mut();
            let open_at_end = count as u64 - shared.errors.get().min(count as u64);
            Ok(LoadReport {
                seconds,
                completed: (samples.len() as u64).saturating_sub(open_at_end),
                errors: shared.errors.get(),
                p50_ms: samples.quantile_ms(0.5),
                p99_ms: samples.quantile_ms(0.99),
                max_ms: samples.quantile_ms(1.0),
                ..LoadReport::default()
            })
        })
        .await
}

/// Requests until `end`. A connection that fails is counted once and stays closed.
async fn drive(mut connection: Connection, shared: Rc<Shared>, end: Instant) {
    let begun = Cell::new(Instant::now());
    let requests = async {
        loop {
            begun.set(Instant::now());
            if connection.request().await.is_err() {
                return;
            }
            if shared.measuring.get() {
                shared.samples.borrow_mut().record(begun.get().elapsed());
            }
        }
    };
    match tokio::time::timeout_at(end.into(), requests).await {
        Ok(()) => shared.errors.set(shared.errors.get() + 1),
        Err(_) => shared.samples.borrow_mut().record(begun.get().elapsed()),
    }
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(target: std::net::SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(target).await.with_context(|| format!("connect to {target}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    async fn request(&mut self) -> Result<()> {
        self.stream.write_all(REQUEST).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("closed in the middle of an answer");
            }
            if let Some(length) = response_length(&self.buffer) {
                let length = length?;
                if length != self.buffer.len() {
                    bail!("{} bytes more than the answer", self.buffer.len() - length);
                }
                return Ok(());
            }
        }
    }
}
