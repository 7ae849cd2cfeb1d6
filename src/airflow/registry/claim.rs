//! What a task says of itself when it registers, and the bounds of it.
//!
//! Invariant: a claim that was checked fits one line of a log and of the state file. It is still only a claim.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::super::process::is_unprintable;
use super::RegisterError;
use crate::mesh::caller::Task;

/// Characters of an id, as Airflow's database has them.
pub(crate) const ID_MAX: usize = 250;
/// Characters of a version.
pub(crate) const VERSION_MAX: usize = 64;

/// Who runs the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Supervisor {
    /// Another process, above the one that registers.
    #[default]
    Task,
    /// The registering process itself (Airflow 2).
    #[serde(rename = "self")]
    Itself,
}

/// A task instance's try, as a process claims to be it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// Airflow's version.
    #[serde(default)]
    pub(crate) airflow: String,
    /// The task instance's uuid; empty in Airflow 2.
    #[serde(default)]
    pub(crate) instance: String,
    /// `dag_id`.
    pub(crate) dag: String,
    /// `task_id`.
    pub(crate) task: String,
    /// `run_id`.
    pub(crate) run: String,
    /// 1 for the first try; 0 where it is not known yet.
    #[serde(rename = "try")]
    pub(crate) try_number: u32,
    /// -1 when the task is not mapped.
    #[serde(default = "unmapped")]
    pub(crate) map_index: i32,
    /// Who runs it.
    #[serde(default)]
    pub(crate) supervisor: Supervisor,
}

fn unmapped() -> i32 {
    -1
}

impl Claim {
    /// What such a task would say.
    pub(crate) fn of(task: &Task) -> Self {
        Self {
            airflow: String::new(),
            instance: task.instance.to_string(),
            dag: task.dag.to_string(),
            task: task.task.to_string(),
            run: task.run.to_string(),
            try_number: task.try_number,
            map_index: task.map_index,
            supervisor: Supervisor::Task,
        }
    }

    /// The task that it names, if every part of it is within its bounds. The uuid is brought to one way of writing it.
    pub(crate) fn check(&self) -> Result<Task, RegisterError> {
        for (field, value) in [("dag", &self.dag), ("task", &self.task), ("run", &self.run)] {
            if value.is_empty() {
                return Err(RegisterError::Claim { field, problem: "is empty".into() });
            }
            check_text(field, value, ID_MAX)?;
        }
        check_text("airflow", &self.airflow, VERSION_MAX)?;
        if self.map_index < -1 {
            return Err(RegisterError::Claim { field: "map_index", problem: format!("is {}, below -1", self.map_index) });
        }
        let instance = match self.instance.as_str() {
            "" => String::new(),
            text => uuid(text)
                .ok_or_else(|| RegisterError::Claim { field: "instance", problem: "is neither empty nor a uuid".into() })?
                .to_string(),
        };
        Ok(Task {
            dag: Arc::from(self.dag.as_str()),
            task: Arc::from(self.task.as_str()),
            run: Arc::from(self.run.as_str()),
            try_number: self.try_number,
            map_index: self.map_index,
            instance: instance.into(),
        })
    }
}

/// A uuid in its usual form, with dashes.
pub(super) fn uuid(text: &str) -> Option<Uuid> {
    (text.len() == 36).then(|| Uuid::try_parse(text).ok()).flatten()
}

fn check_text(field: &'static str, value: &str, max: usize) -> Result<(), RegisterError> {
    if value.chars().count() > max {
        return Err(RegisterError::Claim { field, problem: format!("has more than {max} characters") });
    }
    match value.chars().find(|char| is_unprintable(*char)) {
        Some(char) => Err(RegisterError::Claim { field, problem: format!("holds the character U+{:04X}", u32::from(char)) }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> Claim {
        Claim {
            airflow: "3.3.2".into(),
            instance: "01A20359-E6C5-7000-8000-000000000001".into(),
            dag: "d".into(),
            task: "t".into(),
            run: "scheduled__2026-11-24T00:00:00+00:00".into(),
            try_number: 1,
            map_index: -1,
            supervisor: Supervisor::Task,
        }
    }

    #[test]
    fn a_uuid_is_written_in_one_way() {
        let task = claim().check().unwrap();
        assert_eq!(&*task.instance, "01a20359-e6c5-7000-8000-000000000001");
        assert_eq!(&*Claim { instance: String::new(), ..claim() }.check().unwrap().instance, "");
    }

    #[test]
    fn each_bound_is_told_by_its_name() {
        let long = "x".repeat(ID_MAX + 1);
        for (claim, says) in [
            (Claim { dag: long.clone(), ..claim() }, "`dag` has more than 250 characters"),
            (Claim { task: String::new(), ..claim() }, "`task` is empty"),
            (Claim { run: "a\nb".into(), ..claim() }, "`run` holds the character U+000A"),
            (Claim { task: "a\u{202e}b".into(), ..claim() }, "`task` holds the character U+202E"),
            (Claim { airflow: long, ..claim() }, "`airflow` has more than 64 characters"),
            (Claim { map_index: -2, ..claim() }, "`map_index` is -2, below -1"),
            (
                Claim { instance: "{01a20359e6c570008000000000000001}".into(), ..claim() },
                "`instance` is neither empty nor a uuid",
            ),
        ] {
            let error = claim.check().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(Claim { dag: "ä".repeat(ID_MAX), ..claim() }.check().is_ok(), "characters, not bytes");
    }

    #[test]
    fn the_wire_format_leaves_out_what_airflow_2_does_not_know() {
        let claim: Claim = serde_json::from_str(r#"{"dag":"d","task":"t","run":"r","try":1,"supervisor":"self"}"#).unwrap();
        assert_eq!((claim.map_index, claim.supervisor, claim.instance.as_str()), (-1, Supervisor::Itself, ""));
    }
}
