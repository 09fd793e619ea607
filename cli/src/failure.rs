//! How a command ends: the exit codes of the design (section 11), and failures that say what failed, where, and what to do.

use std::fmt;
use std::process::ExitCode;

/// Exit codes. Scripts rely on them: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    ProblemsFound = 3,
    TimedOut = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a command could not do what was asked.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// What failed and where.
    what: String,
    /// What to do about it.
    remedy: Option<String>,
}

impl Failure {
    pub fn new(what: impl fmt::Display) -> Self {
        Self { exit: Exit::Failed, what: what.to_string(), remedy: None }
    }

    /// The command was not given what it needs.
    pub fn usage(what: impl fmt::Display) -> Self {
        Self { exit: Exit::Usage, ..Self::new(what) }
    }

    pub fn timed_out(what: impl fmt::Display) -> Self {
        Self { exit: Exit::TimedOut, ..Self::new(what) }
    }

    pub fn remedy(mut self, remedy: impl fmt::Display) -> Self {
        self.remedy = Some(remedy.to_string());
        self
    }

    /// Puts where it happened in front.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.what = format!("{place}: {}", self.what);
        self
    }

    /// Prints to standard error; the exit code to end with.
    pub fn report(&self) -> ExitCode {
        eprintln!("{self}");
        self.exit.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  what to do: {remedy}")?;
        }
        Ok(())
    }
}

/// The causes of an error, outermost first, without repeating what an outer one already says.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_where_and_what_to_do() {
        let text = Failure::new("no such field").at("web.yaml:3").remedy("remove it").to_string();
        assert_eq!(text, "error: web.yaml:3: no such field\n  what to do: remove it");
    }

    #[test]
    fn exit_codes_are_those_of_the_design() {
        assert_eq!(
            [Exit::Done, Exit::Failed, Exit::Usage, Exit::ProblemsFound, Exit::TimedOut].map(|e| e as u8),
            [0, 1, 2, 3, 4]
        );
    }
}
