//! Strict decoding: which fields Consul's documents have, so that a misspelt one is refused by name.
//!
//! Consul takes `snake_case` and `CamelCase`, and its HCL gives a block as a list of one object. [`normalise`] turns all of that
//! into one canonical `CamelCase` document, and whatever the shape does not know is a [`DecodeError`] with its path.
//! Opaque parts (`Config`, `Meta`) are left as they are. Pure; recursion is bounded by the shapes and [`DEPTH_MAX`].

mod shapes;

use serde_json::{Map, Value};

use super::duration;
pub(super) use shapes::*;

/// Deepest nesting followed in a document.
const DEPTH_MAX: usize = 32;

/// What a value must look like.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    /// A string.
    Text,
    /// An integer.
    Integer,
    /// A boolean.
    Flag,
    /// A Go duration, or an integer of nanoseconds; kept as text.
    Duration,
    /// Anything, kept as it is (one-element lists of objects are Consul's own business there).
    Opaque,
    /// An object with these fields and no others.
    Struct(&'static Struct),
    /// A list; a single element stands for a list of one.
    List(&'static Self),
    /// An object with free keys.
    Map(&'static Self),
}

/// The fields of an object: canonical name and shape.
#[derive(Debug)]
pub(super) struct Struct(pub(super) &'static [(&'static str, Shape)]);

/// Why a document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// A field that the document's kind does not have.
    #[error("unknown field \"{name}\"{}", at(path))]
    Unknown {
        /// The object that holds it, dotted; empty at the top.
        path: String,
        /// The field.
        name: String,
    },
    /// A value of the wrong type.
    #[error("{path} must be {expected}, not {found}")]
    Type {
        /// The field, dotted.
        path: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
}

/// Brings `value` into canonical form. `null` counts as absent, as in Go.
pub(super) fn normalise(shape: Shape, value: Value, path: &str, depth: usize) -> Result<Value, DecodeError> {
    if depth > DEPTH_MAX {
        return Err(wrong(path, "nested less deeply", &value));
    }
    match (shape, value) {
        (Shape::Opaque, value) => Ok(value),
        (Shape::Text, value @ Value::String(_)) | (Shape::Flag, value @ Value::Bool(_)) => Ok(value),
        (Shape::Integer, Value::Number(number)) if number.is_i64() || number.is_u64() => Ok(Value::Number(number)),
        // HCL writes numbers as floats when they have a fraction of zero.
        (Shape::Integer, Value::Number(number)) => {
            integral(&number).ok_or_else(|| wrong(path, "an integer", &Value::Number(number)))
        }
        (Shape::Duration, value) => duration_text(value, path),
        (Shape::List(of), Value::Array(items)) => items
            .into_iter()
            .enumerate()
            .map(|(at, item)| normalise(*of, item, &format!("{path}[{at}]"), depth + 1))
            .collect::<Result<_, _>>()
            .map(Value::Array),
        (Shape::List(of @ Shape::Struct(_)), value @ Value::Object(_)) => {
            Ok(Value::Array(vec![normalise(*of, value, path, depth + 1)?]))
        }
        (Shape::Map(of), Value::Object(fields)) => {
            let mut out = Map::new();
            for (key, item) in fields.into_iter().filter(|(_, item)| !item.is_null()) {
                let inner = join(path, &key);
                out.insert(key, normalise(*of, item, &inner, depth + 1)?);
            }
            Ok(Value::Object(out))
        }
        (Shape::Struct(fields), Value::Object(object)) => structure(fields, object, path, depth),
        (shape @ (Shape::Struct(_) | Shape::Map(_)), Value::Array(mut items)) if items.len() == 1 => {
            normalise(shape, items.remove(0), path, depth + 1)
        }
        (shape, value) => Err(wrong(path, shape.wanted(), &value)),
    }
}

fn structure(fields: &Struct, object: Map<String, Value>, path: &str, depth: usize) -> Result<Value, DecodeError> {
    let mut out = Map::new();
    for (key, value) in object {
        let known = fields.0.iter().find(|(name, _)| same_field(name, &key));
        let Some((name, shape)) = known else {
            return Err(DecodeError::Unknown { path: path.to_owned(), name: key });
        };
        if !value.is_null() {
            let inner = join(path, &key);
            out.insert((*name).to_owned(), normalise(*shape, value, &inner, depth + 1)?);
        }
    }
    Ok(Value::Object(out))
}

/// Whether `key` means the field `name`: case and underscores do not count, as in Consul.
fn same_field(name: &str, key: &str) -> bool {
    let letters = |text: &str| text.bytes().filter(|b| *b != b'_').map(|b| b.to_ascii_lowercase()).collect::<Vec<_>>();
    letters(name) == letters(key)
}

fn duration_text(value: Value, path: &str) -> Result<Value, DecodeError> {
    let parsed = match &value {
        Value::String(text) if text.is_empty() => return Ok(value),
        Value::String(text) => duration::parse(text),
        Value::Number(number) => number.as_u64().map(std::time::Duration::from_nanos),
        _ => None,
    };
    match parsed.filter(|found| *found <= duration::DURATION_MAX) {
        // Zero means that it was left out, as in Go.
        Some(found) if found.is_zero() => Ok(Value::String(String::new())),
        Some(found) => Ok(Value::String(duration::format(found))),
        None => Err(wrong(path, "a duration such as \"10s\"", &value)),
    }
}

fn integral(number: &serde_json::Number) -> Option<Value> {
    let float = number.as_f64()?;
    // 2^53: beyond it a float no longer holds every integer.
    (float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0).then(|| Value::from(float as i64))
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" in {path}") }
}

fn wrong(path: &str, expected: &'static str, value: &Value) -> DecodeError {
    // The value itself may be a token: only its type is named, except for short numbers.
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
    };
    DecodeError::Type { path: if path.is_empty() { "the document".to_owned() } else { path.to_owned() }, expected, found }
}

impl Shape {
    fn wanted(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Integer => "an integer",
            Self::Flag => "true or false",
            Self::Duration => "a duration such as \"10s\"",
            Self::Opaque => "anything",
            Self::List(_) => "a list",
            Self::Struct(_) | Self::Map(_) => "an object",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn service(value: Value) -> Result<Value, DecodeError> {
        normalise(Shape::Struct(&SERVICE), value, "", 0)
    }

    #[test]
    fn snake_case_and_camel_case_mean_the_same() {
        let snake = service(json!({"name": "web", "connect": {"sidecar_service": [{"proxy": {"upstreams": {
            "destination_name": "db", "local_bind_port": 1, "config": {"connect_timeout_ms": 1}}}}]}}));
        let camel = service(json!({"Name": "web", "Connect": {"SidecarService": {"Proxy": {"Upstreams": [
            {"DestinationName": "db", "LocalBindPort": 1, "Config": {"connect_timeout_ms": 1}}]}}}}));
        assert_eq!(snake.expect("decodes"), camel.expect("decodes"));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let error = service(json!({"Name": "web", "Connect": {"SidecarService": {"Prox": {}}}})).expect_err("refused");
        assert_eq!(error.to_string(), "unknown field \"Prox\" in Connect.SidecarService");
    }

    #[test]
    fn a_wrong_type_names_field_and_remedy_but_no_text() {
        let error = service(json!({"Name": "web", "Port": "s3cret"})).expect_err("refused").to_string();
        assert_eq!(error, "Port must be an integer, not a string");
        let error = service(json!({"Check": {"TTL": "soon"}})).expect_err("refused").to_string();
        assert_eq!(error, "Check.TTL must be a duration such as \"10s\", not a string");
    }

    #[test]
    fn durations_take_text_and_nanoseconds() {
        let value = service(json!({"Check": {"Interval": 2_000_000_000_u64, "Timeout": "90s"}})).expect("decodes");
        assert_eq!(value, json!({"Check": {"Interval": "2s", "Timeout": "1m30s"}}));
    }

    proptest! {
        #[test]
        fn hostile_json_is_an_error_not_a_panic(text in "[\\[\\]{}\",:a-zA-Z0-9_.-]{0,120}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                let _ = service(value);
            }
        }
    }
}
