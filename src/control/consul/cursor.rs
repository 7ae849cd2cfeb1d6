//! Where a blocking query stands: Consul's index and hash rules, pure.
//!
//! Invariant: an index never goes backwards without a full read, an answer counts as changed only when its content did,
//! and content that could not be used is never remembered as seen.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::client::Response;

/// How an endpoint blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// `?index=`, answered with `X-Consul-Index`.
    Index,
    /// `?hash=`, answered with `X-Consul-ContentHash`.
    Hash,
}

/// The position of one query.
#[derive(Debug)]
pub(crate) struct Cursor {
    style: Style,
    index: u64,
    hash: Option<String>,
    accepted: Option<u64>,
}

impl Cursor {
    pub(crate) fn new(style: Style) -> Self {
        Self { style, index: 0, hash: None, accepted: None }
    }

    /// The parameter to block with, or `None` when a full read is due.
    pub(crate) fn block_on(&self) -> Option<(&'static str, String)> {
        match self.style {
            Style::Index => (self.index > 0).then(|| ("index", self.index.to_string())),
            Style::Hash => self.hash.clone().map(|hash| ("hash", hash)),
        }
    }

    /// Makes the next read a full one. What was accepted is still remembered.
    pub(crate) fn restart(&mut self) {
        self.index = 0;
        self.hash = None;
    }

    /// Takes the position of a good answer; true when its content is not what was accepted last.
    pub(crate) fn observe(&mut self, response: &Response) -> bool {
        match self.style {
            Style::Index => self.index = next_index(self.index, response.index),
            Style::Hash => self.hash.clone_from(&response.hash),
        }
        self.accepted != Some(digest(&response.body))
    }

    /// The content of `response` is in use now.
    pub(crate) fn accept(&mut self, response: &Response) {
        self.accepted = Some(digest(&response.body));
    }
}

/// `docs: blocking queries`: backwards means start over, and 0 would not block.
fn next_index(previous: u64, answered: Option<u64>) -> u64 {
    match answered {
        None => 0,
        Some(index) if index < previous => 0,
        Some(0) => 1,
        Some(index) => index,
    }
}

fn digest(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(index: Option<u64>, hash: Option<&str>, body: &str) -> Response {
        Response { index, hash: hash.map(str::to_owned), ..Response::with_body(body.as_bytes()) }
    }

    #[test]
    fn indexes_follow_consuls_rules() {
        let mut cursor = Cursor::new(Style::Index);
        assert_eq!(cursor.block_on(), None, "the first read is a full one");
        assert!(cursor.observe(&answer(Some(74), None, "a")));
        assert_eq!(cursor.block_on(), Some(("index", "74".into())));
        cursor.observe(&answer(Some(20), None, "a"));
        assert_eq!(cursor.block_on(), None, "backwards: start over");
        cursor.observe(&answer(Some(0), None, "a"));
        assert_eq!(cursor.block_on(), Some(("index", "1".into())), "0 would not block");
        cursor.observe(&answer(None, None, "a"));
        assert_eq!(cursor.block_on(), None);
    }

    #[test]
    fn only_content_counts_as_change() {
        let mut cursor = Cursor::new(Style::Index);
        let first = answer(Some(74), None, "roots");
        assert!(cursor.observe(&first));
        assert!(cursor.observe(&first), "seen but not accepted: still new");
        cursor.accept(&first);
        assert!(!cursor.observe(&answer(Some(183), None, "roots")), "the index jumped, the content did not");
        cursor.restart();
        assert!(!cursor.observe(&answer(Some(183), None, "roots")));
        assert!(cursor.observe(&answer(Some(184), None, "other")));
    }

    #[test]
    fn hashes_block_on_the_last_hash() {
        let mut cursor = Cursor::new(Style::Hash);
        assert_eq!(cursor.block_on(), None);
        cursor.observe(&answer(None, Some("e34b"), "x"));
        assert_eq!(cursor.block_on(), Some(("hash", "e34b".into())));
        cursor.restart();
        assert_eq!(cursor.block_on(), None);
    }
}
