//! The identity rules: as which Consul service a task of Airflow may speak, and which processes are a part of Airflow.
//!
//! Invariant: a decision follows from the rules, the facts and the names already given, and from nothing else. A file with
//! one mistake is refused whole. A rule grants only when every condition of it is known to hold. A rule that denies is
//! fail-closed: it also applies when a fact that it asks for is not known (the catalog lacks the DAG, the run id tells no run
//! type, the host serves other queues too), unless another of its conditions is known not to hold.
//!
//! A templated identity is given to one value only: [`Names`] remembers who has a name, and a newcomer who would get the
//! same one is refused. So is one who would get the name of a component, or the fixed identity of a rule.
//!
//! Knows no process, socket or clock. Reads the file, and the user database for the users that the file names. Hostile text
//! is a [`RulesError`] or a `Refusal`, never a panic.

mod component;
mod condition;
mod document;
mod explain;
mod matching;
mod name;
mod route;
mod rule;
mod settings;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use crate::mesh::caller::{Grant, Refusal};

pub(crate) use component::{Component, ProcessFacts};
pub(crate) use condition::Facts;
pub(crate) use explain::Explanation;
pub(crate) use name::Names;
pub(crate) use settings::{CgroupChoice, Fallback, Settings};

use document::Document;
use name::Name;
use rule::{Effect, Matched, Rule};

/// Largest rules file read.
pub(crate) const RULES_BYTES_MAX: u64 = 1 << 20;
/// Most `[[rule]]` tables.
pub(crate) const RULES_MAX: usize = 1_000;
/// Most `[[component]]` tables.
pub(crate) const COMPONENTS_MAX: usize = 200;
/// What decides when no rule matches, as logs and refusals name it.
const DEFAULT_RULE: &str = "default";
/// A value in a message is cut after this many characters.
const QUOTED_CHARS_MAX: usize = 80;

/// Why a rules file is refused. Each names the place, the value and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file cannot be read.
    #[error("{path}: cannot be read: {source}; check the path that -airflow names, and its permissions")]
    Read {
        /// The file.
        path: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is larger than [`RULES_BYTES_MAX`].
    #[error("{path}: is larger than {RULES_BYTES_MAX} bytes; name the rules file, or shorten it with globs")]
    TooLarge {
        /// The file.
        path: String,
    },
    /// The file is no text.
    #[error("{path}: is not UTF-8 from byte {at} on; TOML is UTF-8 text")]
    Encoding {
        /// The file.
        path: String,
        /// The first byte that is none.
        at: usize,
    },
    /// The file is no TOML.
    #[error("{path}:{line}: not valid TOML: {what}")]
    Syntax {
        /// The file.
        path: String,
        /// Where.
        line: usize,
        /// What the parser said.
        what: String,
    },
    /// A key that nothing reads.
    #[error("{at}unknown key `{key}`; {hint}")]
    UnknownKey {
        /// File, line and table.
        at: String,
        /// The key.
        key: String,
        /// The nearest known key, or all.
        hint: String,
    },
    /// A value that its key cannot have.
    #[error("{at}: {why}; {remedy}")]
    Value {
        /// File, line, table, key and value.
        at: String,
        /// What is wrong with it.
        why: String,
        /// What to write.
        remedy: String,
    },
    /// A table that is wrong as a whole.
    #[error("{at}{why}; {remedy}")]
    Table {
        /// File, line and table.
        at: String,
        /// What is wrong with it.
        why: String,
        /// What to write.
        remedy: String,
    },
}

/// All that a rules file says.
#[derive(Debug)]
pub(crate) struct File {
    /// Everything besides components and rules.
    pub(crate) settings: Settings,
    /// The parts of Airflow, in the order of the file.
    pub(crate) components: Vec<Component>,
    /// The rules.
    pub(crate) rules: Rules,
    /// What is allowed but weak, for the log.
    pub(crate) warnings: Vec<String>,
}

/// The rules of a valid file.
#[derive(Debug)]
pub(crate) struct Rules {
    rules: Vec<Rule>,
    fallback: Fallback,
    /// Identities that a template must never make, with what they belong to.
    reserved: BTreeMap<Arc<str>, String>,
    /// The file, for remedies.
    path: String,
}

impl Rules {
    /// Reads and validates the file.
    pub(crate) fn load(path: &Path) -> Result<File, RulesError> {
        let name = path.display().to_string();
        let mut bytes = Vec::new();
        let read = fs::File::open(path).and_then(|file| file.take(RULES_BYTES_MAX + 1).read_to_end(&mut bytes));
        if let Err(source) = read {
            return Err(RulesError::Read { path: name, source });
        }
        if bytes.len() as u64 > RULES_BYTES_MAX {
            return Err(RulesError::TooLarge { path: name });
        }
        match std::str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text, path),
            Err(error) => Err(RulesError::Encoding { path: name, at: error.valid_up_to() }),
        }
    }

    /// Validates a file's text whole. `path` is for messages.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<File, RulesError> {
        let path = path.display().to_string();
        let document = Document::parse(text, &path)?;
        let top = document.top();
        top.only(&[settings::KEYS, route::KEYS, &["component", "rule"]].concat())?;
        let settings = Settings::decode(&top)?;

        let mut components: Vec<Component> = Vec::new();
        for section in top.tables("component", COMPONENTS_MAX)? {
            let component = Component::decode(&section)?;
            if components.contains(&component) {
                return Err(section.wrong("says the same as one before it", "remove one of them"));
            }
            components.push(component);
        }
        let mut rules: Vec<Rule> = Vec::new();
        for (index, section) in top.tables("rule", RULES_MAX)?.into_iter().enumerate() {
            let rule = Rule::decode(&section, index + 1, &settings)?;
            rule.check_named(&section)?;
            rule.check_against(&rules, &section)?;
            rules.push(rule);
        }

        let warnings = warnings(&settings, &components, &rules);
        let reserved = reserved(&settings.fallback, &components, &rules);
        let rules = Self { rules, fallback: settings.fallback.clone(), reserved, path };
        Ok(File { settings, components, rules, warnings })
    }

    /// Keeps templates from making `identity`, which belongs to `owner` (the sidecar's own service, for instance).
    pub(crate) fn reserve(&mut self, identity: &str, owner: &str) {
        self.reserved.entry(identity.into()).or_insert_with(|| owner.to_owned());
    }

    /// The identity of a registered task. A templated one is noted in `names`.
    pub(crate) fn decide(&self, facts: &Facts<'_>, names: &mut Names) -> Result<Grant, Refusal> {
        let verdict = self.verdict(facts, names)?;
        if let Some(name) = verdict.name {
            names.give(verdict.grant.rule(), verdict.grant.identity(), name);
        }
        Ok(verdict.grant)
    }

    /// What the rules would give now, and why. Gives nothing.
    pub(crate) fn explain(&self, facts: &Facts<'_>, names: &Names) -> Explanation {
        explain::explain(self, facts, names)
    }

    /// The first rule that applies.
    fn winner(&self, facts: &Facts<'_>) -> Option<(&Rule, Matched<'_>)> {
        self.rules.iter().map(|rule| (rule, rule.matched(facts))).find(|(_, matched)| !matches!(matched, Matched::No(..)))
    }

    fn verdict(&self, facts: &Facts<'_>, names: &Names) -> Result<Verdict, Refusal> {
        let Some((rule, matched)) = self.winner(facts) else { return self.unmatched(facts) };
        let refuse = |why: String, remedy: String| Refusal { rule: rule.name.clone(), why: why.into(), remedy: remedy.into() };
        let (template, max_identities) = match &rule.effect {
            Effect::Deny => return Err(denied(rule, &matched, refuse)),
            Effect::Give { template, max_identities } => (template, *max_identities),
        };
        let Some(name) = template.fill(facts) else {
            return Err(refuse(
                format!("a value of its identity `{template}` is not known"),
                format!("write the catalog anew, or give rule `{}` a fixed identity", rule.name),
            ));
        };
        if template.is_fixed() {
            return Ok(Verdict { grant: Grant::by_rule(name.identity.into(), rule.name.clone()), name: None });
        }
        let newcomer = quoted(&name.values.join(", "));
        if let Some(owner) = self.reserved.get(name.identity.as_str()) {
            return Err(refuse(
                format!("its identity `{template}` would be `{}` for {newcomer}, which is {owner}", name.identity),
                format!("rename the DAG or task, or change the fixed part of `identity` in rule `{}`", rule.name),
            ));
        }
        if let Err(clash) = names.admit(&rule.name, max_identities, &name) {
            return Err(refuse(clash.why(&name, &newcomer), clash.remedy(&rule.name)));
        }
        let identity = Arc::from(name.identity.as_str());
        Ok(Verdict { grant: Grant::by_rule(identity, rule.name.clone()), name: Some(name) })
    }

    /// No rule applies: the default decides.
    fn unmatched(&self, facts: &Facts<'_>) -> Result<Verdict, Refusal> {
        if let Fallback::Identity(identity) = &self.fallback {
            return Ok(Verdict { grant: Grant::by_rule(identity.clone(), DEFAULT_RULE.into()), name: None });
        }
        let (dag, task) = (quoted(facts.dag), quoted(facts.task));
        // A rule that only lacked a fact is the likelier mistake than a rule that nobody wrote.
        let nearly = self.rules.iter().find_map(|rule| rule.lacked(facts).map(|(condition, what)| (rule, condition, what)));
        let (why, remedy) = match nearly {
            Some((rule, condition, what)) => (
                format!(
                    "no rule matches DAG {dag}, task {task}; rule `{}` could not: its `{}` needs a fact, and {what}",
                    rule.name,
                    condition.key().as_str()
                ),
                condition.key().cure().to_owned(),
            ),
            None => (
                format!("no rule matches DAG {dag}, task {task}, and `default` is \"deny\""),
                format!("add a [[rule]] with dag = [{dag}] and an identity to {}", self.path),
            ),
        };
        Err(Refusal { rule: DEFAULT_RULE.into(), why: why.into(), remedy: remedy.into() })
    }
}

/// A grant, and the templated name to remember with it.
#[derive(Debug)]
struct Verdict {
    grant: Grant,
    name: Option<Name>,
}

fn denied(rule: &Rule, matched: &Matched<'_>, refuse: impl Fn(String, String) -> Refusal) -> Refusal {
    match matched {
        Matched::FailClosed(condition, what) => refuse(
            format!("rule `{}` denies by `{}`, for want of the fact: {what}", rule.name, condition.key().as_str()),
            condition.key().cure().to_owned(),
        ),
        Matched::Yes | Matched::No(..) => refuse(
            format!("rule `{}` denies it", rule.name),
            format!("put a rule with an identity before `{}`, or narrow its conditions", rule.name),
        ),
    }
}

fn reserved(fallback: &Fallback, components: &[Component], rules: &[Rule]) -> BTreeMap<Arc<str>, String> {
    let mut reserved = BTreeMap::new();
    for component in components {
        reserved.entry(component.name.clone()).or_insert_with(|| format!("the component `{}`", component.name));
    }
    for rule in rules {
        if let Some(identity) = rule.fixed_identity() {
            reserved.entry(identity.into()).or_insert_with(|| format!("the identity of rule `{}`", rule.name));
        }
    }
    if let Fallback::Identity(identity) = fallback {
        reserved.entry(identity.clone()).or_insert_with(|| "the identity of `default`".to_owned());
    }
    reserved
}

fn warnings(settings: &Settings, components: &[Component], rules: &[Rule]) -> Vec<String> {
    let mut warnings = Vec::new();
    if settings.accept_titles {
        warnings
            .push("accept_titles: a task can forge the title of an Airflow 2 supervisor; install the plugin instead".to_owned());
    }
    for component in components.iter().filter(|component| component.is_forgeable()) {
        warnings
            .push(format!("component `{}`: any local process can set its title; add `unit` (best) or `user`", component.name));
    }
    for rule in rules {
        if rule.rests_on_authors() {
            warnings.push(format!("rule `{}`: whoever can edit a DAG can give it this identity", rule.name));
        }
        if rule.is_named_by_authors() {
            warnings.push(format!(
                "rule `{}`: a DAG's author can choose any service's name; put a fixed text before the first ${{...}}",
                rule.name
            ));
        }
    }
    warnings
}

/// A value as a message shows it: in quotes, cut, control characters escaped.
pub(super) fn quoted(value: &str) -> String {
    match value.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((at, _)) => format!("{:?}", format!("{}…", &value[..at])),
        None => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests;
