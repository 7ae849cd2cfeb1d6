//! Midnight: 300 tasks of 50 DAGs start within two seconds, each under an identity that was never used before. Whoever is
//! allowed gets through, whoever is denied is denied and named, and nothing is lost.

mod support;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::airflow::Host;
use support::{Agent, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, wait_for};

const RULES: &str = r#"
[[component]]
name = "airflow-scheduler"
user = "root"
title = "airflow scheduler*"

[[rule]]
identity = "airflow-${dag}"
dag = ["dag_*"]
max_identities = 50
"#;

const TASKS: usize = 300;
const DAGS: usize = 50;
/// The last DAGs have no intention.
const DENIED_DAGS: usize = 5;

#[test]
fn three_hundred_tasks_over_fifty_identities() {
    let (mesh, app, upstream) = (Agent::start(), Echo::start(), ports::free_address());
    mesh.register(&Definition::new("warehouse").app(app.address));
    mesh.register(&Definition::new("airflow-worker").upstream("warehouse", upstream));
    let host = Host::new(RULES);
    let warehouse = Sidecar::start(&mesh, "warehouse");
    let rules = host.rules();
    let sidecar = Sidecar::of("airflow-worker").workers(2).arguments(&["-airflow", rules.to_str().expect("text")]).start(&mesh);
    sidecar.wait_endpoint();
    // A name that a template had to change has a mark of its own: ask for each.
    for dag in 0..DAGS - DENIED_DAGS {
        mesh.allow(&identity_of(&host, &format!("dag_{dag}")), "warehouse");
    }

    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/airflow/storm.py");
    let mut storm = Command::new("/usr/bin/python3");
    // The argument makes room for titles.
    storm.arg(source).arg("-".repeat(100)).env("TASKS", TASKS.to_string()).env("DAGS", DAGS.to_string()).env("SECONDS", "2");
    storm.env("REGISTRATION", host.socket()).env("PORT", upstream.port().to_string()).stdin(Stdio::null());
    let output = storm.output().expect("python3 runs: run scripts/setup");
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complained.is_empty(), "{complained}");

    let said = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("a line")).collect();
    assert_eq!(lines.len(), TASKS);
    for line in &lines {
        let denied = line["number"].as_u64().expect("a number") as usize % DAGS >= DAGS - DENIED_DAGS;
        assert_eq!(line["registered"]["ok"], true, "{line}");
        assert_eq!(line["answer"] == "hello", !denied, "{line}\n{}", sidecar.process.tail());
    }
    for what in ["register_ms", "first_byte_ms"] {
        let mut times: Vec<f64> = lines.iter().filter_map(|line| line[what].as_f64()).collect();
        times.sort_by(f64::total_cmp);
        println!("{what}: p50 {:.1}, p99 {:.1}, most {:.1}", times[TASKS / 2], times[TASKS * 99 / 100], times[TASKS - 1]);
    }

    let told = wait_for("a line for each task", PATIENCE, || {
        let mut told: BTreeMap<String, Value> = BTreeMap::new();
        for line in sidecar.connections() {
            told.insert(line["caller"]["task"].as_str().unwrap_or_default().to_owned(), line);
        }
        if told.len() == TASKS { Ok(told) } else { Err(format!("{} of {TASKS}", told.len())) }
    });
    for (number, line) in (0..TASKS).map(|number| (number, &told[&format!("t{number}")])) {
        assert_eq!(line["caller"]["dag"], format!("dag_{}", number % DAGS), "{line}");
        let denied = number % DAGS >= DAGS - DENIED_DAGS;
        assert_eq!(line["denial"].is_string(), denied, "{line}");
    }
    let seen: Vec<Value> = warehouse.connections();
    assert_eq!(seen.len(), TASKS - TASKS / DAGS * DENIED_DAGS, "only the allowed ones reached the far side");
}

/// The identity that the rules give a DAG.
fn identity_of(host: &Host, dag: &str) -> String {
    let answer = host.ask(&serde_json::json!({ "op": "explain", "dag": dag, "task": "t", "run": "scheduled__x" }));
    answer["explanation"]["identity"].as_str().unwrap_or_else(|| panic!("no identity: {answer}")).to_owned()
}
