//! A made-up `/proc` in a scratch folder, for tests of everything that asks the host.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::Host;

/// The boot that every made-up host has.
pub(in crate::airflow) const BOOT: &str = "7b0f6a9e-0000-4000-8000-000000000001";

/// A folder that looks like `/proc`.
pub(in crate::airflow) struct Scenery {
    folder: tempfile::TempDir,
}

/// One made-up process; unset fields have dull values.
#[derive(Clone)]
pub(in crate::airflow) struct Actor {
    pid: u32,
    parent: u32,
    start_ticks: u64,
    uid: u32,
    name: String,
    title: String,
    cgroup: String,
}

/// A process of user 1000 that began when its number says.
pub(in crate::airflow) fn actor(pid: u32, parent: u32, title: &str) -> Actor {
    let name = title.split(' ').next().unwrap_or_default().to_owned();
    Actor { pid, parent, start_ticks: u64::from(pid) * 10, uid: 1000, name, title: title.into(), cgroup: "/".into() }
}

impl Actor {
    pub(in crate::airflow) fn started(mut self, ticks: u64) -> Self {
        self.start_ticks = ticks;
        self
    }

    pub(in crate::airflow) fn user(mut self, uid: u32) -> Self {
        self.uid = uid;
        self
    }

    pub(in crate::airflow) fn cgroup(mut self, path: &str) -> Self {
        self.cgroup = path.into();
        self
    }
}

impl Scenery {
    /// A host with nothing but its first process.
    pub(in crate::airflow) fn new() -> Self {
        let scenery = Self { folder: tempfile::tempdir().expect("a scratch folder") };
        fs::create_dir_all(scenery.proc().join("sys/kernel/random")).expect("folders");
        fs::write(scenery.proc().join("sys/kernel/random/boot_id"), format!("{BOOT}\n")).expect("a file");
        scenery.play(actor(1, 0, "/sbin/init").user(0).started(1));
        scenery
    }

    pub(in crate::airflow) fn host(&self) -> Host {
        Host::at(self.proc())
    }

    fn proc(&self) -> PathBuf {
        self.folder.path().join("proc")
    }

    /// A folder that looks like the root of the cgroup v2 hierarchy.
    pub(in crate::airflow) fn cgroups(&self) -> PathBuf {
        self.folder.path().join("cgroup")
    }

    /// Adds the process, or changes it.
    pub(in crate::airflow) fn play(&self, actor: Actor) {
        let Actor { pid, parent, start_ticks, uid, name, title, cgroup } = actor;
        let folder = self.proc().join(pid.to_string());
        fs::create_dir_all(folder.join("fd")).expect("folders");
        fs::create_dir_all(folder.join(format!("task/{pid}"))).expect("folders");
        let zeros = "0 ".repeat(17);
        let write = |file: &str, text: String| fs::write(folder.join(file), text).expect("a file");
        write("stat", format!("{pid} ({name}) S {parent} {zeros}{start_ticks} 0 0\n"));
        write("status", format!("Name:\t{name}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n"));
        write("cmdline", title.replace(' ', "\0"));
        write("cgroup", format!("1:name=systemd:/\n0::{cgroup}\n"));
        let siblings = self.proc().join(format!("{parent}/task/{parent}/children"));
        if siblings.parent().is_some_and(std::path::Path::exists) {
            let before = fs::read_to_string(&siblings).unwrap_or_default();
            fs::write(siblings, format!("{before}{pid} ")).expect("a file");
        }
        let members = self.cgroups().join(cgroup.trim_start_matches('/'));
        fs::create_dir_all(&members).expect("folders");
        let before = fs::read_to_string(members.join("cgroup.procs")).unwrap_or_default();
        fs::write(members.join("cgroup.procs"), format!("{before}{pid}\n")).expect("a file");
    }

    /// The process ends.
    pub(in crate::airflow) fn end(&self, pid: u32) {
        fs::remove_dir_all(self.proc().join(pid.to_string())).expect("it was there");
    }

    /// The process holds the socket under this descriptor.
    pub(in crate::airflow) fn hold(&self, pid: u32, descriptor: u32, inode: u64) {
        let link = self.proc().join(format!("{pid}/fd/{descriptor}"));
        symlink(format!("socket:[{inode}]"), link).expect("a link");
    }

    /// Overwrites one file of a process with any bytes.
    pub(in crate::airflow) fn scrawl(&self, pid: u32, file: &str, text: &[u8]) {
        fs::write(self.proc().join(format!("{pid}/{file}")), text).expect("a file");
    }
}
