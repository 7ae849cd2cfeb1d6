//! A task that knows an address of the network alone reaches the mesh under its identity, by the rules of `redirect-traffic`;
//! what is locked leaves the host by no other way; and nobody else notices.
//!
//! Each test has a network of its own (`support::namespace`), with a host outside that answers "outside".

mod support;

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::airflow::Host;
use support::namespace::{Outside, call, entered};
use support::{Agent, Custom, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, wait_for};

/// The user of Airflow and its tasks; no file is theirs.
const AIRFLOW: u32 = 54_321;
/// Somebody else.
const OTHER: u32 = 54_322;
const AS_AIRFLOW: &[&str] = &["-user", "54321"];
const DATABASE: u16 = 5_432;

/// A worker host with an upstream `warehouse` that stands for the database of the host outside.
struct World {
    outside: Outside,
    host: Host,
    sidecar: Sidecar,
    redirect: SocketAddr,
    _warehouse: Sidecar,
    _mesh: Agent,
    _app: Custom,
}

impl World {
    fn start() -> Self {
        let outside = Outside::start();
        let (mesh, app, redirect) = (Agent::start(), Echo::start(), ports::free_address());
        mesh.register(&Definition::new("warehouse").app(app.address));
        mesh.register(&Definition::new("airflow-worker").upstream("warehouse", ports::free_address()));
        mesh.allow("airflow-payroll", "warehouse");
        let host = Host::new(&rules(redirect, &["198.51.100.7", "2001:db8::7"], DATABASE));
        let warehouse = Sidecar::start(&mesh, "warehouse");
        let file = host.rules();
        let sidecar = Sidecar::of("airflow-worker").arguments(&["-airflow", file.to_str().expect("text")]).start(&mesh);
        sidecar.wait_endpoint();
        Self { outside, host, sidecar, redirect, _warehouse: warehouse, _mesh: mesh, _app: app }
    }

    /// Runs the command with the host's rules file.
    fn redirect(&self, arguments: &[&str]) -> String {
        let file = self.host.rules();
        succeed(&[&["-airflow", file.to_str().expect("text")], arguments].concat())
    }

    /// What a registered task of Airflow's user gets from this address.
    fn task(&self, name: &str, to: IpAddr, port: u16) -> Value {
        let code = format!(
            "register('payroll_daily', task='{name}')
try:
    with socket.create_connection(('{to}', {port}), timeout=10) as stream:
        stream.sendall(b'message')
        say(stream.recv(7).decode() or 'closed')
except OSError as error:
    say(type(error).__name__)"
        );
        self.host.task_as(AIRFLOW, &code).remove(0)
    }

    fn line_of(&self, task: &str) -> Value {
        self.sidecar.wait_connection(task, |line| line["caller"]["task"] == task)
    }
}

/// A rules file whose redirect listeners stand for `port` of these networks.
fn rules(redirect: SocketAddr, to: &[&str], port: u16) -> String {
    let v6 = SocketAddr::new(IpAddr::from(std::net::Ipv6Addr::LOCALHOST), redirect.port());
    format!(
        "redirect = [\"{redirect}\", \"{v6}\"]
[[component]]\nname = \"airflow-scheduler\"\nuser = \"{AIRFLOW}\"\ntitle = \"airflow scheduler*\"
[[component]]\nname = \"airflow-worker\"\nuser = \"root\"\ntitle = \"airflow scheduler*\"
[[rule]]\nname = \"payroll\"\nidentity = \"airflow-payroll\"\ndag = [\"payroll_*\"]
[[route]]\nto = {to:?}\nport = {port}\nupstream = \"warehouse\"\n"
    )
}

fn redirect_traffic(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringfence")).arg("redirect-traffic").args(arguments).output().expect("it runs")
}

fn succeed(arguments: &[&str]) -> String {
    let output = redirect_traffic(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Exit code, and what it printed.
fn fail(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat())
}

/// Packets that the rule with `part` has counted.
fn counted(part: &str) -> u64 {
    let output = Command::new("nft").args(["list", "table", "inet", "ringfence"]).output().expect("nft runs");
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = listing.lines().find(|line| line.contains(part)).unwrap_or_else(|| panic!("{part} is not in {listing}"));
    let packets = line.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
    packets.and_then(|packets| packets.parse().ok()).unwrap_or_else(|| panic!("no counter: {line}"))
}

#[test]
fn a_task_that_knows_an_address_alone_speaks_under_its_identity() {
    if !entered("a_task_that_knows_an_address_alone_speaks_under_its_identity") {
        return;
    }
    let world = World::start();
    let (v4, v6) = (world.outside.v4(), world.outside.v6());
    assert_eq!(world.task("before", v4, DATABASE), "outside", "without rules nothing is redirected");

    world.redirect(AS_AIRFLOW);
    for (name, to) in [("four", v4), ("six", v6)] {
        assert_eq!(world.task(name, to, DATABASE), "message", "{name}: the warehouse echoes");
        let line = world.line_of(name);
        assert_eq!((&line["caller"]["identity"], &line["caller"]["tier"]), (&json!("airflow-payroll"), &json!("cgroup")));
        assert_eq!(line["original"], json!(SocketAddr::new(to, DATABASE).to_string()));
        assert_eq!((&line["upstream"], &line["reason"]), (&json!("warehouse"), &json!("complete")));
    }
    let unregistered = call(Some(AIRFLOW), v4, DATABASE, "tcp");
    assert_ne!(unregistered, "outside", "whoever is no task does not get past the mesh either");
    let line = world.sidecar.wait_closed("caller_denied");
    assert_eq!((&line["caller"]["tier"], &line["caller"]["uid"]), (&json!("unidentified"), &json!(AIRFLOW)), "{line}");

    let lines = world.sidecar.connections().len();
    for uid in [None, Some(OTHER)] {
        assert_eq!(call(uid, v4, DATABASE, "tcp"), "outside", "user {uid:?} is not meant");
    }
    assert_eq!(world.task("elsewhere", v4, DATABASE + 1), "outside", "a port without a route is not redirected");
    assert_eq!(world.sidecar.connections().len(), lines, "the sidecar saw none of these");

    for _ in 0..2 {
        succeed(&["-remove"]);
    }
    assert_eq!(world.task("after", v4, DATABASE), "outside", "the redirection is gone");
}

#[test]
fn what_no_route_covers_is_refused_at_the_listener() {
    if !entered("what_no_route_covers_is_refused_at_the_listener") {
        return;
    }
    let world = World::start();
    world.redirect(AS_AIRFLOW);
    // The routes shrink, the kernel's rules do not know yet.
    world.host.write_rules(&rules(world.redirect, &["198.51.100.7"], DATABASE + 1));
    let original = json!(SocketAddr::new(world.outside.v4(), DATABASE).to_string());
    let line = wait_for("the new rules are taken over", PATIENCE, || {
        let answer = world.task("unrouted", world.outside.v4(), DATABASE);
        let unrouted = |line: &Value| line["reason"] == "no_route" && line["original"] == original;
        world.sidecar.connections().into_iter().find(unrouted).ok_or_else(|| answer.to_string())
    });
    assert!(line["detail"].as_str().is_some_and(|detail| detail.contains("[[route]]")), "{line}");
    assert_eq!(line["service"], "redirect");

    let answer = world.task("direct", world.redirect.ip(), world.redirect.port());
    assert!(answer == "closed" || answer == "ConnectionResetError", "{answer}");
    let line = world.sidecar.wait_connection("direct", |line| line["reason"] == "no_route" && line["original"].is_null());
    assert!(line["detail"].as_str().is_some_and(|detail| detail.contains("without being redirected")), "{line}");
}

#[test]
fn a_locked_user_leaves_the_host_by_no_other_way() {
    if !entered("a_locked_user_leaves_the_host_by_no_other_way") {
        return;
    }
    let world = World::start();
    let (v4, v6) = (world.outside.v4(), world.outside.v6());
    let (mut standing, mut answered) = standing_connection(v4, "outside");
    world.redirect(&[AS_AIRFLOW, &["-lock", "-allow", "198.51.100.0/24:443", "-allow", "198.51.100.7:53"]].concat());

    assert_eq!(world.task("mesh", v4, DATABASE), "message", "what has a route still gets to the mesh");
    for (to, port, why) in [(v4, DATABASE + 1, "no route"), (v4, 9_000, "not allowed"), (v6, 443, "allowed for IPv4 only")] {
        assert_eq!(call(Some(AIRFLOW), to, port, "tcp"), "ConnectionRefusedError", "{to} {port}: {why}");
    }
    assert_eq!(counted("reject with tcp reset"), 3);
    assert_eq!(call(Some(AIRFLOW), v4, 443, "tcp"), "outside");
    assert_eq!(counted("tcp dport 443"), 1);
    assert_eq!(call(Some(AIRFLOW), v4, 53, "udp"), "outside", "the resolver that is allowed");
    assert_eq!(call(Some(AIRFLOW), v4, 53, "tcp"), "outside", "long answers come by TCP");
    assert!(["TimeoutError", "PermissionError"].contains(&&*call(Some(AIRFLOW), v4, 9_000, "udp")));
    assert!(["TimeoutError", "PermissionError"].contains(&&*call(Some(AIRFLOW), v4, 443, "udp")), "QUIC is no way out");
    assert_eq!(counted(" drop"), 2, "both");
    for uid in [None, Some(OTHER)] {
        assert_eq!(call(uid, v4, 9_000, "tcp"), "outside", "user {uid:?} is not locked");
        assert_eq!(call(uid, v4, 9_000, "udp"), "outside", "user {uid:?} is not locked");
    }
    let app = Echo::start();
    assert_eq!(call(Some(AIRFLOW), app.address.ip(), app.address.port(), "tcp"), "message", "loopback stays open");

    assert_eq!(answered(), "outside", "what stood before stays, though it would be redirected now");
    standing.kill().expect("our own child");
    standing.wait().expect("ended");
}

/// A connection to the database outside, by Airflow's user, and what makes it send a message and tell the answer.
fn standing_connection(to: IpAddr, wanted: &str) -> (std::process::Child, impl FnMut() -> String) {
    use std::io::Write;
    use std::os::unix::process::CommandExt;
    let code = format!(
        "import socket, sys\nstream = socket.create_connection(('{to}', {DATABASE}), timeout=10)
for line in iter(sys.stdin.readline, ''):\n    stream.sendall(b'message')\n    sys.stdout.buffer.write(stream.recv(7)); sys.stdout.flush()"
    );
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", &code]).uid(AIRFLOW).gid(AIRFLOW).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("python3 runs");
    let (mut stdin, mut stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    let mut answered = move || {
        stdin.write_all(b"\n").expect("it reads");
        let mut answer = [0; 7];
        stdout.read_exact(&mut answer).expect("it answers");
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert_eq!(answered(), wanted);
    (child, answered)
}

#[test]
fn what_is_redirected_stays_connected_when_the_rules_are_replaced() {
    if !entered("what_is_redirected_stays_connected_when_the_rules_are_replaced") {
        return;
    }
    let outside = Outside::start();
    let redirect = ports::free_address();
    let host = Host::new(&rules(redirect, &["198.51.100.0/24"], DATABASE));
    let file = host.rules();
    let base = [&["-airflow", file.to_str().expect("text")], AS_AIRFLOW].concat();
    let _echo = Custom::start_on(redirect, |mut stream| {
        // A client that goes is how it ends.
        let _ = std::io::copy(&mut stream.try_clone().expect("a clone"), &mut stream);
    });
    succeed(&base);
    let (mut standing, mut answered) = standing_connection(outside.v4(), "message");
    for more in [&[][..], &["-lock"], &["-user", "54322"]] {
        succeed(&[&base[..], more].concat());
        assert_eq!(answered(), "message", "{more:?}");
    }
    assert_eq!(counted("dnat ip to"), 0, "a new table counts anew");
    standing.kill().expect("our own child");
    standing.wait().expect("ended");
}

#[test]
fn a_cgroup_stands_for_every_user_in_it() {
    if !entered("a_cgroup_stands_for_every_user_in_it") {
        return;
    }
    let world = World::start();
    // Tasks get cgroups below this one.
    let cgroup = world.host.cgroup().to_str().expect("text").to_owned();
    world.redirect(&["-cgroup", &cgroup, "-lock"]);
    assert_eq!(world.task("placed", world.outside.v4(), DATABASE), "message");
    assert_eq!(world.line_of("placed")["caller"]["identity"], "airflow-payroll");
    // A task of root's that becomes somebody else, as with run_as_user.
    let code = format!(
        "register('payroll_daily', task='other_user')
os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER})
with socket.create_connection(('{}', {DATABASE}), timeout=10) as stream:
    stream.sendall(b'message'); say(stream.recv(7).decode())",
        world.outside.v4()
    );
    assert_eq!(world.host.task(&code), ["message"]);
    assert_eq!(world.line_of("other_user")["caller"]["identity"], "airflow-payroll");
    assert_eq!(world.task("locked", world.outside.v4(), 9_000), "ConnectionRefusedError");
    assert_eq!(call(Some(AIRFLOW), world.outside.v4(), DATABASE, "tcp"), "outside", "the same user, in no cgroup of a task");
    assert!(world.redirect(&["-cgroup", &cgroup, "-lock", "-check"]).contains("as they should be"));
}

#[test]
fn a_check_tells_what_differs_and_loading_twice_changes_nothing() {
    if !entered("a_check_tells_what_differs_and_loading_twice_changes_nothing") {
        return;
    }
    let host = Host::new(&rules(ports::free_address(), &["198.51.100.7"], DATABASE));
    let file = host.rules();
    let base = [&["-airflow", file.to_str().expect("text")], AS_AIRFLOW].concat();
    let check = [&base[..], &["-check"]].concat();
    let (code, text) = fail(&redirect_traffic(&check));
    assert!(code == Some(1) && text.contains("no rules are loaded"), "{text}");
    succeed(&base);
    let listing = || Command::new("nft").args(["-s", "list", "ruleset"]).output().expect("nft runs").stdout;
    let once = listing();
    succeed(&base);
    assert_eq!(listing(), once);
    assert!(succeed(&check).contains("as they should be"));
    let same: Value = serde_json::from_str(&succeed(&[&check[..], &["-json"]].concat())).expect("JSON");
    assert_eq!((&same["same"], &same["loaded"]), (&json!(true), &json!(true)));

    let status = Command::new("nft").args(["insert", "rule", "inet", "ringfence", "outgoing", "accept"]).status();
    assert!(status.expect("nft runs").success());
    host.write_rules(&rules(ports::free_address(), &["198.51.100.8"], DATABASE));
    let (code, text) = fail(&redirect_traffic(&[&check[..], &["-json"]].concat()));
    let differs: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(code, Some(1), "{differs}");
    assert!(differs["missing"][0].as_str().is_some_and(|rule| rule.starts_with("to_mesh: ip daddr 198.51.100.8")), "{differs}");
    assert_eq!(differs["unexpected"][0], "outgoing: accept");
    let printed = succeed(&[&base[..], &["-print"]].concat());
    assert!(printed.contains("ip daddr 198.51.100.8 tcp dport 5432"), "{printed}");
    assert_ne!(listing(), once, "printing and checking load nothing");
}

#[test]
fn what_cannot_work_is_refused_with_a_remedy() {
    if !entered("what_cannot_work_is_refused_with_a_remedy") {
        return;
    }
    let listener = ports::free_address();
    let host = Host::new(&rules(listener, &["198.51.100.7"], DATABASE));
    let file = host.rules();
    let base = [&["-airflow", file.to_str().expect("text")], AS_AIRFLOW].concat();
    let program = || Command::new(env!("CARGO_BIN_EXE_ringfence"));
    let run = |command: &mut Command| fail(&command.arg("redirect-traffic").args(&base).output().expect("it runs"));
    let (code, text) = run(program().env("PATH", "/nonexistent"));
    assert!(code == Some(69) && text.contains("apt install nftables"), "{text}");
    assert!(run(&mut program()).1.contains("nobody listens"), "loaded, with a word on the absent sidecar");
    succeed(&["-remove"]);

    // Whoever serves the listener would be redirected to itself.
    let code = "import socket, sys, time\nserver = socket.create_server(('127.0.0.1', int(sys.argv[1])))\ntime.sleep(60)";
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "54321", "--regid", "54321", "--clear-groups", "--", "/usr/bin/python3", "-c", code]);
    let _server = support::Process::start("a listener", command.arg(listener.port().to_string()));
    wait_for("the user listens", Duration::from_secs(10), || {
        let (code, text) = run(&mut program());
        if code == Some(78) && text.contains("come back to it") { Ok(()) } else { Err(text) }
    });
    host.write_rules("");
    let (code, text) = run(&mut program());
    assert!(code == Some(78) && text.contains("add redirect ="), "{text}");
}
