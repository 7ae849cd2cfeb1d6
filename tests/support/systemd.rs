//! A unit of a service manager that keeps descriptors and restarts: `systemd/manager.py` plays systemd, which tests cannot count
//! on, over the protocol of `sd_notify(3)` and `sd_listen_fds(3)`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{PATIENCE, Process, wait_for};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/systemd/manager.py");

/// `command` as the main process of a unit whose notification socket lies in `folder`.
pub fn unit_of(command: &Command, folder: &Path) -> Command {
    let mut unit = Command::new("/usr/bin/python3");
    unit.arg(SOURCE).arg(folder).arg(command.get_program()).args(command.get_args());
    unit
}

/// What the manager has said so far about `event`.
pub fn said(manager: &Process, event: &str) -> Vec<Value> {
    let output = manager.output();
    let lines = output.lines().filter(|line| line.starts_with("{\"systemd\""));
    lines.filter_map(|line| serde_json::from_str::<Value>(line).ok()).filter(|line| line["systemd"] == event).collect()
}

/// The service's main process, which was ready once.
pub fn main_process(manager: &Process) -> u32 {
    let last = said(manager, "ready").pop().unwrap_or_else(|| panic!("no process was ready\n{}", manager.tail()));
    last["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a pid")
}

/// `systemctl restart`: waits until another process is ready.
pub fn restart(manager: &Process) {
    again(manager, "HUP");
}

/// kill -9 of the main process, which Restart=always follows.
pub fn kill(manager: &Process) {
    again(manager, "USR1");
}

fn again(manager: &Process, signal: &str) {
    let before = said(manager, "ready").len();
    manager.signal(signal);
    wait_for("the unit is ready again", PATIENCE, || {
        if said(manager, "ready").len() > before { Ok(()) } else { Err(manager.tail()) }
    });
}
