//! Random, truncated and oversized bytes on every side that faces the network end in a counted close, never a crash.

mod support;

use std::io::Write;
use std::net::{Shutdown, SocketAddr};

use support::{Agent, Custom, Definition, Echo, Mesh, Pair, Sidecar, bytes, ports, tls, traffic, wait_until};

/// Each is sent on a connection of its own.
fn attacks() -> Vec<Vec<u8>> {
    let mut attacks = (0..60).map(|seed| bytes(seed, 1 << (seed % 17))).collect::<Vec<_>>();
    attacks.extend([
        b"GET / HTTP/1.1\r\nHost: db\r\n\r\n".to_vec(),
        vec![0; 70_000],
        vec![0xff; 70_000],
        vec![22, 3, 1, 0xff, 0xff],                              // a record longer than TLS allows
        [vec![22, 3, 1, 0x40, 0x00], bytes(1, 0x4000)].concat(), // a full record of noise
        [22, 3, 1, 0, 0].repeat(5_000),                          // empty handshake records
        [21, 3, 3, 0, 2, 1, 0].repeat(5_000),                    // warnings without end
        [20, 3, 3, 0, 1, 1].repeat(5_000),                       // ChangeCipherSpec without end
        [23, 3, 3, 0, 1, 0].repeat(100),                         // data before any handshake
        vec![22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],               // a handshake message of 16 MiB
        vec![22, 3, 1, 0, 4, 1, 0, 0, 0],                        // an empty ClientHello
        vec![22],
    ]);
    attacks
}

fn attack(address: SocketAddr, payload: &[u8], turn: usize) {
    let mut stream = traffic::connect(address).expect("the listener takes connections");
    // It may be cut in the middle of the write.
    let _ = stream.write_all(payload);
    match turn % 3 {
        0 => traffic::reset(stream),
        1 => drop(stream.shutdown(Shutdown::Write)),
        _ => drop(stream),
    }
}

#[test]
fn on_the_public_listener() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    let (accepted, closed) = (app.accepted(), pair.db.closed_all());
    let attacks = attacks();
    for (turn, payload) in attacks.iter().enumerate() {
        attack(pair.public, payload, turn);
    }
    wait_until("every attack is closed and counted", support::PATIENCE, || {
        pair.db.closed_all() >= closed + attacks.len() as u64 && pair.db.active() == 0
    });
    assert_eq!(app.accepted(), accepted, "the app saw an attack");
    pair.assert_healthy();
}

#[test]
fn after_a_handshake() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    let web = pair.mesh.leaf("web");
    let before = pair.db.closed("protocol_error");
    let attacks = [
        [vec![23, 3, 3, 0x41, 0x01], bytes(1, 0x4101)].concat(), // longer than a record may be
        [vec![23, 3, 3, 0, 32], bytes(2, 32)].concat(),          // does not decrypt
        [vec![23, 3, 3, 0, 3], bytes(3, 3)].concat(),            // shorter than a tag
        vec![22, 3, 3, 0, 4, 0, 0, 0, 0],                        // a handshake message in the clear
        bytes(4, 300),
    ];
    for payload in &attacks {
        let mut stream = tls::client(pair.public, Some(&web)).expect("a mesh client");
        let _ = stream.sock.write_all(payload);
        let (_, _) = traffic::read_to_end(&stream.sock);
    }
    wait_until("every broken record is counted", support::PATIENCE, || {
        pair.db.closed("protocol_error") >= before + attacks.len() as u64
    });
    pair.assert_healthy();
}

#[test]
fn on_an_upstream_listener_bytes_are_payload() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    let closed = pair.web.closed_all();
    let attacks = attacks();
    for (turn, payload) in attacks.iter().enumerate() {
        attack(pair.upstream, payload, turn);
    }
    wait_until("every connection is closed and counted", support::PATIENCE, || {
        pair.web.closed_all() >= closed + attacks.len() as u64 && pair.web.active() == 0
    });
    pair.assert_healthy();
}

#[test]
fn from_the_server_that_an_upstream_dials() {
    let agent = Agent::start();
    let attacks = attacks();
    let turn = std::sync::atomic::AtomicUsize::new(0);
    let count = attacks.len();
    let server = Custom::start(move |mut stream| {
        let index = turn.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % attacks.len();
        let _ = stream.write_all(&attacks[index]);
        let _ = stream.shutdown(Shutdown::Write);
        // Reads what the dialing side still says, so that the bytes above are not lost to a reset.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let upstream = ports::free_address();
    agent.register(&Definition::new("db").public(server.address));
    // Without ejection, or the only endpoint would rest after the first five.
    let config = serde_json::json!({"passive_health_check": {"enforcing_consecutive_5xx": 0}});
    agent.register(&Definition::new("web").upstream_with("db", upstream, &config));
    agent.allow("web", "db");
    let mut web = Sidecar::start(&agent, "web");
    web.wait_endpoint();
    for _ in 0..count {
        let (received, _) = traffic::read_all(upstream);
        assert!(received.is_empty(), "bytes of an unproven server reached the client");
    }
    wait_until("all are closed and counted", support::PATIENCE, || web.closed_all() >= count as u64 && web.active() == 0);
    assert_eq!(web.closed("complete"), 0);
    assert!(server.accepted() >= count as u64, "the hostile server was dialed {} times", server.accepted());
    web.assert_healthy();
}
