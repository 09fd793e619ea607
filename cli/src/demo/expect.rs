//! What a scenario expected and what it measured.

use serde::Serialize;

/// One expectation of a step.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Expectation {
    pub what: String,
    pub expected: String,
    pub measured: String,
    pub held: bool,
}

/// A step of the scenario.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    pub name: String,
    pub expectations: Vec<Expectation>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl StepReport {
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    pub fn expect(&mut self, what: &str, expected: impl ToString, measured: impl ToString, held: bool) {
        let (expected, measured) = (expected.to_string(), measured.to_string());
        self.expectations.push(Expectation { what: what.to_owned(), expected, measured, held });
    }

    pub fn note(&mut self, note: impl ToString) {
        self.notes.push(note.to_string());
    }

    pub fn held(&self) -> bool {
        // A step that expected nothing has shown nothing.
        !self.expectations.is_empty() && self.expectations.iter().all(|e| e.held)
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!("{} {}\n", if self.held() { "ok    " } else { "FAILED" }, self.name);
        for Expectation { what, expected, measured, held } in &self.expectations {
            let mark = if *held { ' ' } else { '!' };
            text.push_str(&format!("     {mark} {what:<34} {measured:<28} (expected {expected})\n"));
        }
        for note in &self.notes {
            text.push_str(&format!("       {note}\n"));
        }
        text
    }
}

/// All steps: `--json` prints it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub version: u32,
    pub held: bool,
    pub steps: Vec<StepReport>,
}

impl Report {
    pub fn new(steps: Vec<StepReport>) -> Self {
        let held = !steps.is_empty() && steps.iter().all(StepReport::held);
        Self { version: 1, held, steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_holds_only_if_every_step_expected_something_and_got_it() {
        let mut good = StepReport::new("call");
        good.expect("failed", "0", "0", true);
        assert!(Report::new(vec![good.clone()]).held);
        assert!(!Report::new(vec![good.clone(), StepReport::new("nothing expected")]).held);
        let mut bad = good;
        bad.expect("stall", "at most 1 s", "4 s", false);
        assert!(bad.text().contains("FAILED") && bad.text().contains("! stall"));
        assert!(!Report::new(vec![bad]).held);
        assert!(!Report::new(Vec::new()).held);
    }
}
