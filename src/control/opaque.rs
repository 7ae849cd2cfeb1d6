//! `proxy.config` and friends: maps that anybody may have written, with Consul's weak typing.
//!
//! Numbers come as texts, blocks as lists of one, durations as Go texts or nanoseconds, keys in any case. Every key that
//! nothing read is known by name afterwards, so that none is ignored in silence. Source: Consul `agent/xds/config`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Map, Value};

/// One map, with a note of what was read.
#[derive(Debug)]
pub(crate) struct Opaque<'a> {
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<&'a str>>,
}

impl<'a> Opaque<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, read: RefCell::default() }
    }

    /// A key's value, unless it is absent, `null` or an empty text.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        let (name, value) = self.map.iter().find(|(name, _)| name.eq_ignore_ascii_case(key))?;
        self.read.borrow_mut().insert(name);
        Some(value).filter(|value| !value.is_null() && value.as_str() != Some(""))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<String>, String> {
        self.read(key, "a text", |value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(flag) => Some(flag.to_string()),
            _ => None,
        })
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<u64>, String> {
        self.read(key, "a whole number", weak_number)
    }

    /// A number that fits 32 bits.
    pub(crate) fn small(&self, key: &str) -> Result<Option<u32>, String> {
        self.read(key, "a whole number below 2^32", |value| weak_number(value).and_then(|number| u32::try_from(number).ok()))
    }

    /// Milliseconds, as the keys that end in `_ms` hold them.
    pub(crate) fn millis(&self, key: &str) -> Result<Option<Duration>, String> {
        Ok(self.number(key)?.map(Duration::from_millis))
    }

    pub(crate) fn duration(&self, key: &str) -> Result<Option<Duration>, String> {
        self.read(key, "a duration such as 5s", go_duration)
    }

    /// A nested block: an object, or a list of one.
    pub(crate) fn block(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value {
            Value::Object(map) => Ok(Some(map)),
            Value::Array(list) => match list.as_slice() {
                [] => Ok(None),
                [Value::Object(map)] => Ok(Some(map)),
                _ => Err(format!("{key} must be one block")),
            },
            _ => Err(format!("{key} must be a block")),
        }
    }

    /// Keys that are known and rightly without effect here.
    pub(crate) fn ignore(&self, keys: &[&str]) {
        for key in keys {
            let _ = self.get(key);
        }
    }

    /// Keys that nothing has read.
    pub(crate) fn unread(&self) -> Vec<&'a str> {
        let read = self.read.borrow();
        self.map.keys().map(String::as_str).filter(|key| !read.contains(key)).collect()
    }

    fn read<T>(&self, key: &str, wanted: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, String> {
        let Some(mut value) = self.get(key) else { return Ok(None) };
        if let Value::Array(list) = value
            && let [one] = list.as_slice()
        {
            value = one;
        }
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(format!("{key} must be {wanted}, not {}", short(value))),
        }
    }
}

fn weak_number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64().or_else(|| whole(number.as_f64()?)),
        Value::String(text) => text.trim().parse().ok(),
        Value::Bool(flag) => Some(u64::from(*flag)),
        _ => None,
    }
}

/// 2^53, up to which every whole number is a float.
const WHOLE_FLOAT_MAX: f64 = 9_007_199_254_740_992.0;

fn whole(float: f64) -> Option<u64> {
    let exact = float.fract() == 0.0 && (0.0..=WHOLE_FLOAT_MAX).contains(&float);
    exact.then(|| Duration::try_from_secs_f64(float).ok().map(|duration| duration.as_secs())).flatten()
}

/// A Go duration: text such as `1m30s` or `2.5s`, or whole nanoseconds.
pub(crate) fn go_duration(value: &Value) -> Option<Duration> {
    match value {
        Value::Number(_) => weak_number(value).map(Duration::from_nanos),
        Value::String(text) => parse_go(text.trim()),
        _ => None,
    }
}

fn parse_go(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    if text.is_empty() || text.len() > 64 {
        return None;
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit_end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3_600.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit_end..];
    }
    Some(total)
}

fn short(value: &Value) -> String {
    let text: String = value.to_string().chars().take(40).collect();
    text.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().expect("an object").clone()
    }

    #[test]
    fn weak_typing_reads_what_consul_reads() {
        let map = map(json!({
            "a": "3000", "b": 3000, "c": 3000.0, "D_D": [7], "e": [{"max_connections": "5"}], "f": "", "g": null, "h": 2.5, "i": [1, 2]
        }));
        let opaque = Opaque::new(&map);
        for key in ["a", "b", "c"] {
            assert_eq!(opaque.number(key), Ok(Some(3_000)), "{key}");
        }
        assert_eq!(opaque.small("d_d"), Ok(Some(7)), "any case, list of one");
        let limits = opaque.block("e").expect("a block").expect("present");
        assert_eq!(Opaque::new(limits).small("max_connections"), Ok(Some(5)));
        assert_eq!((opaque.number("f"), opaque.number("g"), opaque.number("z")), (Ok(None), Ok(None), Ok(None)));
        let error = opaque.number("h").expect_err("2.5 is not whole");
        assert!(error.contains('h') && error.contains("2.5"), "{error}");
        assert!(opaque.number("i").is_err() && opaque.block("a").is_err());
        assert_eq!(opaque.unread(), [""; 0]);
    }

    #[test]
    fn unread_keys_are_named() {
        let map = map(json!({"bind_port": 1, "enovy_typo": 2, "protocol": "tcp"}));
        let opaque = Opaque::new(&map);
        opaque.ignore(&["protocol"]);
        assert_eq!(opaque.small("bind_port"), Ok(Some(1)));
        assert_eq!(opaque.unread(), ["enovy_typo"]);
    }

    #[test]
    fn durations_are_gos() {
        let of = |text: &str| go_duration(&json!(text));
        assert_eq!(of("5s"), Some(Duration::from_secs(5)));
        assert_eq!(of("1h2m3.5s"), Some(Duration::from_millis(3_723_500)));
        assert_eq!(of("2500ms"), Some(Duration::from_millis(2_500)));
        assert_eq!(of("0"), Some(Duration::ZERO));
        assert_eq!(go_duration(&json!(5_000_000_000_u64)), Some(Duration::from_secs(5)));
        for bad in ["", "5", "s", "-5s", "5x", "1.2.3s", "9999999999999999999999h"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_value_or_none(text in "\\PC{0,80}") {
            let _ = go_duration(&json!(text));
        }
    }
}
