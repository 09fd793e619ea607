//! The part of Go's template language that the chart is written in: text with actions in double braces, parsed into nodes.
//!
//! Known: `if`/`else if`/`else`, `with`, `range` over lists and maps with variables, `define`, variables, pipelines, calls in
//! parentheses, trimming, comments. Everything else is an error that names the place. The input is the embedded chart, never
//! a user's.

use std::collections::HashMap;

use serde_json::Value;

/// Why a template does not parse, and where.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {reason}")]
pub struct SyntaxError {
    pub file: String,
    pub line: usize,
    pub reason: String,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Node {
    Text(String),
    Output(Pipeline),
    /// `$name := ...`
    Declare(String, Pipeline),
    /// Branches in order; the last may have no condition.
    If(Vec<(Option<Pipeline>, Vec<Node>)>),
    With(Pipeline, Vec<Node>),
    Range {
        key: Option<String>,
        value: Option<String>,
        over: Pipeline,
        body: Vec<Node>,
    },
}

/// Each command's result is the last argument of the next.
pub type Pipeline = Vec<Vec<Operand>>;

#[derive(Clone, PartialEq, Debug)]
pub enum Operand {
    Literal(Value),
    /// Of the dot.
    Field(Vec<String>),
    /// `$` is the empty name.
    Variable(String, Vec<String>),
    Function(String),
    Parenthesis(Pipeline),
}

/// One file: its nodes, and the templates that it defines.
#[derive(Debug, Default)]
pub struct Parsed {
    pub body: Vec<Node>,
    pub defines: HashMap<String, Vec<Node>>,
}

#[derive(Clone, PartialEq, Debug)]
enum Token {
    Literal(Value),
    Field(Vec<String>),
    Variable(String, Vec<String>),
    Word(String),
    Open,
    Close,
    Pipe,
    Assign,
    Comma,
}

/// What stands between two actions, or an action.
enum Piece {
    Text(String),
    Action(Vec<Token>, usize),
}

/// Parses one file.
pub fn parse(file: &str, text: &str) -> Result<Parsed, SyntaxError> {
    let pieces = pieces(file, text)?;
    let mut parser = Parser { file, pieces: pieces.into_iter(), defines: HashMap::new(), line: 1 };
    let (body, end) = parser.block()?;
    match end {
        End::OfFile => Ok(Parsed { body, defines: parser.defines }),
        End::Else(_) | End::Here => Err(parser.wrong("`else` or `end` without a beginning")),
    }
}

fn pieces(file: &str, text: &str) -> Result<Vec<Piece>, SyntaxError> {
    let wrong = |line, reason: String| SyntaxError { file: file.to_owned(), line, reason };
    let mut pieces = Vec::new();
    let (mut rest, mut line) = (text, 1);
    let mut trim = false;
    loop {
        let (before, after) = match rest.split_once("{{") {
            Some((before, after)) => (before, Some(after)),
            None => (rest, None),
        };
        line += before.matches('\n').count();
        let mut plain = if trim { before.trim_start() } else { before };
        let Some(after) = after else {
            pieces.push(Piece::Text(plain.to_owned()));
            return Ok(pieces);
        };
        let after = match after.strip_prefix("- ") {
            Some(after) => {
                plain = plain.trim_end();
                after
            }
            None => after,
        };
        pieces.push(Piece::Text(plain.to_owned()));
        let comment = after.trim_start().starts_with("/*");
        let close = if comment { after.find("*/").map(|at| at + 2) } else { Some(0) };
        let end = close.and_then(|from| Some(from + after.get(from..)?.find("}}")?));
        let end = end.ok_or_else(|| wrong(line, "an action is not closed".to_owned()))?;
        let (inside, following) = (after.get(..end).unwrap_or(""), after.get(end + 2..).unwrap_or(""));
        trim = inside.ends_with(" -");
        if !comment {
            let inside = if trim { inside.strip_suffix('-').unwrap_or(inside) } else { inside };
            pieces.push(Piece::Action(tokens(inside).map_err(|reason| wrong(line, reason))?, line));
        }
        line += inside.matches('\n').count();
        rest = following;
    }
}

fn tokens(action: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut chars = action.char_indices().peekable();
    let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    while let Some((at, c)) = chars.next() {
        let rest = action.get(at..).unwrap_or_default();
        let length = match c {
            c if c.is_whitespace() => continue,
            '(' => push(&mut tokens, Token::Open, 1),
            ')' => push(&mut tokens, Token::Close, 1),
            '|' => push(&mut tokens, Token::Pipe, 1),
            ',' => push(&mut tokens, Token::Comma, 1),
            ':' if rest.starts_with(":=") => push(&mut tokens, Token::Assign, 2),
            '"' => {
                // Go's escapes, as far as they are used, are JSON's.
                let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<String>();
                let text = stream.next().and_then(Result::ok).ok_or("a string is not closed")?;
                let length = stream.byte_offset();
                push(&mut tokens, Token::Literal(Value::String(text)), length)
            }
            c if c.is_ascii_digit() => {
                let length = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                let number: i64 = rest.get(..length).and_then(|n| n.parse().ok()).ok_or("not a number")?;
                push(&mut tokens, Token::Literal(number.into()), length)
            }
            '.' | '$' => {
                let length = 1 + rest
                    .get(1..)
                    .and_then(|rest| rest.find(|c: char| !name(c) && c != '.'))
                    .unwrap_or(rest.len().saturating_sub(1));
                let word = rest.get(1..length).unwrap_or_default();
                let mut parts = word.split('.').map(str::to_owned);
                let token = if c == '$' {
                    Token::Variable(parts.next().unwrap_or_default(), parts.collect())
                } else {
                    Token::Field(parts.filter(|part| !part.is_empty()).collect())
                };
                push(&mut tokens, token, length)
            }
            c if name(c) => {
                let length = rest.find(|c: char| !name(c)).unwrap_or(rest.len());
                let token = match rest.get(..length).unwrap_or_default() {
                    "true" => Token::Literal(true.into()),
                    "false" => Token::Literal(false.into()),
                    word => Token::Word(word.to_owned()),
                };
                push(&mut tokens, token, length)
            }
            other => return Err(format!("{other:?} is not known here")),
        };
        while chars.peek().is_some_and(|(next, _)| *next < at + length) {
            chars.next();
        }
    }
    Ok(tokens)
}

fn push(tokens: &mut Vec<Token>, token: Token, length: usize) -> usize {
    tokens.push(token);
    length
}

/// What a block ended with.
enum End {
    OfFile,
    Here,
    /// With the tokens after `else`.
    Else(Vec<Token>),
}

struct Parser<'a> {
    file: &'a str,
    pieces: std::vec::IntoIter<Piece>,
    defines: HashMap<String, Vec<Node>>,
    line: usize,
}

impl Parser<'_> {
    fn wrong(&self, reason: impl Into<String>) -> SyntaxError {
        SyntaxError { file: self.file.to_owned(), line: self.line, reason: reason.into() }
    }

    fn block(&mut self) -> Result<(Vec<Node>, End), SyntaxError> {
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next() {
            let (tokens, line) = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Piece::Action(tokens, line) => (tokens, line),
            };
            self.line = line;
            let (first, rest) = match tokens.split_first() {
                Some((Token::Word(word), rest)) => (word.as_str(), rest.to_vec()),
                _ => ("", Vec::new()),
            };
            match first {
                "end" => return Ok((nodes, End::Here)),
                "else" => return Ok((nodes, End::Else(rest))),
                "if" => nodes.push(self.branches(&rest)?),
                "with" => {
                    let over = self.pipeline(&rest)?;
                    nodes.push(Node::With(over, self.ended()?));
                }
                "range" => nodes.push(self.range(&rest)?),
                "define" => {
                    let [Token::Literal(Value::String(name))] = rest.as_slice() else {
                        return Err(self.wrong("`define` needs a name"));
                    };
                    let body = self.ended()?;
                    self.defines.insert(name.clone(), body);
                }
                _ => match tokens.as_slice() {
                    [Token::Variable(name, path), Token::Assign, rest @ ..] if path.is_empty() => {
                        nodes.push(Node::Declare(name.clone(), self.pipeline(rest)?));
                    }
                    _ => nodes.push(Node::Output(self.pipeline(&tokens)?)),
                },
            }
        }
        Ok((nodes, End::OfFile))
    }

    /// A block that `end` closes.
    fn ended(&mut self) -> Result<Vec<Node>, SyntaxError> {
        match self.block()? {
            (body, End::Here) => Ok(body),
            _ => Err(self.wrong("`end` is missing")),
        }
    }

    fn branches(&mut self, condition: &[Token]) -> Result<Node, SyntaxError> {
        let mut branches = Vec::new();
        let mut condition = Some(self.pipeline(condition)?);
        loop {
            let (body, end) = self.block()?;
            branches.push((condition, body));
            condition = match end {
                End::Here => return Ok(Node::If(branches)),
                End::OfFile => return Err(self.wrong("`end` of an `if` is missing")),
                End::Else(rest) => match rest.split_first() {
                    None => None,
                    Some((Token::Word(word), rest)) if word == "if" => Some(self.pipeline(rest)?),
                    Some(_) => return Err(self.wrong("`else` is followed by neither nothing nor `if`")),
                },
            };
        }
    }

    fn range(&mut self, tokens: &[Token]) -> Result<Node, SyntaxError> {
        let variable = |name: &String| Some(name.clone());
        let (key, value, over) = match tokens {
            [Token::Variable(key, _), Token::Comma, Token::Variable(value, _), Token::Assign, over @ ..] => {
                (variable(key), variable(value), over)
            }
            [Token::Variable(value, _), Token::Assign, over @ ..] => (None, variable(value), over),
            over => (None, None, over),
        };
        let over = self.pipeline(over)?;
        Ok(Node::Range { key, value, over, body: self.ended()? })
    }

    fn pipeline(&self, tokens: &[Token]) -> Result<Pipeline, SyntaxError> {
        let mut tokens = tokens.iter();
        let pipeline = self.commands(&mut tokens, false)?;
        if tokens.next().is_some() {
            return Err(self.wrong("`)` without `(`"));
        }
        Ok(pipeline)
    }

    fn commands(
        &self,
        tokens: &mut std::slice::Iter<'_, Token>,
        inner: bool,
    ) -> Result<Pipeline, SyntaxError> {
        let (mut pipeline, mut command) = (Vec::new(), Vec::new());
        loop {
            let operand = match tokens.next() {
                None if inner => return Err(self.wrong("`)` is missing")),
                None | Some(Token::Close | Token::Pipe) if command.is_empty() => {
                    return Err(self.wrong("a command is empty"));
                }
                None => break,
                Some(Token::Close) if inner => break,
                Some(Token::Close) => return Err(self.wrong("`)` without `(`")),
                Some(Token::Pipe) => {
                    pipeline.push(std::mem::take(&mut command));
                    continue;
                }
                Some(Token::Open) => Operand::Parenthesis(self.commands(tokens, true)?),
                Some(Token::Literal(value)) => Operand::Literal(value.clone()),
                Some(Token::Field(path)) => Operand::Field(path.clone()),
                Some(Token::Variable(name, path)) => Operand::Variable(name.clone(), path.clone()),
                Some(Token::Word(name)) => Operand::Function(name.clone()),
                Some(Token::Assign | Token::Comma) => return Err(self.wrong("`:=` or `,` in a command")),
            };
            command.push(operand);
        }
        pipeline.push(command);
        Ok(pipeline)
    }
}
