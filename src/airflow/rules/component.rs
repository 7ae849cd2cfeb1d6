//! Which processes are a part of Airflow itself.
//!
//! Invariant: all keys that a component gives must hold. A unit is matched where systemd put it: below slices only. A unit
//! of the same name inside another unit (a user's own manager, a container) is somebody else's.

use std::sync::Arc;

use super::RulesError;
use super::document::Section;
use super::matching::{Globs, User};
use super::name;

const KEYS: &[&str] = &["name", "unit", "user", "title", "runs_tasks", "leases"];

/// What is known of a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProcessFacts<'p> {
    /// Its cgroup v2 path, from the root: `/system.slice/airflow-worker.service`.
    pub(crate) cgroup_path: &'p str,
    /// Its effective user.
    pub(crate) uid: u32,
    /// Its title, as `/proc/PID/cmdline` shows it.
    pub(crate) title: &'p str,
}

/// A part of Airflow.
#[derive(Debug, PartialEq)]
pub(crate) struct Component {
    /// The Consul service name that it speaks as.
    pub(crate) name: Arc<str>,
    /// Whether its processes are the parents of tasks.
    pub(crate) runs_tasks: bool,
    /// Whether it may lease addresses for tasks that it runs in its own process, as the triggerer does. Code of every author
    /// whose triggers run there can then speak for any of them.
    pub(crate) leases: bool,
    unit: Option<Box<str>>,
    user: Option<User>,
    title: Option<Globs>,
}

impl Component {
    pub(super) fn decode(section: &Section<'_>) -> Result<Self, RulesError> {
        section.only(KEYS)?;
        let Some(item) = section.get("name") else {
            return Err(section.wrong("has no `name`", "add name = \"airflow-scheduler\", the Consul service that it is"));
        };
        let name = item.text()?;
        name::check_label(name).map_err(|why| item.wrong(why, "name the Consul service, as in \"airflow-scheduler\""))?;
        let unit = match section.get("unit") {
            Some(item) => {
                let unit = item.text()?;
                let full =
                    [".service", ".scope"].iter().any(|suffix| unit.strip_suffix(suffix).is_some_and(|stem| !stem.is_empty()));
                if !full || unit.contains(['/', '*']) {
                    return Err(
                        item.wrong("is no full unit name", "write it as systemctl shows it, as in \"airflow-worker.service\"")
                    );
                }
                Some(unit.into())
            }
            None => None,
        };
        let component = Self {
            name: name.into(),
            runs_tasks: section.boolean("runs_tasks")?.unwrap_or(true),
            leases: section.boolean("leases")?.unwrap_or(false),
            unit,
            user: section.get("user").map(|item| User::decode(&item)).transpose()?,
            title: section.get("title").map(|item| Globs::of_texts(item.values()?)).transpose()?,
        };
        if component.unit.is_none() && component.user.is_none() && component.title.is_none() {
            return Err(section.wrong("says nothing that a process could match", "add `unit` (best), `user` or `title`"));
        }
        Ok(component)
    }

    /// The systemd unit that it is, if it says one.
    pub(crate) fn unit(&self) -> Option<&str> {
        self.unit.as_deref()
    }

    /// Whether a process belongs to it.
    pub(crate) fn matches(&self, process: &ProcessFacts<'_>) -> bool {
        self.unit.as_deref().is_none_or(|unit| unit_of(process.cgroup_path) == Some(unit))
            && self.user.as_ref().is_none_or(|user| user.uid == process.uid)
            && self.title.as_ref().is_none_or(|title| title.match_any(process.title))
    }

    /// Whether any local user's process could pretend to be it.
    pub(super) fn is_forgeable(&self) -> bool {
        self.unit.is_none() && self.user.is_none()
    }
}

/// The unit that a cgroup belongs to: the first part of its path that is no slice.
fn unit_of(cgroup_path: &str) -> Option<&str> {
    cgroup_path.split('/').filter(|part| !part.is_empty()).find(|part| !part.ends_with(".slice"))
}

#[cfg(test)]
mod tests {
    use super::super::document::Document;
    use super::*;

    fn decode(text: &str) -> Result<Component, String> {
        let text = format!("[[component]]\n{text}");
        let document = Document::parse(&text, "a.toml").unwrap();
        let sections = document.top().tables("component", 9).unwrap();
        Component::decode(&sections[0]).map_err(|error| error.to_string())
    }

    fn process<'p>(cgroup_path: &'p str, uid: u32, title: &'p str) -> ProcessFacts<'p> {
        ProcessFacts { cgroup_path, uid, title }
    }

    #[test]
    fn all_given_keys_must_hold() {
        let component =
            decode("name = 'airflow-scheduler'\nunit = 'airflow-scheduler.service'\nuser = 'root'\ntitle = 'airflow scheduler*'")
                .unwrap();
        assert!(component.runs_tasks);
        let unit = "/system.slice/airflow-scheduler.service";
        assert!(component.matches(&process(unit, 0, "airflow scheduler -- DagFileProcessor /x/y.py")));
        assert!(component.matches(&process("/system.slice/airflow-scheduler.service/task-1", 0, "airflow scheduler")));
        assert!(!component.matches(&process("/system.slice/airflow-worker.service", 0, "airflow scheduler")));
        assert!(!component.matches(&process(unit, 1, "airflow scheduler")));
        assert!(!component.matches(&process(unit, 0, "bash")));
    }

    #[test]
    fn a_unit_inside_a_users_manager_or_a_container_is_not_ours() {
        let component = decode("name = 'w'\nunit = 'airflow-worker.service'\nruns_tasks = false").unwrap();
        assert!(!component.runs_tasks);
        assert!(component.matches(&process("/airflow.slice/airflow-prod.slice/airflow-worker.service", 5, "")));
        for path in [
            "/user.slice/user-1000.slice/user@1000.service/app.slice/airflow-worker.service",
            "/system.slice/docker-0a1b.scope/system.slice/airflow-worker.service",
            "/system.slice/my-airflow-worker.service",
            "/system.slice/other.service/airflow-worker.service",
            "/",
            "",
        ] {
            assert!(!component.matches(&process(path, 5, "")), "{path}");
        }
    }

    #[test]
    fn a_user_may_be_a_name_or_a_uid() {
        for user in ["'root'", "'0'", "0"] {
            assert!(decode(&format!("name = 'w'\nuser = {user}")).unwrap().matches(&process("", 0, "")), "{user}");
        }
        let error = decode("name = 'w'\nuser = 'no-such-user-here'").unwrap_err();
        assert!(error.contains("a.toml:3: [[component]] \"w\": `user` = \"no-such-user-here\""), "{error}");
    }

    #[test]
    fn a_wrong_component_says_what_to_write() {
        for (text, part) in [
            ("unit = 'a.service'", "has no `name`"),
            ("name = 'w'", "add `unit` (best), `user` or `title`"),
            ("name = 'w_x'\nunit = 'a.service'", "name the Consul service"),
            ("name = 'w'\nunit = 'airflow-worker'", "write it as systemctl shows it"),
            ("name = 'w'\nunit = '.service'", "write it as systemctl shows it"),
            ("name = 'w'\nunit = 'a/b.service'", "write it as systemctl shows it"),
            ("name = 'w'\ntitle = 'a['", "is no glob"),
            ("name = 'w'\nunits = 'a.service'", "did you mean `unit`?"),
        ] {
            let error = decode(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_title_alone_is_forgeable() {
        assert!(decode("name = 'w'\ntitle = 'airflow*'").unwrap().is_forgeable());
        assert!(!decode("name = 'w'\ntitle = 'airflow*'\nuser = 0").unwrap().is_forgeable());
    }
}
