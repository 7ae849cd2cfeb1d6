//! An intention that changes to deny cuts the live connections it names, and no other.

mod support;

use std::time::{Duration, Instant};

use support::traffic::{Live, round_trip};
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, wait_for};

/// The promise is 100 ms from the change reaching the agent; a loaded test machine gets more.
const CUT_MAX: Duration = Duration::from_secs(2);

#[test]
fn the_denied_one_is_cut_and_its_neighbour_stays() {
    let app = Echo::start();
    let consul = Consul::start();
    let (web_upstream, api_upstream) = (ports::free_address(), ports::free_address());
    consul.register(&Definition::new("db").app(app.address));
    consul.register(&Definition::new("web").upstream("db", web_upstream));
    consul.register(&Definition::new("api").upstream("db", api_upstream));
    consul.allow("web", "db");
    consul.allow("api", "db");
    let mut db = Sidecar::start(&consul, "db");
    let _web = Sidecar::start(&consul, "web");
    let _api = Sidecar::start(&consul, "api");
    for upstream in [web_upstream, api_upstream] {
        wait_for("the first echo", PATIENCE, || round_trip(upstream, b"first").map_err(|error| error.to_string()));
    }

    for turn in 0..3 {
        let (mut denied, mut neighbour) = (Live::open(web_upstream), Live::open(api_upstream));
        let changed = Instant::now();
        consul.deny("web", "db");
        let written = changed.elapsed();
        denied.wait_cut(CUT_MAX);
        let cut = changed.elapsed();
        println!("turn {turn}: the agent took the change within {written:?}, the connection was cut {cut:?} after it was sent");
        assert!(cut < CUT_MAX + written, "cut after {cut:?}");
        neighbour.ping().expect("the neighbour that is still allowed");
        let line = db.wait_closed("revoked");
        assert!(line["source"].as_str().is_some_and(|source| source.ends_with("/svc/web")), "{line}");
        assert!(round_trip(web_upstream, b"again").is_err(), "a new connection of the denied service came through");
        consul.allow("web", "db");
        wait_for("allowed again", PATIENCE, || round_trip(web_upstream, b"back").map_err(|error| error.to_string()));
        neighbour.ping().expect("the neighbour after the change back");
    }
    assert_eq!(db.closed("revoked"), 3, "one connection a turn was cut");
    db.assert_healthy();
}

/// A deleted intention falls back to the default, which denies.
#[test]
fn a_deleted_intention_cuts_too() {
    let app = Echo::start();
    let pair = support::Pair::consul(app.address).wait_open();
    let mut live = Live::open(pair.upstream);
    pair.mesh.delete_intention("web", "db");
    println!("cut {:?} after the deletion", live.wait_cut(CUT_MAX));
    pair.db.wait_closed("revoked");
}
