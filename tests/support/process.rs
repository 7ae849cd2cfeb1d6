//! A child process: killed by its id when dropped, its last words at hand.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::wait_for;

/// Log lines that a failure shows.
const TAIL_LINES: usize = 40;

pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Process {
    /// Starts `command` with both outputs in one log file. It dies with the thread that calls this.
    pub fn start(name: &str, command: &Command) -> Self {
        let folder = super::scratch();
        let log = folder.path().join("output.log");
        let mut process = Self::start_logged(name, command, &log);
        process._folder = Some(folder);
        process
    }

    /// [`Process::start`], with the log appended to a file of the caller's.
    pub fn start_logged(name: &str, command: &Command, log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).expect("log file");
        // `setpriv` executes the program in place, so the child's id is the program's.
        let mut guarded = Command::new(super::tool_on_path("setpriv"));
        guarded.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("CONSUL_") || key.starts_with("CONNECT_")) {
            guarded.env_remove(key);
        }
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(key, value),
                None => guarded.env_remove(key),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            guarded.current_dir(folder);
        }
        let child =
            guarded.stdin(Stdio::null()).stdout(output.try_clone().expect("log file")).stderr(output).spawn().unwrap_or_else(
                |error| panic!("{name} does not start ({:?}): {error}; run scripts/setup", command.get_program()),
            );
        Self { name: name.to_owned(), child, log: log.to_owned(), _folder: None }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its last lines, for failure messages.
    pub fn tail(&self) -> String {
        let output = self.output();
        let lines = output.lines().collect::<Vec<_>>();
        let last = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n  ");
        format!("last lines of {}:\n  {last}", self.name)
    }

    /// Fails with its last lines if it is no longer running.
    pub fn assert_running(&mut self) {
        if let Some(status) = self.exit_status() {
            panic!("{} ended with {status}\n{}", self.name, self.tail());
        }
    }

    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("status of an own child")
    }

    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        wait_for(&what, limit, || self.exit_status().ok_or_else(|| self.tail()))
    }

    /// Sends a signal by name: `TERM`, `HUP`, `STOP`.
    pub fn signal(&self, name: &str) {
        let script = format!("kill -{name} {}", self.id());
        let status = Command::new("sh").args(["-c", &script]).status().expect("sh runs");
        assert!(status.success(), "signal {name} to {} (process {})", self.name, self.id());
    }

    /// SIGKILL, at once.
    pub fn kill(&mut self) {
        // It may have ended by itself: then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Resident memory.
    pub fn resident_kib(&self) -> u64 {
        self.status_kib("VmRSS:")
    }

    /// Resident memory without what is mapped from files, such as the program itself.
    pub fn own_kib(&self) -> u64 {
        self.status_kib("RssAnon:") + self.status_kib("RssShmem:")
    }

    fn status_kib(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("status of an own child");
        let value = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key} in {status}"));
        value.trim().trim_end_matches(" kB").parse().expect("kilobytes")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
    }
}

/// Runs a program to its end and gives its output; fails with both outputs when it does not succeed in time.
pub fn run(command: &mut Command, limit: Duration) -> String {
    let name = format!("{:?}", command.get_program());
    let mut process = Process::start(&name, command);
    let status = process.wait_exit(limit);
    assert!(status.success(), "{command:?} ended with {status}\n{}", process.tail());
    process.output()
}
