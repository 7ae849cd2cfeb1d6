//! HCL as Consul reads it: version 1 of the language.
//!
//! Consul's documentation is full of `connect { sidecar_service {} }` on one line, of quoted keys and of `a = 1, b = 2`, all of
//! which HCL 2 refuses; hence this reader. It gives JSON: a block is an object, a repeated block a list of objects, a label one
//! more level. Invariant: whatever the bytes, the outcome is a value or an [`HclError`] with its line; nesting is bounded by
//! [`DEPTH_MAX`]. Pure. `${…}` is text, as in Consul's own service files.

use serde_json::{Map, Number, Value};

/// Deepest nesting of blocks and lists.
const DEPTH_MAX: usize = 64;

/// Why a text is not HCL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub(super) struct HclError {
    line: usize,
    problem: String,
}

/// Reads a whole file.
pub(super) fn parse(text: &str) -> Result<Value, HclError> {
    let mut reader = Reader { rest: text.strip_prefix('\u{feff}').unwrap_or(text), whole: text.len(), text };
    let body = reader.body(None, 0)?;
    Ok(Value::Object(body))
}

struct Reader<'a> {
    text: &'a str,
    whole: usize,
    rest: &'a str,
}

impl Reader<'_> {
    /// Items up to `end`, or to the end of the file.
    fn body(&mut self, end: Option<char>, depth: usize) -> Result<Map<String, Value>, HclError> {
        if depth > DEPTH_MAX {
            return Err(self.error(format!("nested more than {DEPTH_MAX} deep")));
        }
        let mut out = Map::new();
        loop {
            self.skip_blank()?;
            match (self.peek(), end) {
                (None, None) => return Ok(out),
                (None, Some(end)) => return Err(self.error(format!("the file ends before {end:?}"))),
                (Some(found), Some(end)) if found == end => {
                    self.take(1);
                    return Ok(out);
                }
                (Some(','), _) => self.take(1),
                (Some(_), _) => self.item(&mut out, depth)?,
            }
        }
    }

    /// `key = value`, `key { … }` or `key "label" { … }`.
    fn item(&mut self, into: &mut Map<String, Value>, depth: usize) -> Result<(), HclError> {
        let key = self.key()?;
        let mut labels = Vec::new();
        loop {
            self.skip_blank()?;
            match self.peek() {
                Some('=' | ':') if labels.is_empty() => {
                    self.take(1);
                    self.skip_blank()?;
                    let value = self.value(depth + 1)?;
                    return self.put(into, key, value);
                }
                Some('{') => {
                    self.take(1);
                    let body = Value::Object(self.body(Some('}'), depth + 1)?);
                    let value =
                        labels.into_iter().rev().fold(body, |inner, label| Value::Object(Map::from_iter([(label, inner)])));
                    return self.put(into, key, value);
                }
                Some('"') => labels.push(self.string()?),
                _ => return Err(self.error(format!("{key:?} must be followed by = and a value, or by a block in braces"))),
            }
            if labels.len() > DEPTH_MAX {
                return Err(self.error(format!("{key:?} has more than {DEPTH_MAX} labels")));
            }
        }
    }

    /// A second block of the same name makes a list; a second value is a mistake.
    fn put(&self, into: &mut Map<String, Value>, key: String, value: Value) -> Result<(), HclError> {
        match into.get_mut(&key) {
            None => _ = into.insert(key, value),
            Some(Value::Array(items)) if value.is_object() => items.push(value),
            Some(old @ Value::Object(_)) if value.is_object() => {
                let first = old.take();
                *old = Value::Array(vec![first, value]);
            }
            Some(_) => return Err(self.error(format!("{key:?} is set twice"))),
        }
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Value, HclError> {
        if depth > DEPTH_MAX {
            return Err(self.error(format!("nested more than {DEPTH_MAX} deep")));
        }
        match self.peek() {
            Some('"') => self.string().map(Value::String),
            Some('{') => {
                self.take(1);
                self.body(Some('}'), depth).map(Value::Object)
            }
            Some('[') => self.list(depth),
            Some('<') => self.heredoc().map(Value::String),
            Some(c) if c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.') => self.word(),
            Some(c) => Err(self.error(format!("{c:?} does not begin a value"))),
            None => Err(self.error("the file ends where a value should be".to_owned())),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, HclError> {
        self.take(1);
        let mut items = Vec::new();
        loop {
            self.skip_blank()?;
            match self.peek() {
                Some(']') => {
                    self.take(1);
                    return Ok(Value::Array(items));
                }
                Some(',') if !items.is_empty() => self.take(1),
                _ => items.push(self.value(depth + 1)?),
            }
        }
    }

    /// A number or a boolean.
    fn word(&mut self) -> Result<Value, HclError> {
        let end = self
            .rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.' | '_')))
            .unwrap_or(self.rest.len());
        let word = &self.rest[..end];
        let value = match word {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            "null" => Value::Null,
            _ => number(word).ok_or_else(|| self.error(format!("{word:?} is no number and no boolean: put text in quotes")))?,
        };
        self.take(end);
        Ok(value)
    }

    fn key(&mut self) -> Result<String, HclError> {
        if self.peek() == Some('"') {
            return self.string();
        }
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-' | '.'))).unwrap_or(self.rest.len());
        if end == 0 {
            let found = self.peek().unwrap_or_default();
            return Err(self.error(format!("{found:?} does not begin a key")));
        }
        let key = self.rest[..end].to_owned();
        self.take(end);
        Ok(key)
    }

    fn string(&mut self) -> Result<String, HclError> {
        let start = self.line();
        let mut out = String::new();
        let mut letters = self.rest.char_indices().skip(1);
        let fail = |problem: &str| HclError { line: start, problem: problem.to_owned() };
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.take(at + 1);
                    return Ok(out);
                }
                '\n' => return Err(fail("a string must end on its line")),
                '\\' => match letters.next().map(|(_, letter)| letter) {
                    Some('n') => out.push('\n'),
                    Some('t') => out.push('\t'),
                    Some('r') => out.push('\r'),
                    Some(letter @ ('"' | '\\')) => out.push(letter),
                    Some('u') => {
                        let hex: String = letters.by_ref().take(4).map(|(_, letter)| letter).collect();
                        let found = u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32);
                        out.push(found.ok_or_else(|| fail("\\u must be followed by four hex digits"))?);
                    }
                    _ => return Err(fail("unknown escape in a string: use \\n, \\t, \\\", \\\\ or \\uXXXX")),
                },
                letter => out.push(letter),
            }
        }
        Err(fail("a string is never closed"))
    }

    /// `<<END … END`, or `<<-END` with the indentation of the end marker removed.
    fn heredoc(&mut self) -> Result<String, HclError> {
        let unclosed = self.error("a heredoc needs <<NAME and a line with NAME at its end".to_owned());
        let rest = self.rest.strip_prefix("<<").ok_or_else(|| unclosed.clone())?;
        let (head, body) = rest.split_once('\n').ok_or_else(|| unclosed.clone())?;
        let indented = head.starts_with('-');
        let name = head.trim_start_matches('-').trim();
        if name.is_empty() {
            return Err(unclosed);
        }
        let mut lines = Vec::new();
        let mut used = self.rest.len() - body.len();
        for line in body.split_inclusive('\n') {
            used += line.len();
            if line.trim() == name {
                let margin = if indented { line.len() - line.trim_start().len() } else { 0 };
                let strip = |line: &str| {
                    line.get(margin..).filter(|_| line[..margin].trim().is_empty()).map_or_else(|| line.to_owned(), str::to_owned)
                };
                let out =
                    lines.iter().map(|line: &&str| if line.len() > margin { strip(line) } else { (*line).to_owned() }).collect();
                // The newline after the marker stays: it ends the item.
                self.take(used - usize::from(line.ends_with('\n')));
                return Ok(out);
            }
            lines.push(line);
        }
        Err(unclosed)
    }

    /// Blanks and comments.
    fn skip_blank(&mut self) -> Result<(), HclError> {
        loop {
            self.rest = self.rest.trim_start();
            if self.rest.starts_with('#') || self.rest.starts_with("//") {
                let end = self.rest.find('\n').unwrap_or(self.rest.len());
                self.take(end);
            } else if self.rest.starts_with("/*") {
                let end = self.rest.find("*/").ok_or_else(|| self.error("a comment is never closed".to_owned()))?;
                self.take(end + 2);
            } else {
                return Ok(());
            }
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn take(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
    }

    fn line(&self) -> usize {
        let read = self.whole - self.rest.len();
        self.text.as_bytes()[..read].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn error(&self, problem: String) -> HclError {
        HclError { line: self.line(), problem }
    }
}

fn number(word: &str) -> Option<Value> {
    if let Ok(integer) = word.parse::<i64>() {
        return Some(Value::from(integer));
    }
    if let Some(hex) = word.strip_prefix("0x") {
        return i64::from_str_radix(hex, 16).ok().map(Value::from);
    }
    let float = word.parse::<f64>().ok().filter(|_| word.bytes().any(|byte| byte.is_ascii_digit()))?;
    Number::from_f64(float).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn what_consuls_documentation_shows_is_read() {
        let text = r#"
            // one line, nested blocks
            service { name = "web", port = 8080 connect { sidecar_service {} } }
            /* quoted keys
               and lists */
            "service" "x" { Tags = ["a", "b",] "Meta" = { "v" = "1" } ratio = 1.5 on = true off = -3 }
            text = <<EOF
  a
b "c"
EOF
            trimmed = <<-EOF
              a
                b
              EOF
            esc = "a\"b\\c\n\u00e9 ${x}"
        "#;
        assert_eq!(
            parse(text).expect("valid"),
            json!({
                "service": [
                    {"name": "web", "port": 8080, "connect": {"sidecar_service": {}}},
                    {"x": {"Tags": ["a", "b"], "Meta": {"v": "1"}, "ratio": 1.5, "on": true, "off": -3}},
                ],
                "text": "  a\nb \"c\"\n",
                "trimmed": "a\n  b\n",
                "esc": "a\"b\\c\né ${x}",
            })
        );
        assert_eq!(parse("").expect("valid"), json!({}));
        assert_eq!(parse(r#"{}"#).map(|_| ()).expect_err("refused").line, 1);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, error) in [
            ("a = 1\nb = \n", "line 3: the file ends where a value should be"),
            ("a {\n b = 1\n", "line 3: the file ends before '}'"),
            ("\na = \"x\ny\"", "line 2: a string must end on its line"),
            ("a = 1\na = 2", "line 2: \"a\" is set twice"),
            ("a = web", "line 1: \"web\" is no number and no boolean: put text in quotes"),
            ("a b", "line 1: \"a\" must be followed by = and a value, or by a block in braces"),
            ("/* x", "line 1: a comment is never closed"),
        ] {
            assert_eq!(parse(text).expect_err("refused").to_string(), error, "{text}");
        }
        assert!(parse(&"a {".repeat(500)).is_err() && parse(&format!("a = {}", "[".repeat(500))).is_err());
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in "[a-z\"\\\\{}\\[\\]=,<\\-#/*\\n é0-9.]{0,80}") {
            let _ = parse(&text);
        }
    }
}
