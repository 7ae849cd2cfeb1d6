//! Runs one operation of the hot path a given number of times, for `scripts/instructions` to count under callgrind.
//!
//! Invariant: only what runs below [`counted_operations`] is the operation. Set-up, input and warm-up are outside, and the
//! script has callgrind collect inside that function alone, so keys and hash seeds drawn in the set-up add nothing.
//!
//! usage: `instructions NAME COUNT`, or `instructions list`

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use ringfence::identity::SpiffeId;
use ringfence::mesh::Snapshot;
use ringfence::policy::{Action, DefaultPolicy, Intention, Intentions};
use ringfence::store;
use ringfence::tls::fixtures::{Ca, ChainVerifier};
use ringfence::tls::{Established, Handshake, Open, Progress, Session, TlsParams, WorkerTls};

/// Operations before the counted ones: thread-locals, caches and the allocator's lists are then as in steady state.
const WARM_UP: usize = 16;
/// Leaves to choose the longest of: an ECDSA signature takes 70 to 72 bytes by chance, and the cache key hashes them all.
const LEAVES: usize = 32;
/// A regular Consul identity: the cluster id in the trust domain is 36 letters long.
const URI: &str = "spiffe://7c9f2a4e-51d3-4b86-9e0f-3d2a1b5c8e47.consul/ns/default/dc/dc1/svc/payments-api";

type Scenario = (&'static str, fn(usize));

const SCENARIOS: &[Scenario] = &[
    ("seal-100", |count| seal(100, count)),
    ("seal-16k", |count| seal(16_384, count)),
    ("open-100", |count| open(100, count)),
    ("open-16k", |count| open(16_384, count)),
    ("decide-1", |count| decide(1, count)),
    ("decide-1000", |count| decide(1_000, count)),
    ("snapshot-unchanged", snapshot_unchanged),
    ("spiffe-parse", spiffe_parse),
    ("verify-cached", verify_cached),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["list"] => {
            SCENARIOS.iter().for_each(|(name, _)| println!("{name}"));
            ExitCode::SUCCESS
        }
        [name, count] => match (SCENARIOS.iter().find(|(known, _)| *known == name), count.parse()) {
            (Some((_, run)), Ok(count)) => {
                run(count);
                ExitCode::SUCCESS
            }
            _ => usage(),
        },
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: instructions NAME COUNT | instructions list");
    ExitCode::from(64)
}

/// What callgrind collects in; the script knows it by this name. Never inlined, or there would be nothing to find.
#[inline(never)]
fn counted_operations<T>(inputs: &mut [T], mut operation: impl FnMut(&mut T)) {
    for input in inputs {
        operation(input);
    }
}

/// Warms up with operations of their own and then has `count` of them counted.
fn run<T>(count: usize, mut input: impl FnMut() -> T, mut operation: impl FnMut(&mut T)) {
    for _ in 0..WARM_UP {
        operation(&mut input());
    }
    let mut inputs: Vec<T> = (0..count).map(|_| input()).collect();
    counted_operations(&mut inputs, operation);
}

fn seal(payload_bytes: usize, count: usize) {
    let (mut client, _server) = sessions();
    let mut record = vec![0x5a; client.header_len() + payload_bytes + client.trailer_len()];
    run(count, || (), |()| client.seal(black_box(&mut record)).expect("far from the record limit"));
}

fn open(payload_bytes: usize, count: usize) {
    let (mut client, mut server) = sessions();
    let sealed = || {
        let mut record = vec![0x5a; client.header_len() + payload_bytes + client.trailer_len()];
        client.seal(&mut record).expect("far from the record limit");
        record
    };
    run(count, sealed, |record| {
        let opened = server.open(black_box(record)).expect("sealed by the other end, in this order");
        assert!(matches!(black_box(opened), Open::Data { .. }));
    });
}

/// The last of the intentions is the one that matches.
fn decide(intentions: usize, count: usize) {
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
    let intentions = Intentions::new(ordered, DefaultPolicy::Deny);
    run(count, || (), |()| assert!(black_box(&intentions).decide(black_box(&peer)).is_ok()));
}

fn snapshot_unchanged(count: usize) {
    let (_publisher, mut readers) = store::new(Snapshot::default(), 1);
    let reader = &mut readers[0];
    run(
        count,
        || (),
        |()| {
            assert!(black_box(&mut *reader).refresh().is_none());
            black_box(reader.current());
        },
    );
}

fn spiffe_parse(count: usize) {
    run(count, || (), |()| drop(black_box(SpiffeId::parse(black_box(URI)).expect("a SPIFFE ID"))));
}

fn verify_cached(count: usize) {
    let ca = Ca::new("7c9f2a4e-51d3-4b86-9e0f-3d2a1b5c8e47.consul");
    let longest = (0..LEAVES).map(|_| ca.svid("payments-api")).max_by_key(|svid| svid.chain[0].len()).expect("some leaves");
    let verifier = ChainVerifier::new(&ca.bundle());
    run(count, || (), |()| drop(black_box(verifier.caller(black_box(&longest.chain)).expect("a good chain"))));
}

/// Two sessions of ours over TLS 1.3, client and server.
fn sessions() -> (Session, Session) {
    let ca = Ca::new("t.consul");
    let tls = |service| WorkerTls::new(&ca.svid(service), &ca.bundle(), &TlsParams::default()).expect("a configuration");
    let expected: Arc<[_]> = Arc::from([ca.id("db")]);
    let client = tls("web").dialer(&"db.default.dc1.internal.t.consul".into(), &expected).connect().expect("a handshake");
    let server = tls("db").accept().expect("a handshake");
    let (client, server) = establish(client, server);
    assert_eq!((client.version, client.suite), (0x0304, 0x1301), "TLS 1.3 with AES-128-GCM");
    (client.session, server.session)
}

fn establish(mut client: Handshake, mut server: Handshake) -> (Established, Established) {
    /// A full handshake takes three.
    const TURNS_MAX: usize = 8;
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
