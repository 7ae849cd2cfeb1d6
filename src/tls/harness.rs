//! Both ends of a connection in memory, for the tests of this room: ours with ours, and ours with rustls as it comes.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection, SupportedCipherSuite,
    SupportedProtocolVersion,
};

use super::handshake::{Established, Failure, Handshake, Progress};
use super::provider::{TlsParams, WorkerTls, algorithms};
use super::record::{Open, Session};
use super::verify::{AnswererVerifier, Role, Trust};
use crate::identity::{Svid, TrustBundle};
use crate::tls::fixtures::{Ca, KeyKind};

/// Most turns that any exchange here may take; more means that it hangs.
const TURNS_MAX: usize = 1_000_000;

/// One of our ends with the bytes that it has not consumed.
pub(super) struct Side {
    pub(super) handshake: Handshake,
    pub(super) incoming: Vec<u8>,
    pub(super) done: bool,
    pub(super) failure: Option<Failure>,
    out_bytes: usize,
}

impl Side {
    pub(super) fn new(handshake: Handshake) -> Self {
        Self { handshake, incoming: Vec::new(), done: false, failure: None, out_bytes: 16_384 }
    }

    /// With a small output buffer.
    pub(super) fn with_out(handshake: Handshake, out_bytes: usize) -> Self {
        Self { out_bytes, ..Self::new(handshake) }
    }

    /// Steps until it wants bytes or is over; what it wrote goes to `wire`.
    pub(super) fn step(&mut self, wire: &mut Vec<u8>) {
        let mut out = vec![0; self.out_bytes];
        for _ in 0..TURNS_MAX {
            if self.done || self.failure.is_some() {
                return;
            }
            let step = self.handshake.step(&mut self.incoming, &mut out);
            assert!(step.consumed <= self.incoming.len() && step.written <= out.len());
            self.incoming.drain(..step.consumed);
            wire.extend_from_slice(&out[..step.written]);
            match step.progress {
                Progress::NeedBytes => return,
                Progress::NeedRoom => assert_eq!(step.written, out.len(), "asked for room that it had"),
                Progress::Done => self.done = true,
                Progress::Failed(failure) => self.failure = Some(failure),
            }
        }
        panic!("the handshake spins");
    }

    pub(super) fn establish(self) -> (Established, Vec<u8>) {
        assert!(self.done, "not done: {:?}", self.failure);
        (self.handshake.establish().expect("established"), self.incoming)
    }
}

/// Runs two of ours against each other, bytes delivered in pieces of at most what `piece` says, until both are over.
pub(super) fn run(client: &mut Side, server: &mut Side, mut piece: impl FnMut() -> usize) {
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    client.step(&mut to_server);
    for _ in 0..TURNS_MAX {
        if to_server.is_empty() && to_client.is_empty() {
            return;
        }
        deliver(&mut to_server, server, &mut to_client, piece());
        deliver(&mut to_client, client, &mut to_server, piece());
    }
    panic!("the handshake does not end");
}

fn deliver(wire: &mut Vec<u8>, to: &mut Side, back: &mut Vec<u8>, piece: usize) {
    let taken = piece.clamp(1, 1 << 20).min(wire.len());
    to.incoming.extend(wire.drain(..taken));
    if taken > 0 {
        to.step(back);
    }
}

pub(super) fn worker(ca: &Ca, svid: &Svid) -> WorkerTls {
    worker_with(svid, &ca.bundle(), &TlsParams::default())
}

pub(super) fn worker_with(svid: &Svid, bundle: &Arc<TrustBundle>, params: &TlsParams) -> WorkerTls {
    WorkerTls::new(svid, bundle, params).expect("a configuration")
}

/// The suites of both versions that the record layer must know, with the kind of leaf key that each needs.
pub(super) fn suites() -> Vec<(SupportedCipherSuite, KeyKind)> {
    ring::ALL_CIPHER_SUITES
        .iter()
        .map(|suite| {
            let rsa = format!("{:?}", suite.suite()).contains("_RSA_");
            (*suite, if rsa { KeyKind::Rsa } else { KeyKind::P256 })
        })
        .collect()
}

fn version_of(suite: SupportedCipherSuite) -> &'static SupportedProtocolVersion {
    if suite.tls13().is_some() { &rustls::version::TLS13 } else { &rustls::version::TLS12 }
}

fn provider(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { cipher_suites: vec![suite], ..ring::default_provider() })
}

/// A server of rustls as it comes: tickets on, webpki's own client verifier.
pub(super) fn stock_server(ca: &Ca, svid: &Svid, suite: SupportedCipherSuite) -> ServerConnection {
    ServerConnection::new(Arc::new(stock_server_config(ca, svid, suite))).expect("a server")
}

pub(super) fn stock_server_config(ca: &Ca, svid: &Svid, suite: SupportedCipherSuite) -> ServerConfig {
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate().clone()).expect("a root");
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider(suite)).build().expect("a verifier");
    ServerConfig::builder_with_provider(provider(suite))
        .with_protocol_versions(&[version_of(suite)])
        .expect("a version")
        .with_client_cert_verifier(verifier)
        .with_single_cert(svid.chain.clone(), svid.key.clone_key())
        .expect("a certificate")
}

/// A client of rustls as it comes but for the name check, which SVIDs cannot pass. Offers ALPN, which ours must ignore.
pub(super) fn stock_client(ca: &Ca, svid: Option<&Svid>, service: &str, suite: SupportedCipherSuite) -> ClientConnection {
    connect_stock(stock_client_config(ca, svid, service, suite).into())
}

pub(super) fn connect_stock(config: Arc<ClientConfig>) -> ClientConnection {
    let name = ServerName::try_from("some.other.name").expect("a name");
    ClientConnection::new(config, name).expect("a client")
}

pub(super) fn stock_client_config(ca: &Ca, svid: Option<&Svid>, service: &str, suite: SupportedCipherSuite) -> ClientConfig {
    let trust = Arc::new(Trust::new(&ca.bundle(), algorithms()).expect("a bundle"));
    let builder = ClientConfig::builder_with_provider(provider(suite))
        .with_protocol_versions(&[version_of(suite)])
        .expect("a version")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnswererVerifier { trust, expected: Arc::from([ca.id(service)]) }));
    let mut config = match svid {
        Some(svid) => builder.with_client_auth_cert(svid.chain.clone(), svid.key.clone_key()).expect("a certificate"),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"consul~tcp".to_vec()];
    config
}

/// Gives `bytes` to a stock connection, whole.
pub(super) fn give(stock: &mut Connection, mut bytes: &[u8]) -> Result<(), rustls::Error> {
    while !bytes.is_empty() {
        let read = stock.read_tls(&mut bytes).expect("from memory");
        stock.process_new_packets()?;
        if read == 0 {
            break;
        }
    }
    Ok(())
}

/// Everything that a stock connection has to send.
pub(super) fn take(stock: &mut Connection) -> Vec<u8> {
    let mut wire = Vec::new();
    while stock.wants_write() {
        stock.write_tls(&mut wire).expect("to memory");
    }
    wire
}

/// Runs ours against rustls as it comes; the stock end's bytes arrive in pieces.
pub(super) fn run_stock(ours: &mut Side, stock: &mut Connection, mut piece: impl FnMut() -> usize) -> Result<(), rustls::Error> {
    let (mut from_us, mut to_us) = (Vec::new(), Vec::new());
    ours.step(&mut from_us);
    for _ in 0..TURNS_MAX {
        give(stock, &std::mem::take(&mut from_us))?;
        to_us.extend(take(stock));
        if to_us.is_empty() {
            return Ok(());
        }
        deliver(&mut to_us, ours, &mut from_us, piece());
    }
    panic!("the handshake does not end");
}

/// One session of ours with the stock connection at its other end, and the bytes that already wait for ours.
pub(super) struct Linked {
    pub(super) session: Session,
    pub(super) stock: Connection,
    pub(super) wire: Vec<u8>,
}

/// A finished handshake of ours in `role` with rustls as it comes.
pub(super) fn linked(role: Role, suite: SupportedCipherSuite, key: KeyKind) -> Linked {
    let ca = Ca::new("t.consul");
    let issue = |service: &str| ca.issue(&super::fixtures::Leaf { key, ..ca.leaf(service) });
    let (ours, theirs) = (issue("web"), issue("db"));
    let tls = worker(&ca, &ours);
    let (mut side, mut stock) = match role {
        Role::Client => {
            let expected: Arc<[_]> = Arc::from([ca.id("db")]);
            let handshake = tls.dialer(&"db.default.dc1.internal.t.consul".into(), &expected).connect().expect("a handshake");
            (Side::new(handshake), Connection::Server(stock_server(&ca, &theirs, suite)))
        }
        Role::Server => {
            let stock = stock_client(&ca, Some(&theirs), "web", suite);
            (Side::new(tls.accept().expect("a handshake")), Connection::Client(stock))
        }
    };
    run_stock(&mut side, &mut stock, || usize::MAX).expect("the stock end is content");
    assert!(!stock.is_handshaking());
    assert_eq!(stock.alpn_protocol(), None);
    let (established, wire) = side.establish();
    assert_eq!(established.peer, Some(ca.id("db")));
    assert_eq!(established.suite, u16::from(suite.suite()));
    assert_eq!(established.version, u16::from(version_of(suite).version));
    assert!(!established.resumed);
    Linked { session: established.session, stock, wire }
}

impl Linked {
    /// Writes with the stock end; its records wait in `wire`.
    pub(super) fn stock_write(&mut self, data: &[u8]) {
        // rustls buffers a bounded part, so it is emptied as we go.
        for part in data.chunks(32_768) {
            self.stock.writer().write_all(part).expect("buffered");
            self.wire.extend(take(&mut self.stock));
        }
        self.wire.extend(take(&mut self.stock));
    }

    /// Opens everything that waits; bytes become visible `piece` at a time. Returns the application data.
    pub(super) fn our_read(&mut self, piece: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let mut visible = 0;
        loop {
            match self.session.open(&mut self.wire[..visible]).expect("regular records") {
                Open::Incomplete { need } => {
                    assert!(need > visible, "wants {need} and has {visible}");
                    if visible == self.wire.len() {
                        return data;
                    }
                    visible = (visible + piece).min(self.wire.len());
                }
                Open::Data { record_len, payload } => {
                    data.extend_from_slice(&self.wire[payload]);
                    self.wire.drain(..record_len);
                    visible -= record_len;
                }
                Open::Control { record_len } => {
                    self.wire.drain(..record_len);
                    visible -= record_len;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Seals one record of `data`, with a key update before it when one is due.
    pub(super) fn our_records(&mut self, data: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        if self.session.wants_control() {
            let mut out = [0; super::record::CONTROL_BYTES_MAX];
            let written = self.session.seal_control(&mut out).expect("a key update");
            wire.extend_from_slice(&out[..written]);
        }
        wire.extend(seal(&mut self.session, data));
        wire
    }

    /// What the stock end reads from `wire`.
    pub(super) fn stock_read(&mut self, wire: &[u8]) -> Vec<u8> {
        let mut data = Vec::new();
        for part in wire.chunks(8_192) {
            give(&mut self.stock, part).expect("regular records");
            let mut buffer = [0; 32_768];
            while let Ok(read @ 1..) = self.stock.reader().read(&mut buffer) {
                data.extend_from_slice(&buffer[..read]);
            }
        }
        data
    }
}

/// One record of application data.
pub(super) fn seal(session: &mut Session, data: &[u8]) -> Vec<u8> {
    let start = session.header_len();
    let mut record = vec![0; start];
    record.extend_from_slice(data);
    record.resize(start + data.len() + session.trailer_len(), 0);
    session.seal(&mut record).expect("sealed");
    record
}

/// Two sessions of ours, client and server.
pub(super) fn our_pair(params: &TlsParams) -> (Session, Session) {
    let ca = Ca::new("t.consul");
    let (web, db) = (ca.svid("web"), ca.svid("db"));
    let expected: Arc<[_]> = Arc::from([ca.id("db")]);
    let bundle = ca.bundle();
    let mut client =
        Side::new(worker_with(&web, &bundle, params).dialer(&"db.internal".into(), &expected).connect().expect("a handshake"));
    let mut server = Side::new(worker_with(&db, &bundle, params).accept().expect("a handshake"));
    run(&mut client, &mut server, || usize::MAX);
    (client.establish().0.session, server.establish().0.session)
}
