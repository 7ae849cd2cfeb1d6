//! Handshakes of our two roles with each other and with rustls as it comes, whole, in pieces, spoiled and hostile.

use std::io::Write as _;
use std::time::Duration;

use proptest::prelude::*;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{Connection, ServerConnection, SupportedCipherSuite};

use super::*;
use crate::identity::Svid;
use crate::tls::alert;
use crate::tls::fixtures::{Ca, KeyKind, Leaf, now};
use crate::tls::harness::{
    Side, connect_stock, give, run, run_stock, seal, stock_client, stock_client_config, stock_server, stock_server_config,
    suites, take, worker, worker_with,
};
use crate::tls::provider::TlsParams;
use crate::tls::record::Open;
use crate::tls::suites::Suites;

const TLS12: TlsParams = TlsParams { tls12: true, tls13: false, ..TlsParams::DEFAULT };
const TLS13: TlsParams = TlsParams { tls12: false, tls13: true, ..TlsParams::DEFAULT };

fn suite(tls13: bool) -> SupportedCipherSuite {
    let wanted = |(suite, key): &(SupportedCipherSuite, KeyKind)| suite.tls13().is_some() == tls13 && *key == KeyKind::P256;
    suites().into_iter().find(wanted).expect("a suite").0
}

/// A client "web" and a server "db" of one CA.
fn sides(params: &TlsParams, out_bytes: usize) -> (Side, Side) {
    let ca = Ca::new("t.consul");
    let expected: Arc<[_]> = Arc::from([ca.id("other"), ca.id("db")]);
    let client = worker_with(&ca.svid("web"), &ca.bundle(), params)
        .dialer(&"db.internal".into(), &expected)
        .connect()
        .expect("a handshake");
    let server = worker_with(&ca.svid("db"), &ca.bundle(), params).accept().expect("a handshake");
    (Side::with_out(client, out_bytes), Side::with_out(server, out_bytes))
}

fn check_pair(client: Side, server: Side, version: u16) {
    let (mut client, mut server) = (client.establish().0, server.establish().0);
    assert_eq!((client.peer, server.peer), (Some(id("db")), Some(id("web"))));
    assert_eq!((client.version, server.version, client.suite), (version, version, server.suite));
    assert!(!client.resumed && !server.resumed);
    check_data(&mut client.session, &mut server.session);
    check_data(&mut server.session, &mut client.session);
}

fn check_data(from: &mut Session, to: &mut Session) {
    let mut record = seal(from, b"ping");
    let Ok(Open::Data { payload, .. }) = to.open(&mut record) else { panic!("not data") };
    assert_eq!(&record[payload], b"ping");
}

/// Whether `at` lies in what rustls ignores of a record's header: the version, and the type of a protected TLS 1.3 record,
/// which it authenticates with the header that such a record must have.
fn is_ignored(wire: &[u8], at: usize) -> bool {
    const PROTECTED: u8 = 23;
    let mut start = 0;
    while let Some(&[kind, _, _, high, low]) = wire.get(start..start + HEADER_BYTES) {
        if (start + 1..start + 3).contains(&at) || (kind == PROTECTED && at == start) {
            return true;
        }
        start += HEADER_BYTES + usize::from(u16::from_be_bytes([high, low]));
    }
    false
}

fn id(service: &str) -> SpiffeId {
    SpiffeId::service("t.consul", "", "default", "dc1", service).expect("valid")
}

#[test]
fn both_versions_work_byte_by_byte_and_with_one_byte_of_room() {
    for (params, version) in [(&TLS12, 0x0303), (&TLS13, 0x0304), (&TlsParams::default(), 0x0304)] {
        for (piece, out_bytes) in [(usize::MAX, 16_384), (1, 16_384), (usize::MAX, 1), (1, 1), (7, 64)] {
            let (mut client, mut server) = sides(params, out_bytes);
            run(&mut client, &mut server, || piece);
            check_pair(client, server, version);
        }
    }
}

#[test]
fn no_suite_outside_a_narrower_list_is_spoken() {
    let narrow = TlsParams { suites: Suites::named(["ECDHE-ECDSA-AES256-GCM-SHA384"]), ..TLS12 };
    let (mut client, mut server) = sides(&narrow, 16_384);
    run(&mut client, &mut server, || usize::MAX);
    assert_eq!(client.establish().0.suite, 0xc02c);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_split_works(pieces in prop::collection::vec(1_usize..3_000, 1..40), tls13 in any::<bool>(), out_bytes in 1_usize..2_000) {
        let (mut client, mut server) = sides(if tls13 { &TLS13 } else { &TLS12 }, out_bytes);
        let mut at = 0;
        run(&mut client, &mut server, || { at += 1; pieces[at % pieces.len()] });
        check_pair(client, server, if tls13 { 0x0304 } else { 0x0303 });
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 20_u8..24, as_tls in any::<bool>(), server in any::<bool>()) {
        let (client_side, server_side) = sides(&TlsParams::default(), 4_096);
        let mut side = if server { server_side } else { client_side };
        let mut wire = Vec::new();
        side.step(&mut wire);
        if as_tls {
            let [high, low] = (bytes.len() as u16).to_be_bytes();
            side.incoming.extend_from_slice(&[kind, 3, 3, high, low]);
        }
        side.incoming.extend_from_slice(&bytes);
        side.step(&mut wire);
        prop_assert!(!side.done);
    }

    #[test]
    fn a_changed_flight_never_completes_with_wrong_bytes(
        at in any::<prop::sample::Index>(), bit in 0_u8..8, tls13 in any::<bool>(), flight in 0_usize..3, piece in 1_usize..3_000,
    ) {
        let (mut client, mut server) = sides(if tls13 { &TLS13 } else { &TLS12 }, 16_384);
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        let mut ignored = false;
        client.step(&mut to_server);
        for turn in 0..6 {
            let (wire, to, back) = if turn % 2 == 0 {
                (&mut to_server, &mut server, &mut to_client)
            } else {
                (&mut to_client, &mut client, &mut to_server)
            };
            if wire.is_empty() {
                break;
            }
            if turn == flight {
                let at = at.index(wire.len());
                ignored = is_ignored(wire, at);
                wire[at] ^= 1 << bit;
            }
            for part in std::mem::take(wire).chunks(piece) {
                to.incoming.extend_from_slice(part);
                to.step(back);
            }
        }
        let unnoticed = client.done && server.done;
        prop_assert!(!unnoticed || ignored, "both ends completed over a changed flight {flight}");
    }
}

#[test]
fn data_behind_the_finished_stays_for_the_record_layer() {
    for tls13 in [false, true] {
        for piece in [usize::MAX, 1, 100] {
            let ca = Ca::new("t.consul");
            let (web, db) = (ca.svid("web"), ca.svid("db"));
            // A stock client that writes as soon as it may: in TLS 1.3 its data shares a buffer with its Finished.
            let mut ours = Side::new(worker(&ca, &db).accept().expect("a handshake"));
            let mut stock = Connection::Client(stock_client(&ca, Some(&web), "db", suite(tls13)));
            stock.writer().write_all(b"early data").expect("buffered until the handshake is over");
            run_stock(&mut ours, &mut stock, || piece).expect("content");
            check_early(ours, stock, piece);

            // A stock server that speaks first: tickets and banner come with or right behind its Finished.
            let expected: Arc<[_]> = Arc::from([ca.id("db")]);
            let mut ours = Side::new(worker(&ca, &web).dialer(&"db.internal".into(), &expected).connect().expect("a handshake"));
            let mut stock = Connection::Server(stock_server(&ca, &db, suite(tls13)));
            stock.writer().write_all(b"early data").expect("buffered until the handshake is over");
            run_stock(&mut ours, &mut stock, || piece).expect("content");
            check_early(ours, stock, piece);
        }
    }
}

fn check_early(ours: Side, stock: Connection, piece: usize) {
    let (established, wire) = ours.establish();
    let mut link = crate::tls::harness::Linked { session: established.session, stock, wire };
    // The turn in which ours was done may have left bytes at the stock end.
    link.wire.extend(take(&mut link.stock));
    assert_eq!(link.our_read(piece.min(1 << 20)), b"early data");
    let wire = link.our_records(b"answer");
    assert_eq!(link.stock_read(&wire), b"answer");
}

#[test]
fn handshake_messages_spread_over_small_records_work() {
    for tls13 in [false, true] {
        for fragment in [40, 64, 300] {
            let ca = Ca::new("t.consul").intermediate();
            let (web, db) = (ca.svid("web"), ca.svid("db"));
            let mut config = stock_client_config(&ca, Some(&web), "db", suite(tls13));
            config.max_fragment_size = Some(fragment);
            let mut stock = Connection::Client(connect_stock(config.into()));
            let mut ours = Side::new(worker(&ca, &db).accept().expect("a handshake"));
            run_stock(&mut ours, &mut stock, || 50).expect("content");
            assert_eq!(ours.establish().0.peer, Some(ca.id("web")));

            let mut config = stock_server_config(&ca, &db, suite(tls13));
            config.max_fragment_size = Some(fragment);
            let mut stock = Connection::Server(ServerConnection::new(config.into()).expect("a server"));
            let expected: Arc<[_]> = Arc::from([ca.id("db")]);
            let mut ours = Side::new(worker(&ca, &web).dialer(&"db.internal".into(), &expected).connect().expect("a handshake"));
            run_stock(&mut ours, &mut stock, || 50).expect("content");
            assert_eq!(ours.establish().0.peer, Some(ca.id("db")));
        }
    }
}

/// Runs a client with `web` that expects `expected` against a server with `db`, and returns why each failed.
fn failures(ca: &Ca, web: &Svid, db: &Svid, expected: &[SpiffeId], params: &TlsParams) -> [Option<Failure>; 2] {
    let bundle = ca.bundle();
    let client =
        worker_with(web, &bundle, params).dialer(&"db.internal".into(), &Arc::from(expected)).connect().expect("a handshake");
    let server = worker_with(db, &bundle, params).accept().expect("a handshake");
    let (mut client, mut server) = (Side::new(client), Side::new(server));
    run(&mut client, &mut server, || usize::MAX);
    [client.failure, server.failure]
}

#[test]
fn a_bad_caller_is_refused_by_the_server_with_its_reason() {
    let ca = Ca::new("t.consul");
    let stranger = Ca::new("t.consul");
    let leaf = ca.leaf("web");
    let hour = Duration::from_secs(3_600);
    let with = |change: &dyn Fn(&mut Leaf)| {
        let mut leaf = leaf.clone();
        change(&mut leaf);
        ca.issue(&leaf)
    };
    let cases: [(&str, Svid, FailureKind, &str); 9] = [
        ("stranger", stranger.svid("web"), FailureKind::Certificate, "none of our roots"),
        (
            "expired",
            with(&|leaf| (leaf.not_before, leaf.not_after) = (now() - hour, now() - hour / 2)),
            FailureKind::Certificate,
            "expired",
        ),
        ("early", with(&|leaf| leaf.not_before = now() + hour), FailureKind::Certificate, "not valid yet"),
        ("CA", with(&|leaf| leaf.is_ca = true), FailureKind::Certificate, "not trusted"),
        ("usage", with(&|leaf| leaf.usages = vec![ExtendedKeyUsagePurpose::ServerAuth]), FailureKind::Certificate, "usage"),
        (
            "domain",
            with(&|leaf| leaf.uris = vec!["spiffe://other.consul/ns/default/dc/dc1/svc/web".into()]),
            FailureKind::Identity,
            "other trust domain",
        ),
        (
            "two",
            with(&|leaf| leaf.uris.push("spiffe://t.consul/ns/default/dc/dc1/svc/db".into())),
            FailureKind::Identity,
            "2 URI",
        ),
        (
            "gateway",
            with(&|leaf| leaf.uris = vec!["spiffe://t.consul/gateway/mesh/dc/dc1".into()]),
            FailureKind::Identity,
            "names no service",
        ),
        ("not spiffe", with(&|leaf| leaf.uris = vec!["https://t.consul/web".into()]), FailureKind::Identity, "spiffe://"),
    ];
    for (name, web, kind, text) in cases {
        for params in [&TLS12, &TLS13] {
            let [client, server] = failures(&ca, &web, &ca.svid("db"), &[ca.id("db")], params);
            let server = server.unwrap_or_else(|| panic!("{name} was let in"));
            assert_eq!(server.kind, kind, "{name}: {server}");
            assert!(server.detail.contains(text), "{name}: {server}");
            if params == &TLS12 {
                let client = client.unwrap_or_else(|| panic!("{name}: the client was not told"));
                assert!(matches!(client.kind, FailureKind::Alert(_)), "{name}: {client}");
            }
        }
    }
}

#[test]
fn a_refused_caller_of_tls13_learns_it_from_the_record_layer() {
    // Its own handshake is over before the server has seen its certificate.
    let ca = Ca::new("t.consul");
    let client = worker(&ca, &Ca::new("t.consul").svid("web"))
        .dialer(&"db".into(), &Arc::from([ca.id("db")]))
        .connect()
        .expect("a handshake");
    let (mut client, mut server) = (Side::new(client), Side::new(worker(&ca, &ca.svid("db")).accept().expect("a handshake")));
    run(&mut client, &mut server, || usize::MAX);
    assert_eq!(server.failure.expect("refused").kind, FailureKind::Certificate);
    let (mut established, mut wire) = client.establish();
    assert_eq!(established.session.open(&mut wire), Ok(Open::Alert { code: 48 }), "unknown_ca");
}

#[test]
fn a_wrong_answerer_is_refused_before_our_certificate_is_sent() {
    let ca = Ca::new("t.consul");
    let (web, wrong) = (ca.svid("web"), ca.svid("wrong"));
    for params in [&TLS12, &TLS13] {
        let [client, server] = failures(&ca, &web, &wrong, &[ca.id("db"), ca.id("db2")], params);
        let client = client.expect("refused");
        assert_eq!(client.kind, FailureKind::Identity);
        for part in [ca.id("wrong"), ca.id("db"), ca.id("db2")] {
            assert!(client.detail.contains(part.as_str()), "{client} lacks {part}");
        }
        let server = server.expect("told by an alert");
        assert_eq!(server.kind, FailureKind::Alert(alert::CERTIFICATE_UNKNOWN), "{server}");

        // What the client sends after the server's flight is an alert and nothing of the size of a certificate.
        let client = worker_with(&web, &ca.bundle(), params)
            .dialer(&"db".into(), &Arc::from([ca.id("db")]))
            .connect()
            .expect("a handshake");
        let server = worker_with(&wrong, &ca.bundle(), params).accept().expect("a handshake");
        let (mut client, mut server) = (Side::new(client), Side::new(server));
        client.step(&mut server.incoming);
        server.step(&mut client.incoming);
        let mut last = Vec::new();
        client.step(&mut last);
        assert!(client.failure.is_some() && (1..64).contains(&last.len()), "{} bytes", last.len());
    }
    let [client, _] = failures(&ca, &web, &wrong, &[], &TLS13);
    assert!(client.expect("nobody is expected").detail.contains("nobody"));
}

#[test]
fn a_client_without_certificate_is_refused() {
    for tls13 in [false, true] {
        let ca = Ca::new("t.consul");
        let mut ours = Side::new(worker(&ca, &ca.svid("db")).accept().expect("a handshake"));
        let mut stock = Connection::Client(stock_client(&ca, None, "db", suite(tls13)));
        let told = run_stock(&mut ours, &mut stock, || usize::MAX);
        let failure = ours.failure.expect("refused");
        assert_eq!(failure.kind, FailureKind::Certificate, "{failure}");
        assert!(matches!(told, Err(rustls::Error::AlertReceived(_))), "{told:?}");
    }
}

#[test]
fn what_is_not_tls_is_refused_after_five_bytes() {
    for (bytes, text) in [
        (&b"GET / HTTP/1.1\r\n"[..], "plain HTTP"),
        (b"SSH-2.0-OpenSSH", "SSH"),
        (b"PROXY TCP4 ", "PROXY"),
        (b"\0\0\0\0\0", "not TLS"),
        (b"\x16\x03\x01\xff\xff", "not TLS"),
        (b"\x80\x2e\x01\x03\x01", "not TLS"),
    ] {
        let (_, mut server) = sides(&TlsParams::default(), 1_024);
        let mut wire = Vec::new();
        server.incoming.extend_from_slice(&bytes[..4]);
        server.step(&mut wire);
        assert!(server.failure.is_none() && wire.is_empty());
        server.incoming.extend_from_slice(&bytes[4..5]);
        server.step(&mut wire);
        let failure = server.failure.as_ref().expect("refused");
        assert_eq!(failure.kind, FailureKind::Protocol);
        assert!(failure.detail.contains(text), "{failure}");
        assert!(matches!(server.handshake.step(&mut [], &mut [0; 64]).progress, Progress::Failed(_)), "it came back");
    }
}

#[test]
fn versions_without_an_overlap_end_in_an_alert() {
    let ca = Ca::new("t.consul");
    let (web, db) = (ca.svid("web"), ca.svid("db"));
    let client =
        worker_with(&web, &ca.bundle(), &TLS12).dialer(&"db".into(), &Arc::from([ca.id("db")])).connect().expect("a handshake");
    let server = worker_with(&db, &ca.bundle(), &TLS13).accept().expect("a handshake");
    let (mut client, mut server) = (Side::new(client), Side::new(server));
    run(&mut client, &mut server, || usize::MAX);
    let (client, server) = (client.failure.expect("refused"), server.failure.expect("refused"));
    assert_eq!(server.kind, FailureKind::Protocol, "{server}");
    assert_eq!(client.kind, FailureKind::Alert(alert::PROTOCOL_VERSION), "{client}");
    assert!(client.detail.contains("protocol_version"), "{client}");
}

#[test]
fn a_name_that_is_no_dns_name_connects_without_sni() {
    let ca = Ca::new("t.consul");
    for (name, sent) in [("db.default.dc1.internal.t.consul", true), ("not a name!", false), ("", false), ("10.0.0.1", false)] {
        let mut client = Side::new(
            worker(&ca, &ca.svid("web")).dialer(&name.into(), &Arc::from([ca.id("db")])).connect().expect("a handshake"),
        );
        let mut hello = Vec::new();
        client.step(&mut hello);
        let found = !name.is_empty() && hello.windows(name.len()).any(|window| window == name.as_bytes());
        assert_eq!(found, sent, "{name:?}");
        let mut server = Side::new(worker(&ca, &ca.svid("db")).accept().expect("a handshake"));
        server.incoming = hello;
        server.step(&mut client.incoming);
        run(&mut client, &mut server, || usize::MAX);
        let mut last = Vec::new();
        client.step(&mut last);
        server.incoming.extend(last);
        server.step(&mut Vec::new());
        assert!(client.done && server.done, "{name:?}: {:?} {:?}", client.failure, server.failure);
    }
}

#[test]
fn nothing_is_resumed() {
    for tls13 in [false, true] {
        let ca = Ca::new("t.consul");
        let config = Arc::new(stock_client_config(&ca, Some(&ca.svid("web")), "db", suite(tls13)));
        let tls = worker(&ca, &ca.svid("db"));
        for _ in 0..3 {
            let mut ours = Side::new(tls.accept().expect("a handshake"));
            let mut stock = connect_stock(Arc::clone(&config)).into();
            run_stock(&mut ours, &mut stock, || usize::MAX).expect("content");
            assert_eq!(stock.handshake_kind(), Some(HandshakeKind::Full));
            assert!(!ours.establish().0.resumed);
        }
    }
}

#[test]
fn a_peer_that_closes_or_floods_within_the_handshake_fails() {
    let (_, mut server) = sides(&TlsParams::default(), 1_024);
    server.incoming.extend_from_slice(&[21, 3, 3, 0, 2, 2, 40]);
    server.step(&mut Vec::new());
    assert_eq!(server.failure.expect("over").kind, FailureKind::Alert(alert::HANDSHAKE_FAILURE));

    // A client hello of 64 KiB, one byte a record.
    let (_, mut server) = sides(&TlsParams::default(), 1_024);
    for byte in [1, 0, 0xff, 0xf0].into_iter().chain(std::iter::repeat_n(0, 1_000)) {
        server.incoming.extend_from_slice(&[22, 3, 1, 0, 1, byte]);
    }
    server.step(&mut Vec::new());
    assert_eq!(server.failure.expect("bounded").kind, FailureKind::Protocol);
}

#[test]
fn establish_needs_a_complete_handshake() {
    let (client, _) = sides(&TlsParams::default(), 1_024);
    assert!(client.handshake.establish().is_err());
}

#[test]
fn stock_peers_of_both_versions_are_content() {
    for tls13 in [false, true] {
        let ca = Ca::rsa("t.consul");
        let mut ours = Side::new(worker(&ca, &ca.svid("db")).accept().expect("a handshake"));
        let mut stock = Connection::Client(stock_client(&ca, Some(&ca.svid("web")), "db", suite(tls13)));
        run_stock(&mut ours, &mut stock, || 1).expect("content");
        let (mut established, _) = ours.establish();
        assert!(give(&mut stock, &seal(&mut established.session, b"x")).is_ok());
    }
}
