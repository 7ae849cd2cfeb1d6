//! A real Envoy 1.40 and ringfence start one after the other from the same file, a bootstrap as Consul 1.10 prints it, and get the
//! same resources from one xDS server. What they serve, how connections end and what their admin ports tell of it is compared.
//!
//! The proxy is a sidecar that is its own upstream: a connection goes in plain at the upstream's listener, over mutual TLS to the
//! public one, and from there to the app, so that one process has both roles.
#![cfg(feature = "xds")]

#[path = "support/xds_resources.rs"]
mod resources;
mod support;
#[path = "support/xds.rs"]
mod xds;
#[path = "support/xds_proxy.rs"]
mod xds_proxy;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::HealthStatus;
use prost::Message as _;
use ringfence::tls::fixtures::Ca;
use serde_json::{Value, json};

use support::http::Client;
use support::traffic::{self, End, read_to_end};
use support::{Custom, PATIENCE, Process, ports, wait_for, wait_until};
use xds::{CLUSTER, ENDPOINTS, LISTENER, XdsServer};
use xds_proxy::material;

const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";
const DB: &str = "db.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul";
/// What the app is asked to do, by the first byte.
const ECHO: u8 = b'e';
const CLIENT_CLOSES_FIRST: u8 = b'c';
const SERVER_CLOSES_FIRST: u8 = b's';
const LENGTH: usize = 200_000;
const ROUND_TRIPS: u64 = 5;

/// What one proxy told and did.
#[derive(Debug)]
struct Told {
    listeners: BTreeSet<String>,
    /// Names in each part of `/config_dump`.
    dump: BTreeMap<&'static str, BTreeSet<String>>,
    /// `ADDRESS::health_flags::healthy` of the upstream's endpoint.
    health: String,
    /// The scopes' stats at layer four.
    names: BTreeSet<String>,
    numbers: BTreeMap<&'static str, u64>,
    /// What the managers counted: after the start, and of changes.
    managed: Vec<[u64; 8]>,
    members: Vec<[u64; 7]>,
    /// As [`Scene::panics`] finds them.
    panics: [(bool, u64); 2],
    half_close: [String; 2],
    /// After the listeners were drained: a new connection, and one that was there.
    drained: [bool; 2],
    exit: Option<i32>,
}

/// Stats that count the same in both.
const NUMBERS: [&str; 10] = [
    "tcp.public_listener.downstream_cx_total",
    "tcp.public_listener.downstream_cx_rx_bytes_total",
    "tcp.public_listener.downstream_cx_tx_bytes_total",
    "tcp.upstream.db.default.dc1.downstream_cx_total",
    "tcp.upstream.db.default.dc1.downstream_cx_rx_bytes_total",
    "cluster.local_app.upstream_cx_total",
    "cluster.local_app.upstream_cx_active",
    "cluster.local_app.membership_healthy",
    "connect_authz.rbac.allowed",
    "connect_authz.rbac.denied",
];

/// Stats of resources that come and go.
const MANAGED: [&str; 8] = [
    "cluster_manager.cluster_added",
    "cluster_manager.cluster_modified",
    "cluster_manager.cluster_removed",
    "cluster_manager.warming_clusters",
    "listener_manager.listener_added",
    "listener_manager.listener_modified",
    "listener_manager.listener_removed",
    "listener_manager.total_listeners_warming",
];

/// Stats of members that come and go.
const MEMBERS: [&str; 7] = [
    "membership_change",
    "membership_total",
    "update_attempt",
    "update_success",
    "update_rejected",
    "update_no_rebuild",
    "update_empty",
];

struct Scene {
    server: XdsServer,
    bootstrap: std::path::PathBuf,
    folder: tempfile::TempDir,
    upstream: SocketAddr,
    public: SocketAddr,
    app: Custom,
    ca: Ca,
}

impl Scene {
    fn new() -> Self {
        let ca = Ca::new(TRUST_DOMAIN);
        let (upstream, public) = (ports::free_address(), ports::free_address());
        let app = Custom::start(|stream| {
            let _ = serve(stream);
        });
        let own = material(&ca, &ca.leaf("db"));
        let server = XdsServer::start();
        let endpoints = resources::assignment(DB, &[(public, HealthStatus::Healthy)]);
        let listener = resources::public_listener(public, &own, resources::allow(&["db"]));
        let cluster = resources::target_cluster(DB, &own, ca.id("db").as_str());
        server.set_all(vec![
            (CLUSTER, "local_app".into(), resources::app_cluster(app.address).encode_to_vec()),
            (CLUSTER, DB.into(), Cluster { common_lb_config: None, ..cluster }.encode_to_vec()),
            (ENDPOINTS, DB.into(), endpoints.encode_to_vec()),
            (LISTENER, resources::public_name(public), listener.encode_to_vec()),
            (
                LISTENER,
                resources::upstream_name("db", upstream),
                resources::upstream_listener("db", upstream, DB).encode_to_vec(),
            ),
        ]);
        let folder = support::scratch();
        let bootstrap = folder.path().join("bootstrap.json");
        std::fs::write(&bootstrap, written_for(server.address).to_string()).expect("the bootstrap");
        Self { server, bootstrap, folder, upstream, public, app, ca }
    }

    fn run(&self, name: &str, program: &Path, more: &[&str]) -> Told {
        let admin_file = self.folder.path().join(format!("{name}.admin"));
        let mut command = Command::new(program);
        command.args(more).arg("-c").arg(&self.bootstrap).arg("--admin-address-path").arg(&admin_file);
        command.args(["--concurrency", "1", "--drain-time-s", "1", "-l", "warning", "--disable-hot-restart"]);
        let mut process = Process::start(name, &command);
        let admin: SocketAddr = wait_for("the admin port's address is written", PATIENCE, || {
            let text = std::fs::read_to_string(&admin_file).map_err(|error| format!("{error}\n{}", process.tail()))?;
            text.trim().parse().map_err(|error| format!("{text}: {error}"))
        });
        let client = Client::new(admin, None);
        let first = || asked(self.upstream, ECHO, |stream| echoes(stream, 1)).map_err(|why| format!("{why}\n{}", process.tail()));
        wait_for("the first echo", PATIENCE, || client.try_get("/ready").and_then(|_| first()));
        // A cluster that changes is made anew in Envoy, and its members come once more; so these are first.
        let members = self.members(&client);
        let panics = self.panics(&client);
        let managed = self.managed(&client);
        client.post("/reset_counters", &Value::Null).ok("counters begin anew");

        for _ in 0..ROUND_TRIPS {
            asked(self.upstream, ECHO, |stream| echoes(stream, LENGTH)).expect("an echo");
        }
        let half_close = [CLIENT_CLOSES_FIRST, SERVER_CLOSES_FIRST].map(|first| half_closed(self.upstream, first));
        let quiet = |stats: &str| number(stats, "cluster.local_app.upstream_cx_active") == 0;
        wait_until("the last of them ends", PATIENCE, || quiet(&client.get("/stats").body));
        let stats = client.get("/stats").ok("stats").body;
        let told = Told {
            listeners: client.get("/listeners").body.lines().map(str::to_owned).collect(),
            dump: dumped(&client),
            health: health(&client),
            names: stats.lines().filter_map(|line| self.at_layer_four(line.split(": ").next()?)).collect(),
            numbers: NUMBERS.iter().map(|name| (*name, number(&stats, name))).collect(),
            managed,
            members,
            panics,
            half_close,
            drained: self.drained(&client),
            exit: None,
        };
        process.signal("TERM");
        Told { exit: process.wait_exit(PATIENCE).code(), ..told }
    }

    /// What the managers count: now, with a cluster that changed and one that waits for its endpoints, and after that went.
    fn managed(&self, client: &Client) -> Vec<[u64; 8]> {
        let now = || {
            let stats = client.get("/stats").ok("stats").body;
            MANAGED.map(|name| number(&stats, name))
        };
        let start = now();
        let app = resources::app_cluster(self.app.address);
        let slower = Some(envoy_types::pb::google::protobuf::Duration { seconds: 7, nanos: 0 });
        self.server.set(CLUSTER, "local_app", &Cluster { connect_timeout: slower, ..app.clone() });
        let own = material(&self.ca, &self.ca.leaf("db"));
        self.server.set(CLUSTER, "waits", &resources::target_cluster("waits", &own, self.ca.id("db").as_str()));
        let changed = wait_for("a cluster changes and one waits", PATIENCE, || {
            let counts = now();
            if counts[1] > start[1] && counts[3] == 1 { Ok(counts) } else { Err(format!("{counts:?}")) }
        });
        self.server.remove(CLUSTER, "waits");
        self.server.set(CLUSTER, "local_app", &app);
        let gone = wait_for("both are as they were", PATIENCE, || {
            let counts = now();
            if counts[1] > changed[1] && counts[2] == 1 { Ok(counts) } else { Err(format!("{counts:?}")) }
        });
        vec![start, changed, gone]
    }

    /// What is counted of members: of the app's, and of a cluster's as one more comes, as it is told again, and as it goes.
    fn members(&self, client: &Client) -> Vec<[u64; 7]> {
        let now = |cluster: &str| {
            let stats = client.get("/stats").ok("stats").body;
            // What is asked for nowhere is not refused either: Envoy has no such stat then.
            let is_there = |name: &str| stats.contains(&format!("cluster.{cluster}.{name}: "));
            MEMBERS.map(|name| if is_there(name) { number(&stats, &format!("cluster.{cluster}.{name}")) } else { 0 })
        };
        let mut told = vec![now("local_app"), now(DB)];
        let more = [(self.public, HealthStatus::Healthy), (ports::free_address(), HealthStatus::Unhealthy)];
        for members in [&more[..], &more[..], &more[..1]] {
            let accepted = told[told.len() - 1][3];
            self.server.set(ENDPOINTS, DB, &resources::assignment(DB, members));
            told.push(wait_for("members are told", PATIENCE, || {
                let counts = now(DB);
                if counts[3] > accepted { Ok(counts) } else { Err(format!("{counts:?}")) }
            }));
        }
        let mut beyond = resources::assignment(DB, &more[..1]);
        beyond.endpoints[0].priority = 200;
        self.server.set(ENDPOINTS, DB, &beyond);
        told.push(wait_for("members are refused", PATIENCE, || {
            let counts = now(DB);
            if counts[4] == 1 { Ok(counts) } else { Err(format!("{counts:?}")) }
        }));
        self.server.remove(ENDPOINTS, DB);
        told.push(wait_for("members are gone", PATIENCE, || {
            let counts = now(DB);
            if counts[6] == 1 { Ok(counts) } else { Err(format!("{counts:?}")) }
        }));
        self.server.set(ENDPOINTS, DB, &resources::assignment(DB, &more[..1]));
        told.push(wait_for("members are back", PATIENCE, || {
            let (counts, before) = (now(DB), told[told.len() - 1][3]);
            if counts[3] > before { Ok(counts) } else { Err(format!("{counts:?}")) }
        }));
        told
    }

    /// Whether a connection comes through where the only member is told to be unhealthy and where there is none, and how often panic
    /// was counted after each.
    fn panics(&self, client: &Client) -> [(bool, u64); 2] {
        let stat = |name: &str| number(&client.get("/stats").ok("stats").body, &format!("cluster.{DB}.{name}"));
        let told = |members: &[(SocketAddr, HealthStatus)]| {
            let before = stat("update_success");
            self.server.set(ENDPOINTS, DB, &resources::assignment(DB, members));
            wait_until("members are told", PATIENCE, || stat("update_success") > before);
        };
        let counted = [&[(self.public, HealthStatus::Unhealthy)][..], &[]].map(|members| {
            told(members);
            let is_used = asked(self.upstream, ECHO, |stream| echoes(stream, 1)).is_ok();
            (is_used, stat("lb_healthy_panic"))
        });
        told(&[(self.public, HealthStatus::Healthy)]);
        counted
    }

    /// A stat's name where it counts connections, bytes, TLS or decisions of what this proxy was told.
    fn at_layer_four(&self, name: &str) -> Option<String> {
        let listeners = [self.upstream, self.public].map(|address| format!("listener.{}_{}.", address.ip(), address.port()));
        let cluster = format!("cluster.{DB}.");
        let scopes = ["tcp.", "cluster.local_app.", "connect_authz.", &cluster, &listeners[0], &listeners[1]];
        let rest = scopes.iter().find_map(|scope| name.strip_prefix(scope))?;
        let wanted = [
            "downstream_cx_",
            "upstream_cx_",
            "ssl.",
            "rbac.",
            "membership_",
            "upstream_flow_control_",
            "bind_errors",
            "idle_timeout",
        ];
        // Per TLS suite, curve and version there is one where it was seen; HTTP's own are not for here.
        let other =
            ["ciphers.", "curves.", "sigalgs.", "versions.", "_http", "max_requests", "worker_", "certificate.", "upstream_rq_"];
        (wanted.iter().any(|wanted| rest.contains(wanted)) && !other.iter().any(|other| rest.contains(other)))
            .then(|| name.to_owned())
    }

    /// `/drain_listeners` closes the listeners and no connection.
    fn drained(&self, client: &Client) -> [bool; 2] {
        let mut live = TcpStream::connect(self.upstream).expect("it listens");
        live.write_all(&[ECHO]).and_then(|()| echoes(&mut live, 10)).expect("an echo");
        client.post("/drain_listeners", &Value::Null).ok("drained");
        wait_until("the listener closes", PATIENCE, || TcpStream::connect(self.upstream).is_err());
        let new = asked(self.upstream, ECHO, |stream| echoes(stream, 10)).is_ok();
        [new, echoes(&mut live, LENGTH).is_ok()]
    }
}

/// Consul's bootstrap with our server in it, and an admin port that the system chooses.
fn written_for(server: SocketAddr) -> Value {
    let path = format!("{}/tests/fixtures/consul-1.10/xds/sidecar.bootstrap.json", env!("CARGO_MANIFEST_DIR"));
    let mut bootstrap: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("the fixture")).expect("JSON");
    bootstrap["admin"]["address"]["socket_address"]["port_value"] = 0.into();
    bootstrap["node"] = json!({"id": "db-sidecar-proxy", "cluster": "db", "metadata": bootstrap["node"]["metadata"]});
    let clusters = bootstrap["static_resources"]["clusters"].as_array_mut().expect("clusters");
    let agent = clusters.iter_mut().find(|cluster| cluster["name"] == "local_agent").expect("Consul's agent");
    let address = &mut agent["loadAssignment"]["endpoints"][0]["lbEndpoints"][0]["endpoint"]["address"]["socket_address"];
    *address = json!({"address": server.ip().to_string(), "port_value": server.port()});
    bootstrap
}

/// The app.
fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut first = [0];
    stream.read_exact(&mut first)?;
    match first[0] {
        CLIENT_CLOSES_FIRST => {
            let mut request = Vec::new();
            stream.read_to_end(&mut request)?;
            stream.write_all(format!("got {}", request.len()).as_bytes())
        }
        SERVER_CLOSES_FIRST => {
            stream.write_all(b"greeting")?;
            stream.shutdown(Shutdown::Write)?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest)?;
            assert_eq!(rest.len(), LENGTH, "what comes after the half-close");
            Ok(())
        }
        _ => {
            let mut buffer = [0; 65_536];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    length => stream.write_all(&buffer[..length])?,
                }
            }
        }
    }
}

fn asked<T>(at: SocketAddr, first: u8, then: impl FnOnce(&mut TcpStream) -> std::io::Result<T>) -> Result<T, String> {
    let mut stream = traffic::connect(at).map_err(|error| error.to_string())?;
    stream.write_all(&[first]).and_then(|()| then(&mut stream)).map_err(|error| error.to_string())
}

fn echoes(stream: &mut TcpStream, length: usize) -> std::io::Result<()> {
    let bytes = support::bytes(7, length);
    let mut sender = stream.try_clone()?;
    let sent = bytes.clone();
    let sending = std::thread::spawn(move || sender.write_all(&sent));
    let mut got = vec![0; length];
    stream.read_exact(&mut got)?;
    sending.join().expect("the sender")?;
    assert_eq!(got, bytes, "other bytes came back");
    Ok(())
}

/// What the client reads and how that ends, where one side closes its half first.
fn half_closed(at: SocketAddr, first: u8) -> String {
    let read = asked(at, first, |stream| {
        if first == CLIENT_CLOSES_FIRST {
            stream.write_all(&support::bytes(1, LENGTH))?;
            stream.shutdown(Shutdown::Write)?;
            return Ok(read_to_end(stream));
        }
        let greeting = read_to_end(stream);
        stream.write_all(&support::bytes(2, LENGTH))?;
        stream.shutdown(Shutdown::Write)?;
        Ok(greeting)
    });
    let (bytes, end) = read.expect("a half-closed connection goes on");
    format!("{} {}", String::from_utf8_lossy(&bytes), if matches!(end, End::Clean) { "clean" } else { "cut" })
}

fn dumped(client: &Client) -> BTreeMap<&'static str, BTreeSet<String>> {
    let dump = client.get("/config_dump?include_eds").ok("config_dump").json();
    let configs = dump["configs"].as_array().expect("configs");
    let part = |part: &'static str, name: &str| {
        let all = configs.iter().filter_map(|config| config[part].as_array()).flatten();
        (part, all.filter_map(|one| one.pointer(name)?.as_str().map(str::to_owned)).collect::<BTreeSet<_>>())
    };
    let mut parts = BTreeMap::from([
        part("static_clusters", "/cluster/name"),
        part("dynamic_active_clusters", "/cluster/name"),
        part("dynamic_listeners", "/name"),
        part("dynamic_endpoint_configs", "/endpoint_config/cluster_name"),
    ]);
    // Envoy lists the members of clusters that tell their own too.
    parts.get_mut("dynamic_endpoint_configs").expect("there").retain(|name| name == DB);
    parts
}

fn health(client: &Client) -> String {
    let text = client.get("/clusters").ok("clusters").body;
    let line = text.lines().find(|line| line.starts_with(DB) && line.contains("::health_flags::"));
    line.unwrap_or_else(|| panic!("no health in {text}")).to_owned()
}

fn number(stats: &str, name: &str) -> u64 {
    let line = stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    line.unwrap_or_else(|| panic!("no {name}")).parse().expect("a number")
}

#[test]
fn both_serve_and_tell_the_same() {
    let scene = Scene::new();
    let envoy = scene.run("envoy", &support::tool(support::cache().join("envoy-1.40/envoy")), &[]);
    let ours = scene.run("ringfence", Path::new(env!("CARGO_BIN_EXE_ringfence")), &["envoy"]);
    assert!(scene.app.accepted() >= 2 * (ROUND_TRIPS + 3));
    assert_eq!(ours.listeners, envoy.listeners);
    assert_eq!(ours.dump, envoy.dump);
    assert_eq!(ours.health, envoy.health);
    assert_eq!(ours.half_close, envoy.half_close);
    assert_eq!(envoy.half_close, ["got 200000 clean", "greeting clean"]);
    assert_eq!(ours.numbers, envoy.numbers);
    assert_eq!(ours.managed, envoy.managed);
    // The bootstrap has two clusters and a listener besides the two of each that come.
    assert_eq!(envoy.managed[2], [5, 2, 1, 0, 3, 0, 0, 0]);
    assert_eq!(ours.members, envoy.members);
    assert_eq!(ours.panics, envoy.panics);
    assert_eq!(envoy.panics, [(true, 1), (false, 2)], "the cluster says nothing of a threshold, so it is a half");
    assert_eq!(envoy.members[0], [1, 1, 0, 0, 0, 0, 0], "the app's are told with its cluster");
    assert_eq!(envoy.members[4], [3, 1, 5, 4, 0, 1, 0]);
    assert_eq!(envoy.numbers["tcp.public_listener.downstream_cx_total"], ROUND_TRIPS + 2);
    assert_eq!((ours.drained, ours.exit), (envoy.drained, envoy.exit));
    assert_eq!((envoy.drained, envoy.exit), ([false, true], Some(0)));
    let missing: Vec<&String> = envoy.names.difference(&ours.names).collect();
    assert!(missing.is_empty() && envoy.names.len() > 60, "{} names, of which ringfence lacks {missing:#?}", envoy.names.len());
    drop(scene.server);
}
