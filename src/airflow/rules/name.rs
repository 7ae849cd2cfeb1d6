//! Identities as names: what Consul takes, templates, and who has a templated name.
//!
//! Invariant: what a template makes is a DNS label of at most [`LABEL_BYTES_MAX`] bytes, and [`Names`] never admits two
//! different values under one of them. A value that had to be changed, or that looks as if it had been, carries a part of its
//! own hash; so two values meet by intent only, and on the host where both run the second is refused.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use ring::digest;

use super::condition::{Condition, Facts, Key};
use super::document::nearest;

/// Longest DNS label.
pub(super) const LABEL_BYTES_MAX: usize = 63;
/// Names that one templated rule gives, unless it says `max_identities`.
pub(super) const MAX_IDENTITIES_DEFAULT: usize = 50;
/// Most that it can say.
pub(super) const MAX_IDENTITIES_MAX: usize = 10_000;
/// Hash digits that mark a changed value: too many for an author to find another value with the same ones.
const MARK_DIGITS: usize = 16;
/// The least room for a value: one letter of it, a hyphen and the mark.
const VALUE_BYTES_MIN: usize = MARK_DIGITS + 2;
/// What a template may hold.
const PLACEHOLDERS: [Key; 4] = [Key::Dag, Key::Task, Key::Team, Key::Queue];

/// Whether `text` is a service name that Consul can put in a certificate and in DNS.
pub(super) fn check_label(text: &str) -> Result<(), &'static str> {
    if text.len() > LABEL_BYTES_MAX {
        return Err("is longer than 63 bytes");
    }
    if text.is_empty() || !is_label_text(text) {
        return Err("has more than small letters, digits and hyphens");
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err("begins or ends with a hyphen");
    }
    Ok(())
}

fn is_label_text(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

/// An identity as a rule writes it.
#[derive(Debug, PartialEq)]
pub(super) struct Template {
    text: Arc<str>,
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq)]
enum Part {
    Fixed(Box<str>),
    Value(Key),
}

/// An identity made for one task.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Name {
    /// A DNS label.
    pub(super) identity: String,
    /// The values as they were, in the order of the template.
    pub(super) values: Vec<Box<str>>,
    template: Arc<str>,
}

impl Template {
    /// Reads it; the error is why and a remedy.
    pub(super) fn parse(text: &str) -> Result<Self, (&'static str, String)> {
        let parts = split(text)?;
        let fixed = |part: &Part| if let Part::Fixed(text) = part { text.len() } else { VALUE_BYTES_MIN };
        if parts.iter().map(fixed).sum::<usize>() > LABEL_BYTES_MAX {
            let remedy = format!("shorten it: a name has {LABEL_BYTES_MAX} bytes, each ${{...}} needs {VALUE_BYTES_MIN} of them");
            return Err(("leaves too little room", remedy));
        }
        let open = matches!(parts.first(), Some(Part::Fixed(text)) if text.starts_with('-'));
        let close = matches!(parts.last(), Some(Part::Fixed(text)) if text.ends_with('-'));
        let sound = parts.iter().all(|part| !matches!(part, Part::Fixed(text) if !is_label_text(text)));
        if open || close || !sound || parts.is_empty() {
            let why = "is no Consul service name: small letters, digits and hyphens within";
            return Err((why, "write it as in \"airflow-payroll\" or \"airflow-${dag}\"".to_owned()));
        }
        Ok(Self { text: text.into(), parts })
    }

    /// Whether it makes one identity only.
    pub(super) fn is_fixed(&self) -> bool {
        !self.parts.iter().any(|part| matches!(part, Part::Value(_)))
    }

    /// Whether the identity begins with what a DAG's author chooses.
    pub(super) fn begins_with_authors(&self) -> bool {
        matches!(self.parts.first(), Some(Part::Value(Key::Dag | Key::Task)))
    }

    /// What must be known before it can be filled. A DAG and a task always are.
    pub(super) fn needs(&self) -> Vec<Condition> {
        let mut keys: Vec<Key> = self.values().filter(|key| matches!(key, Key::Team | Key::Queue)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.into_iter().map(Condition::one).collect()
    }

    /// The identity of a task; none if a value is not known.
    pub(super) fn fill(&self, facts: &Facts<'_>) -> Option<Name> {
        let values: Vec<Box<str>> = self.values().map(|key| one(key, facts)).collect::<Option<_>>()?;
        let fixed = self.parts.iter().map(|part| if let Part::Fixed(text) = part { text.len() } else { 0 }).sum::<usize>();
        let room = LABEL_BYTES_MAX.saturating_sub(fixed);
        let mut labels: Vec<String> = values.iter().map(|value| label(value, room)).collect();
        // Only when all together are too long has each its share.
        if labels.iter().map(String::len).sum::<usize>() > room {
            labels = values.iter().map(|value| label(value, room / values.len().max(1))).collect();
        }
        let mut labels = labels.iter();
        let identity = self
            .parts
            .iter()
            .map(|part| match part {
                Part::Fixed(text) => &**text,
                Part::Value(_) => labels.next().map_or("", String::as_str),
            })
            .collect();
        Some(Name { identity, values, template: self.text.clone() })
    }

    fn values(&self) -> impl Iterator<Item = Key> {
        self.parts.iter().filter_map(|part| if let Part::Value(key) = part { Some(*key) } else { None })
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn split(text: &str) -> Result<Vec<Part>, (&'static str, String)> {
    let known: Vec<&str> = PLACEHOLDERS.iter().map(|key| key.as_str()).collect();
    let list = || format!("write one of ${{{}}}", known.join("}, ${"));
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((fixed, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else { return Err(("has a ${ without }", list())) };
        let Some(key) = PLACEHOLDERS.iter().find(|key| key.as_str() == name) else {
            let remedy = nearest(name, &known).map_or_else(list, |near| format!("did you mean ${{{near}}}?"));
            return Err(("has a placeholder that nothing fills", remedy));
        };
        if !fixed.is_empty() {
            parts.push(Part::Fixed(fixed.into()));
        }
        parts.push(Part::Value(*key));
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Fixed(rest.into()));
    }
    Ok(parts)
}

/// The only value that the facts hold for `key`.
fn one(key: Key, facts: &Facts<'_>) -> Option<Box<str>> {
    let had = key.had(facts);
    let mut values = had.values();
    values.next().filter(|_| values.next().is_none()).map(Box::from)
}

/// `value` as a DNS label of at most `bytes_max`, which is at least [`VALUE_BYTES_MIN`].
fn label(value: &str, bytes_max: usize) -> String {
    let mut clean = String::with_capacity(value.len());
    for c in value.chars().map(|c| c.to_ascii_lowercase()) {
        match c {
            'a'..='z' | '0'..='9' => clean.push(c),
            _ if clean.is_empty() || clean.ends_with('-') => {}
            _ => clean.push('-'),
        }
    }
    let clean = clean.trim_end_matches('-');
    if clean == value && !clean.is_empty() && clean.len() <= bytes_max && !is_marked(clean) {
        return clean.to_owned();
    }
    let digest = digest::digest(&digest::SHA256, value.as_bytes());
    let mut mark: String = digest.as_ref().iter().take(MARK_DIGITS / 2).map(|byte| format!("{byte:02x}")).collect();
    // All of `clean` is ASCII.
    let kept = clean[..clean.len().min(bytes_max.saturating_sub(MARK_DIGITS + 1))].trim_end_matches('-');
    if !kept.is_empty() {
        mark.insert(0, '-');
    }
    format!("{kept}{mark}")
}

/// Whether an untouched value would pass for a changed one.
fn is_marked(clean: &str) -> bool {
    let tail = clean.rsplit('-').next().unwrap_or_default();
    tail.len() == MARK_DIGITS && tail.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f'))
}

/// Who has which templated identity on this host. Grows to the bounds of the rules and forgets nothing: an identity that
/// changed hands would let one DAG act on what another was allowed.
#[derive(Debug, Default)]
pub(crate) struct Names {
    given: HashMap<Arc<str>, Origin>,
    by_rule: HashMap<Arc<str>, HashSet<Arc<str>>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin {
    template: Arc<str>,
    values: Vec<Box<str>>,
}

/// Why a newcomer is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Clash {
    /// The name belongs to other values.
    Taken { template: Arc<str>, values: String },
    /// The rule has given all that it may.
    Full(usize),
}

impl Names {
    /// Whether `rule` may give `name`.
    pub(super) fn admit(&self, rule: &str, max_identities: usize, name: &Name) -> Result<(), Clash> {
        if let Some(origin) = self.given.get(name.identity.as_str())
            && (origin.template != name.template || origin.values != name.values)
        {
            return Err(Clash::Taken { template: origin.template.clone(), values: super::quoted(&origin.values.join(", ")) });
        }
        let Some(given) = self.by_rule.get(rule) else { return Ok(()) };
        if given.len() >= max_identities && !given.contains(name.identity.as_str()) {
            return Err(Clash::Full(max_identities));
        }
        Ok(())
    }

    /// Notes a name that was admitted.
    pub(super) fn give(&mut self, rule: &Arc<str>, identity: &Arc<str>, name: Name) {
        let Name { values, template, .. } = name;
        self.given.entry(identity.clone()).or_insert(Origin { template, values });
        self.by_rule.entry(rule.clone()).or_default().insert(identity.clone());
    }
}

impl Clash {
    pub(super) fn why(&self, name: &Name, newcomer: &str) -> String {
        match self {
            Self::Taken { template, values } => {
                format!("the identity `{}` for {newcomer} belongs to {values}, by `{template}`", name.identity)
            }
            Self::Full(max) => {
                format!("it has given {max} identities, which is its max_identities, and {newcomer} would be one more")
            }
        }
    }

    pub(super) fn remedy(&self, rule: &str) -> String {
        match self {
            Self::Taken { .. } => format!("rename one of the two, or give it a fixed identity by a rule before `{rule}`"),
            Self::Full(_) => format!("raise `max_identities` of rule `{rule}`, or narrow its conditions"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn facts<'f>(dag: &'f str, task: &'f str) -> Facts<'f> {
        Facts { dag, task, run: None, uid: None, queues: &[], catalog: None }
    }

    fn fill(template: &str, dag: &str, task: &str) -> String {
        Template::parse(template).unwrap().fill(&facts(dag, task)).unwrap().identity
    }

    #[test]
    fn a_value_that_is_a_label_stays_as_it_is() {
        assert_eq!(fill("airflow-${dag}", "payroll-daily2", "t"), "airflow-payroll-daily2");
        assert_eq!(fill("${task}-of-${dag}", "d", "t"), "t-of-d");
        assert_eq!(fill("fixed", "d", "t"), "fixed");
    }

    #[test]
    fn a_changed_value_carries_its_hash() {
        // printf payroll_daily | sha256sum
        assert_eq!(fill("airflow-${dag}", "payroll_daily", "t"), "airflow-payroll-daily-50b0fb2a65f1210d");
        for (dag, begin) in [("Ä_ö", "a-"), ("--x--y--", "a-x-y-"), ("PAY", "a-pay-"), ("日本", "a-")] {
            let name = fill("a-${dag}", dag, "t");
            assert!(name.starts_with(begin) && name.len() == begin.len() + MARK_DIGITS, "{name}");
        }
    }

    #[test]
    fn an_honest_looking_copy_of_a_changed_value_is_changed_too() {
        let victim = fill("a-${dag}", "pay_roll", "t");
        assert_ne!(fill("a-${dag}", victim.strip_prefix("a-").unwrap(), "t"), victim);
        let victim = fill("${dag}", "日本", "t");
        assert_ne!(fill("${dag}", &victim, "t"), victim);
    }

    #[test]
    fn long_values_share_the_room() {
        let (dag, task) = ("d".repeat(250), "t".repeat(250));
        let name = fill("airflow-${dag}-x-${task}", &dag, &task);
        assert!(name.len() <= LABEL_BYTES_MAX, "{name}");
        assert!(name.starts_with("airflow-ddd") && name.contains("-x-ttt"), "{name}");
        // A short one leaves the other its letters, up to the whole.
        assert_eq!(fill("${dag}-${task}", &"d".repeat(60), "tt"), format!("{}-tt", "d".repeat(60)));
    }

    #[test]
    fn a_wrong_template_says_what_to_write() {
        for (text, part) in [
            ("", "airflow-payroll"),
            ("Airflow", "airflow-payroll"),
            ("-a", "airflow-payroll"),
            ("a-", "airflow-payroll"),
            ("a_${dag}", "airflow-payroll"),
            ("a-$dag", "airflow-payroll"),
            ("a-${dag", "write one of ${dag}, ${task}, ${team}, ${queue}"),
            ("a-${dags}", "did you mean ${dag}?"),
            ("a-${}", "write one of"),
            (&"a".repeat(64), "shorten it"),
            (&format!("{}${{dag}}", "a".repeat(46)), "shorten it"),
        ] {
            let (why, remedy) = Template::parse(text).unwrap_err();
            assert!(remedy.contains(part), "{text}: {why}; {remedy}");
        }
        assert!(Template::parse(&format!("{}${{dag}}", "a".repeat(45))).is_ok());
    }

    #[test]
    fn the_second_of_two_values_with_one_name_is_refused() {
        let template = Template::parse("${dag}-${task}").unwrap();
        let name = |dag, task| template.fill(&facts(dag, task)).unwrap();
        let mut names = Names::default();
        let first = name("a-b", "c");
        assert_eq!(first.identity, name("a", "b-c").identity);
        names.admit("r", 9, &first).unwrap();
        names.give(&"r".into(), &"a-b-c".into(), first);
        assert!(matches!(names.admit("r", 9, &name("a", "b-c")), Err(Clash::Taken { .. })));
        names.admit("r", 9, &name("a-b", "c")).unwrap();
        names.admit("another", 9, &name("a-b", "c")).unwrap();
    }

    proptest! {
        #[test]
        fn what_a_template_makes_is_always_a_label(
            template in prop::sample::select(vec!["${dag}", "airflow-${dag}", "${dag}${task}", "a-${task}-b-${dag}", "${dag}-${dag}"]),
            dag in any::<String>(),
            task in "[a-zA-Z0-9_.-]{0,250}",
        ) {
            let name = fill(template, &dag, &task);
            prop_assert_eq!(check_label(&name), Ok(()), "{}", name);
        }

        #[test]
        fn no_two_values_are_ever_admitted_under_one_name(
            pairs in prop::collection::vec(("[aA._-]{0,4}", "[aA._-]{0,4}"), 1..60),
        ) {
            let templates = ["${dag}", "${dag}-${task}", "${dag}${task}"].map(|text| Template::parse(text).unwrap());
            let mut names = Names::default();
            let mut seen: HashMap<String, (String, Vec<Box<str>>)> = HashMap::new();
            for (dag, task) in &pairs {
                for template in &templates {
                    let name = template.fill(&facts(dag, task)).unwrap();
                    let origin = (template.to_string(), name.values.clone());
                    match names.admit("r", 1_000, &name) {
                        Ok(()) => {
                            let identity = name.identity.clone();
                            names.give(&"r".into(), &identity.as_str().into(), name);
                            prop_assert_eq!(seen.entry(identity).or_insert_with(|| origin.clone()), &origin);
                        }
                        Err(_) => prop_assert_ne!(&seen[&name.identity], &origin),
                    }
                }
            }
        }
    }
}
