//! A new root under load at a real Consul: no connection fails, live ones stay, and both sides get new leaves.

mod support;

use std::time::Duration;

use support::traffic::{Live, Load};
use support::{Consul, Echo, Mesh, Pair, Sidecar, wait_until};

/// The agent waits up to 30 s before it asks for new leaves.
const NEW_LEAF_MAX: Duration = Duration::from_secs(60);

#[test]
fn no_connection_fails_while_the_root_changes() {
    let app = Echo::start();
    let pair = Pair::<Consul>::consul(app.address).wait_open();
    let mut live = (0..20).map(|_| Live::open(pair.upstream)).collect::<Vec<_>>();
    let before = (serials(&pair.web), serials(&pair.db));
    assert!(!before.0.is_empty() && !before.1.is_empty(), "the snapshot names the leaf's serial");
    let load = Load::start(pair.upstream, 200);

    pair.mesh.rotate_ca();
    wait_until("new leaves on both sides", NEW_LEAF_MAX, || serials(&pair.web) != before.0 && serials(&pair.db) != before.1);
    // The load must see the state after the change too.
    support::pause(Duration::from_secs(2));
    load.stop().assert_flawless(500);
    for live in &mut live {
        live.ping().expect("a connection from before the rotation");
    }
    assert_eq!(pair.db.closed("handshake_failed"), 0);
}

fn serials(sidecar: &Sidecar) -> Vec<String> {
    let snapshot = sidecar.snapshot();
    let mut found = Vec::new();
    support::find_all(&snapshot, "serial", &mut found);
    found.into_iter().map(ToString::to_string).collect()
}
