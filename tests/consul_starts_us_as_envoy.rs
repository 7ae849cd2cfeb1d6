//! Real Consul 1.8.7's `consul connect envoy` starts ringfence in Envoy's place: by the name `envoy`, and by its own.

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::http::Client;
use support::traffic::{Live, round_trip};
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Process, ports, wait_for, wait_until};

struct Sidecar {
    process: Process,
    admin: SocketAddr,
    log: PathBuf,
}

impl Sidecar {
    /// `consul connect envoy -sidecar-for SERVICE -envoy-binary BINARY -- PASSED`.
    fn start(consul: &Consul, service: &str, binary: &Path, folder: &Path, passed: &[&str]) -> Self {
        let admin = ports::free_address();
        let log = folder.join(format!("{service}.jsonl"));
        let mut command = Command::new(Consul::binary());
        command.args(["connect", "envoy", "-sidecar-for", service, "-grpc-addr", "127.0.0.1:8502"]);
        command.args(["-admin-bind", &admin.to_string()]).arg("-envoy-binary").arg(binary);
        command.arg("--").args(passed);
        // Flags of `consul connect envoy` do not reach Envoy; its environment does, and the token in the bootstrap.
        command.env("CONSUL_HTTP_ADDR", consul.address().to_string());
        command.env("CONSUL_HTTP_TOKEN", consul.token(service).expect("ACLs are on"));
        command.env("RINGFENCE_CONNECTION_LOG", &log).env("TMPDIR", folder);
        Self { process: Process::start(&format!("consul connect envoy {service}"), &command), admin, log }
    }

    fn client(&self) -> Client {
        Client::new(self.admin, None)
    }

    /// The process that answers, if it serves.
    fn serving(&self) -> Option<u32> {
        let told: serde_json::Value = serde_json::from_str(&self.client().try_get("/upgrade").ok()?.body).expect("JSON");
        let pid = told["pid"].as_u64().unwrap_or_else(|| panic!("no pid: {told}"));
        (told["serving"] == true).then(|| u32::try_from(pid).expect("a pid"))
    }

    fn wait_ready(&self) {
        wait_for("the sidecar is ready", PATIENCE, || {
            let answer = self.client().try_get("/ready").map_err(|error| format!("{error}\n{}", self.process.tail()))?;
            if answer.status == 200 { Ok(()) } else { Err(format!("{}\n{}", answer.body, self.process.tail())) }
        });
    }
}

#[test]
fn two_services_talk_and_end_as_they_should() {
    let ringfence = Path::new(env!("CARGO_BIN_EXE_ringfence"));
    let folder = tempfile::tempdir().expect("a folder");
    let named_envoy = folder.path().join("envoy");
    std::os::unix::fs::symlink(ringfence, &named_envoy).expect("a link");

    let app = Echo::start();
    let consul = Consul::start();
    let upstream = ports::free_address();
    consul.register(&Definition::new("db").app(app.address));
    consul.register(&Definition::new("web").upstream("db", upstream));
    consul.allow("web", "db");
    let passed = ["--concurrency", "1", "-l", "debug", "--drain-time-s", "2"];
    let mut db = Sidecar::start(&consul, "db", &named_envoy, folder.path(), &passed);
    let mut web = Sidecar::start(&consul, "web", ringfence, folder.path(), &passed);
    db.wait_ready();
    web.wait_ready();
    wait_for("the first echo", PATIENCE, || {
        round_trip(upstream, b"first").map_err(|error| format!("{error}\n{}\n{}", web.process.tail(), db.process.tail()))
    });
    for seed in 0..10 {
        round_trip(upstream, &support::bytes(seed, 100_000)).expect("an echo of 100 kB");
    }
    let output = web.process.output();
    assert!(output.contains("learned from Consul's HTTP API"), "{output}");
    assert!(output.contains("no effect here: --max-obj-name-len"), "{output}");
    let line = wait_for_line(&db.log, "bytes_from_mesh\":100000");
    assert!(line.contains("/svc/web"), "{line}");

    // Consul gave the bootstrap by a FIFO that is gone: an upgrade has it all the same, and so has the next one.
    let mut live = Live::open(upstream);
    let mut seen = Serving(vec![web.process.id()]);
    for _ in 0..2 {
        signal(seen.last(), "USR2");
        // While one takes over from another, both answer.
        let next = wait_for("another process serves", PATIENCE, || {
            web.serving().filter(|pid| !seen.0.contains(pid)).ok_or_else(|| web.process.tail())
        });
        seen.0.push(next);
        round_trip(upstream, &support::bytes(11, 100_000)).expect("an echo of 100 kB after the upgrade");
        live.ping().expect("the connection of the first process");
    }
    drop(live);
    assert_eq!(web.process.wait_exit(PATIENCE).code(), Some(0), "{}", web.process.tail());
    signal(seen.last(), "TERM");
    wait_until("the last of them ends", PATIENCE, || web.client().try_get("/ready").is_err());

    db.process.signal("TERM");
    assert_eq!(db.process.wait_exit(PATIENCE).code(), Some(0), "{}", db.process.tail());
}

#[test]
fn an_abrupt_end_can_be_had() {
    let folder = tempfile::tempdir().expect("a folder");
    let address = folder.path().join("admin");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.args(["envoy", "--ringfence-abrupt-sigterm", "--concurrency", "1", "--admin-address-path"]).arg(&address);
    command
        .args(["--config-yaml", "{node: {id: nobody}, admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}}"]);
    // No agent is there: the process waits for one, as it does in a host's boot.
    command.env("RINGFENCE_FEEDER", "http").env("CONSUL_HTTP_ADDR", ports::free_address().to_string());
    let mut process = Process::start("ringfence envoy", &command);
    let admin: SocketAddr = wait_for("the admin port's address is written", PATIENCE, || {
        let text = std::fs::read_to_string(&address).map_err(|error| format!("{error}\n{}", process.tail()))?;
        text.parse().map_err(|error| format!("{text}: {error}"))
    });
    let answer = Client::new(admin, None).get("/ready");
    assert_eq!(answer.status, 503, "{}", answer.body);
    process.signal("TERM");
    assert_eq!(process.wait_exit(PATIENCE).code(), Some(0), "{}", process.tail());
    assert!(process.output().contains("ending at once"), "{}", process.output());
}

/// Processes that served one after the other; the last one ends with the test, however that ends.
struct Serving(Vec<u32>);

impl Serving {
    fn last(&self) -> u32 {
        self.0[self.0.len() - 1]
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The first one is the harness's own.
        if std::thread::panicking() && self.0.len() > 1 {
            let _ = Command::new("kill").args(["-KILL", &self.last().to_string()]).output();
        }
    }
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill runs").success());
}

fn wait_for_line(path: &Path, wanted: &str) -> String {
    wait_for("a line of the connection log", PATIENCE, || {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        text.lines().find(|line| line.contains(wanted)).map(str::to_owned).ok_or(text)
    })
}
