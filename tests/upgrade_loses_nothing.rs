//! SIGUSR2 puts a new process in place of the running one under load: no connection is refused, reset or cut, those that are
//! open go on in the old process until they end, and tasks that were registered before are still known.

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use support::airflow::Host;
use support::{Agent, Definition, Echo, Mesh, PATIENCE, Pair, Sidecar, ports, traffic, wait_for, wait_until};

/// The process that listens at a sidecar's admin port now, and the one that listened before.
fn upgraded(sidecar: &Sidecar) -> u32 {
    let old = sidecar.process.id();
    sidecar.process.signal("USR2");
    let pid = announced(sidecar, "the new process serves");
    assert_ne!(pid, old);
    pid
}

/// The pid in the log line that says this.
fn announced(sidecar: &Sidecar, what: &str) -> u32 {
    wait_for(what, PATIENCE, || {
        let output = sidecar.process.output();
        let line = output.lines().find(|line| line.contains(what)).ok_or_else(|| sidecar.process.tail())?;
        line.rsplit("pid=").next().and_then(|pid| pid.trim().parse().ok()).ok_or_else(|| line.to_owned())
    })
}

/// When the process started that made this page.
fn start_of(page: &str) -> String {
    let line = page.lines().find(|line| line.starts_with("process_start_time_seconds"));
    line.unwrap_or_else(|| panic!("no start in {page}")).to_owned()
}

/// Ends a successor, which is nobody's child once its predecessor has ended.
struct Successor(u32);

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = std::process::Command::new("kill").args(["-KILL", &self.0.to_string()]).status();
    }
}

#[test]
fn nothing_is_lost_under_load() {
    let app = Echo::start();
    let scraped = ports::free_address();
    let define = |definition: Definition| definition.config("envoy_prometheus_bind_addr", scraped.to_string());
    let mut pair = Pair::tuned(Agent::start(), app.address, |web| web.workers(2), |db| db.workers(2), define).wait_open();
    let page = support::http::Client::new(scraped, None);
    wait_for("the page of db", PATIENCE, || page.try_get("/metrics").map(|_| ()));
    let (ended, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let upstream = pair.upstream;
    let load: Vec<_> = (0..4)
        .map(|client| {
            let (ended, done) = (Arc::clone(&ended), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut failed = Vec::new();
                for number in 0_u64.. {
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                    if let Err(error) = traffic::echo(upstream, &support::bytes(number * 4 + client, 2_000)) {
                        failed.push(error.to_string());
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                failed
            })
        })
        .collect();
    let scraper = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            let mut outcomes = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                outcomes.push(page.try_get("/metrics").map(|answer| start_of(&answer.body)));
            }
            outcomes
        }
    });
    let mut long = traffic::connect(upstream).expect("a long connection");
    let mut echo = |text: &[u8; 6]| {
        long.write_all(text).expect("sent");
        let mut answer = [0; 6];
        long.read_exact(&mut answer).expect("answered");
        assert_eq!(&answer, text);
    };
    echo(b"before");
    let db = Successor(upgraded(&pair.db));
    echo(b"amidst");
    let web = Successor(upgraded(&pair.web));
    let before = done.load(Ordering::Relaxed);
    wait_until("a hundred more", PATIENCE, || done.load(Ordering::Relaxed) > before + 100);
    ended.store(true, Ordering::Relaxed);
    for client in load {
        assert_eq!(client.join().expect("a client"), Vec::<String>::new());
    }
    let outcomes = scraper.join().expect("the scraper");
    let starts: Vec<String> = outcomes.into_iter().collect::<Result<_, _>>().expect("no scrape fails");
    let mut processes = starts.clone();
    processes.dedup();
    assert!(processes.len() == 2 && starts.len() > 5, "first the one, then the other: {processes:?}");
    echo(b"after.");
    let started = pair.web.metrics().sum("process_start_time_seconds", &[]);
    assert!(started > 0, "the new process answers at the admin port");
    drop(long);
    // With its last connection the old process ends.
    assert!(pair.web.process.wait_exit(Duration::from_secs(20)).success());
    assert!(pair.db.process.wait_exit(Duration::from_secs(20)).success());
    traffic::echo(upstream, b"alone").expect("the new ones serve alone");
    drop((web, db));
}

#[test]
fn a_successor_that_cannot_start_changes_nothing() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    // The agent is gone: a new process would know nothing, so it may not take over.
    drop(std::mem::replace(&mut pair.mesh, Agent::start()));
    pair.web.process.signal("USR2");
    let _successor = Successor(announced(&pair.web, "started the program anew"));
    for _ in 0..50 {
        pair.echo(b"still").expect("the old process serves");
    }
    pair.web.assert_healthy();
}

#[test]
fn a_registered_task_is_known_to_the_new_process() {
    let rules = "[[component]]\nname = \"airflow-scheduler\"\nuser = \"root\"\ntitle = \"airflow scheduler*\"\n
        [[rule]]\nidentity = \"airflow-payroll\"\ndag = [\"payroll\"]\n";
    let (mesh, app, upstream, host) = (Agent::start(), Echo::start(), ports::free_address(), Host::new(rules));
    mesh.register(&Definition::new("warehouse").app(app.address));
    mesh.register(&Definition::new("airflow-worker").upstream("warehouse", upstream));
    mesh.allow("airflow-payroll", "warehouse");
    let _warehouse = Sidecar::start(&mesh, "warehouse");
    let path = host.rules();
    let mut worker = Sidecar::of("airflow-worker").arguments(&["-airflow", path.to_str().expect("text")]).start(&mesh);
    worker.wait_endpoint();
    let flag = host.folder().join("upgraded");
    let code = format!(
        "say(register('payroll')); say(echo(os.environ['PORT']))
import pathlib, time
while not pathlib.Path('{}').exists(): time.sleep(0.02)
say(echo(os.environ['PORT'])); say(ask({{'op': 'whoami'}})['caller']['dag'])",
        flag.display()
    );
    let task = host.command(Some(upstream), &code).stdout(std::process::Stdio::piped()).spawn().expect("the task starts");
    worker.wait_connection("the first call", |line| line["caller"]["dag"] == "payroll");
    let _successor = Successor(upgraded(&worker));
    assert!(worker.process.wait_exit(Duration::from_secs(20)).success(), "it had nothing left to do");
    std::fs::write(flag, "").expect("told");
    let output = task.wait_with_output().expect("the task ends");
    let said: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("a value")).collect();
    assert_eq!(said[1..], [json!("hello"), json!("hello"), json!("payroll")], "{said:?}");
    let again = host.task_calling(upstream, "say(register('payroll')['ok']); say(echo(os.environ['PORT']))");
    assert_eq!(again, [json!(true), json!("hello")], "the registration socket is the new process's");
}
