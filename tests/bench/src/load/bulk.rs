//! Bulk transfer, measured where it arrives: blocking threads that count the bytes read within the window.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{LoadArgs, LoadReport, WINDOW_LINE};
use crate::origin::{CHUNK_BYTES, DOWNLOAD};

pub(super) fn run(args: &LoadArgs) -> Result<LoadReport> {
    let bytes = Arc::new(AtomicU64::new(0));
    let ended_early = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let mut streams = Vec::new();
    let mut threads = Vec::new();
    for _ in 0..args.connections {
        let mut stream = TcpStream::connect_timeout(&args.target, Duration::from_secs(10))
            .with_context(|| format!("connect to {}", args.target))?;
        stream.write_all(&[DOWNLOAD])?;
        streams.push(stream.try_clone()?);
        let (bytes, ended_early, over) = (bytes.clone(), ended_early.clone(), over.clone());
        threads.push(std::thread::spawn(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            while let Ok(read @ 1..) = stream.read(&mut chunk) {
                bytes.fetch_add(read as u64, Ordering::Relaxed);
            }
            if !over.load(Ordering::Relaxed) {
                ended_early.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    std::thread::sleep(args.warm_up());
    println!("{WINDOW_LINE}");
    let (begin, before) = (Instant::now(), bytes.load(Ordering::Relaxed));
    std::thread::sleep(args.window());
    let (seconds, received) = (begin.elapsed().as_secs_f64(), bytes.load(Ordering::Relaxed) - before);
    over.store(true, Ordering::Relaxed);
    for stream in streams {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(LoadReport {
        seconds,
        bytes: received,
        errors: ended_early.load(Ordering::Relaxed),
        ..LoadReport::default()
    })
}
