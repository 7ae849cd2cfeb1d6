//! The drain has an end: at its bound, or at a second signal, live connections are cut and the process ends.

mod support;

use std::time::{Duration, Instant};

use support::traffic::Live;
use support::{Agent, Echo, Pair, wait_until};

fn pair(app: &support::Custom, drain_time: &'static str) -> Pair<Agent> {
    let drain = |builder: support::sidecar::Builder| builder.arguments(&["-drain-time", drain_time]);
    Pair::tuned(Agent::start(), app.address, |web| web, drain, |define| define).wait_open()
}

#[test]
fn at_the_end_of_the_drain_time() {
    let app = Echo::start();
    let mut pair = pair(&app, "2s");
    let mut live = Live::open(pair.upstream);
    let start = Instant::now();
    pair.db.process.signal("TERM");
    support::pause(Duration::from_secs(1));
    live.ping().expect("a live connection within the drain time");
    live.wait_cut(Duration::from_secs(10));
    let cut = start.elapsed();
    assert!(cut >= Duration::from_millis(1_900) && cut < Duration::from_secs(6), "cut {cut:?} after SIGTERM");
    assert!(pair.db.process.wait_exit(Duration::from_secs(10)).success(), "{}", pair.db.process.tail());
    pair.db.wait_closed("drained");
}

#[test]
fn at_a_second_signal() {
    let app = Echo::start();
    let mut pair = pair(&app, "300s");
    let mut live = Live::open(pair.upstream);
    pair.db.process.signal("TERM");
    wait_until("draining", support::PATIENCE, || pair.db.client().try_get("/ready").is_ok_and(|ready| ready.status == 503));
    live.ping().expect("a live connection while draining");
    let start = Instant::now();
    pair.db.process.signal("TERM");
    live.wait_cut(Duration::from_secs(5));
    let status = pair.db.process.wait_exit(Duration::from_secs(5));
    println!("ended {:?} after the second signal with {status}", start.elapsed());
    let line = pair.db.wait_connection("the cut connection", |line| line["bytes_from_mesh"] == 8);
    assert!(line["reason"] == "shutdown" || line["reason"] == "drained", "{line}");
}
