//! `?mask=`: the fields of a dump that are kept.
//!
//! A path leads through messages, and through an `Any` into what it holds, whose `@type` stays. Through a list it leads into
//! each element.

use serde_json::{Map, Value};

/// Paths of one mask.
const PATHS_MAX: usize = 64;

/// `a.b,c`.
pub(super) struct Mask<'a> {
    text: &'a str,
    paths: Vec<Vec<&'a str>>,
}

impl<'a> Mask<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        let paths = text.split(',').filter(|path| !path.is_empty()).take(PATHS_MAX);
        Self { text, paths: paths.map(|path| path.split('.').collect()).collect() }
    }

    /// As it was given.
    pub(super) fn text(&self) -> &str {
        self.text
    }

    /// The first field of each path.
    pub(super) fn heads(&self) -> impl Iterator<Item = &'a str> {
        self.paths.iter().filter_map(|path| path.first().copied())
    }

    /// Whether every path begins with one of these fields.
    pub(super) fn begins_in(&self, known: &[&str]) -> bool {
        self.heads().all(|head| known.contains(&head))
    }

    /// What the paths lead to in `value`.
    pub(super) fn apply(&self, value: &Value) -> Value {
        let paths: Vec<&[&str]> = self.paths.iter().map(Vec::as_slice).collect();
        keep(value, &paths)
    }
}

fn keep(value: &Value, paths: &[&[&str]]) -> Value {
    match value {
        Value::Object(fields) => keep_fields(fields, paths).into(),
        Value::Array(elements) => elements.iter().map(|element| keep(element, paths)).collect(),
        // The path goes on where nothing more is.
        scalar => scalar.clone(),
    }
}

fn keep_fields(fields: &Map<String, Value>, paths: &[&[&str]]) -> Map<String, Value> {
    let mut kept = Map::new();
    for (name, value) in fields {
        let rests: Vec<&[&str]> =
            paths.iter().filter(|path| path.first() == Some(&name.as_str())).map(|path| &path[1..]).collect();
        if name == "@type" || rests.iter().any(|rest| rest.is_empty()) {
            kept.insert(name.clone(), value.clone());
        } else if !rests.is_empty() {
            kept.insert(name.clone(), keep(value, &rests));
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_the_paths_lead_to_is_kept() {
        let value = json!({"cluster": {"@type": "t", "name": "a", "type": "EDS"}, "version_info": "1", "last_updated": "x"});
        let kept = Mask::new("cluster.name,version_info").apply(&value);
        assert_eq!(kept, json!({"cluster": {"@type": "t", "name": "a"}, "version_info": "1"}));
        assert_eq!(Mask::new("cluster.name,cluster").apply(&value), json!({"cluster": value["cluster"]}));
        assert_eq!(Mask::new("nothing").apply(&value), json!({}));
        let list = json!({"a": [{"b": 1, "c": 2}, {"b": 3}]});
        assert_eq!(Mask::new("a.b").apply(&list), json!({"a": [{"b": 1}, {"b": 3}]}));
    }
}
