//! What the demo says while it starts: a line per step on standard error; a spinner only on a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::output;

/// The current step, if any.
pub struct Progress {
    spinner: Option<ProgressBar>,
    quiet: bool,
    started: Instant,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        let spinner = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let spinner = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                spinner.set_style(style);
            }
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        });
        Self { spinner, quiet, started: Instant::now() }
    }

    /// What is being done or waited for right now; shown on a terminal only.
    pub fn doing(&self, what: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(what.to_owned());
        }
    }

    /// A step that is done.
    pub fn done(&self, what: &str) {
        self.line(&format!("{:>5.1}s  {what}", self.started.elapsed().as_secs_f64()));
    }

    pub fn line(&self, text: &str) {
        match &self.spinner {
            _ if self.quiet => {}
            Some(spinner) => spinner.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// A result, on standard output, without disturbing the spinner.
    pub fn result(&self, text: &str) -> Result<(), Failure> {
        match &self.spinner {
            Some(spinner) => spinner.suspend(|| output::line(text)),
            None => output::line(text),
        }
    }

    pub fn finish(self) {
        if let Some(spinner) = self.spinner {
            spinner.finish_and_clear();
        }
    }
}
