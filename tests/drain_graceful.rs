//! SIGTERM drains: no new connection, live ones go on to their own end, then the process ends with status 0.

mod support;

use std::time::{Duration, Instant};

use support::traffic::{Live, connect};
use support::{Agent, Echo, Pair, wait_until};

#[test]
fn live_connections_end_by_themselves() {
    let app = Echo::start();
    let drain = |builder: support::sidecar::Builder| builder.arguments(&["-drain-time", "60s"]);
    let mut pair = Pair::tuned(Agent::start(), app.address, drain, drain, |define| define).wait_open();
    let mut live = (0..5).map(|_| Live::open(pair.upstream)).collect::<Vec<_>>();

    for draining in [&pair.db, &pair.web] {
        draining.process.signal("TERM");
        wait_until("not ready any more", support::PATIENCE, || {
            draining.client().try_get("/ready").is_ok_and(|ready| ready.status == 503)
        });
        let ready = draining.client().get("/ready").body;
        assert!(ready.contains("DRAINING"), "{ready}");
    }
    for address in [pair.public, pair.upstream] {
        wait_until("new connections are refused", support::PATIENCE, || connect(address).is_err());
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        live.iter_mut().for_each(|live| live.ping().expect("a live connection while draining"));
        support::pause(Duration::from_millis(100));
    }
    assert!(pair.web.process.exit_status().is_none() && pair.db.process.exit_status().is_none(), "it left its connections");
    drop(live);
    for sidecar in [&mut pair.web, &mut pair.db] {
        let status = sidecar.process.wait_exit(Duration::from_secs(10));
        assert!(status.success(), "{status}\n{}", sidecar.process.tail());
        assert!(sidecar.connections().iter().all(|line| line["reason"] != "drained"), "a connection was cut");
    }
    assert_eq!(pair.web.connections().iter().filter(|line| line["bytes_to_mesh"].as_u64() > Some(100)).count(), 5);
}

/// Without live connections there is nothing to wait for.
#[test]
fn an_idle_process_ends_at_once() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    wait_until("idle", support::PATIENCE, || pair.web.active() == 0);
    let start = Instant::now();
    pair.web.process.signal("TERM");
    assert!(pair.web.process.wait_exit(Duration::from_secs(10)).success(), "{}", pair.web.process.tail());
    println!("ended {:?} after SIGTERM", start.elapsed());
}

/// A worker without connections is done at once, and leaves no socket behind that would take clients and never answer.
#[test]
fn every_worker_stops_listening_at_once() {
    let app = Echo::start();
    let four = |builder: support::sidecar::Builder| builder.workers(4).arguments(&["-drain-time", "60s"]);
    let pair = Pair::tuned(Agent::start(), app.address, four, four, |define| define).wait_open();
    let mut live = Live::open(pair.upstream);
    pair.web.process.signal("TERM");
    pair.db.process.signal("TERM");
    for address in [pair.upstream, pair.public] {
        wait_until("nobody listens any more", Duration::from_secs(5), || {
            // Eight sockets in turn: with any of four left open, one of these would get in.
            (0..8).all(|_| connect(address).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
        });
    }
    live.ping().expect("the live connection goes on");
}
