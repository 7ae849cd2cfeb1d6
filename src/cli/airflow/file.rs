//! A file to review, and how its text is made of a template.

/// One file that a host needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    /// Below the folder of `-out`.
    pub(super) path: String,
    pub(super) text: String,
    /// Whether it will hold passwords, once its owner has filled them in.
    pub(super) is_private: bool,
}

impl File {
    pub(super) fn new(path: impl Into<String>, text: String) -> Self {
        Self { path: path.into(), text, is_private: false }
    }
}

/// `template` with each `{{name}}` replaced by its value.
///
/// A name that the template does not have is a fault of this program, as is a place that no value fills; tests look for both.
pub(super) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut text = template.to_owned();
    for (name, value) in values {
        let place = format!("{{{{{name}}}}}");
        debug_assert!(text.contains(&place), "the template has no {place}");
        text = text.replace(&place, value);
    }
    debug_assert!(!text.contains("{{"), "a place is left in:\n{text}");
    text
}

/// `text` as comment lines that begin with `prefix`.
pub(super) fn commented(text: &str, prefix: &str) -> String {
    text.lines().map(|line| format!("{prefix} {line}").trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_filled_everywhere() {
        assert_eq!(fill("{{a}} and {{b}}, {{a}}\n", &[("a", "1"), ("b", "2")]), "1 and 2, 1\n");
        assert_eq!(commented("a\n\nb\n", "#"), "# a\n#\n# b\n");
    }
}
