//! Why a task gets what it gets: every rule with what it says of the facts. For people; decides nothing.

use serde::Serialize;

use super::condition::{Condition, Facts, Trust};
use super::rule::{Effect, Matched, Rule};
use super::{DEFAULT_RULE, Names, Rules};

/// What the rules would give, and why.
#[derive(Debug, Serialize)]
pub(crate) struct Explanation {
    /// The DAG asked for.
    pub(crate) dag: String,
    /// The task asked for.
    pub(crate) task: String,
    /// Every rule in the order of the file.
    pub(crate) rules: Vec<RuleExplained>,
    /// The rule that decides, or `default`.
    pub(crate) winner: String,
    /// The Consul service name, if one is given.
    pub(crate) identity: Option<String>,
    /// Why none is given.
    pub(crate) denied: Option<String>,
    /// What would change that.
    pub(crate) remedy: Option<String>,
}

/// One rule.
#[derive(Debug, Serialize)]
pub(crate) struct RuleExplained {
    /// Its name.
    pub(crate) rule: String,
    /// `deny`, or the identity as the file writes it.
    pub(crate) effect: String,
    /// The weakest class of its conditions; none when it has no condition.
    pub(crate) trust: Option<Trust>,
    /// Whether it applies. The first that does decides.
    pub(crate) matched: bool,
    /// Of a rule that does not apply: the first condition that does not hold.
    pub(crate) failed: Option<ConditionExplained>,
    /// Of a rule that denies for want of a fact: the condition that asks for it.
    pub(crate) fail_closed: Option<ConditionExplained>,
}

/// One condition.
#[derive(Debug, Serialize)]
pub(crate) struct ConditionExplained {
    /// The key of the rule.
    pub(crate) key: &'static str,
    /// What it asks for.
    pub(crate) wanted: String,
    /// What is known, or `unknown: ` and why.
    pub(crate) had: String,
    /// Who controls that fact.
    pub(crate) trust: Trust,
}

pub(super) fn explain(rules: &Rules, facts: &Facts<'_>, names: &Names) -> Explanation {
    let winner = rules.winner(facts).map_or(DEFAULT_RULE, |(rule, _)| &*rule.name).to_owned();
    let (identity, denied, remedy) = match rules.verdict(facts, names) {
        Ok(verdict) => (Some(verdict.grant.identity().to_string()), None, None),
        Err(refusal) => (None, Some(refusal.why.to_string()), Some(refusal.remedy.to_string())),
    };
    Explanation {
        dag: facts.dag.to_owned(),
        task: facts.task.to_owned(),
        rules: rules.rules.iter().map(|rule| explain_rule(rule, facts)).collect(),
        winner,
        identity,
        denied,
        remedy,
    }
}

fn explain_rule(rule: &Rule, facts: &Facts<'_>) -> RuleExplained {
    let told = |condition: &Condition| ConditionExplained {
        key: condition.key().as_str(),
        wanted: condition.wanted(),
        had: condition.had_text(facts),
        trust: condition.key().trust(),
    };
    let (matched, failed, fail_closed) = match rule.matched(facts) {
        Matched::Yes => (true, None, None),
        Matched::FailClosed(condition, _) => (true, None, Some(told(condition))),
        Matched::No(condition) => (false, Some(told(condition)), None),
    };
    RuleExplained {
        rule: rule.name.to_string(),
        effect: match &rule.effect {
            Effect::Deny => "deny".to_owned(),
            Effect::Give { template, .. } => template.to_string(),
        },
        trust: rule.trust(),
        matched,
        failed,
        fail_closed,
    }
}
