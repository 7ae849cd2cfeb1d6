//! A format as the pieces that its lines are made of.
//!
//! Invariant: what parses can be written for every connection. A text is refused where Envoy refuses it: at an operator
//! that is not known, at a per cent sign that begins none. JSON keys are sorted, a value that is one operator keeps its
//! type and is null when there is none, any other is text.

use std::io::Write;

use serde_json::{Map, Value as Json};

use super::field::Field;
use super::operator;
use super::value::{Facts, Value};

/// Longest format: its line shall fit a batch.
const FORMAT_BYTES_MAX: usize = 32 << 10;

/// A format, read.
#[derive(Debug)]
pub(super) enum Template {
    Text(Vec<Piece>),
    Json(Node),
}

/// A part of a text.
#[derive(Debug)]
pub(super) enum Piece {
    Literal(String),
    Operator {
        field: Field,
        /// `:N`: no more than so many bytes.
        length: Option<usize>,
    },
}

/// A value of a JSON line.
#[derive(Debug)]
pub(super) enum Node {
    Object(Vec<(String, Self)>),
    Array(Vec<Self>),
    Text(Vec<Piece>),
    Constant(Json),
}

impl Template {
    pub(super) fn text(format: &str) -> Result<Self, String> {
        // Lines end with one line break whether the format has it or not.
        let format = format.strip_suffix('\n').unwrap_or(format);
        bounded(format.len())?;
        pieces(format).map(Self::Text)
    }

    pub(super) fn json(format: &Map<String, Json>) -> Result<Self, String> {
        bounded(serde_json::to_string(format).map_or(usize::MAX, |text| text.len()))?;
        object(format).map(Self::Json)
    }

    /// Appends a line, without its line break.
    pub(super) fn write(&self, facts: &Facts<'_>, line: &mut Vec<u8>) {
        match self {
            Self::Text(pieces) => line.extend_from_slice(join(pieces, facts).as_bytes()),
            Self::Json(node) => write_node(node, facts, line),
        }
    }
}

fn bounded(bytes: usize) -> Result<(), String> {
    if bytes > FORMAT_BYTES_MAX {
        return Err(format!("it has {bytes} bytes, the limit is {FORMAT_BYTES_MAX}; shorten it"));
    }
    Ok(())
}

fn pieces(format: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut literal = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        literal.push_str(&rest[..at]);
        let command = &rest[at + 1..];
        if let Some(after) = command.strip_prefix('%') {
            literal.push('%');
            rest = after;
            continue;
        }
        let position = format.len() - rest.len() + at;
        let (operator, after) = split(command).ok_or_else(|| {
            format!("no operator begins at byte {position} of `{}`; write %% for a per cent sign", shown(format))
        })?;
        if !literal.is_empty() {
            pieces.push(Piece::Literal(std::mem::take(&mut literal)));
        }
        let field = operator::read(operator.name, operator.argument, operator.length)?;
        pieces.push(Piece::Operator { field, length: operator.length });
        rest = after;
    }
    literal.push_str(rest);
    if !literal.is_empty() {
        pieces.push(Piece::Literal(literal));
    }
    Ok(pieces)
}

/// A format as an error shows it: its beginning, without control characters.
fn shown(format: &str) -> String {
    const CHARS_MAX: usize = 80;
    format.chars().take(CHARS_MAX).collect::<String>().escape_debug().to_string()
}

/// `NAME`, `NAME(argument)`, `NAME:length`, `NAME(argument):length`.
struct Operator<'a> {
    name: &'a str,
    argument: Option<&'a str>,
    length: Option<usize>,
}

/// Takes an operator and its closing per cent sign off what follows its opening one.
fn split(command: &str) -> Option<(Operator<'_>, &str)> {
    let end = command.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))?;
    let (name, mut rest) = command.split_at(end);
    let mut argument = None;
    if let Some(inside) = rest.strip_prefix('(') {
        let (text, after) = inside.split_once(')')?;
        (argument, rest) = (Some(text), after);
    }
    let mut length = None;
    if let Some(digits) = rest.strip_prefix(':') {
        let end = digits.find(|c: char| !c.is_ascii_digit())?;
        (length, rest) = (Some(digits[..end].parse().ok()?), &digits[end..]);
    }
    let after = rest.strip_prefix('%')?;
    (!name.is_empty()).then_some((Operator { name, argument, length }, after))
}

fn object(map: &Map<String, Json>) -> Result<Node, String> {
    let mut entries: Vec<(String, Node)> =
        map.iter().map(|(key, value)| Ok((key.clone(), node(value)?))).collect::<Result<_, String>>()?;
    entries.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    Ok(Node::Object(entries))
}

fn node(value: &Json) -> Result<Node, String> {
    match value {
        Json::Object(map) => object(map),
        Json::Array(list) => list.iter().map(node).collect::<Result<_, _>>().map(Node::Array),
        Json::String(text) => pieces(text).map(Node::Text),
        Json::Null | Json::Bool(_) | Json::Number(_) => Ok(Node::Constant(value.clone())),
    }
}

/// Text, in which what is missing is a dash.
fn join(pieces: &[Piece], facts: &Facts<'_>) -> String {
    let mut text = String::new();
    for piece in pieces {
        match piece {
            Piece::Literal(literal) => text.push_str(literal),
            Piece::Operator { field, length } => match facts.value(field) {
                Value::Missing => text.push('-'),
                Value::Text(value) => text.push_str(cut(&value, *length)),
                Value::Number(number) => text.push_str(&number.to_string()),
                Value::Json(Json::String(value)) => text.push_str(cut(&value, *length)),
                Value::Json(value) => text.push_str(cut(&value.to_string(), *length)),
            },
        }
    }
    text
}

/// At most `length` bytes, and no half character.
fn cut(text: &str, length: Option<usize>) -> &str {
    match length {
        Some(length) if length < text.len() => {
            let end = (0..=length).rev().find(|end| text.is_char_boundary(*end));
            &text[..end.unwrap_or_default()]
        }
        _ => text,
    }
}

fn write_node(node: &Node, facts: &Facts<'_>, line: &mut Vec<u8>) {
    match node {
        Node::Object(entries) => {
            line.push(b'{');
            for (index, (key, value)) in entries.iter().enumerate() {
                if index > 0 {
                    line.push(b',');
                }
                write_json(key, line);
                line.push(b':');
                write_node(value, facts, line);
            }
            line.push(b'}');
        }
        Node::Array(list) => {
            line.push(b'[');
            for (index, value) in list.iter().enumerate() {
                if index > 0 {
                    line.push(b',');
                }
                write_node(value, facts, line);
            }
            line.push(b']');
        }
        Node::Text(pieces) => match pieces.as_slice() {
            [Piece::Operator { field, length }] => match facts.value(field) {
                Value::Missing => line.extend_from_slice(b"null"),
                Value::Text(value) => write_json(cut(&value, *length), line),
                Value::Number(number) => write_json(&number, line),
                Value::Json(value) => write_json(&value, line),
            },
            pieces => write_json(&join(pieces, facts), line),
        },
        Node::Constant(value) => write_json(value, line),
    }
}

fn write_json<T: serde::Serialize + ?Sized>(value: &T, line: &mut Vec<u8>) {
    let written = serde_json::to_writer(line.by_ref(), value);
    debug_assert!(written.is_ok(), "text, numbers and JSON are always JSON");
}
