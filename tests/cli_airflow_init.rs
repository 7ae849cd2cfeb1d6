//! Promise: what `ringfence airflow init` writes is taken as it is by Consul 1.8.7, by the embedded agent, by systemd and by
//! ringfence itself; a second run changes nothing, nothing of somebody else's is replaced unasked, and no secret is written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

mod support;
use support::{Agent, Consul, Mesh, PATIENCE, Process, Sidecar, ports, wait_for};

const WORKER: [&str; 6] = ["-role", "worker", "-result-backend", "results", "-upstream", "warehouse:25435:postgres"];
const HEAD: [&str; 8] = ["-role", "scheduler", "-role", "api-server", "-role", "triggerer", "-role", "dag-processor"];
const MASKED: &str = "s3cr3t-0f-the-operator";

/// Runs `ringfence airflow init`, with none of the host's own settings.
fn init(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.args(["airflow", "init"]).args(arguments).env_clear();
    command.output().expect("the program runs")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Runs it, which must succeed; its output.
fn succeeds(arguments: &[&str]) -> String {
    let output = init(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}{}", out(&output), err(&output));
    out(&output)
}

/// The files below a folder.
fn files(folder: &Path) -> BTreeMap<String, String> {
    fn walk(folder: &Path, root: &Path, found: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, root, found);
            } else {
                let name = path.strip_prefix(root).expect("below").to_str().expect("UTF-8").to_owned();
                found.insert(name, std::fs::read_to_string(&path).expect("text"));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

/// A running control plane and an operator's rights on it.
struct Site<'m> {
    mesh: &'m dyn Mesh,
    folder: tempfile::TempDir,
    token: Option<String>,
}

impl<'m> Site<'m> {
    fn new(mesh: &'m dyn Mesh, token: Option<String>) -> Self {
        let folder = support::scratch();
        if let Some(token) = &token {
            std::fs::write(folder.path().join("token"), token).expect("written");
        }
        Self { mesh, folder, token }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// `-apply`, with one JSON object for each thing.
    fn apply(&self, arguments: &[&str]) -> (Option<i32>, Vec<Value>) {
        let (address, token) = (self.mesh.address().to_string(), self.folder.path().join("token"));
        let (out_folder, token) = (self.out(), token.to_str().expect("UTF-8").to_owned());
        let mut all = arguments.to_vec();
        all.extend(["-apply", "-json", "-http-addr", &address, "-out", out_folder.to_str().expect("UTF-8")]);
        if self.token.is_some() {
            all.extend(["-token-file", &token]);
        }
        let output = init(&all);
        let lines = out(&output).lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")).collect::<Vec<_>>();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{all:?}: {}{}", out(&output), err(&output));
        (
            output.status.code(),
            lines.into_iter().filter(|line| matches!(line["apply"].as_str(), Some("service" | "intention"))).collect(),
        )
    }

    /// `-apply`, which must do exactly this to everything.
    fn all_become(&self, arguments: &[&str], done: &str) -> Vec<String> {
        let (code, lines) = self.apply(arguments);
        assert_eq!(code, Some(0), "{lines:#?}");
        assert!(!lines.is_empty() && lines.iter().all(|line| line["done"] == done), "not all {done}: {lines:#?}");
        lines.iter().map(|line| line["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// Consul's own command line.
    fn consul(&self, program: &Path, arguments: &[&str]) {
        let mut command = Command::new(program);
        let path = Consul::binary().parent().expect("a folder").to_str().expect("UTF-8").to_owned() + ":/usr/bin:/bin";
        command.args(arguments).env_clear().env("PATH", path).env("CONSUL_HTTP_ADDR", self.mesh.address().to_string());
        command.envs(self.token.iter().map(|token| ("CONSUL_HTTP_TOKEN", token)));
        support::process::run(&mut command, PATIENCE);
    }
}

/// Registers a worker and a head host, twice, and looks at what the agent then has.
fn applied_twice(site: &Site<'_>) {
    let names = site.all_become(&WORKER, "made");
    for name in ["airflow-worker", "allow airflow-worker -> redis", "allow airflow-worker -> results", "deny * -> airflow-worker"]
    {
        assert!(names.iter().any(|have| have == name), "no {name} in {names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("warehouse")), "nobody asked that a task may call it: {names:?}");
    assert_eq!(site.all_become(&WORKER, "unchanged"), names, "a second run changes nothing");

    let client = site.mesh.client();
    let service = client.get("/v1/agent/service/airflow-worker").ok("the worker").json();
    assert_eq!((&service["Port"], &service["Meta"]["airflow-role"]), (&json!(8793), &json!("worker")), "{service}");
    assert_eq!(service["Meta"]["airflow-deployment"], "airflow");
    let proxy = client.get("/v1/agent/service/airflow-worker-sidecar-proxy").ok("its sidecar").json();
    let upstreams = proxy["Proxy"]["Upstreams"].as_array().expect("upstreams");
    let found: Vec<_> =
        upstreams.iter().map(|one| (one["DestinationName"].as_str().expect("a name"), one["LocalBindPort"].as_u64())).collect();
    assert_eq!(
        found,
        [("redis", Some(22_011)), ("results", Some(22_012)), ("airflow-api-server", Some(22_013)), ("warehouse", Some(25_435))]
    );
    assert_eq!(upstreams[3]["Config"]["deny_reply"], "postgres", "{proxy}");
    for (source, destination, allowed) in [
        ("airflow-worker", "redis", true),
        ("airflow-worker", "postgres", false),
        ("airflow-worker", "airflow-api-server", true),
        ("airflow-payroll", "airflow-api-server", false),
        ("airflow-api-server", "airflow-worker", true),
        ("airflow-scheduler", "airflow-worker", false),
    ] {
        let answer =
            client.get(&format!("/v1/connect/intentions/check?source={source}&destination={destination}")).ok("check").json();
        assert_eq!(answer["Allowed"], allowed, "{source} -> {destination}");
    }
}

#[test]
fn the_embedded_agent_takes_it_once() {
    let agent = Agent::start();
    applied_twice(&Site::new(&agent, None));
    let head = Site::new(&agent, None);
    // The worker's run allowed two of them already.
    let (code, lines) = head.apply(&HEAD);
    assert_eq!(code, Some(0), "{lines:#?}");
    assert!(
        lines.iter().all(|line| line["done"] == "made" || line["name"].as_str().is_some_and(|name| name.contains("worker"))),
        "{lines:#?}"
    );
    head.all_become(&HEAD, "unchanged");
}

#[test]
fn consul_1_8_takes_it_once_and_its_own_tools_write_the_same() {
    let consul = Consul::start();
    let (_, token) = consul.make_token(&json!({"Policies": [{"Name": "global-management"}]}));
    let site = Site::new(&consul, Some(token));
    let old = |arguments: &[&'static str]| [arguments, &["-consul", "1.8", "-force"]].concat();
    applied_twice(&site);
    site.all_become(&old(&WORKER), "unchanged");

    // What the files say is what -apply did.
    for (name, text) in files(&site.out()) {
        assert!(!text.contains(site.token.as_deref().expect("a token")), "{name} holds the token");
    }
    let out_folder = site.out();
    consul.deregister("airflow-worker");
    let list = consul.client().get("/v1/connect/intentions").ok("list").json();
    for one in list.as_array().expect("a list") {
        consul.client().delete(&format!("/v1/connect/intentions/{}", one["ID"].as_str().expect("an id"))).ok("deletion");
    }
    let at = |name: &str| out_folder.join(name).to_str().expect("UTF-8").to_owned();
    site.consul(&Consul::binary(), &["services", "register", &at("consul/airflow-worker.hcl")]);
    site.consul(Path::new("/bin/sh"), &[&at("consul/intentions.sh")]);
    site.consul(Path::new("/bin/sh"), &[&at("consul/intentions.sh")]);
    site.consul(
        &Consul::binary(),
        &["acl", "policy", "create", "-name", "ringfence", "-rules", &format!("@{}", at("consul/token-policy.hcl"))],
    );
    site.all_become(&old(&WORKER), "unchanged");
    // The file of a host without inbound service, too.
    let head = Site::new(&consul, site.token);
    let (code, lines) = head.apply(&old(&HEAD));
    assert_eq!(code, Some(0), "{lines:#?}");
    consul.deregister("airflow-scheduler");
    head.consul(
        &Consul::binary(),
        &["services", "register", head.out().join("consul/airflow-scheduler.hcl").to_str().expect("UTF-8")],
    );
    head.all_become(&old(&HEAD), "unchanged");
}

#[test]
fn a_token_without_rights_is_told_which_it_needs() {
    let consul = Consul::start();
    let (_, token) = consul.make_token(&json!({"ServiceIdentities": [{"ServiceName": "web"}]}));
    let site = Site::new(&consul, Some(token));
    let (address, file) = (consul.address().to_string(), site.folder.path().join("token"));
    let output = init(&["-role", "worker", "-apply", "-http-addr", &address, "-token-file", file.to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(78), "{}", err(&output));
    assert!(
        err(&output).contains("service airflow-worker: HTTP 403") && err(&output).contains("the token needs service"),
        "{}",
        err(&output)
    );
}

#[test]
fn what_somebody_else_decided_stays_unless_forced() {
    let agent = Agent::start();
    let site = Site::new(&agent, None);
    agent.deny("airflow-worker", "redis");
    agent.register(&support::Definition::new("airflow-worker"));
    let (code, lines) = site.apply(&WORKER);
    let of = |lines: &[Value], name: &str| lines.iter().find(|line| line["name"] == name).expect("its line").clone();
    assert_eq!(code, Some(1), "{lines:#?}");
    for name in ["airflow-worker", "allow airflow-worker -> redis"] {
        let line = of(&lines, name);
        assert!(line["done"] == "kept" && line["detail"].as_str().is_some_and(|detail| detail.contains("-force")), "{line}");
    }
    assert_eq!(of(&lines, "allow airflow-worker -> results")["done"], "made");
    let (code, lines) = site.apply(&[&WORKER[..], &["-force"]].concat());
    assert_eq!(code, Some(0), "{lines:#?}");
    assert_eq!(of(&lines, "allow airflow-worker -> redis")["detail"], "was deny");
    assert_eq!(of(&lines, "airflow-worker")["done"], "changed");
    site.all_become(&WORKER, "unchanged");
    // The other sources of a service stay.
    agent.allow("somebody", "redis");
    site.all_become(&WORKER, "unchanged");
    assert!(agent.intention_id("somebody", "redis").is_some());
}

#[test]
fn the_entries_are_consuls() {
    let folder = support::scratch();
    let path = folder.path().to_str().expect("UTF-8");
    succeeds(&[&WORKER[..], &["-out", path]].concat());
    let written = files(folder.path());
    let entries: Vec<&String> = written.keys().filter(|name| name.starts_with("consul/intentions-")).collect();
    assert_eq!(entries.len(), 5, "{entries:?}");
    for name in entries {
        let copy = folder.path().join("entry.hcl");
        std::fs::write(&copy, &written[name]).expect("copied");
        let address = ports::free_address();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
        command.args(["agent", "-default-policy", "deny", "-bind", &address.to_string(), "-config-file"]).arg(&copy);
        let mut process = Process::start("ringfence agent", &command);
        let list = wait_for("the agent has the entry", PATIENCE, || {
            process.assert_running();
            let answer = support::http::Client::new(address, None).try_get("/v1/connect/intentions")?;
            let list: Value = serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
            if list.as_array().is_some_and(|list| !list.is_empty()) { Ok(list) } else { Err(answer.body) }
        });
        for one in list.as_array().expect("a list") {
            assert!(name.contains(one["DestinationName"].as_str().expect("a name")), "{name}: {one}");
        }
    }
}

#[test]
fn the_sidecar_runs_on_what_was_written() {
    let agent = Agent::start();
    let site = Site::new(&agent, None);
    let (base, upstream) = (free_base(), format!("warehouse:{}:postgres", ports::free()));
    let roles = ["-role", "worker", "-role", "triggerer"];
    site.all_become(&[&roles[..], &["-upstream", &upstream, "-port-base", &base.to_string()]].concat(), "made");
    let rules = site.out().join("airflow.toml");
    let socket = site.folder.path().join("airflow.sock");
    let text = std::fs::read_to_string(&rules).expect("rules");
    let text = text
        .replace("/run/ringfence/airflow.sock", socket.to_str().expect("UTF-8"))
        .replace("cgroup = \"auto\"", "cgroup = \"off\"");
    std::fs::write(&rules, text).expect("rules");
    let second = ["-sidecar-for", "airflow-triggerer", "-airflow", rules.to_str().expect("UTF-8")];
    let mut sidecar = Sidecar::of("airflow-worker").arguments(&second).start(&agent);
    let port: u16 = upstream.split(':').nth(1).and_then(|port| port.parse().ok()).expect("a port");
    drop(std::net::TcpStream::connect(("127.0.0.1", port)).expect("the upstream's listener is there"));
    drop(std::net::TcpStream::connect(("127.90.1.2", base + 15)).expect("leased addresses are reached"));
    sidecar.assert_healthy();
}

/// Twenty ports in a row that nobody has now.
fn free_base() -> u16 {
    let free = |base: u16| (base..base + 20).all(|port| std::net::TcpListener::bind(("0.0.0.0", port)).is_ok());
    (0..200)
        .map(|_| ports::free())
        .find(|base| *base < 31_000 && !(20_980..21_760).contains(base) && free(*base))
        .expect("free ports")
}

#[test]
fn systemd_takes_the_units() {
    let program = support::tool_on_path("systemd-analyze");
    let folder = support::scratch();
    for host in [&WORKER[..], &HEAD[..]] {
        succeeds(&[host, &["-force", "-out", folder.path().to_str().expect("UTF-8")]].concat());
    }
    let units = folder.path().join("systemd");
    let ours = units.join("ringfence-airflow.service");
    let text = std::fs::read_to_string(&ours).expect("the unit");
    // The program where this test has it.
    std::fs::write(&ours, text.replace("/usr/bin/ringfence", env!("CARGO_BIN_EXE_ringfence"))).expect("the unit");
    let mut names = vec![ours];
    for entry in std::fs::read_dir(&units).expect("units") {
        let path = entry.expect("an entry").path();
        if let Some(unit) = path.to_str().and_then(|path| path.strip_suffix(".d")) {
            // Airflow's own unit is somebody else's; any will do under the drop-in, whose settings file must be there.
            std::fs::write(unit, "[Service]\nExecStart=/bin/true\n").expect("a unit");
            names.push(unit.into());
        }
    }
    assert_eq!(names.len(), 6, "{names:?}");
    let mut command = Command::new(program);
    // Dependencies of the whole system are not at stake.
    command.args(["verify", "--recursive-errors=no", "--man=no"]).args(&names);
    command.env("SYSTEMD_UNIT_PATH", format!("{}:", units.display()));
    let output = command.output().expect("systemd-analyze runs");
    let said = out(&output) + &err(&output);
    assert!(output.status.success(), "{said}");
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("airflow")).collect();
    assert!(ours.is_empty(), "systemd complains:\n{}", ours.join("\n"));
}

#[test]
fn nothing_is_replaced_unasked() {
    let folder = support::scratch();
    let path = folder.path().to_str().expect("UTF-8");
    let first = succeeds(&["-role", "worker", "-out", path]);
    assert!(first.lines().all(|line| line.starts_with("written ")), "{first}");
    let again = succeeds(&["-role", "worker", "-out", path]);
    assert!(again.lines().all(|line| line.starts_with("unchanged ")), "{again}");
    let mine = "# my own rules\n";
    std::fs::write(folder.path().join("airflow.toml"), mine).expect("written");
    std::fs::remove_file(folder.path().join("airflow.env")).expect("removed");
    let agent_away = ["-apply", "-http-addr", "127.0.0.1:1"];
    let output = init(&[&["-role", "worker", "-out", path], &agent_away[..]].concat());
    assert_eq!(output.status.code(), Some(78), "{}", err(&output));
    assert!(err(&output).contains("airflow.toml") && err(&output).contains("-force"), "{}", err(&output));
    assert_eq!(std::fs::read_to_string(folder.path().join("airflow.toml")).expect("read"), mine);
    assert!(!folder.path().join("airflow.env").exists(), "nothing at all is written");
    let forced = succeeds(&["-role", "worker", "-out", path, "-force"]);
    assert!(forced.contains("replaced  ") && forced.contains("written   "), "{forced}");
}

#[test]
fn every_file_is_printed_with_its_heading_or_as_json() {
    let text = succeeds(&HEAD);
    for name in
        ["INSTALL.txt", "airflow.toml", "airflow.env", "systemd/ringfence-airflow.service", "consul/airflow-scheduler.hcl"]
    {
        assert!(text.contains(&format!("==> {name} <==\n")), "no {name}");
    }
    let lines = succeeds(&[&HEAD[..], &["-json"]].concat());
    let count = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
        .filter(|line| line["text"].is_string())
        .count();
    assert_eq!(count, text.matches("==> ").count());
}

#[test]
fn the_environments_token_is_in_no_file_and_in_no_message() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command
        .args(["airflow", "init", "-role", "worker", "-apply", "-http-addr", "127.0.0.1:1"])
        .env_clear()
        .env("CONSUL_HTTP_TOKEN", MASKED);
    let output = command.output().expect("runs");
    assert_ne!(output.status.code(), Some(0));
    assert!(err(&output).contains("127.0.0.1:1"), "{}", err(&output));
    assert!(!err(&output).contains(MASKED) && !out(&output).contains(MASKED));
}

#[test]
fn mistakes_end_with_64_and_say_what_to_write() {
    for (line, wanted) in [
        ("", "-role scheduler"),
        ("-role boss", "scheduler, api-server, worker"),
        ("-role worker -upstream warehouse", "as in warehouse:25435:postgres"),
        ("-role worker -upstream warehouse:40000", "40000"),
        ("-role worker -port-base 21000", "Consul gives ports"),
        ("-role worker -executor local", "-executor local"),
        ("-role worker -airflow 1", "write 2 or 3"),
        ("-role worker -database 'x", "name of a Consul service"),
        ("-role worker -rol x", "did you mean -role?"),
        ("-role worker -apply -login-method m -login-bearer-token-file /f", "-token-file"),
    ] {
        let output = init(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(64), "{line}: {}", err(&output));
        assert!(err(&output).contains(wanted), "{line}: {}", err(&output));
    }
}
