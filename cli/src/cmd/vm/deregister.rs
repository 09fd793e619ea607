//! The farewell of a machine, and whether its sidecar still runs.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use tombolo_overlay::member::Member;

use crate::failure::{self, Failure};

/// A local endpoint answers at once.
const ANSWER: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(50);
/// A status line and a list of what is waited for.
const MAX_ANSWER_BYTES: u64 = 4096;

/// Tells the federator of the identity in a directory, if there is one; what became of it, for people.
pub fn farewell(dir: &Path, patience: Duration) -> Result<String, Failure> {
    let member = match Member::load(dir) {
        Ok(Some(member)) => member,
        Ok(None) => return Ok("there was no identity yet".to_owned()),
        Err(error) => return Ok(format!("the identity does not read ({error}): no federator was told")),
    };
    let id = member.spiffe_id();
    let runtime =
        tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
    let told = runtime.block_on(member.leave((Ipv4Addr::UNSPECIFIED, 0).into(), patience));
    Ok(match told {
        Ok(()) => format!("{id} has left: the federator has taken it out"),
        Err(error) => format!(
            "no federator was told that {id} leaves ({}): it is out of rotation by its silence, its identity ends by itself, at most a day from now",
            failure::chain(&error)
        ),
    })
}

/// What the sidecar says of its readiness; an error: nobody answers.
fn readiness(admin: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET /ready HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Whether a sidecar answers there.
pub fn runs(admin: SocketAddr) -> bool {
    readiness(admin).is_ok()
}

/// Waits until the sidecar is ready.
pub fn ready(admin: SocketAddr, patience: Duration) -> Result<(), Failure> {
    let until = Instant::now() + patience;
    loop {
        let answer = readiness(admin);
        if answer.as_ref().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            return Ok(());
        }
        if Instant::now() >= until {
            let said = match answer {
                Ok(answer) => answer.lines().last().unwrap_or_default().trim().to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(Failure::timed_out(format_args!(
                "the sidecar was not ready within {} s: {said}",
                patience.as_secs()
            ))
            .remedy(
                "see what its log says (`journalctl -u tombolo-sidecar`), or wait longer with --timeout",
            ));
        }
        std::thread::sleep(POLL);
    }
}
