//! Chains, holders and listings on made-up hosts, and the same on the real one.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;

use super::scenery::{Scenery, actor};
use super::*;

#[test]
fn a_chain_climbs_to_the_top() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "airflow worker").cgroup("/system.slice/w.service"));
    scenery.play(actor(20, 10, "bash -c x").user(7));
    let chain = scenery.host().chain(20).unwrap().unwrap();
    assert!(chain.complete);
    assert_eq!(chain.processes.iter().map(|facts| facts.process.pid).collect::<Vec<_>>(), [20, 10, 1]);
    assert_eq!((chain.own().uid, &*chain.own().title), (7, "bash -c x"));
    assert_eq!(&*chain.ancestors()[0].cgroup, "/system.slice/w.service");
    assert_eq!(chain.top().process.pid, 10);
    assert_eq!(chain.ancestry(), "airflow < /sbin/init");
    assert_eq!(scenery.host().chain(99).unwrap(), None);
}

#[test]
fn a_parent_younger_than_its_child_is_no_parent() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "airflow worker").started(500));
    scenery.play(actor(20, 10, "task").started(400));
    let chain = scenery.host().chain(20).unwrap().unwrap();
    assert!(!chain.complete);
    assert_eq!(chain.processes.len(), 1);
}

#[test]
fn a_chain_too_deep_is_not_complete() {
    let scenery = Scenery::new();
    for pid in 2..80 {
        scenery.play(actor(pid, pid - 1, "sh"));
    }
    let chain = scenery.host().chain(79).unwrap().unwrap();
    assert_eq!((chain.processes.len(), chain.complete), (ANCESTORS_MAX + 1, false));
    assert!(scenery.host().chain(ANCESTORS_MAX as u32).unwrap().unwrap().complete);
}

#[test]
fn a_circle_of_parents_ends() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 20, "a").started(5));
    scenery.play(actor(20, 10, "b").started(5));
    assert!(!scenery.host().chain(10).unwrap().unwrap().complete);
}

#[test]
fn all_holders_are_found_and_only_they() {
    let scenery = Scenery::new();
    for pid in [10, 11, 12] {
        scenery.play(actor(pid, 1, "sh"));
        scenery.hold(pid, 3, u64::from(pid));
    }
    scenery.hold(10, 4, 777);
    scenery.hold(12, 9, 777);
    let holders = scenery.host().holders(777, &[10, 11, 12, 99]);
    assert_eq!(holders.found, [Process { pid: 10, start_ticks: 100 }, Process { pid: 12, start_ticks: 120 }]);
    assert_eq!((holders.unreadable, holders.cut), (0, false));
}

#[test]
fn a_process_with_many_descriptors_costs_a_bounded_search() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "hoarder"));
    scenery.play(actor(11, 1, "sh"));
    for descriptor in 0..=DESCRIPTORS_A_PROCESS_MAX as u32 {
        scenery.hold(10, descriptor, 1);
    }
    scenery.hold(11, 3, 777);
    let holders = scenery.host().holders(777, &[10, 11]);
    assert!(holders.cut);
    assert_eq!(holders.found, [Process { pid: 11, start_ticks: 110 }], "others are found all the same");
}

#[test]
fn descendants_are_found_through_generations() {
    let scenery = Scenery::new();
    for (pid, parent) in [(10, 1), (11, 10), (12, 11), (20, 1)] {
        scenery.play(actor(pid, parent, "sh"));
    }
    assert_eq!(scenery.host().descendants(&[10]), [10, 11, 12]);
    assert_eq!(scenery.host().descendants(&[99]), [99]);
}

#[test]
fn a_user_has_its_own_processes() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "a").user(7));
    scenery.play(actor(11, 1, "b").user(8));
    assert_eq!(scenery.host().of_user(7).unwrap(), [10]);
}

#[test]
fn what_the_kernel_never_writes_is_an_error() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "sh"));
    scenery.scrawl(10, "stat", b"nonsense");
    let error = scenery.host().facts(10).unwrap_err().to_string();
    assert!(error.contains("10/stat holds no process state"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_files_never_panic(
        file in proptest::sample::select(vec!["stat", "status", "cmdline", "cgroup", "task/10/children"]),
        text in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let scenery = Scenery::new();
        scenery.play(actor(10, 1, "sh"));
        scenery.scrawl(10, file, &text);
        let _ = (scenery.host().chain(10), scenery.host().descendants(&[10]), scenery.host().of_user(1000));
    }
}

#[test]
fn the_real_host_knows_this_process() {
    let host = Host::default();
    let chain = host.chain(std::process::id()).unwrap().unwrap();
    assert!(chain.complete, "{chain:?}");
    assert_eq!(chain.own().uid, rustix::process::geteuid().as_raw());
    assert!(host.is_alive(chain.own().process).unwrap());
    assert!(!host.is_alive(Process { pid: std::process::id(), start_ticks: 0 }).unwrap());
    assert_eq!(host.boot().unwrap().len(), 36);
}

#[test]
fn a_real_child_holds_the_socket_that_it_inherited() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let host = Host::default();
    let link = fs::read_link(format!("/proc/self/fd/{}", client.as_raw_fd())).unwrap();
    let inode = link.to_str().unwrap().trim_start_matches("socket:[").trim_end_matches(']').parse().unwrap();
    let mut child = Command::new("sleep").arg("60").stdin(Stdio::from(std::os::fd::OwnedFd::from(client))).spawn().unwrap();
    let own = std::process::id();
    let holders = host.holders(inode, &host.descendants(&[own]));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(holders.found.iter().map(|process| process.pid).collect::<Vec<_>>(), [child.id()]);
}

#[tokio::test]
async fn the_end_of_a_real_process_is_noticed() {
    let host = Host::default();
    let mut child = tokio::process::Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
    let process = host.process(child.id().unwrap()).unwrap().unwrap();
    let watch = Watch::open(&host, process).unwrap().unwrap();
    let ended = tokio::spawn(watch.ended());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!ended.is_finished());
    child.start_kill().unwrap();
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("noticed in time").unwrap().unwrap();
    child.wait().await.unwrap();
    assert!(Watch::open(&host, process).unwrap().is_none());
}

#[tokio::test]
async fn a_pid_with_another_start_is_not_watched() {
    let host = Host::default();
    let stranger = Process { pid: std::process::id(), start_ticks: 1 };
    assert!(Watch::open(&host, stranger).unwrap().is_none());
}
