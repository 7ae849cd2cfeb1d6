//! The titles by which Airflow's processes call themselves, in Airflow 2.11 to 3.3.
//!
//! Invariant: total functions on text that a process chose. A title is proof of nothing by itself: it counts only for a
//! process in which no author's code runs, and that is for the caller to know.

use uuid::Uuid;

use super::claim;

/// Airflow 2's supervisor, and from where its command follows.
const SUPERVISOR_2: &str = "airflow task supervisor: ";
/// Airflow 2's process that runs the task.
const RUNNER_2: &str = "airflow task runner";
/// Airflow 3.3's supervisor under Celery, and from where the uuid follows.
const SUPERVISOR_3: &str = "airflow supervisor";
/// A slot of the LocalExecutor: the supervisor itself in Airflow 3, its parent in Airflow 2.
const LOCAL: &str = "airflow worker -- LocalExecutor";
/// Airflow 3's process that runs the task.
const RUNNER_3: &str = "airflow worker --";
/// Arguments of one command that are read.
const ARGUMENTS_MAX: usize = 64;

/// What a process says that it does for tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// Airflow 3: watches one task and runs no author's code. The task instance's uuid, while it has one.
    Supervisor(Option<Uuid>),
    /// A slot of Airflow 2's LocalExecutor, which starts a supervisor and runs no author's code.
    Slot(Option<TitledTask>),
    /// Celery's: becomes or starts a supervisor.
    Pool,
    /// Airflow 2's supervisor, in which the author's code runs after it was titled.
    Supervisor2(Option<TitledTask>),
    /// Runs the task.
    Runner,
    /// Reads DAG files, so that any author's code runs below it. Runs no tasks.
    Parser,
}

/// A task as the title of Airflow 2 names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TitledTask {
    pub(crate) dag: String,
    pub(crate) task: String,
    pub(crate) run: String,
    /// -1 when the task is not mapped.
    pub(crate) map_index: i32,
}

/// What this title says. `None` for everything that has nothing to do with tasks.
pub(crate) fn role(title: &str) -> Option<Role> {
    if let Some(command) = title.strip_prefix(SUPERVISOR_2) {
        return Some(Role::Supervisor2(titled_task(command)));
    }
    if let Some(rest) = title.strip_prefix(LOCAL) {
        return Some(match rest.find('[').filter(|_| rest.contains("'tasks'")) {
            Some(command) => Role::Slot(titled_task(&rest[command..])),
            None => Role::Supervisor(last_uuid(rest)),
        });
    }
    if let Some(rest) = title.strip_prefix(SUPERVISOR_3) {
        return Some(Role::Supervisor(last_uuid(rest)));
    }
    if title.starts_with(RUNNER_3) || title.starts_with(RUNNER_2) {
        return Some(Role::Runner);
    }
    if title.starts_with("[celeryd:") && title.contains("ForkPoolWorker") {
        return Some(Role::Pool);
    }
    (title.contains("DagFileProcessor") || title.starts_with("airflow dag-processor")).then_some(Role::Parser)
}

/// A team's name may stand before it.
fn last_uuid(rest: &str) -> Option<Uuid> {
    claim::uuid(rest.split_ascii_whitespace().next_back()?)
}

/// The task of `['airflow', 'tasks', 'run', DAG, TASK, RUN, …]`.
fn titled_task(command: &str) -> Option<TitledTask> {
    let arguments = python_list(command)?;
    let [program, tasks, run, dag, task, run_id, options @ ..] = arguments.as_slice() else { return None };
    if program.rsplit('/').next() != Some("airflow") || tasks != "tasks" || run != "run" {
        return None;
    }
    let map_index = match options.iter().position(|option| option == "--map-index") {
        Some(at) => options.get(at + 1)?.parse().ok()?,
        None => -1,
    };
    Some(TitledTask { dag: dag.clone(), task: task.clone(), run: run_id.clone(), map_index })
}

/// A list of strings as Python prints it. `None` for anything else, an unended list too.
fn python_list(text: &str) -> Option<Vec<String>> {
    let mut chars = text.trim().strip_prefix('[')?.chars();
    let mut items = Vec::new();
    loop {
        let quote = chars.next()?;
        if !matches!(quote, '\'' | '"') || items.len() == ARGUMENTS_MAX {
            return None;
        }
        items.push(python_string(&mut chars, quote)?);
        match chars.next()? {
            ']' => return Some(items),
            ',' if chars.next()? == ' ' => {}
            _ => return None,
        }
    }
}

/// The rest of a string after its opening quote, which is consumed with the closing one.
fn python_string(chars: &mut std::str::Chars<'_>, quote: char) -> Option<String> {
    let mut string = String::new();
    loop {
        match chars.next()? {
            '\\' => string.push(match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'x' => code(chars, 2)?,
                'u' => code(chars, 4)?,
                'U' => code(chars, 8)?,
                char @ ('\\' | '\'' | '"') => char,
                _ => return None,
            }),
            char if char == quote => return Some(string),
            char => string.push(char),
        }
    }
}

fn code(chars: &mut std::str::Chars<'_>, digits: usize) -> Option<char> {
    let digits: String = chars.by_ref().take(digits).collect();
    u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UUID: &str = "01a20359-e6c5-7000-8000-000000000001";

    fn task(dag: &str, task: &str, run: &str, map_index: i32) -> Option<TitledTask> {
        Some(TitledTask { dag: dag.into(), task: task.into(), run: run.into(), map_index })
    }

    #[test]
    fn every_title_of_the_reference_is_known() {
        let uuid = claim::uuid(UUID);
        assert!(uuid.is_some());
        for (title, expected) in [
            (format!("airflow supervisor: {UUID}"), Role::Supervisor(uuid)),
            (format!("airflow worker -- LocalExecutor: {UUID}"), Role::Supervisor(uuid)),
            (format!("airflow worker -- LocalExecutor [finance]: {UUID}"), Role::Supervisor(uuid)),
            ("airflow worker -- LocalExecutor: <idle>".into(), Role::Supervisor(None)),
            (format!("airflow worker -- {UUID}"), Role::Runner),
            ("airflow task runner: mesh_probe py_taskflow c2 3".into(), Role::Runner),
            ("[celeryd: celery@vm:ForkPoolWorker-2]".into(), Role::Pool),
            ("airflow scheduler -- DagFileProcessorManager".into(), Role::Parser),
            (
                "airflow task supervisor: ['airflow', 'tasks', 'run', 'd', 't', 'r', '--local', '--subdir', 'x.py']".into(),
                Role::Supervisor2(task("d", "t", "r", -1)),
            ),
            (
                "airflow worker -- LocalExecutor: ['airflow', 'tasks', 'run', 'd', 't', 'r', '--map-index', '3']".into(),
                Role::Slot(task("d", "t", "r", 3)),
            ),
        ] {
            assert_eq!(role(&title), Some(expected), "{title}");
        }
        for other in ["", "airflow scheduler", "[celeryd: celery@vm:MainProcess] -active- (celery worker -c 2)", "bash -c x"] {
            assert_eq!(role(other), None, "{other}");
        }
    }

    #[test]
    fn strings_are_read_as_python_prints_them() {
        assert_eq!(
            python_list(r#"['a', "it's", 'x\\y', 'q\'"', '\n\x41\u00e4']"#).unwrap(),
            ["a", "it's", "x\\y", "q'\"", "\nAä"]
        );
        for bad in ["", "[", "['a'", "['a',]", "['a' 'b']", "[a]", "['\\x4']", "['\\ud800']", "['a']['b'"] {
            let parsed = python_list(bad);
            assert!(parsed.is_none() || parsed == Some(vec!["a".into()]), "{bad}");
        }
    }

    #[test]
    fn a_run_cannot_pretend_to_be_the_next_argument() {
        let title = r#"airflow task supervisor: ['airflow', 'tasks', 'run', "d', 't', 'r", 'u', 'v']"#;
        assert_eq!(role(title), Some(Role::Supervisor2(task("d', 't', 'r", "u", "v", -1))));
        let other = "airflow task supervisor: ['bash', 'tasks', 'run', 'd', 't', 'r']";
        assert_eq!(role(other), Some(Role::Supervisor2(None)));
    }

    proptest! {
        #[test]
        fn hostile_titles_never_panic(rest in ".{0,80}", list in "\\[?(['\"]?[a-z\\\\xuU'\", \\]]{0,8}){0,8}") {
            for title in [rest.clone(), format!("{SUPERVISOR_2}{list}"), format!("{LOCAL}: 'tasks'{list}"), format!("{SUPERVISOR_3}{rest}")] {
                let _ = role(&title);
            }
        }
    }
}
