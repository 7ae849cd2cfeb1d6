//! Consul's own proxy on either side understands us, and we it.

mod support;

use support::Consul;
use support::pair::{AnySidecar, Kind, assert_two_services_talk};

#[test]
fn we_dial_the_builtin_proxy() {
    let consul = Consul::start();
    let (web, _db) = assert_two_services_talk(&consul, Kind::Ringfence, Kind::Builtin);
    let AnySidecar::Ringfence(web) = web else { unreachable!("web is ringfence") };
    let line = web.wait_connection("an outbound connection", |line| line["bytes_from_mesh"] == 100_000);
    assert_eq!(line["tls_version"], "TLSv1.3");
    assert!(line["destination"].as_str().is_some_and(|id| id.ends_with("/svc/db")), "{line}");
}

#[test]
fn the_builtin_proxy_dials_us() {
    let consul = Consul::start();
    let (_web, db) = assert_two_services_talk(&consul, Kind::Builtin, Kind::Ringfence);
    let AnySidecar::Ringfence(db) = db else { unreachable!("db is ringfence") };
    let line = db.wait_connection("an inbound connection", |line| line["bytes_from_mesh"] == 100_000);
    assert!(line["source"].as_str().is_some_and(|id| id.ends_with("/svc/web")), "{line}");
    assert_eq!(line["decision"], "allowed");
}
