//! Under a service manager that keeps descriptors, a restart refuses no connection and loses none that was to come: they wait for
//! the next process. A kill -9 costs what was open, and nothing else. Registered tasks and leased addresses are known afterwards.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::airflow::Host;
use support::{Agent, Definition, Echo, Mesh, PATIENCE, Pair, Sidecar, ports, systemd, traffic, wait_until};

/// Four clients, each with one new connection after the other.
struct Load {
    clients: Vec<JoinHandle<Vec<Failure>>>,
    ended: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Failure {
    began: Instant,
    kind: ErrorKind,
    text: String,
}

impl Load {
    fn start(upstream: SocketAddr) -> Self {
        let (ended, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |client: u64| {
            let (ended, done) = (Arc::clone(&ended), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut failed = Vec::new();
                for number in 0_u64.. {
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                    let began = Instant::now();
                    if let Err(error) = traffic::echo(upstream, &support::bytes(number * 4 + client, 2_000)) {
                        failed.push(Failure { began, kind: error.kind(), text: error.to_string() });
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                failed
            })
        };
        Self { clients: (0..4).map(client).collect(), ended, done }
    }

    /// Waits for a hundred more connections.
    fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        wait_until("a hundred more", PATIENCE, || self.done.load(Ordering::Relaxed) > before + 100);
    }

    fn end(self) -> Vec<Failure> {
        self.ended.store(true, Ordering::Relaxed);
        self.clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    }
}

fn pair(app: SocketAddr) -> Pair<Agent> {
    Pair::tuned(Agent::start(), app, |web| web.workers(2).in_unit(), |db| db.workers(2).in_unit(), |definition| definition)
        .wait_open()
}

#[test]
fn a_restart_under_load_refuses_and_loses_nothing() {
    let app = Echo::start();
    let mut pair = pair(app.address);
    let before = [&pair.web, &pair.db].map(|sidecar| systemd::main_process(&sidecar.process));
    let load = Load::start(pair.upstream);
    load.goes_on();
    systemd::restart(&pair.db.process);
    load.goes_on();
    systemd::restart(&pair.web.process);
    load.goes_on();
    // Once more: what was given back is kept again.
    systemd::restart(&pair.web.process);
    load.goes_on();
    let failed = load.end();
    assert!(failed.is_empty(), "{failed:?}\n{}\n{}", pair.web.process.tail(), pair.db.process.tail());
    let after = [&pair.web, &pair.db].map(|sidecar| systemd::main_process(&sidecar.process));
    assert!(before[0] != after[0] && before[1] != after[1], "{before:?} {after:?}");
    for sidecar in [&pair.web, &pair.db] {
        let ends = systemd::said(&sidecar.process, "ended");
        assert!(ends.iter().all(|end| end["status"] == 0), "{ends:?}");
    }
    pair.assert_healthy();
}

#[test]
fn a_kill_costs_what_was_open_and_nothing_else() {
    let app = Echo::start();
    let mut pair = pair(app.address);
    let load = Load::start(pair.upstream);
    load.goes_on();
    let killed = Instant::now();
    systemd::kill(&pair.web.process);
    load.goes_on();
    let failed = load.end();
    // The kill itself takes its time: the manager gets a signal first.
    let moment = killed + Duration::from_millis(100);
    let late: Vec<&Failure> =
        failed.iter().filter(|failure| failure.began > moment || failure.kind == ErrorKind::ConnectionRefused).collect();
    assert!(late.is_empty(), "{late:?} of {failed:?}\n{}", pair.web.process.tail());
    assert!(failed.len() <= 8, "each client has one connection at a time: {failed:?}");
    assert!(failed.iter().all(|failure| !failure.text.is_empty()));
    pair.assert_healthy();
}

#[test]
fn a_restart_waits_for_what_is_open_as_long_as_the_drain_time() {
    let app = Echo::start();
    let pair = pair(app.address);
    let mut open = traffic::connect(pair.upstream).expect("a connection that stays");
    let mut echo = |text: &[u8; 6]| {
        open.write_all(text)?;
        let mut answer = [0; 6];
        open.read_exact(&mut answer).map(|()| assert_eq!(&answer, text))
    };
    echo(b"before").expect("served");
    let upstream = pair.upstream;
    let asked = Instant::now();
    pair.web.process.signal("HUP");
    // What the old process accepts before its workers have heard of it is served at once; what comes after that waits.
    loop {
        let began = Instant::now();
        let waits = std::thread::spawn(move || traffic::echo(upstream, b"a new one"));
        if asked.elapsed() < Duration::from_secs(2) {
            echo(b"amidst").expect("the old process still serves it");
        }
        waits.join().expect("a client").expect("one process or the other serves it");
        if began.elapsed() > Duration::from_secs(1) && asked.elapsed() > Duration::from_secs(2) {
            break;
        }
        assert!(asked.elapsed() < PATIENCE, "no connection waited for the drain of 3 s\n{}", pair.web.process.tail());
    }
    assert!(asked.elapsed() < Duration::from_secs(12), "the drain of 3 s took {:?}", asked.elapsed());
    assert!(echo(b"after.").is_err(), "an established connection ends with its process");
}

#[test]
fn with_fewer_workers_nothing_hangs_and_what_goes_away_is_refused() {
    let app = Echo::start();
    let pair = pair(app.address);
    let arguments = pair.web.unit.join("arguments");
    let load = Load::start(pair.upstream);
    load.goes_on();
    for workers in ["1", "2", "1"] {
        std::fs::write(&arguments, format!("-workers {workers}")).expect("written");
        systemd::restart(&pair.web.process);
        load.goes_on();
    }
    let failed = load.end();
    assert!(failed.is_empty(), "{failed:?}\n{}", pair.web.process.tail());
    // Upstream and public listener of one worker, and the admin port.
    let kept = |pair: &Pair<Agent>| systemd::said(&pair.web.process, "ended").pop().map(|end| end["kept"].clone());
    systemd::restart(&pair.web.process);
    assert_eq!(kept(&pair), Some(json!(3)), "{}", pair.web.process.tail());

    pair.mesh.register(&Definition::new("web").upstream("db", ports::free_address()));
    wait_until("the old address is refused: it is not kept either", PATIENCE, || {
        traffic::connect(pair.upstream).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
}

#[test]
fn tasks_and_leases_outlive_a_restart_and_a_kill() {
    let rules = |port: u16| {
        format!(
            "lease_port = {port}\n[[component]]\nname = \"airflow-scheduler\"\nuser = \"root\"\ntitle = \"airflow scheduler*\"\n
[[component]]\nname = \"airflow-triggerer\"\ntitle = \"airflow triggerer*\"\nleases = true\nruns_tasks = false\n
[[rule]]\nidentity = \"airflow-payroll\"\ndag = [\"payroll\"]\n"
        )
    };
    let (mesh, app, upstream) = (Agent::start(), Echo::start(), ports::free_address());
    let host = Host::new(&rules(ports::free()));
    mesh.register(&Definition::new("warehouse").app(app.address));
    mesh.register(&Definition::new("airflow-worker").upstream("warehouse", upstream));
    mesh.allow("airflow-payroll", "warehouse");
    mesh.deny("*", "warehouse");
    let _warehouse = Sidecar::start(&mesh, "warehouse");
    let path = host.rules();
    let worker = Sidecar::of("airflow-worker").arguments(&["-airflow", path.to_str().expect("text")]).in_unit().start(&mesh);
    worker.wait_endpoint();
    let flags = ["restarted", "killed"].map(|name| host.folder().join(name));
    let wait = |at: usize| format!("while not pathlib.Path('{}').exists(): time.sleep(0.02)\n", flags[at].display());
    let code = |first: &str, call: &str| {
        format!("import pathlib, time\n{first}\nsay({call})\n{}say({call})\n{}say({call})", wait(0), wait(1))
    };
    let piped = std::process::Stdio::piped;
    let task = code("register('payroll')", "echo(os.environ['PORT'])");
    let task = host.command(Some(upstream), &task).stdout(piped()).spawn().expect("the task starts");
    let triggerer = code("one = lease('payroll')", "echo(one['port'], host=one['address'])");
    let mut triggerer = host.command(Some(upstream), &triggerer);
    std::os::unix::process::CommandExt::arg0(&mut triggerer, "airflow triggerer").env("STAGE", "task");
    let triggerer = triggerer.stdout(piped()).spawn().expect("the triggerer starts");
    for tier in ["cgroup", "lease"] {
        worker.wait_connection(tier, |line| line["caller"]["dag"] == "payroll" && line["caller"]["tier"] == tier);
    }
    systemd::restart(&worker.process);
    std::fs::write(&flags[0], "").expect("told");
    wait_until("both have called again", PATIENCE, || {
        worker.connections().iter().filter(|line| line["caller"]["dag"] == "payroll").count() >= 4
    });
    systemd::kill(&worker.process);
    std::fs::write(&flags[1], "").expect("told");
    for process in [task, triggerer] {
        let output = process.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stdout);
        let said: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("a value")).collect();
        assert_eq!(said, [json!("hello"), json!("hello"), json!("hello")], "{}", worker.process.tail());
    }
}
