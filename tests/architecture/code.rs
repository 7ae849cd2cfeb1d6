//! Rust source as text without its comments and literals: enough of a lexer for the house rules.
//!
//! Invariant: line breaks stay where they are, and what is left is code. Knows no grammar: half a file is fine too.

use std::collections::BTreeSet;

/// Code without white space around `::`, `{` and `,`, so that a path over several lines reads like one on a single line.
pub(crate) fn squeeze(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    for word in code.split_whitespace() {
        let glued = out.ends_with("::") || out.ends_with('{') || out.ends_with(',') || word.starts_with("::");
        if !glued && !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

pub(crate) fn words(code: &str) -> BTreeSet<&str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect()
}

/// The text with comments and the insides of literals blanked, lines kept.
pub(crate) fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let word_before = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        let skipped = match rest {
            [b'/', b'/', ..] => rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
            [b'/', b'*', ..] => comment_len(rest),
            [b'"', ..] => string_len(rest),
            [b'r' | b'b' | b'c', ..] if !word_before => raw_string_len(rest),
            [b'\'', b'\\', ..] => 3 + rest[3..].iter().position(|b| *b == b'\'').map_or(rest.len() - 3, |end| end + 1),
            [b'\'', ..] => char_len(rest),
            _ => 0,
        };
        if skipped == 0 {
            out.push(bytes[at]);
            at += 1;
        } else {
            out.extend(rest[..skipped].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
            at += skipped;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn comment_len(rest: &[u8]) -> usize {
    let (mut level, mut at) = (0_usize, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (level, at) = (level + 1, at + 2),
            [b'*', b'/', ..] => (level, at) = (level - 1, at + 2),
            _ => at += 1,
        }
        if level == 0 {
            return at;
        }
    }
    at
}

fn string_len(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// `r"…"`, `br#"…"#` and the like; 0 when it is a plain word.
fn raw_string_len(rest: &[u8]) -> usize {
    let Some(raw) = rest.iter().take(2).position(|b| *b == b'r') else { return 0 };
    let hashes = rest[raw + 1..].iter().take_while(|b| **b == b'#').count();
    let open = raw + 1 + hashes;
    if rest.get(open) != Some(&b'"') {
        return 0;
    }
    let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let end = rest[open + 1..].windows(close.len()).position(|window| window == close);
    end.map_or(rest.len(), |end| open + 1 + end + close.len())
}

/// `'x'` but not `'lifetime`.
fn char_len(rest: &[u8]) -> usize {
    let longest_char_bytes = 4;
    let end = rest.iter().skip(1).take(longest_char_bytes + 1).position(|b| *b == b'\'').map(|end| end + 2);
    let Some(end) = end.filter(|end| *end > 2) else { return 0 };
    let is_one_char = std::str::from_utf8(&rest[1..end - 1]).is_ok_and(|inside| inside.chars().count() == 1);
    if is_one_char { end } else { 0 }
}
