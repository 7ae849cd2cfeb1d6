//! Processes as `/proc` shows them: who they are, whose children they are, which sockets they hold.
//!
//! Invariant: a process is a pid together with its start, so that a pid which was given out again is another process. Every
//! read and every walk has a bound, and all text that a process wrote itself is cleaned before it leaves this room.
//!
//! Knows no task and no rule. A process that goes away meanwhile is `None`; anything else unexpected is a [`HostError`].

mod parse;
#[cfg(test)]
pub(in crate::airflow) mod scenery;
mod watch;

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use watch::Watch;

pub(in crate::airflow) use parse::is_unprintable;

/// Bytes of a process title that are read.
pub(crate) const TITLE_MAX: usize = 4_096;
/// Generations that a walk to the top climbs.
pub(crate) const ANCESTORS_MAX: usize = 64;
/// Processes whose descriptors one question may look through.
pub(crate) const CANDIDATES_MAX: usize = 2_048;
/// Descriptors that one question may look at, about 2 us each.
pub(crate) const DESCRIPTORS_MAX: usize = 20_000;
/// Descriptors of one process among these.
pub(crate) const DESCRIPTORS_A_PROCESS_MAX: usize = 4_096;
/// Processes that one listing of the host may look at.
pub(crate) const PROCESSES_MAX: usize = 8_192;

/// Bytes of any other file below `/proc/PID` that are read.
const FILE_MAX: usize = 16 * 1_024;
/// How often a parent is asked for again while processes on the way up end.
const PARENT_READS_MAX: usize = 3;
/// Threads of a process whose children are listed.
const THREADS_MAX: usize = 256;
/// The top of every tree of processes.
const INIT: u32 = 1;

/// One process: its pid, and when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its number, given out again after its end.
    pub(crate) pid: u32,
    /// Its start in clock ticks since boot.
    #[serde(rename = "start")]
    pub(crate) start_ticks: u64,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.pid, self.start_ticks)
    }
}

/// What anybody on the host may see of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessFacts {
    /// Which one it is.
    pub(crate) process: Process,
    /// Its parent's pid; 0 above the top.
    pub(crate) parent: u32,
    /// Its effective user.
    pub(crate) uid: u32,
    /// Its command's name, cleaned. The process chooses it.
    pub(crate) name: Box<str>,
    /// Its title (command line), cleaned and cut. The process chooses it.
    pub(crate) title: Box<str>,
    /// Its path in the cgroup v2 hierarchy, from that hierarchy's root. Empty on a host without.
    pub(crate) cgroup: Box<str>,
}

/// A process and its ancestors, nearest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    /// The process itself, its parent, and so on.
    pub(crate) processes: Vec<ProcessFacts>,
    /// Whether the walk came to the top. What an incomplete chain does not show proves nothing.
    pub(crate) complete: bool,
}

impl Chain {
    /// The process that the walk began with.
    pub(crate) fn own(&self) -> &ProcessFacts {
        &self.processes[0]
    }

    /// Its ancestors, nearest first.
    pub(crate) fn ancestors(&self) -> &[ProcessFacts] {
        &self.processes[1..]
    }

    /// The highest process below the host's first one: what that one started, or took in as an orphan.
    pub(crate) fn top(&self) -> &ProcessFacts {
        self.processes.iter().rev().find(|facts| facts.process.pid != INIT).unwrap_or_else(|| self.own())
    }

    /// The ancestors' names for a log, nearest first.
    pub(crate) fn ancestry(&self) -> String {
        let names: Vec<&str> = self.ancestors().iter().map(|facts| &*facts.name).collect();
        names.join(" < ")
    }
}

/// What a search for the holders of a socket found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Holders {
    /// Those found, in the order of the candidates.
    pub(crate) found: Vec<Process>,
    /// Candidates whose descriptors this process may not see.
    pub(crate) unreadable: usize,
    /// Whether a bound ended the search early.
    pub(crate) cut: bool,
}

/// Why the host could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// A file or directory of the kernel's refuses to be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A file or directory refuses to be written or made.
    #[error("cannot write {}: {source}", path.display())]
    Unwritable {
        /// Which one.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Somebody else may have written it.
    #[error("{} is not a regular file of ringfence's own user with mode 0600: remove it", path.display())]
    Untrusted {
        /// Which one.
        path: PathBuf,
    },
    /// A file holds what its writer never writes.
    #[error("{} holds no {what}", path.display())]
    Malformed {
        /// Which one.
        path: PathBuf,
        /// What should be there.
        what: &'static str,
    },
}

/// The host's table of processes.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    proc: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/proc")
    }
}

impl Host {
    /// The table at `proc`, which tests make up.
    pub(crate) fn at(proc: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into() }
    }

    /// Where the table is.
    pub(crate) fn root(&self) -> &Path {
        &self.proc
    }

    /// The process that has this pid now.
    pub(crate) fn process(&self, pid: u32) -> Result<Option<Process>, HostError> {
        Ok(self.stat(pid)?.map(|stat| Process { pid, start_ticks: stat.start_ticks }))
    }

    /// Whether it has not ended. One that waits for its parent to take note has.
    pub(crate) fn is_alive(&self, process: Process) -> Result<bool, HostError> {
        let stat = self.stat(process.pid)?;
        Ok(stat.is_some_and(|stat| stat.start_ticks == process.start_ticks && !stat.has_ended()))
    }

    /// How long ago it began; `None` when the host does not tell.
    pub(crate) fn age(&self, process: Process) -> Option<Duration> {
        let text = read(&self.proc.join("uptime"), FILE_MAX).ok()??;
        let uptime: f64 = std::str::from_utf8(&text).ok()?.split(' ').next()?.parse().ok()?;
        let start = process.start_ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        Some(Duration::try_from_secs_f64(uptime - start).unwrap_or_default())
    }

    /// All that is to be seen of the process which has this pid, and of no other.
    pub(crate) fn facts(&self, pid: u32) -> Result<Option<ProcessFacts>, HostError> {
        let (Some(stat), Some(uid)) = (self.stat(pid)?, self.uid(pid)?) else { return Ok(None) };
        let (Some(title), Some(cgroup)) = (self.title(pid)?, self.cgroup(pid)?) else { return Ok(None) };
        // The pid may have been given out again between two reads.
        if self.process(pid)?.is_none_or(|process| process.start_ticks != stat.start_ticks) {
            return Ok(None);
        }
        let process = Process { pid, start_ticks: stat.start_ticks };
        Ok(Some(ProcessFacts { process, parent: stat.parent, uid, name: stat.name, title, cgroup }))
    }

    /// The process and its ancestors.
    pub(crate) fn chain(&self, pid: u32) -> Result<Option<Chain>, HostError> {
        let Some(own) = self.facts(pid)? else { return Ok(None) };
        let mut processes = vec![own];
        while let Some(child) = processes.last() {
            if child.process.pid == INIT || child.parent == 0 {
                return Ok(Some(Chain { processes, complete: true }));
            }
            let parent = if processes.len() > ANCESTORS_MAX { None } else { self.parent(child)? };
            let Some(parent) = parent else { break };
            processes.push(parent);
        }
        Ok(Some(Chain { processes, complete: false }))
    }

    /// A child's parent. One that ends meanwhile hands its child on, so the child is asked again.
    fn parent(&self, child: &ProcessFacts) -> Result<Option<ProcessFacts>, HostError> {
        let mut pid = child.parent;
        for _ in 0..PARENT_READS_MAX {
            // Who is younger than the child has only been given the number of its parent.
            if let Some(parent) = self.facts(pid)?
                && parent.process.start_ticks <= child.process.start_ticks
            {
                return Ok(Some(parent));
            }
            match self.stat(child.process.pid)? {
                Some(stat) if stat.start_ticks == child.process.start_ticks => pid = stat.parent,
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    fn stat(&self, pid: u32) -> Result<Option<parse::Stat>, HostError> {
        self.parsed(pid, "stat", "process state", parse::stat)
    }

    fn uid(&self, pid: u32) -> Result<Option<u32>, HostError> {
        self.parsed(pid, "status", "line `Uid:`", parse::uid)
    }

    fn title(&self, pid: u32) -> Result<Option<Box<str>>, HostError> {
        Ok(read(&self.path(pid, "cmdline"), TITLE_MAX)?.map(|text| parse::clean(&text)))
    }

    /// Its path in the cgroup v2 hierarchy; empty on a host without.
    pub(crate) fn cgroup(&self, pid: u32) -> Result<Option<Box<str>>, HostError> {
        Ok(read(&self.path(pid, "cgroup"), FILE_MAX)?.map(|text| parse::cgroup(&text).unwrap_or_default()))
    }

    /// Which of the candidates hold the socket with this inode number. Looks at no more than the bounds allow.
    pub(crate) fn holders(&self, inode: u64, candidates: &[u32]) -> Holders {
        let wanted = PathBuf::from(format!("socket:[{inode}]"));
        let mut holders = Holders { cut: candidates.len() > CANDIDATES_MAX, ..Holders::default() };
        let mut left = DESCRIPTORS_MAX;
        for &pid in candidates.iter().take(CANDIDATES_MAX) {
            if left == 0 {
                holders.cut = true;
                break;
            }
            // Read before its descriptors: so whoever has this start later is the process that was looked into.
            let Ok(Some(process)) = self.process(pid) else { continue };
            match self.holds(pid, &wanted, &mut left, &mut holders.cut) {
                Ok(true) => holders.found.push(process),
                Ok(false) => {}
                Err(error) if is_gone(&error) => {}
                Err(_) => holders.unreadable += 1,
            }
        }
        holders
    }

    fn holds(&self, pid: u32, wanted: &Path, left: &mut usize, cut: &mut bool) -> io::Result<bool> {
        for (count, entry) in fs::read_dir(self.path(pid, "fd"))?.enumerate() {
            if *left == 0 || count == DESCRIPTORS_A_PROCESS_MAX {
                *cut = true;
                return Ok(false);
            }
            *left -= 1;
            let entry = entry?;
            // One that was closed meanwhile has no target; the others are still of interest.
            if fs::read_link(entry.path()).is_ok_and(|target| target == wanted) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Those processes and all that descend from them, without orphans, at most [`CANDIDATES_MAX`].
    pub(crate) fn descendants(&self, of: &[u32]) -> Vec<u32> {
        let mut family: Vec<u32> = of.iter().copied().take(CANDIDATES_MAX).collect();
        let mut next = 0;
        while next < family.len() && family.len() < CANDIDATES_MAX {
            let children = self.children(family[next]);
            let room = CANDIDATES_MAX - family.len();
            // A child can be met twice only when the tree changes meanwhile.
            let new: Vec<u32> = children.into_iter().filter(|pid| !family.contains(pid)).take(room).collect();
            family.extend(new);
            next += 1;
        }
        family
    }

    /// The children of each of its threads. Whatever cannot be read has none.
    fn children(&self, pid: u32) -> Vec<u32> {
        let Ok(threads) = fs::read_dir(self.path(pid, "task")) else { return Vec::new() };
        let lists = threads.flatten().take(THREADS_MAX).filter_map(|thread| read(&thread.path().join("children"), FILE_MAX).ok());
        lists.flatten().flat_map(|list| parse::numbers(&list)).collect()
    }

    /// The processes of one effective user, at most [`CANDIDATES_MAX`] of the first [`PROCESSES_MAX`].
    pub(crate) fn of_user(&self, uid: u32) -> Result<Vec<u32>, HostError> {
        let entries = fs::read_dir(&self.proc).map_err(|source| HostError::Unreadable { path: self.proc.clone(), source })?;
        let pids = entries.flatten().filter_map(|entry| parse::number(&entry.file_name())).take(PROCESSES_MAX);
        Ok(pids.filter(|&pid| self.uid(pid).ok().flatten() == Some(uid)).take(CANDIDATES_MAX).collect())
    }

    /// An id of this boot; starts of processes of two boots cannot be compared.
    pub(crate) fn boot(&self) -> Result<Box<str>, HostError> {
        let path = self.proc.join("sys/kernel/random/boot_id");
        let text = read(&path, FILE_MAX)?.map(|text| parse::clean(text.trim_ascii()));
        text.ok_or(HostError::Malformed { path, what: "boot id" })
    }

    fn path(&self, pid: u32, file: &str) -> PathBuf {
        self.proc.join(pid.to_string()).join(file)
    }

    fn parsed<T>(
        &self,
        pid: u32,
        file: &str,
        what: &'static str,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<T>, HostError> {
        let path = self.path(pid, file);
        let Some(text) = read(&path, FILE_MAX)? else { return Ok(None) };
        parse(&text).map(Some).ok_or(HostError::Malformed { path, what })
    }
}

/// The first `max` bytes of a file; `None` when it, or its process, is not there.
pub(super) fn read(path: &Path, max: usize) -> Result<Option<Vec<u8>>, HostError> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(max as u64).read_to_end(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(HostError::Unreadable { path: path.to_owned(), source }),
    }
}

/// Whether the kernel says that there is no such process (any more).
fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests;
