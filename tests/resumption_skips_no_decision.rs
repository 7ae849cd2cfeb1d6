//! A resumed session saves signatures and nothing else: the intention is decided again, a new certificate makes every old
//! session worthless, and `-tls-resumption off` resumes none.

mod support;

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::{ClientConfig, HandshakeKind};
use support::tls::ClientStream;
use support::{Banner, Custom, Echo, Mesh, Pair, Sidecar, tls, wait_until};

const BANNER: &str = "hello from the app\n";
const VERSIONS: [&rustls::SupportedProtocolVersion; 2] = [&rustls::version::TLS12, &rustls::version::TLS13];

#[test]
fn an_intention_is_decided_on_every_resumed_connection() {
    let app = Banner::start(BANNER.trim_end());
    let pair = Pair::local(app.address);
    let web = pair.mesh.leaf("web");
    let remembering = VERSIONS.map(|version| tls::client_config(Some(&web), &[version]));
    for config in &remembering {
        assert_eq!(handshakes(pair.public, config, 3)[2], HandshakeKind::Resumed, "resumption is on by default");
    }
    let (accepted, resumed) = (app.accepted(), resumed_at(&pair.db));
    assert!(resumed >= 4, "counted: {resumed}");

    pair.mesh.deny("web", "db");
    wait_until("the intention is in force", support::PATIENCE, || {
        let snapshot = pair.db.snapshot();
        let mut allows = Vec::new();
        support::find_all(&snapshot, "allows", &mut allows);
        !allows.is_empty() && allows.iter().all(|allows| **allows == false) && is_adopted(&snapshot)
    });
    for config in &remembering {
        let denied = line(pair.public, config);
        assert!(denied.is_err(), "a session from before the denial read {denied:?}");
    }
    assert_eq!(app.accepted(), accepted, "the app saw a denied connection");
    wait_until("both are denied by the intention, not by their handshakes", support::PATIENCE, || pair.db.closed("denied") >= 2);
    assert!(resumed_at(&pair.db) >= resumed + 2, "the denied ones were resumed, or this proves nothing");
}

#[test]
fn a_new_certificate_ends_every_old_session() {
    let app = Banner::start(BANNER.trim_end());
    let pair = Pair::local(app.address);
    let web = pair.mesh.leaf("web");
    let remembering = VERSIONS.map(|version| tls::client_config(Some(&web), &[version]));
    for config in &remembering {
        assert_eq!(handshakes(pair.public, config, 3)[2], HandshakeKind::Resumed);
    }
    let serials = || {
        let snapshot = pair.db.snapshot();
        let mut found = Vec::new();
        support::find_all(&snapshot, "serial", &mut found);
        found.into_iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let before = serials();
    pair.mesh.rotate_ca();
    wait_until("db has a new leaf", support::PATIENCE, || serials() != before && is_adopted(&pair.db.snapshot()));
    for config in &remembering {
        // The old root is still trusted, so the old certificate gets in: by a full handshake.
        let kind = handshakes(pair.public, config, 1)[0];
        assert_ne!(kind, HandshakeKind::Resumed, "a session of the old certificate lives on");
    }
}

#[test]
fn two_sidecars_resume_with_each_other_on_any_worker() {
    let app = Echo::start();
    let pair = Pair::tuned(support::Agent::start(), app.address, |web| web.workers(2), |db| db.workers(2), |db| db).wait_open();
    for _ in 0..40 {
        pair.echo(b"again").expect("an echo");
    }
    // One full handshake for each worker of web; with a ticket key for each worker of db half of them would be full.
    assert!(resumed_at(&pair.db) >= 36, "{} of 40 connections were resumed", resumed_at(&pair.db));
    wait_until("the log has them all", support::PATIENCE, || pair.db.connections().len() >= 40);
    assert!(pair.db.connections().iter().all(|line| line["source"].to_string().contains("/svc/web")), "each with its identity");
}

#[test]
fn switched_off_it_never_happens() {
    let app = Banner::start(BANNER.trim_end());
    let off = ["-tls-resumption", "off"];
    let pair = Pair::tuned(support::Agent::start(), app.address, |web| web, |db| db.arguments(&off), |db| db);
    let web = pair.mesh.leaf("web");
    let stock = stock_server(&pair.mesh.leaf("db"));
    for version in VERSIONS {
        let remembering = tls::client_config(Some(&web), &[version]);
        let kinds = handshakes(stock.address, &remembering, 2);
        assert_eq!(kinds[1], HandshakeKind::Resumed, "{version:?}: a stock server resumes, or this test proves nothing");

        let remembering = tls::client_config(Some(&web), &[version]);
        let kinds = handshakes(pair.public, &remembering, 3);
        assert!(!kinds.contains(&HandshakeKind::Resumed), "{version:?}: {kinds:?}");
    }
    assert_eq!(resumed_at(&pair.db), 0);
    assert!(pair.db.metrics().sum("ringfence_handshakes_total", &[]) >= 6, "the handshakes were counted");
}

/// Every worker enforces what the snapshot shows.
fn is_adopted(snapshot: &serde_json::Value) -> bool {
    snapshot["acknowledged_generation"].is_u64() && snapshot["acknowledged_generation"] == snapshot["generation"]
}

fn resumed_at(sidecar: &Sidecar) -> u64 {
    sidecar.metrics().sum("ringfence_handshakes_resumed_total", &[])
}

/// Connections one after the other, each up to the app's first line: by then tickets have arrived, if there are any.
fn handshakes(address: SocketAddr, config: &Arc<ClientConfig>, count: usize) -> Vec<HandshakeKind> {
    let one = || line(address, config).expect("a handshake and the app's line").conn.handshake_kind().expect("it is done");
    std::iter::repeat_with(one).take(count).collect()
}

fn line(address: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<ClientStream> {
    let mut stream = tls::client_with(address, config)?;
    let mut line = [0; BANNER.len()];
    stream.read_exact(&mut line)?;
    assert_eq!(line, BANNER.as_bytes());
    Ok(stream)
}

fn stock_server(identity: &support::mesh::Leaf) -> Custom {
    let config = tls::server_config(identity);
    Custom::start(move |tcp| {
        if let Ok(mut stream) = tls::accept(tcp, &config) {
            let _ = stream.write_all(BANNER.as_bytes()).and_then(|()| stream.flush());
            // Until the client has gone.
            let _ = stream.read(&mut [0]);
        }
    })
}
