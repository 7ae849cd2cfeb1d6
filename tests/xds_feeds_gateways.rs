//! What Consul's xDS server tells gateways, a transparent proxy and peers is served: by sidecars and gateways of this proxy, each
//! with a server of its own.
#![cfg(feature = "xds")]

#[path = "support/xds_resources.rs"]
mod resources;
#[path = "support/sds.rs"]
mod sds;
mod support;
#[path = "support/tls_app.rs"]
mod tls_app;
#[path = "support/xds.rs"]
mod xds;
#[path = "support/xds_proxy.rs"]
mod xds_proxy;

use std::io::Write as _;
use std::net::{Shutdown, SocketAddr};
use std::process::Command;

use envoy_types::pb::envoy::config::core::v3::HealthStatus;
use prost::Message as _;
use ringfence::tls::fixtures::{Ca, chain_pem};

use resources::Material;
use sds::SdsServer;
use support::namespace::{Outside, call, entered};
use support::traffic::{End, Live, read_to_end, round_trip};
use support::{Echo, PATIENCE, ports, wait_for, wait_until};
use tls_app::{Pki, TlsApp};
use xds::{CLUSTER, ENDPOINTS, LISTENER, ROUTES, XdsServer};
use xds_proxy::{Proxy, material};

const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";
const PEER_DOMAIN: &str = "99999999-8888-7777-6666-555555555555.consul";
const DB: &str = "db.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul";
const LEGACY: &str = "legacy.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul";
const BILLING: &str = "billing.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul";
/// No user of the machine; what it opens is redirected.
const REDIRECTED: u32 = 54_321;

/// `web` with one upstream behind each of these names, all at one address.
fn web(own: &Material, upstreams: &[(&str, &str, SocketAddr)], at: SocketAddr) -> Proxy {
    let server = XdsServer::start();
    let mut all = Vec::new();
    for (name, expected, listen) in upstreams {
        let endpoints = resources::assignment(name, &[(at, HealthStatus::Healthy)]);
        let listener = resources::upstream_listener(name, *listen, name);
        all.push((CLUSTER, (*name).to_owned(), resources::target_cluster(name, own, expected).encode_to_vec()));
        all.push((ENDPOINTS, (*name).to_owned(), endpoints.encode_to_vec()));
        all.push((LISTENER, resources::upstream_name(name, *listen), listener.encode_to_vec()));
    }
    server.set_all(all);
    Proxy::start("web", server, "")
}

fn db(listener: &impl prost::Message, public: SocketAddr, app: SocketAddr) -> Proxy {
    let server = XdsServer::start();
    server.set_all(vec![
        (CLUSTER, "local_app".into(), resources::app_cluster(app).encode_to_vec()),
        (LISTENER, resources::public_name(public), listener.encode_to_vec()),
    ]);
    Proxy::start("db", server, "")
}

/// A gateway with plain clusters, each with one endpoint.
fn gateway(name: &str, listener: &impl prost::Message, bind: SocketAddr, clusters: &[(&str, SocketAddr)]) -> Proxy {
    let server = XdsServer::start();
    let mut all = vec![(LISTENER, resources::upstream_name("default", bind), listener.encode_to_vec())];
    for (cluster, at) in clusters {
        let endpoints = resources::assignment(cluster, &[(*at, HealthStatus::Healthy)]);
        all.push((CLUSTER, (*cluster).to_owned(), resources::plain_cluster(cluster).encode_to_vec()));
        all.push((ENDPOINTS, (*cluster).to_owned(), endpoints.encode_to_vec()));
    }
    server.set_all(all);
    let gateway = Proxy::start(name, server, "");
    gateway.wait_ready();
    gateway
}

fn pem(ca: &Ca) -> String {
    chain_pem(std::slice::from_ref(ca.certificate()))
}

fn wait_echo(at: SocketAddr) {
    wait_for("an echo", PATIENCE, || round_trip(at, b"first").map_err(|error| error.to_string()));
}

/// The gateway's own pages tell its listener and the cluster behind it.
fn assert_shown(gateway: &Proxy, front: SocketAddr, behind: SocketAddr) {
    let client = support::http::Client::new(gateway.sidecar.admin_address(), None);
    let name = resources::upstream_name("default", front);
    assert_eq!(client.get("/listeners").body, format!("{name}::{front}\n"));
    let clusters = client.get("/clusters").body;
    assert!(clusters.contains(&format!("{DB}::{behind}::health_flags::healthy")), "{clusters}");
    let protos = ringfence::control::xds::proto_json::Protos::load();
    for (path, message) in [
        ("/clusters?format=json", "envoy.admin.v3.Clusters"),
        ("/listeners?format=json", "envoy.admin.v3.Listeners"),
        ("/config_dump?include_eds", "envoy.admin.v3.ConfigDump"),
    ] {
        let json = serde_json::from_str(&client.get(path).body).expect("JSON");
        protos.encode(message, &json).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    let address = front.to_string().replace(':', "_");
    let counted = [
        format!("cluster.{DB}.upstream_cx_active: 1"),
        format!("listener.{address}.downstream_cx_active: 1"),
        "control_plane.connected_state: 1".to_owned(),
    ];
    wait_for("the connection is counted", PATIENCE, || {
        let stats = client.get("/stats?filter=_active|connected_state").body;
        if counted.iter().all(|line| stats.lines().any(|found| found == line)) { Ok(()) } else { Err(stats) }
    });
}

#[test]
fn a_mesh_gateway_stands_between_two_sidecars_and_holds_no_key() {
    let (ca, app) = (Ca::new(TRUST_DOMAIN), Echo::start());
    let (listen, front, public) = (ports::free_address(), ports::free_address(), ports::free_address());
    let of_db = material(&ca, &ca.leaf("db"));
    let db = db(&resources::public_listener(public, &of_db, resources::allow(&["web"])), public, app.address);
    let gateway = gateway("mesh-gateway", &resources::mesh_gateway(front), front, &[(DB, public)]);
    let of_web = material(&ca, &ca.leaf("web"));
    let web = web(&of_web, &[(DB, ca.id("db").as_str(), listen)], front);
    wait_echo(listen);
    round_trip(listen, &support::bytes(1, 300_000)).expect("an echo of 300 kB");
    let mut live = Live::open(listen);
    assert_shown(&gateway, front, public);
    // A service more is a route more, and touches nobody.
    gateway.server.set(CLUSTER, LEGACY, &resources::plain_cluster(LEGACY));
    // Now it knows no such name: nobody new, and who is there stays.
    gateway.server.remove(CLUSTER, DB);
    wait_until("the name is unknown", PATIENCE, || round_trip(listen, b"unknown").is_err());
    live.ping().expect("the live connection");
    gateway.server.set(CLUSTER, DB, &resources::plain_cluster(DB));
    wait_echo(listen);
    live.ping().expect("the live connection");
    let status = gateway.sidecar.status();
    assert_eq!((status.services[0].spiffe_id.as_ref(), status.services[0].problem.as_ref()), (None, None));
    [web, gateway, db].into_iter().for_each(Proxy::stop);
}

#[test]
fn a_terminating_gateway_speaks_for_services_that_have_no_sidecar() {
    let (ca, legacy, billing) = (Ca::new(TRUST_DOMAIN), Echo::start(), Echo::start());
    let (to_legacy, to_billing, front) = (ports::free_address(), ports::free_address(), ports::free_address());
    let (of_legacy, of_billing) = (material(&ca, &ca.leaf("legacy")), material(&ca, &ca.leaf("billing")));
    let listener = |allowed: &[&str]| {
        let services = vec![(LEGACY, &of_legacy, resources::allow(allowed)), (BILLING, &of_billing, resources::allow(&["web"]))];
        resources::terminating_gateway(front, services)
    };
    let clusters = [(LEGACY, legacy.address), (BILLING, billing.address), (DB, legacy.address)];
    let gateway = gateway("egress", &listener(&["web"]), front, &clusters);
    let of_web = material(&ca, &ca.leaf("web"));
    let to_db = ports::free_address();
    let expected = [ca.id("legacy"), ca.id("billing"), ca.id("db")];
    let upstreams = [
        (LEGACY, expected[0].as_str(), to_legacy),
        (BILLING, expected[1].as_str(), to_billing),
        (DB, expected[2].as_str(), to_db),
    ];
    let web = web(&of_web, &upstreams, front);
    for to in [to_legacy, to_billing] {
        wait_echo(to);
        round_trip(to, &support::bytes(2, 300_000)).expect("an echo of 300 kB");
    }
    assert_eq!(gateway.sidecar.status().services.iter().filter(|service| service.spiffe_id.is_some()).count(), 2);
    // Its cluster is there, but no chain decides who may reach it.
    let before = legacy.accepted();
    assert!(round_trip(to_db, b"past the intentions").is_err());
    assert_eq!(legacy.accepted(), before, "bytes reached an app past the intentions");

    // Without its cluster a chain leads nowhere, not to another.
    gateway.server.remove(CLUSTER, LEGACY);
    wait_until("nowhere", PATIENCE, || round_trip(to_legacy, b"nowhere").is_err());
    wait_echo(to_billing);
    gateway.server.set(CLUSTER, LEGACY, &resources::plain_cluster(LEGACY));
    wait_echo(to_legacy);

    let (mut denied, mut other) = (Live::open(to_legacy), Live::open(to_billing));
    gateway.server.set(LISTENER, &resources::upstream_name("default", front), &listener(&[]));
    denied.wait_cut(PATIENCE);
    assert!(round_trip(to_legacy, b"denied").is_err());
    other.ping().expect("the other service's connection");
    [web, gateway].into_iter().for_each(Proxy::stop);
}

#[test]
fn an_app_that_speaks_tls_behind_a_terminating_gateway_is_known_by_its_ca_and_name() {
    let (ca, pki) = (Ca::new(TRUST_DOMAIN), Pki::new());
    let (listen, front) = (ports::free_address(), ports::free_address());
    let files = ["ca.pem", "client.pem", "client.key"].map(|name| pki.path(name));
    let cluster = |san: &str| resources::tls_app_cluster(LEGACY, [&files[0], &files[1], &files[2]], tls_app::NAME, san);
    let of_legacy = material(&ca, &ca.leaf("legacy"));
    let listener = resources::terminating_gateway(front, vec![(LEGACY, &of_legacy, resources::allow(&["web"]))]);
    let log = pki.path("access.log");
    let format = "%UPSTREAM_PEER_ISSUER%|%UPSTREAM_TLS_VERSION%|%DOWNSTREAM_PEER_URI_SAN%\n";
    let listener = resources::with_log(listener, log.to_str().expect("a path in UTF-8"), format);
    let apps = ["TLSv1_2", "TLSv1_3"].map(|version| TlsApp::start(&pki, version));
    let gateway = gateway("egress", &listener, front, &[(LEGACY, apps[0].address)]);
    gateway.server.set(CLUSTER, LEGACY, &cluster(tls_app::NAME));
    let of_web = material(&ca, &ca.leaf("web"));
    let web = web(&of_web, &[(LEGACY, ca.id("legacy").as_str(), listen)], front);
    for app in &apps {
        gateway.server.set(ENDPOINTS, LEGACY, &resources::assignment(LEGACY, &[(app.address, HealthStatus::Healthy)]));
        wait_echo(listen);
        for size in [1, 300_000, 4_000_000] {
            round_trip(listen, &support::bytes(3, size)).expect("an echo");
        }
    }
    let logged = |version: &str| {
        let line = format!("CN=a CA of the office|{version}|{}", ca.id("web"));
        std::fs::read_to_string(&log).is_ok_and(|told| told.lines().any(|told| told == line))
    };
    wait_until("both certificates in the log", PATIENCE, || ["TLSv1.2", "TLSv1.3"].into_iter().all(logged));
    let certs = support::http::Client::new(gateway.sidecar.admin_address(), None).get("/certs").body;
    assert!(files[..2].iter().all(|file| certs.contains(&format!("\"path\": \"{}\"", file.display()))), "{certs}");
    let stats = || support::http::Client::new(gateway.sidecar.admin_address(), None).get("/stats?filter=ssl").body;
    let counted = |name: &str| {
        let found =
            stats().lines().find_map(|line| line.strip_prefix(&format!("cluster.{LEGACY}.ssl.{name}: "))?.parse::<u64>().ok());
        found.unwrap_or_else(|| panic!("no {name}: {}", stats()))
    };
    assert!(counted("handshake") >= 8, "{}", stats());
    // The app ends without close_notify, which is an end to the client all the same, behind all that was said.
    let mut stream = support::traffic::connect(listen).expect("the upstream listens");
    stream.write_all(b"last words").expect("write");
    stream.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(read_to_end(&stream), (b"last words".to_vec(), End::Clean));

    // One that lives stays when the app's TLS changes. Under a name that is not in the certificate nothing more gets there.
    let mut live = Live::open(listen);
    gateway.server.set(CLUSTER, LEGACY, &cluster("legacy.example.org"));
    wait_until("another name", PATIENCE, || round_trip(listen, b"misled").is_err());
    live.ping().expect("the live connection");
    assert!(counted("connection_error") > 0, "{}", stats());
    let from = gateway.server.seen().len();
    let missing = pki.path("missing.pem");
    let broken = resources::tls_app_cluster(LEGACY, [&missing, &files[1], &files[2]], tls_app::NAME, tls_app::NAME);
    gateway.server.set(CLUSTER, LEGACY, &broken);
    let told = gateway.server.wait_answered(from, CLUSTER).expect("a nack");
    assert!(told.contains("trusted_ca.filename: ") && told.contains("missing.pem; No such file"), "{told}");
    [web, gateway].into_iter().for_each(Proxy::stop);
}

#[test]
fn clients_of_an_ingress_gateway_speak_tls_and_go_where_its_routes_say() {
    let (ca, app, folder) = (Ca::new(TRUST_DOMAIN), Echo::start(), support::scratch());
    let (front, public) = (ports::free_address(), ports::free_address());
    let roots = folder.path().join("ca.pem");
    std::fs::write(&roots, pem(&ca)).expect("a file");
    let of_db = material(&ca, &ca.leaf("db"));
    let db = db(&resources::public_listener(public, &of_db, resources::allow(&["ingress"])), public, app.address);
    let own = || material(&ca, &ca.leaf("ingress"));
    let gateway = web(&own(), &[(DB, ca.id("db").as_str(), front)], public);
    let name = resources::upstream_name(DB, front);
    wait_echo(front);
    let set = |routes: Option<&str>| {
        let from = gateway.server.seen().len();
        gateway.server.set(LISTENER, &name, &resources::tls_front_listener(DB, front, &own(), DB, routes));
        assert_eq!(gateway.server.wait_answered(from, LISTENER), None);
    };
    let call = |version: &str, size: usize| tls_app::call(front, &roots, version, size);
    // Whoever came in plain before is carried on.
    let mut live = Live::open(front);
    set(None);
    wait_until("TLS is asked for", PATIENCE, || round_trip(front, b"plain").is_err());
    live.ping().expect("the connection of before");
    for (version, told) in [("TLSv1_2", "TLSv1.2"), ("TLSv1_3", "TLSv1.3")] {
        for size in [1, 300_000, 2_000_000] {
            assert_eq!(call(version, size).as_deref(), Ok(told));
        }
    }
    let before = app.accepted();
    let distrustful = folder.path().join("other.pem");
    std::fs::write(&distrustful, pem(&Ca::new(PEER_DOMAIN))).expect("a file");
    let refused = tls_app::call(front, &distrustful, "TLSv1_3", 1).expect_err("another CA");
    assert!(refused.contains("CERTIFICATE_VERIFY_FAILED"), "{refused}");
    assert_eq!(app.accepted(), before, "dialed for nobody");
    let client = support::http::Client::new(gateway.sidecar.admin_address(), None);
    wait_for("both are counted", PATIENCE, || {
        let stats = client.get("/stats?filter=^listener.*ssl").body;
        let counted = |name: &str, least: u64| {
            let found = stats.lines().find_map(|line| line.split_once(&format!("ssl.{name}: "))?.1.parse::<u64>().ok());
            found.is_some_and(|count| count >= least)
        };
        if counted("handshake", 6) && counted("connection_error", 2) { Ok(()) } else { Err(stats) }
    });

    // For HTTP the cluster is where the routes say; they are asked for by their name.
    set(Some("8443"));
    let waits = || gateway.sidecar.status().services[0].problem.clone().unwrap_or_default();
    wait_until("it waits for its routes", PATIENCE, || waits().contains("its newest waits for the routes 8443"));
    call("TLSv1_3", 1_000).expect("what was there serves until they come");
    gateway.server.set(ROUTES, "8443", &resources::routes("8443", "*", DB));
    wait_for("nothing is missing", PATIENCE, || gateway.sidecar.status().services[0].problem.clone().map_or(Ok(()), Err));
    call("TLSv1_3", 1_000).expect("an echo by the routes");
    let from = gateway.server.seen().len();
    gateway.server.set(ROUTES, "8443", &resources::routes("8443", "db.example.com", DB));
    let told = gateway.server.wait_answered(from, ROUTES).expect("a nack");
    assert!(told.contains("RouteConfiguration 8443: virtual_hosts[0].domains: db.example.com;"), "{told}");
    call("TLSv1_3", 1_000).expect("what was good stays");
    let dump = client.get("/config_dump?resource=dynamic_route_configs").body;
    assert!(dump.contains("\"route_config\"") && dump.contains("db.example.com; http_connection_manager"), "{dump}");
    live.ping().expect("the connection of before");
    [gateway, db].into_iter().for_each(Proxy::stop);
}

#[test]
fn an_ingress_gateways_certificate_comes_by_its_name() {
    let (ca, outside, app, folder) = (Ca::new(TRUST_DOMAIN), Ca::new(PEER_DOMAIN), Echo::start(), support::scratch());
    let (front, public, secrets) = (ports::free_address(), ports::free_address(), SdsServer::start());
    let roots = folder.path().join("ca.pem");
    std::fs::write(&roots, pem(&outside)).expect("a file");
    let of_db = material(&ca, &ca.leaf("db"));
    let db = db(&resources::public_listener(public, &of_db, resources::allow(&["ingress"])), public, app.address);
    let (server, own) = (XdsServer::start(), material(&ca, &ca.leaf("ingress")));
    let log = folder.path().join("access.log");
    let listener = resources::sds_front_listener(DB, front, DB, "sds", "wildcard");
    let format = "%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER%|%UPSTREAM_TLS_VERSION%\n";
    let listener = resources::with_log(listener, log.to_str().expect("a path in UTF-8"), format);
    server.set_all(vec![
        (CLUSTER, DB.to_owned(), resources::target_cluster(DB, &own, ca.id("db").as_str()).encode_to_vec()),
        (ENDPOINTS, DB.to_owned(), resources::assignment(DB, &[(public, HealthStatus::Healthy)]).encode_to_vec()),
        (LISTENER, resources::upstream_name(DB, front), listener.encode_to_vec()),
    ]);
    let gateway = Proxy::with_servers("ingress", server, "", &[("sds", secrets.address)]);
    let problem = || gateway.sidecar.status().services.first().and_then(|service| service.problem.clone()).unwrap_or_default();
    wait_until("the secret is waited for", PATIENCE, || problem().contains("waiting for the secret wildcard of cluster sds"));
    assert!(support::traffic::connect(front).is_err(), "nothing to show, and nobody is met");
    let outer = |service: &str| material(&outside, &outside.leaf(service));
    secrets.set(&outer("gateway"));
    let call = |size| tls_app::call(front, &roots, "TLSv1_3", size);
    wait_for("an echo", PATIENCE, || call(300_000));
    gateway.wait_ready();
    let told = wait_for("a line", PATIENCE, || {
        let told = std::fs::read_to_string(&log).map_err(|error| error.to_string())?;
        // The first calls may have come before the other side was there.
        told.lines().find(|line| line.ends_with("|TLSv1.3")).map(str::to_owned).ok_or(told)
    });
    assert!(told.starts_with("TLSv1.3 TLS_"), "{told}");
    let client = support::http::Client::new(gateway.sidecar.admin_address(), None);
    let name = || {
        let certs: serde_json::Value = serde_json::from_str(&client.get("/certs").body).expect("JSON");
        let list = certs["certificates"].as_array().expect("a list");
        let shown = list.iter().find(|one| one["ca_cert"].as_array().is_some_and(Vec::is_empty)).expect("what clients are shown");
        shown["cert_chain"][0]["subject_alt_names"][0]["uri"].as_str().expect("a name").to_owned()
    };
    assert_eq!(name(), outside.id("gateway").as_str());
    let dump = client.get("/config_dump?resource=dynamic_active_secrets").body;
    let secret: serde_json::Value = serde_json::from_str(&dump).expect("JSON");
    assert_eq!((&secret["configs"][0]["name"], secret["configs"][0]["version_info"].as_str()), (&"wildcard".into(), Some("1")));
    assert!(dump.contains("[redacted]") && !dump.contains("PRIVATE KEY"), "{dump}");
    let ends = client.get("/stats?filter=^listener.*expiration").body;
    assert!(ends.contains(".ssl.certificate.unnamed_cert_e3b0c442.expiration_unix_time_seconds: "), "{ends}");

    // What cannot be used is refused and takes nothing away; the next that can is shown.
    secrets.set(&Material { key_pem: of_db.key_pem, ..outer("gateway") });
    let refused = || secrets.asked().iter().find_map(|asked| asked.error.clone());
    wait_until("a refusal", PATIENCE, || refused().is_some());
    let why = refused().unwrap_or_default();
    assert!(why.contains("Secret wildcard: tls_certificate.private_key: of another certificate"), "{why}");
    assert!(!format!("{:?}", secrets.asked()).contains("PRIVATE KEY"));
    wait_until("it is told", PATIENCE, || problem().contains("secrets of cluster sds: "));
    call(1).expect("the one before");
    secrets.set(&outer("gateway-two"));
    wait_until("another certificate", PATIENCE, || name() == outside.id("gateway-two").as_str());
    call(1).expect("the next one");
    wait_until("nothing is wrong", PATIENCE, || problem().is_empty());
    let asked = secrets.asked();
    assert_eq!(asked[0].node.as_deref(), Some("ingress-sidecar-proxy"), "the node comes first");
    assert!(asked.iter().all(|one| one.names == ["wildcard"]) && asked[1..].iter().all(|one| one.node.is_none()), "{asked:?}");
    let versions: Vec<&str> = asked.iter().map(|one| one.version.as_str()).collect();
    assert_eq!(versions, ["", "1", "1", "3"], "a refused version is not taken for one that holds");
    [gateway, db].into_iter().for_each(Proxy::stop);
}

#[test]
fn peers_are_let_in_from_their_trust_domain_by_their_roots_alone() {
    let (ours, theirs, app) = (Ca::new(TRUST_DOMAIN), Ca::new(PEER_DOMAIN), Echo::start());
    let (listen, public) = (ports::free_address(), ports::free_address());
    let of_db = material(&theirs, &theirs.leaf("db"));
    let allowed = || resources::allow(&["web"]);
    let with = |roots: &str| {
        let domains = [(PEER_DOMAIN, pem(&theirs)), (TRUST_DOMAIN, roots.to_owned())];
        let domains = domains.each_ref().map(|(name, roots)| (*name, roots.as_str()));
        resources::peered_listener(public, &of_db, allowed(), &domains)
    };
    let db = db(&with(&pem(&ours)), public, app.address);
    // Consul gives a peered upstream the roots of the peer, beside the certificate of ours.
    let of_web = Material { roots_pem: pem(&theirs), ..material(&ours, &ours.leaf("web")) };
    let web = web(&of_web, &[("db", theirs.id("db").as_str(), listen)], public);
    // Whom our own domain trusts is told by the way in.
    let own = material(&ours, &ours.leaf("web"));
    let way_in = ports::free_address();
    web.server.set(CLUSTER, "local_app", &resources::app_cluster(app.address));
    web.server.set(LISTENER, &resources::public_name(way_in), &resources::public_listener(way_in, &own, allowed()));
    wait_echo(listen);
    round_trip(listen, &support::bytes(3, 100_000)).expect("an echo of 100 kB");

    // Another CA for our domain: whoever had come by the old one stays out.
    let name = resources::public_name(public);
    let before = app.accepted();
    db.server.set(LISTENER, &name, &with(&pem(&Ca::new(TRUST_DOMAIN))));
    wait_until("not trusted any more", PATIENCE, || round_trip(listen, b"foreign").is_err());
    db.server.set(LISTENER, &name, &resources::public_listener(public, &of_db, allowed()));
    wait_until("the peer is none any more", PATIENCE, || db.sidecar.is_ready());
    assert!(round_trip(listen, b"no peer").is_err());
    assert!(app.accepted() >= before);
    db.server.set(LISTENER, &name, &with(&pem(&ours)));
    wait_echo(listen);
    [web, db].into_iter().for_each(Proxy::stop);
}

#[test]
fn permissive_mode_comes_and_goes_without_a_cut() {
    let (ca, app) = (Ca::new(TRUST_DOMAIN), Echo::start());
    let (listen, public) = (ports::free_address(), ports::free_address());
    let (of_db, name) = (material(&ca, &ca.leaf("db")), resources::public_name(public));
    let strict = |allowed: &[&str]| resources::public_listener(public, &of_db, resources::allow(allowed));
    let db = db(&strict(&["web"]), public, app.address);
    let of_web = material(&ca, &ca.leaf("web"));
    let web = web(&of_web, &[("db", ca.id("db").as_str(), listen)], public);
    wait_echo(listen);
    let mut live = Live::open(listen);
    let set = |listener| {
        let from = db.server.seen().len();
        db.server.set(LISTENER, &name, &listener);
        assert_eq!(db.server.wait_answered(from, LISTENER), None);
    };
    let permissive =
        |allowed: &[&str]| resources::permissive_listener(public, &of_db, resources::allow(allowed), app.address.port());
    for listener in [permissive(&["web"]), strict(&["web"]), permissive(&["web", "api"])] {
        set(listener);
        wait_echo(listen);
        live.ping().expect("the connection of before");
    }
    set(permissive(&["api"]));
    live.wait_cut(PATIENCE);
    assert!(round_trip(listen, b"denied").is_err(), "intentions hold in permissive mode too");
    [web, db].into_iter().for_each(Proxy::stop);
}

#[test]
fn a_transparent_proxy_leads_virtual_addresses_to_the_mesh_and_lets_the_rest_pass() {
    if !entered("a_transparent_proxy_leads_virtual_addresses_to_the_mesh_and_lets_the_rest_pass") {
        return;
    }
    let (outside, ca, app) = (Outside::start(), Ca::new(TRUST_DOMAIN), Echo::start());
    let (redirect, public) = (ports::free_address(), ports::free_address());
    let virtual_address = "198.51.100.77".parse().expect("an address");
    let of_db = material(&ca, &ca.leaf("db"));
    let db = db(&resources::public_listener(public, &of_db, resources::allow(&["web"])), public, app.address);
    let of_web = material(&ca, &ca.leaf("web"));
    let server = XdsServer::start();
    // The address of the sidecar itself, as of a pod that clients dial without asking Consul for it.
    let at_its_own = [(virtual_address, "db"), (public.ip(), "passthrough~db")];
    let listener = resources::outbound_listener(redirect, &at_its_own);
    let endpoints = resources::assignment("db", &[(public, HealthStatus::Healthy)]);
    server.set_all(vec![
        (CLUSTER, "db".into(), resources::target_cluster("db", &of_web, ca.id("db").as_str()).encode_to_vec()),
        (CLUSTER, "original-destination".into(), resources::original_cluster().encode_to_vec()),
        (CLUSTER, "passthrough~db".into(), resources::passthrough_cluster("db", &of_web, ca.id("db").as_str()).encode_to_vec()),
        (ENDPOINTS, "db".into(), endpoints.encode_to_vec()),
        (LISTENER, resources::upstream_name("default", redirect), listener.encode_to_vec()),
    ]);
    let web = Proxy::start("web", server, "");
    web.wait_ready();
    db.wait_ready();
    let rules = format!(
        "table ip redirected {{ chain output {{ type nat hook output priority -100; \
         meta skuid {REDIRECTED} meta l4proto tcp redirect to :{}; }}; }}",
        redirect.port()
    );
    let done = Command::new("nft").arg(rules).output().expect("nft runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    assert_eq!(call(Some(REDIRECTED), virtual_address, 5_432, "tcp"), "message", "db's app echoes");
    assert_eq!(app.accepted(), 1);
    assert_eq!(call(Some(REDIRECTED), outside.v4(), 443, "tcp"), "outside", "what is no virtual address is let pass");
    assert_eq!(app.accepted(), 1);
    assert_eq!(call(None, outside.v4(), 443, "tcp"), "outside");

    assert_eq!(
        call(Some(REDIRECTED), public.ip(), public.port(), "tcp"),
        "message",
        "db's app, over mutual TLS, dialed directly"
    );
    assert_eq!(app.accepted(), 2);
    let stats = support::http::Client::new(web.sidecar.admin_address(), None).get("/stats?filter=passthrough").body;
    assert!(stats.contains("cluster.passthrough~db.upstream_cx_total: 1"), "{stats}");
    // Somebody else there is not db.
    web.server.set(CLUSTER, "passthrough~db", &resources::passthrough_cluster("db", &of_web, ca.id("billing").as_str()));
    wait_until("db is not billing", PATIENCE, || call(Some(REDIRECTED), public.ip(), public.port(), "tcp") != "message");
    [web, db].into_iter().for_each(Proxy::stop);
}
