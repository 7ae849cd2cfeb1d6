//! Fail static: with the servers or the agent away, known upstreams serve on, and changes arrive again afterwards.

mod support;

use std::time::Duration;

use support::traffic::{Live, Load, round_trip};
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Pair, Sidecar, ports, wait_until};

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

/// The callers' agent dies twice; db is at another agent.
#[test]
fn the_callers_agent_is_killed_and_started_again() {
    let app = Echo::start();
    let mut consul = Consul::start_with_client_agent();
    let upstream = ports::free_address();
    consul.at_server().register(&Definition::new("db").app(app.address));
    consul.register(&Definition::new("web").upstream("db", upstream));
    consul.allow("web", "db");
    let _db = Sidecar::start(&consul.at_server(), "db");
    let web = Sidecar::start(&consul, "web");
    web.wait_endpoint();
    let mut live = Live::open(upstream);
    let load = Load::start(upstream, 50);
    for _ in 0..2 {
        consul.agent().kill();
        support::pause(Duration::from_secs(5));
        consul.agent().start();
        consul.wait_ready();
        support::pause(Duration::from_secs(2));
    }
    load.stop().assert_flawless(400);
    live.ping().expect("the live connection after the restarts");
    // web's own watches are back: a new upstream in its definition is taken up.
    let added = ports::free_address();
    consul.register(&Definition::new("web").upstream("db", upstream).upstream("db", added));
    wait_until("the changed definition is in force", RECOVERY_MAX, || round_trip(added, b"new").is_ok());
    live.ping().expect("the live connection after the change");
}

/// Both sides' agent is killed and comes back. It then calls its own services critical until their checks have run, which
/// must not take known instances away.
#[test]
fn the_agent_of_both_sides_is_killed_and_started_again() {
    let app = Echo::start();
    let mut pair = Pair::with(Consul::start_with_client_agent(), app.address).wait_open();
    let mut live = Live::open(pair.upstream);
    let load = Load::start(pair.upstream, 50);
    pair.mesh.agent().kill();
    support::pause(Duration::from_secs(5));
    pair.mesh.agent().start();
    pair.mesh.wait_ready();
    // A check's interval, so that each has run again.
    support::pause(Duration::from_secs(12));
    load.stop().assert_flawless(500);
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
