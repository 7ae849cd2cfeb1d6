//! Clients outside of the mesh that speak TLS to an ingress gateway: what they say is opened and sealed again for the mesh, in
//! every mix of versions and suites, and nobody is dialed for one before its handshake is over.

use std::io::{Read as _, Write as _};

use rustls::client::Resumption;
use rustls::{ClientConfig, ClientConnection, HandshakeKind};

use super::outside::{TLS13, frames};
use super::routing::settings;
use super::*;
use crate::mesh::router::{Match, Router, RouterSettings, Way};
use crate::tls::fixtures::key_pem;
use crate::tls::{FrontSettings, FrontTls, OutsideSettings, OutsideTls, Shown};

/// What clients ask for.
const NAME: &str = "gateway.example.com";
/// Handshakes end within so many turns.
const TURNS: usize = 500;

/// A client that speaks TLS. Plain text goes in and comes out.
pub(super) struct TlsEnd {
    end: End,
    tls: ClientConnection,
    /// Sealed, and not yet written.
    sealed: Vec<u8>,
    shut: bool,
    /// The gateway said that it was all.
    ended: bool,
}

impl TlsEnd {
    pub(super) fn new(end: End, config: &Arc<ClientConfig>) -> Self {
        let name = NAME.try_into().expect("a name");
        let tls = ClientConnection::new(Arc::clone(config), name).expect("a good configuration");
        Self { end, tls, sealed: Vec::new(), shut: false, ended: false }
    }

    /// Writes what there is; false where the stream is broken.
    fn flush(&mut self) -> bool {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.sealed).expect("a vector takes all");
        }
        match self.end.write(&self.sealed) {
            Some(written) => {
                self.sealed.drain(..written);
                true
            }
            None => false,
        }
    }
}

impl Line for TlsEnd {
    fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        // Plain text waits in rustls until the handshake is over, and then in `sealed`: one piece at a time.
        let taken = if self.sealed.is_empty() { self.tls.writer().write(bytes).expect("a piece below the limit") } else { 0 };
        self.flush().then_some(taken)
    }

    fn read(&mut self, room: usize) -> Result<Option<Vec<u8>>, i32> {
        let Some(bytes) = self.end.read(room)? else { return Ok(None) };
        let (mut plain, mut left) = (Vec::new(), bytes.as_slice());
        let mut ended = false;
        while !left.is_empty() {
            self.tls.read_tls(&mut left).map_err(|_| libc::EPROTO)?;
            // Its alert goes out, as from any client.
            let state = self.tls.process_new_packets();
            self.flush();
            ended |= state.map_err(|_| libc::EPROTO)?.peer_has_closed();
            // What waits to be read is bounded.
            let _ = self.tls.reader().read_to_end(&mut plain);
        }
        self.ended |= ended;
        match (plain.is_empty(), self.ended, bytes.is_empty()) {
            (false, _, _) => Ok(Some(plain)),
            (true, true, _) => Ok(Some(Vec::new())),
            (true, false, false) => Ok(None),
            // Nobody said that it was all.
            (true, false, true) => Err(libc::ECONNRESET),
        }
    }

    fn shutdown_write(&mut self) -> bool {
        if self.tls.is_handshaking() {
            return !self.flush();
        }
        if !self.shut {
            self.tls.send_close_notify();
            self.shut = true;
        }
        let written = self.flush();
        if self.sealed.is_empty() {
            self.end.shutdown_write();
        }
        !written || self.sealed.is_empty()
    }
}

impl Mesh {
    /// The client's sidecar is an ingress gateway: `front` says how its clients speak, `params` how it does to the mesh.
    fn behind_tls(seed: u64, faults: Faults, front: &TlsParams, params: &TlsParams) -> Self {
        let mut mesh = Self::new(seed, faults);
        mesh.publish_front(front, params);
        mesh.turns(100);
        mesh.clients_speak = Some(mesh.trusting(&mesh.ca));
        mesh
    }

    /// A new certificate each time.
    fn front(&self, params: &TlsParams) -> Arc<FrontTls> {
        let svid = self.ca.svid("gateway");
        let certificate = Shown { chain: svid.chain.clone(), key_pem: key_pem(&svid.key).into(), from: "<inline>".into() };
        let settings = FrontSettings { certificate, protocols: Vec::new(), params: params.clone() };
        Arc::new(FrontTls::new(settings, 1).expect("good settings"))
    }

    fn publish_front(&mut self, front: &TlsParams, params: &TlsParams) {
        let upstream = Upstream { front: Some(self.front(front)), ..self.upstream(&[PUBLIC], DenyReply::Close) };
        let warehouse = self.public_service(PUBLIC, DefaultPolicy::Allow, self.identity_speaking("warehouse", params));
        self.server.publisher.publish(Snapshot { services: vec![Arc::new(warehouse)], ..Snapshot::default() });
        self.publish_upstream(upstream, true);
    }

    /// What clients speak that trust `ca`.
    fn trusting(&self, ca: &Ca) -> Arc<ClientConfig> {
        let settings = OutsideSettings { roots: vec![ca.certificate().clone()], ..self.shown(&TlsParams::default()) };
        OutsideTls::new(settings, 1).expect("good settings").config()
    }
}

#[test]
fn every_mix_of_versions_and_suites_carries_everything() {
    for (seed, front) in (0..).zip(frames()) {
        for (more, params) in (0..).zip(frames()) {
            let seed = seed * 10 + more;
            let (cleanly, client, server) = converse_in(Mesh::behind_tls(seed, Faults::NONE, &front, &params), seed);
            assert_eq!((cleanly, server.len()), (client.len(), client.len()), "{front:?}, {params:?}, seed {seed}: {client:?}");
            for record in client.iter().chain(&server) {
                assert_eq!(record.reason, CloseReason::Complete, "{front:?}, {params:?}, seed {seed}: {record:?}");
            }
        }
    }
}

#[test]
fn with_faults_nothing_is_lost_in_silence_behind_a_front() {
    let frames = frames();
    let (mut cleanly, mut all) = (0, 0);
    for seed in seeds() {
        let (front, params) = (&frames[seed as usize % 3], &frames[seed as usize / 3 % 3]);
        let told = std::panic::catch_unwind(|| converse_in(Mesh::behind_tls(seed, FAULTS, front, params), seed));
        let Ok((clean, client, _)) = told else { panic!("seed {seed} broke: replay it with RINGFENCE_SEED={seed}") };
        cleanly += clean;
        all += client.len();
    }
    assert!(cleanly * 3 > all, "only {cleanly} of {all} conversations ended cleanly");
}

/// A conversation of one message each way: `say` to the app, `answer` back.
fn exchange(mesh: &mut Mesh, client: &mut TlsEnd, app: &End, say: &[u8], answer: &[u8]) {
    assert_eq!(client.write(say), Some(say.len()));
    mesh.turns(TURNS);
    assert_eq!(app.read(100), Ok(Some(say.to_vec())));
    app.write(answer);
    mesh.turns(TURNS);
    assert_eq!(client.read(1_000), Ok(Some(answer.to_vec())));
}

/// One client whose handshake is over, and the app it talks to.
fn open(mesh: &mut Mesh, app: i32) -> (TlsEnd, End) {
    let config = Arc::clone(mesh.clients_speak.as_ref().expect("clients speak TLS"));
    let mut client = TlsEnd::new(mesh.network.connect(LISTEN).expect("the gateway listens"), &config);
    client.write(b"hello");
    for _ in 0..TURNS {
        mesh.turn();
        let _ = client.read(10_000);
        client.flush();
    }
    let server = mesh.network.accept(app).expect("the app was dialed");
    assert_eq!(server.read(100), Ok(Some(b"hello".to_vec())));
    (client, server)
}

#[test]
fn keys_are_updated_on_both_legs_while_bytes_flow() {
    let mut mesh = Mesh::behind_tls(1, Faults::NONE, &TLS13, &TLS13);
    let app = mesh.network.listen(APP);
    let (mut client, server) = open(&mut mesh, app);
    for round in 0..3 {
        client.tls.refresh_traffic_keys().expect("TLS 1.3");
        exchange(&mut mesh, &mut client, &server, format!("to {round}").as_bytes(), format!("from {round}").as_bytes());
    }
    drop((client, server));
    let (client, _) = mesh.finish();
    assert_eq!(client[0].attempts, 1);
}

#[test]
fn another_certificate_is_shown_to_the_next_and_cuts_nobody() {
    let mut mesh = Mesh::behind_tls(1, Faults::NONE, &TLS13, &TLS13);
    let app = mesh.network.listen(APP);
    let (mut client, server) = open(&mut mesh, app);
    let shown = |client: &TlsEnd| client.tls.peer_certificates().expect("a certificate")[0].clone();
    mesh.publish_front(&TLS13, &TLS13);
    mesh.turns(50);
    exchange(&mut mesh, &mut client, &server, b"still", b"here");
    let (next, also) = open(&mut mesh, app);
    assert_ne!(shown(&client), shown(&next));
    drop((client, server, next, also));
    mesh.finish();
}

#[test]
fn a_client_that_comes_back_resumes_until_the_certificate_is_another() {
    for front in frames() {
        let mut mesh = Mesh::behind_tls(1, Faults::NONE, &front, &TLS13);
        let mut config = ClientConfig::clone(mesh.clients_speak.as_ref().expect("clients speak TLS"));
        config.resumption = Resumption::in_memory_sessions(8);
        mesh.clients_speak = Some(Arc::new(config));
        let app = mesh.network.listen(APP);
        let mut kinds = Vec::new();
        for round in 0..4 {
            if round == 2 {
                mesh.publish_front(&front, &TLS13);
                mesh.turns(50);
            }
            let (mut client, server) = open(&mut mesh, app);
            exchange(&mut mesh, &mut client, &server, b"again", b"and again");
            kinds.push(client.tls.handshake_kind());
        }
        let (full, resumed) = (Some(HandshakeKind::Full), Some(HandshakeKind::Resumed));
        assert_eq!(kinds, [full, resumed, full, resumed], "{front:?}");
        mesh.finish();
    }
}

#[test]
fn a_client_is_met_with_the_tls_of_the_route_that_its_server_name_leads_to() {
    let mut mesh = Mesh::behind_tls(1, Faults::NONE, &TLS13, &TLS13);
    let front = mesh.front(&TLS13);
    let upstream = Upstream { front: Some(front), ..mesh.upstream(&[PUBLIC], DenyReply::Close) };
    let service = Arc::new(mesh.caller(Vec::new(), true));
    let way = Way::Originate { service, upstream: Arc::new(upstream) };
    let asked = Match { server_names: vec![NAME.parse().expect("a server name")], ..Match::default() };
    let settings = RouterSettings { bind: Bind::Tcp(LISTEN), ..settings(vec![("warehouse", asked, way)]) };
    let router = Router::new(settings).expect("a good router");
    mesh.client.publisher.publish(Snapshot { routers: vec![Arc::new(router)], ..Snapshot::default() });
    mesh.turns(50);
    let (cleanly, client, server) = converse_in(mesh, 1);
    assert_eq!((cleanly, server.len()), (client.len(), client.len()), "{client:?}");
    assert!(client.iter().all(|record| record.server_name.as_deref() == Some(NAME)), "{client:?}");
}

#[test]
fn what_a_client_said_waits_while_another_endpoint_is_tried() {
    let mut mesh = Mesh::behind_tls(1, Faults::NONE, &TLS13, &TLS13);
    let app = mesh.network.listen(APP);
    let endpoints = [address(21_999), PUBLIC];
    let upstream = Upstream { front: Some(mesh.front(&TLS13)), ..mesh.upstream(&endpoints, DenyReply::Close) };
    mesh.publish_upstream(upstream, true);
    mesh.turns(50);
    for _ in 0..4 {
        let (mut client, server) = open(&mut mesh, app);
        exchange(&mut mesh, &mut client, &server, b"there", b"here");
    }
    // Nobody is there at all: the client is cut, behind its handshake.
    let nowhere = Upstream { front: Some(mesh.front(&TLS13)), ..mesh.upstream(&endpoints[..1], DenyReply::Close) };
    mesh.publish_upstream(nowhere, true);
    mesh.turns(50);
    let mut client = TlsEnd::new(mesh.network.connect(LISTEN).expect("it listens"), mesh.clients_speak.as_ref().expect("TLS"));
    client.write(b"lost");
    let cut = (0..TURNS).any(|_| {
        mesh.turn();
        client.read(10_000).is_err()
    });
    assert!(cut && !client.tls.is_handshaking());
    drop(client);
    let (records, _) = mesh.finish();
    assert!(records.iter().any(|record| record.attempts == 2), "the dead endpoint was never tried: {records:?}");
    assert_eq!(records.last().expect("the last").reason, CloseReason::ConnectFailed);
}

#[test]
fn nobody_is_dialed_for_a_client_without_a_handshake() {
    let mut mesh = Mesh::behind_tls(1, Faults::NONE, &TLS13, &TLS13);
    let app = mesh.network.listen(APP);
    let stranger = mesh.trusting(&Ca::new("elsewhere.consul"));
    let connect = |mesh: &Mesh| mesh.network.connect(LISTEN).expect("the gateway listens");
    let probe = connect(&mesh);
    probe.shutdown_write();
    let plain = connect(&mesh);
    plain.write(b"GET / HTTP/1.1\r\n\r\n");
    let mut distrustful = TlsEnd::new(connect(&mesh), &stranger);
    distrustful.write(b"secret");
    let silent = connect(&mesh);
    let worker = |mesh: &Mesh| mesh.client.worker.as_ref().expect("it runs").handshakes();
    for _ in 0..TURNS {
        mesh.turn();
        let _ = distrustful.read(10_000);
    }
    assert_eq!(worker(&mesh), 1, "the silent one");
    mesh.turns(11_000);
    assert_eq!(worker(&mesh), 0);
    assert!(silent.read(100).is_err(), "its time is over");
    assert!(mesh.network.accept(app).is_none(), "the app was dialed");
    drop((probe, plain, distrustful, silent));
    let (records, _) = mesh.finish();
    let told = |reason| records.iter().filter(|record| record.reason == reason).collect::<Vec<_>>();
    assert_eq!((told(CloseReason::Probe).len(), told(CloseReason::HandshakeTimeout).len()), (1, 1), "{records:?}");
    let failed: Vec<&str> =
        told(CloseReason::HandshakeFailed).iter().map(|record| record.detail.as_deref().unwrap_or_default()).collect();
    assert_eq!(failed.len(), 2, "{records:?}");
    assert!(failed.iter().any(|why| why.contains("are not TLS, which this listener asks for")), "{failed:?}");
    assert!(
        failed.iter().any(|why| {
            why.starts_with("TLS with the client: the peer ended the handshake with alert")
                && why.contains("it refused this listener's certificate")
        }),
        "{failed:?}"
    );
    assert!(records.iter().all(|record| record.attempts == 0), "{records:?}");
}
