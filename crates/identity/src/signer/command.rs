//! A key behind a program: a PKCS#11 tool, a KMS's command line, anything that can stand in a script.
//!
//! The program is started once per question, with one more argument:
//!
//! ```text
//! PROGRAM [ARGUMENTS] public-key     standard output: the public key, PEM (SubjectPublicKeyInfo, ECDSA P-256 or P-384)
//! PROGRAM [ARGUMENTS] sign           standard input: the bytes to sign (not their hash);
//!                                    standard output: the ECDSA signature, DER, raw or in base64
//! ```
//!
//! `TOMBOLO_SIGNER_ALGORITHM` is `ecdsa-p256-sha256` or `ecdsa-p384-sha384` for `sign`. Exit status 0 is success; of anything else
//! the end of standard error is shown. The terminal is the program's: it may ask for a PIN there. Every signature is checked
//! before it is used.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use base64::Engine;
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SubjectPublicKeyInfo};

use super::{Signer, SignerError};

/// A public key or a signature has some hundred bytes.
const MAX_ANSWER: u64 = 64 * 1024;
/// Characters of standard error that are repeated.
const MAX_SAID: usize = 500;
/// How often an ended program is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Signs by asking a program.
pub struct CommandSigner {
    words: Vec<String>,
    limit: Duration,
    public: SubjectPublicKeyInfo,
}

impl CommandSigner {
    /// Asks the program for its public key. `command`: program and arguments, separated by blanks; no shell reads them.
    pub fn open(command: &str, limit: Duration) -> Result<Self, SignerError> {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        let answer = ask(&words, "public-key", &[], "", limit)?;
        let shown = shown(&words, "public-key");
        let garbage = || SignerError::Garbage {
            command: shown.clone(),
            found: described(&answer),
            expected: "a public key in PEM",
        };
        let text = std::str::from_utf8(&answer).map_err(|_| garbage())?;
        let public = SubjectPublicKeyInfo::from_pem(text).map_err(|_| garbage())?;
        super::check_algorithm(&public, &format!("the public key of `{shown}`"))?;
        Ok(Self { words, limit, public })
    }
}

impl Signer for CommandSigner {
    fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignerError> {
        let p256 = *self.public.algorithm() == PKCS_ECDSA_P256_SHA256;
        let algorithm = if p256 { "ecdsa-p256-sha256" } else { "ecdsa-p384-sha384" };
        let answer = ask(&self.words, "sign", message, algorithm, self.limit)?;
        let text: Vec<u8> = answer.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let decoded = base64::engine::general_purpose::STANDARD.decode(text).ok();
        let candidates = [Some(answer.clone()), decoded];
        let good = candidates.into_iter().flatten().find(|s| super::verifies(&self.public, message, s));
        good.ok_or_else(|| SignerError::Garbage {
            command: shown(&self.words, "sign"),
            found: described(&answer),
            expected: "a signature that holds for the program's own public key",
        })
    }
}

fn shown(words: &[String], verb: &str) -> String {
    format!("{} {verb}", words.join(" "))
}

/// What an answer looks like, without repeating what may be secret or binary.
fn described(answer: &[u8]) -> String {
    match answer.len() {
        0 => "nothing".to_owned(),
        1 => "one byte".to_owned(),
        count => format!("{count} bytes of something else"),
    }
}

/// One question, one answer. The program is killed when its time is over.
fn ask(
    words: &[String],
    verb: &str,
    input: &[u8],
    algorithm: &str,
    limit: Duration,
) -> Result<Vec<u8>, SignerError> {
    let start = |reason: String| SignerError::Start { command: words.join(" "), reason };
    let (program, arguments) = words.split_first().ok_or_else(|| start("it names no program".to_owned()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .arg(verb)
        .env("TOMBOLO_SIGNER_ALGORITHM", algorithm)
        // The passphrase of a file is none of its business.
        .env_remove("TOMBOLO_TRUST_PASSPHRASE")
        .env_remove("TOMBOLO_TRUST_NEW_PASSPHRASE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| start(e.to_string()))?;
    let deadline = Instant::now() + limit;
    let late = || SignerError::Late { command: shown(words, verb), limit };
    let (answer, said) = (gathered(child.stdout.take()), gathered(child.stderr.take()));
    if let Some(mut pipe) = child.stdin.take() {
        let input = input.to_vec();
        // A program that does not read its input must not hold this one; the thread ends with the pipe.
        std::thread::spawn(move || pipe.write_all(&input));
    }
    let Some(status) = ended(&mut child, deadline).map_err(|e| start(e.to_string()))? else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(late());
    };
    // What it has started itself may still hold the pipes.
    let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).max(LOOK_EVERY);
    let answer = answer.recv_timeout(left(deadline)).map_err(|_| late())?;
    if !status.success() {
        let said = said.recv_timeout(left(Instant::now() + LOOK_EVERY * 10)).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let end: String =
            said.trim().chars().rev().take(MAX_SAID).collect::<Vec<_>>().into_iter().rev().collect();
        let said = if end.is_empty() { String::new() } else { format!(": {}", end.replace('\n', " | ")) };
        return Err(SignerError::Failed { command: shown(words, verb), status: status.to_string(), said });
    }
    Ok(answer)
}

/// Reads a pipe to its end, or to what an answer may have.
fn gathered(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.by_ref().take(MAX_ANSWER).read_to_end(&mut bytes);
            let _ = sender.send(bytes);
            // Drained, so that a talkative program is not stopped by a full pipe.
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        }
    });
    receiver
}

/// The status of a program that has ended; `None` at the deadline.
fn ended(child: &mut Child, deadline: Instant) -> std::io::Result<Option<std::process::ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
