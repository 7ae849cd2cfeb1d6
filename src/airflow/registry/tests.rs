//! Every rule of verification, and every way of passing for another task that the reference knows.

use std::fs;

use super::*;
use crate::airflow::process::ProcessFacts;
use crate::airflow::process::scenery::{Actor, BOOT, Scenery, actor};

const UUID: &str = "01a20359-e6c5-7000-8000-000000000001";
const OTHER_UUID: &str = "01a20359-e6c5-7000-8000-000000000002";
const UNIT: &str = "/system.slice/airflow-worker.service";
const MAIN: &str = "[celeryd: celery@vm:MainProcess] -active- (celery worker -c 2)";

/// The worker by its unit, the triggerer by its title.
fn parts(facts: &ProcessFacts) -> Option<Part> {
    if facts.cgroup.starts_with(UNIT) {
        return Some(Part { name: "airflow-worker".into(), runs_tasks: true });
    }
    facts.title.starts_with("airflow triggerer").then(|| Part { name: "airflow-triggerer".into(), runs_tasks: false })
}

fn claim() -> Claim {
    Claim {
        airflow: "3.3.2".into(),
        instance: UUID.into(),
        dag: "payroll".into(),
        task: "load".into(),
        run: "manual__1".into(),
        try_number: 1,
        map_index: -1,
        supervisor: Supervisor::Task,
    }
}

fn in_unit(pid: u32, parent: u32, title: &str) -> Actor {
    actor(pid, parent, title).cgroup(UNIT)
}

/// systemd > celery main 10 > supervisor 11 > task 12, as Airflow 3.3 has it.
fn airflow_3() -> Scenery {
    let scenery = Scenery::new();
    scenery.play(in_unit(10, 1, MAIN));
    scenery.play(in_unit(11, 10, &format!("airflow supervisor: {UUID}")));
    scenery.play(in_unit(12, 11, &format!("airflow worker -- {UUID}")));
    scenery
}

/// systemd > celery main 10 > pool 11 > supervisor 12, as Airflow 2 has it.
fn airflow_2() -> Scenery {
    let scenery = Scenery::new();
    scenery.play(in_unit(10, 1, MAIN));
    scenery.play(in_unit(11, 10, "[celeryd: celery@vm:ForkPoolWorker-2]"));
    let title = "airflow task supervisor: ['airflow', 'tasks', 'run', 'payroll', 'load', 'manual__1', '--local']";
    scenery.play(in_unit(12, 11, "x"));
    scenery.scrawl(12, "cmdline", title.as_bytes());
    scenery
}

fn registry(scenery: &Scenery) -> Registry {
    Registry::new(None, Some(Hierarchy::at(scenery.cgroups())))
}

fn ask(registry: &mut Registry, scenery: &Scenery, pid: u32, claim: &Claim) -> Result<Registered, RegisterError> {
    let uid = scenery.host().facts(pid).unwrap().map_or(1000, |facts| facts.uid);
    registry.register(&scenery.host(), &parts, Peer { pid, uid }, claim, Instant::now())
}

#[test]
fn a_task_below_its_supervisor_is_registered() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    let registered = ask(&mut registry, &scenery, 12, &claim()).unwrap();
    assert!(!registered.again);
    assert_eq!(registered.registration.tier(), Tier::Ancestor);
    assert_eq!((&*registered.registration.task.dag, registered.registration.uid), ("payroll", 1000));
    assert!(registry.by_process(Process { pid: 12, start_ticks: 120 }).is_some());
    assert!(ask(&mut registry, &scenery, 12, &claim()).unwrap().again, "its answer was lost");
    assert_eq!(registry.len(), 1);
}

#[test]
fn a_registered_task_cannot_become_another() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    ask(&mut registry, &scenery, 12, &claim()).unwrap();
    let others = [
        Claim { dag: "other".into(), ..claim() },
        Claim { try_number: 2, ..claim() },
        Claim { map_index: 0, ..claim() },
        Claim { instance: OTHER_UUID.into(), ..claim() },
    ];
    for other in &others {
        let error = ask(&mut registry, &scenery, 12, other).unwrap_err();
        assert!(error.to_string().contains("registered as payroll.load of manual__1, try 1"), "{error}");
    }
    assert_eq!(&*registry.by_process(Process { pid: 12, start_ticks: 120 }).unwrap().task.dag, "payroll");
}

#[test]
fn a_child_with_forged_titles_stays_its_parents_task() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    ask(&mut registry, &scenery, 12, &claim()).unwrap();
    scenery.play(in_unit(13, 12, &format!("airflow supervisor: {OTHER_UUID}")));
    scenery.play(in_unit(14, 13, &format!("airflow worker -- {OTHER_UUID}")));
    let forged = Claim { instance: OTHER_UUID.into(), dag: "victim".into(), ..claim() };
    assert!(matches!(ask(&mut registry, &scenery, 14, &forged), Err(RegisterError::Other { pid: 14, .. })));
}

#[test]
fn an_orphan_with_forged_titles_is_not_believed() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    ask(&mut registry, &scenery, 12, &claim()).unwrap();
    // Double fork: the unit's cgroup stays, the parents are gone. The registration may have ended meanwhile.
    registry.ended(Process { pid: 12, start_ticks: 120 });
    scenery.play(in_unit(20, 1, MAIN));
    scenery.play(in_unit(21, 20, &format!("airflow supervisor: {OTHER_UUID}")));
    scenery.play(in_unit(22, 21, &format!("airflow worker -- {OTHER_UUID}")));
    let forged = Claim { instance: OTHER_UUID.into(), dag: "victim".into(), ..claim() };
    let error = ask(&mut registry, &scenery, 22, &forged).unwrap_err();
    assert!(error.to_string().contains("process 20 above process 22 is not believed to be `airflow-worker`"), "{error}");
    assert!(ask(&mut registry, &scenery, 22, &forged).is_err(), "nor the second time");
}

#[test]
fn a_restarted_worker_is_believed_once_the_old_one_is_gone() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    scenery.play(in_unit(20, 1, MAIN));
    scenery.play(in_unit(21, 20, &format!("airflow supervisor: {UUID}")));
    assert!(matches!(ask(&mut registry, &scenery, 21, &claim()), Err(RegisterError::Usurped { .. })));
    for pid in [12, 11, 10] {
        scenery.end(pid);
    }
    assert!(ask(&mut registry, &scenery, 21, &claim()).is_ok());
}

#[test]
fn two_workers_of_one_shell_are_both_believed() {
    let scenery = Scenery::new();
    scenery.play(actor(5, 1, "bash"));
    for (root, task) in [(10, 11), (20, 21)] {
        scenery.play(in_unit(root, 5, MAIN));
        scenery.play(in_unit(task, root, &format!("airflow worker -- {UUID}")));
    }
    let mut registry = registry(&scenery);
    assert!(ask(&mut registry, &scenery, 11, &claim()).is_ok());
    assert!(ask(&mut registry, &scenery, 21, &claim()).is_ok());
}

#[test]
fn a_worker_that_is_the_first_process_is_believed() {
    let scenery = airflow_3();
    scenery.play(in_unit(1, 0, MAIN).started(1));
    for pid in [10, 11, 12] {
        scenery.end(pid);
    }
    scenery.play(in_unit(20, 1, &format!("airflow supervisor: {UUID}")));
    scenery.play(in_unit(21, 20, &format!("airflow worker -- {UUID}")));
    assert!(ask(&mut registry(&scenery), &scenery, 21, &claim()).is_ok());
}

#[test]
fn an_orphan_in_a_tasks_cgroup_stays_that_task() {
    let scenery = airflow_3();
    let hierarchy = Hierarchy::at(scenery.cgroups());
    let setting = crate::airflow::cgroup::Setting::Auto;
    let place = Place::open(&setting, &scenery.host(), Some(&hierarchy), true).unwrap();
    let mut registry = Registry::new(Some(place), Some(hierarchy));
    let registered = ask(&mut registry, &scenery, 12, &claim()).unwrap();
    assert_eq!(registered.registration.tier(), Tier::Cgroup);
    let cgroup = registered.registration.cgroup.as_ref().unwrap();
    assert_eq!(fs::read_to_string(cgroup.directory.join("cgroup.procs")).unwrap(), "12");
    assert_eq!(registry.by_cgroup(cgroup.id), Some(&registered.registration));

    scenery.play(actor(20, 1, MAIN).cgroup("/ringfence/task-12-120"));
    scenery.play(actor(21, 20, &format!("airflow supervisor: {OTHER_UUID}")).cgroup("/ringfence/task-12-120/deeper"));
    let forged = Claim { instance: OTHER_UUID.into(), ..claim() };
    assert!(matches!(ask(&mut registry, &scenery, 21, &forged), Err(RegisterError::Other { .. })));
    assert!(ask(&mut registry, &scenery, 21, &claim()).unwrap().again, "it is what it is");

    assert_eq!(registry.ended(Process { pid: 12, start_ticks: 120 }), None, "others are left in the cgroup");
    assert!(registry.by_cgroup(cgroup.id).unwrap().has_ended);
    scenery.play(actor(30, 1, "left over").cgroup("/ringfence/task-99-990"));
    assert!(matches!(ask(&mut registry, &scenery, 30, &claim()), Err(RegisterError::Forgotten { .. })));
}

#[test]
fn a_pid_given_out_again_inherits_nothing() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    ask(&mut registry, &scenery, 12, &claim()).unwrap();
    scenery.play(actor(12, 1, "somebody else").started(9_000));
    let chain = scenery.host().chain(12).unwrap().unwrap();
    assert_eq!(registry.member(&chain), Membership::None);
    assert!(matches!(ask(&mut registry, &scenery, 12, &claim()), Err(RegisterError::NoRoot { .. })));
}

#[test]
fn the_same_try_after_sudo_updates_the_user() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    ask(&mut registry, &scenery, 12, &claim()).unwrap();
    scenery.play(in_unit(13, 12, "sudo -E -H -u etl python -c x").user(0));
    scenery.play(in_unit(14, 13, &format!("airflow worker -- {UUID}")).user(2_000));
    let registered = ask(&mut registry, &scenery, 14, &claim()).unwrap();
    assert!(registered.again);
    assert_eq!((registered.registration.process.pid, registered.registration.uid), (12, 2_000));
    assert_eq!(registry.len(), 1);
    assert_eq!(registry.registrations().next().unwrap().uid, 2_000);
}

#[test]
fn a_supervisor_of_another_task_refuses() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    for instance in [OTHER_UUID, ""] {
        let other = Claim { instance: instance.into(), ..claim() };
        let error = ask(&mut registry, &scenery, 12, &other).unwrap_err().to_string();
        assert!(error.contains(&format!("process 11 above it supervises task instance {UUID}")), "{error}");
    }
    let upper = Claim { instance: UUID.to_uppercase(), ..claim() };
    assert!(ask(&mut registry, &scenery, 12, &upper).is_ok(), "letters' case is no difference");
}

#[test]
fn celery_of_airflow_3_0_names_no_task_and_is_accepted() {
    let scenery = Scenery::new();
    scenery.play(in_unit(10, 1, MAIN));
    scenery.play(in_unit(11, 10, "[celeryd: celery@vm:ForkPoolWorker-1]"));
    scenery.play(in_unit(12, 11, &format!("airflow worker -- {UUID}")));
    assert!(ask(&mut registry(&scenery), &scenery, 12, &claim()).is_ok());
}

#[test]
fn who_has_no_worker_above_is_refused() {
    let scenery = Scenery::new();
    scenery.play(actor(10, 1, "sshd"));
    scenery.play(actor(11, 10, &format!("airflow supervisor: {UUID}")));
    scenery.play(in_unit(12, 11, MAIN));
    scenery.play(actor(20, 1, "airflow triggerer"));
    scenery.play(actor(21, 20, "airflow triggerer"));
    let mut registry = registry(&scenery);
    let error = ask(&mut registry, &scenery, 12, &claim()).unwrap_err();
    assert!(error.to_string().ends_with("its parents are: airflow < sshd < /sbin/init"), "{error}");
    assert!(error.remedy().contains("[[component]]"));
    assert!(matches!(ask(&mut registry, &scenery, 21, &claim()), Err(RegisterError::NoRoot { .. })), "it runs no tasks");
}

#[test]
fn code_of_a_dag_file_that_is_parsed_is_no_task() {
    let scenery = Scenery::new();
    scenery.play(in_unit(10, 1, "airflow scheduler"));
    scenery.play(in_unit(11, 10, "airflow scheduler -- DagFileProcessorManager"));
    scenery.play(in_unit(12, 11, &format!("airflow worker -- {UUID}")));
    assert!(matches!(ask(&mut registry(&scenery), &scenery, 12, &claim()), Err(RegisterError::Parser { .. })));
}

#[test]
fn a_supervisor_registers_itself_by_its_title() {
    let scenery = airflow_2();
    let mut registry = registry(&scenery);
    let itself = Claim { supervisor: Supervisor::Itself, instance: String::new(), airflow: "2.11.2".into(), ..claim() };
    for other in [Claim { dag: "victim".into(), ..itself.clone() }, Claim { map_index: 4, ..itself.clone() }] {
        let error = ask(&mut registry, &scenery, 12, &other).unwrap_err().to_string();
        assert!(error.contains("but its title is \"airflow task supervisor: "), "{error}");
    }
    ask(&mut registry, &scenery, 12, &itself).unwrap();
    scenery.play(in_unit(13, 12, "airflow task runner: payroll load manual__1 3"));
    assert!(ask(&mut registry, &scenery, 13, &Claim { supervisor: Supervisor::Task, ..itself }).unwrap().again);
}

#[test]
fn a_runner_cannot_claim_more_than_its_supervisors_title() {
    let scenery = airflow_2();
    scenery.play(in_unit(13, 12, "airflow task runner: victim load manual__1 3"));
    let forged = Claim { dag: "victim".into(), instance: String::new(), ..claim() };
    let error = ask(&mut registry(&scenery), &scenery, 13, &forged).unwrap_err().to_string();
    assert!(error.contains("supervises payroll.load of manual__1"), "{error}");
}

#[test]
fn a_connection_of_another_user_is_refused() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    let peer = Peer { pid: 12, uid: 33 };
    let error = registry.register(&scenery.host(), &parts, peer, &claim(), Instant::now()).unwrap_err();
    assert!(matches!(error, RegisterError::User { pid: 12, connected: 33, now: 1000 }));
    assert!(matches!(ask(&mut registry, &scenery, 99, &claim()), Err(RegisterError::Gone { pid: 99 })));
}

#[test]
fn a_chain_too_deep_is_refused() {
    let scenery = airflow_3();
    for pid in 13..100 {
        scenery.play(in_unit(pid, pid - 1, "sh"));
    }
    assert!(matches!(ask(&mut registry(&scenery), &scenery, 99, &claim()), Err(RegisterError::Lineage { pid: 99 })));
}

#[test]
fn a_flood_of_registrations_is_refused() {
    let scenery = airflow_3();
    // Nobody's child: of two users, and a task's.
    scenery.play(actor(7, 1, "sh").user(7));
    scenery.play(actor(8, 1, "sh").user(8));
    let mut registry = registry(&scenery);
    let process = ask(&mut registry, &scenery, 12, &claim()).unwrap().registration.process;
    let now = Instant::now();
    let mut register = |pid, uid| registry.register(&scenery.host(), &parts, Peer { pid, uid }, &claim(), now);
    assert!((0..1_000).all(|_| !matches!(register(7, 7), Ok(_) | Err(RegisterError::TooFast { .. }))));
    assert!(matches!(register(7, 7), Err(RegisterError::TooFast { uid: 7 })));
    assert!(!matches!(register(8, 8), Ok(_) | Err(RegisterError::TooFast { .. })), "others are not held up");
    let uid = registry_uid(&scenery, process.pid);
    assert!(
        (0..2_000).all(|_| register(process.pid, uid).is_ok_and(|known| known.again)),
        "a registered one costs the others nothing"
    );
}

fn registry_uid(scenery: &Scenery, pid: u32) -> u32 {
    scenery.host().facts(pid).unwrap().unwrap().uid
}

#[test]
fn the_end_of_a_process_ends_its_registration() {
    let scenery = airflow_3();
    let mut registry = registry(&scenery);
    let process = ask(&mut registry, &scenery, 12, &claim()).unwrap().registration.process;
    assert_eq!(registry.ended(Process { start_ticks: 1, ..process }), None);
    assert_eq!(registry.ended(process).map(|registration| registration.process), Some(process));
    assert_eq!((registry.len(), registry.ended(process)), (0, None));
}

#[test]
fn without_a_writable_cgroup_ancestry_counts() {
    let scenery = airflow_3();
    let hierarchy = Hierarchy::at(scenery.cgroups());
    let setting = crate::airflow::cgroup::Setting::Auto;
    let place = Place::open(&setting, &scenery.host(), Some(&hierarchy), true).unwrap();
    fs::remove_dir_all(scenery.cgroups()).unwrap();
    let mut registry = Registry::new(Some(place), None);
    let registered = ask(&mut registry, &scenery, 12, &claim()).unwrap();
    assert_eq!(registered.registration.tier(), Tier::Ancestor);
    assert!(registered.notice.unwrap().starts_with("no cgroup of its own: cannot write "));
}

#[test]
fn a_restart_finds_the_living_tasks_again() {
    let scenery = airflow_3();
    let path = scenery.cgroups().join("tasks.json");
    let setting = crate::airflow::cgroup::Setting::Auto;
    let hierarchy = Hierarchy::at(scenery.cgroups());
    let place = Place::open(&setting, &scenery.host(), Some(&hierarchy), true).unwrap();
    let start = || Registry::new(Some(place.clone()), Some(hierarchy.clone()));

    let mut first = start();
    assert_eq!(first.recover(&scenery.host(), &path).unwrap(), Recovered::default());
    let mut without_cgroup = |pid: u32| {
        scenery.play(in_unit(pid, 11, &format!("airflow worker -- {UUID}")));
        ask(&mut first, &scenery, pid, &claim()).unwrap().registration
    };
    let [alive, daemon, gone] = [without_cgroup(12), without_cgroup(13), without_cgroup(14)];
    for (registration, populated) in [(&alive, 1), (&daemon, 1), (&gone, 0)] {
        let events = registration.cgroup.as_ref().unwrap().directory.join("cgroup.events");
        fs::write(events, format!("populated {populated}\nfrozen 0\n")).unwrap();
    }
    scenery.end(13);
    scenery.end(14);
    // What the kernel would do when an empty directory is removed.
    fs::remove_dir_all(&gone.cgroup.as_ref().unwrap().directory).unwrap();

    let mut second = start();
    let recovered = second.recover(&scenery.host(), &path).unwrap();
    assert_eq!(recovered, Recovered { alive: 2, ended: 1, unknown: 0 });
    assert_eq!(second.by_process(alive.process), Some(&alive));
    assert!(second.by_process(daemon.process).unwrap().has_ended);
    assert_eq!(second.by_cgroup(daemon.cgroup.as_ref().unwrap().id).unwrap().process, daemon.process);
    assert!(fs::read_to_string(&path).unwrap().starts_with(&format!("{{\"boot\":\"{BOOT}\"}}\n")));
}
