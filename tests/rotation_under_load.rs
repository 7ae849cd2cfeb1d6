//! Root and leaf rotation every second under load: no failed connection, no lost byte, live connections untouched.

mod support;

use std::time::Duration;

use support::traffic::{Live, Load};
use support::{Agent, Echo, Mesh, Pair, bytes, wait_until};

const ROTATIONS: usize = 8;

#[test]
fn nobody_notices() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web.workers(2), |db| db.workers(2), |define| define);
    let mut pair = pair.wait_open();
    let mut live = (0..10).map(|_| Live::open(pair.upstream)).collect::<Vec<_>>();
    let before = leaf_serials(&pair.web);
    assert!(!before.is_empty(), "the snapshot names the leaf's serial");
    let load = Load::start(pair.upstream, 100);
    // A transfer that is under way during several rotations.
    let upstream = pair.upstream;
    let transfer = std::thread::spawn(move || {
        (0..ROTATIONS).try_for_each(|seed| support::traffic::echo(upstream, &bytes(seed as u64, 8 << 20)))
    });
    for _ in 0..ROTATIONS {
        pair.mesh.rotate_ca();
        support::pause(Duration::from_secs(1));
        live.iter_mut().for_each(|live| live.ping().expect("a live connection after a rotation"));
    }
    wait_until("a new leaf is in use", support::PATIENCE, || leaf_serials(&pair.web) != before);
    transfer.join().expect("transfer thread").expect("transfers during rotations");
    load.stop().assert_flawless(300);
    let generation = pair.db.metrics();
    assert_eq!(generation.sum("ringfence_connections_closed_total", &[("reason", "handshake_failed")]), 0);
    drop(live);
    pair.assert_healthy();
}

fn leaf_serials(sidecar: &support::Sidecar) -> Vec<String> {
    let snapshot = sidecar.snapshot();
    let mut found = Vec::new();
    support::find_all(&snapshot, "serial", &mut found);
    found.into_iter().map(ToString::to_string).collect()
}
