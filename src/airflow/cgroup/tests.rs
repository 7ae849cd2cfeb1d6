//! Paths and places on made-up hierarchies, and tasks' cgroups on the real one.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::*;
use crate::airflow::process::scenery::{Scenery, actor};

const PROCESS: Process = Process { pid: 77, start_ticks: 123 };

#[test]
fn the_hierarchy_is_found_where_it_is_mounted() {
    let hybrid = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
    assert_eq!(mounted_hierarchy(hybrid), Some(Hierarchy::at("/sys/fs/cgroup/unified")));
    let shared = "35 25 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
    assert_eq!(mounted_hierarchy(shared), Some(Hierarchy::at("/sys/fs/cgroup")));
    assert_eq!(mounted_hierarchy("30 31 0:38 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
    let spaced = "1 2 3:4 /a\\040b /c\\040d rw - cgroup2 none rw";
    assert_eq!(mounted_hierarchy(spaced), Some(Hierarchy { mount: "/c d".into(), root: "/a b".into() }));
    assert_eq!(mounted_hierarchy("nonsense"), None);
}

#[test]
fn paths_and_directories_belong_together() {
    let whole = Hierarchy::at("/sys/fs/cgroup");
    assert_eq!(whole.directory_of("/a/b"), Some("/sys/fs/cgroup/a/b".into()));
    assert_eq!(whole.path_of(Path::new("/sys/fs/cgroup/a")), Some("/a".into()));
    let part = Hierarchy { mount: "/sys/fs/cgroup".into(), root: "/box".into() };
    assert_eq!(part.directory_of("/box/b"), Some("/sys/fs/cgroup/b".into()));
    assert_eq!(part.directory_of("/other"), None);
    assert_eq!(part.path_of(Path::new("/sys/fs/cgroup/b")), Some("/box/b".into()));
    assert_eq!(whole.directory_of("/../../etc"), None, "never above the mount");
}

#[test]
fn a_path_tells_whose_cgroup_it_is() {
    let place = Place { directory: "/sys/fs/cgroup/ringfence".into(), path: "/ringfence".into() };
    assert_eq!(place.owner_of("/ringfence/task-77-123"), Some(PROCESS));
    assert_eq!(place.owner_of("/ringfence/task-77-123/deeper"), Some(PROCESS));
    for other in
        ["/", "/ringfence", "/ringfenced/task-77-123", "/x/ringfence/task-77-123", "/ringfence/task-77", "/ringfence/task-a-b"]
    {
        assert_eq!(place.owner_of(other), None, "{other}");
    }
}

#[test]
fn a_place_is_made_ready_or_refused_with_the_reason() {
    let scenery = Scenery::new();
    let host = scenery.host();
    let hierarchy = Hierarchy::at(scenery.cgroups());
    let open = |setting: Setting| Place::open(&setting, &host, Some(&hierarchy), true);
    assert_eq!(open(Setting::Auto).unwrap().path, "/ringfence");
    assert!(matches!(open(Setting::Off), Err(NoPlace::Off)));
    assert!(matches!(Place::open(&Setting::Auto, &host, None, true), Err(NoPlace::NoHierarchy)));
    let outside = open(Setting::At("/tmp".into())).unwrap_err().to_string();
    assert!(outside.starts_with("/tmp is not below "), "{outside}");
    let refused = open(Setting::At(scenery.cgroups().join("no/such"))).unwrap_err().to_string();
    assert!(refused.contains("Delegate=yes"), "{refused}");
    assert!(matches!(open(Setting::At(scenery.cgroups())), Err(NoPlace::Outside { .. })), "not the root itself");
}

#[test]
fn a_unit_is_found_in_its_slice() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "w").cgroup("/system.slice/airflow-worker.service"));
    let found = Hierarchy::at(scenery.cgroups()).of_unit("airflow-worker.service");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].members().unwrap(), [10]);
    scenery.play(actor(11, 1, "w").cgroup("/docker-1.scope/system.slice/other.service"));
    assert_eq!(Hierarchy::at(scenery.cgroups()).of_unit("other.service"), [], "a container's");
}

/// The real hierarchy. These tests need root on a host with cgroup v2, and say so instead of passing.
pub(in crate::airflow) fn real_place(name: &str) -> Place {
    let host = Host::default();
    let hierarchy = Hierarchy::find(&host).unwrap().expect("these tests need a mounted cgroup v2 hierarchy");
    let directory = hierarchy.mount().join(format!("ringfence-test-{name}-{}", std::process::id()));
    Place::open(&Setting::At(directory), &host, Some(&hierarchy), true).expect("these tests need a writable cgroup v2 hierarchy")
}

/// A shell that starts a daemon and ends, as soon as it is told to.
fn shell() -> (Child, Process) {
    let child = Command::new("sh").args(["-c", "read go; sleep 60 & exit"]).stdin(Stdio::piped()).spawn().unwrap();
    let process = Host::default().process(child.id()).unwrap().unwrap();
    (child, process)
}

/// Ends whatever is in the cgroup, and what that starts meanwhile.
pub(in crate::airflow) fn end_all(cgroup: &Cgroup) {
    while cgroup.is_populated().unwrap() {
        for pid in cgroup.members().unwrap() {
            let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn a_real_cgroup_lives_as_long_as_its_last_process() {
    let place = real_place("life");
    let (mut child, process) = shell();
    let cgroup = place.enclose(process).unwrap();
    assert_eq!(cgroup.id, fs::metadata(&cgroup.directory).unwrap().ino(), "the name that sockets get");
    assert_eq!(place.cgroup_of(process).as_ref(), Some(&cgroup));
    assert_eq!(place.all().unwrap(), [(process, cgroup.clone())]);
    let path = Host::default().cgroup(process.pid).unwrap().unwrap();
    assert_eq!(place.owner_of(&path), Some(process), "{path}");

    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(cgroup.is_populated().unwrap(), "the daemon has no parent and is there still");
    assert_eq!(cgroup.members().unwrap().len(), 1);
    assert!(!cgroup.remove().unwrap(), "somebody is in it");
    let emptied = tokio::spawn(watch(&cgroup).unwrap().emptied());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!emptied.is_finished());

    end_all(&cgroup);
    tokio::time::timeout(Duration::from_secs(5), emptied).await.expect("noticed before the next look").unwrap().unwrap();
    assert!(!cgroup.is_populated().unwrap());
    assert!(cgroup.remove().unwrap());
    assert!(cgroup.remove().unwrap(), "gone already");
    assert_eq!(place.cgroup_of(process), None);
    fs::remove_dir(place.directory()).unwrap();
}

#[test]
fn a_process_that_is_gone_leaves_no_directory() {
    let place = real_place("gone");
    let (mut child, process) = shell();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(place.enclose(process).is_err());
    assert_eq!(place.all().unwrap(), []);
    fs::remove_dir(place.directory()).unwrap();
}
