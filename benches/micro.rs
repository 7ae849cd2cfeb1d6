//! Times of the smallest parts of the hot path, and of rustls's own record layer beside ours.
//!
//! Invariant: both record layers use the same library for cryptography and the same suite, neither is charged for the
//! socket, and every record that is opened was sealed by the other end outside the measured time.
//!
//! Run with `cargo bench --bench micro`, or a part of it with `cargo bench --bench micro -- seal`.

use std::fmt;
use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use divan::Bencher;
use divan::counter::BytesCount;
use ringfence::identity::SpiffeId;
use ringfence::mesh::caller::{Caller, Callers, Refusal, Tier, Who};
use ringfence::mesh::{Service, Snapshot};
use ringfence::policy::{Action, DefaultPolicy, Intention, Intentions};
use ringfence::store::{self, Publisher};
use ringfence::sys::SocketDiag;
use ringfence::tls::fixtures::{Ca, ChainVerifier};
use ringfence::tls::{Dialer, Established, Handshake, Open, Progress, Session, TlsParams, WorkerTls};
use rustls::crypto::CryptoProvider;
#[cfg(feature = "aws-lc-rs")]
use rustls::crypto::aws_lc_rs as library;
#[cfg(not(feature = "aws-lc-rs"))]
use rustls::crypto::ring as library;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

/// The longest payload of a record.
const PAYLOAD_BYTES_MAX: usize = 16_384;
/// A regular Consul identity: the cluster id in the trust domain is 36 letters long.
const URI: &str = "spiffe://7c9f2a4e-51d3-4b86-9e0f-3d2a1b5c8e47.consul/ns/default/dc/dc1/svc/payments-api";

/// Seconds that a snapshot is read for, so that there are publications in it at 1 Hz too.
const SNAPSHOT_READ_S: u64 = 3;

/// A protocol version and the payload bytes of each record.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tls13: bool,
    payload_bytes: usize,
}

const SHAPES: [Shape; 6] = [
    Shape { tls13: true, payload_bytes: 64 },
    Shape { tls13: true, payload_bytes: 1_024 },
    Shape { tls13: true, payload_bytes: PAYLOAD_BYTES_MAX },
    Shape { tls13: false, payload_bytes: 64 },
    Shape { tls13: false, payload_bytes: 1_024 },
    Shape { tls13: false, payload_bytes: PAYLOAD_BYTES_MAX },
];

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = if self.tls13 { "TLS 1.3" } else { "TLS 1.2" };
        write!(f, "{version}, {:>6} B", self.payload_bytes)
    }
}

impl Shape {
    /// AES-128-GCM, which our configurations put first in both versions.
    const fn suite(self) -> u16 {
        if self.tls13 { 0x1301 } else { 0xc02b }
    }
}

fn main() {
    divan::main();
}

#[divan::bench(args = SHAPES)]
fn seal_ringfence(bencher: Bencher<'_, '_>, shape: Shape) {
    let (mut client, _server) = our_sessions(shape);
    let mut record = room(&client, shape);
    bencher
        .counter(BytesCount::new(shape.payload_bytes))
        .bench_local(|| client.seal(black_box(&mut record)).expect("far from the record limit"));
}

#[divan::bench(args = SHAPES)]
fn seal_rustls(bencher: Bencher<'_, '_>, shape: Shape) {
    let (mut client, _server) = stock_connections(shape);
    let payload = vec![0x5a; shape.payload_bytes];
    bencher.counter(BytesCount::new(shape.payload_bytes)).bench_local(|| {
        client.writer().write_all(black_box(&payload)).expect("buffered");
        client.write_tls(&mut std::io::sink()).expect("to nowhere")
    });
}

#[divan::bench(args = SHAPES)]
fn open_ringfence(bencher: Bencher<'_, '_>, shape: Shape) {
    let (mut client, mut server) = our_sessions(shape);
    let sealed = || {
        let mut record = room(&client, shape);
        client.seal(&mut record).expect("far from the record limit");
        record
    };
    bencher.counter(BytesCount::new(shape.payload_bytes)).with_inputs(sealed).bench_local_refs(|record| {
        let opened = server.open(record).expect("sealed by the other end, in this order");
        assert!(matches!(&opened, Open::Data { payload, .. } if payload.len() == shape.payload_bytes));
        opened
    });
}

#[divan::bench(args = SHAPES)]
fn open_rustls(bencher: Bencher<'_, '_>, shape: Shape) {
    let (mut client, mut server) = stock_connections(shape);
    let payload = vec![0x5a; shape.payload_bytes];
    let sealed = || {
        client.writer().write_all(&payload).expect("buffered");
        taken(&mut client)
    };
    let mut plain = vec![0; shape.payload_bytes];
    bencher.counter(BytesCount::new(shape.payload_bytes)).with_inputs(sealed).bench_local_refs(|wire| {
        give(&mut server, wire);
        server.reader().read_exact(black_box(&mut plain)).expect("a whole record was given");
    });
}

/// The last of the intentions is the one that matches.
#[divan::bench(args = [1, 100, 10_000])]
fn decide(bencher: Bencher<'_, '_>, intentions: usize) {
    let peer = SpiffeId::parse(URI).expect("a SPIFFE ID");
    let source = |index| if index + 1 == intentions { "payments-api".to_owned() } else { format!("payments-{index:03}") };
    let ordered = (0..intentions)
        .map(|index| Intention {
            id: String::new(),
            source: source(index),
            source_namespace: "default".to_owned(),
            source_partition: String::new(),
            source_peer: String::new(),
            destination: "db".to_owned(),
            action: Action::Allow,
            precedence: 9,
        })
        .collect();
    let set = Intentions::new(ordered, DefaultPolicy::Deny);
    assert!(set.decide(&peer).is_ok(), "the last one allows it");
    bencher.bench_local(|| black_box(&set).decide(black_box(&peer)));
}

/// What a worker does once a loop turn, while the control plane publishes so many times a second.
#[divan::bench(args = [0, 1, 1_000], min_time = SNAPSHOT_READ_S, sample_size = 10_000)]
fn snapshot_read(bencher: Bencher<'_, '_>, publications_per_s: u32) {
    let (publisher, mut readers) = store::new(snapshot(&service()), 1);
    let mut reader = readers.pop().expect("one reader");
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let thread = (publications_per_s > 0).then(|| {
            let (period, ended) = (Duration::from_secs(1) / publications_per_s, &ended);
            scope.spawn(move || publish(publisher, period, ended))
        });
        bencher.bench_local(|| {
            if let Some(old) = reader.refresh() {
                drop(old);
                reader.acknowledge();
            }
            black_box(reader.current());
        });
        ended.store(true, Ordering::Relaxed);
        if let Some(thread) = thread {
            thread.thread().unpark();
        }
    });
}

fn publish(mut publisher: Publisher<Snapshot>, period: Duration, ended: &AtomicBool) {
    let service = service();
    while !ended.load(Ordering::Relaxed) {
        publisher.publish(snapshot(&service));
        thread::park_timeout(period);
    }
}

fn service() -> Arc<Service> {
    Arc::new(Service {
        name: "web".into(),
        proxy_id: "web-sidecar-proxy".into(),
        identity: None,
        intentions: Arc::new(Intentions::unknown()),
        public: None,
        upstreams: Vec::new(),
    })
}

fn snapshot(service: &Arc<Service>) -> Snapshot {
    Snapshot { services: vec![Arc::clone(service)], ..Snapshot::default() }
}

/// Who is behind an accepted local connection: the kernel's answer and the look-up among so many registered tasks.
#[divan::bench(args = [1, 1_000])]
fn attribute_registered_task(bencher: Bencher<'_, '_>, tasks: u64) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let server = listener.local_addr().expect("its address");
    let client = TcpStream::connect(server).expect("connected");
    let client = client.local_addr().map(|address| (client, address)).expect("its address");
    let mut diag = SocketDiag::open().expect("netlink");
    let cgroup = diag.owner(client.1, server).expect("known").cgroup;
    let refusal = Refusal { rule: "default".into(), why: "none".into(), remedy: "none".into() };
    let caller = Arc::new(Caller { who: Who::Component("c".into()), tier: Tier::Cgroup, verdict: Err(refusal) });
    let by_cgroup = (0..tasks).map(|task| (cgroup.wrapping_add(task), Arc::clone(&caller))).collect();
    let callers = Callers { by_cgroup, ..Callers::default() };
    bencher.bench_local(|| {
        let owner = diag.owner(black_box(client.1), black_box(server))?;
        callers.by_cgroup.get(&owner.cgroup).map(Arc::clone)
    });
}

#[divan::bench]
fn spiffe_parse() -> SpiffeId {
    SpiffeId::parse(black_box(URI)).expect("a SPIFFE ID")
}

#[divan::bench]
fn verify_cached(bencher: Bencher<'_, '_>) {
    let ca = Ca::new("t.consul");
    let (verifier, svid) = (ChainVerifier::new(&ca.bundle()), ca.svid("web"));
    bencher.bench_local(|| verifier.caller(black_box(&svid.chain)).expect("a good chain"));
}

/// Each leaf is a new one, so its chain is never in the cache.
#[divan::bench]
fn verify_uncached(bencher: Bencher<'_, '_>) {
    let ca = Ca::new("t.consul");
    let verifier = ChainVerifier::new(&ca.bundle());
    bencher
        .with_inputs(|| ca.svid("web"))
        .bench_local_refs(|svid| verifier.caller(black_box(&svid.chain)).expect("a good chain"));
}

/// Both ends of a full TLS 1.3 handshake that know each other's chain.
#[divan::bench]
fn handshake_cached(bencher: Bencher<'_, '_>) {
    let (dialer, server) = ends(&Ca::new("t.consul"), true);
    bencher.bench_local(|| establish(&dialer, &server));
}

/// The same with a CA and chains that neither end has seen.
#[divan::bench]
fn handshake_uncached(bencher: Bencher<'_, '_>) {
    bencher.with_inputs(|| ends(&Ca::new("t.consul"), true)).bench_local_refs(|(dialer, server)| establish(dialer, server));
}

/// A record's room with a payload in its place.
fn room(session: &Session, shape: Shape) -> Vec<u8> {
    vec![0x5a; session.header_len() + shape.payload_bytes + session.trailer_len()]
}

/// Two sessions of ours, client and server.
fn our_sessions(shape: Shape) -> (Session, Session) {
    let (dialer, server) = ends(&Ca::new("t.consul"), shape.tls13);
    let (client, server) = establish(&dialer, &server);
    assert_eq!(client.suite, shape.suite());
    (client.session, server.session)
}

/// What dials and what accepts, of one CA.
fn ends(ca: &Ca, tls13: bool) -> (Dialer, WorkerTls) {
    let params = TlsParams { tls12: !tls13, tls13, ..TlsParams::DEFAULT };
    let tls = |service| WorkerTls::new(&ca.svid(service), &ca.bundle(), &params).expect("a configuration");
    let expected: Arc<[_]> = Arc::from([ca.id("db")]);
    (tls("web").dialer(&"db.default.dc1.internal.t.consul".into(), &expected), tls("db"))
}

fn establish(dialer: &Dialer, server: &WorkerTls) -> (Established, Established) {
    /// A full handshake takes three.
    const TURNS_MAX: usize = 8;
    let (mut client, mut server) = (dialer.connect().expect("a handshake"), server.accept().expect("a handshake"));
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    for _ in 0..TURNS_MAX {
        let client_done = step(&mut client, &mut to_client, &mut to_server);
        let server_done = step(&mut server, &mut to_server, &mut to_client);
        if client_done && server_done {
            return (client.establish().expect("the client is done"), server.establish().expect("the server is done"));
        }
    }
    panic!("the handshake does not end");
}

/// Steps until it wants bytes or is done, which is what it returns.
fn step(handshake: &mut Handshake, incoming: &mut Vec<u8>, wire: &mut Vec<u8>) -> bool {
    let mut out = [0; 16_384];
    loop {
        let step = handshake.step(incoming, &mut out);
        incoming.drain(..step.consumed);
        wire.extend_from_slice(&out[..step.written]);
        match step.progress {
            Progress::NeedRoom => {}
            Progress::NeedBytes => return false,
            Progress::Done => return true,
            Progress::Failed(failure) => panic!("the handshake failed: {failure:?}"),
        }
    }
}

/// Two connections of rustls as it comes, client and server, on the suite that ours use.
fn stock_connections(shape: Shape) -> (Connection, Connection) {
    const NAME: &str = "localhost";
    let issued = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    let certificate = issued.cert.der().clone();
    let key = PrivateKeyDer::try_from(issued.signing_key.serialize_der()).expect("PKCS #8");
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("a root");
    let mut suites = library::ALL_CIPHER_SUITES.to_vec();
    suites.retain(|suite| u16::from(suite.suite()) == shape.suite());
    let provider = Arc::new(CryptoProvider { cipher_suites: suites, ..library::default_provider() });
    let versions = [if shape.tls13 { &rustls::version::TLS13 } else { &rustls::version::TLS12 }];

    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions)
        .expect("a version that the suite is of")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("a certificate and its key");
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .expect("a version that the suite is of")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(NAME).expect("a name");
    let mut client = Connection::Client(ClientConnection::new(Arc::new(client), name).expect("a client"));
    let mut server = Connection::Server(ServerConnection::new(Arc::new(server)).expect("a server"));
    while client.wants_write() || server.wants_write() {
        give(&mut server, &taken(&mut client));
        give(&mut client, &taken(&mut server));
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    (client, server)
}

/// Everything that a connection has to send.
fn taken(connection: &mut Connection) -> Vec<u8> {
    let mut wire = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut wire).expect("to memory");
    }
    wire
}

fn give(connection: &mut Connection, mut wire: &[u8]) {
    while !wire.is_empty() {
        connection.read_tls(&mut wire).expect("from memory");
        connection.process_new_packets().expect("from the other end");
    }
}
