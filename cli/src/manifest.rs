//! Manifests as the operator gives them: a file, a directory or standard input, YAML or JSON, several documents each.
//!
//! Everything is read and checked before anything is sent, so a wrong file changes nothing. Sizes are bounded before
//! parsing; every complaint names the file and, where the parser knows it, the line.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;
use serde_saphyr::Spanned;

use tombolo_model::resource::{KindInfo, MAX_OBJECT_BYTES, Object};

use crate::failure::Failure;
use crate::output::objects::text;

/// A manifest is text by people or a generator; 1,024 objects of a usual size are near 2 MB.
pub const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;
/// Documents in one file.
const MAX_OBJECTS: usize = 1024;

/// One object and where it came from.
#[derive(Debug)]
pub struct Manifest {
    pub object: Value,
    /// `file:line` of its first line.
    pub place: String,
}

impl Manifest {
    pub fn kind(&self) -> &str {
        text(&self.object, "/kind")
    }
    pub fn namespace(&self) -> &str {
        text(&self.object, "/metadata/namespace")
    }
    pub fn name(&self) -> &str {
        text(&self.object, "/metadata/name")
    }
    /// The object as the admin API takes it.
    pub fn json(&self) -> String {
        self.object.to_string()
    }
}

/// Reads every source in turn; `-` is standard input.
pub fn read(sources: &[PathBuf]) -> Result<Vec<Manifest>, Failure> {
    let mut manifests = Vec::new();
    for source in sources {
        if source == Path::new("-") {
            let text = bounded(std::io::stdin().lock(), "standard input")?;
            manifests.extend(parse("standard input", &text)?);
            continue;
        }
        for file in files(source)? {
            let place = file.display().to_string();
            let opened = std::fs::File::open(&file).map_err(|e| Failure::new(e).at(&place))?;
            // Refused by its size before a byte is read; the bounded read below covers pipes and growing files.
            let size = opened.metadata().map(|m| m.len()).unwrap_or(0);
            if size > MAX_FILE_BYTES {
                return Err(too_large(&place, size));
            }
            manifests.extend(parse(&place, &bounded(opened, &place)?)?);
        }
    }
    if manifests.is_empty() {
        let names: Vec<_> = sources.iter().map(|source| source.display().to_string()).collect();
        return Err(Failure::new("no objects found").at(names.join(", ")));
    }
    Ok(manifests)
}

/// The file itself, or a directory's manifests in the order of their names.
fn files(source: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |e: std::io::Error| {
        Failure::new(format_args!("cannot be read ({e})"))
            .at(source.display())
            .remedy("check the path after -f")
    };
    if !std::fs::metadata(source).map_err(failed)?.is_dir() {
        return Ok(vec![source.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(source).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if manifest && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn bounded(from: impl Read, place: &str) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    from.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Failure::new(e).at(place))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large(place, bytes.len() as u64));
    }
    String::from_utf8(bytes).map_err(|e| {
        Failure::new(format_args!("not UTF-8 text (byte {})", e.utf8_error().valid_up_to())).at(place)
    })
}

fn too_large(place: &str, bytes: u64) -> Failure {
    Failure::new(format_args!("{bytes} bytes is more than a manifest may have ({MAX_FILE_BYTES})"))
        .at(place)
        .remedy("check that this is the right file, or split it")
}

/// Parses one text of YAML documents (JSON is YAML).
pub fn parse(place: &str, yaml: &str) -> Result<Vec<Manifest>, Failure> {
    let documents: Vec<Spanned<Value>> = serde_saphyr::from_multiple(yaml).map_err(|error| {
        let at = error
            .location()
            .map_or_else(|| place.to_owned(), |l| format!("{place}:{}:{}", l.line(), l.column()));
        let said = error.without_snippet().to_string();
        Failure::new(complaint(&said)).at(at).remedy("correct the YAML; nothing was sent")
    })?;
    let mut manifests = Vec::new();
    for document in documents {
        let at = format!("{place}:{}", document.referenced.line());
        match document.value {
            Value::Object(mut list) if list.get("kind").and_then(Value::as_str) == Some("List") => {
                let Some(Value::Array(items)) = list.remove("items") else {
                    return Err(Failure::new("field items: a List needs a list of objects").at(at));
                };
                for item in items {
                    manifests.push(check(item, &at)?);
                }
            }
            object => manifests.push(check(object, &at)?),
        }
        if manifests.len() > MAX_OBJECTS {
            return Err(Failure::new(format_args!("more than {MAX_OBJECTS} objects in one file"))
                .at(place)
                .remedy("split it"));
        }
    }
    Ok(manifests)
}

/// The parser's message without what is said elsewhere: its own place, and how a program would set its options.
fn complaint(said: &str) -> &str {
    let line = said.lines().next().unwrap_or_default();
    let line = line.split(" at line ").next().unwrap_or(line);
    line.split(", set DuplicateKeyPolicy").next().unwrap_or(line)
}

/// Checks everything that can be checked here, so that a wrong file is refused before anything is sent.
fn check(mut object: Value, place: &str) -> Result<Manifest, Failure> {
    let wrong =
        |what: &dyn std::fmt::Display| Failure::new(what).at(place).remedy("correct it; nothing was sent");
    if !object.is_object() {
        let found = type_name(&object);
        return Err(wrong(&format_args!(
            "an object (apiVersion, kind, metadata, spec) is expected, not {found}"
        )));
    }
    let size = object.to_string().len();
    if size > MAX_OBJECT_BYTES {
        let (kind, name) = (text(&object, "/kind"), text(&object, "/metadata/name"));
        let limit = format_args!("{size} bytes is more than one object may have ({MAX_OBJECT_BYTES})");
        return Err(wrong(&format_args!("{kind} {name}: {limit}")));
    }
    for field in ["apiVersion", "kind"] {
        if let Some(other) = object.get(field).filter(|value| !value.is_string()) {
            return Err(wrong(&format_args!(
                "field {field}: a string is expected, not {}",
                type_name(other)
            )));
        }
    }
    let namespaced = KindInfo::find(text(&object, "/kind")).is_some_and(|kind| kind.namespaced);
    if namespaced
        && object.pointer("/metadata/namespace").is_none()
        && let Some(Value::Object(metadata)) = object.get_mut("metadata")
    {
        metadata.insert("namespace".to_owned(), Value::String("default".to_owned()));
    }
    Object::from_json(object.clone()).map_err(|error| wrong(&error))?;
    Ok(Manifest { object, place: place.to_owned() })
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

#[cfg(test)]
mod tests;
