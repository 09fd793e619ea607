//! The far end of bulk transfers: the first byte of a connection says who sends. `D`: the origin sends until the
//! client goes; `U`: it reads until the end. One thread per connection, blocking, so that it costs next to nothing.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result};

/// The client asks to be sent data.
pub const DOWNLOAD: u8 = b'D';
/// The client will send data.
pub const UPLOAD: u8 = b'U';

/// Per read and write. Large enough that system calls do not show at 50 Gbit/s.
pub const CHUNK_BYTES: usize = 256 << 10;

#[derive(Debug, clap::Args)]
pub struct OriginArgs {
    #[arg(long)]
    listen: SocketAddr,
}

pub fn run(args: &OriginArgs) -> Result<()> {
    let listener = TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    // A connection that fails to be accepted or served is the client's loss; it reports what it got.
    for stream in listener.incoming().flatten() {
        std::thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || serve(stream))
            .context("start a thread")?;
    }
    Ok(())
}

fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    let mut chunk = vec![0x5a; CHUNK_BYTES];
    if wish == [UPLOAD] {
        while stream.read(&mut chunk)? > 0 {}
        return Ok(());
    }
    loop {
        stream.write_all(&chunk)?;
    }
}
