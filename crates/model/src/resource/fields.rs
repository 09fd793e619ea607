//! Errors about fields: path, value, what would be accepted.

use std::fmt;

use super::suggestion;

/// One field that can't be accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FieldError {
    pub path: String,
    pub message: String,
}

fn quoted(value: &str) -> String {
    if value.chars().count() > 80 {
        value.chars().take(80).chain("...".chars()).collect()
    } else {
        value.to_owned()
    }
}

impl FieldError {
    pub fn new(path: impl Into<String>, value: impl ToString, accepted: impl ToString) -> Self {
        let message =
            format!("{:?} is not accepted; give {}", quoted(&value.to_string()), accepted.to_string());
        Self { path: path.into(), message }
    }
    pub fn missing(path: impl Into<String>, accepted: impl ToString) -> Self {
        Self { path: path.into(), message: format!("is missing; give {}", accepted.to_string()) }
    }
    /// An unknown field, with the nearest known one.
    pub fn unknown<'a>(path: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> Self {
        let word = path.rsplit('.').next().unwrap_or(path);
        let hint =
            suggestion(word, known.clone()).map(|s| format!(" (did you mean {s}?)")).unwrap_or_default();
        let known: Vec<_> = known.into_iter().collect();
        Self {
            path: path.to_owned(),
            message: format!("is not a known field{hint}; known are {}", known.join(", ")),
        }
    }
    /// Turns serde's message about a path into ours.
    pub(super) fn from_serde(path: &str, message: &str) -> Self {
        if let Some(rest) = message.strip_prefix("unknown field `")
            && let Some((field, rest)) = rest.split_once('`')
        {
            let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
            // serde names the parent's path for unknown fields in some formats and the field's in others.
            let path = if path.ends_with(field) { path.to_owned() } else { format!("{path}.{field}") };
            return Self::unknown(&path, known);
        }
        if let Some(rest) = message.strip_prefix("missing field `") {
            let field = rest.split('`').next().unwrap_or_default();
            return Self { path: format!("{path}.{field}"), message: "is missing".into() };
        }
        Self { path: path.to_owned(), message: message.to_owned() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// Why an object was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct ObjectError {
    /// `kind/name`, as far as it could be read.
    pub subject: String,
    pub fields: Vec<FieldError>,
}

impl ObjectError {
    pub(super) fn document(message: &str) -> Self {
        let error = FieldError { path: "object".into(), message: message.into() };
        Self { subject: String::new(), fields: vec![error] }
    }
    pub(super) fn unknown_kind<'a>(
        kind: &str,
        nearest: Option<&str>,
        known: impl Iterator<Item = &'a str>,
    ) -> Self {
        let hint = nearest.map(|s| format!(" (did you mean {s}?)")).unwrap_or_default();
        let known: Vec<_> = known.collect();
        let message = format!("{:?} is not a known kind{hint}; known are {}", quoted(kind), known.join(", "));
        Self { subject: quoted(kind), fields: vec![FieldError { path: "kind".into(), message }] }
    }
    pub(super) fn fields(subject: &str, fields: Vec<FieldError>) -> Self {
        Self { subject: quoted(subject), fields }
    }
}

impl fmt::Display for ObjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.subject.is_empty() {
            write!(f, "{}: ", self.subject)?;
        }
        for (index, field) in self.fields.iter().enumerate() {
            write!(f, "{}{field}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}
