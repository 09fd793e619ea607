//! Settings: environment and files are read here and nowhere else; what a flag says wins (the command line's part).
//!
//! Unknown keys are errors: settings structs carry `#[serde(deny_unknown_fields)]`, and the parser's message, which
//! names line and column, is passed on with the file's path.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// A settings file is a page of YAML; anything near this is a mistake (a data set given for a settings file).
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("settings file {path}: cannot be read ({source}): check the path and its permissions", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("settings file {path}: larger than {MAX_FILE_BYTES} bytes: that is no settings file", path = path.display())]
    TooLarge { path: PathBuf },
    #[error("settings file {path}: {reason}", path = path.display())]
    Parse { path: PathBuf, reason: String },
}

/// An environment variable; empty counts as unset, and so does what is no UTF-8.
#[allow(clippy::disallowed_methods)] // the owner of the environment
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Reads a YAML (or JSON) settings file.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, SettingsError> {
    let read = |source| SettingsError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(read)?;
    let size = file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(read)?;
    if size as u64 > MAX_FILE_BYTES {
        return Err(SettingsError::TooLarge { path: path.to_owned() });
    }
    parse(&text).map_err(|reason| SettingsError::Parse { path: path.to_owned(), reason })
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    // An empty file sets nothing.
    let text = if text.trim().is_empty() { "{}" } else { text };
    serde_saphyr::from_str(text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, serde::Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default, rename_all = "camelCase")]
    struct Sample {
        log_level: Option<String>,
        threads: Option<u32>,
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse::<Sample>("threads: 2\nlogLevle: info\n").unwrap_err();
        assert!(error.contains("logLevle") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_wrong_type_is_named_with_its_line() {
        let error = parse::<Sample>("threads: many\n").unwrap_err();
        assert!(error.contains("line 1"), "{error}");
    }

    #[test]
    fn an_empty_file_sets_nothing() {
        assert_eq!(parse::<Sample>("\n").unwrap(), Sample::default());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = load::<Sample>(Path::new("/nonexistent/tombolo.yaml")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/tombolo.yaml"), "{error}");
    }

    #[test]
    fn an_oversized_file_is_refused_before_it_is_parsed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big.yaml");
        std::fs::write(&path, vec![b'#'; MAX_FILE_BYTES as usize + 1]).unwrap();
        assert!(matches!(load::<Sample>(&path), Err(SettingsError::TooLarge { .. })));
    }
}
