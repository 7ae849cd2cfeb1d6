//! `max_inbound_connections` and an upstream's `limits.max_connections` hold exactly and free their places again.

mod support;

use serde_json::json;
use support::traffic::{Live, round_trip};
use support::{Agent, Definition, Echo, Mesh, PATIENCE, Pair, Sidecar, ports, wait_for, wait_until};

const LIMIT: usize = 5;

#[test]
fn inbound() {
    let app = Echo::start();
    let define = |db: Definition| db.config("max_inbound_connections", LIMIT as u64);
    let mut pair = Pair::tuned(Agent::start(), app.address, |web| web, |db| db.workers(2), define).wait_open();
    wait_until("the first echo has gone", PATIENCE, || pair.db.active() == 0);
    holds(pair.upstream, &pair.db);
    wait_until("every place is free again", PATIENCE, || pair.db.active() == 0);
    pair.assert_healthy();
}

#[test]
fn outbound() {
    let app = Echo::start();
    let agent = Agent::start();
    let upstream = ports::free_address();
    agent.register(&Definition::new("db").app(app.address));
    agent.register(&Definition::new("web").upstream_with("db", upstream, &json!({"limits": {"max_connections": LIMIT}})));
    agent.allow("web", "db");
    let _db = Sidecar::start(&agent, "db");
    let web = Sidecar::of("web").workers(2).start(&agent);
    wait_for("the first echo", PATIENCE, || round_trip(upstream, b"first").map_err(|error| error.to_string()));
    wait_until("the first echo has gone", PATIENCE, || web.active() == 0);
    holds(upstream, &web);
}

/// Takes every place, is refused the next one, gives one back and gets it again.
fn holds(upstream: std::net::SocketAddr, limited: &Sidecar) {
    let mut live = (0..LIMIT).map(|_| Live::open(upstream)).collect::<Vec<_>>();
    for _ in 0..3 {
        assert!(round_trip(upstream, b"one too many").is_err(), "connection {} came through", LIMIT + 1);
    }
    for live in &mut live {
        live.ping().expect("a connection within the limit");
    }
    limited.wait_closed("limit");
    live.pop();
    wait_until("the place is free again", PATIENCE, || round_trip(upstream, b"next").is_ok());
    assert!(limited.closed("limit") >= 3, "refusals are counted");
}
