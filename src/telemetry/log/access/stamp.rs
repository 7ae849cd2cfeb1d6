//! A moment as `%START_TIME(format)%` prints it: strftime's letters, and Envoy's and Abseil's for fractions of a second.
//!
//! Invariant: the format is read once; what it does not know is printed as it stands, as Envoy does. All times are UTC.

use std::fmt::Write;
use std::time::SystemTime;

use time::OffsetDateTime;

/// Envoy's format where none is given.
const DEFAULT: &str = "%Y-%m-%dT%H:%M:%E3SZ";
/// Digits of a nanosecond.
const FRACTION_DIGITS: usize = 9;

/// How a moment is printed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stamp(Vec<Item>);

#[derive(Debug, Clone, PartialEq)]
enum Item {
    Literal(String),
    /// One of strftime's letters.
    Letter(char),
    /// The fraction of the second in this many digits; 0 is as many as it needs.
    Fraction(usize),
    /// Seconds and that.
    Seconds(usize),
}

impl Stamp {
    pub(super) fn new(format: &str) -> Self {
        let mut items = Vec::new();
        let mut rest = if format.is_empty() { DEFAULT } else { format };
        while let Some(at) = rest.find('%') {
            push_literal(&mut items, &rest[..at]);
            let (item, len) = specifier(&rest[at + 1..]);
            match item {
                Some(item) => items.push(item),
                None => push_literal(&mut items, &rest[at..=at + len]),
            }
            rest = &rest[at + 1 + len..];
        }
        push_literal(&mut items, rest);
        Self(items)
    }

    pub(super) fn print(&self, at: SystemTime) -> String {
        let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut text = String::with_capacity(32);
        // A clock beyond the year 9999 is printed as the epoch: `time` ends there.
        let seconds = i64::try_from(since.as_secs()).unwrap_or_default();
        let date = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        for item in &self.0 {
            match item {
                Item::Literal(literal) => text.push_str(literal),
                Item::Letter(letter) => print_letter(*letter, date, &mut text),
                Item::Fraction(digits) => text.push_str(&fraction(since.subsec_nanos(), *digits)),
                Item::Seconds(digits) => {
                    print_letter('S', date, &mut text);
                    let fraction = fraction(since.subsec_nanos(), *digits);
                    if !fraction.is_empty() {
                        text.push('.');
                        text.push_str(&fraction);
                    }
                }
            }
        }
        text
    }
}

fn push_literal(items: &mut Vec<Item>, text: &str) {
    match items.last_mut() {
        _ if text.is_empty() => {}
        Some(Item::Literal(last)) => last.push_str(text),
        _ => items.push(Item::Literal(text.to_owned())),
    }
}

/// What follows a per cent sign, and its length in bytes; `None` stands for itself.
fn specifier(text: &str) -> (Option<Item>, usize) {
    let mut chars = text.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('%'), ..) => (Some(Item::Literal("%".to_owned())), 1),
        (Some('f'), ..) => (Some(Item::Fraction(FRACTION_DIGITS)), 1),
        (Some(digit @ '1'..='9'), Some('f'), _) => (Some(Item::Fraction(digit as usize - '0' as usize)), 2),
        (Some('1'..='9'), Some('s'), _) => (Some(Item::Letter('s')), 2),
        (Some('E'), Some('*'), Some('S')) => (Some(Item::Seconds(0)), 3),
        (Some('E'), Some('*'), Some('f')) => (Some(Item::Fraction(0)), 3),
        (Some('E'), Some(digit @ '1'..='9'), Some('S')) => (Some(Item::Seconds(digit as usize - '0' as usize)), 3),
        (Some('E'), Some(digit @ '1'..='9'), Some('f')) => (Some(Item::Fraction(digit as usize - '0' as usize)), 3),
        (Some(letter), ..) if "YmdHMSybhBaApIDTFRZzsjec".contains(letter) => (Some(Item::Letter(letter)), 1),
        (Some(other), ..) => (None, other.len_utf8()),
        (None, ..) => (None, 0),
    }
}

/// The first `digits` digits after the point, or all that are not zero at the end.
fn fraction(nanoseconds: u32, digits: usize) -> String {
    let all = format!("{nanoseconds:09}");
    match digits {
        0 => all.trim_end_matches('0').to_owned(),
        digits => all[..digits.min(FRACTION_DIGITS)].to_owned(),
    }
}

fn print_letter(letter: char, at: OffsetDateTime, text: &mut String) {
    let (date, clock) = (at.date(), at.time());
    let (month, weekday) = (date.month().to_string(), date.weekday().to_string());
    let twelve = match clock.hour() % 12 {
        0 => 12,
        hour => hour,
    };
    let written = match letter {
        'Y' => write!(text, "{:04}", date.year()),
        'y' => write!(text, "{:02}", date.year().rem_euclid(100)),
        'm' => write!(text, "{:02}", u8::from(date.month())),
        'd' => write!(text, "{:02}", date.day()),
        'e' => write!(text, "{:2}", date.day()),
        'j' => write!(text, "{:03}", date.ordinal()),
        'H' => write!(text, "{:02}", clock.hour()),
        'I' => write!(text, "{twelve:02}"),
        'M' => write!(text, "{:02}", clock.minute()),
        'S' => write!(text, "{:02}", clock.second()),
        's' => write!(text, "{}", at.unix_timestamp()),
        'b' | 'h' => write!(text, "{}", &month[..3]),
        'B' => write!(text, "{month}"),
        'a' => write!(text, "{}", &weekday[..3]),
        'A' => write!(text, "{weekday}"),
        'p' => write!(text, "{}", if clock.hour() < 12 { "AM" } else { "PM" }),
        'Z' => write!(text, "UTC"),
        'z' => write!(text, "+0000"),
        'D' => return print_letters("m/d/y", at, text),
        'T' => return print_letters("H:M:S", at, text),
        'F' => return print_letters("Y-m-d", at, text),
        'R' => return print_letters("H:M", at, text),
        'c' => return print_letters("a b e T Y", at, text),
        other => write!(text, "%{other}"),
    };
    debug_assert!(written.is_ok(), "a string takes anything");
}

fn print_letters(letters: &str, at: OffsetDateTime, text: &mut String) {
    for letter in letters.chars() {
        if letter.is_alphabetic() { print_letter(letter, at, text) } else { text.push(letter) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What Envoy 1.40 printed for these moments.
    #[test]
    fn formats_print_what_envoy_prints() {
        let print = |format: &str, seconds, nanoseconds| {
            Stamp::new(format).print(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds))
        };
        assert_eq!(print("", 1_795_542_876, 55_667_000), "2026-11-24T17:54:36.055Z");
        assert_eq!(print("%Y/%m/%dT%H:%M:%S%z %s", 1_795_542_876, 55_667_000), "2026/11/24T17:54:36+0000 1795542876");
        assert_eq!(
            print("%s%3f %3s %f %6f %9f %E3S %E*S %j %e", 1_795_542_876, 55_667_000),
            "1795542876055 1795542876 055667000 055667 055667000 36.055 36.055667 328 24"
        );
        assert_eq!(print("%E4n", 1_795_542_972, 299_021_000), "%E4n");
        assert_eq!(
            print("%1f %2f %4f %9f %% %y %b %B %a %A %p %I %D %T %F %R %H %Z %E3f %Q", 1_795_542_972, 299_021_000),
            "2 29 2990 299021000 % 26 Nov November Tue Tuesday PM 05 11/24/26 17:56:12 2026-11-24 17:56 17 UTC 299 %Q"
        );
        assert_eq!(print("%c", 1_795_542_972, 0), "Tue Nov 24 17:56:12 2026");
        assert_eq!(print("%s.%6f", 1_795_542_972, 299_021_000), "1795542972.299021");
        assert_eq!(print("%E*S|%E*f|%e", 5, 0), "05|| 1");
    }

    proptest::proptest! {
        #[test]
        fn no_format_panics(format in "[%E0-9fSsYé*]{0,20}", seconds: u64) {
            let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH);
            Stamp::new(&format).print(at);
        }
    }
}
