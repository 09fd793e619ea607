//! `tombolo admin-pipe`: standard input and output as one connection to the federator's admin socket. For `--kube-context`,
//! which runs it inside the federator's pod.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use clap::Args;

use crate::args::Connect;
use crate::context;
use crate::failure::{Exit, Failure};

const BUFFER: usize = 16 * 1024;

/// Carry one connection to the federator's admin socket over standard input and output
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  kubectl -n tombolo-system exec -i tombolo-federator-0 -- tombolo admin-pipe")]
pub struct AdminPipeArgs {}

pub fn run(AdminPipeArgs {}: AdminPipeArgs, connect: Connect) -> Result<Exit, Failure> {
    let path = context::socket(&connect)?;
    let socket = UnixStream::connect(&path).map_err(|e| Failure::new(e).at(path.display()))?;
    let answers = socket.try_clone().map_err(Failure::new)?;
    // It ends with the process: nothing wakes a read of standard input.
    std::thread::spawn(move || {
        let _ = carry(&mut io::stdin().lock(), &mut &socket);
        let _ = socket.shutdown(Shutdown::Write);
    });
    // Either side's end is an end, not a failure.
    let _ = carry(&mut &answers, &mut io::stdout().lock());
    Ok(Exit::Done)
}

/// Each piece goes on at once: who waits for it sends nothing more.
fn carry(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(buffer.get(..count).unwrap_or_default())?;
        to.flush()?;
    }
}
