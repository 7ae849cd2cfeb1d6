//! Fail static: with the servers or the agent away, known upstreams serve on, and changes arrive again afterwards.

mod support;

use std::time::Duration;

use support::traffic::{Live, Load, round_trip};
use support::{Consul, Echo, Mesh, PATIENCE, Pair, wait_until};

const OUTAGE: Duration = Duration::from_secs(30);
/// Back-off of ours, election and anti-entropy of theirs.
const RECOVERY_MAX: Duration = Duration::from_secs(60);

#[test]
fn the_servers_are_away_for_half_a_minute() {
    let app = Echo::start();
    let mut pair = Pair::with(Consul::start_with_client_agent(), app.address).wait_open();
    let mut live = Live::open(pair.upstream);
    let load = Load::start(pair.upstream, 50);
    pair.mesh.server().kill();
    support::pause(OUTAGE);
    live.ping().expect("a live connection during the outage");
    pair.mesh.server().start();
    pair.mesh.wait_ready();
    load.stop().assert_flawless(1_000);
    assert_changes_arrive(&pair, &mut live);
}

#[test]
fn the_agent_is_killed_and_started_again() {
    let app = Echo::start();
    // Both services live at the agent that is killed: it must not itself report db as critical when it is back.
    let consul = Consul::start_with_client_agent();
    let mut pair = Pair::tuned(consul, app.address, |web| web, |db| db, |db| db.initially_passing()).wait_open();
    let mut live = Live::open(pair.upstream);
    let load = Load::start(pair.upstream, 50);
    for _ in 0..2 {
        pair.mesh.agent().kill();
        support::pause(Duration::from_secs(5));
        pair.mesh.agent().start();
        pair.mesh.wait_ready();
        support::pause(Duration::from_secs(2));
    }
    load.stop().assert_flawless(400);
    assert_changes_arrive(&pair, &mut live);
}

/// The watches are back: a deny still cuts, an allow still lets in.
fn assert_changes_arrive(pair: &Pair<Consul>, live: &mut Live) {
    live.ping().expect("the live connection after the outage");
    pair.mesh.deny("web", "db");
    live.wait_cut(RECOVERY_MAX.min(Duration::from_secs(40)));
    pair.mesh.allow("web", "db");
    wait_until("allowed again", PATIENCE, || round_trip(pair.upstream, b"back").is_ok());
}
