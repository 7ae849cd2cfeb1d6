//! An app that speaks TLS itself behind a gateway that ends the mesh's: bytes are opened for one leg and sealed for the other, in
//! every mix of versions and suites. The app is a third worker that asks for a certificate.

use super::routing::{GATEWAY, cluster, settings};
use super::*;
use crate::mesh::router::{Match, Router, RouterSettings, Way};
use crate::tls::fixtures::key_pem;
use crate::tls::{OutsideSettings, OutsideTls, Shown, Suites};

pub(super) const TLS13: TlsParams = TlsParams { tls12: false, ..TlsParams::DEFAULT };

pub(super) fn tls12(suite: &str) -> TlsParams {
    TlsParams { tls13: false, suites: Suites::named([suite]), ..TlsParams::DEFAULT }
}

/// Records of each are framed differently.
pub(super) fn frames() -> [TlsParams; 3] {
    [TLS13, tls12("ECDHE-ECDSA-AES128-GCM-SHA256"), tls12("ECDHE-ECDSA-CHACHA20-POLY1305")]
}

impl Mesh {
    /// The server is a gateway in front of an app that speaks TLS at [`GATEWAY`]; `mesh` and `app` say how each leg is spoken.
    fn before_tls(seed: u64, faults: Faults, mesh: &TlsParams, app: &TlsParams) -> Self {
        let mut before = Self::new(seed, faults);
        before.gateway = Some(Side::new(&before.network));
        let warehouse = before.identity_speaking("warehouse", &TlsParams::default());
        let service = before.public_service(GATEWAY, DefaultPolicy::Allow, warehouse);
        let gateway = before.gateway.as_mut().expect("just put there");
        gateway.publisher.publish(Snapshot { services: vec![Arc::new(service)], ..Snapshot::default() });
        before.publish_gateway(mesh, before.shown(app), GATEWAY, DefaultPolicy::Allow);
        before.turns(400);
        before
    }

    /// What is shown to the app and asked of it.
    pub(super) fn shown(&self, params: &TlsParams) -> OutsideSettings {
        let svid = self.ca.svid("warehouse");
        OutsideSettings {
            roots: vec![self.ca.certificate().clone()],
            roots_from: "<inline>".into(),
            certificate: Some(Shown { chain: svid.chain.clone(), key_pem: key_pem(&svid.key).into(), from: "<inline>".into() }),
            sni: "warehouse.example.com".into(),
            names: Vec::new(),
            protocols: Vec::new(),
            params: params.clone(),
        }
    }

    fn publish_gateway(&mut self, mesh: &TlsParams, outside: OutsideSettings, app: SocketAddr, policy: DefaultPolicy) {
        let identity = self.identity_speaking("warehouse", mesh);
        let service = Arc::new(self.public_service(PUBLIC, policy, identity));
        let mut app = Upstream::clone(&cluster("warehouse", &[app]));
        app.outside = Some(Arc::new(OutsideTls::new(outside, 1).expect("good settings")));
        let way = Way::Terminate { service, app: Some(Arc::new(app)) };
        let settings = RouterSettings { bind: Bind::Tcp(PUBLIC), ..settings(vec![("warehouse", Match::default(), way)]) };
        let router = Router::new(settings).expect("a good router");
        self.server.publisher.publish(Snapshot { routers: vec![Arc::new(router)], ..Snapshot::default() });
    }
}

#[test]
fn every_mix_of_versions_and_suites_carries_everything() {
    for (seed, mesh) in (0..).zip(frames()) {
        for (more, app) in (0..).zip(frames()) {
            for seed in [seed * 10 + more, seed * 10 + more + 100] {
                let both = Mesh::before_tls(seed, Faults::NONE, &mesh, &app);
                let (cleanly, client, server) = converse_in(both, seed);
                assert_eq!((cleanly, server.len()), (client.len(), client.len()), "{mesh:?}, {app:?}, seed {seed}");
                for record in client.iter().chain(&server) {
                    assert_eq!(record.reason, CloseReason::Complete, "{mesh:?}, {app:?}, seed {seed}: {record:?}");
                }
            }
        }
    }
}

#[test]
fn with_faults_nothing_is_lost_in_silence_between_two_tls_legs() {
    let frames = frames();
    let (mut cleanly, mut all) = (0, 0);
    for seed in seeds() {
        let (mesh, app) = (&frames[seed as usize % 3], &frames[seed as usize / 3 % 3]);
        let told = std::panic::catch_unwind(|| converse_in(Mesh::before_tls(seed, FAULTS, mesh, app), seed));
        let Ok((clean, client, _)) = told else { panic!("seed {seed} broke: replay it with RINGFENCE_SEED={seed}") };
        cleanly += clean;
        all += client.len();
    }
    assert!(cleanly * 3 > all, "only {cleanly} of {all} conversations ended cleanly");
}

#[test]
fn an_app_that_nobody_vouches_for_gets_no_byte() {
    let mut mesh = Mesh::before_tls(1, Faults::NONE, &TLS13, &TLS13);
    let stranger = Ca::new("elsewhere.consul");
    let settings = OutsideSettings { roots: vec![stranger.certificate().clone()], ..mesh.shown(&TLS13) };
    mesh.publish_gateway(&TLS13, settings, GATEWAY, DefaultPolicy::Allow);
    let app = mesh.network.listen(APP);
    mesh.turns(50);
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"secret");
    mesh.turns(2_000);
    assert!(client.read(100).is_err(), "the client is reset");
    assert!(mesh.network.accept(app).is_none(), "the app behind was dialed");
    drop(client);
    let (_, server) = mesh.finish();
    assert_eq!(server[0].reason, CloseReason::AppUnreachable);
    let detail = server[0].detail.as_deref().unwrap_or_default();
    assert!(detail.starts_with("TLS with the app: ") && detail.contains("UnknownIssuer"), "{detail}");
}

#[test]
fn an_app_that_never_answers_in_tls_takes_no_place_of_others_and_is_told() {
    for policy in [DefaultPolicy::Allow, DefaultPolicy::Deny] {
        let mut mesh = Mesh::before_tls(1, Faults::NONE, &TLS13, &TLS13);
        let shown = mesh.shown(&TLS13);
        mesh.publish_gateway(&TLS13, shown.clone(), APP, DefaultPolicy::Allow);
        let app = mesh.network.listen(APP);
        mesh.turns(50);
        let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
        client.write(b"secret");
        mesh.turns(500);
        let silent = mesh.network.accept(app).expect("the app was dialed");
        assert!(matches!(silent.read(5), Ok(Some(hello)) if hello.starts_with(&[22, 3])), "a ClientHello and nothing else");
        let worker = mesh.server.worker.as_ref().expect("it runs");
        assert_eq!(worker.handshakes(), 0, "peers are not refused for the app's sake");
        // Either its time is over, or the caller may no more.
        mesh.publish_gateway(&TLS13, shown, APP, policy);
        mesh.turns(if policy == DefaultPolicy::Allow { 6_000 } else { 100 });
        assert!(client.read(100).is_err(), "the client is reset");
        drop((client, silent));
        let (_, server) = mesh.finish();
        let (reason, detail) = (server[0].reason, server[0].detail.as_deref().unwrap_or_default());
        match policy {
            DefaultPolicy::Deny => assert_eq!(reason, CloseReason::Revoked),
            _ => {
                assert_eq!(reason, CloseReason::AppUnreachable);
                assert!(detail.starts_with("TLS with the app: ") && detail.ends_with("does it speak TLS?"), "{detail}");
            }
        }
        assert!(server[0].connect.is_none(), "there never was an app to talk to");
    }
}
