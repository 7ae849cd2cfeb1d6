//! What is loaded compared with what would be, both as nft lists them.
//!
//! Invariant: two tables are the same only if each chain has the same rules in the same order.

use serde_json::{Value, json};

/// How they differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Difference {
    /// Not at all.
    None,
    /// There is no table.
    NotLoaded,
    /// The same rules, in another order.
    Order,
    /// By these rules.
    Rules { missing: Vec<String>, unexpected: Vec<String> },
}

impl Difference {
    /// Compares listings.
    pub(super) fn of(loaded: Option<&str>, wanted: &str) -> Self {
        let Some(loaded) = loaded else { return Self::NotLoaded };
        let (loaded, wanted) = (rules(loaded), rules(wanted));
        if loaded == wanted {
            return Self::None;
        }
        let (missing, unexpected) = (without(&wanted, &loaded), without(&loaded, &wanted));
        if missing.is_empty() && unexpected.is_empty() { Self::Order } else { Self::Rules { missing, unexpected } }
    }

    /// For people, several lines.
    pub(super) fn text(&self) -> String {
        match self {
            Self::None => "the rules are loaded as they should be".to_owned(),
            Self::NotLoaded => format!("no rules are loaded\n{REMEDY}"),
            Self::Order => format!("the rules are loaded in another order\n{REMEDY}"),
            Self::Rules { missing, unexpected } => {
                let line = |mark, rule: &String| format!("{mark} {rule}\n");
                let lines = missing.iter().map(|rule| line('-', rule)).chain(unexpected.iter().map(|rule| line('+', rule)));
                format!(
                    "the rules differ (- is not loaded, + is loaded and should not be):\n{}{REMEDY}",
                    lines.collect::<String>()
                )
            }
        }
    }

    /// For programs, one object.
    pub(super) fn json(&self) -> Value {
        let none = Vec::new();
        let (missing, unexpected) = match self {
            Self::Rules { missing, unexpected } => (missing, unexpected),
            Self::None | Self::NotLoaded | Self::Order => (&none, &none),
        };
        json!({
            "loaded": *self != Self::NotLoaded,
            "same": *self == Self::None,
            "missing": missing,
            "unexpected": unexpected,
            "remedy": if *self == Self::None { "" } else { REMEDY },
        })
    }
}

const REMEDY: &str = "run the same command without -check to load them";

/// The rules of a listing, each behind the name of its chain.
fn rules(listing: &str) -> Vec<String> {
    let mut chain = "";
    let mut rules = Vec::new();
    for line in listing.lines().map(str::trim) {
        match line.strip_suffix('{').map(|head| head.trim().split_once(' ')) {
            Some(Some(("chain", name))) => {
                chain = name;
                rules.push(format!("chain {name}"));
            }
            Some(_) => {}
            None if line.is_empty() || line == "}" => {}
            None => rules.push(if chain.is_empty() { line.to_owned() } else { format!("{chain}: {line}") }),
        }
    }
    rules
}

/// Those of `these` that `those` lacks, counting repetitions.
fn without(these: &[String], those: &[String]) -> Vec<String> {
    let mut left = std::collections::HashMap::<&String, usize>::new();
    for rule in those {
        *left.entry(rule).or_default() += 1;
    }
    let mut is_there = |rule: &String| {
        let count = left.get_mut(rule).filter(|count| **count > 0);
        count.is_some_and(|count| {
            *count -= 1;
            true
        })
    };
    these.iter().filter(|rule| !is_there(rule)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: &str = "table inet ringfence {\n\tchain outgoing {\n\t\ttype nat hook output priority -100; policy accept;\n\
                          \t\tmeta skuid { 5, 6 } jump to_mesh\n\t}\n\n\tchain to_mesh {\n\t\tip daddr 10.0.0.1 counter\n\t}\n}\n";

    #[test]
    fn the_same_is_the_same_and_absence_is_told() {
        assert_eq!(Difference::of(Some(WANTED), WANTED), Difference::None);
        assert_eq!(Difference::of(None, WANTED), Difference::NotLoaded);
        assert_eq!(Difference::None.json()["same"], true);
        assert_eq!(Difference::NotLoaded.json()["loaded"], false);
    }

    #[test]
    fn a_rule_more_or_less_is_named_with_its_chain() {
        let loaded = WANTED.replace("{ 5, 6 }", "5").replace("\t\tip daddr 10.0.0.1 counter\n", "");
        let difference = Difference::of(Some(&loaded), WANTED);
        let text = difference.text();
        for line in
            ["- outgoing: meta skuid { 5, 6 } jump to_mesh", "+ outgoing: meta skuid 5 jump to_mesh", "- to_mesh: ip daddr"]
        {
            assert!(text.contains(line), "{text}");
        }
        assert_eq!(difference.json()["missing"].as_array().map(Vec::len), Some(2));
    }

    #[test]
    fn a_rule_twice_and_another_order_are_differences() {
        let twice = WANTED.replace("ip daddr 10.0.0.1 counter\n", "ip daddr 10.0.0.1 counter\n\t\tip daddr 10.0.0.1 counter\n");
        let unexpected = vec!["to_mesh: ip daddr 10.0.0.1 counter".to_owned()];
        assert_eq!(Difference::of(Some(&twice), WANTED), Difference::Rules { missing: Vec::new(), unexpected });
        let (first, second) = ("chain a {\n1\n2\n}\n", "chain a {\n2\n1\n}\n");
        assert_eq!(Difference::of(Some(first), second), Difference::Order);
    }
}
