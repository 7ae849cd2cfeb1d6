//! What was cut off never looks finished: RST and a missing close_notify arrive as RST, in every direction.

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;

use support::servers::{Reports, reports};
use support::traffic::{End, read_to_end};
use support::{Agent, Custom, Definition, Mesh, PATIENCE, Pair, Sidecar, ports, tls, traffic};

/// An app that reports what it read and how the connection ended.
fn reporting_app() -> (Custom, Reports<(Vec<u8>, End)>) {
    let (sender, received) = reports();
    let app = Custom::start(move |stream| {
        stream.set_read_timeout(Some(PATIENCE)).expect("read timeout");
        sender.send(read_to_end(&stream));
    });
    (app, received)
}

/// An app that resets each connection once it has read something.
fn resetting_app() -> Custom {
    Custom::start(|mut stream| {
        if stream.read(&mut [0; 64]).is_ok_and(|length| length > 0) {
            traffic::reset(stream);
        }
    })
}

#[test]
fn a_peer_without_close_notify_is_a_reset_for_the_app() {
    let (app, received) = reporting_app();
    let pair = Pair::local(app.address);
    let web = pair.mesh.leaf("web");

    // First the clean end, so that the two differ in close_notify only.
    let mut clean = tls::client(pair.public, Some(&web)).expect("a mesh client");
    clean.write_all(b"all of it").expect("a write");
    clean.conn.send_close_notify();
    clean.flush().expect("close_notify goes out");
    clean.sock.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(received.next(), (b"all of it".to_vec(), End::Clean));

    let mut cut = tls::client(pair.public, Some(&web)).expect("a mesh client");
    cut.write_all(b"half of").expect("a write");
    cut.flush().expect("the write goes out");
    cut.sock.shutdown(Shutdown::Write).expect("FIN without close_notify");
    let (_, end) = received.next();
    assert_eq!(end, End::Reset, "the app took a truncated stream for a finished one");
    pair.db.wait_closed("truncated");
}

#[test]
fn a_server_without_close_notify_is_a_reset_for_the_client() {
    let agent = Agent::start();
    let upstream = ports::free_address();
    let place = ports::free_address();
    agent.register(&Definition::new("db").public(place));
    agent.register(&Definition::new("web").upstream("db", upstream));
    agent.allow("web", "db");
    let config = tls::server_config(&agent.leaf("db"));
    let _server = Custom::start_on(place, move |tcp| {
        if let Ok(mut stream) = tls::accept(tcp, &config) {
            // Asked first: a reset must not come before the client knows that it is connected.
            let _ = stream.read(&mut [0; 16]);
            let _ = stream.write_all(b"half of").and_then(|()| stream.flush());
            let _ = stream.sock.shutdown(Shutdown::Write);
            // The socket stays open for a while so that nothing but the FIN can end the stream.
            support::pause(std::time::Duration::from_secs(2));
        }
    });
    let web = Sidecar::start(&agent, "web");
    web.wait_endpoint();
    let mut client = traffic::connect(upstream).expect("web's upstream listens");
    client.write_all(b"please").expect("a write");
    assert_eq!(read_to_end(&client).1, End::Reset, "the client took a truncated answer for a finished one");
    web.wait_closed("truncated");
}

#[test]
fn a_reset_of_the_app_is_a_reset_for_the_client() {
    let app = resetting_app();
    let pair = Pair::local(app.address);
    let mut client = traffic::connect(pair.upstream).expect("web's upstream listens");
    client.write_all(b"please reset").expect("a write");
    assert_eq!(read_to_end(&client).1, End::Reset);
    pair.db.wait_closed("local_reset");
}

#[test]
fn a_reset_of_the_app_is_never_a_clean_end_for_a_mesh_peer() {
    let app = resetting_app();
    let pair = Pair::local(app.address);
    let mut peer = tls::client(pair.public, Some(&pair.mesh.leaf("web"))).expect("a mesh client");
    peer.write_all(b"please reset").expect("a write");
    let error = peer.read_to_end(&mut Vec::new()).expect_err("a clean end after a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn a_reset_of_the_client_is_a_reset_for_the_app() {
    let (app, received) = reporting_app();
    let pair = Pair::local(app.address);
    let mut client = traffic::connect(pair.upstream).expect("web's upstream listens");
    client.write_all(b"half of").expect("a write");
    // The reset must not overtake the bytes on the way to the app.
    support::wait_until("the app has the connection", PATIENCE, || app.accepted() > 0);
    traffic::reset(client);
    assert_eq!(received.next().1, End::Reset);
    pair.web.wait_closed("local_reset");
}

/// Whoever sits on the path can forge a record and a FIN, but not make the app take half an answer for the whole.
#[test]
fn a_forged_record_and_a_fin_are_a_reset_for_the_app() {
    let (app, received) = reporting_app();
    let pair = Pair::local(app.address);
    let mut peer = tls::client(pair.public, Some(&pair.mesh.leaf("web"))).expect("a mesh client");
    peer.write_all(b"half of").and_then(|()| peer.flush()).expect("a write");
    support::wait_until("the app has the connection", PATIENCE, || app.accepted() > 0);
    let mut forged = vec![0x17, 3, 3, 0, 40];
    forged.extend([0x5a; 40]);
    peer.sock.write_all(&forged).expect("a forged record");
    peer.sock.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(received.next().1, End::Reset);
    pair.db.wait_closed("protocol_error");
}
