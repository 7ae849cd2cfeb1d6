//! What values are compared with: globs, and users of this host.
//!
//! Invariant: a glob takes time linear in the value, whatever either holds. A user is compared by uid, never by name.

use std::fmt;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use nix::unistd::User as Account;

use super::RulesError;
use super::document::Item;

/// Longest glob, in bytes. A DAG id has at most 250 characters.
const GLOB_BYTES_MAX: usize = 512;
/// Most alternatives in braces in one glob: deep nesting is no pattern.
const GLOB_BRACES_MAX: usize = 16;
/// A user that the file names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) text: Box<str>,
    pub(super) uid: u32,
}

impl User {
    /// Digits are a uid, anything else is looked up now.
    pub(super) fn decode(item: &Item<'_, '_>) -> Result<Self, RulesError> {
        let text = item.text_or_digits()?;
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let uid = text.parse().map_err(|_| item.wrong("is no uid", "write a whole number below 4294967296, or a name"))?;
            return Ok(Self { text: text.into(), uid });
        }
        match Account::from_name(text) {
            Ok(Some(account)) => Ok(Self { text: text.into(), uid: account.uid.as_raw() }),
            Ok(None) => Err(item.wrong("this host has no such user", "make the user, or correct the name")),
            Err(error) => Err(item.wrong(&format!("cannot be looked up: {}", error.desc()), "write the uid instead")),
        }
    }
}

/// A list of globs, one of which must match.
pub(super) struct Globs {
    texts: Vec<Box<str>>,
    set: GlobSet,
}

impl Globs {
    /// `*` stands for any characters.
    pub(super) fn of_texts(items: Vec<Item<'_, '_>>) -> Result<Self, RulesError> {
        Self::build(&items, false)
    }

    /// `*` stands for characters within one folder, `**` for any folders.
    pub(super) fn of_paths(items: Vec<Item<'_, '_>>) -> Result<Self, RulesError> {
        if let Some(item) = items
            .iter()
            .find(|item| item.text().is_ok_and(|text| text.starts_with('/') || text.starts_with("./") || text.starts_with("../")))
        {
            return Err(
                item.wrong("paths are relative to the bundle", "write it without the bundle's own folder, as in \"finance/**\"")
            );
        }
        Self::build(&items, true)
    }

    fn build(items: &[Item<'_, '_>], slash_is_special: bool) -> Result<Self, RulesError> {
        let remedy = "use * and ?, [a-z] for one of some letters, {a,b} for alternatives, \\ before a letter that is meant";
        let mut texts = Vec::new();
        let mut set = GlobSetBuilder::new();
        for item in items {
            let text = item.text()?;
            if text.len() > GLOB_BYTES_MAX || text.matches('{').count() > GLOB_BRACES_MAX {
                let why = format!("is longer than {GLOB_BYTES_MAX} bytes or has more than {GLOB_BRACES_MAX} braces");
                return Err(item.wrong(&why, "split it into several globs"));
            }
            let glob = GlobBuilder::new(text).literal_separator(slash_is_special).backslash_escape(true).build();
            set.add(glob.map_err(|error| item.wrong(&format!("is no glob: {}", error.kind()), remedy))?);
            texts.push(text.into());
        }
        // One that only fails together with others is told with the first.
        let set = set.build().map_err(|error| items[0].wrong(&format!("is no glob: {}", error.kind()), remedy))?;
        Ok(Self { texts, set })
    }

    pub(super) fn texts(&self) -> &[Box<str>] {
        &self.texts
    }

    pub(super) fn match_any(&self, value: &str) -> bool {
        self.set.is_match(value)
    }

    /// Whether these match wherever `narrow` do, as far as the texts tell.
    pub(super) fn covers(&self, narrow: &Self) -> bool {
        self.is_everything() || narrow.texts.iter().all(|glob| self.texts.contains(glob))
    }

    /// Whether one of them is nothing but stars.
    pub(super) fn is_everything(&self) -> bool {
        self.texts.iter().any(|glob| glob.bytes().all(|byte| byte == b'*'))
    }
}

impl PartialEq for Globs {
    fn eq(&self, other: &Self) -> bool {
        self.texts == other.texts
    }
}

impl fmt::Debug for Globs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.texts.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::document::Document;
    use super::*;

    fn globs(list: &str, paths: bool) -> Result<Globs, String> {
        let text = format!("g = {list}");
        let document = Document::parse(&text, "a.toml").unwrap();
        let top = document.top();
        let items = top.get("g").unwrap().values().unwrap();
        let globs = if paths { Globs::of_paths(items) } else { Globs::of_texts(items) };
        globs.map_err(|error| error.to_string())
    }

    #[test]
    fn a_star_crosses_a_slash_in_texts_and_not_in_paths() {
        assert!(globs("'airflow*'", false).unwrap().match_any("airflow worker -- /a/b"));
        let path = globs("['finance/*.py', 'hr/**']", true).unwrap();
        assert!(path.match_any("finance/a.py") && path.match_any("hr/a/b/c.py"));
        assert!(!path.match_any("finance/a/b.py") && !path.match_any("hrx/a.py") && !path.match_any("x/hr/a.py"));
    }

    #[test]
    fn a_glob_covers_the_whole_value_and_keeps_case() {
        let glob = globs("['pay_[ab]', '{x,y}_?', 'lit\\*']", false).unwrap();
        assert!(["pay_a", "pay_b", "x_1", "y_2", "lit*"].iter().all(|value| glob.match_any(value)));
        assert!(!["xpay_a", "pay_ab", "PAY_a", "z_1", "litt"].iter().any(|value| glob.match_any(value)));
    }

    #[test]
    fn a_wrong_glob_says_why() {
        for (list, part) in [
            ("'a['", "is no glob"),
            ("'a{b'", "is no glob"),
            (&format!("'{}'", "a".repeat(513)), "split it"),
            (&format!("'{}{}'", "{".repeat(200), "}".repeat(200)), "split it"),
        ] {
            assert!(globs(list, false).unwrap_err().contains(part), "{list}");
        }
        assert!(globs("'../x'", true).unwrap_err().contains("relative to the bundle"));
    }

    proptest! {
        #[test]
        fn hostile_globs_and_values_never_panic(glob in "[\\PC*?{}\\[\\]!,/\\\\]{1,40}", value in "\\PC{0,60}") {
            let list = toml_text(&glob);
            if let Ok(globs) = globs(&list, true) {
                globs.match_any(&value);
            }
            if let Ok(globs) = globs(&list, false) {
                globs.match_any(&value);
            }
        }
    }

    fn toml_text(value: &str) -> String {
        format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
    }
}
