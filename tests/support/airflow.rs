//! The processes of an Airflow host as the sidecar meets them: a scheduler whose supervisor runs one task, with the titles of
//! Airflow 3.3 and a test's code in the task. Real Airflow is `scripts/airflow-e2e`'s part; here a task does what no
//! operator would.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// The stages of a task's process tree.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/airflow/task.py");

/// How a host's rules and socket lie in a folder of the test's, and where its tasks get their cgroups.
pub struct Host {
    folder: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Host {
    /// `rules` without the socket, which this adds.
    pub fn new(rules: &str) -> Self {
        let folder = super::scratch();
        // One process serves a real host; tests run several at once, which must not share a place.
        let name = folder.path().file_name().expect("a name");
        let host = Self { cgroup: cgroup_mount().join(name), folder };
        host.write_rules(rules);
        host
    }

    pub fn write_rules(&self, rules: &str) {
        let socket = self.socket();
        // Atomically, as editors and configuration management do.
        let next = self.folder.path().join("next.toml");
        std::fs::write(&next, format!("socket = \"{}\"\ncgroup = \"{}\"\n{rules}", socket.display(), self.cgroup.display()))
            .expect("rules written");
        std::fs::rename(next, self.rules()).expect("rules in place");
    }

    pub fn rules(&self) -> PathBuf {
        self.folder.path().join("airflow.toml")
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("airflow.sock")
    }

    /// Where its tasks get their cgroups.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// One question on the registration socket, asked by the test itself.
    pub fn ask(&self, request: &Value) -> Value {
        let mut stream = UnixStream::connect(self.socket()).expect("the registration socket");
        let mut request = request.clone();
        request["version"] = 1.into();
        writeln!(stream, "{request}").expect("asked");
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).expect("answered");
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{answer}: {error}"))
    }

    /// Runs `code` in a task; what it said, a value a line.
    pub fn task(&self, code: &str) -> Vec<Value> {
        self.task_at(None, code)
    }

    /// [`Self::task`], with `PORT` set for the code.
    pub fn task_calling(&self, upstream: SocketAddr, code: &str) -> Vec<Value> {
        self.task_at(Some(upstream), code)
    }

    /// Runs `code` in the scheduler itself; with `PORT` set.
    pub fn component(&self, upstream: SocketAddr, code: &str) -> Vec<Value> {
        said(self.command(Some(upstream), code).env("STAGE", "task"))
    }

    /// Runs `code` in a triggerer, which runs many tasks in its one process; with `PORT` set.
    pub fn triggerer(&self, upstream: SocketAddr, code: &str) -> Vec<Value> {
        let mut command = self.command(Some(upstream), code);
        said(command.arg0("airflow triggerer").env("STAGE", "task"))
    }

    fn task_at(&self, upstream: Option<SocketAddr>, code: &str) -> Vec<Value> {
        said(&mut self.command(upstream, code))
    }

    /// [`Self::task`] of another user, who needs no more than what everybody may read.
    pub fn task_as(&self, uid: u32, code: &str) -> Vec<Value> {
        let source = self.folder.path().join("task.py");
        // The tree itself may lie in a folder that others cannot enter.
        std::fs::copy(SOURCE, &source).expect("task.py copied");
        let mut command = self.command(None, code);
        // Not by setpriv, which would take the title's place. The groups go with the user.
        command.env("SOURCE", source).current_dir("/").uid(uid).gid(uid);
        said(&mut command)
    }

    /// The scheduler process that leads to a task with `code`.
    pub fn command(&self, upstream: Option<SocketAddr>, code: &str) -> Command {
        let instance = uuid::Uuid::new_v4().to_string();
        let mut command = Command::new("/usr/bin/python3");
        command.arg0("airflow scheduler").stdin(Stdio::from(std::fs::File::open(SOURCE).expect("task.py")));
        command.env("SOURCE", SOURCE).env("STAGE", "scheduler").env("INSTANCE", instance).env("CODE", code);
        command.env("REGISTRATION", self.socket());
        if let Some(upstream) = upstream {
            command.env("PORT", upstream.port().to_string());
        }
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Tasks have ended by now; a cgroup that is not empty stays, and the next run of the machine's owner shows it.
        for entry in std::fs::read_dir(&self.cgroup).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(entry.path());
        }
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// Runs a task; what it said, a value a line.
fn said(task: &mut Command) -> Vec<Value> {
    let output = task.output().expect("python3 runs: run scripts/setup");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && complained.is_empty(), "the task failed:\n{said}\n{complained}");
    said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

/// Where cgroup v2 is mounted.
fn cgroup_mount() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let found = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
    found.expect("cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified").into()
}
