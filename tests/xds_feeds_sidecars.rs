//! Sidecars that Consul's xDS server tells the mesh: traffic, intentions, rotation, health, a server that goes away, resources
//! that cannot be served.
#![cfg(feature = "xds")]

#[path = "support/xds_resources.rs"]
mod resources;
mod support;
#[path = "support/xds.rs"]
mod xds;
#[path = "support/xds_proxy.rs"]
mod xds_proxy;

use std::net::SocketAddr;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster, UpstreamConnectionOptions};
use envoy_types::pb::envoy::config::core::v3::{HealthStatus, TcpKeepalive};
use envoy_types::pb::google::protobuf::UInt32Value;
use prost::Message as _;
use ringfence::tls::fixtures::{Ca, Leaf, now};

use resources::Material;
use support::traffic::{Live, round_trip};
use support::{Agent, Definition, Echo, Mesh as _, PATIENCE, Sidecar, ports, wait_for, wait_until};
use xds::{CLUSTER, ENDPOINTS, LISTENER, Seen, XdsServer};
use xds_proxy::{Proxy, material};

const TOKEN: &str = "3f1c5e1a-0000-4000-8000-5ec4e7000001";
const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";
/// Revocations are promised at once; a loaded machine gets more.
const CUT_MAX: Duration = Duration::from_secs(2);

/// `web` with an upstream `db`, each fed by a server of its own.
struct Pair {
    ca: Ca,
    web: Proxy,
    db: Proxy,
    upstream: SocketAddr,
    public: SocketAddr,
}

impl Pair {
    fn start(app: SocketAddr) -> Self {
        let ca = Ca::new(TRUST_DOMAIN);
        let (upstream, public) = (ports::free_address(), ports::free_address());
        let (web, db) = (XdsServer::start(), XdsServer::start());
        serve_db(&db, &material(&ca, &ca.leaf("db")), app, public, &["web"]);
        serve_web(&web, &material(&ca, &ca.leaf("web")), ca.id("db").as_str(), upstream, public);
        web.require_token(TOKEN);
        let pair = Self { ca, web: Proxy::start("web", web, TOKEN), db: Proxy::start("db", db, ""), upstream, public };
        pair.db.wait_ready();
        pair.web.wait_ready();
        wait_for("the first echo", PATIENCE, || round_trip(upstream, b"first").map_err(|error| error.to_string()));
        pair
    }

    /// Consul puts the leaf and the intentions into one listener.
    fn allow(&self, allowed: &[&str]) {
        let from = self.db.server.seen().len();
        let material = material(&self.ca, &self.ca.leaf("db"));
        let listener = resources::public_listener(self.public, &material, resources::allow(allowed));
        self.db.server.set(LISTENER, &resources::public_name(self.public), &listener);
        assert_eq!(self.db.server.wait_answered(from, LISTENER), None);
    }

    fn stop(self) {
        self.web.stop();
        self.db.stop();
    }
}

fn serve_db(server: &XdsServer, material: &Material, app: SocketAddr, public: SocketAddr, allowed: &[&str]) {
    let listener = resources::public_listener(public, material, resources::allow(allowed));
    server.set_all(vec![
        (CLUSTER, "local_app".into(), resources::app_cluster(app).encode_to_vec()),
        (LISTENER, resources::public_name(public), listener.encode_to_vec()),
    ]);
}

fn serve_web(server: &XdsServer, material: &Material, db: &str, upstream: SocketAddr, public: SocketAddr) {
    let endpoints = resources::assignment("db", &[(public, HealthStatus::Healthy)]);
    let name = resources::upstream_name("db", upstream);
    server.set_all(vec![
        (CLUSTER, "db".into(), resources::target_cluster("db", material, db).encode_to_vec()),
        (ENDPOINTS, "db".into(), endpoints.encode_to_vec()),
        (LISTENER, name, resources::upstream_listener("db", upstream, "db").encode_to_vec()),
    ]);
}

#[test]
fn a_pair_talks_and_the_server_is_told_who_asks() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    for seed in 0..5 {
        round_trip(pair.upstream, &support::bytes(seed, 100_000)).expect("an echo of 100 kB");
    }
    let seen = pair.web.server.seen();
    assert!(matches!(&seen[0], Seen::Stream { token } if token == TOKEN), "{seen:?}");
    let nodes: Vec<_> = seen.iter().filter(|one| matches!(one, Seen::Node { .. })).collect();
    let [Seen::Node { id, user_agent }] = nodes.as_slice() else { panic!("{seen:?}") };
    assert_eq!((id.as_str(), user_agent.as_str()), ("web-sidecar-proxy", "ringfence"));
    assert!(!seen.iter().any(|one| matches!(one, Seen::Nack { .. })), "{seen:?}");
    pair.stop();
}

#[test]
fn a_change_of_rbac_cuts_the_denied_at_once_and_nobody_else() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let mut live = Live::open(pair.upstream);
    // An intention that does not concern it, and a new leaf with it.
    pair.allow(&["web", "api"]);
    live.ping().expect("still allowed");
    pair.allow(&["api"]);
    println!("cut {:?} after the change", live.wait_cut(CUT_MAX));
    let accepted = app.accepted();
    assert!(round_trip(pair.upstream, b"again").is_err(), "a new connection of the denied service came through");
    assert_eq!(app.accepted(), accepted, "the app saw a connection that was denied");
    pair.allow(&["web"]);
    wait_for("allowed again", PATIENCE, || round_trip(pair.upstream, b"back").map_err(|error| error.to_string()));
    pair.stop();
}

#[test]
fn a_new_leaf_is_used_and_touches_no_live_connection() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let mut live = Live::open(pair.upstream);
    let newer = |service: &str| material(&pair.ca, &Leaf { not_before: now(), serial: vec![0x0c], ..pair.ca.leaf(service) });
    serve_db(&pair.db.server, &newer("db"), app.address, pair.public, &["web"]);
    serve_web(&pair.web.server, &newer("web"), pair.ca.id("db").as_str(), pair.upstream, pair.public);
    wait_until("the new leaves are in use", PATIENCE, || {
        [&pair.web, &pair.db].into_iter().all(|proxy| proxy.serial().as_deref() == Some("0c"))
    });
    live.ping().expect("the live connection");
    round_trip(pair.upstream, b"with the new leaves").expect("a new connection");
    live.ping().expect("the live connection");
    pair.stop();
}

#[test]
fn a_cluster_has_a_keepalive_of_its_own() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let asks = |within: &str| {
        let live = Live::open(pair.upstream);
        let mut ss = std::process::Command::new("ss");
        let told = ss.args(["-tnoH", "dst", &pair.public.to_string()]).output().expect("ss, of scripts/setup packages");
        drop(live);
        let text = String::from_utf8_lossy(&told.stdout).into_owned();
        if text.contains(&format!("timer:(keepalive,{within}")) { Ok(()) } else { Err(text) }
    };
    wait_for("the process's own, 60 s", PATIENCE, || asks("5").or_else(|_| asks("1min,")));
    let keepalive = TcpKeepalive { keepalive_time: Some(UInt32Value { value: 3_900 }), ..TcpKeepalive::default() };
    let options = UpstreamConnectionOptions { tcp_keepalive: Some(keepalive), ..UpstreamConnectionOptions::default() };
    let own = material(&pair.ca, &pair.ca.leaf("web"));
    let cluster = resources::target_cluster("db", &own, pair.ca.id("db").as_str());
    pair.web.server.set(CLUSTER, "db", &Cluster { upstream_connection_options: Some(options), ..cluster });
    wait_for("the cluster's own, 65 minutes", PATIENCE, || asks("6"));
    pair.stop();
}

#[test]
fn endpoints_follow_their_health() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let set = |health| {
        pair.web.server.set(ENDPOINTS, "db", &resources::assignment("db", &[(pair.public, health)]));
    };
    set(HealthStatus::Unhealthy);
    wait_until("nobody is healthy", PATIENCE, || round_trip(pair.upstream, b"unhealthy").is_err());
    set(HealthStatus::Healthy);
    wait_until("healthy again", PATIENCE, || round_trip(pair.upstream, b"healthy").is_ok());
    pair.stop();
}

#[test]
fn a_server_that_is_away_changes_nothing_and_is_told_what_is_held() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let mut live = Live::open(pair.upstream);
    let before = pair.web.server.seen().len();
    pair.web.server.go_away();
    pair.db.server.go_away();
    wait_until("the loss is noticed", PATIENCE, || !pair.web.sidecar.status().agent_reachable);
    live.ping().expect("a live connection while the server is away");
    round_trip(pair.upstream, b"away").expect("a new connection while the server is away");
    // What changes meanwhile is learned afterwards.
    let second = ports::free_address();
    let name = resources::upstream_name("db", second);
    pair.web.server.set(LISTENER, &name, &resources::upstream_listener("db", second, "db"));
    pair.web.server.remove(LISTENER, &resources::upstream_name("db", pair.upstream));
    pair.web.server.come_back();
    pair.db.server.come_back();
    wait_for("the new listener", PATIENCE, || round_trip(second, b"back").map_err(|error| error.to_string()));
    live.ping().expect("the live connection of the listener that went");
    let seen = pair.web.server.seen();
    let held = |wanted: &str| {
        seen[before..].iter().find_map(|one| match one {
            Seen::Initial { kind, versions } if kind == wanted => Some(versions.clone()),
            _ => None,
        })
    };
    for (kind, name) in [(CLUSTER, "db"), (ENDPOINTS, "db"), (LISTENER, &*resources::upstream_name("db", pair.upstream))] {
        assert!(held(kind).is_some_and(|versions| versions.contains_key(name)), "{kind}: {seen:?}");
    }
    wait_until("the old listener is gone", PATIENCE, || std::net::TcpStream::connect(pair.upstream).is_err());
    pair.stop();
}

#[test]
fn a_way_in_that_cannot_be_served_is_refused_with_the_reason_and_lets_nobody_in_until_it_can() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let mut live = Live::open(pair.upstream);
    let from = pair.db.server.seen().len();
    let material = material(&pair.ca, &pair.ca.leaf("db"));
    let wasm = resources::filter("envoy.filters.network.wasm", "wasm.v3.Wasm", &());
    let listener = resources::public_listener(pair.public, &material, wasm);
    pair.db.server.set(LISTENER, &resources::public_name(pair.public), &listener);
    let told = pair.db.server.wait_answered(from, LISTENER).expect("a nack");
    assert!(told.contains(&resources::public_name(pair.public)) && told.contains("envoy.filters.network.wasm"), "{told}");
    assert!(told.contains("filter_chains[0].filters[0].name") && !told.contains("PRIVATE"), "{told}");
    // Whom the new one denies is not known, so nobody stays or comes.
    live.wait_cut(PATIENCE);
    assert!(round_trip(pair.upstream, b"meanwhile").is_err(), "let in by a policy that is not in force any more");
    wait_for("the status tells it", PATIENCE, || {
        let problem = pair.db.sidecar.status().services[0].problem.clone().unwrap_or_default();
        if problem.contains("envoy.filters.network.wasm") { Ok(()) } else { Err(problem) }
    });
    pair.allow(&["web"]);
    wait_for("let in again", PATIENCE, || round_trip(pair.upstream, b"mended").map_err(|error| error.to_string()));
    wait_until("the problem is over", PATIENCE, || pair.db.sidecar.status().services[0].problem.is_none());
    pair.stop();
}

#[test]
fn a_token_without_the_right_is_told_which_it_lacks() {
    let server = XdsServer::start();
    server.require_token(TOKEN);
    let proxy = Proxy::start("web", server, "another");
    wait_for("the refusal is told", PATIENCE, || {
        let status = proxy.sidecar.status();
        let problem = status.services.first().and_then(|service| service.problem.clone()).unwrap_or_default();
        assert!(!problem.contains("another"), "the token is told: {problem}");
        if problem.contains("service:write on service web") { Ok(()) } else { Err(problem) }
    });
    proxy.stop();
}

/// One side is fed by the HTTP API and the other by xDS, under one CA.
#[test]
fn both_feeders_make_the_same_mesh() {
    let app = Echo::start();
    let agent = Agent::start();
    let (to_xds, to_http) = (ports::free_address(), ports::free_address());
    let db = Definition::new("db").app(app.address);
    let files = Definition::new("files").app(app.address);
    agent.register(&db);
    agent.register(&files);
    agent.register(&Definition::new("web").upstream("files", to_xds));
    agent.allow("web", "files");
    agent.allow("api", "db");
    let of = |service: &str| {
        let leaf = agent.leaf(service);
        Material { chain_pem: leaf.chain_pem, key_pem: leaf.key_pem, roots_pem: agent.roots_pem() }
    };
    // web over HTTP calls files over xDS; api over xDS calls db over HTTP.
    let (files_server, api_server) = (XdsServer::start(), XdsServer::start());
    serve_db(&files_server, &of("files"), app.address, files.public, &["web"]);
    serve_web(&api_server, &of("api"), &agent.leaf("db").uri, to_http, db.public);
    let files_proxy = Proxy::start("files", files_server, "");
    let api_proxy = Proxy::start("api", api_server, "");
    let web = Sidecar::start(&agent, "web");
    let db_sidecar = Sidecar::start(&agent, "db");
    web.wait_endpoint();
    for upstream in [to_xds, to_http] {
        wait_for("an echo between the feeders", PATIENCE, || {
            let tails = || format!("{}\n{}", web.process.tail(), db_sidecar.process.tail());
            round_trip(upstream, b"hello").map_err(|error| format!("{error}\n{}", tails()))
        });
        round_trip(upstream, &support::bytes(1, 100_000)).expect("an echo of 100 kB");
    }
    files_proxy.stop();
    api_proxy.stop();
}

/// The answer of the admin port, which must read as Envoy's message and hold neither key nor token.
fn dump(proxy: &Proxy, query: &str) -> serde_json::Value {
    let client = support::http::Client::new(proxy.sidecar.admin_address(), None);
    let answer = client.get(&format!("/config_dump{query}"));
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(!answer.body.contains("PRIVATE KEY") && !answer.body.contains(TOKEN), "{query}: {}", answer.body);
    let json = serde_json::from_str(&answer.body).expect("JSON");
    let protos = ringfence::control::xds::proto_json::Protos::load();
    protos.encode("envoy.admin.v3.ConfigDump", &json).unwrap_or_else(|error| panic!("{query}: {error}"));
    json
}

#[test]
fn the_dump_shows_what_the_server_sent_and_what_was_refused() {
    let app = Echo::start();
    let pair = Pair::start(app.address);
    let all = dump(&pair.web, "?include_eds");
    let name = resources::upstream_name("db", pair.upstream);
    let kinds: Vec<&str> = all["configs"].as_array().expect("a list").iter().filter_map(|one| one["@type"].as_str()).collect();
    let wanted = ["Bootstrap", "Clusters", "Endpoints", "Listeners", "Secrets"];
    assert_eq!(kinds, wanted.map(|kind| format!("type.googleapis.com/envoy.admin.v3.{kind}ConfigDump")));
    let cluster = &all["configs"][1]["dynamic_active_clusters"][0];
    assert_eq!(cluster["cluster"]["name"], "db");
    let context = &cluster["cluster"]["transport_socket"]["typed_config"]["common_tls_context"];
    let certificate = &context["tls_certificates"][0];
    assert_eq!(certificate["private_key"]["inline_string"], "[redacted]");
    assert!(certificate["certificate_chain"]["inline_string"].as_str().is_some_and(|pem| pem.contains("BEGIN CERTIFICATE")));
    let endpoints = &all["configs"][2]["dynamic_endpoint_configs"][0]["endpoint_config"]["endpoints"][0]["lb_endpoints"];
    let port = &endpoints[0]["endpoint"]["address"]["socket_address"]["port_value"];
    assert_eq!(*port, pair.public.port());

    let listeners = dump(&pair.web, "?resource=dynamic_listeners");
    assert_eq!(listeners["configs"][0]["name"], name.as_str());
    assert_eq!(listeners["configs"][0]["active_state"]["listener"]["name"], name.as_str());
    let masked = dump(&pair.web, "?mask=dynamic_active_clusters.cluster.name");
    let only = &masked["configs"][0]["dynamic_active_clusters"][0];
    assert_eq!((&only["cluster"]["name"], only.get("version_info")), (&serde_json::json!("db"), None));

    // Refused over one in force, and refused where there never was one.
    let wasm = resources::filter("envoy.filters.network.wasm", "wasm.v3.Wasm", &());
    let material = material(&pair.ca, &pair.ca.leaf("db"));
    let (public, never) = (resources::public_name(pair.public), ports::free_address());
    let from = pair.db.server.seen().len();
    let bad = |at| resources::public_listener(at, &material, wasm.clone()).encode_to_vec();
    pair.db
        .server
        .set_all(vec![(LISTENER, public.clone(), bad(pair.public)), (LISTENER, resources::public_name(never), bad(never))]);
    let told = pair.db.server.wait_answered(from, LISTENER).expect("a nack");
    let listeners = dump(&pair.db, "?resource=dynamic_listeners");
    let named = |name: &str| listeners["configs"].as_array().expect("a list").iter().find(|one| one["name"] == name);
    let old = named(&public).expect("the one in force");
    let details = old["error_state"]["details"].as_str().expect("details");
    assert!(told.contains(details) && details.contains("envoy.filters.network.wasm"), "{details} in {told}");
    assert_ne!(old["error_state"]["version_info"], old["active_state"]["version_info"]);
    let rbac = &old["active_state"]["listener"]["filter_chains"][0]["filters"][0]["name"];
    assert_eq!(rbac, "envoy.filters.network.rbac");
    let new = named(&resources::public_name(never)).expect("the one that never was");
    assert!(new["error_state"]["details"].is_string() && new.get("active_state").is_none(), "{new}");

    // `consul troubleshoot proxy` looks for these.
    let client = support::http::Client::new(pair.db.sidecar.admin_address(), None);
    wait_for("the refusal is counted", PATIENCE, || {
        let stats = client.get("/stats?filter=update_|connected_state").body;
        let has = |line: &str| stats.lines().any(|found| found == line);
        let all = [
            "control_plane.connected_state: 1",
            "cluster_manager.cds.update_success: 1",
            "cluster_manager.cds.update_rejected: 0",
            "listener_manager.lds.update_success: 1",
            "listener_manager.lds.update_rejected: 1",
        ];
        if all.into_iter().all(has) { Ok(()) } else { Err(stats) }
    });
    pair.stop();
}
