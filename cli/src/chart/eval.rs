//! Renders the chart's templates, as helm does, for the part of the language in [`super::syntax`].

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::syntax::{Node, Operand, Parsed, Pipeline};

/// Why a template does not render; what it says with `fail` is the user's to read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// By the template: a value is wrong.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Template(String),
}

/// Includes lie in one another this deep: more is a loop.
const DEPTH: usize = 16;
/// `until` counts no further: a chart makes no thousands of objects.
const MOST: u64 = 10_000;

/// The templates that may be included, and the files that may be read.
pub struct Renderer<'a> {
    pub defines: HashMap<String, Vec<Node>>,
    pub files: &'a dyn Fn(&str) -> Option<&'a str>,
}

struct Scope<'a> {
    /// What `$` means.
    root: &'a Value,
    variables: Vec<(String, Value)>,
    depth: usize,
}

impl Renderer<'_> {
    /// One file's text.
    pub fn render(&self, parsed: &Parsed, root: &Value) -> Result<String, RenderError> {
        self.text(&parsed.body, root, 0)
    }

    fn text(&self, nodes: &[Node], root: &Value, depth: usize) -> Result<String, RenderError> {
        if depth > DEPTH {
            return Err(RenderError::Template("templates include one another without end".to_owned()));
        }
        let mut out = String::new();
        self.nodes(nodes, root, &mut Scope { root, variables: Vec::new(), depth }, &mut out)?;
        Ok(out)
    }

    fn nodes(
        &self,
        nodes: &[Node],
        dot: &Value,
        scope: &mut Scope<'_>,
        out: &mut String,
    ) -> Result<(), RenderError> {
        let declared = scope.variables.len();
        for node in nodes {
            match node {
                Node::Text(text) => out.push_str(text),
                Node::Output(pipeline) => out.push_str(&printed(&self.value(pipeline, dot, scope)?)?),
                Node::Declare(name, pipeline) => {
                    let value = self.value(pipeline, dot, scope)?;
                    scope.variables.push((name.clone(), value));
                }
                Node::If(branches) => {
                    for (condition, body) in branches {
                        let holds = match condition {
                            Some(condition) => truth(&self.value(condition, dot, scope)?),
                            None => true,
                        };
                        if holds {
                            self.nodes(body, dot, scope, out)?;
                            break;
                        }
                    }
                }
                Node::With(pipeline, body) => {
                    let value = self.value(pipeline, dot, scope)?;
                    if truth(&value) {
                        self.nodes(body, &value, scope, out)?;
                    }
                }
                Node::Range { key, value, over, body } => {
                    let items: Vec<(Value, Value)> = match self.value(over, dot, scope)? {
                        Value::Array(items) => {
                            items.into_iter().enumerate().map(|(n, item)| (Value::from(n), item)).collect()
                        }
                        // Go goes through maps by the order of their keys.
                        Value::Object(map) => {
                            let mut items: Vec<_> = map.into_iter().collect();
                            items.sort_by(|a, b| a.0.cmp(&b.0));
                            items.into_iter().map(|(key, item)| (Value::String(key), item)).collect()
                        }
                        Value::Null => Vec::new(),
                        other => return Err(RenderError::Template(format!("range over {other}"))),
                    };
                    for (at, item) in items {
                        let before = scope.variables.len();
                        scope.variables.extend(key.clone().map(|key| (key, at)));
                        scope.variables.extend(value.clone().map(|value| (value, item.clone())));
                        self.nodes(body, &item, scope, out)?;
                        scope.variables.truncate(before);
                    }
                }
            }
        }
        scope.variables.truncate(declared);
        Ok(())
    }

    fn value(&self, pipeline: &Pipeline, dot: &Value, scope: &Scope<'_>) -> Result<Value, RenderError> {
        let mut piped = None;
        for command in pipeline {
            piped = Some(self.command(command, piped, dot, scope)?);
        }
        Ok(piped.unwrap_or(Value::Null))
    }

    fn command(
        &self,
        command: &[Operand],
        piped: Option<Value>,
        dot: &Value,
        scope: &Scope<'_>,
    ) -> Result<Value, RenderError> {
        let Some((first, rest)) = command.split_first() else { return Ok(Value::Null) };
        let mut arguments =
            rest.iter().map(|operand| self.operand(operand, dot, scope)).collect::<Result<Vec<_>, _>>()?;
        arguments.extend(piped);
        match first {
            Operand::Function(name) => self.call(name, arguments, scope),
            Operand::Field(path) | Operand::Variable(_, path)
                if path.iter().map(String::as_str).eq(["Files", "Get"]) =>
            {
                let name = arguments.first().and_then(Value::as_str).unwrap_or_default();
                Ok((self.files)(name).unwrap_or_default().into())
            }
            operand if arguments.is_empty() => self.operand(operand, dot, scope),
            operand => Err(RenderError::Template(format!("{operand:?} is no function"))),
        }
    }

    fn operand(&self, operand: &Operand, dot: &Value, scope: &Scope<'_>) -> Result<Value, RenderError> {
        let at = |from: &Value, path: &[String]| {
            path.iter().try_fold(from, |value, name| value.get(name)).cloned().unwrap_or(Value::Null)
        };
        match operand {
            Operand::Literal(value) => Ok(value.clone()),
            Operand::Field(path) => Ok(at(dot, path)),
            Operand::Variable(name, path) if name.is_empty() => Ok(at(scope.root, path)),
            Operand::Variable(name, path) => {
                let known = scope.variables.iter().rev().find(|(known, _)| known == name);
                let value = known.map(|(_, value)| at(value, path));
                value.ok_or_else(|| RenderError::Template(format!("${name} is not declared")))
            }
            Operand::Parenthesis(pipeline) => self.value(pipeline, dot, scope),
            Operand::Function(name) => self.call(name, Vec::new(), scope),
        }
    }

    fn call(&self, name: &str, arguments: Vec<Value>, scope: &Scope<'_>) -> Result<Value, RenderError> {
        let wrong = || RenderError::Template(format!("{name} does not take {arguments:?}"));
        let text = |value: &Value| printed(value);
        let number =
            |value: &Value| value.as_i64().or_else(|| value.as_f64().map(|n| n as i64)).ok_or_else(wrong);
        Ok(match (name, arguments.as_slice()) {
            ("include", [Value::String(name), dot]) => {
                let body = self.defines.get(name);
                let body = body.ok_or_else(|| RenderError::Template(format!("no template {name:?}")))?;
                self.text(body, dot, scope.depth + 1)?.into()
            }
            ("toYaml", [value]) => {
                let text = serde_saphyr::to_string(value);
                let text = text.map_err(|e| RenderError::Template(format!("{value}: {e}")))?;
                text.trim_end().to_owned().into()
            }
            ("quote", [value]) => Value::String(text(value)?).to_string().into(),
            ("nindent", [by, value]) => format!("\n{}", indented(&text(value)?, number(by)?)).into(),
            ("indent", [by, value]) => indented(&text(value)?, number(by)?).into(),
            ("default", [other, value]) => if truth(value) { value } else { other }.clone(),
            ("printf", [Value::String(format), arguments @ ..]) => printf(format, arguments)?.into(),
            ("and", [first, rest @ ..]) => {
                rest.iter().fold(first, |a, b| if truth(a) { b } else { a }).clone()
            }
            ("or", [first, rest @ ..]) => {
                rest.iter().fold(first, |a, b| if truth(a) { a } else { b }).clone()
            }
            ("not", [value]) => (!truth(value)).into(),
            ("eq", [a, b]) => (a == b).into(),
            ("ne", [a, b]) => (a != b).into(),
            ("gt", [a, b]) => (number(a)? > number(b)?).into(),
            ("add", [a, b]) => number(a)?.checked_add(number(b)?).ok_or_else(wrong)?.into(),
            ("int", [value]) => number(value)?.into(),
            ("len", [Value::Array(items)]) => i64::try_from(items.len()).unwrap_or(i64::MAX).into(),
            ("index", [Value::Array(items), at]) => {
                let at = usize::try_from(number(at)?).map_err(|_| wrong())?;
                items.get(at).ok_or_else(wrong)?.clone()
            }
            ("until", [to]) => {
                let to = u64::try_from(number(to)?).unwrap_or(0);
                if to > MOST {
                    return Err(wrong());
                }
                (0..to).map(Value::from).collect()
            }
            ("list", items) => items.to_vec().into(),
            ("join", [Value::String(by), Value::Array(items)]) => {
                items.iter().map(text).collect::<Result<Vec<_>, _>>()?.join(by).into()
            }
            ("rest", [Value::Array(items)]) => items.iter().skip(1).cloned().collect(),
            ("contains", [Value::String(part), Value::String(whole)]) => whole.contains(part.as_str()).into(),
            ("splitList", [Value::String(by), Value::String(whole)]) => {
                whole.split(by.as_str()).map(Value::from).collect()
            }
            ("replace", [Value::String(old), Value::String(new), Value::String(whole)]) => {
                whole.replace(old.as_str(), new).into()
            }
            ("fail", [Value::String(reason)]) => return Err(RenderError::Refused(reason.clone())),
            _ => return Err(wrong()),
        })
    }
}

fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !Map::is_empty(map),
    }
}

fn printed(value: &Value) -> Result<String, RenderError> {
    match value {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Bool(_) | Value::Number(_) => Ok(value.to_string()),
        Value::Array(_) | Value::Object(_) => Err(RenderError::Template(format!("{value} is no text"))),
    }
}

fn indented(text: &str, by: i64) -> String {
    let pad = " ".repeat(usize::try_from(by).unwrap_or(0));
    text.split('\n').map(|line| format!("{pad}{line}")).collect::<Vec<_>>().join("\n")
}

fn printf(format: &str, arguments: &[Value]) -> Result<String, RenderError> {
    let mut arguments = arguments.iter();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '%' { chars.next() } else { None }) {
            ('%', Some('s' | 'd' | 'v')) => {
                let value = arguments.next();
                out.push_str(&printed(
                    value.ok_or_else(|| RenderError::Template(format!("printf {format:?}")))?,
                )?);
            }
            ('%', Some('%')) => out.push('%'),
            ('%', _) => return Err(RenderError::Template(format!("printf {format:?}"))),
            (c, _) => out.push(c),
        }
    }
    Ok(out)
}
