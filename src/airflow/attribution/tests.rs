//! Who holds a socket, on made-up hosts, and all the ways of looking like somebody else; then with a real socket.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;
use crate::airflow::cgroup::tests::{end_all, real_place};
use crate::airflow::process::scenery::{Actor, Scenery, actor};
use crate::airflow::registry::{Claim, Part, Peer, Supervisor};
use crate::sys::{SocketDiag, SocketOwner};

const UUID: &str = "01a20359-e6c5-7000-8000-000000000001";
const UNIT: &str = "/system.slice/airflow-worker.service";
const MAIN: &str = "[celeryd: celery@vm:MainProcess] -active- (celery worker -c 2)";
const INODE: u64 = 4_242;
const ORIGIN: Origin = Origin { uid: 1000, inode: INODE, cgroup: 0, pid: None };

fn parts(facts: &ProcessFacts) -> Option<Part> {
    if facts.cgroup.starts_with(UNIT) {
        return Some(Part { name: "airflow-worker".into(), runs_tasks: true });
    }
    facts.title.starts_with("airflow triggerer").then(|| Part { name: "airflow-triggerer".into(), runs_tasks: false })
}

fn in_unit(pid: u32, parent: u32, title: &str) -> Actor {
    actor(pid, parent, title).cgroup(UNIT)
}

/// A worker 10 with two supervisors (11, 21) and their tasks (12, 22), and what answers for it.
struct Stage {
    scenery: Scenery,
    registry: Registry,
    attributor: Attributor,
    units: Vec<Cgroup>,
    accept_titles: bool,
    now: Instant,
}

impl Stage {
    fn new() -> Self {
        let scenery = Scenery::new();
        scenery.play(in_unit(10, 1, MAIN));
        for (supervisor, task) in [(11, 12), (21, 22)] {
            scenery.play(in_unit(supervisor, 10, &format!("airflow supervisor: {}", uuid(task))));
            scenery.play(in_unit(task, supervisor, &format!("airflow worker -- {}", uuid(task))));
        }
        let hierarchy = Some(Hierarchy::at(scenery.cgroups()));
        Self {
            registry: Registry::new(None, hierarchy.clone()),
            attributor: Attributor::new(hierarchy),
            units: Vec::new(),
            accept_titles: false,
            now: Instant::now(),
            scenery,
        }
    }

    fn register(&mut self, pid: u32) {
        let peer = Peer { pid, uid: 1000 };
        self.registry.register(&self.scenery.host(), &parts, peer, &claim(pid), self.now).expect("a true claim");
    }

    fn ask(&mut self, origin: &Origin) -> Attributed {
        let host = self.scenery.host();
        let scene =
            Scene { host: &host, registry: &self.registry, parts: &parts, units: &self.units, accept_titles: self.accept_titles };
        self.attributor.attribute(scene, origin, self.now)
    }

    /// What is said of the connection that these processes hold.
    fn held_by(&mut self, pids: &[u32]) -> Attributed {
        for pid in pids {
            self.scenery.hold(*pid, 3, INODE);
        }
        self.ask(&ORIGIN)
    }
}

fn uuid(pid: u32) -> String {
    format!("01a20359-e6c5-7000-8000-{pid:012}")
}

fn claim(pid: u32) -> Claim {
    Claim {
        airflow: "3.3.2".into(),
        instance: uuid(pid),
        dag: format!("dag-{pid}"),
        task: "load".into(),
        run: "manual__1".into(),
        try_number: 1,
        map_index: -1,
        supervisor: Supervisor::Task,
    }
}

fn dag(attributed: &Attributed) -> Option<&str> {
    match &attributed.who {
        Who::Task(task) => Some(&task.dag),
        Who::Component(_) | Who::Stranger(_) => None,
    }
}

fn component(attributed: &Attributed) -> Option<&str> {
    match &attributed.who {
        Who::Component(name) => Some(name),
        Who::Task(_) | Who::Stranger(_) => None,
    }
}

#[test]
fn a_tasks_child_speaks_for_the_task() {
    let mut stage = Stage::new();
    stage.register(12);
    stage.register(22);
    stage.scenery.play(in_unit(30, 22, "bash -c x"));
    stage.scenery.play(in_unit(31, 30, "psql"));
    let attributed = stage.held_by(&[31]);
    assert_eq!((dag(&attributed), attributed.tier), (Some("dag-22"), Tier::Ancestor));
    assert_eq!(attributed.registration.unwrap().process.pid, 22);
    assert!(attributed.why.is_none());
}

#[test]
fn holders_of_one_task_agree_and_of_two_do_not() {
    let mut stage = Stage::new();
    stage.register(12);
    stage.register(22);
    stage.scenery.play(in_unit(30, 12, "head"));
    let attributed = stage.held_by(&[12, 30]);
    assert_eq!(dag(&attributed), Some("dag-12"));
    let attributed = stage.held_by(&[22]);
    assert!(matches!(attributed.why, Some(Unattributed::Several)), "{attributed:?}");
    assert_eq!(attributed.tier, Tier::Unidentified);
}

#[test]
fn a_holder_who_is_nobody_spoils_the_others_claim() {
    let mut stage = Stage::new();
    stage.register(12);
    stage.scenery.play(actor(30, 1, "stranger"));
    stage.units = vec![Cgroup { id: 1, directory: stage.scenery.cgroups() }];
    let attributed = stage.held_by(&[12, 30]);
    assert!(matches!(attributed.why, Some(Unattributed::Several)), "{attributed:?}");
}

#[test]
fn the_cgroup_of_a_socket_needs_no_holder() {
    let mut stage = Stage::new();
    let hierarchy = Hierarchy::at(stage.scenery.cgroups());
    let setting = crate::airflow::cgroup::Setting::Auto;
    let place = crate::airflow::cgroup::Place::open(&setting, &stage.scenery.host(), Some(&hierarchy), true).unwrap();
    stage.registry = Registry::new(Some(place), Some(hierarchy));
    stage.register(12);
    let cgroup = stage.registry.registrations().next().unwrap().cgroup.clone().unwrap().id;
    let attributed = stage.ask(&Origin { cgroup, inode: 0, ..ORIGIN });
    assert_eq!((dag(&attributed), attributed.tier), (Some("dag-12"), Tier::Cgroup));

    // A daemon without parents, whose socket was made in a cgroup below.
    stage.scenery.play(actor(30, 1, "daemon").cgroup("/ringfence/task-12-120/deeper"));
    let attributed = stage.held_by(&[30]);
    assert_eq!((dag(&attributed), attributed.tier), (Some("dag-12"), Tier::Ancestor));
}

#[test]
fn the_worker_and_its_supervisors_are_the_component() {
    for pid in [10, 11, 21] {
        let mut stage = Stage::new();
        stage.register(12);
        let attributed = stage.held_by(&[pid]);
        assert_eq!((component(&attributed), attributed.tier), (Some("airflow-worker"), Tier::Component), "{pid}");
    }
}

#[test]
fn a_task_that_has_not_registered_is_not_its_worker() {
    let mut stage = Stage::new();
    let attributed = stage.held_by(&[12]);
    assert!(matches!(attributed.why, Some(Unattributed::Unregistered)), "{attributed:?}");
    let Who::Stranger(stranger) = &attributed.who else { panic!("{attributed:?}") };
    assert_eq!((stranger.uid, stranger.pid), (Some(1000), Some(12)));
    assert_eq!(&*stranger.command, format!("airflow worker -- {}", uuid(12)));
    assert_eq!(&*stranger.ancestry, "airflow < [celeryd: < /sbin/init");

    // Whatever it calls itself.
    let mut stage = Stage::new();
    stage.scenery.play(in_unit(12, 11, &format!("airflow supervisor: {UUID}")));
    assert!(matches!(stage.held_by(&[12]).why, Some(Unattributed::Unregistered)));
    let mut stage = Stage::new();
    stage.scenery.play(in_unit(11, 10, "[celeryd: celery@vm:ForkPoolWorker-1]"));
    stage.scenery.play(in_unit(12, 11, MAIN));
    assert!(matches!(stage.held_by(&[12]).why, Some(Unattributed::Unregistered)));
}

#[test]
fn an_orphan_in_the_workers_unit_is_not_the_worker() {
    let mut stage = Stage::new();
    stage.scenery.play(in_unit(30, 1, MAIN));
    let attributed = stage.held_by(&[30]);
    let text = attributed.why.as_ref().unwrap().to_string();
    assert_eq!(text, "its process is not believed to be `airflow-worker`: process 10 in its cgroup is, and is older");
    assert!(!attributed.why.unwrap().remedy().is_empty());

    // Nor any other part, though only the title of that is known.
    let mut stage = Stage::new();
    stage.scenery.play(actor(31, 1, "airflow triggerer").cgroup("/system.slice/airflow-worker"));
    stage.scenery.play(actor(9, 1, "airflow scheduler").cgroup("/system.slice/airflow-worker"));
    let by_title = |facts: &ProcessFacts| {
        let name = facts.title.strip_prefix("airflow ").filter(|name| ["triggerer", "scheduler"].contains(name))?;
        Some(Part { name: name.into(), runs_tasks: name == "scheduler" })
    };
    stage.scenery.hold(31, 3, INODE);
    let host = stage.scenery.host();
    let scene = Scene { host: &host, registry: &stage.registry, parts: &by_title, units: &[], accept_titles: false };
    let attributed = stage.attributor.attribute(scene, &ORIGIN, stage.now);
    assert!(matches!(attributed.why, Some(Unattributed::Usurped { .. })), "{attributed:?}");
}

#[test]
fn a_chain_too_deep_hides_no_task() {
    let mut stage = Stage::new();
    stage.register(12);
    stage.scenery.play(in_unit(30, 12, "sh"));
    for pid in 31..130 {
        stage.scenery.play(in_unit(pid, pid - 1, "sh"));
    }
    let attributed = stage.held_by(&[129]);
    assert!(matches!(attributed.why, Some(Unattributed::Lineage)), "{attributed:?}");
}

#[test]
fn a_process_of_no_unit_is_found_by_its_user() {
    let mut stage = Stage::new();
    stage.scenery.play(actor(30, 1, "airflow triggerer"));
    let attributed = stage.held_by(&[30]);
    assert_eq!(component(&attributed), Some("airflow-triggerer"));
    assert_eq!(stage.attributor.recent.front().map(|process| process.pid), Some(30), "and at once the next time");
    stage.scenery.play(actor(31, 1, "nc").user(7));
    stage.scenery.hold(31, 3, 99);
    let attributed = stage.ask(&Origin { uid: 7, inode: 99, ..ORIGIN });
    assert!(matches!(attributed.why, Some(Unattributed::Nobody)), "{attributed:?}");
    let attributed = stage.ask(&Origin { uid: 8, inode: 99, ..ORIGIN });
    assert!(matches!(attributed.why, Some(Unattributed::Gone)), "another user's socket is not looked for here");
}

#[test]
fn the_highest_title_counts_where_titles_are_accepted() {
    let supervisor =
        |dag: &str| format!("airflow task supervisor: ['airflow', 'tasks', 'run', '{dag}', 't', 'r', '--map-index', '2']");
    for accept_titles in [true, false] {
        let mut stage = Stage::new();
        stage.accept_titles = accept_titles;
        stage.scenery.play(in_unit(11, 10, "[celeryd: celery@vm:ForkPoolWorker-1]"));
        stage.scenery.play(in_unit(12, 11, &supervisor("true")));
        stage.scenery.play(in_unit(30, 12, "airflow task runner: true t r 1"));
        stage.scenery.play(in_unit(31, 30, &supervisor("forged")));
        let attributed = stage.held_by(&[31]);
        if accept_titles {
            assert_eq!((dag(&attributed), attributed.tier), (Some("true"), Tier::Title));
            let Who::Task(task) = &attributed.who else { panic!("{attributed:?}") };
            assert_eq!((task.map_index, task.try_number), (2, 0));
        } else {
            assert!(matches!(attributed.why, Some(Unattributed::Unregistered)));
        }
    }
    let mut stage = Stage::new();
    stage.accept_titles = true;
    stage.scenery.play(actor(30, 1, &supervisor("forged")));
    assert!(matches!(stage.held_by(&[30]).why, Some(Unattributed::Nobody)), "no worker is above it");
}

#[test]
fn a_unix_client_is_known_by_its_pid() {
    let mut stage = Stage::new();
    stage.register(12);
    let origin = Origin { pid: Some(12), inode: 0, ..ORIGIN };
    assert_eq!(dag(&stage.ask(&origin)), Some("dag-12"));
    let attributed = stage.ask(&Origin { uid: 7, ..origin });
    assert!(matches!(attributed.why, Some(Unattributed::Gone)), "its pid is another user's now");
}

#[test]
fn a_client_that_is_gone_is_nobody() {
    let mut stage = Stage::new();
    stage.register(12);
    for origin in [Origin { inode: 0, ..ORIGIN }, ORIGIN, Origin { pid: Some(99), ..ORIGIN }] {
        assert!(matches!(stage.ask(&origin).why, Some(Unattributed::Gone)));
    }
}

#[test]
fn a_flood_of_questions_is_not_searched() {
    let mut stage = Stage::new();
    while !matches!(stage.ask(&ORIGIN).why, Some(Unattributed::TooMany)) {}
    stage.scenery.play(actor(30, 1, "airflow triggerer").user(7));
    stage.scenery.hold(30, 3, 99);
    let other = Origin { uid: 7, inode: 99, ..ORIGIN };
    assert_eq!(component(&stage.ask(&other)), Some("airflow-triggerer"), "other users are not held up");
    stage.now += Duration::from_secs(1);
    assert!(matches!(stage.ask(&ORIGIN).why, Some(Unattributed::Gone)));
}

#[test]
fn a_storm_of_supervisors_is_held_up_by_no_bound() {
    let mut stage = Stage::new();
    stage.scenery.hold(11, 3, INODE);
    for _ in 0..1_000 {
        assert_eq!(component(&stage.ask(&ORIGIN)), Some("airflow-worker"));
    }
}

#[test]
fn a_real_socket_of_this_process_is_found() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let link = std::fs::read_link(format!("/proc/self/fd/{}", client.as_raw_fd())).unwrap();
    let inode = link.to_str().unwrap().trim_start_matches("socket:[").trim_end_matches(']').parse().unwrap();
    let host = Host::default();
    let own = std::process::id();
    let parts = |facts: &ProcessFacts| (facts.process.pid == own).then(|| Part { name: "tests".into(), runs_tasks: false });
    let registry = Registry::new(None, None);
    let scene = Scene { host: &host, registry: &registry, parts: &parts, units: &[], accept_titles: false };
    let uid = host.facts(own).unwrap().unwrap().uid;
    let attributed = Attributor::new(None).attribute(scene, &Origin { uid, inode, cgroup: 0, pid: None }, Instant::now());
    assert_eq!(component(&attributed), Some("tests"), "{attributed:?}");
}

/// Reads a line, then leaves a daemon behind that connects.
const DAEMON: &str = "read go; bash -c 'exec 3<>/dev/tcp/127.0.0.1/'$go'; sleep 60' & exit";

#[test]
fn a_real_daemon_without_parents_is_still_its_task() {
    let (host, place) = (Host::default(), real_place("daemon"));
    let directory = place.directory().to_owned();
    let own = std::process::id();
    let parts = |facts: &ProcessFacts| (facts.process.pid == own).then(|| Part { name: "tests".into(), runs_tasks: true });
    let mut child = Command::new("bash").args(["-c", DAEMON]).stdin(Stdio::piped()).spawn().unwrap();
    let mut registry = Registry::new(Some(place), Hierarchy::find(&host).unwrap());
    let uid = host.facts(own).unwrap().unwrap().uid;
    let peer = Peer { pid: child.id(), uid };
    let registration = registry.register(&host, &parts, peer, &claim(child.id()), Instant::now()).unwrap().registration;
    let cgroup = registration.cgroup.clone().expect("these tests need a writable cgroup v2 hierarchy");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = listener.local_addr().unwrap();
    child.stdin.take().unwrap().write_all(format!("{}\n", server.port()).as_bytes()).unwrap();
    let (_accepted, client) = listener.accept().unwrap();
    child.wait().unwrap();
    assert_eq!(registry.ended(registration.process), None, "its daemon is left");
    let SocketOwner { uid, inode, cgroup: id, pid } = SocketDiag::open().unwrap().owner(client, server).unwrap();
    assert_eq!(id, cgroup.id, "the kernel names the socket by the cgroup's inode number");

    let mut attributor = Attributor::new(None);
    let scene = Scene { host: &host, registry: &registry, parts: &parts, units: &[], accept_titles: false };
    let by_cgroup = attributor.attribute(scene, &Origin { uid, inode, cgroup: id, pid }, Instant::now());
    assert_eq!((dag(&by_cgroup), by_cgroup.tier), (Some(&*registration.task.dag), Tier::Cgroup));
    let by_holder = attributor.attribute(scene, &Origin { uid, inode, cgroup: 0, pid }, Instant::now());
    assert_eq!((dag(&by_holder), by_holder.tier), (Some(&*registration.task.dag), Tier::Ancestor));

    end_all(&cgroup);
    while registry.emptied(cgroup.id).is_none() {
        std::thread::yield_now();
    }
    assert_eq!(registry.len(), 0);
    std::fs::remove_dir(directory).unwrap();
}
