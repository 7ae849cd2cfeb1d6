//! A changed definition touches only what changed: other listeners keep their sockets and their live connections.

mod support;

use support::traffic::{Live, connect, round_trip};
use support::{Agent, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, wait_for, wait_until};

#[test]
fn untouched_listeners_keep_their_connections() {
    let app = Echo::start();
    let agent = Agent::start();
    let (kept, removed, added) = (ports::free_address(), ports::free_address(), ports::free_address());
    agent.register(&Definition::new("db").app(app.address));
    agent.register(&Definition::new("cache").app(app.address));
    let web = Definition::new("web").app(app.address);
    agent.register(&web.clone().upstream("db", kept).upstream("cache", removed));
    agent.register(&Definition::new("api").upstream("web", ports::free_address()));
    for (source, destination) in [("web", "db"), ("web", "cache"), ("api", "web")] {
        agent.allow(source, destination);
    }
    let _servers = Sidecar::of("db").and("cache").start(&agent);
    let mut sidecar = Sidecar::of("web").workers(2).start(&agent);
    for upstream in [kept, removed] {
        wait_for("the first echo", PATIENCE, || round_trip(upstream, b"first").map_err(|error| error.to_string()));
    }
    let (mut on_kept, mut on_removed) = (Live::open(kept), Live::open(removed));
    let inode = listening_inodes(kept.port());
    assert!(!inode.is_empty(), "the kept listener is in the kernel's table");

    agent.register(&web.clone().upstream("db", kept).upstream("cache", added));
    wait_for("the added listener serves", PATIENCE, || {
        round_trip(added, b"new").map_err(|error| format!("{error}\n{}", sidecar.process.tail()))
    });
    wait_until("the removed listener is gone", PATIENCE, || connect(removed).is_err());
    on_kept.ping().expect("a live connection of the untouched listener");
    on_removed.ping().expect("a live connection of the removed listener, which drains");
    assert_eq!(listening_inodes(kept.port()), inode, "the untouched listener was bound again");
    round_trip(kept, b"still").expect("a new connection of the untouched listener");

    // A change that concerns no address at all.
    agent.register(&web.upstream_with("db", kept, &serde_json::json!({"connect_timeout_ms": 1_234})).upstream("cache", added));
    support::pause(std::time::Duration::from_secs(1));
    on_kept.ping().expect("a live connection after a change of a timeout");
    assert_eq!(listening_inodes(kept.port()), inode, "the listener was bound again for a timeout");
    sidecar.assert_healthy();
}

/// The kernel's ids of the sockets that listen on a port.
fn listening_inodes(port: u16) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the connection table");
    let local = format!(":{port:04X}");
    let mut inodes = table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.len() > 9 && fields[1].ends_with(&local) && fields[3] == "0A")
        .map(|fields| fields[9].to_owned())
        .collect::<Vec<_>>();
    inodes.sort();
    inodes
}
