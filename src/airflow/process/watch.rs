//! Notice of a process's end, by a descriptor that means this very process and never the next one of its pid.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;

use super::{Host, HostError, Process, is_gone};
use crate::sys;

/// Becomes ready when the process has ended.
#[derive(Debug)]
pub(crate) struct Watch(OwnedFd);

impl Watch {
    /// `None` when it has ended already. Needs Linux 5.3.
    pub(crate) fn open(host: &Host, process: Process) -> Result<Option<Self>, HostError> {
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from) {
            Ok(pidfd) => pidfd,
            // A thread's number (EINVAL, ENOENT since 6.12) is none of a process either.
            Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::InvalidInput => return Ok(None),
            Err(source) => return Err(HostError::Unreadable { path: host.path(process.pid, "pidfd"), source }),
        };
        // The descriptor now pins the number: if the start is right, it means the right process for good.
        Ok(host.is_alive(process)?.then_some(Self(pidfd)))
    }

    /// Waits for the end. Call it on a tokio runtime.
    pub(crate) async fn ended(self) -> io::Result<()> {
        let pidfd = sys::readiness(File::from(self.0), Interest::READABLE)?;
        pidfd.readable().await.map(|_| ())
    }
}
