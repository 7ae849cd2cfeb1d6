//! Between two sidecars stands a router that ends no TLS: it reads the server name, passes every byte on as it is, and whoever
//! asks for nothing that it has is reset. All three are this proxy, each with its own snapshot, on the real kernel.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use ringfence::config::DataPlane;
use ringfence::mesh::router::{Match, Route, Router, RouterSettings, Way};
use ringfence::mesh::{Address, Bind, Endpoint, Identity, Outlier, PublicListener, Service, Snapshot, Target, Upstream};
use ringfence::policy::{DefaultPolicy, Intentions};
use ringfence::proxy::{self, Workers};
use ringfence::store::{self, Publisher};
use ringfence::sys::handover::Inherited;
use ringfence::telemetry::cells::WorkerCells;
use ringfence::telemetry::channel;
use ringfence::telemetry::close::CloseReason;
use ringfence::telemetry::record::{ConnectionRecord, Event};
use ringfence::tls::fixtures::Ca;
use ringfence::tls::{TlsParams, WorkerTls};
use support::traffic::{self, End};
use support::{PATIENCE, bytes, ports, wait_for, wait_until};

const DB: &str = "db.default.dc1.internal.mesh.consul";
const INSPECT_TIMEOUT: Duration = Duration::from_secs(1);

/// One proxy in this process.
struct Side {
    workers: Workers,
    publisher: Publisher<Snapshot>,
    cells: Arc<WorkerCells>,
    events: channel::Receiver,
}

impl Side {
    fn new(snapshot: Snapshot) -> Self {
        let plane = DataPlane { workers: 1, pin: false, ..DataPlane::default() };
        let (mut publisher, readers) = store::new(Snapshot::default(), 1);
        let (sender, events) = channel::pair();
        let cells = Arc::clone(&sender.cells);
        let workers = proxy::spawn(&plane, readers, vec![sender], Vec::new(), &mut Inherited::default()).expect("workers start");
        for wake in workers.wakes() {
            publisher.add_wake(wake);
        }
        publisher.publish(snapshot);
        wait_until("its listener", PATIENCE, || cells.listeners.value() == 1);
        Self { workers, publisher, cells, events }
    }

    fn republish(&mut self, snapshot: Snapshot) {
        let generation = self.publisher.publish(snapshot);
        wait_until("the snapshot's adoption", PATIENCE, || self.publisher.acknowledged() == generation);
    }

    /// What it tells of the next connection that ends.
    fn record(&mut self) -> ConnectionRecord {
        wait_for("a connection's end", PATIENCE, || {
            let told = self.events.by_ref().find_map(|event| match event {
                Event::Connection(record) => Some(*record),
                _ => None,
            });
            told.ok_or_else(|| "not yet".to_owned())
        })
    }

    fn stop(self) {
        self.workers.stop();
        self.workers.join().expect("clean end");
    }
}

struct Gateway {
    ca: Ca,
    client: Side,
    gateway: Side,
    server: Side,
    /// The client's upstream listener.
    listen: SocketAddr,
    front: SocketAddr,
    public: SocketAddr,
}

impl Gateway {
    /// web's sidecar, the gateway, db's sidecar, the app.
    fn new(app: SocketAddr) -> Self {
        let ca = Ca::new("mesh.consul");
        let (public, front, listen) = (ports::free_address(), ports::free_address(), ports::free_address());
        let public_listener = PublicListener {
            bind: Bind::Tcp(public),
            app: vec![Address::Tcp(app)],
            local_connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            local_keepalive: None,
            max_inbound_connections: 0,
            idle_timeout: None,
        };
        let server = Side::new(with_service(Service {
            public: Some(Arc::new(public_listener)),
            intentions: Arc::new(Intentions::new(Vec::new(), DefaultPolicy::Allow)),
            ..service(&ca, "db")
        }));
        let gateway = Side::new(router(front, DB, cluster(&[public], None)));
        let client = Side::new(web(&ca, listen, front));
        Self { ca, client, gateway, server, listen, front, public }
    }

    fn connect(&self) -> TcpStream {
        traffic::connect(self.listen).expect("the upstream listens")
    }

    fn stop(self) {
        [self.client, self.gateway, self.server].into_iter().for_each(Side::stop);
    }
}

fn service(ca: &Ca, name: &str) -> Service {
    let (svid, bundle) = (ca.svid(name), ca.bundle());
    let tls = WorkerTls::new(&svid, &bundle, &TlsParams::default()).expect("a good identity");
    Service {
        name: name.into(),
        proxy_id: format!("{name}-sidecar-proxy").into(),
        identity: Some(Arc::new(Identity { svid: Arc::new(svid), bundle, tls: vec![tls] })),
        intentions: Arc::new(Intentions::unknown()),
        public: None,
        upstreams: Vec::new(),
    }
}

fn with_service(service: Service) -> Snapshot {
    Snapshot { services: vec![Arc::new(service)], ..Snapshot::default() }
}

fn target(endpoints: &[SocketAddr]) -> Target {
    let endpoints = endpoints.iter().map(|&address| Endpoint { address, weight: 1, healthy: true }).collect();
    Target { id: "db".into(), sni: DB.into(), expected: [].into(), endpoints, access: None }
}

fn cluster(endpoints: &[SocketAddr], max_connections: Option<u32>) -> Upstream {
    Upstream {
        max_connections,
        ..Upstream::new(DB, Bind::Tcp(SocketAddr::from(([127, 0, 0, 1], 1))), vec![Arc::new(target(endpoints))])
    }
}

/// web's sidecar, which dials db at `endpoint`.
fn web(ca: &Ca, listen: SocketAddr, endpoint: SocketAddr) -> Snapshot {
    let target = Target { expected: [ca.svid("db").id.clone()].into(), ..target(&[endpoint]) };
    let outlier = Outlier { enforcing_percent: 0, ..Outlier::default() };
    let upstream = Upstream { bind: Bind::Tcp(listen), targets: vec![Arc::new(target)], outlier, ..cluster(&[], None) };
    with_service(Service { upstreams: vec![Arc::new(upstream)], ..service(ca, "web") })
}

fn router(bind: SocketAddr, name: &str, cluster: Upstream) -> Snapshot {
    let matches = Match { server_names: vec![name.parse().expect("a server name")], ..Match::default() };
    let route = Route { name: name.into(), matches, way: Way::Forward(Arc::new(cluster)) };
    let settings = RouterSettings {
        name: "default".into(),
        service: "mesh-gateway".into(),
        proxy_id: "mesh-gateway".into(),
        bind: Bind::Tcp(bind),
        transparent: false,
        permissive: false,
        inspect_timeout: INSPECT_TIMEOUT,
        silent_is_raw: false,
        routes: vec![Arc::new(route)],
        fallback: None,
    };
    let router = Router::new(settings).expect("a good router");
    Snapshot { routers: vec![Arc::new(router)], ..Snapshot::default() }
}

#[test]
fn mutual_tls_passes_unchanged_from_end_to_end() {
    const LENGTH: usize = 64 << 20;
    let app = support::Echo::start();
    let mut mesh = Gateway::new(app.address);
    let stream = mesh.connect();
    let sent = bytes(7, LENGTH);
    let received = std::thread::scope(|scope| {
        let mut writer = stream.try_clone().expect("dup");
        let sent = &sent;
        scope.spawn(move || {
            writer.write_all(sent).expect("write");
            writer.shutdown(Shutdown::Write).expect("half-close");
        });
        traffic::read_to_end(&stream)
    });
    assert!(received.0 == sent && received.1 == End::Clean, "{} bytes, {:?}", received.0.len(), received.1);
    drop(stream);
    let (client, gateway, server) = (mesh.client.record(), mesh.gateway.record(), mesh.server.record());
    assert_eq!([client.reason, gateway.reason, server.reason], [CloseReason::Complete; 3]);
    assert_eq!(server.source.as_ref(), Some(&mesh.ca.svid("web").id), "the server's sidecar sees who called");
    assert_eq!((gateway.source, gateway.tls_version), (None, None), "the gateway does not");
    assert_eq!(gateway.server_name.as_deref(), Some(DB));
    assert_eq!((server.bytes_from_mesh, server.bytes_to_mesh), (LENGTH as u64, LENGTH as u64));
    assert!(gateway.bytes_to_mesh > LENGTH as u64 && gateway.bytes_from_mesh > LENGTH as u64, "records and handshake count too");
    mesh.stop();
}

#[test]
fn a_name_that_it_does_not_have_is_reset_and_nobody_is_dialed() {
    let app = support::Echo::start();
    let mut mesh = Gateway::new(app.address);
    let cluster = cluster(&[mesh.public], None);
    mesh.gateway.republish(router(mesh.front, "cache.default.dc1.internal.mesh.consul", cluster));
    let mut stream = mesh.connect();
    let _ = stream.write_all(b"hello");
    assert_ne!(traffic::read_to_end(&stream).1, End::Clean);
    let record = mesh.gateway.record();
    assert_eq!((record.reason, record.server_name.as_deref()), (CloseReason::NoRoute, Some(DB)));
    assert!(record.detail.expect("a reason").contains(DB));
    assert_eq!(mesh.server.cells.connections.value(), 0);
    mesh.stop();
}

#[test]
fn garbage_silence_and_half_a_hello_end_within_the_bound() {
    let app = support::Echo::start();
    let mut mesh = Gateway::new(app.address);
    let front = mesh.front;
    let begin = |first: &[u8]| {
        let mut stream = TcpStream::connect(front).expect("the gateway listens");
        stream.write_all(first).expect("the first bytes");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream
    };
    let cases: [(&[u8], CloseReason); 5] = [
        (b"GET / HTTP/1.1\r\n\r\n", CloseReason::NoRoute),
        (&[0; 4_096], CloseReason::NoRoute),
        (&[22, 3, 1, 2, 0, 1, 0, 1, 252], CloseReason::HandshakeTimeout),
        (b"", CloseReason::HandshakeTimeout),
        (&[22, 3, 1, 0x40, 0x01], CloseReason::HandshakeFailed),
    ];
    for (first, expected) in cases {
        let mut stream = begin(first);
        let ended = stream.read(&mut [0]);
        assert!(!matches!(ended, Ok(1..)), "{ended:?}: nothing is ever answered");
        assert_eq!(mesh.gateway.record().reason, expected, "after {first:?}");
    }
    let mut stream = begin(&[22, 3, 1]);
    stream.shutdown(Shutdown::Write).expect("half-close");
    assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    assert_eq!(mesh.gateway.record().reason, CloseReason::HandshakeFailed);
    drop(begin(b""));
    assert_eq!(mesh.gateway.record().reason, CloseReason::Probe);
    wait_until("the return of what was kept", PATIENCE, || mesh.gateway.cells.buffer_bytes_leased.value() == 0);
    mesh.stop();
}

#[test]
fn a_hello_that_comes_byte_by_byte_finds_its_way() {
    let app = support::Echo::start();
    let mut mesh = Gateway::new(app.address);
    let (slow, front) = (ports::listener(), mesh.front);
    let between = slow.local_addr().expect("address");
    mesh.client.republish(web(&mesh.ca, mesh.listen, between));
    let relay = std::thread::spawn(move || dribble(&slow, front));
    let mut stream = mesh.connect();
    stream.write_all(b"hello").expect("write");
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).expect("an echo");
    assert_eq!(&answer, b"hello");
    drop(stream);
    relay.join().expect("the slow path");
    assert_eq!(mesh.server.record().source.as_ref(), Some(&mesh.ca.svid("web").id));
    mesh.stop();
}

/// Passes one connection on, its first 300 bytes each on its own.
fn dribble(listener: &TcpListener, to: SocketAddr) {
    let (mut near, _) = listener.accept().expect("a connection");
    let mut far = TcpStream::connect(to).expect("the gateway listens");
    far.set_nodelay(true).expect("nodelay");
    let (mut back_from, mut back_to) = (far.try_clone().expect("dup"), near.try_clone().expect("dup"));
    let back = std::thread::spawn(move || {
        let _ = std::io::copy(&mut back_from, &mut back_to);
    });
    let mut byte = [0];
    for _ in 0..300 {
        near.read_exact(&mut byte).expect("a byte");
        far.write_all(&byte).expect("a byte");
        support::pause(Duration::from_micros(500));
    }
    let _ = std::io::copy(&mut near, &mut far);
    let _ = (far.shutdown(Shutdown::Both), near.shutdown(Shutdown::Both));
    let _ = back.join();
}

#[test]
fn a_reset_arrives_as_a_reset_at_the_other_end() {
    let (sender, outcome) = support::servers::reports();
    let app = support::Custom::start(move |mut stream| {
        let mut all = Vec::new();
        sender.send(stream.read_to_end(&mut all).map(|_| all).map_err(|error| error.kind().to_string()));
    });
    let mut mesh = Gateway::new(app.address);
    let mut stream = mesh.connect();
    stream.write_all(b"half of it").expect("write");
    wait_until("the app is reached", PATIENCE, || app.accepted() == 1);
    traffic::reset(stream);
    let at_app: Result<Vec<u8>, String> = outcome.next();
    assert!(at_app.is_err(), "the app took a reset for an end: {at_app:?}");
    assert_ne!(mesh.gateway.record().reason, CloseReason::Complete);
    mesh.stop();
}

#[test]
fn limits_and_dead_endpoints_are_a_clusters_own() {
    let app = support::Echo::start();
    let mut mesh = Gateway::new(app.address);
    let dead = ports::free_address();
    let cluster = cluster(&[dead, mesh.public], Some(1));
    mesh.gateway.republish(router(mesh.front, DB, cluster));
    let ping = |stream: &mut TcpStream| stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_ok();
    let mut attempts = 0;
    for _ in 0..4 {
        let mut first = mesh.connect();
        assert!(ping(&mut first), "the living endpoint answers");
        // The reset may overtake the connect.
        let mut second = traffic::connect(mesh.listen);
        assert!(!second.as_mut().is_ok_and(ping), "one connection at a time");
        let refused = mesh.gateway.record();
        assert_eq!(refused.reason, CloseReason::Limit, "{refused:?}");
        assert_eq!(refused.upstream.as_deref(), Some(DB));
        drop((first, second));
        let served = mesh.gateway.record();
        assert_eq!(served.reason, CloseReason::Complete, "{served:?}");
        attempts = attempts.max(served.attempts);
    }
    assert_eq!(attempts, 2, "the dead endpoint was tried and left");
    mesh.stop();
}

#[test]
fn an_idle_connection_owns_no_buffer() {
    let app = support::Echo::start();
    let mesh = Gateway::new(app.address);
    let mut stream = mesh.connect();
    let mut received = vec![0; 8 << 20];
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().expect("dup");
        scope.spawn(move || writer.write_all(&bytes(9, 8 << 20)).expect("write"));
        stream.read_exact(&mut received).expect("the echo");
    });
    assert!(received == bytes(9, 8 << 20));
    wait_until("the buffers' return", PATIENCE, || mesh.gateway.cells.buffer_bytes_leased.value() == 0);
    assert_eq!(mesh.gateway.cells.connections.value(), 1);
    stream.write_all(b"again").expect("it lives");
    stream.read_exact(&mut received[..5]).expect("the echo");
    mesh.stop();
}
