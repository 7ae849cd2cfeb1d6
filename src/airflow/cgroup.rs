//! Cgroups of tasks: a place below which each registered task gets a cgroup of its own, which the kernel then names for every
//! socket that is made in it.
//!
//! Invariant: a task's directory is `task-PID-START` below the place, so that its name tells whose it is, also after a restart.
//! It is removed only when no process is left in it: `rmdir` itself checks that.
//!
//! Why a place of its own: a task can neither leave it nor join another's without write access to `cgroup.procs`, which its
//! user has not. So even a daemon that lost all its parents is still labelled.
//!
//! Knows no task's facts. Every failure is a value with its reason, and the registry then does without.

mod events;

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::process::{Host, HostError, Process, read};

pub(crate) use events::EmptyWatch;

/// The place's directory, where nobody chose another.
const PLACE: &str = "ringfence";
/// What the name of a task's directory begins with.
const TASK_PREFIX: &str = "task-";
/// Bytes of the table of mounts that are read.
const MOUNTS_MAX: usize = 4 * 1_024 * 1_024;
/// Bytes of one of the kernel's lists of pids that are read.
const PROCS_MAX: usize = 1_024 * 1_024;
/// Directories that one walk through a cgroup visits.
pub(crate) const CGROUPS_MAX: usize = 4_096;

/// Where the cgroup v2 hierarchy is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    mount: PathBuf,
    /// The cgroup that the mount shows as its root; `/` unless inside a container.
    root: String,
}

/// What the rules file says of a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Setting {
    /// Wherever it can be.
    Auto,
    /// Nowhere.
    Off,
    /// This directory.
    At(PathBuf),
}

/// Why tasks get no cgroup of their own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoPlace {
    /// As the rules file says.
    #[error("`cgroup = \"off\"`")]
    Off,
    /// The host has none, or its mount is not to be seen.
    #[error("no cgroup v2 hierarchy is mounted: mount cgroup2 on /sys/fs/cgroup")]
    NoHierarchy,
    /// The directory is elsewhere.
    #[error("{} is not below {}, where cgroup v2 is mounted: choose a directory there, or \"auto\"", path.display(), mount.display())]
    Outside {
        /// What was chosen.
        path: PathBuf,
        /// Where it should be.
        mount: PathBuf,
    },
    /// It cannot be made or written.
    #[error("{0}: run ringfence as root, or give it a delegated cgroup (`Delegate=yes`) with `cgroup = \"/that/directory\"`")]
    Refused(#[from] HostError),
}

/// The directory below which tasks have theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    directory: PathBuf,
    /// As in `/proc/PID/cgroup`.
    path: String,
}

/// A cgroup, of a task or a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    /// What the kernel calls it in `sock_diag`: the inode number of its directory.
    pub(crate) id: u64,
    /// Its directory.
    pub(crate) directory: PathBuf,
}

impl Hierarchy {
    /// The mounted cgroup v2 hierarchy, at `/sys/fs/cgroup` or beside the old ones at `/sys/fs/cgroup/unified`.
    pub(crate) fn find(host: &Host) -> Result<Option<Self>, HostError> {
        let mounts = read(&host.root().join("self/mountinfo"), MOUNTS_MAX)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&mounts).lines().find_map(mounted_hierarchy))
    }

    /// A hierarchy whose root is this directory.
    #[cfg(test)]
    pub(crate) fn at(mount: impl Into<PathBuf>) -> Self {
        Self { mount: mount.into(), root: "/".into() }
    }

    /// Where it is mounted.
    #[cfg(test)]
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// The directory of a path from `/proc/PID/cgroup`; `None` when the mount does not show it.
    pub(crate) fn directory_of(&self, path: &str) -> Option<PathBuf> {
        let below = Path::new(path).strip_prefix(&self.root).ok()?;
        is_plain(below).then(|| self.mount.join(below))
    }

    /// The reverse.
    fn path_of(&self, directory: &Path) -> Option<String> {
        let below = directory.strip_prefix(&self.mount).ok()?;
        let path = Path::new(&self.root).join(below);
        is_plain(below).then(|| path.to_str().map(|path| path.trim_end_matches('/').to_owned())).flatten()
    }

    /// The cgroups of a systemd unit, which lie below slices alone: what is below anything else is another manager's.
    pub(crate) fn of_unit(&self, unit: &str) -> Vec<Cgroup> {
        let is_slice = |name: &str| name.ends_with(".slice");
        let slices = subdirectories(&self.mount, is_slice);
        slices.iter().filter_map(|slice| identified(slice.join(unit)).ok()).collect()
    }
}

/// `ID PARENT MAJOR:MINOR ROOT MOUNT OPTIONS … - TYPE SOURCE OPTIONS`, for a cgroup2 alone.
fn mounted_hierarchy(line: &str) -> Option<Hierarchy> {
    let (mount, kind) = line.split_once(" - ")?;
    if kind.split(' ').next()? != "cgroup2" {
        return None;
    }
    let mut fields = mount.split(' ').skip(3);
    let (root, mount) = (fields.next()?, fields.next()?);
    Some(Hierarchy { mount: unescaped(mount).into(), root: unescaped(root) })
}

/// Spaces, tabs, line ends and backslashes stand there as octal numbers.
fn unescaped(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Whether it only goes down.
fn is_plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

impl Place {
    /// Makes the place ready, or says why there is none. `root` tells whether this process is root.
    pub(crate) fn open(setting: &Setting, host: &Host, hierarchy: Option<&Hierarchy>, root: bool) -> Result<Self, NoPlace> {
        let hierarchy = hierarchy.ok_or(NoPlace::NoHierarchy);
        match setting {
            Setting::Off => Err(NoPlace::Off),
            Setting::At(directory) => Self::at(directory.clone(), hierarchy?),
            Setting::Auto => {
                let hierarchy = hierarchy?;
                let own = host.cgroup(std::process::id())?.unwrap_or_default();
                let own = hierarchy.directory_of(&own).unwrap_or_else(|| hierarchy.mount.clone());
                let below_own = || Self::at(own.join(PLACE), hierarchy);
                // Not below our own unit where there is a choice: systemd ends all that is in there when we are restarted.
                if root { Self::at(hierarchy.mount.join(PLACE), hierarchy).or_else(|_| below_own()) } else { below_own() }
            }
        }
    }

    fn at(directory: PathBuf, hierarchy: &Hierarchy) -> Result<Self, NoPlace> {
        let outside = || NoPlace::Outside { path: directory.clone(), mount: hierarchy.mount.clone() };
        let path = hierarchy.path_of(&directory).filter(|path| !path.is_empty()).ok_or_else(outside)?;
        make(&directory)?;
        let probe = directory.join(format!("probe-{}", std::process::id()));
        make(&probe)?;
        fs::remove_dir(&probe).map_err(|source| HostError::Unwritable { path: probe, source })?;
        Ok(Self { directory, path })
    }

    /// Where it is.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes a cgroup for the process and moves it in. Moving takes 20 us in a burst, and 8 to 16 ms (a grace period of the
    /// kernel's) when the last move was more than a second ago.
    pub(crate) fn enclose(&self, process: Process) -> Result<Cgroup, HostError> {
        let directory = self.directory_for(process);
        make(&directory)?;
        let moved = identified(directory.clone()).and_then(|cgroup| {
            let procs = directory.join("cgroup.procs");
            match fs::write(&procs, process.pid.to_string()) {
                Ok(()) => Ok(cgroup),
                Err(source) => Err(HostError::Unwritable { path: procs, source }),
            }
        });
        if moved.is_err() {
            let _ = fs::remove_dir(&directory);
        }
        moved
    }

    /// The cgroup that a process was given by an earlier run, if it is there still.
    pub(crate) fn cgroup_of(&self, process: Process) -> Option<Cgroup> {
        identified(self.directory_for(process)).ok()
    }

    /// Whose cgroup this path from `/proc/PID/cgroup` lies in, whether it is known or not.
    pub(crate) fn owner_of(&self, path: &str) -> Option<Process> {
        let below = path.strip_prefix(&self.path)?.strip_prefix('/')?;
        named_process(below.split('/').next()?)
    }

    /// Every task's cgroup below the place, and whose it is.
    pub(crate) fn all(&self) -> Result<Vec<(Process, Cgroup)>, HostError> {
        let unreadable = |source| HostError::Unreadable { path: self.directory.clone(), source };
        let entries = fs::read_dir(&self.directory).map_err(unreadable)?;
        let named = entries.flatten().filter_map(|entry| Some((named_process(entry.file_name().to_str()?)?, entry.path())));
        Ok(named.filter_map(|(process, directory)| Some((process, identified(directory).ok()?))).collect())
    }

    fn directory_for(&self, process: Process) -> PathBuf {
        self.directory.join(format!("{TASK_PREFIX}{process}"))
    }
}

fn named_process(name: &str) -> Option<Process> {
    let (pid, start_ticks) = name.strip_prefix(TASK_PREFIX)?.split_once('-')?;
    Some(Process { pid: pid.parse().ok()?, start_ticks: start_ticks.parse().ok()? })
}

impl Cgroup {
    /// Whether a process is in it or below it.
    pub(crate) fn is_populated(&self) -> Result<bool, HostError> {
        let path = self.directory.join("cgroup.events");
        let Some(text) = read(&path, PROCS_MAX)? else { return Ok(false) };
        events::populated(&text).ok_or(HostError::Malformed { path, what: "line `populated`" })
    }

    /// Removes it, with what root's processes made below it. False when processes are left.
    pub(crate) fn remove(&self) -> Result<bool, HostError> {
        for directory in subdirectories(&self.directory, |_| true).iter().rev() {
            match fs::remove_dir(directory) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(false),
                Err(source) => return Err(HostError::Unwritable { path: directory.clone(), source }),
            }
        }
        Ok(true)
    }

    /// The processes in it and below it.
    pub(crate) fn members(&self) -> Result<Vec<u32>, HostError> {
        let mut members = Vec::new();
        for directory in subdirectories(&self.directory, |_| true) {
            members.extend(members_of(&directory)?);
        }
        Ok(members)
    }
}

/// The processes in one cgroup, not below it.
pub(super) fn members_of(directory: &Path) -> Result<Vec<u32>, HostError> {
    let text = read(&directory.join("cgroup.procs"), PROCS_MAX)?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&text).lines().map_while(|line| line.parse().ok()).collect())
}

/// The directory and those below it whose names fit, parents first, at most [`CGROUPS_MAX`].
fn subdirectories(directory: &Path, fits: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    let mut next = 0;
    while next < found.len() && found.len() < CGROUPS_MAX {
        let entries = fs::read_dir(&found[next]).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let fitting = directories.filter(|entry| entry.file_name().to_str().is_some_and(&fits));
        let room = CGROUPS_MAX - found.len();
        let below: Vec<PathBuf> = fitting.map(|entry| entry.path()).take(room).collect();
        found.extend(below);
        next += 1;
    }
    found
}

fn identified(directory: PathBuf) -> Result<Cgroup, HostError> {
    match fs::metadata(&directory) {
        Ok(metadata) => Ok(Cgroup { id: metadata.ino(), directory }),
        Err(source) => Err(HostError::Unreadable { path: directory, source }),
    }
}

fn make(directory: &Path) -> Result<(), HostError> {
    match fs::create_dir(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && directory.is_dir() => Ok(()),
        Err(source) => Err(HostError::Unwritable { path: directory.to_owned(), source }),
    }
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Opens the notice of a cgroup's emptiness.
pub(crate) fn watch(cgroup: &Cgroup) -> io::Result<EmptyWatch> {
    EmptyWatch::open(&cgroup.directory)
}

#[cfg(test)]
pub(in crate::airflow) mod tests;
