//! Running out of descriptors is survived: accepting backs off, the live go on, and service returns.

mod support;

use support::traffic::{Live, connect};
use support::{Agent, Echo, Pair, wait_until};

/// Room for a runtime, listeners and watches, and for a few dozen connections.
const DESCRIPTORS_MAX: u32 = 160;
const CONNECTIONS: usize = 400;

#[test]
fn the_upstream_side_survives() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web.descriptors_max(DESCRIPTORS_MAX), |db| db, |define| define);
    let mut pair = pair.wait_open();
    exhaust(&pair, pair.upstream);
    pair.web.assert_healthy();
    recover(&mut pair);
    assert_short(&pair.web);
}

#[test]
fn the_public_side_survives() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web, |db| db.descriptors_max(DESCRIPTORS_MAX), |define| define);
    let mut pair = pair.wait_open();
    exhaust(&pair, pair.public);
    pair.db.assert_healthy();
    recover(&mut pair);
    assert_short(&pair.db);
}

/// Opens far more connections than there are descriptors beside one that is in use; all of them end with this call.
fn exhaust(pair: &Pair<Agent>, address: std::net::SocketAddr) {
    let mut live = Live::open(pair.upstream);
    let flood = (0..CONNECTIONS).filter_map(|_| connect(address).ok()).collect::<Vec<_>>();
    for _ in 0..20 {
        live.ping().expect("a live connection while descriptors are out");
        support::pause(std::time::Duration::from_millis(50));
    }
    println!("{} connections open", flood.len());
    assert!(flood.len() > DESCRIPTORS_MAX as usize, "only {} connections were opened: no exhaustion", flood.len());
}

fn recover(pair: &mut Pair<Agent>) {
    wait_until("service returns", support::PATIENCE, || pair.echo(b"again").is_ok());
    wait_until("the flood is gone", support::PATIENCE, || pair.web.active() == 0 && pair.db.active() == 0);
    pair.assert_healthy();
}

/// Read afterwards: while descriptors are out, the admin port cannot accept either.
fn assert_short(limited: &support::Sidecar) {
    let errors = limited.metrics().sum("ringfence_worker_accept_errors_total", &[]);
    println!("{errors} accept errors");
    assert!(errors > 0, "descriptors never ran out: the test proves nothing");
}
