//! The books balance: accepted = closed + active, bytes out of one sidecar = bytes into the other, log = counters.

mod support;

use support::traffic::{self, Live};
use support::{Agent, Echo, Pair, Sidecar, bytes, wait_until};

#[test]
fn after_traffic_of_every_kind() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web.workers(2), |db| db.workers(2), |define| define);
    let mut pair = pair.wait_open();
    for seed in 0..40 {
        pair.echo(&bytes(seed, 10_000)).expect("an echo");
    }
    for _ in 0..10 {
        traffic::reset(traffic::connect(pair.upstream).expect("web's upstream listens"));
        drop(traffic::connect(pair.public).expect("db's public listener"));
    }
    let live = (0..7).map(|_| Live::open(pair.upstream)).collect::<Vec<_>>();

    for sidecar in [&pair.web, &pair.db] {
        wait_until("accepted = closed + active", support::PATIENCE, || {
            let metrics = sidecar.metrics();
            let sum = |name| metrics.sum(name, &[]);
            sum("ringfence_connections_active") == 7
                && sum("ringfence_connections_total") == sum("ringfence_connections_closed_total") + 7
        });
    }
    drop(live);
    wait_until("all closed", support::PATIENCE, || pair.web.active() == 0 && pair.db.active() == 0);

    // 40 echoes, the first one of the harness ("first", perhaps tried more than once) and 7 pings: all counted alike.
    wait_until("bytes balance", support::PATIENCE, || {
        let (web, db) = (pair.web.metrics(), pair.db.metrics());
        let flow = |metrics: &support::sidecar::Metrics, flow| metrics.sum("ringfence_bytes_total", &[("flow", flow)]);
        flow(&web, "to_mesh") == flow(&db, "from_mesh")
            && flow(&db, "to_mesh") == flow(&web, "from_mesh")
            && flow(&web, "to_mesh") >= 40 * 10_000 + 7 * 4
    });
    for sidecar in [&pair.web, &pair.db] {
        wait_until("the log agrees with the counters", support::PATIENCE, || agrees(sidecar));
    }
    assert_eq!(pair.web.metrics().sum("ringfence_worker_payload_bytes_moved", &[]), 0, "plain to TLS moves no payload byte");
    assert!(pair.db.closed("probe") >= 10, "connections that say nothing are probes");
    assert!(pair.db.connections().iter().all(|line| line["reason"] != "probe"), "probes are counted, not logged");
    pair.assert_healthy();
}

/// Every close but probes has its line, under the reason that was counted.
fn agrees(sidecar: &Sidecar) -> bool {
    let lines = sidecar.connections();
    let count = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count() as u64;
    let unlogged = sidecar.closed("probe");
    let bytes = lines.iter().filter_map(|line| line["bytes_from_mesh"].as_u64()).sum::<u64>();
    lines.len() as u64 + unlogged == sidecar.closed_all()
        && count("complete") == sidecar.closed("complete")
        && bytes == sidecar.metrics().sum("ringfence_bytes_total", &[("flow", "from_mesh")])
}
