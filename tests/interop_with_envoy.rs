//! Envoy 1.40 with Consul's certificates on either side. As a client it speaks TLS 1.2.

mod support;

use std::net::SocketAddr;
use std::process::Command;

use serde_json::{Value, json};
use support::traffic::{echo, round_trip};
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Process, Sidecar, ports, wait_for};

#[test]
fn we_dial_envoy() {
    let app = Echo::start();
    let consul = Consul::start();
    let upstream = ports::free_address();
    let db = Definition::new("db").app(app.address);
    consul.register(&db);
    consul.register(&Definition::new("web").upstream("db", upstream));
    let trust_domain = consul.trust_domain();
    let tls = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true,
        "common_tls_context": common_tls(&consul, "db", &format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/web")),
    });
    let _envoy = Envoy::start(db.public, app.address, Some(tls), None);
    let web = Sidecar::start(&consul, "web");
    wait_for("the first echo", PATIENCE, || echo(upstream, b"first").map_err(|error| format!("{error}\n{}", web.process.tail())));
    for seed in 0..20 {
        echo(upstream, &support::bytes(seed, 200_000)).expect("an echo through Envoy");
    }
    let line = web.wait_connection("an outbound connection", |line| line["bytes_from_mesh"] == 200_000);
    assert_eq!(line["tls_version"], "TLSv1.3");
    assert_eq!(line["reason"], "complete");
    let resumed = web.metrics().sum("ringfence_handshakes_resumed_total", &[]);
    assert!(resumed >= 10, "{resumed} of 20 connections in a row resumed the session with Envoy");
}

#[test]
fn envoy_dials_us() {
    let app = Echo::start();
    let consul = Consul::start();
    let definition = Definition::new("db").app(app.address);
    consul.register(&definition);
    consul.register(&Definition::new("web"));
    consul.allow("web", "db");
    let trust_domain = consul.trust_domain();
    let mut db = Sidecar::start(&consul, "db");
    let tls = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": format!("db.default.dc1.internal.{trust_domain}"),
        "common_tls_context": common_tls(&consul, "web", &format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/db")),
    });
    let entry = ports::free_address();
    let envoy = Envoy::start(entry, definition.public, None, Some(tls));
    wait_for("the first echo", PATIENCE, || {
        round_trip(entry, b"first").map_err(|error| format!("{error}\n{}\n{}", envoy.tail(), db.process.tail()))
    });
    for seed in 0..20 {
        echo(entry, &support::bytes(seed, 200_000)).expect("an echo from Envoy");
    }
    let line = db.wait_connection("an inbound connection", |line| line["bytes_from_mesh"] == 200_000);
    assert_eq!(line["tls_version"], "TLSv1.2", "Envoy's default as a client");
    assert!(line["source"].as_str().is_some_and(|id| id.ends_with("/svc/web")), "{line}");
    assert_eq!(line["reason"], "complete");
    let resumed = db.metrics().sum("ringfence_handshakes_resumed_total", &[]);
    assert!(resumed >= 10, "Envoy resumed {resumed} of 20 sessions in a row");

    consul.deny("web", "db");
    support::wait_until("the denial", PATIENCE, || round_trip(entry, b"denied?").is_err());
    db.wait_connection("the denied connection", |line| line["decision"] == "denied");
    db.assert_healthy();
}

struct Envoy;

impl Envoy {
    /// One TCP listener and one cluster, with TLS on either side as given. Waits until it listens.
    fn start(listen: SocketAddr, target: SocketAddr, downstream_tls: Option<Value>, upstream_tls: Option<Value>) -> Process {
        let address = |at: SocketAddr| json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}});
        let socket = |tls: Value| json!({"name": "tls", "typed_config": tls});
        let mut chain = json!({"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tcp", "cluster": "target"}}]});
        if let Some(tls) = downstream_tls {
            chain["transport_socket"] = socket(tls);
        }
        let mut cluster = json!({"name": "target", "type": "STATIC", "connect_timeout": "5s", "load_assignment": {
            "cluster_name": "target", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(target)}}]}]}});
        if let Some(tls) = upstream_tls {
            cluster["transport_socket"] = socket(tls);
        }
        let listener = json!({"name": "in", "address": address(listen), "filter_chains": [chain]});
        let config = json!({"static_resources": {"listeners": [listener], "clusters": [cluster]}});
        let mut command = Command::new(support::tool(support::cache().join("envoy-1.40/envoy")));
        command.args(["--config-yaml", &config.to_string(), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
        let mut process = Process::start("envoy", &command);
        wait_for("Envoy listens", PATIENCE, || {
            process.assert_running();
            std::net::TcpStream::connect(listen).map_err(|error| format!("{error}\n{}", process.tail()))
        });
        process
    }
}

/// The certificate of `service`, the mesh's roots, and the one identity that may be on the far side.
fn common_tls(mesh: &dyn Mesh, service: &str, peer: &str) -> Value {
    let leaf = mesh.leaf(service);
    json!({
        "tls_certificates": [{"certificate_chain": {"inline_string": leaf.chain_pem}, "private_key": {"inline_string": leaf.key_pem}}],
        "validation_context": {
            "trusted_ca": {"inline_string": mesh.roots_pem()},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    })
}

/// Envoy on both sides: proves the harness's configuration of it.
#[test]
fn envoy_dials_envoy() {
    let app = Echo::start();
    let consul = Consul::start();
    for name in ["db", "web"] {
        consul.register(&Definition::new(name));
    }
    let trust_domain = consul.trust_domain();
    let id = |name: &str| format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/{name}");
    let server = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true, "common_tls_context": common_tls(&consul, "db", &id("web"))});
    let client = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "db", "common_tls_context": common_tls(&consul, "web", &id("db"))});
    let (entry, middle) = (ports::free_address(), ports::free_address());
    let _server = Envoy::start(middle, app.address, Some(server), None);
    let _client = Envoy::start(entry, middle, None, Some(client));
    echo(entry, &support::bytes(1, 200_000)).expect("an echo through two Envoys");
}

/// scripts/mixed-mesh lets Envoy hear an old Consul so.
#[test]
fn filters_that_are_told_by_name_alone_get_their_types() {
    let folder = support::scratch();
    let is_taken = |name: &str, bootstrap: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, bootstrap).expect("the bootstrap");
        let envoy = support::tool(support::cache().join("envoy-1.40/envoy"));
        let done = Command::new(envoy).args(["--mode", "validate", "-c"]).arg(&file).output().expect("Envoy runs");
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        if done.status.success() { Ok(()) } else { Err(text) }
    };
    let told = json!({"static_resources": {"listeners": [{
        "name": "ready",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "listener_filters": [{"name": "envoy.filters.listener.tls_inspector"}],
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "ready",
            "route_config": {"name": "ready"},
            "http_filters": [{"name": "envoy.filters.http.router"}],
        }}]}],
    }]}});
    let refused = is_taken("told.json", &told.to_string()).expect_err("Envoy wants types");
    assert!(refused.contains("Didn't find a registered implementation"), "{refused}");
    let script = format!("{}/scripts/typed-xds", env!("CARGO_MANIFEST_DIR"));
    let input = std::fs::File::open(folder.path().join("told.json")).expect("the bootstrap");
    let typed = Command::new(script).arg("--bootstrap").stdin(input).output().expect("the script runs");
    assert!(typed.status.success(), "{}", String::from_utf8_lossy(&typed.stderr));
    is_taken("typed.json", &String::from_utf8_lossy(&typed.stdout)).expect("Envoy takes it");
}
