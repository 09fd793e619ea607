//! Asking before something is destroyed.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;

use crate::failure::Failure;

#[derive(Clone, Copy, Debug, Args)]
pub struct Consent {
    /// Do it without asking
    #[arg(long, short = 'y')]
    pub yes: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// True: go ahead. Without a terminal nobody can be asked, which is wrong usage rather than a yes.
pub fn ask(question: &str, consent: Consent) -> Result<bool, Failure> {
    if consent.yes {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format_args!(
            "{question} Nobody can be asked here: standard input is no terminal"
        ))
        .remedy("add --yes, or --dry-run to see what would be done"));
    }
    eprint!("{question} [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(Failure::new)?;
    Ok(is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_is_a_yes() {
        assert!(is_yes("y\n") && is_yes(" Yes \n"));
        assert!(!is_yes("\n") && !is_yes("yo") && !is_yes(""));
    }
}
