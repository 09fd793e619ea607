//! Small TCP programs for scenarios: an endless numbered stream whose reader knows every byte, and request load.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::netns::Namespace;

/// Byte `index` of the stream: any loss, repetition or reordering shows.
fn expected(index: u64) -> u8 {
    (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// A server in `namespace` that answers each connection: one byte in, then what it asks for: `s` an endless numbered
/// stream, `e` an echo until the peer ends its half. Ends with the value.
pub struct StreamServer {
    stop: Arc<AtomicBool>,
    address: SocketAddr,
    namespace: crate::netns::NamespaceHandle,
}

impl StreamServer {
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let listener = namespace.run(|| TcpListener::bind(address))??;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let stopped = Arc::clone(&stopped);
                std::thread::spawn(move || drop(serve(stream, &stopped)));
            }
        });
        Ok(Self { stop, address, namespace: namespace.handle() })
    }
}

impl Drop for StreamServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let (address, namespace) = (self.address, self.namespace.clone());
        // Wakes the accept loop; the thread may join the namespace because it does nothing else.
        let _ = std::thread::spawn(move || {
            namespace.enter().map(|()| TcpStream::connect_timeout(&address, Duration::from_millis(200)))
        })
        .join();
    }
}

fn serve(mut stream: TcpStream, stop: &AtomicBool) -> std::io::Result<()> {
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    let mut buffer = vec![0; 16 * 1024];
    if mode == *b"e" {
        loop {
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                return stream.shutdown(std::net::Shutdown::Write);
            }
            stream.write_all(buffer.get(..count).unwrap_or_default())?;
        }
    }
    let mut index = 0;
    while !stop.load(Ordering::Relaxed) {
        for byte in &mut buffer {
            *byte = expected(index);
            index += 1;
        }
        stream.write_all(&buffer)?;
    }
    Ok(())
}

/// What a reader of the endless stream saw.
#[derive(Debug, Default)]
struct Seen {
    bytes: AtomicU64,
    longest_stall_micros: AtomicU64,
}

/// Reads the endless stream through `address` inside a namespace, checking every byte.
pub struct StreamReader {
    seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl StreamReader {
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let mut stream = namespace.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
        // A stalled stream is what is measured; one that never moves again is a failure.
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(b"s")?;
        let (seen, stop) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
        let (seen_, stop_) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || read(stream, &seen_, &stop_));
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// Whether the stream has broken or ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }

    /// The longest time without a byte since the last call.
    pub fn take_longest_stall(&self) -> Duration {
        Duration::from_micros(self.seen.longest_stall_micros.swap(0, Ordering::Relaxed))
    }

    /// Ends the reader; an error if the stream broke or a byte was wrong.
    pub fn finish(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the reader has ended")?;
        thread.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        Ok(self.bytes())
    }
}

fn read(mut stream: TcpStream, seen: &Seen, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let (mut index, mut last) = (0u64, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let count =
            stream.read(&mut buffer).with_context(|| format!("the stream broke after {index} bytes"))?;
        ensure!(count > 0, "the stream ended after {index} bytes");
        let stall = last.elapsed().as_micros() as u64;
        seen.longest_stall_micros.fetch_max(stall, Ordering::Relaxed);
        last = Instant::now();
        for byte in buffer.get(..count).unwrap_or_default() {
            ensure!(*byte == expected(index), "byte {index} is wrong");
            index += 1;
        }
        seen.bytes.store(index, Ordering::Relaxed);
    }
    Ok(())
}

/// HTTP requests, one connection each, `per_second`, from inside a namespace, until stopped.
pub struct RequestLoad {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Answer>>,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Answer {
    pub at: Instant,
    pub took: Duration,
    /// First line of the body, or the error.
    pub body: Result<String, String>,
}

/// Requests that may be open at a time: a third of a second's, and enough for a service that stalls under a small load.
fn workers(per_second: u32) -> u32 {
    (per_second / 3).clamp(32, 256)
}
/// A moment that nobody was free for is let go after this: a burst afterwards would measure itself.
const LATE: Duration = Duration::from_millis(200);

impl RequestLoad {
    pub fn start(namespace: &Namespace, address: SocketAddr, path: &str, per_second: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, path, handle) = (Arc::clone(&stop), path.to_owned(), namespace.handle());
        let thread = std::thread::spawn(move || {
            let (start, sent) = (Instant::now(), std::sync::atomic::AtomicU32::new(0));
            let worker = || {
                let mut answers = Vec::new();
                if handle.enter().is_err() {
                    return answers;
                }
                while !stopped.load(Ordering::Relaxed) {
                    // Each takes the next moment that is due; one that waits for its answer holds no other up.
                    let number = sent.fetch_add(1, Ordering::Relaxed);
                    let due = start + Duration::from_secs(1) * number / per_second;
                    if due.elapsed() > LATE {
                        continue;
                    }
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let at = Instant::now();
                    let body = request(address, &path).map_err(|e| e.to_string());
                    answers.push(Answer { at, took: at.elapsed(), body });
                }
                answers
            };
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..workers(per_second)).map(|_| scope.spawn(worker)).collect();
                let mut answers: Vec<Answer> =
                    workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect();
                answers.sort_by_key(|answer| answer.at);
                answers
            })
        });
        Self { stop, thread }
    }

    pub fn finish(self) -> Result<Vec<Answer>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the load panicked"))
    }
}

fn request(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of header")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{}", head.lines().next().unwrap_or_default());
    Ok(body.lines().next().unwrap_or_default().to_owned())
}
