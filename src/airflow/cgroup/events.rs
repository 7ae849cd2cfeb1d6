//! Notice that the last process has left a cgroup: `cgroup.events` says `populated 0`, and polls as urgent when it changes.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use tokio::io::Interest;

use crate::sys;

/// `cgroup.events` has two or three short lines.
const EVENTS_MAX: usize = 1_024;
/// How long a notice that never came can delay the removal.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Becomes ready when no process is left in the cgroup or below it.
#[derive(Debug)]
pub(crate) struct EmptyWatch(File);

impl EmptyWatch {
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        File::open(directory.join("cgroup.events")).map(Self)
    }

    /// Waits until then, or until the cgroup is removed. Call it on a tokio runtime.
    pub(crate) async fn emptied(self) -> io::Result<()> {
        let events = sys::readiness(self.0, Interest::PRIORITY | Interest::ERROR)?;
        loop {
            if !is_populated(events.get_ref())? {
                return Ok(());
            }
            // Reading has taken note of what happened so far, so the next change makes the descriptor ready again.
            if let Ok(ready) = tokio::time::timeout(LOOK_EVERY, events.ready(Interest::PRIORITY | Interest::ERROR)).await {
                ready?.clear_ready();
            }
        }
    }
}

fn is_populated(file: &File) -> io::Result<bool> {
    let mut text = [0; EVENTS_MAX];
    match file.read_at(&mut text, 0) {
        Ok(length) => populated(&text[..length]).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "no line `populated`")),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The line `populated 0` or `populated 1`.
pub(super) fn populated(text: &[u8]) -> Option<bool> {
    let value = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"populated "))?;
    match value {
        b"0" => Some(false),
        b"1" => Some(true),
        _ => None,
    }
}
