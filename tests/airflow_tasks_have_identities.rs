//! Each task of an Airflow host speaks under the identity that the rules give it, whatever process of it opens the
//! connection; who is nobody known speaks under none; and a denied one is told why, in its own protocol.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use support::airflow::Host;
use support::{Agent, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, traffic, wait_for};

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

/// A worker host with an upstream `warehouse`, to which payroll has an intention.
struct Worker {
    host: Host,
    sidecar: Sidecar,
    warehouse: Sidecar,
    upstream: SocketAddr,
    mesh: Agent,
    _app: support::Custom,
}

impl Worker {
    fn start(deny_reply: &str) -> Self {
        Self::start_with(deny_reply, RULES)
    }

    fn start_with(deny_reply: &str, rules: &str) -> Self {
        let (mesh, app, upstream) = (Agent::start(), Echo::start(), ports::free_address());
        mesh.register(&Definition::new("warehouse").app(app.address));
        let config = json!({ "deny_reply": deny_reply });
        mesh.register(&Definition::new("airflow-worker").upstream_with("warehouse", upstream, &config));
        mesh.allow("airflow-payroll", "warehouse");
        mesh.deny("*", "warehouse");
        let host = Host::new(rules);
        let warehouse = Sidecar::start(&mesh, "warehouse");
        let rules = host.rules();
        let sidecar = Sidecar::of("airflow-worker").arguments(&["-airflow", rules.to_str().expect("text")]).start(&mesh);
        sidecar.wait_endpoint();
        Self { host, sidecar, warehouse, upstream, mesh, _app: app }
    }

    fn task(&self, code: &str) -> Vec<Value> {
        self.host.task_calling(self.upstream, code)
    }

    /// The log's line about a connection of this task.
    fn line_of(&self, dag: &str, task: &str) -> Value {
        self.sidecar.wait_connection(dag, |line| line["caller"]["dag"] == dag && line["caller"]["task"] == task)
    }
}

#[test]
fn a_task_speaks_under_its_own_identity() {
    let worker = Worker::start("close");
    let said = worker.task("say(register('payroll_daily', task='load')); say(echo(os.environ['PORT']))");
    assert_eq!(
        (&said[0]["ok"], &said[0]["identity"], &said[0]["rule"]),
        (&json!(true), &json!("airflow-payroll"), &json!("payroll"))
    );
    assert_eq!(said[1], "hello");
    let line = worker.line_of("payroll_daily", "load");
    assert_eq!((&line["caller"]["identity"], &line["caller"]["rule"]), (&json!("airflow-payroll"), &json!("payroll")));
    assert_eq!((&line["caller"]["run"], &line["caller"]["try"]), (&json!("scheduled__2026-11-24"), &json!(1)));
    assert_eq!(line["caller"]["tier"], said[0]["tier"], "the tier that the registration promised");
    let seen = worker.warehouse.wait_closed("complete");
    assert!(seen["source"].as_str().is_some_and(|id| id.ends_with("/svc/airflow-payroll")), "the far side saw {seen}");
}

#[test]
fn children_daemons_and_clients_that_left_are_still_the_task() {
    let worker = Worker::start("close");
    let said = worker.task(
        "register('payroll_daily', task='tree')
in_child(\"say(echo(os.environ['PORT']))\")
in_daemon(\"say(echo(os.environ['PORT']))\")
say(subprocess.run(['bash', '-c', 'exec 3<>/dev/tcp/127.0.0.1/$PORT; echo -n hello >&3; head -c5 <&3'], capture_output=True, text=True).stdout)
with socket.create_connection(('127.0.0.1', int(os.environ['PORT']))) as gone: gone.sendall(b'x')
",
    );
    assert_eq!(said, [json!("hello"), json!("hello"), json!("hello")]);
    wait_for("four lines of the task", PATIENCE, || {
        let lines = worker.sidecar.connections();
        let of_task = lines.iter().filter(|line| line["caller"]["task"] == "tree").count();
        if of_task == 4 { Ok(()) } else { Err(format!("{of_task} of {lines:?}")) }
    });
}

#[test]
fn a_denied_task_reads_the_reason_and_an_intention_ends_it_without_a_restart() {
    let worker = Worker::start("postgres");
    let code = "register('reports', task='load'); say(startup(os.environ['PORT']))";
    let said = worker.task(code);
    let text = said[0].as_str().expect("text");
    for part in [
        "28000",
        "identity \"airflow-reports\"",
        "task load of dag reports",
        "may not call \"warehouse\"",
        "intention * -> warehouse deny",
        "ringfence explain",
    ] {
        assert!(text.contains(part), "{part} is not in {text:?}");
    }
    let line = worker.line_of("reports", "load");
    assert_eq!((&line["reason"], &line["decision"]), (&json!("caller_denied"), &json!("denied")));
    let id = line["denial"].as_str().expect("an id");
    assert!(text.contains(id), "the client was told {id}: {text}");
    assert!(line["remedy"].as_str().is_some_and(|remedy| remedy.contains("airflow-reports")), "{line}");
    assert!(worker.warehouse.connections().is_empty(), "the far side was not even dialed");

    worker.mesh.allow("airflow-reports", "warehouse");
    wait_for("the intention lets it in", PATIENCE, || {
        let said = worker.task("register('reports', task='again'); say(echo(os.environ['PORT']))");
        if said[0] == "hello" { Ok(()) } else { Err(said[0].to_string()) }
    });
}

#[test]
fn who_is_nobody_known_speaks_under_no_identity() {
    let worker = Worker::start("close");
    let (bytes, _) = traffic::read_all(worker.upstream);
    assert!(bytes.is_empty());
    let line = worker.sidecar.wait_closed("caller_denied");
    assert_eq!((&line["caller"]["tier"], &line["caller"]["identity"]), (&json!("unidentified"), &Value::Null));
    assert!(line["why"].as_str().is_some_and(|why| why.contains("no mesh identity")), "{line}");
    let unruled = worker.task("say(register('other')); say(echo(os.environ['PORT']))");
    assert_eq!(
        (&unruled[0]["ok"], &unruled[0]["identity"]),
        (&json!(true), &Value::Null),
        "registered, but no rule gives it anything"
    );
    assert_ne!(unruled[1], "hello");
    assert_eq!(worker.line_of("other", "load")["reason"], "caller_denied");
}

#[test]
fn a_hostile_task_never_gets_anothers_identity() {
    let worker = Worker::start("close");
    let said = worker.task(
        r#"say(register('reports', task='liar'))
say(register('payroll_daily', task='liar'))
forged = f"airflow worker -- LocalExecutor: {INSTANCE}"
os.environ['CODE'] = "say(register('payroll_daily', task='liar')); say(echo(os.environ['PORT']))"
child(forged, 'supervisor').wait()
in_daemon("say(register('payroll_daily', task='liar')); say(echo(os.environ['PORT']))")
os.environ['AIRFLOW_CTX_DAG_ID'] = 'payroll_daily'
say(echo(os.environ['PORT']))
"#,
    );
    assert_eq!(said[0]["identity"], "airflow-reports");
    for refused in [&said[1], &said[2], &said[4]] {
        assert_eq!(refused["ok"], false, "{refused}");
    }
    for denied in [&said[3], &said[5], &said[6]] {
        assert_ne!(*denied, "hello");
    }
    wait_for("three denied connections of the liar", PATIENCE, || {
        let lines = worker.sidecar.connections();
        let of_liar = lines.iter().filter(|line| line["caller"]["dag"] == "reports" && line["reason"] == "caller_denied").count();
        if of_liar == 3 { Ok(()) } else { Err(format!("{of_liar} in {lines:?}")) }
    });
    assert!(worker.sidecar.connections().iter().all(|line| line["caller"]["dag"] != "payroll_daily"));
}

#[test]
fn a_restart_of_ringfence_takes_no_identity_away() {
    let mut worker = Worker::start("close");
    let flag = worker.host.folder().join("restarted");
    let code = format!(
        "say(register('payroll_daily')); say(echo(os.environ['PORT']))
import pathlib, time
while not pathlib.Path('{}').exists(): time.sleep(0.02)
in_daemon(\"say(echo(os.environ['PORT']))\"); say(echo(os.environ['PORT']))",
        flag.display()
    );
    let mut command = worker.host.command(Some(worker.upstream), &code);
    let task = command.stdout(std::process::Stdio::piped()).spawn().expect("the task starts");
    worker.line_of("payroll_daily", "load");
    worker.sidecar.process.kill();
    let rules = worker.host.rules();
    worker.sidecar = Sidecar::of("airflow-worker").arguments(&["-airflow", rules.to_str().expect("text")]).start(&worker.mesh);
    worker.sidecar.wait_endpoint();
    std::fs::write(flag, "").expect("told");
    let output = task.wait_with_output().expect("the task ends");
    let said = String::from_utf8_lossy(&output.stdout);
    let said: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("a value")).collect();
    assert_eq!(said[1..], [json!("hello"), json!("hello"), json!("hello")], "{said:?}");
    assert_eq!(worker.line_of("payroll_daily", "load")["caller"]["tier"], "cgroup");
}

#[test]
fn a_component_speaks_as_the_service_that_the_same_process_fronts() {
    let rules = "[[component]]\nname = \"airflow-worker\"\nuser = \"root\"\ntitle = \"airflow scheduler*\"\n";
    let worker = Worker::start_with("close", rules);
    worker.mesh.allow("airflow-worker", "warehouse");
    wait_for("the intention lets it in", PATIENCE, || {
        let said = worker.host.component(worker.upstream, "say(echo(os.environ['PORT']))");
        if said[0] == "hello" { Ok(()) } else { Err(said[0].to_string()) }
    });
    let line = worker.sidecar.wait_closed("complete");
    assert_eq!((&line["caller"]["component"], &line["caller"]["tier"]), (&json!("airflow-worker"), &json!("component")));
}

#[test]
fn a_triggerer_speaks_for_each_of_its_tasks_at_an_address_of_its_own() {
    let port = ports::free();
    let triggerer =
        "[[component]]\nname = \"airflow-triggerer\"\ntitle = \"airflow triggerer*\"\nleases = true\nruns_tasks = false";
    let worker = Worker::start_with("close", &format!("lease_port = {port}\n{RULES}\n{triggerer}\n"));
    let said = worker.host.triggerer(
        worker.upstream,
        "allowed, denied = lease('payroll_daily'), lease('reports')
say(allowed); say(denied); say(lease('payroll_daily')['address'] == allowed['address'])
say(echo(allowed['port'], host=allowed['address'])); say(echo(denied['port'], host=denied['address']))
say(echo(allowed['port'], host='127.77.7.7')); say(lease('payroll_daily', upstream='nowhere')['error'])",
    );
    assert_eq!((&said[0]["identity"], &said[1]["identity"]), (&json!("airflow-payroll"), &json!("airflow-reports")), "{said:?}");
    assert_eq!((&said[2], &said[3]), (&json!(true), &json!("hello")));
    assert_ne!(said[4], "hello", "no intention");
    assert_ne!(said[5], "hello", "no lease");
    assert!(said[6].as_str().is_some_and(|error| error.contains("nowhere")), "{}", said[6]);
    let line = worker.line_of("payroll_daily", "wait");
    assert_eq!((&line["caller"]["tier"], &line["caller"]["identity"]), (&json!("lease"), &json!("airflow-payroll")));
    assert_eq!(worker.line_of("reports", "wait")["reason"], "caller_denied");
    worker.sidecar.wait_closed("no_route");

    let refused = worker.task("register('payroll_daily'); say(lease('reports')['ok'])");
    assert_eq!(refused, [json!(false)], "a task may not lease");
    // Its process has ended, so its addresses lead nowhere.
    let gone = SocketAddr::new(said[0]["address"].as_str().and_then(|text| text.parse().ok()).expect("an address"), port);
    wait_for("the address is nobody's", PATIENCE, || {
        let (bytes, _) = traffic::read_all(gone);
        let lines = worker.sidecar.connections();
        let refused = lines.iter().any(|line| line["reason"] == "no_route" && line["original"] == gone.to_string());
        if bytes.is_empty() && refused { Ok(()) } else { Err(format!("{lines:?}")) }
    });
}

#[test]
fn rules_are_taken_over_live_and_a_wrong_file_changes_nothing() {
    let worker = Worker::start("close");
    let code = "register('etl'); say(echo(os.environ['PORT']))";
    assert_ne!(worker.task(code)[0], "hello", "no rule yet");
    worker.host.write_rules("[[rule]]\nidentiti = \"x\"\n");
    support::pause(Duration::from_millis(1_500));
    assert_eq!(worker.task("register('payroll_daily'); say(echo(os.environ['PORT']))")[0], "hello", "the old rules stay");
    worker.host.write_rules(&format!("{RULES}\n[[rule]]\nidentity = \"airflow-payroll\"\ndag = [\"etl\"]\n"));
    wait_for("the new rule gives an identity", PATIENCE, || {
        let said = worker.task(code);
        if said[0] == "hello" { Ok(()) } else { Err(said[0].to_string()) }
    });
}
