//! How the commands of `tombolo trust` come to the root's key: its passphrase, or the program that signs.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tombolo_identity::authority::{Protection, RootAuthority};
use tombolo_identity::files;
use tombolo_identity::signer::command::CommandSigner;
use tombolo_runtime::settings;
use zeroize::Zeroizing;

use crate::args::duration;
use crate::failure::{Exit, Failure, chain};
use crate::output;

const PASSPHRASE: &str = "TOMBOLO_TRUST_PASSPHRASE";
const NEW_PASSPHRASE: &str = "TOMBOLO_TRUST_NEW_PASSPHRASE";
/// A passphrase is a line; this is a wrong file.
const MAX_PASSPHRASE: u64 = 4096;
const TYPING_ERRORS: usize = 3;

/// Where the passphrase of `root.key` comes from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Root key")]
pub struct CurrentPassphrase {
    /// File with the passphrase of root.key [default: TOMBOLO_TRUST_PASSPHRASE, else asked for at a terminal]
    #[arg(long, env = "TOMBOLO_TRUST_PASSPHRASE_FILE", value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

/// How the root's key is reached.
#[derive(Debug, Args)]
#[command(next_help_heading = "Root key")]
pub struct KeyArgs {
    #[command(flatten)]
    passphrase: CurrentPassphrase,
    /// Program with its arguments that holds the root's key and signs with it; no shell reads this
    #[arg(long, env = "TOMBOLO_TRUST_SIGNER_COMMAND", value_name = "COMMAND")]
    signer_command: Option<String>,
    /// How long that program may take to answer
    #[arg(long, env = "TOMBOLO_TRUST_SIGNER_TIMEOUT", value_name = "DURATION", default_value = "60s", value_parser = duration)]
    signer_timeout: Duration,
}

/// Whether a new root's key is encrypted.
#[derive(Clone, Copy, Debug, Args)]
pub struct Encryption {
    /// Keep the root's key under a passphrase [default: when one is given; a terminal is asked for one]
    #[arg(long, conflicts_with_all = ["no_encrypt", "signer_command"])]
    encrypt: bool,
    /// Keep it in a plain file, and ask nothing
    #[arg(long, conflicts_with = "signer_command")]
    no_encrypt: bool,
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::new(chain(&error))
}

fn at_a_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// The passphrase of a file or of an environment variable.
fn given(file: Option<&Path>, variable: &str) -> Result<Option<Zeroizing<String>>, Failure> {
    let text = match file {
        Some(path) => {
            let text = files::read_secret(path, MAX_PASSPHRASE).map_err(failed)?;
            let line = text.strip_suffix('\n').unwrap_or(&text);
            let line = Zeroizing::new(line.strip_suffix('\r').unwrap_or(line).to_owned());
            if line.is_empty() {
                return Err(Failure::usage("is empty")
                    .at(path.display())
                    .remedy("put the passphrase into it"));
            }
            Some(line)
        }
        None => settings::environment(variable).map(Zeroizing::new),
    };
    Ok(text)
}

fn prompt(question: &str) -> Result<Zeroizing<String>, Failure> {
    rpassword::prompt_password(question)
        .map(Zeroizing::new)
        .map_err(|e| Failure::new(format_args!("the passphrase can't be read from the terminal: {e}")))
}

/// Asks twice; `None` when nothing was typed.
fn prompt_new(question: &str) -> Result<Option<Zeroizing<String>>, Failure> {
    for _ in 0..TYPING_ERRORS {
        let first = prompt(question)?;
        if first.is_empty() {
            return Ok(None);
        }
        if *prompt("The same again: ")? == *first {
            return Ok(Some(first));
        }
        eprintln!("they differ; once more");
    }
    Err(Failure::new("the two passphrases differed each time; nothing was written"))
}

impl KeyArgs {
    fn signer(&self) -> Result<Option<Box<CommandSigner>>, Failure> {
        let Some(command) = &self.signer_command else { return Ok(None) };
        CommandSigner::open(command, self.signer_timeout).map(Box::new).map(Some).map_err(failed)
    }

    /// The root of a directory, ready to sign.
    pub fn open(&self, dir: &Path) -> Result<RootAuthority, Failure> {
        let mut root = super::load(dir)?;
        if let Some(signer) = self.signer()? {
            root.attach(signer).map_err(failed)?;
            return Ok(root);
        }
        if root.is_encrypted().map_err(failed)? {
            root.unlock(&self.passphrase.current(dir)?).map_err(failed)?;
        }
        Ok(root)
    }

    /// The root of a directory and its successor, ready to sign; both are under one passphrase, or each behind a program.
    pub fn open_pair(&self, dir: &Path, next: &Path, successor: &SuccessorKey) -> Result<Pair, Failure> {
        let (mut old, mut new) = (super::load(dir)?, super::load(next)?);
        let programs = (self.signer()?, successor.signer(self.signer_timeout)?);
        let needs = |root: &RootAuthority, program: &Option<_>| -> Result<bool, Failure> {
            Ok(program.is_none() && root.is_encrypted().map_err(failed)?)
        };
        let locked = (needs(&old, &programs.0)?, needs(&new, &programs.1)?);
        // Asked for once.
        let passphrase = (locked.0 || locked.1).then(|| self.passphrase.current(dir)).transpose()?;
        let roots = [(&mut old, programs.0, locked.0), (&mut new, programs.1, locked.1)];
        for (root, program, locked) in roots {
            match (program, &passphrase) {
                (Some(program), _) => root.attach(program).map_err(failed)?,
                (None, Some(passphrase)) if locked => root.unlock(passphrase).map_err(failed)?,
                (None, _) => {}
            }
        }
        Ok(Pair { old, new })
    }

    /// Opens a root and makes its successor, whose key is kept as its own is.
    pub fn succeed(
        &self,
        dir: &Path,
        successor: &SuccessorKey,
        make: impl FnOnce(Protection<'_>) -> Result<RootAuthority, Failure>,
    ) -> Result<Pair, Failure> {
        let mut old = super::load(dir)?;
        if let Some(program) = self.signer()? {
            old.attach(program).map_err(failed)?;
        }
        let encrypted = self.signer_command.is_none() && old.is_encrypted().map_err(failed)?;
        let passphrase = encrypted.then(|| self.passphrase.current(dir)).transpose()?;
        if let Some(passphrase) = &passphrase {
            old.unlock(passphrase).map_err(failed)?;
        }
        let new = match (successor.signer(self.signer_timeout)?, &passphrase) {
            (Some(program), _) => make(Protection::Signer(program))?,
            (None, Some(passphrase)) => make(Protection::Passphrase(passphrase))?,
            (None, None) if self.signer_command.is_none() && old.holds_key() => make(Protection::Plain)?,
            (None, None) => {
                return Err(Failure::usage(
                    "the root's key lies behind a program, and its successor's would be in a file",
                )
                .remedy("name the program that holds the new key with --successor-signer-command"));
            }
        };
        Ok(Pair { old, new })
    }

    /// Makes a new root as the flags, a given passphrase or an asked operator want it.
    pub fn protect<R>(
        &self,
        encryption: Encryption,
        make: impl FnOnce(Protection<'_>) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let Encryption { encrypt, no_encrypt } = encryption;
        if let Some(signer) = self.signer()? {
            return make(Protection::Signer(signer));
        }
        if no_encrypt {
            return make(Protection::Plain);
        }
        let passphrase = match self.passphrase.given()? {
            Some(given) => Some(given),
            None if at_a_terminal() => prompt_new(if encrypt {
                "Passphrase for the root's key: "
            } else {
                "Passphrase for the root's key (empty for none): "
            })?,
            None => None,
        };
        match passphrase {
            Some(passphrase) => make(Protection::Passphrase(&passphrase)),
            None if encrypt => Err(Failure::usage("--encrypt without a passphrase").remedy(format_args!(
                "give one with --passphrase-file FILE or {PASSPHRASE}, or at a terminal"
            ))),
            None => {
                let made = make(Protection::Plain)?;
                eprintln!("root.key is not encrypted; `tombolo trust passphrase` encrypts it");
                Ok(made)
            }
        }
    }
}

/// A root and its successor.
pub struct Pair {
    pub old: RootAuthority,
    pub new: RootAuthority,
}

/// Where a successor's key lies; where the root's own does unless this says otherwise.
#[derive(Debug, Args)]
#[command(next_help_heading = "Root key")]
pub struct SuccessorKey {
    /// Program with its arguments that holds the new root's key [default: a file, as the root's own key is]
    #[arg(long, env = "TOMBOLO_TRUST_SUCCESSOR_SIGNER_COMMAND", value_name = "COMMAND")]
    successor_signer_command: Option<String>,
}

impl SuccessorKey {
    fn signer(&self, timeout: Duration) -> Result<Option<Box<CommandSigner>>, Failure> {
        let Some(command) = &self.successor_signer_command else { return Ok(None) };
        CommandSigner::open(command, timeout).map(Box::new).map(Some).map_err(failed)
    }
}

impl CurrentPassphrase {
    /// What was given without asking anybody.
    fn given(&self) -> Result<Option<Zeroizing<String>>, Failure> {
        given(self.passphrase_file.as_deref(), PASSPHRASE)
    }

    /// The passphrase that `root.key` has.
    fn current(&self, dir: &Path) -> Result<Zeroizing<String>, Failure> {
        if let Some(given) = self.given()? {
            return Ok(given);
        }
        if at_a_terminal() {
            return prompt(&format!("Passphrase of {}: ", dir.join("root.key").display()));
        }
        Err(Failure::usage(format_args!(
            "{} is encrypted, and nobody can be asked",
            dir.join("root.key").display()
        ))
        .remedy(format_args!("give its passphrase with --passphrase-file FILE or {PASSPHRASE}")))
    }
}

/// Gives `root.key` another passphrase, or none.
pub fn change(
    passphrase: &CurrentPassphrase,
    new_file: Option<&Path>,
    remove: bool,
    dir: &Path,
) -> Result<Exit, Failure> {
    // Its successor is under the same passphrase.
    super::rotate::refuse_while_under_way(dir)?;
    let root = super::load(dir)?;
    if !root.holds_key() {
        return Err(Failure::new(format_args!(
            "{} holds no root.key: its key lies elsewhere",
            dir.display()
        )));
    }
    let encrypted = root.is_encrypted().map_err(failed)?;
    let current = if encrypted { Some(passphrase.current(dir)?) } else { None };
    let new = match (remove, given(new_file, NEW_PASSPHRASE)?) {
        (true, _) => None,
        (false, Some(given)) => Some(given),
        (false, None) if at_a_terminal() => {
            let typed = prompt_new("New passphrase for the root's key: ")?;
            Some(typed.ok_or_else(|| {
                Failure::usage("an empty passphrase protects nothing").remedy("--remove takes it away")
            })?)
        }
        (false, None) => {
            return Err(Failure::usage("no new passphrase was given, and nobody can be asked").remedy(
                format_args!("give one with --new-passphrase-file FILE or {NEW_PASSPHRASE}, or --remove"),
            ));
        }
    };
    root.set_passphrase(current.as_ref().map(|p| p.as_str()), new.as_ref().map(|p| p.as_str()))
        .map_err(failed)?;
    let path = dir.join("root.key");
    match new {
        Some(_) => output::line(format_args!("{} is encrypted with the new passphrase", path.display()))?,
        None => output::line(format_args!("{} is not encrypted", path.display()))?,
    }
    eprintln!("copies that were made before are as they were: remove them, and make the backup anew");
    Ok(Exit::Done)
}
