//! The service manager's descriptor store: what listens here is kept there too, so that between the end of this process and the
//! start of the next one connections wait in the kernel's queue instead of being refused.
//!
//! Invariant: the store has what this process listens at, each socket under a name of its own, and nothing else of ours. A
//! socket that is kept but accepted from by nobody would swallow its share of an address: what listens here no more is removed.
//!
//! Without a service manager there is none. One whose unit keeps no descriptors drops them in silence, which costs a datagram a
//! socket. Errors are the caller's to tell: they cost the next restart, and no connection.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use sd_notify::NotifyState;
use socket2::SockRef;

use super::handover::{is_apart, place_of};

/// Descriptors that are kept: as many as FileDescriptorStoreMax= in the units.
const DESCRIPTORS_MAX: usize = 4_096;
/// What each name of ours begins with.
const PREFIX: &str = "ringfence-";
/// Where systemd says that it has a store, since release 254; the units say it for earlier ones.
const ANNOUNCED: &str = "FDSTORE";
/// How long the service manager may take to have done all that it was told.
const BARRIER_TIME: Duration = Duration::from_secs(5);

/// What this process keeps in the store.
#[derive(Debug)]
pub struct DescriptorStore {
    /// Names in the store.
    kept: BTreeSet<String>,
    /// Sockets that listen still and are about to close.
    given_up: BTreeSet<String>,
    is_announced: bool,
}

/// A descriptor that the service manager gave back.
#[derive(Debug)]
pub(super) struct Returned {
    pub(super) fd: RawFd,
    pub(super) name: String,
}

impl DescriptorStore {
    /// The store of this process's unit, with what an earlier process kept there.
    pub fn of_process(kept: BTreeSet<String>) -> Option<Self> {
        let has = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0");
        has("NOTIFY_SOCKET").then(|| Self { is_announced: !kept.is_empty() || has(ANNOUNCED), kept, given_up: BTreeSet::new() })
    }

    /// Whether what is put there is known to be kept.
    pub fn is_sure(&self) -> bool {
        self.is_announced
    }

    /// Names of what is kept, for a process that takes over.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.kept
    }

    /// Keeps what listens now, removes what listens no more.
    pub fn follow(&mut self) -> io::Result<()> {
        let mut listening = BTreeSet::new();
        for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
            let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // What is no worker's comes and goes with registrations: kept, it would stay the next process's for ever.
            if place_of(fd).is_none() || is_apart(fd) {
                continue;
            }
            let Some((name, socket)) = named_copy(fd) else { continue };
            if self.given_up.contains(&name) {
                continue;
            }
            if !self.kept.contains(&name) && self.kept.len() < DESCRIPTORS_MAX {
                let states = [NotifyState::FdStore, NotifyState::FdName(&name), NotifyState::Custom("FDPOLL=0")];
                sd_notify::notify_with_fds(false, &states, &[socket.as_fd()])?;
                self.kept.insert(name.clone());
            }
            listening.insert(name);
        }
        let gone: Vec<String> = self.kept.difference(&listening).cloned().collect();
        self.remove(gone)
    }

    /// Has the store no longer keep these, which are about to close, and waits until that is done.
    pub fn give_up(&mut self, names: Vec<String>) -> io::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        self.given_up.extend(names.iter().cloned());
        self.remove(names)?;
        let (mut done, told) = io::pipe()?;
        sd_notify::notify_with_fds(false, &[NotifyState::Custom("BARRIER=1")], &[told.as_fd()])?;
        drop(told);
        let mut wanted = libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&done), events: libc::POLLIN, revents: 0 };
        let timeout = i32::try_from(BARRIER_TIME.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd, whose descriptor stays open during the call.
        match unsafe { libc::poll(&raw mut wanted, 1, timeout) } {
            1 => done.read(&mut [0]).map(drop),
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "the service manager did not answer in time")),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn remove(&mut self, names: Vec<String>) -> io::Result<()> {
        for name in names {
            sd_notify::notify(false, &[NotifyState::FdStoreRemove, NotifyState::FdName(&name)])?;
            self.kept.remove(&name);
        }
        Ok(())
    }
}

/// What the service manager gave this process at its start, of what is ours. Call once, before the first thread.
pub(super) fn returned() -> io::Result<Vec<Returned>> {
    let all = sd_notify::listen_fds_with_names(true)?;
    Ok(all.filter(|(_, name)| name.starts_with(PREFIX)).map(|(fd, name)| Returned { fd, name }).collect())
}

/// A socket's name in the store: the kernel gives no two sockets of one boot the same cookie.
pub(super) fn name_of(socket: &OwnedFd) -> Option<String> {
    SockRef::from(socket).cookie().ok().map(|cookie| format!("{PREFIX}{cookie:016x}"))
}

/// A copy of a listening socket of this process with its name; `None` when it was closed meanwhile, whatever has its number now.
fn named_copy(fd: RawFd) -> Option<(String, OwnedFd)> {
    // SAFETY: at worst the descriptor was closed meanwhile: then the copy fails, or is of something else and is dropped here.
    let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().ok()?;
    let still = place_of(std::os::fd::AsRawFd::as_raw_fd(&copy)).is_some();
    still.then(|| Some((name_of(&copy)?, copy))).flatten()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_socket_has_one_name_whatever_descriptor_shows_it() {
        let one = OwnedFd::from(TcpListener::bind("127.0.0.1:0").expect("a listener"));
        let two = OwnedFd::from(TcpListener::bind("127.0.0.1:0").expect("a listener"));
        let copy = one.try_clone().expect("a copy");
        let name = name_of(&one).expect("a name");
        assert_eq!(name_of(&copy).as_ref(), Some(&name));
        assert_ne!(name_of(&two).as_ref(), Some(&name));
        // What systemd takes for a name: printable, no colon, 255 bytes at most.
        assert!(name.len() < 256 && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':'), "{name}");
        let (named, _) = named_copy(std::os::fd::AsRawFd::as_raw_fd(&one)).expect("it listens");
        assert_eq!(named, name);
    }

    #[test]
    fn what_does_not_listen_has_no_name() {
        let file = tempfile::tempfile().expect("a file");
        assert!(named_copy(std::os::fd::AsRawFd::as_raw_fd(&file)).is_none());
        assert!(named_copy(9_999).is_none());
    }
}
