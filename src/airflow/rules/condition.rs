//! One key of a rule and whether it holds: facts in, one of three answers out.
//!
//! Invariant: a fact that is not known never makes a condition hold and never makes it fail. What that means for the rule is
//! the rule's to decide.

use std::sync::Arc;

use serde::Serialize;

use super::document::{Item, Section, nearest};
use super::matching::{Globs, User};
use super::{RulesError, quoted};
use crate::airflow::catalog::Dag;

/// What a run id's prefix may tell.
const RUN_TYPES: [&str; 5] = ["scheduled", "manual", "backfill", "asset_triggered", "dataset_triggered"];
/// The type of a run whose id tells none: somebody, or a timetable, chose the id.
const RUN_TYPE_OTHER: &str = "other";
/// The permission that `role` means without `permission`.
const PERMISSION_DEFAULT: &str = "can_edit";

const NOT_IN_CATALOG: &str = "the catalog does not have this DAG";
const NOT_TOLD: &str = "the catalog does not tell it for this DAG";
const NO_TASK_TOLD: &str = "the catalog does not tell it for this task";
const NO_RUN: &str = "the run is not given";
const NO_USER: &str = "the user is not given";
const NO_QUEUES: &str = "`queues` is not set";
const OTHER_QUEUES: &str = "this host serves other queues too";
const OTHER_RUN: &str = "the run id tells no run type";

/// What is known of a task when the rules are asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'f> {
    /// `dag_id`.
    pub(crate) dag: &'f str,
    /// `task_id`.
    pub(crate) task: &'f str,
    /// `run_id`; none when somebody only asks what would be.
    pub(crate) run: Option<&'f str>,
    /// Effective user of the registered process; none when somebody only asks.
    pub(crate) uid: Option<u32>,
    /// The queues that this host serves.
    pub(crate) queues: &'f [Arc<str>],
    /// What the catalog says of the DAG; none when it lacks the DAG.
    pub(crate) catalog: Option<&'f Dag>,
}

/// Who controls a fact. Strongest first, so that the greatest of several is the weakest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Trust {
    /// Whoever deploys Airflow: bundles, teams, paths, roles, queues.
    Deployment,
    /// Airflow itself: which DAG, task and run, as which user.
    Platform,
    /// Whoever writes the DAG.
    Author,
}

/// A key of `[[rule]]` that is a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Dag,
    Task,
    Path,
    Bundle,
    Team,
    Queue,
    RunType,
    RunAsUser,
    Role,
    Tag,
    Owner,
    Pool,
    Operator,
}

/// A condition.
#[derive(Debug, PartialEq)]
pub(super) struct Condition {
    key: Key,
    wanted: Wanted,
}

#[derive(Debug, PartialEq)]
enum Wanted {
    /// One of these globs matches a value.
    Globs(Globs),
    /// One of these is a value.
    Values(Vec<Arc<str>>),
    /// One of these users.
    Users(Vec<User>),
    /// One of these roles holds the permission.
    Roles { roles: Vec<Arc<str>>, permission: Arc<str> },
    /// There is exactly one value: what a template needs.
    One,
}

/// What a condition says of the facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It is known to hold.
    Holds,
    /// It is known not to hold.
    Fails,
    /// The fact is not known, and why.
    Unknown(&'static str),
}

/// What is known for one key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Had<'f> {
    Unknown(&'static str),
    One(&'f str),
    Many(&'f [Arc<str>]),
}

impl Key {
    pub(super) const ALL: [Self; 13] = [
        Self::Dag,
        Self::Task,
        Self::Path,
        Self::Bundle,
        Self::Team,
        Self::Queue,
        Self::RunType,
        Self::RunAsUser,
        Self::Role,
        Self::Tag,
        Self::Owner,
        Self::Pool,
        Self::Operator,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Dag => "dag",
            Self::Task => "task",
            Self::Path => "path",
            Self::Bundle => "bundle",
            Self::Team => "team",
            Self::Queue => "queue",
            Self::RunType => "run_type",
            Self::RunAsUser => "run_as_user",
            Self::Role => "role",
            Self::Tag => "tag",
            Self::Owner => "owner",
            Self::Pool => "pool",
            Self::Operator => "operator",
        }
    }

    pub(super) fn trust(self) -> Trust {
        match self {
            Self::Path | Self::Bundle | Self::Team | Self::Role | Self::Queue => Trust::Deployment,
            Self::Dag | Self::Task | Self::RunType | Self::RunAsUser => Trust::Platform,
            Self::Tag | Self::Owner | Self::Pool | Self::Operator => Trust::Author,
        }
    }

    pub(super) fn needs_catalog(self) -> bool {
        !matches!(self, Self::Dag | Self::Task | Self::Queue | Self::RunType | Self::RunAsUser)
    }

    /// Whether the fact is known of every registered task.
    pub(super) fn is_always_known(self) -> bool {
        matches!(self, Self::Dag | Self::Task | Self::RunAsUser)
    }

    /// What makes the fact known.
    pub(super) fn cure(self) -> &'static str {
        match self {
            Self::Queue => "let this host serve queues that are all in the rule or all outside it, and list them in `queues`",
            Self::RunType => "use run ids as Airflow makes them, or list \"other\" in the rule's `run_type`",
            _ => "write the catalog anew: airflow mesh catalog --out FILE",
        }
    }

    /// What the facts hold for it. Users are no texts: `RunAsUser` shows the name.
    pub(super) fn had<'f>(self, facts: &Facts<'f>) -> Had<'f> {
        let dag = facts.catalog;
        let task = dag.and_then(|dag| dag.tasks.as_ref()).and_then(|tasks| tasks.get(facts.task));
        let text = |value: Option<&'f Arc<str>>, missing| match (dag, value) {
            (None, _) => Had::Unknown(NOT_IN_CATALOG),
            (_, None) => Had::Unknown(missing),
            (_, Some(text)) => Had::One(text),
        };
        let list = |values: Option<&'f [Arc<str>]>| match (dag, values) {
            (None, _) => Had::Unknown(NOT_IN_CATALOG),
            (_, None) => Had::Unknown(NOT_TOLD),
            (_, Some(values)) => Had::Many(values),
        };
        match self {
            Self::Dag => Had::One(facts.dag),
            Self::Task => Had::One(facts.task),
            Self::Path => text(dag.and_then(|dag| dag.path.as_ref()), NOT_TOLD),
            Self::Bundle => text(dag.and_then(|dag| dag.bundle.as_ref()), NOT_TOLD),
            Self::Team => match dag.map(|dag| &dag.team) {
                Some(Some(None)) => Had::Many(&[]),
                team => text(team.and_then(Option::as_ref).and_then(Option::as_ref), NOT_TOLD),
            },
            Self::Queue if facts.queues.is_empty() => Had::Unknown(NO_QUEUES),
            Self::Queue => Had::Many(facts.queues),
            Self::RunType => facts.run.map_or(Had::Unknown(NO_RUN), |run| Had::One(run_type(run))),
            Self::RunAsUser if facts.uid.is_none() => Had::Unknown(NO_USER),
            // The number is told by `had_text`.
            Self::RunAsUser => Had::Many(&[]),
            // Which permission is the condition's to say.
            Self::Role => list(dag.and_then(|dag| dag.roles.as_ref()).map(|_| -> &'f [Arc<str>] { &[] })),
            Self::Tag => list(dag.and_then(|dag| dag.tags.as_deref())),
            Self::Owner => list(dag.and_then(|dag| dag.owners.as_deref())),
            Self::Pool => text(task.and_then(|task| task.pool.as_ref()), NO_TASK_TOLD),
            Self::Operator => text(task.and_then(|task| task.operator.as_ref()), NO_TASK_TOLD),
        }
    }
}

impl Condition {
    /// The condition that `key` makes in a rule, if the rule has it.
    pub(super) fn decode(key: Key, section: &Section<'_>) -> Result<Option<Self>, RulesError> {
        let Some(item) = section.get(key.as_str()) else { return Ok(None) };
        let wanted = match key {
            Key::Dag | Key::Task => Wanted::Globs(Globs::of_texts(item.values()?)?),
            Key::Path => Wanted::Globs(Globs::of_paths(item.values()?)?),
            Key::RunAsUser => Wanted::Users(item.values()?.iter().map(User::decode).collect::<Result<_, _>>()?),
            Key::RunType => Wanted::Values(item.values()?.iter().map(decode_run_type).collect::<Result<_, _>>()?),
            Key::Role => Wanted::Roles {
                roles: item.values()?.iter().map(decode_exact).collect::<Result<_, _>>()?,
                permission: section.text("permission")?.unwrap_or(PERMISSION_DEFAULT).into(),
            },
            Key::Bundle | Key::Team | Key::Queue | Key::Tag | Key::Owner | Key::Pool | Key::Operator => {
                Wanted::Values(item.values()?.iter().map(decode_exact).collect::<Result<_, _>>()?)
            }
        };
        Ok(Some(Self { key, wanted }))
    }

    /// What `${key}` in an identity needs.
    pub(super) fn one(key: Key) -> Self {
        Self { key, wanted: Wanted::One }
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn judge(&self, facts: &Facts<'_>) -> Judgement {
        let had = self.had(facts);
        let holds = |holds| if holds { Judgement::Holds } else { Judgement::Fails };
        if let Had::Unknown(what) = had {
            return Judgement::Unknown(what);
        }
        match &self.wanted {
            Wanted::Globs(globs) => holds(had.values().any(|value| globs.match_any(value))),
            Wanted::Users(users) => holds(users.iter().any(|user| facts.uid == Some(user.uid))),
            Wanted::Roles { roles, .. } => holds(had.values().any(|value| roles.iter().any(|role| **role == *value))),
            Wanted::Values(wanted) => {
                let listed = |value: &str| wanted.iter().any(|wanted| **wanted == *value);
                match self.key {
                    // The task comes from one of the host's queues; which one, nobody trustworthy tells.
                    Key::Queue if had.values().all(listed) => Judgement::Holds,
                    Key::Queue if had.values().any(listed) => Judgement::Unknown(OTHER_QUEUES),
                    Key::RunType if had.values().any(|kind| kind == RUN_TYPE_OTHER) && !listed(RUN_TYPE_OTHER) => {
                        Judgement::Unknown(OTHER_RUN)
                    }
                    _ => holds(had.values().any(listed)),
                }
            }
            Wanted::One => match (self.key, had.values().count()) {
                (_, 1) => Judgement::Holds,
                (Key::Queue, _) => Judgement::Unknown(OTHER_QUEUES),
                _ => Judgement::Fails,
            },
        }
    }

    /// Whether the identity makes it, and no key of the file.
    pub(super) fn is_need(&self) -> bool {
        self.wanted == Wanted::One
    }

    /// Whether it holds whatever the facts are.
    pub(super) fn is_always_true(&self) -> bool {
        matches!(self.key, Key::Dag | Key::Task) && matches!(&self.wanted, Wanted::Globs(globs) if globs.is_everything())
    }

    /// Whether it holds wherever `other` holds, as far as their texts tell.
    pub(super) fn covers(&self, other: &Self) -> bool {
        self.key == other.key
            && match (&self.wanted, &other.wanted) {
                (Wanted::Globs(wide), Wanted::Globs(narrow)) => wide.covers(narrow),
                (Wanted::Values(wide), Wanted::Values(narrow)) => narrow.iter().all(|value| wide.contains(value)),
                (Wanted::Users(wide), Wanted::Users(narrow)) => {
                    narrow.iter().all(|user| wide.iter().any(|other| other.uid == user.uid))
                }
                (Wanted::Roles { roles: wide, permission: a }, Wanted::Roles { roles: narrow, permission: b }) => {
                    a == b && narrow.iter().all(|role| wide.contains(role))
                }
                (Wanted::One, Wanted::One) => true,
                // A DAG has one team or none.
                (Wanted::One, Wanted::Values(_)) => self.key == Key::Team,
                _ => false,
            }
    }

    /// What it asks for, for a person.
    pub(super) fn wanted(&self) -> String {
        match &self.wanted {
            Wanted::Globs(globs) => globs.texts().join(" or "),
            Wanted::Values(values) => values.join(" or "),
            Wanted::Users(users) => users.iter().map(|user| &*user.text).collect::<Vec<_>>().join(" or "),
            Wanted::Roles { roles, permission } => format!("{permission} held by {}", roles.join(" or ")),
            Wanted::One => format!("a value for ${{{}}}", self.key.as_str()),
        }
    }

    /// What the facts hold for it, for a person.
    pub(super) fn had_text(&self, facts: &Facts<'_>) -> String {
        match (self.had(facts), facts.uid) {
            (Had::Unknown(what), _) => format!("unknown: {what}"),
            (_, Some(uid)) if self.key == Key::RunAsUser => uid.to_string(),
            (Had::Many([]), _) => "none".to_owned(),
            (had, _) => had.values().map(quoted).collect::<Vec<_>>().join(", "),
        }
    }

    fn had<'f>(&self, facts: &Facts<'f>) -> Had<'f> {
        let Wanted::Roles { permission, .. } = &self.wanted else { return self.key.had(facts) };
        match facts.catalog.and_then(|dag| dag.roles.as_ref()) {
            Some(roles) => Had::Many(roles.get(permission).map_or(&[], |holders| holders)),
            None => self.key.had(facts),
        }
    }
}

impl<'f> Had<'f> {
    pub(super) fn values(self) -> impl Iterator<Item = &'f str> {
        let (one, many): (Option<&'f str>, &'f [Arc<str>]) = match self {
            Self::Unknown(_) => (None, &[]),
            Self::One(value) => (Some(value), &[]),
            Self::Many(values) => (None, values),
        };
        one.into_iter().chain(many.iter().map(|value| &**value))
    }
}

fn decode_exact(item: &Item<'_, '_>) -> Result<Arc<str>, RulesError> {
    let text = item.text()?;
    if text.contains(['*', '?']) {
        return Err(item.wrong("looks like a glob, and this key takes whole values", "list each value"));
    }
    Ok(text.into())
}

fn decode_run_type(item: &Item<'_, '_>) -> Result<Arc<str>, RulesError> {
    let text = item.text()?;
    let known = [&RUN_TYPES[..], &[RUN_TYPE_OTHER]].concat();
    if known.contains(&text) {
        return Ok(text.into());
    }
    Err(match nearest(text, &known) {
        Some(near) => item.wrong("is no run type", &format!("did you mean \"{near}\"?")),
        None => item.wrong("is no run type", &format!("write one of {}", known.join(", "))),
    })
}

/// The run type that a run id's prefix tells.
fn run_type(run: &str) -> &'static str {
    let told = |kind: &&&str| run.strip_prefix(**kind).is_some_and(|rest| rest.starts_with("__"));
    RUN_TYPES.iter().find(told).copied().unwrap_or(RUN_TYPE_OTHER)
}
