//! 64 services in one process stay within the agent's 200 connections, and all of them work.

mod support;

use serde_json::json;
use support::traffic::round_trip;
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, wait_for};

const SERVICES: usize = 64;
/// `http_max_conns_per_client` of the agent, for all of loopback together.
const CONNECTIONS_MAX: usize = 200;

#[test]
fn sixty_four_services_in_one_process() {
    let app = Echo::start();
    let consul = Consul::start();
    let names = (0..SERVICES).map(|index| format!("worker-{index}")).collect::<Vec<_>>();
    let upstreams = names.iter().map(|_| ports::free_address()).collect::<Vec<_>>();
    consul.register(&Definition::new("db").app(app.address));
    for (name, upstream) in names.iter().zip(&upstreams) {
        consul.register(&Definition::new(name).upstream("db", *upstream));
    }
    consul.allow("*", "db");
    let identities = names.iter().map(|name| json!({"ServiceName": name})).collect::<Vec<_>>();
    let (_, token) = consul.make_token(&json!({"ServiceIdentities": identities}));
    let _db = Sidecar::start(&consul, "db");
    let process = names[1..].iter().fold(Sidecar::of(&names[0]), |process, name| process.and(name));
    let mut workers = process.token(Some(&token)).start(&consul);

    for (name, upstream) in names.iter().zip(&upstreams) {
        wait_for(&format!("an echo from {name}"), PATIENCE, || {
            round_trip(*upstream, name.as_bytes()).map_err(|error| format!("{error}\n{}", workers.process.tail()))
        });
    }
    let most = (0..20)
        .map(|_| {
            support::pause(std::time::Duration::from_millis(250));
            connections_to(consul.address().port())
        })
        .max();
    println!("{SERVICES} services and db held at most {most:?} connections to the agent");
    assert!(most.is_some_and(|most| most < CONNECTIONS_MAX), "{most:?} connections to the agent");
    let sources = names.iter().filter(|name| {
        let suffix = format!("/svc/{name}");
        workers.connections().iter().any(|line| line["source"].as_str().is_some_and(|source| source.ends_with(&suffix)))
    });
    assert_eq!(sources.count(), SERVICES, "each service spoke under its own identity");
    workers.assert_healthy();
}

/// Established connections of this host whose far end is `port` on loopback.
fn connections_to(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the connection table");
    let far_end = format!(":{port:04X}");
    let established = |line: &&str| {
        let fields = line.split_whitespace().collect::<Vec<_>>();
        fields.len() > 3 && fields[2].ends_with(&far_end) && fields[3] == "01"
    };
    table.lines().skip(1).filter(established).count()
}
