//! The registrations on disk, so that a restart of ringfence finds the tasks that went on meanwhile.
//!
//! Invariant: the file is this user's own with mode 0600, or it is not believed. A line is added for each task that comes
//! or goes, and the whole is written anew beside it and renamed when most lines are of the past. It counts for one boot: then
//! pids and starts begin anew.
//!
//! JSON lines: `{"boot":ID}` first, then a task's facts, or `{"gone":{"pid":…,"start":…}}`. A line that makes no sense, such
//! as the last one after a crash, is left out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::process::{HostError, Process};
use super::{Claim, Registration};

/// Bytes of the file that are read.
const STATE_MAX: u64 = 64 * 1_024 * 1_024;
/// Lines of the past that are left standing.
const STALE_LINES_MAX: usize = 1_024;
/// Nobody else may read which tasks run, or write that they do.
const MODE: u32 = 0o600;

/// The open file.
#[derive(Debug)]
pub(super) struct State {
    path: PathBuf,
    boot: Box<str>,
    /// `None` after a failure, until the file was written anew.
    file: Option<File>,
    lines: usize,
}

/// A registration as the file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remembered {
    #[serde(flatten)]
    pub(super) process: Process,
    pub(super) uid: u32,
    /// Whether it had a cgroup of its own.
    pub(super) enclosed: bool,
    #[serde(flatten)]
    pub(super) claim: Claim,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Boot { boot: Box<str> },
    Gone { gone: Process },
    Task(Box<Remembered>),
}

impl State {
    /// The registrations that the file ends with; none when it is from another boot, or not there.
    pub(super) fn load(path: &Path, boot: &str) -> Result<Vec<Remembered>, HostError> {
        Ok(own_text(path)?.map(|text| tasks(&text, boot)).unwrap_or_default())
    }

    /// Writes the file anew with these registrations.
    pub(super) fn begin<'a>(
        path: &Path,
        boot: Box<str>,
        registrations: impl Iterator<Item = &'a Registration>,
    ) -> Result<Self, HostError> {
        let mut state = Self { path: path.to_owned(), boot, file: None, lines: 0 };
        state.rewrite(registrations)?;
        Ok(state)
    }

    /// Whether the file should be written anew, while so many registrations live.
    pub(super) fn is_stale(&self, alive: usize) -> bool {
        self.file.is_none() || self.lines > 2 * alive + STALE_LINES_MAX
    }

    /// Replaces the file in one step.
    pub(super) fn rewrite<'a>(&mut self, registrations: impl Iterator<Item = &'a Registration>) -> Result<(), HostError> {
        let mut text = encoded(&Line::Boot { boot: self.boot.clone() });
        let mut lines = 1;
        for registration in registrations {
            text.extend(encoded(&Line::Task(Box::new(registration.into()))));
            lines += 1;
        }
        let new = self.path.with_extension("json.new");
        let written = write_new(&new, &text).and_then(|file| fs::rename(&new, &self.path).map(|()| file));
        let file = written.map_err(|source| HostError::Unwritable { path: new, source })?;
        (self.file, self.lines) = (Some(file), lines);
        Ok(())
    }

    /// Adds a task, or what changed of it.
    pub(super) fn add(&mut self, registration: &Registration) -> Result<(), HostError> {
        self.append(&Line::Task(Box::new(registration.into())))
    }

    /// Adds that a task is gone.
    pub(super) fn remove(&mut self, process: Process) -> Result<(), HostError> {
        self.append(&Line::Gone { gone: process })
    }

    fn append(&mut self, line: &Line) -> Result<(), HostError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = file.write_all(&encoded(line));
        if written.is_err() {
            self.file = None;
        }
        self.lines += 1;
        written.map_err(|source| HostError::Unwritable { path: self.path.clone(), source })
    }
}

/// What a file holds that is this user's own and nobody else's; `None` when it is not there.
pub(in crate::airflow) fn own_text(path: &Path) -> Result<Option<Vec<u8>>, HostError> {
    let unreadable = |source| HostError::Unreadable { path: path.to_owned(), source };
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(unreadable(source)),
    };
    let metadata = file.metadata().map_err(unreadable)?;
    let own = rustix::process::geteuid().as_raw();
    if !metadata.is_file() || metadata.uid() != own || metadata.mode() & 0o077 != 0 {
        return Err(HostError::Untrusted { path: path.to_owned() });
    }
    let mut text = Vec::new();
    file.take(STATE_MAX).read_to_end(&mut text).map_err(unreadable)?;
    Ok(Some(text))
}

/// Replaces such a file in one step.
pub(in crate::airflow) fn write_own(path: &Path, text: &[u8]) -> Result<(), HostError> {
    let new = path.with_extension("json.new");
    let written = write_new(&new, text).and_then(|_| fs::rename(&new, path));
    written.map_err(|source| HostError::Unwritable { path: new, source })
}

impl From<&Registration> for Remembered {
    fn from(registration: &Registration) -> Self {
        let task = &registration.task;
        let claim = Claim {
            airflow: registration.airflow.to_string(),
            instance: task.instance.to_string(),
            dag: task.dag.to_string(),
            task: task.task.to_string(),
            run: task.run.to_string(),
            try_number: task.try_number,
            map_index: task.map_index,
            supervisor: registration.supervisor,
        };
        Self { process: registration.process, uid: registration.uid, enclosed: registration.cgroup.is_some(), claim }
    }
}

/// In the order in which they came.
fn tasks(text: &[u8], boot: &str) -> Vec<Remembered> {
    let mut lines = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    if !matches!(lines.next(), Some(Line::Boot { boot: written }) if &*written == boot) {
        return Vec::new();
    }
    let mut order = Vec::new();
    let mut tasks = std::collections::HashMap::new();
    for line in lines {
        match line {
            Line::Boot { .. } => {}
            Line::Gone { gone } => {
                tasks.remove(&gone);
            }
            Line::Task(task) => {
                order.push(task.process);
                tasks.insert(task.process, *task);
            }
        }
    }
    order.into_iter().filter_map(|process| tasks.remove(&process)).collect()
}

fn encoded(line: &Line) -> Vec<u8> {
    let mut text = serde_json::to_vec(line).expect("strings and numbers have a JSON form");
    text.push(b'\n');
    text
}

fn write_new(path: &Path, text: &[u8]) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().append(true).create_new(true).mode(MODE).open(path)?;
    file.write_all(text)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::Supervisor;
    use super::*;
    use crate::mesh::caller::Task;

    fn registration(pid: u32, dag: &str) -> Registration {
        let task = Task {
            dag: dag.into(),
            task: "t".into(),
            run: "r".into(),
            try_number: 2,
            map_index: -1,
            instance: "01a20359-e6c5-7000-8000-000000000001".into(),
        };
        let process = Process { pid, start_ticks: 7 };
        let airflow = "3.3.2".into();
        Registration {
            process,
            uid: 5,
            task: Arc::new(task),
            airflow,
            supervisor: Supervisor::Task,
            cgroup: None,
            has_ended: false,
        }
    }

    fn pids(remembered: &[Remembered]) -> Vec<(u32, &str)> {
        remembered.iter().map(|task| (task.process.pid, task.claim.dag.as_str())).collect()
    }

    #[test]
    fn what_was_added_and_not_removed_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks.json");
        assert_eq!(State::load(&path, "b").unwrap(), []);
        let mut state = State::begin(&path, "b".into(), [&registration(1, "one")].into_iter()).unwrap();
        state.add(&registration(2, "two")).unwrap();
        state.add(&registration(3, "three")).unwrap();
        state.remove(Process { pid: 2, start_ticks: 7 }).unwrap();
        state.add(&registration(1, "one again")).unwrap();
        let loaded = State::load(&path, "b").unwrap();
        assert_eq!(pids(&loaded), [(1, "one again"), (3, "three")]);
        assert_eq!(loaded[1], Remembered::from(&registration(3, "three")));
        assert_eq!(State::load(&path, "another boot").unwrap(), []);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_file_does_not_grow_with_the_past() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks.json");
        let mut state = State::begin(&path, "b".into(), std::iter::empty()).unwrap();
        while !state.is_stale(0) {
            state.add(&registration(1, "x")).unwrap();
        }
        state.rewrite([&registration(9, "y")].into_iter()).unwrap();
        assert!(!state.is_stale(0));
        state.add(&registration(10, "z")).unwrap();
        assert_eq!(pids(&State::load(&path, "b").unwrap()), [(9, "y"), (10, "z")]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_could_have_written_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks.json");
        State::begin(&path, "b".into(), [&registration(1, "x")].into_iter()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert!(matches!(State::load(&path, "b"), Err(HostError::Untrusted { .. })));
        let link = folder.path().join("link.json");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(State::load(&link, "b"), Err(HostError::Unreadable { .. })));
    }

    #[test]
    fn a_torn_line_costs_nothing_but_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks.json");
        State::begin(&path, "b".into(), [&registration(1, "x")].into_iter()).unwrap();
        let torn = "{\"pid\":2,\"sta";
        OpenOptions::new().append(true).open(&path).unwrap().write_all(torn.as_bytes()).unwrap();
        assert_eq!(pids(&State::load(&path, "b").unwrap()), [(1, "x")]);
    }

    proptest! {
        #[test]
        fn hostile_content_never_panics(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let text = [b"{\"boot\":\"b\"}\n", text.as_slice()].concat();
            prop_assert_eq!(tasks(&text, "b"), []);
        }
    }
}
