//! One `[[rule]]`: conditions, and what follows when they hold.
//!
//! Invariant: a rule that exists can be reached, does exactly one thing (gives or denies), and rests on what a DAG's author
//! says only where the file allows that by name.

use std::sync::Arc;

use super::condition::{Condition, Facts, Judgement, Key, Trust};
use super::document::Section;
use super::name::{MAX_IDENTITIES_DEFAULT, MAX_IDENTITIES_MAX, Template};
use super::{DEFAULT_RULE, RulesError, Settings};

/// Keys of a rule that are no condition of their own.
const OTHER_KEYS: &[&str] = &["name", "identity", "permission", "allow_author_claims", "max_identities", "deny"];
/// Longest name.
const NAME_BYTES_MAX: usize = 100;

/// A rule.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: Arc<str>,
    pub(super) effect: Effect,
    is_named: bool,
    /// In the order of [`Key::ALL`], what the identity needs last.
    conditions: Vec<Condition>,
}

/// What follows when a rule matches.
#[derive(Debug)]
pub(super) enum Effect {
    /// No identity.
    Deny,
    /// An identity.
    Give {
        template: Template,
        /// How many names the template may make.
        max_identities: usize,
    },
}

/// Whether a rule applies.
#[derive(Debug)]
pub(super) enum Matched<'r> {
    /// Every condition holds.
    Yes,
    /// It denies, none of its conditions fails, and the fact of this one is not known.
    FailClosed(&'r Condition, &'static str),
    /// This condition fails, or does not hold for want of a fact.
    No(&'r Condition),
}

impl Rule {
    /// Reads the rule that is `number` in its file, from 1.
    pub(super) fn decode(section: &Section<'_>, number: usize, settings: &Settings) -> Result<Self, RulesError> {
        let keys: Vec<&str> = Key::ALL.iter().map(|key| key.as_str()).collect();
        section.only(&[&keys[..], OTHER_KEYS].concat())?;
        let name = decode_name(section, number)?;
        let mut conditions = Vec::new();
        for key in Key::ALL {
            conditions.extend(Condition::decode(key, section)?);
        }
        if let Some(item) = section.get("permission")
            && section.get("role").is_none()
        {
            return Err(item.wrong("says nothing without `role`", "add role = \"...\", or remove it"));
        }
        let effect = Effect::decode(section)?;
        let allowed = section.boolean("allow_author_claims")?.unwrap_or(false);
        let rule = Self { is_named: section.get("name").is_some(), name: name.into(), effect, conditions };
        if rule.rests_on_authors() && !allowed {
            return Err(section.wrong(
                "gives an identity on what a DAG's author says alone (tag, owner, pool, operator)",
                "add a condition of another kind, or allow_author_claims = true",
            ));
        }
        rule.with_needs_of_identity().check_sources(section, settings)
    }

    fn with_needs_of_identity(mut self) -> Self {
        if let Effect::Give { template, .. } = &self.effect {
            self.conditions.extend(template.needs());
        }
        self
    }

    /// Refuses a condition that could never be known.
    fn check_sources(self, section: &Section<'_>, settings: &Settings) -> Result<Self, RulesError> {
        for condition in &self.conditions {
            let key = condition.key();
            let (why, remedy) = if key.needs_catalog() && settings.catalog.is_none() {
                ("which only the catalog tells, and there is none", "add catalog = \"/path\" at the top of the file")
            } else if key == Key::Queue && settings.queues.is_empty() {
                ("and the file does not say which queues this host serves", "add queues = [\"default\"] at the top of the file")
            } else {
                continue;
            };
            return Err(section.wrong(&format!("needs `{}`, {why}", key.as_str()), remedy));
        }
        Ok(self)
    }

    /// Refuses a rule that one of `before` leaves nothing for.
    pub(super) fn check_against(&self, before: &[Self], section: &Section<'_>) -> Result<(), RulesError> {
        if let Some(other) = before.iter().find(|other| other.name == self.name) {
            return Err(section.wrong(&format!("the name `{}` is used twice", other.name), "give each rule a name of its own"));
        }
        if let Some(other) = before.iter().find(|other| other.takes_all_of(self)) {
            let what = if other.is_catch_all() { "matches everything" } else { "matches all that it could" };
            return Err(section.wrong(
                &format!("can never match: rule `{}` before it {what}", other.name),
                &format!("move it before `{}`, or remove it", other.name),
            ));
        }
        Ok(())
    }

    /// Refuses a catch-all that nobody named: a forgotten condition looks the same.
    pub(super) fn check_named(&self, section: &Section<'_>) -> Result<(), RulesError> {
        if self.conditions.is_empty() && !self.is_named {
            return Err(section.wrong(
                "has no condition, so it matches every task",
                "add a condition such as dag = [\"payroll_*\"], or, if that is meant, make it the last rule and name it \"catch-all\"",
            ));
        }
        Ok(())
    }

    pub(super) fn matched(&self, facts: &Facts<'_>) -> Matched<'_> {
        let mut unknown = None;
        for condition in &self.conditions {
            match condition.judge(facts) {
                Judgement::Holds => {}
                Judgement::Fails => return Matched::No(condition),
                Judgement::Unknown(what) => unknown = unknown.or(Some((condition, what))),
            }
        }
        match (unknown, &self.effect) {
            (None, _) => Matched::Yes,
            (Some((condition, what)), Effect::Deny) => Matched::FailClosed(condition, what),
            (Some((condition, _)), Effect::Give { .. }) => Matched::No(condition),
        }
    }

    /// The condition for which a fact is not known, when nothing else keeps the rule from matching.
    pub(super) fn lacked(&self, facts: &Facts<'_>) -> Option<(&Condition, &'static str)> {
        match self.matched(facts) {
            Matched::No(condition) => match condition.judge(facts) {
                Judgement::Unknown(what) => Some((condition, what)),
                Judgement::Holds | Judgement::Fails => None,
            },
            Matched::Yes | Matched::FailClosed(..) => None,
        }
    }

    /// The weakest class of its conditions; none without a condition.
    pub(super) fn trust(&self) -> Option<Trust> {
        self.conditions.iter().map(|condition| condition.key().trust()).max()
    }

    /// The identity, if it is one and the same for all.
    pub(super) fn fixed_identity(&self) -> Option<String> {
        match &self.effect {
            Effect::Give { template, .. } if template.is_fixed() => Some(template.to_string()),
            Effect::Give { .. } | Effect::Deny => None,
        }
    }

    /// Whether authors alone decide who gets its identity.
    pub(super) fn rests_on_authors(&self) -> bool {
        let only_authors = self.given().all(|condition| condition.key().trust() == Trust::Author);
        matches!(self.effect, Effect::Give { .. }) && only_authors && self.given().next().is_some()
    }

    /// Whether authors choose the name from its first letter on.
    pub(super) fn is_named_by_authors(&self) -> bool {
        matches!(&self.effect, Effect::Give { template, .. } if template.begins_with_authors())
    }

    /// What the file gives as conditions, without what the identity needs.
    fn given(&self) -> impl Iterator<Item = &Condition> {
        self.conditions.iter().filter(|condition| !condition.is_need())
    }

    fn is_catch_all(&self) -> bool {
        self.conditions.iter().all(Condition::is_always_true)
    }

    /// Whether this rule, standing first, takes everything that `other` would.
    fn takes_all_of(&self, other: &Self) -> bool {
        let covered = |mine: &Condition| mine.is_always_true() || other.conditions.iter().any(|theirs| mine.covers(theirs));
        // A rule that denies also takes what is not known, where one that gives before it may not.
        let takes_unknown =
            matches!(self.effect, Effect::Deny) || self.conditions.iter().all(|mine| mine.key().is_always_known());
        (takes_unknown || matches!(other.effect, Effect::Give { .. })) && self.conditions.iter().all(covered)
    }
}

impl Effect {
    fn decode(section: &Section<'_>) -> Result<Self, RulesError> {
        let identity = section.get("identity");
        let deny = section.boolean("deny")?.unwrap_or(false);
        let max_identities = section.get("max_identities");
        let item = match (identity, deny) {
            (Some(item), true) => return Err(item.wrong("the rule denies too", "keep one of identity and deny = true")),
            (None, false) => return Err(section.wrong("gives nothing", "add identity = \"...\" or deny = true")),
            (None, true) => {
                return match max_identities {
                    Some(item) => Err(item.wrong("the rule gives no identity", "remove it")),
                    None => Ok(Self::Deny),
                };
            }
            (Some(item), false) => item,
        };
        let text = item.text()?;
        if text == "deny" {
            return Err(item.wrong("is no service", "write deny = true instead of identity"));
        }
        let template = Template::parse(text).map_err(|(why, remedy)| item.wrong(why, &remedy))?;
        let max_identities = match max_identities {
            Some(item) if template.is_fixed() => {
                return Err(item.wrong("the identity holds no ${...}, so there is one", "remove it"));
            }
            Some(item) => item.number(1..=MAX_IDENTITIES_MAX)?,
            None => MAX_IDENTITIES_DEFAULT,
        };
        Ok(Self::Give { template, max_identities })
    }
}

fn decode_name(section: &Section<'_>, number: usize) -> Result<String, RulesError> {
    let Some(item) = section.get("name") else { return Ok(format!("rule-{number}")) };
    let name = item.text()?;
    if name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(item.wrong("is no name for a log", &format!("use at most {NAME_BYTES_MAX} bytes without control characters")));
    }
    if name == DEFAULT_RULE {
        return Err(item.wrong("is how logs name the key `default`", "choose another name"));
    }
    Ok(name.to_owned())
}
