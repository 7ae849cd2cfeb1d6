//! Values as a terminal may show them.
//!
//! Invariant: what came from elsewhere steers no terminal: control characters and marks that turn the direction of text are
//! shown as escapes. Pure.

use std::time::Duration;

/// The text with everything that could move a cursor, colour, hide or reorder written out.
pub(super) fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() || is_mark(letter) {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

/// Marks of direction, joiners, and line separators: they show nothing and change what is seen.
fn is_mark(letter: char) -> bool {
    matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// At most `width` letters, and exactly that many with spaces.
pub(super) fn padded(text: &str, width: usize) -> String {
    let letters = text.chars().count();
    if letters <= width {
        return format!("{text}{}", " ".repeat(width - letters));
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// `12 B`, `3.4 KiB`.
pub(super) fn size(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `45 s`, `12 min`, `3 h 20 min`, `5 days`.
pub(super) fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_steers_no_terminal() {
        assert_eq!(plain("\u{1b}[2Jgone\r\n\u{202e}daolyap\u{9b}1m"), "\\u{1b}[2Jgone\\r\\n\\u{202e}daolyap\\u{9b}1m");
        assert_eq!(plain("lädt_日本 ok"), "lädt_日本 ok");
    }

    #[test]
    fn sizes_spans_and_widths_read_well() {
        assert_eq!((size(0.0), size(1_023.0), size(1_536.0)), ("0 B".into(), "1023 B".into(), "1.5 KiB".into()));
        assert_eq!(size(5e15), "4547.5 TiB");
        let spans = [5, 65, 3_725, 200_000].map(|seconds| span(Duration::from_secs(seconds)));
        assert_eq!(spans, ["5 s", "1 min", "1 h 2 min", "2 days"]);
        assert_eq!((padded("ab", 4), padded("abcdef", 4)), ("ab  ".into(), "abc…".into()));
    }
}
