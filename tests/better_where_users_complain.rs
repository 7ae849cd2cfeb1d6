//! What users of Envoy behind Consul complain about, shown on a real Envoy 1.40 that runs what Consul sends it, and on
//! ringfence in the same place. Each test fails if Envoy does not have the fault, or if ringfence has it.
//!
//! Envoy's listener comes from a file that is replaced, which to Envoy is what an update of Consul's xDS server is: leaf and
//! RBAC stand in the listener, so a change of either replaces it.

mod support;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::http::Client;
use support::mesh::Leaf;
use support::tls::{self, ClientStream};
use support::{Agent, Banner, Definition, Echo, Mesh, PATIENCE, Process, Sidecar, pause, ports, traffic, wait_for, wait_until};

/// What Envoy gives connections of a listener that was replaced; 600 s unless told.
const ENVOY_DRAIN_SECONDS: u64 = 2;
/// Long enough for a drained connection to be gone.
const AFTER_DRAIN: Duration = Duration::from_secs(ENVOY_DRAIN_SECONDS + 2);

/// The public listener of `db`, by Envoy.
struct Envoy {
    process: Process,
    folder: tempfile::TempDir,
    public: SocketAddr,
    admin: SocketAddr,
    versions: u32,
}

impl Envoy {
    fn start(app: SocketAddr, drain_seconds: u64, mesh: &dyn Mesh, allowed: &[&str]) -> Self {
        let (public, admin) = (ports::free_address(), ports::free_address());
        let folder = support::scratch();
        let listeners = folder.path().join("listeners.json");
        let bootstrap = json!({
            "node": {"id": "db-sidecar-proxy", "cluster": "db"},
            "admin": {"address": address(admin)},
            "dynamic_resources": {"lds_config": {"resource_api_version": "V3", "path_config_source": {"path": listeners}}},
            "static_resources": {"clusters": [{"name": "local_app", "type": "STATIC", "connect_timeout": "5s", "load_assignment": {
                "cluster_name": "local_app", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(app)}}]}]}}]},
        });
        let mut command = Command::new(support::tool(support::cache().join("envoy-1.40/envoy")));
        command.args(["--config-yaml", &bootstrap.to_string(), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
        command.args(["--drain-time-s", &drain_seconds.to_string()]);
        // The file must be there before Envoy looks for it.
        write_listener(&folder, public, &mesh.leaf("db"), mesh, allowed, 1);
        let process = Process::start("envoy", &command);
        let mut envoy = Self { process, folder, public, admin, versions: 1 };
        wait_for("Envoy listens", PATIENCE, || {
            envoy.process.assert_running();
            std::net::TcpStream::connect(public).map_err(|error| format!("{error}\n{}", envoy.process.tail()))
        });
        envoy
    }

    /// A listener with this leaf and these sources, in force when this returns.
    fn update(&mut self, leaf: &Leaf, mesh: &dyn Mesh, allowed: &[&str]) {
        self.versions += 1;
        write_listener(&self.folder, self.public, leaf, mesh, allowed, self.versions);
        let modified = u64::from(self.versions - 1);
        wait_for("Envoy takes the listener", PATIENCE, || {
            let stats = Client::new(self.admin, None).get("/stats?filter=listener_manager.listener_modified").body;
            let count: Option<u64> = stats.trim().rsplit(": ").next().and_then(|count| count.parse().ok());
            if count == Some(modified) { Ok(()) } else { Err(format!("{stats}{}", self.process.tail())) }
        });
    }
}

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
}

/// What Consul sends: RBAC by the URI SAN, then tcp_proxy, behind TLS that wants a certificate. Replaced in one step.
fn write_listener(folder: &tempfile::TempDir, public: SocketAddr, leaf: &Leaf, mesh: &dyn Mesh, allowed: &[&str], version: u32) {
    let principals: Vec<Value> = allowed
        .iter()
        .map(|source| {
            let regex = format!("^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{source}$");
            json!({"authenticated": {"principal_name": {"safe_regex": {"regex": regex}}}})
        })
        .collect();
    let rules = if principals.is_empty() {
        json!({})
    } else {
        json!({"policies": {"consul-intentions-layer4": {"permissions": [{"any": true}], "principals": principals}}})
    };
    let log = json!([{"name": "stdout", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"}}]);
    let listener = json!({
        "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
        "name": "public_listener", "address": address(public), "traffic_direction": "INBOUND",
        "filter_chains": [{
            "filters": [
                {"name": "envoy.filters.network.rbac", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
                    "stat_prefix": "connect_authz", "rules": rules}},
                {"name": "envoy.filters.network.tcp_proxy", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                    "stat_prefix": "public_listener", "cluster": "local_app", "access_log": log}},
            ],
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": true,
                "common_tls_context": {
                    "tls_certificates": [{
                        "certificate_chain": {"inline_string": leaf.chain_pem}, "private_key": {"inline_string": leaf.key_pem}}],
                    "validation_context": {"trusted_ca": {"inline_string": mesh.roots_pem()}},
                },
            }},
        }],
    });
    let (next, current) = (folder.path().join("next.json"), folder.path().join("listeners.json"));
    let document = json!({"version_info": version.to_string(), "resources": [listener]});
    std::fs::write(&next, document.to_string()).expect("the listener's file");
    std::fs::rename(next, current).expect("the listener's file in its place");
}

/// Both in front of one app, with one mesh.
struct Both {
    envoy: Envoy,
    ringfence: Sidecar,
    ringfence_public: SocketAddr,
    mesh: Agent,
    web: Leaf,
}

impl Both {
    fn start(app: SocketAddr, drain_seconds: u64, allowed: &[&str]) -> Self {
        let mesh = Agent::start();
        let definition = Definition::new("db").app(app);
        mesh.register(&definition);
        mesh.register(&Definition::new("web"));
        allowed.iter().for_each(|source| mesh.allow(source, "db"));
        let envoy = Envoy::start(app, drain_seconds, &mesh, allowed);
        let ringfence = Sidecar::start(&mesh, "db");
        let web = mesh.leaf("web");
        Self { envoy, ringfence, ringfence_public: definition.public, mesh, web }
    }

    /// A connection as `web` to each, with an echo through it.
    fn live(&self) -> (ClientStream, ClientStream) {
        let open = |public| {
            let mut stream = tls::client(public, Some(&self.web)).expect("a handshake");
            ping(&mut stream).expect("an echo");
            stream
        };
        (open(self.envoy.public), open(self.ringfence_public))
    }
}

fn ping(stream: &mut ClientStream) -> std::io::Result<()> {
    stream.write_all(b"ping")?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// What a peer reads that says nothing itself.
fn read_without_a_word(public: SocketAddr, leaf: &Leaf) -> Vec<u8> {
    let mut received = Vec::new();
    if let Ok(mut stream) = tls::client(public, Some(leaf)) {
        stream.sock.set_read_timeout(Some(Duration::from_secs(2))).expect("a read timeout");
        let mut buffer = [0; 256];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            received.extend_from_slice(&buffer[..length]);
        }
    }
    received
}

/// Envoy #9023: RBAC waits for the first byte of the peer, while the app is dialed at accept.
#[test]
fn a_denied_peer_reads_no_banner() {
    let app = Banner::start("secret banner");
    let both = Both::start(app.address, ENVOY_DRAIN_SECONDS, &[]);
    assert_eq!(read_without_a_word(both.envoy.public, &both.web), b"secret banner\n", "what Envoy gives to a denied peer");
    let accepted = app.accepted();
    assert_eq!(read_without_a_word(both.ringfence_public, &both.web), b"", "what ringfence gives to a denied peer");
    both.ringfence.wait_closed("denied");
    assert_eq!(app.accepted(), accepted, "the app saw a denied peer");
}

/// Envoy #8564, #30037, #35085: an update of a listener ends its connections after the drain time.
#[test]
fn a_new_leaf_cuts_no_connection() {
    let app = Echo::start();
    let mut both = Both::start(app.address, ENVOY_DRAIN_SECONDS, &["web"]);
    let (mut through_envoy, mut through_ringfence) = both.live();
    both.mesh.rotate_ca();
    wait_until("ringfence's new leaf", PATIENCE, || both.ringfence.metrics().sum("ringfence_rotations_total", &[]) >= 2);
    let leaf = both.mesh.leaf("db");
    both.envoy.update(&leaf, &both.mesh, &["web"]);
    pause(AFTER_DRAIN);
    assert!(ping(&mut through_envoy).is_err(), "Envoy keeps connections over a new leaf: this comparison is out of date");
    ping(&mut through_ringfence).expect("the connection lives on");
    both.ringfence.assert_healthy();
}

/// The same by an intention about somebody else.
#[test]
fn an_unrelated_intention_cuts_no_connection() {
    let app = Echo::start();
    let mut both = Both::start(app.address, ENVOY_DRAIN_SECONDS, &["web"]);
    let (mut through_envoy, mut through_ringfence) = both.live();
    both.mesh.register(&Definition::new("api"));
    both.mesh.allow("api", "db");
    let api = both.mesh.leaf("api");
    wait_until("ringfence lets api in", PATIENCE, || {
        tls::client(both.ringfence_public, Some(&api)).is_ok_and(|mut api| ping(&mut api).is_ok())
    });
    let leaf = both.mesh.leaf("db");
    both.envoy.update(&leaf, &both.mesh, &["web", "api"]);
    pause(AFTER_DRAIN);
    assert!(ping(&mut through_envoy).is_err(), "Envoy keeps connections over an intention: this comparison is out of date");
    ping(&mut through_ringfence).expect("the connection lives on");
    both.ringfence.assert_healthy();
}

/// Envoy lets a revoked peer talk for its drain time, ten minutes unless told.
#[test]
fn a_revoked_peer_is_cut_at_once() {
    let app = Echo::start();
    let mut both = Both::start(app.address, 600, &["web"]);
    let (mut through_envoy, mut through_ringfence) = both.live();
    let leaf = both.mesh.leaf("db");
    both.envoy.update(&leaf, &both.mesh, &[]);
    both.mesh.deny("web", "db");
    both.ringfence.wait_closed("revoked");
    assert!(ping(&mut through_ringfence).is_err(), "a revoked peer went on");
    // New connections see the new rules, so they are in force.
    let mut again = tls::client(both.envoy.public, Some(&both.web)).expect("a handshake");
    assert!(ping(&mut again).is_err(), "Envoy has the new rules");
    for _ in 0..5 {
        ping(&mut through_envoy).expect("Envoy lets the revoked peer talk: if not, this comparison is out of date");
        pause(Duration::from_millis(200));
    }
}

/// Envoy #12681, #36346: nothing tells who was denied.
#[test]
fn the_log_names_who_was_denied() {
    let app = Echo::start();
    let both = Both::start(app.address, ENVOY_DRAIN_SECONDS, &[]);
    let mut denied = tls::client(both.envoy.public, Some(&both.web)).expect("a handshake");
    assert!(ping(&mut denied).is_err());
    // Written ten seconds after at most.
    let log = wait_for("Envoy's line", PATIENCE, || {
        let log = both.envoy.process.output();
        if log.contains("[20") { Ok(log) } else { Err(log) }
    });
    assert!(!log.contains("/svc/web"), "Envoy names the denied peer: this comparison is out of date:\n{log}");
    let _ = tls::client(both.ringfence_public, Some(&both.web)).map(|mut denied| ping(&mut denied));
    let line = both.ringfence.wait_closed("denied");
    assert_eq!(line["source"], both.web.uri.as_str());
}

/// Envoy #9300, #5401: a client of Envoy's speaks TLS 1.2 unless told, and Consul does not tell.
#[test]
fn our_own_speak_tls_1_3() {
    let app = Echo::start();
    let pair = support::Pair::local(app.address).wait_open();
    let line = pair.db.wait_connection("an inbound connection", |line| line["reason"] == "complete");
    assert_eq!(line["tls_version"], "TLSv1.3");

    let (reporter, versions) = support::servers::reports();
    let config = tls::server_config(&pair.mesh.leaf("db"));
    let server = support::Custom::start(move |stream| {
        if let Ok(stream) = tls::accept(stream, &config) {
            reporter.send(stream.conn.protocol_version());
        }
    });
    let entry = ports::free_address();
    let bootstrap = json!({"static_resources": {
        "listeners": [{"name": "in", "address": address(entry), "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "in", "cluster": "db"}}]}]}],
        "clusters": [{"name": "db", "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": "db", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(server.address)}}]}]},
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                // As Consul sends it.
                "common_tls_context": {"tls_params": {}, "validation_context": {"trusted_ca": {"inline_string": pair.mesh.roots_pem()}}}}}}],
    }});
    let mut command = Command::new(support::tool(support::cache().join("envoy-1.40/envoy")));
    command.args(["--config-yaml", &bootstrap.to_string(), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
    let envoy = Process::start("envoy", &command);
    wait_for("a connection through Envoy", PATIENCE, || {
        traffic::connect(entry)
            .and_then(|mut stream| stream.write_all(b"x"))
            .map_err(|error| format!("{error}\n{}", envoy.tail()))
    });
    assert_eq!(versions.next(), Some(rustls::ProtocolVersion::TLSv1_2), "Envoy as a client");
}

/// nomad #9749: tens of megabytes a sidecar before anything is asked of it. What a program needs besides its own file is compared,
/// because ringfence's is built for tests here, which makes it many times as large (`benches/NOTES.md` has whole release builds).
#[test]
fn memory_besides_the_program_is_a_tenth() {
    let app = Echo::start();
    let both = Both::start(app.address, ENVOY_DRAIN_SECONDS, &["web"]);
    let _live = both.live();
    let tenth = both.envoy.process.resident_kib() / 10;
    let (envoy, ringfence) = (both.envoy.process.own_kib(), both.ringfence.process.own_kib());
    println!("a tenth of Envoy's memory: {tenth} KiB; without files: Envoy {envoy} KiB, ringfence {ringfence} KiB");
    assert!(envoy > tenth, "Envoy needs {envoy} KiB: this comparison is out of date");
    assert!(ringfence <= tenth, "ringfence needs {ringfence} KiB besides its program, and a tenth of Envoy's is {tenth} KiB");
}

/// Envoy's hot restart hands the sockets over and then ends what is established (`--parent-shutdown-time-s`); kuma #5029.
#[test]
fn an_upgrade_cuts_no_connection() {
    let app = Echo::start();
    let entry = ports::free_address();
    let bootstrap = json!({"static_resources": {
        "listeners": [{"name": "in", "address": address(entry), "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "in", "cluster": "app"}}]}]}],
        "clusters": [{"name": "app", "type": "STATIC", "load_assignment": {
            "cluster_name": "app", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(app.address)}}]}]}}],
    }});
    // One number for both processes and nobody else: a free port is one.
    let base = ports::free().to_string();
    let start = |epoch: &str| {
        let mut command = Command::new(support::tool(support::cache().join("envoy-1.40/envoy")));
        command.args(["--config-yaml", &bootstrap.to_string(), "--concurrency", "1", "-l", "warning", "--base-id", &base]);
        command.args(["--restart-epoch", epoch, "--drain-time-s", "1", "--parent-shutdown-time-s", "2"]);
        Process::start(&format!("envoy {epoch}"), &command)
    };
    let mut first = start("0");
    let mut through_envoy = wait_for("the first echo through Envoy", PATIENCE, || {
        traffic::echo(entry, b"first").map_err(|error| format!("{error}\n{}", first.tail()))?;
        Ok(traffic::Live::open(entry))
    });
    let second = start("1");
    first.wait_exit(PATIENCE);
    assert!(through_envoy.ping().is_err(), "Envoy keeps connections over a hot restart: this comparison is out of date");
    traffic::echo(entry, b"second").unwrap_or_else(|error| panic!("the second Envoy serves: {error}\n{}", second.tail()));

    let pair = support::Pair::local(app.address).wait_open();
    let mut through_ringfence = traffic::Live::open(pair.upstream);
    pair.db.process.signal("USR2");
    let successor = wait_for("the new process serves", PATIENCE, || {
        let output = pair.db.process.output();
        let line = output.lines().find(|line| line.contains("the new process serves")).ok_or_else(|| pair.db.process.tail())?;
        line.rsplit("pid=").next().and_then(|pid| pid.trim().parse::<u32>().ok()).ok_or_else(|| line.to_owned())
    });
    for _ in 0..6 {
        pause(Duration::from_millis(500));
        through_ringfence.ping().expect("the connection lives on in the old process");
    }
    drop(through_ringfence);
    let _ = Command::new("kill").args(["-KILL", &successor.to_string()]).status();
}
