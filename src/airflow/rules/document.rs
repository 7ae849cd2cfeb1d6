//! A TOML file with its lines kept: every table, key and value can say where it stands and what is wrong with it.
//!
//! Invariant: an error of this file names path, line, table, key, value and remedy. Knows no key of the rules file.

use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{RulesError, quoted};

/// Most values in one list.
const VALUES_MAX: usize = 1_000;

/// A parsed file.
#[derive(Debug)]
pub(super) struct Document<'d> {
    path: &'d str,
    text: &'d str,
    table: Spanned<DeTable<'d>>,
}

/// One table of it.
#[derive(Debug, Clone)]
pub(super) struct Section<'d> {
    path: &'d str,
    text: &'d str,
    /// How messages name the table, with a colon; empty at the top.
    place: String,
    /// The byte where it begins.
    begin: usize,
    table: &'d DeTable<'d>,
}

/// One key with its value, or one value of a key's list.
#[derive(Debug)]
pub(super) struct Item<'s, 'd> {
    section: &'s Section<'d>,
    key: &'static str,
    at: usize,
    value: &'d DeValue<'d>,
}

impl<'d> Document<'d> {
    pub(super) fn parse(text: &'d str, path: &'d str) -> Result<Self, RulesError> {
        let table = DeTable::parse(text).map_err(|error| RulesError::Syntax {
            path: path.to_owned(),
            line: line(text, error.span().map_or(0, |span| span.start)),
            what: error.message().to_owned(),
        })?;
        Ok(Self { path, text, table })
    }

    pub(super) fn top(&self) -> Section<'_> {
        Section { path: self.path, text: self.text, place: String::new(), begin: 0, table: self.table.get_ref() }
    }
}

impl<'d> Section<'d> {
    /// Refuses any key but `known`.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), RulesError> {
        let strangers = self.table.keys().filter(|key| !known.iter().any(|known| key.get_ref() == known));
        let Some(first) = strangers.min_by_key(|key| key.span().start) else { return Ok(()) };
        let key: &str = first.get_ref();
        let hint = match nearest(key, known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known keys are {}", known.join(", ")),
        };
        Err(RulesError::UnknownKey { at: self.at(first.span().start), key: quoted(key).trim_matches('"').to_owned(), hint })
    }

    /// The key's value, if it is there.
    pub(super) fn get<'s>(&'s self, key: &'static str) -> Option<Item<'s, 'd>> {
        let (name, value) = self.table.iter().find(|(name, _)| name.get_ref() == key)?;
        Some(Item { section: self, key, at: name.span().start, value: value.get_ref() })
    }

    pub(super) fn text(&self, key: &'static str) -> Result<Option<&'d str>, RulesError> {
        self.get(key).map(|item| item.text()).transpose()
    }

    pub(super) fn boolean(&self, key: &'static str) -> Result<Option<bool>, RulesError> {
        self.get(key).map(|item| item.boolean()).transpose()
    }

    /// The `[[key]]` tables in the order of the file, at most `tables_max`.
    pub(super) fn tables(&self, key: &'static str, tables_max: usize) -> Result<Vec<Self>, RulesError> {
        let Some(item) = self.get(key) else { return Ok(Vec::new()) };
        let remedy = || format!("write each one as a table of its own under [[{key}]]");
        let DeValue::Array(array) = item.value else { return Err(item.wrong("is no list of tables", &remedy())) };
        if array.len() > tables_max {
            return Err(item.wrong(&format!("{} tables are more than {tables_max}", array.len()), "join some by lists and globs"));
        }
        let mut sections = Vec::new();
        for (index, value) in array.iter().enumerate() {
            let DeValue::Table(table) = value.get_ref() else { return Err(item.wrong("is no list of tables", &remedy())) };
            let name = table.iter().find(|(name, _)| name.get_ref() == "name").and_then(|(_, value)| value.get_ref().as_str());
            let place = match name {
                Some(name) => format!("[[{key}]] {}: ", quoted(name)),
                None => format!("[[{key}]] number {}: ", index + 1),
            };
            sections.push(Self { place, begin: value.span().start, table, ..*self });
        }
        Ok(sections)
    }

    /// An error of the table as a whole.
    pub(super) fn wrong(&self, why: &str, remedy: &str) -> RulesError {
        RulesError::Table { at: self.at(self.begin), why: why.to_owned(), remedy: remedy.to_owned() }
    }

    /// How an error names what begins at a byte: file, line and table.
    fn at(&self, byte: usize) -> String {
        format!("{}:{}: {}", self.path, line(self.text, byte), self.place)
    }
}

impl<'s, 'd> Item<'s, 'd> {
    pub(super) fn text(&self) -> Result<&'d str, RulesError> {
        match self.value {
            DeValue::String(text) if text.is_empty() => Err(self.wrong("is empty", "give it a value, or remove the key")),
            DeValue::String(text) => Ok(text),
            _ => Err(self.wrong("is no text", "put it in quotes")),
        }
    }

    pub(super) fn boolean(&self) -> Result<bool, RulesError> {
        self.value.as_bool().ok_or_else(|| self.wrong("is neither true nor false", "write true or false, without quotes"))
    }

    pub(super) fn number(&self, range: RangeInclusive<usize>) -> Result<usize, RulesError> {
        let number = self.value.as_integer().and_then(|digits| usize::from_str_radix(digits.as_str(), digits.radix()).ok());
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let remedy = format!("write a whole number of {} to {}", range.start(), range.end());
            self.wrong("is no number that fits", &remedy)
        })
    }

    /// The text, or the digits of a number: for users, who have both a name and a uid.
    pub(super) fn text_or_digits(&self) -> Result<&'d str, RulesError> {
        match self.value {
            DeValue::Integer(digits) if digits.radix() == 10 => Ok(digits.as_str()),
            _ => self.text(),
        }
    }

    /// The values of a list; a value alone is a list of one. Never empty.
    pub(super) fn values(self) -> Result<Vec<Self>, RulesError> {
        let DeValue::Array(array) = self.value else { return Ok(vec![self]) };
        if array.is_empty() {
            return Err(self.wrong("an empty list matches nothing", "list at least one value, or remove the key"));
        }
        if array.len() > VALUES_MAX {
            return Err(self.wrong(&format!("{} values are more than {VALUES_MAX}", array.len()), "use globs, or two rules"));
        }
        let (section, key) = (self.section, self.key);
        Ok(array.iter().map(|value| Self { section, key, at: value.span().start, value: value.get_ref() }).collect())
    }

    /// An error of this value.
    pub(super) fn wrong(&self, why: &str, remedy: &str) -> RulesError {
        let value = match self.value {
            DeValue::String(text) => quoted(text),
            DeValue::Integer(digits) => quoted(digits.as_str()).trim_matches('"').to_owned(),
            DeValue::Boolean(value) => value.to_string(),
            other => format!("({})", other.type_str()),
        };
        let at = format!("{}`{}` = {value}", self.section.at(self.at), self.key);
        RulesError::Value { at, why: why.to_owned(), remedy: remedy.to_owned() }
    }
}

/// The line of a byte, from 1.
fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

/// The known word that is the fewest edits away, if it is near enough to be meant.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let length = word.chars().count();
    let edits_max = (length / 2).clamp(1, 4);
    let near = |candidate: &&&str| candidate.chars().count().abs_diff(length) <= edits_max;
    known
        .iter()
        .filter(near)
        .map(|candidate| (strsim::osa_distance(word, candidate), *candidate))
        .filter(|(edits, _)| *edits <= edits_max)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str, read: impl Fn(&Section<'_>) -> Result<(), RulesError>) -> String {
        let document = Document::parse(text, "a.toml").unwrap();
        read(&document.top()).unwrap_err().to_string()
    }

    #[test]
    fn an_error_names_file_line_key_value_and_remedy() {
        let text = "\n\nsocket = 5\n";
        assert_eq!(fails(text, |top| top.text("socket").map(drop)), "a.toml:3: `socket` = 5: is no text; put it in quotes");
        let text = "a = [\n  'x',\n  true,\n]\n";
        let read = |top: &Section<'_>| {
            let values = top.get("a").unwrap().values()?;
            values.iter().try_for_each(|value| value.text().map(drop))
        };
        assert_eq!(fails(text, read), "a.toml:3: `a` = true: is no text; put it in quotes");
    }

    #[test]
    fn a_broken_file_names_the_line() {
        let error = Document::parse("a = 1\nb = \n", "a.toml").unwrap_err().to_string();
        assert!(error.starts_with("a.toml:2: not valid TOML: "), "{error}");
    }

    #[test]
    fn an_unknown_key_names_the_nearest_one() {
        let known = ["dag", "task", "run_as_user"];
        let hint = |text: &str| fails(text, |top| top.only(&known));
        assert_eq!(hint("dag = 1\ntaks = 2"), "a.toml:2: unknown key `taks`; did you mean `task`?");
        assert_eq!(hint("run-as-user = 1"), "a.toml:1: unknown key `run-as-user`; did you mean `run_as_user`?");
        assert_eq!(hint("zzzzzzz = 1"), "a.toml:1: unknown key `zzzzzzz`; known keys are dag, task, run_as_user");
    }

    #[test]
    fn a_number_has_bounds() {
        let read = |top: &Section<'_>| top.get("n").unwrap().number(1..=10).map(drop);
        for text in ["n = 0", "n = 11", "n = -1", "n = 'x'", "n = 1.5", "n = 99999999999999999999999"] {
            assert!(fails(text, read).ends_with("write a whole number of 1 to 10"), "{text}");
        }
        let document = Document::parse("n = 0xA", "a.toml").unwrap();
        assert_eq!(document.top().get("n").unwrap().number(1..=10).unwrap(), 10);
    }

    #[test]
    fn a_single_table_where_a_list_belongs_is_told_how_to_be_written() {
        let error = fails("[rule]\nname = 'x'", |top| top.tables("rule", 9).map(drop));
        assert!(error.ends_with("write each one as a table of its own under [[rule]]"), "{error}");
    }
}
