//! `ringfence explain` and `ringfence top` against running admin ports: what a person reads, what a program reads, and how each
//! ends.

mod support;

#[path = "support/callers.rs"]
mod callers;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use callers::{Port, snapshot, stranger, task};
use serde_json::{Value, json};
use support::airflow::Host;
use support::{Agent, Definition, Echo, Mesh, Pair, Sidecar, traffic};

fn ringfence(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringfence")).args(arguments).env_clear().output().expect("the program runs")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Waits until the port has taken in what its worker sent.
fn settle(port: &Port) {
    let client = support::http::Client::new(port.address, None);
    client.get("/callers").ok("callers");
}

#[test]
fn a_denied_peer_of_a_real_sidecar_is_explained() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web, |db| db, |define| define).wait_open();
    pair.mesh.deny("web", "db");
    support::wait_until("web is denied", support::PATIENCE, || {
        traffic::round_trip(pair.upstream, b"let me in").is_err() && pair.db.closed("denied") > 0
    });
    let denials = pair.db.client().get("/denials").ok("denials").json();
    let id = denials["denials"].as_array().and_then(|list| list.iter().find(|line| line["reason"] == "denied"));
    let id = id.and_then(|line| line["denial"].as_str()).unwrap_or_else(|| panic!("no denial with an id: {denials}"));

    let admin = pair.db.admin.to_string();
    let shown = ringfence(&["explain", id, "-admin", &admin]);
    assert_eq!(shown.status.code(), Some(0), "{}", err(&shown));
    for wanted in ["/svc/web", "to           db", "intention web -> db deny", "consul intention create -replace -allow web db"] {
        assert!(out(&shown).contains(wanted), "{wanted} is not in\n{}", out(&shown));
    }
    let line: Value = serde_json::from_slice(&ringfence(&["explain", "-json", id, "-admin", &admin]).stdout).expect("JSON");
    assert_eq!(line["denial"], id);

    let top = ringfence(&["top", "-once", "-admin", &admin]);
    assert_eq!(top.status.code(), Some(0), "{}", err(&top));
    assert!(out(&top).contains("(comes in)"), "{}", out(&top));
}

#[test]
fn a_denied_task_is_explained_by_the_id_in_its_log() {
    let mut port = Port::start();
    let id = port.denied(task("payroll_daily", "load", "airflow-etl"), "warehouse", 7);
    let nameless = port.denied(stranger("psql \u{1b}[31m-h warehouse"), "warehouse", 8);
    settle(&port);
    let admin = port.address.to_string();
    let shown = out(&ringfence(&["explain", &format!("id={id}"), "-admin", &admin]));
    for wanted in [
        "who          task load of DAG payroll_daily, run manual__2026-11-24, try 1\n",
        "known by     cgroup\n",
        "rule         by-dag\n",
        "identity     airflow-etl\n",
        "decided by   intention airflow-etl -> warehouse deny (precedence 9)\n",
        "would allow  consul intention create -replace -allow airflow-etl warehouse\n",
    ] {
        assert!(shown.contains(wanted), "{wanted} is not in\n{shown}");
    }
    let shown = out(&ringfence(&["explain", &nameless, "-admin", &admin]));
    assert!(!shown.contains('\u{1b}') && shown.contains("nobody known opened it"), "{shown}");
}

#[test]
fn an_id_that_is_not_kept_and_a_port_that_is_not_there_say_what_to_do() {
    let port = Port::start();
    let missing = ringfence(&["explain", "0123456789abcdef", "-admin", &port.address.to_string()]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(err(&missing).contains("the last 1000 are") && err(&missing).contains("connection log"), "{}", err(&missing));

    let nobody = support::ports::free_address().to_string();
    for arguments in [&["explain", "0123456789abcdef", "-admin", &nobody][..], &["top", "-once", "-admin", &nobody]] {
        let output = ringfence(arguments);
        assert_eq!(output.status.code(), Some(69), "{}", err(&output));
        assert!(err(&output).contains(&nobody) && err(&output).contains("-admin-bind"), "{}", err(&output));
    }
    let output = ringfence(&["explain", "-dag", "d", "-task", "t", "-socket", "/nonexistent/x.sock"]);
    assert_eq!(output.status.code(), Some(69));
    assert!(err(&output).contains("/nonexistent/x.sock") && err(&output).contains("-airflow FILE"), "{}", err(&output));
    for (arguments, wanted) in [
        (&["explain"][..], "what is to be explained?"),
        (&["explain", "-dag", "d"], "-dag needs -task"),
        (&["explain", "xyz"], "16 hexadecimal digits"),
        (&["explain", "0123456789abcdef", "-to", "db"], "leave out"),
        (&["explain", "-tsak", "t"], "did you mean -task?"),
        (&["top", "-interval", "1ms"], "100ms"),
        (&["top", "-admin", "19000"], "write address:port"),
    ] {
        let output = ringfence(arguments);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", err(&output));
        assert!(err(&output).contains(wanted) && err(&output).trim_end().lines().count() == 1, "{arguments:?}: {}", err(&output));
    }
}

/// A registration socket that gives this identity, or none, and names the admin port.
fn door(path: &Path, identity: Option<&'static str>, admin: String) {
    let listener = UnixListener::bind(path).expect("binds");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|read| read > 0) {
                let question: Value = serde_json::from_str(&line).expect("one JSON object a line");
                let answer = answer(&question, identity, &admin);
                if (&stream).write_all(format!("{answer}\n").as_bytes()).is_err() {
                    break;
                }
                line.clear();
            }
        }
    });
}

fn answer(question: &Value, identity: Option<&str>, admin: &str) -> Value {
    assert_eq!(question["version"], 1);
    if question["op"] == "routes" {
        return json!({"ok": true, "routes": [], "admin": admin});
    }
    if question["dag"] == "unknown" {
        return json!({"ok": false, "error": "no such thing", "remedy": "do something else"});
    }
    let rule = json!({"rule": "payroll", "effect": "airflow-payroll", "trust": "platform", "matched": true, "failed": null, "fail_closed": null});
    json!({"ok": true, "explanation": {"dag": question["dag"], "task": question["task"], "winner": "payroll", "rules": [rule],
        "identity": identity, "denied": identity.map_or(Some("rule `payroll` denies it"), |_| None),
        "remedy": identity.map_or(Some("put a rule before it"), |_| None)}})
}

#[test]
fn what_a_task_would_meet_is_told_before_it_runs() {
    let mut port = Port::start();
    port.publish(snapshot(&["airflow-payroll"]));
    let folder = support::scratch();
    let socket = |name: &str| folder.path().join(name);
    for (name, identity) in [("allowed", Some("airflow-payroll")), ("denied", Some("airflow-etl")), ("nameless", None)] {
        door(&socket(name), identity, port.address.to_string());
    }
    let ask = |name: &str, more: &[&str]| {
        let path = socket(name).display().to_string();
        ringfence(&[&["explain", "-dag", "payroll_daily", "-task", "load", "-to", "warehouse", "-socket", &path], more].concat())
    };
    let allowed = ask("allowed", &[]);
    assert_eq!(allowed.status.code(), Some(0), "{}", err(&allowed));
    for wanted in [
        "=>   payroll",
        "rests on platform facts",
        "SPIFFE ID    spiffe://t.consul/ns/default/dc/dc1/svc/airflow-payroll",
        "leaf         serial 0a1b",
        "access       allowed: intention airflow-payroll -> warehouse allow (precedence 9)",
        "endpoints    10.0.0.9:20000  healthy",
        "would be let in",
    ] {
        assert!(out(&allowed).contains(wanted), "{wanted} is not in\n{}", out(&allowed));
    }

    let id = port.denied(task("payroll_daily", "load", "airflow-etl"), "warehouse", 3);
    settle(&port);
    let denied = ask("denied", &["-run", "manual__1"]);
    assert_eq!(denied.status.code(), Some(1), "{}", err(&denied));
    for wanted in [
        "fetched with the first connection",
        "access       denied: default policy deny",
        "would allow  consul intention create -replace -allow airflow-etl warehouse",
        &*id,
    ] {
        assert!(out(&denied).contains(wanted), "{wanted} is not in\n{}", out(&denied));
    }
    let machine: Value = serde_json::from_slice(&ask("denied", &["-json"]).stdout).expect("JSON");
    assert_eq!((&machine["verdict"], &machine["reach"]["decision"]), (&"denied".into(), &"denied".into()));
    assert_eq!(machine["last_denial"]["denial"], id);

    let nameless = ask("nameless", &[]);
    assert_eq!(nameless.status.code(), Some(1));
    assert!(out(&nameless).contains("put a rule before it"), "{}", out(&nameless));

    let path = socket("allowed").display().to_string();
    let refused = ringfence(&["explain", "-dag", "unknown", "-task", "t", "-socket", &path]);
    assert_eq!((refused.status.code(), err(&refused).contains("no such thing; do something else")), (Some(69), true));
}

/// An Airflow host with `payroll_*` under an identity that may call the warehouse, and `reports` under one that may not.
const RULES: &str = r#"
[[component]]
name = "airflow-scheduler"
user = "root"
title = "airflow scheduler*"

[[rule]]
name = "payroll"
identity = "airflow-payroll"
dag = ["payroll_*"]

[[rule]]
name = "reports"
identity = "airflow-reports"
dag = ["reports"]
"#;

#[test]
fn tasks_of_a_real_sidecar_are_explained_before_and_after() {
    let (mesh, app, upstream) = (Agent::start(), Echo::start(), support::ports::free_address());
    mesh.register(&Definition::new("warehouse").app(app.address));
    mesh.register(&Definition::new("airflow-worker").upstream("warehouse", upstream));
    mesh.allow("airflow-payroll", "warehouse");
    mesh.deny("*", "warehouse");
    let host = Host::new(RULES);
    let _warehouse = Sidecar::start(&mesh, "warehouse");
    let rules = host.rules().display().to_string();
    let sidecar = Sidecar::of("airflow-worker").arguments(&["-airflow", &rules]).start(&mesh);
    sidecar.wait_endpoint();

    let socket = host.socket().display().to_string();
    // The admin port is the one that the sidecar names at its socket.
    let ask = |dag: &str| ringfence(&["explain", "-dag", dag, "-task", "load", "-to", "warehouse", "-socket", &socket]);
    let allowed = support::wait_for("the upstream's intentions are known", support::PATIENCE, || {
        let allowed = ask("payroll_daily");
        if out(&allowed).contains("access       allowed") { Ok(out(&allowed)) } else { Err(out(&allowed) + &err(&allowed)) }
    });
    for wanted in [
        &*format!("The rules of {rules}"),
        "=>   payroll",
        "no   reports",
        "airflow-payroll -> warehouse allow",
        "would be let in",
    ] {
        assert!(allowed.contains(wanted), "{wanted} is not in\n{allowed}");
    }
    let denied = ask("reports");
    assert_eq!(denied.status.code(), Some(1), "{}", out(&denied));
    assert!(out(&denied).contains("consul intention create -replace -allow airflow-reports warehouse"), "{}", out(&denied));
    let unruled = ask("other");
    assert!(unruled.status.code() == Some(1) && out(&unruled).contains("identity     none"), "{}", out(&unruled));

    let said = host.task_calling(upstream, "register('payroll_daily', task='load'); say(echo(os.environ['PORT']))");
    assert_eq!(said[0], "hello");
    host.task_calling(upstream, "register('reports', task='load'); say(echo(os.environ['PORT']))");
    let line = sidecar.wait_connection("of reports", |line| line["caller"]["dag"] == "reports");
    let id = line["denial"].as_str().expect("an id");
    let admin = sidecar.admin.to_string();
    let shown = out(&ringfence(&["explain", id, "-admin", &admin]));
    assert!(shown.contains("who          task load of DAG reports, run ") && shown.contains("rule         reports\n"), "{shown}");
    assert!(out(&ask("reports")).contains(&format!("id {id}")), "the forecast names the last denial");

    // Log, tables and metrics tell the same.
    sidecar.wait_connection("of payroll", |line| line["caller"]["dag"] == "payroll_daily");
    let (lines, view, metrics) =
        (sidecar.connections(), sidecar.client().get("/callers").ok("callers").json(), sidecar.metrics());
    let sum = |list: &Value, key: &str| list.as_array().expect("a list").iter().filter_map(|row| row[key].as_u64()).sum::<u64>();
    let logged: Vec<&Value> = lines.iter().filter(|line| line.get("caller").is_some()).collect();
    for key in ["bytes_from_mesh", "bytes_to_mesh"] {
        assert_eq!(sum(&view["totals"], key), logged.iter().filter_map(|line| line[key].as_u64()).sum::<u64>(), "{key}: {view}");
    }
    assert_eq!((sum(&view["totals"], "connections"), sum(&view["totals"], "denied")), (logged.len() as u64, 1), "{view}");
    assert_eq!(metrics.sum("ringfence_caller_connections_total", &[]), logged.len() as u64);
    assert_eq!(metrics.sum("ringfence_caller_denied_total", &[("dag", "reports"), ("upstream", "warehouse")]), 1);
}

#[test]
fn top_prints_one_table_where_no_terminal_is() {
    let mut port = Port::start();
    port.closed(task("payroll_daily", "load", "airflow-payroll"), "warehouse");
    port.denied(stranger("psql"), "warehouse", 8);
    settle(&port);
    let admin = port.address.to_string();
    let top = ringfence(&["top", "-admin", &admin]);
    assert_eq!(top.status.code(), Some(0), "{}", err(&top));
    let shown = out(&top);
    let line = shown.lines().find(|line| line.starts_with("payroll_daily / load")).unwrap_or_else(|| panic!("no row: {shown}"));
    assert!(line.contains("airflow-payroll") && line.contains("warehouse") && line.contains("2.0 KiB"), "{line}");
    assert!(shown.lines().any(|line| line.starts_with("unidentified")) && !shown.contains('\u{1b}'), "{shown}");
}

#[test]
fn top_streams_json_with_rates_until_a_signal_ends_it() {
    let mut port = Port::start();
    port.closed(task("payroll_daily", "load", "airflow-payroll"), "warehouse");
    settle(&port);
    let mut top = Command::new(env!("CARGO_BIN_EXE_ringfence"))
        .args(["top", "-json", "-interval", "200ms", "-admin", &port.address.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut lines = BufReader::new(top.stdout.take().expect("piped")).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON") };
    let first = next();
    assert_eq!((&first["interval_s"], &first["tasks"][0]["connections_per_s"]), (&Value::Null, &Value::Null));
    port.closed(task("payroll_daily", "load", "airflow-payroll"), "warehouse");
    let busy = (0..20).map(|_| next()).find(|line| line["tasks"][0]["connections_per_s"].as_f64().is_some_and(|rate| rate > 0.0));
    assert_eq!(busy.expect("a rate")["tasks"][0]["connections"], 2);
    let status = Command::new("kill").args(["-INT", &top.id().to_string()]).status().expect("kill runs");
    assert!(status.success());
    assert_eq!(top.wait().expect("it ends").code(), Some(0), "a signal is how it ends");
}

#[test]
fn top_leaves_the_terminal_as_it_was() {
    let mut port = Port::start();
    port.closed(task("payroll_daily", "load", "airflow-payroll"), "warehouse");
    settle(&port);
    // `script` gives it a terminal; `timeout` the signal of a Ctrl-C.
    let line =
        format!("timeout --foreground -s INT 2 {} top -interval 300ms -admin {}", env!("CARGO_BIN_EXE_ringfence"), port.address);
    let mut script = Command::new(support::tool_on_path("script"));
    let mut child = script
        .args(["-q", "-c", &line, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script runs");
    let mut shown = Vec::new();
    child.stdout.take().expect("piped").read_to_end(&mut shown).expect("output");
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(child.wait().is_ok());
    let (enter, leave) = ("\u{1b}[?1049h", "\u{1b}[?1049l");
    assert!(shown.starts_with(enter) && shown.trim_end().ends_with(leave), "{shown:?}");
    assert!(shown.matches("\u{1b}[H").count() >= 2 && shown.contains("payroll_daily / load"), "{shown:?}");
}
