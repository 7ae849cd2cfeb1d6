//! A cgroup v2 whose processes' traffic is meant.
//!
//! Invariant: the path is relative to the mount, without `..` and without what nftables would not take between quotes.
//! nftables remembers the directory that it finds when the rules are loaded, not its name: one that is made again later is
//! another.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::app::AppError;

/// The one place where `nft` looks for cgroups.
const MOUNT: &str = "/sys/fs/cgroup";
/// Most directories looked at below one cgroup; a host has some hundreds.
const DIRECTORIES_MAX: usize = 100_000;
/// Longest path; nftables itself cuts at `PATH_MAX`.
const PATH_BYTES_MAX: usize = 1_024;

/// A cgroup v2 by its path below the mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cgroup(String);

impl Cgroup {
    /// Reads `/sys/fs/cgroup/system.slice/x.service`, or the same from the mount on.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!("`{text}` {what}; write the path of a cgroup v2 below {MOUNT}, as in system.slice/airflow-worker.service")
        };
        let path = text.strip_prefix(MOUNT).filter(|rest| rest.is_empty() || rest.starts_with('/')).unwrap_or(text);
        let path = path.trim_matches('/');
        if path.is_empty() {
            return Err(wrong("is the whole host, ringfence included"));
        }
        if path.len() > PATH_BYTES_MAX || path.contains('"') || path.chars().any(char::is_control) {
            return Err(wrong("is too long, or holds a character that nftables does not take"));
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(wrong("is no plain path"));
        }
        Ok(Self(path.to_owned()))
    }

    /// How many directories below the mount it lies.
    pub(super) fn level(&self) -> usize {
        self.0.split('/').count()
    }

    /// Fails unless `nft` will find it.
    pub(super) fn find(&self) -> Result<(), AppError> {
        if !Path::new(MOUNT).join("cgroup.controllers").exists() {
            return Err(AppError::Unavailable(format!(
                "-cgroup {self}: cgroup v2 is not mounted at {MOUNT}, where nft looks for it (a hybrid hierarchy has it below \
                 {MOUNT}/unified); use -user, or boot with systemd.unified_cgroup_hierarchy=1"
            )));
        }
        if self.path().is_dir() {
            return Ok(());
        }
        Err(AppError::Config(format!(
            "-cgroup {self}: there is no {}; start the unit first (its cgroup is made with it), or name a slice that is always there",
            self.path().display()
        )))
    }

    /// Whether the cgroup that the kernel calls `id` is this one or lies below it.
    pub(super) fn holds(&self, id: u64) -> bool {
        let mut folders = vec![self.path()];
        for _ in 0..DIRECTORIES_MAX {
            let Some(folder) = folders.pop() else { return false };
            if std::fs::metadata(&folder).is_ok_and(|found| found.ino() == id) {
                return true;
            }
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            folders.extend(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
        }
        false
    }

    fn path(&self) -> PathBuf {
        Path::new(MOUNT).join(&self.0)
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_named_from_the_mount_on() {
        for text in ["/sys/fs/cgroup/system.slice/w.service", "system.slice/w.service", "/system.slice/w.service/"] {
            let cgroup = Cgroup::parse(text).expect(text);
            assert_eq!((cgroup.to_string().as_str(), cgroup.level()), ("system.slice/w.service", 2), "{text}");
        }
        assert_eq!(Cgroup::parse("a\\x2db.slice").expect("as systemd escapes it").level(), 1);
        assert_eq!(Cgroup::parse("/sys/fs/cgroupies").expect("a folder of that name").level(), 3);
    }

    #[test]
    fn the_whole_host_and_tricks_are_refused() {
        for text in ["", "/", "/sys/fs/cgroup", "/sys/fs/cgroup/", "a/../b", "a//b", "a\"; flush ruleset; \"", "a\nb"] {
            assert!(Cgroup::parse(text).expect_err(text).contains("write the path"), "{text:?}");
        }
    }
}
