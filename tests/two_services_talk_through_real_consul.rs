//! Two services registered at a real Consul with ACLs talk through ringfence, and what the log says of it is true.

mod support;

use support::pair::{AnySidecar, Kind, assert_two_services_talk};
use support::{Consul, Mesh};

#[test]
fn through_ringfence_on_both_sides() {
    let consul = Consul::start();
    let (web, db) = assert_two_services_talk(&consul, Kind::Ringfence, Kind::Ringfence);
    let (AnySidecar::Ringfence(web), AnySidecar::Ringfence(db)) = (web, db) else { unreachable!("both are ringfence") };

    let inbound = db.wait_connection("an allowed inbound connection", |line| line["bytes_from_mesh"] == 100_000);
    let trust_domain = consul.trust_domain();
    assert_eq!(inbound["source"], format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/web"));
    assert_eq!(inbound["destination"], format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/db"));
    assert_eq!(inbound["decision"], "allowed");
    assert_eq!(inbound["tls_version"], "TLSv1.3");
    assert_eq!(inbound["reason"], "complete");
    let outbound = web.wait_connection("the same one, outbound", |line| line["bytes_to_mesh"] == 100_000);
    assert_eq!(outbound["upstream"], "db");
    assert_eq!(outbound["bytes_from_mesh"], 100_000);
}

/// The same story with Consul's own proxy on both sides: proves the harness itself.
#[test]
fn through_consuls_own_proxies() {
    let consul = Consul::start();
    assert_two_services_talk(&consul, Kind::Builtin, Kind::Builtin);
}
