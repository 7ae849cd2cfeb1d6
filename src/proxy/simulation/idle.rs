//! Connections that may rest so long and no longer.

use super::*;

/// A mesh whose server bounds how long a connection may move no byte, and where the app listens.
fn bounded(seed: u64, idle_timeout: Duration) -> (Mesh, i32) {
    let mut mesh = Mesh::new(seed, Faults::NONE);
    let app = mesh.network.listen(APP);
    mesh.idle_timeout = Some(idle_timeout);
    mesh.publish_server(DefaultPolicy::Allow);
    mesh.turns(50);
    (mesh, app)
}

/// Why the server's side of the one connection ended.
fn ending(mesh: Mesh) -> CloseReason {
    let (_, server) = mesh.finish();
    let [record] = server.as_slice() else { panic!("{server:?}") };
    record.reason
}

#[test]
fn only_a_connection_that_moves_no_byte_is_idle() {
    let (mut mesh, app) = bounded(7, Duration::from_millis(800));
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    for _ in 0..4 {
        client.write(b"byte");
        mesh.turns(700);
    }
    let server = mesh.network.accept(app).expect("the app was dialed");
    assert_eq!(server.read(100), Ok(Some(b"bytebytebytebyte".to_vec())), "it moved bytes all the time");
    mesh.turns(300);
    assert!(server.read(100).is_err() && client.read(100).is_err(), "both ends see a reset");
    drop((client, server));
    assert_eq!(ending(mesh), CloseReason::Idle);
}

#[test]
fn an_idle_limit_does_not_outlive_the_drain_of_its_listener() {
    let (mut mesh, app) = bounded(8, Duration::from_secs(60));
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"hello");
    mesh.turns(500);
    let server = mesh.network.accept(app).expect("the app was dialed");
    mesh.publish_server_at(address(21_001), DefaultPolicy::Allow);
    mesh.turns(DRAIN_MS as usize + 50);
    assert!(client.read(100).is_err(), "its listener is gone, and so is its time");
    drop((client, server));
    assert_eq!(ending(mesh), CloseReason::Drained);
}

#[test]
fn a_slow_reader_is_not_idle() {
    let (mut mesh, app) = bounded(9, Duration::from_millis(800));
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    let bulk = vec![7; 2_000_000];
    let (mut said, mut heard) = (0, 0);
    let mut server = None;
    // A region is under way for seconds, while nothing is received.
    for _ in 0..40 {
        said += client.write(&bulk[said..]).expect("open");
        mesh.turns(300);
        server = server.or_else(|| mesh.network.accept(app));
        let end: &End = server.as_ref().expect("the app was dialed");
        heard += end.read(8_000).expect("it is alive").map_or(0, |bytes| bytes.len());
    }
    assert!(heard == 320_000 && said > heard + 100_000, "{heard} of {said}: nothing waits for the reader");
    mesh.turns(1_200);
    assert!(client.read(1).is_err(), "one that reads nothing is");
    drop((client, server));
    assert_eq!(ending(mesh), CloseReason::Idle);
}
