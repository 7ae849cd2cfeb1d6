//! The formats of the files below `/proc/PID`, from bytes to values.
//!
//! Invariant: total functions. Whatever a process writes into its own name or title, the result is `None` or a value that is
//! safe to print, and no field of the kernel's can be taken from what a process wrote.

use std::ffi::OsStr;

/// The fields of `stat` that are used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// Field 2, cleaned.
    pub(super) name: Box<str>,
    /// Field 3.
    state: u8,
    /// Field 4.
    pub(super) parent: u32,
    /// Field 22.
    pub(super) start_ticks: u64,
}

impl Stat {
    /// Only its exit status is left, or not even that.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// `pid (name) state ppid …`. The name may hold anything, parentheses and line ends too, so it ends at the last `)`.
pub(super) fn stat(text: &[u8]) -> Option<Stat> {
    let from = text.iter().position(|byte| *byte == b'(')?;
    let to = text.iter().rposition(|byte| *byte == b')')?;
    let name = clean(text.get(from + 1..to)?);
    let rest = std::str::from_utf8(text.get(to + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok()?;
    // Field 5 is the next one.
    let start_ticks = fields.nth(22 - 5)?.parse().ok()?;
    Some(Stat { name, state, parent, start_ticks })
}

/// The effective user: the second number of `Uid:`. The kernel escapes line ends in `Name:`, the only free text.
pub(super) fn uid(text: &[u8]) -> Option<u32> {
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The path of the v2 hierarchy, whose line begins with `0::`.
pub(super) fn cgroup(text: &[u8]) -> Option<Box<str>> {
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::"))?;
    let path = std::str::from_utf8(line).ok()?;
    Some(path.strip_suffix(" (deleted)").unwrap_or(path).into())
}

/// Numbers between white space; what is none ends the list.
pub(super) fn numbers(text: &[u8]) -> Vec<u32> {
    let text = String::from_utf8_lossy(text);
    text.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect()
}

/// A file name that is a number.
pub(super) fn number(name: &OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

/// Text that a process chose, for one line of a log: arguments parted by spaces, nothing that moves a cursor or hides.
pub(super) fn clean(text: &[u8]) -> Box<str> {
    let end = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let text = String::from_utf8_lossy(&text[..end]);
    let printable = text.chars().map(|char| match char {
        '\0' => ' ',
        char if is_unprintable(char) => '?',
        char => char,
    });
    let clean: String = printable.collect();
    clean.trim_end().into()
}

/// Characters that change what a terminal or a reader sees around them: controls, line separators, marks of direction.
pub(in crate::airflow) fn is_unprintable(char: char) -> bool {
    char.is_control() || matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REST: &str = " S 42 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3";

    #[test]
    fn a_name_cannot_forge_the_fields_behind_it() {
        for name in ["plain", "a b", "x) R 1 1 1 1", "((", "))", "a\nb) Z 9 ", "\u{fffd}", ""] {
            let text = format!("77 ({name}){REST}");
            let stat = stat(text.as_bytes()).expect(name);
            assert_eq!((stat.parent, stat.start_ticks, stat.has_ended()), (42, 987_654, false), "{name:?}");
            assert!(!stat.name.contains('\n'));
        }
        assert!(stat(format!("77 (x){}", REST.replacen('S', "Z", 1)).as_bytes()).expect("whole").has_ended());
        assert_eq!(stat(b"77 (x) S 42 7"), None, "too short");
    }

    #[test]
    fn the_effective_user_counts() {
        let text = b"Name:\tx\\nUid:\t0 0 0 0\nUmask:\t0022\nUid:\t1000\t0\t1000\t1000\nGid:\t5\t5\t5\t5\n";
        assert_eq!(uid(text), Some(0));
        assert_eq!(uid(b"Name:\tx\n"), None);
        assert_eq!(uid(b"Uid:\t1000\n"), None);
    }

    #[test]
    fn the_second_hierarchy_is_found_among_old_ones() {
        let text = b"9:name=systemd:/x\n0::/system.slice/airflow-worker.service\n";
        assert_eq!(cgroup(text).as_deref(), Some("/system.slice/airflow-worker.service"));
        assert_eq!(cgroup(b"0::/gone (deleted)\n").as_deref(), Some("/gone"));
        assert_eq!(cgroup(b"9:name=systemd:/x\n"), None);
    }

    #[test]
    fn a_title_becomes_one_clean_line() {
        assert_eq!(&*clean(b"bash\0-c\0echo hi\0\0\0\0"), "bash -c echo hi");
        assert_eq!(&*clean(b"a\x1b[2J\nb\r\xff"), "a?[2J?b?\u{fffd}");
        assert_eq!(&*clean("a\u{202e}b".as_bytes()), "a?b");
        assert_eq!(&*clean(b"\0\0"), "");
    }

    #[test]
    fn a_list_of_children_ends_where_it_makes_no_sense() {
        assert_eq!(numbers(b"12 13 \n"), [12, 13]);
        assert_eq!(numbers(b"12 x 14"), [12]);
        assert_eq!(numbers(b"12 99999999999"), [12]);
    }

    proptest! {
        #[test]
        fn hostile_content_never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = (stat(&text), uid(&text), cgroup(&text), numbers(&text));
            prop_assert!(!clean(&text).chars().any(is_unprintable));
        }

        #[test]
        fn a_name_of_any_bytes_leaves_the_fields_alone(name in proptest::collection::vec(any::<u8>(), 0..16)) {
            let text = [b"1 (", name.as_slice(), b")", REST.as_bytes()].concat();
            let stat = stat(&text).expect("the kernel's own fields");
            prop_assert_eq!((stat.parent, stat.start_ticks), (42, 987_654));
        }

        #[test]
        fn nearly_right_content_never_panics(text in "[0-9]{0,3} ?\\(?[a-z)( ]{0,6}\\)?( ?[A-Z0-9-]{0,4}){0,25}") {
            let _ = (stat(text.as_bytes()), uid(text.as_bytes()), cgroup(text.as_bytes()));
        }
    }
}
