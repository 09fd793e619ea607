//! Results on standard output: tables for people, JSON and YAML for programs. A closed pipe ends the command quietly.

use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table};
use serde_json::Value;

use crate::failure::Failure;

pub mod objects;
pub mod status;

/// Writes text and a newline to standard output.
pub fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    written(writeln!(io::stdout().lock(), "{text}"))
}

fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        // `tombolo get ... | head`: the reader has what it wanted.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::new(format_args!("standard output: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// One JSON document, indented.
pub fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    line(serde_json::to_string_pretty(value).map_err(|e| Failure::new(format_args!("result as JSON: {e}")))?)
}

/// One JSON document in one line, for streams of them.
pub fn json_line(value: &impl serde::Serialize) -> Result<(), Failure> {
    line(serde_json::to_string(value).map_err(|e| Failure::new(format_args!("result as JSON: {e}")))?)
}

/// One YAML document.
pub fn yaml(value: &Value) -> Result<(), Failure> {
    let text = yaml_text(value)?;
    line(text.trim_end())
}

pub fn yaml_text(value: &Value) -> Result<String, Failure> {
    serde_saphyr::to_string(value).map_err(|e| Failure::new(format_args!("result as YAML: {e}")))
}

/// A table in kubectl's look: no borders, columns aligned, as wide as the terminal or, piped, as it needs to be.
pub fn table(headers: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let arrangement =
        if io::stdout().is_terminal() { ContentArrangement::Dynamic } else { ContentArrangement::Disabled };
    table.set_content_arrangement(arrangement);
    table.set_header(headers.iter().map(|header| header.to_ascii_uppercase()));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// A table's text without trailing blanks.
pub fn table_text(table: &Table) -> String {
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// Removes what a terminal would obey: names and reasons come from peers.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_plain_aligned_columns() {
        let mut table = table(&["name", "state"]);
        table.add_row(["web", "Ready"]);
        table.add_row(["checkout", "Stale"]);
        assert_eq!(table_text(&table), "NAME      STATE\nweb       Ready\ncheckout  Stale");
    }

    #[test]
    fn escape_sequences_of_a_peer_are_not_passed_on() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a [2Jb ");
    }
}
