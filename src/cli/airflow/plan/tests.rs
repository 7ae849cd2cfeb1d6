//! Plans of hosts: who carries which listener, and what is refused.

use super::*;

fn deployment(release: Release, executor: Executor) -> Deployment {
    let text = |text: &str| text.to_owned();
    Deployment {
        name: text("airflow"),
        release,
        executor,
        database: text("postgres"),
        broker: text("redis"),
        result_backend: text("postgres"),
    }
}

fn wishes(roles: &[Role]) -> Wishes {
    Wishes {
        deployment: deployment(Release::Three, Executor::Celery),
        roles: roles.to_vec(),
        extras: Vec::new(),
        log_hosts: Vec::new(),
        units: Vec::new(),
        port_base: PORT_BASE,
    }
}

fn upstreams(service: &Service) -> Vec<(&str, u16)> {
    service.upstreams.iter().map(|upstream| (upstream.service.as_str(), upstream.bind.port())).collect()
}

fn refused(wishes: Wishes) -> String {
    Plan::new(wishes).expect_err("refused").0
}

#[test]
fn a_role_alone_has_the_same_ports_as_beside_others() {
    let all = Plan::new(wishes(&Role::ALL)).expect("planned");
    for role in Role::ALL {
        let alone = Plan::new(wishes(&[role])).expect("planned");
        let beside = all.services.iter().find(|service| service.role == role).expect("has it");
        assert_eq!(alone.services[0].public_port, beside.public_port);
        for (need, port) in &alone.ports {
            assert_eq!(all.ports[need], *port, "{role:?} {need:?}");
        }
    }
}

#[test]
fn each_need_has_one_listener_a_host() {
    let plan = Plan::new(wishes(&[Role::Worker, Role::Scheduler])).expect("planned");
    assert_eq!(plan.roles, [Role::Scheduler, Role::Worker], "whatever the order of the flags");
    assert_eq!(upstreams(&plan.services[0]), [("postgres", 22_010), ("redis", 22_011)]);
    assert_eq!(upstreams(&plan.services[1]), [("airflow-api-server", 22_013)]);
    assert_eq!(plan.ports[&Need::ResultBackend], 22_010, "it is the database's own server");
}

#[test]
fn a_result_backend_of_its_own_keeps_workers_off_the_database() {
    let mut wishes = wishes(&[Role::Worker]);
    wishes.deployment.result_backend = "airflow-results".into();
    let plan = Plan::new(wishes).expect("planned");
    let expected = [("redis", 22_011), ("airflow-results", 22_012), ("airflow-api-server", 22_013)];
    assert_eq!(upstreams(&plan.services[0]), expected);
}

#[test]
fn tasks_find_their_upstreams_where_they_run() {
    let extra = Extra::parse("warehouse:25435:postgres").expect("valid");
    let plan = Plan::new(Wishes { extras: vec![extra.clone()], ..wishes(&[Role::Scheduler, Role::Worker]) }).expect("planned");
    assert!(upstreams(&plan.services[1]).contains(&("warehouse", 25_435)));
    let error = refused(Wishes { extras: vec![extra], ..wishes(&[Role::DagProcessor]) });
    assert!(error.contains("-upstream warehouse") && error.contains("add the role"), "{error}");
}

#[test]
fn triggers_lease_at_one_port_where_airflow_tells_whose_they_are() {
    let plan = |wishes| Plan::new(wishes).expect("planned");
    assert_eq!(plan(wishes(&[Role::Triggerer])).lease_port, Some(22_015));
    assert_eq!(plan(wishes(&Role::ALL)).lease_port, Some(22_015));
    assert_eq!(plan(Wishes { port_base: 23_000, ..wishes(&[Role::Triggerer]) }).lease_port, Some(23_015));
    assert_eq!(plan(wishes(&[Role::Worker])).lease_port, None);
    let two = Wishes { deployment: deployment(Release::Two, Executor::Celery), ..wishes(&[Role::Triggerer]) };
    assert_eq!(plan(two).lease_port, None, "triggers of Airflow 2 do not know their tasks");
    let extra = Extra::parse("warehouse:22015").expect("valid");
    let error = refused(Wishes { extras: vec![extra], ..wishes(&[Role::Triggerer]) });
    assert!(error.contains("leased addresses") && error.contains("127.0.0.1:22015"), "{error}");
}

#[test]
fn logs_are_fetched_from_the_host_that_has_them() {
    let log_host = LogHost::parse("W1.example.com").expect("valid");
    let plan = Plan::new(Wishes { log_hosts: vec![log_host.clone()], ..wishes(&[Role::Worker]) }).expect("planned");
    let service = plan.services.last().expect("a service");
    assert_eq!(
        (service.name.as_str(), service.app_port, service.public_port),
        ("airflow-worker-logs-w1-example-com", Some(8_793), 22_005)
    );
    let trigger = LogHost::parse("t1:triggerer").expect("valid");
    let plan = Plan::new(Wishes { log_hosts: vec![log_host.clone(), trigger], ..wishes(&[Role::ApiServer]) }).expect("planned");
    let binds: Vec<_> = plan.services[0].upstreams.iter().skip(1).map(|upstream| upstream.bind.to_string()).collect();
    assert_eq!(binds, ["127.0.87.1:8793", "127.0.87.2:8794"]);
    let error = refused(Wishes { log_hosts: vec![log_host.clone()], ..wishes(&[Role::ApiServer, Role::Worker]) });
    assert!(error.contains("leave the flag out"), "{error}");
    let error = refused(Wishes { log_hosts: vec![log_host], ..wishes(&[Role::Scheduler]) });
    assert!(error.contains("neither the role worker nor api-server"), "{error}");
}

#[test]
fn what_cannot_be_planned_names_the_flag() {
    assert!(refused(wishes(&[])).contains("-role scheduler"));
    let local = Wishes { deployment: deployment(Release::Three, Executor::Local), ..wishes(&[Role::Worker]) };
    assert!(refused(local).contains("-executor local"));
    for base in [80, 21_000, 20_990, 21_755, 32_760, 65_530, 8_070, 8_785] {
        let error = refused(Wishes { port_base: base, ..wishes(&[Role::Worker]) });
        assert!(error.starts_with(&format!("-port-base {base}: ")) && error.contains("22000"), "{error}");
    }
    let mut long = wishes(&[Role::Worker]);
    long.deployment.name = "x".repeat(60);
    assert!(refused(long).contains("-deployment xxx"));
    let twice = ["a:25000", "b:25000"].map(|text| Extra::parse(text).expect("valid")).to_vec();
    let error = refused(Wishes { extras: twice, ..wishes(&[Role::Worker]) });
    assert!(error.contains("127.0.0.1:25000") && error.contains("change the port of -upstream"), "{error}");
    let error = refused(Wishes { units: vec![(Role::Worker, "w.service".into())], ..wishes(&[Role::Scheduler]) });
    assert!(error.contains("-unit worker=w.service"), "{error}");
}

#[test]
fn the_web_server_of_airflow_2_has_its_own_name() {
    let plan = Plan::new(Wishes { deployment: deployment(Release::Two, Executor::Celery), ..wishes(&[Role::ApiServer]) })
        .expect("planned");
    assert_eq!(plan.services[0].name, "airflow-webserver");
    assert_eq!(plan.units[&Role::ApiServer], "airflow-webserver.service");
}
