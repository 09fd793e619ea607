//! Cases of one scenario that share what is expensive to start: all of them run, each is said with the time that it took, and
//! the test fails at its end by their names.

use std::time::Instant;

use anyhow::{Result, ensure};

pub struct Cases {
    begun: Instant,
    failed: Vec<String>,
}

impl Cases {
    /// `begun`: of everything, with what the cases share.
    pub fn new(begun: Instant) -> Self {
        Self { begun, failed: Vec::new() }
    }

    /// Runs one; whether it held.
    pub fn run(&mut self, name: &str, case: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        match case() {
            Ok(()) => {
                println!("ok   {name} ({:.1?})", start.elapsed());
                true
            }
            Err(error) => {
                println!("FAIL {name} ({:.1?}): {error:#}", start.elapsed());
                self.failed.push(format!("{name}: {error:#}"));
                false
            }
        }
    }

    pub fn all_held(&self) -> bool {
        self.failed.is_empty()
    }

    /// Fails unless every one held.
    pub fn end(self) -> Result<()> {
        println!("all of it took {:.1?}", self.begun.elapsed());
        ensure!(self.failed.is_empty(), "{} cases failed:\n{}", self.failed.len(), self.failed.join("\n"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_failed_are_named_at_the_end() {
        let mut cases = Cases::new(Instant::now());
        assert!(cases.run("one", || Ok(())) && cases.all_held());
        assert!(!cases.run("two", || anyhow::bail!("no")) && !cases.all_held());
        let error = cases.end().unwrap_err().to_string();
        assert!(error.contains("1 cases failed") && error.contains("two: no"), "{error}");
    }
}
