//! What two snapshots in a row differ by.

use super::*;
use crate::config;
use crate::mesh::{Bind, Service};
use crate::policy::{DefaultPolicy, Intentions};
use crate::telemetry::stats::Fetched;

const DB: &str = "db.default.dc1.internal.t.consul";

fn endpoint(port: u16, healthy: bool) -> Endpoint {
    Endpoint { address: ([127, 0, 0, 1], port).into(), weight: 1, healthy }
}

fn upstream(endpoints: &[Endpoint]) -> Upstream {
    let target = Target { id: "db".into(), sni: DB.into(), expected: [].into(), endpoints: endpoints.into(), access: None };
    Upstream::new("db", Bind::Tcp(([127, 0, 0, 1], 9_191).into()), vec![Arc::new(target)])
}

fn snapshot(intentions: Intentions, upstreams: Vec<Upstream>) -> Snapshot {
    let public = PublicListener {
        bind: Bind::Tcp(([0, 0, 0, 0], 25_000).into()),
        app: vec![Address::Tcp(([127, 0, 0, 1], 80).into())],
        local_connect_timeout: config::LOCAL_CONNECT_TIMEOUT,
        handshake_timeout: config::HANDSHAKE_TIMEOUT,
        local_keepalive: None,
        max_inbound_connections: 0,
        idle_timeout: None,
    };
    let service = Service {
        name: "web".into(),
        proxy_id: "web-sidecar-proxy".into(),
        identity: None,
        intentions: Arc::new(intentions),
        public: Some(Arc::new(public)),
        upstreams: upstreams.into_iter().map(Arc::new).collect(),
    };
    Snapshot { services: vec![Arc::new(service)], ..Snapshot::default() }
}

/// The counts after these snapshots, one after the other.
fn told(snapshots: Vec<Snapshot>) -> Told {
    let mut tally = Tally::default();
    let mut before = Snapshot::default();
    for now in snapshots {
        tally.follow(&before, &now);
        before = now;
    }
    tally.told(7)
}

fn members(told: &Told, cluster: &str) -> Members {
    told.members["web-sidecar-proxy"][cluster]
}

fn changes(added: u64, modified: u64, removed: u64) -> Changes {
    Changes { added, modified, removed }
}

#[test]
fn what_comes_changes_and_goes_is_counted_as_in_envoy() {
    let plain = |upstreams| snapshot(Intentions::unknown(), upstreams);
    let first = vec![plain(vec![upstream(&[endpoint(1, true)])])];
    let told_first = told(first);
    assert_eq!((told_first.clusters.changes, told_first.listeners.changes), (changes(2, 0, 0), changes(2, 0, 0)));
    assert_eq!(told_first.clusters.answers, Answers { accepted: 7, rejected: 0 });
    let slower = Upstream { connect_timeout: config::CONNECT_TIMEOUT * 2, ..upstream(&[endpoint(1, true)]) };
    let renamed = Upstream { name: "store".into(), ..slower.clone() };
    let denying = || Intentions::new(Vec::new(), DefaultPolicy::Deny);
    let told = told(vec![
        plain(vec![upstream(&[endpoint(1, true)])]),
        plain(vec![slower.clone()]),
        plain(vec![slower]),
        plain(vec![renamed.clone()]),
        snapshot(denying(), vec![renamed]),
        snapshot(denying(), Vec::new()),
    ]);
    assert_eq!(told.clusters.changes, changes(2, 1, 1), "a cluster is how members are dialed");
    assert_eq!(told.listeners.changes, changes(2, 2, 1), "a listener is where it leads and whom it lets in");
}

#[test]
fn members_change_when_some_come_or_go() {
    let with = |endpoints: &[Endpoint]| snapshot(Intentions::unknown(), vec![upstream(endpoints)]);
    let fetched =
        |accepted, unchanged| Some(Fetched { answers: Answers { accepted, rejected: 0 }, unchanged, ..Fetched::default() });
    let one = told(vec![with(&[endpoint(1, true)])]);
    assert_eq!(members(&one, DB), Members { changes: 1, fetched: fetched(1, 0) });
    assert_eq!(members(&one, LOCAL_APP), Members { changes: 1, fetched: None });
    let empty = told(vec![with(&[])]);
    assert_eq!(members(&empty, DB), Members { changes: 0, fetched: fetched(1, 1) });
    let told = told(vec![
        with(&[endpoint(1, true)]),
        with(&[endpoint(1, true), endpoint(2, true)]),
        with(&[endpoint(1, true), endpoint(2, false)]),
        with(&[endpoint(1, true), endpoint(2, false)]),
        with(&[endpoint(2, true)]),
        with(&[]),
    ]);
    assert_eq!(members(&told, DB), Members { changes: 4, fetched: fetched(5, 0) }, "another health is told, and is no change");
    assert_eq!(members(&told, LOCAL_APP).changes, 1);
}

#[cfg(feature = "xds")]
#[test]
fn what_was_fetched_is_found_by_the_clusters_own_name() {
    let mut custom = upstream(&[endpoint(1, true)]);
    let target = Target { id: "1a2b3c4d~db#0".into(), ..Target::clone(&custom.targets[0]) };
    custom.targets = vec![Arc::new(target)];
    let now = snapshot(Intentions::unknown(), vec![custom]);
    let mut tally = Tally::default();
    tally.follow_members(&Snapshot::default(), &now);
    let seven = Fetched { unchanged: 7, ..Fetched::default() };
    let members = tally.members(&now, |cluster| (cluster == "1a2b3c4d~db").then_some(seven));
    assert_eq!(members["web-sidecar-proxy"][DB], Members { changes: 1, fetched: Some(seven) });
    assert_eq!(members["web-sidecar-proxy"][LOCAL_APP].fetched, None);
}

#[test]
fn a_cluster_that_comes_back_begins_anew() {
    let with = |upstreams| snapshot(Intentions::unknown(), upstreams);
    let db = || vec![upstream(&[endpoint(1, true)])];
    let told = told(vec![with(db()), with(Vec::new()), with(db())]);
    assert_eq!((told.clusters.changes, members(&told, DB).changes), (changes(3, 0, 1), 1));
}
