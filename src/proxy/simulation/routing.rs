//! A third worker between the two or beside them, with a router: connections are told apart and reach only what they are for.

use super::*;
use crate::mesh::router::{Match, Original, Route, Router, RouterSettings, Way};

pub(super) const GATEWAY: SocketAddr = address(8_443);
const WAREHOUSE: &str = "warehouse.default.dc1.internal.mesh.consul";

pub(super) fn settings(routes: Vec<(&str, Match, Way)>) -> RouterSettings {
    RouterSettings {
        name: "front".into(),
        service: "gateway".into(),
        proxy_id: "gateway".into(),
        bind: Bind::Tcp(GATEWAY),
        transparent: false,
        permissive: false,
        inspect_timeout: Duration::from_secs(10),
        silent_is_raw: false,
        routes: routes.into_iter().map(|(name, matches, way)| Arc::new(Route { name: name.into(), matches, way })).collect(),
        fallback: None,
    }
}

pub(super) fn cluster(name: &str, endpoints: &[SocketAddr]) -> Arc<Upstream> {
    let endpoints = endpoints.iter().map(|&address| Endpoint { address, weight: 1, healthy: true }).collect();
    let target = Target { id: name.into(), sni: "".into(), expected: [].into(), endpoints, access: None };
    Arc::new(Upstream::new(name, Bind::Tcp(GATEWAY), vec![Arc::new(target)]))
}

fn asks_for(name: &str) -> Match {
    Match { server_names: vec![name.parse().expect("a server name")], ..Match::default() }
}

fn speaks(tls: bool) -> Match {
    Match { tls: Some(tls), ..Match::default() }
}

/// What a mesh gateway has: each service's name leads to its sidecars.
fn mesh_gateway(name: &str, endpoints: &[SocketAddr]) -> RouterSettings {
    settings(vec![(name, asks_for(name), Way::Forward(cluster(name, endpoints)))])
}

impl Mesh {
    /// A mesh whose client dials through a router.
    fn routed(seed: u64, faults: Faults, settings: RouterSettings) -> Self {
        let mut mesh = Self::new(seed, faults);
        mesh.gateway = Some(Side::new(&mesh.network));
        mesh.publish_router(Some(settings));
        mesh.publish_client(&[GATEWAY], true);
        mesh.turns(400);
        mesh
    }

    fn publish_router(&mut self, settings: Option<RouterSettings>) {
        let routers = settings.into_iter().map(|settings| Arc::new(Router::new(settings).expect("a good router"))).collect();
        let gateway = self.gateway.as_mut().expect("a gateway");
        gateway.publisher.publish(Snapshot { routers, ..Snapshot::default() });
    }

    /// The warehouse as a service whose TLS the router ends, with the app at [`APP`].
    fn warehouse(&self, policy: DefaultPolicy) -> Arc<Service> {
        Arc::new(Service { proxy_id: "gateway".into(), ..self.public_service(GATEWAY, policy, self.identity("warehouse")) })
    }

    fn finish_gateway(self) -> Vec<ConnectionRecord> {
        self.finish_all().2
    }
}

#[test]
fn through_a_mesh_gateway_everything_arrives_and_ends_cleanly() {
    for seed in 0..16 {
        let mesh = Mesh::routed(seed, Faults::NONE, mesh_gateway(WAREHOUSE, &[PUBLIC]));
        let (cleanly, client, server) = converse_in(mesh, seed);
        assert_eq!((cleanly, server.len()), (client.len(), client.len()), "seed {seed}");
        for record in client.iter().chain(&server) {
            assert_eq!(record.reason, CloseReason::Complete, "seed {seed}: {record:?}");
        }
    }
}

#[test]
fn through_a_mesh_gateway_with_faults_nothing_is_lost_in_silence() {
    let (mut cleanly, mut all) = (0, 0);
    for seed in seeds() {
        let told = std::panic::catch_unwind(|| converse_in(Mesh::routed(seed, FAULTS, mesh_gateway(WAREHOUSE, &[PUBLIC])), seed));
        let Ok((clean, client, _)) = told else { panic!("seed {seed} broke: replay it with RINGFENCE_SEED={seed}") };
        cleanly += clean;
        all += client.len();
    }
    assert!(cleanly * 3 > all, "only {cleanly} of {all} conversations ended cleanly");
}

/// Without TLS of ours at any end: what passes a raw route, under every fault.
#[test]
fn raw_relays_lose_nothing_in_silence() {
    for seed in seeds() {
        let told = std::panic::catch_unwind(|| {
            let faults = if seed < 16 { Faults::NONE } else { FAULTS };
            let app = settings(vec![("app", speaks(false), Way::Forward(cluster("app", &[APP])))]);
            let mut mesh = Mesh::routed(seed, faults, app);
            let listener = mesh.network.listen(APP);
            let mut random = Random::new(seed);
            let (said, answered) = (length(&mut random), length(&mut random));
            let mut client = Talker::new(mesh.network.connect(GATEWAY).expect("listens"), payload(&mut random, 1 + said));
            // No ClientHello, whatever follows.
            client.say[0] = b'G';
            let mut server: Option<Talker> = None;
            for _ in 0..TURNS_MAX {
                mesh.turn();
                client.step(&mut random);
                if let Some(end) = mesh.network.accept(listener) {
                    server = Some(Talker::new(end, payload(&mut random, answered)));
                }
                server.iter_mut().for_each(|server| server.step(&mut random));
                if client.end.is_none() && server.iter().all(|server| server.end.is_none()) {
                    break;
                }
            }
            assert!(client.end.is_none(), "the client was left hanging");
            if let Some(server) = &server {
                check(server, &client, "client to app");
                check(&client, server, "app to client");
            }
            let cleanly = |talker: &Talker| talker.outcome == Some(Outcome::CleanEnd);
            let clean = cleanly(&client) && server.as_ref().is_some_and(cleanly);
            assert!(clean || seed >= 16, "without faults it ends cleanly");
            drop((client, server));
            mesh.turns(200);
            let network = mesh.network.clone();
            let records = mesh.finish_gateway();
            network.close_listener(listener);
            assert_eq!(network.sockets(), 0, "sockets were left open");
            assert_eq!(records.len(), 1, "told of once");
            if clean {
                assert_eq!(records[0].reason, CloseReason::Complete);
                assert_eq!((records[0].bytes_to_mesh, records[0].bytes_from_mesh), (1 + said as u64, answered as u64));
            }
        });
        assert!(told.is_ok(), "seed {seed} broke: replay it with RINGFENCE_SEED={seed}");
    }
}

#[test]
fn a_name_that_no_route_has_is_reset_and_told() {
    let mut mesh = Mesh::routed(1, Faults::NONE, mesh_gateway("other.default.dc1.internal.mesh.consul", &[PUBLIC]));
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"SELECT 1");
    mesh.turns(2_000);
    assert!(client.read(100).is_err(), "a reset");
    drop(client);
    let (_, server, gateway) = mesh.finish_all();
    assert!(server.is_empty(), "nobody was dialed");
    assert!(!gateway.is_empty());
    for record in gateway {
        assert_eq!((record.reason, record.server_name.as_deref()), (CloseReason::NoRoute, Some(WAREHOUSE)));
        assert!(record.detail.expect("a reason").contains(WAREHOUSE));
    }
}

#[test]
fn a_reset_passes_a_raw_relay_as_a_reset() {
    for from_client in [true, false] {
        let app = settings(vec![("app", Match::default(), Way::Forward(cluster("app", &[APP])))]);
        let mut mesh = Mesh::routed(2, Faults::NONE, app);
        let listener = mesh.network.listen(APP);
        let client = mesh.network.connect(GATEWAY).expect("listens");
        mesh.turns(50);
        let server = mesh.network.accept(listener).expect("the app was dialed before a byte came");
        client.write(b"hello");
        mesh.turns(50);
        assert_eq!(server.read(100), Ok(Some(b"hello".to_vec())));
        let (reset, other) = if from_client { (client, server) } else { (server, client) };
        reset.reset();
        mesh.turns(50);
        assert!(other.read(100).is_err(), "a reset became something else");
        drop(other);
        let reason = mesh.finish_gateway()[0].reason;
        assert_eq!(reason, if from_client { CloseReason::LocalReset } else { CloseReason::PeerReset });
    }
}

#[test]
fn first_bytes_are_waited_for_within_a_bound_and_then_by_the_rules() {
    let routes = || settings(vec![("app", speaks(false), Way::Forward(cluster("app", &[APP])))]);
    let mut mesh = Mesh::routed(3, Faults::NONE, routes());
    let listener = mesh.network.listen(APP);
    let [silent, slow, gone] = [(); 3].map(|()| mesh.network.connect(GATEWAY).expect("listens"));
    slow.write(&[22, 3, 1, 0]);
    drop(gone);
    mesh.turns(11_000);
    assert!(silent.read(1).is_err() && slow.read(1).is_err(), "both are reset");
    drop((silent, slow));
    // Where the server may speak first, silence is an answer.
    mesh.publish_router(Some(RouterSettings { silent_is_raw: true, ..routes() }));
    mesh.turns(50);
    let (silent, slow) = (mesh.network.connect(GATEWAY).expect("listens"), mesh.network.connect(GATEWAY).expect("listens"));
    slow.write(&[22, 3, 1, 0]);
    mesh.turns(11_000);
    let server = mesh.network.accept(listener).expect("the app was dialed");
    server.write(b"220 ready");
    mesh.turns(50);
    assert_eq!(silent.read(100), Ok(Some(b"220 ready".to_vec())));
    assert!(slow.read(1).is_err() && mesh.network.accept(listener).is_none(), "half a ClientHello is no silence");
    drop((silent, slow, server));
    let mut reasons: Vec<_> = mesh.finish_gateway().iter().map(|record| record.reason.as_str()).collect();
    reasons.sort_unstable();
    let timeout = "handshake_timeout";
    assert_eq!(reasons, ["complete", timeout, timeout, timeout, "probe"]);
}

#[test]
fn a_terminating_route_decides_before_the_app_is_touched() {
    for policy in [DefaultPolicy::Allow, DefaultPolicy::Deny] {
        for app in [None, Some(cluster("external", &[address(9), APP]))] {
            let mut mesh = Mesh::routed(4, Faults::NONE, mesh_gateway(WAREHOUSE, &[PUBLIC]));
            let way = Way::Terminate { service: mesh.warehouse(policy), app };
            mesh.publish_router(Some(settings(vec![("warehouse", asks_for(WAREHOUSE), way)])));
            mesh.turns(50);
            let listener = mesh.network.listen(APP);
            let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
            client.write(b"hello");
            mesh.turns(2_000);
            let server = mesh.network.accept(listener);
            let (_, _, gateway) = if policy == DefaultPolicy::Allow {
                let server = server.expect("the app was dialed");
                assert_eq!(server.read(100), Ok(Some(b"hello".to_vec())));
                // An intention change reaches those who are through already.
                let way = Way::Terminate { service: mesh.warehouse(DefaultPolicy::Deny), app: None };
                mesh.publish_router(Some(settings(vec![("warehouse", asks_for(WAREHOUSE), way)])));
                mesh.turns(50);
                assert!(server.read(100).is_err() && client.read(100).is_err(), "both ends see a reset");
                drop((client, server));
                mesh.finish_all()
            } else {
                assert!(server.is_none(), "the app was dialed for a denied peer");
                drop(client);
                mesh.finish_all()
            };
            let expected = if policy == DefaultPolicy::Allow { CloseReason::Revoked } else { CloseReason::Denied };
            let record = &gateway[0];
            assert_eq!((record.reason, &*record.service, record.direction.as_str()), (expected, "warehouse", "inbound"));
        }
    }
}

#[test]
fn permissive_mode_takes_both_and_tells_them_apart() {
    let mut mesh = Mesh::routed(5, Faults::NONE, mesh_gateway(WAREHOUSE, &[PUBLIC]));
    let way = Way::Terminate { service: mesh.warehouse(DefaultPolicy::Allow), app: None };
    let routes = vec![("tls", speaks(true), way), ("raw", speaks(false), Way::Forward(cluster("local_app", &[APP])))];
    mesh.publish_router(Some(RouterSettings { permissive: true, ..settings(routes) }));
    mesh.turns(50);
    let listener = mesh.network.listen(APP);
    for through in [LISTEN, GATEWAY] {
        let client = mesh.network.connect(through).expect("listens");
        client.write(b"hello");
        mesh.turns(500);
        let server = mesh.network.accept(listener).expect("the app was dialed");
        assert_eq!(server.read(100), Ok(Some(b"hello".to_vec())), "by {through}");
    }
    mesh.turns(50);
    let gateway = mesh.finish_gateway();
    assert!(gateway[0].source.is_some() && gateway[1].source.is_none(), "{gateway:?}");
    assert_eq!(gateway[1].upstream.as_deref(), Some("raw"));
}

#[test]
fn redirected_connections_go_by_where_they_wanted_to_go() {
    let virtual_address = SocketAddr::from(([240, 0, 0, 1], 5_432));
    let elsewhere = SocketAddr::from(([192, 0, 2, 7], 80));
    let mut mesh = Mesh::new(6, Faults::NONE);
    mesh.gateway = Some(Side::new(&mesh.network));
    let upstream = Upstream { targets: vec![warehouse_target(&mesh)], ..Upstream::clone(&cluster("warehouse", &[])) };
    let service =
        Arc::new(Service { public: None, name: "airflow-worker".into(), ..clone(&mesh.warehouse(DefaultPolicy::Deny)) });
    let way = Way::Originate { service, upstream: Arc::new(upstream) };
    let network = crate::mesh::router::Network::new(virtual_address.ip(), 32).expect("a network");
    let matches = Match { networks: vec![network], ..Match::default() };
    let original =
        Original { connect_timeout: Duration::from_secs(5), max_connections: Some(1), idle_timeout: None, keepalive: None };
    let rest = Route { name: "original-destination".into(), matches: Match::default(), way: Way::Original(original) };
    mesh.publish_router(Some(RouterSettings {
        transparent: true,
        fallback: Some(Arc::new(rest)),
        ..settings(vec![("warehouse", matches, way)])
    }));
    mesh.turns(50);
    let (app, other) = (mesh.network.listen(APP), mesh.network.listen(elsewhere));
    mesh.network.redirect(virtual_address, GATEWAY);
    mesh.network.redirect(elsewhere, GATEWAY);
    let meshed = mesh.network.connect(virtual_address).expect("redirected");
    let passed = mesh.network.connect(elsewhere).expect("redirected");
    meshed.write(b"to the mesh");
    passed.write(b"past it");
    mesh.turns(500);
    let (of_mesh, of_other) = (mesh.network.accept(app).expect("dialed"), mesh.network.accept(other).expect("dialed"));
    assert_eq!(of_mesh.read(100), Ok(Some(b"to the mesh".to_vec())));
    assert_eq!(of_other.read(100), Ok(Some(b"past it".to_vec())));
    let second = mesh.network.connect(elsewhere).expect("redirected");
    mesh.turns(50);
    assert!(second.read(1).is_err(), "one at a time");
    drop((meshed, passed, of_mesh, of_other, second));
    mesh.turns(500);
    let direct = mesh.network.connect(GATEWAY).expect("listens");
    mesh.turns(50);
    assert!(direct.read(1).is_err(), "a passthrough to itself would never end");
    drop(direct);
    let (_, server, gateway) = mesh.finish_all();
    assert!(server[0].source.is_some(), "mutual TLS on the way");
    let told: Vec<_> =
        gateway.iter().map(|record| (record.upstream.as_deref(), record.reason.as_str(), record.original)).collect();
    let rest = Some("original-destination");
    for expected in [
        (Some("warehouse"), "complete", Some(virtual_address)),
        (rest, "complete", Some(elsewhere)),
        (rest, "limit", Some(elsewhere)),
        (rest, "no_route", None),
    ] {
        assert!(told.contains(&expected), "{expected:?} is not in {told:?}");
    }
    assert_eq!(told.len(), 4, "{told:?}");
}

fn warehouse_target(mesh: &Mesh) -> Arc<Target> {
    Arc::new(Target {
        id: "warehouse".into(),
        sni: WAREHOUSE.into(),
        expected: [mesh.ca.svid("warehouse").id.clone()].into(),
        endpoints: [Endpoint { address: PUBLIC, weight: 1, healthy: true }].into(),
        access: None,
    })
}

fn clone(service: &Service) -> Service {
    Service {
        name: Arc::clone(&service.name),
        proxy_id: Arc::clone(&service.proxy_id),
        identity: service.identity.clone(),
        intentions: Arc::clone(&service.intentions),
        public: service.public.clone(),
        upstreams: service.upstreams.clone(),
    }
}

#[test]
fn a_route_that_goes_away_leaves_its_connections_and_a_router_that_goes_drains_them() {
    let both = || {
        settings(vec![
            ("one", asks_for(WAREHOUSE), Way::Forward(cluster("one", &[PUBLIC]))),
            ("raw", speaks(false), Way::Forward(cluster("raw", &[APP]))),
        ])
    };
    let mut mesh = Mesh::routed(7, Faults::NONE, both());
    let app = mesh.network.listen(APP);
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"hello");
    mesh.turns(500);
    let server = mesh.network.accept(app).expect("the app was dialed");
    assert_eq!(server.read(100), Ok(Some(b"hello".to_vec())));
    let mut without = both();
    without.routes.remove(0);
    mesh.publish_router(Some(without));
    mesh.turns(10_000);
    client.write(b"again");
    mesh.turns(50);
    assert_eq!(server.read(100), Ok(Some(b"again".to_vec())), "longer than the drain time");
    let late = mesh.network.connect(LISTEN).expect("the sidecar listens");
    mesh.turns(500);
    assert!(late.read(1).is_err(), "nobody else takes it");
    mesh.publish_router(None);
    mesh.turns(4_000);
    client.write(b"still");
    mesh.turns(50);
    assert_eq!(server.read(100), Ok(Some(b"still".to_vec())), "within the drain time");
    mesh.turns(2_000);
    assert!(server.read(100).is_err() && client.read(100).is_err(), "and not after it");
    drop((client, server, late));
    let gateway = mesh.finish_gateway();
    assert!(gateway.iter().any(|record| record.reason == CloseReason::Drained && record.upstream.as_deref() == Some("one")));
}

#[test]
fn what_came_before_a_hand_over_is_served_after_it() {
    let app = settings(vec![("app", speaks(false), Way::Forward(cluster("app", &[APP])))]);
    let mut mesh = Mesh::routed(8, Faults::NONE, app);
    let listener = mesh.network.listen(APP);
    let client = mesh.network.connect(GATEWAY).expect("listens");
    mesh.turns(5);
    let orders = Arc::clone(&mesh.gateway.as_ref().expect("a gateway").orders);
    orders.handed_over.store(true, std::sync::atomic::Ordering::Release);
    orders.raise(Order::Drain);
    mesh.turns(50);
    client.write(b"GET / HTTP/1.1");
    mesh.turns(50);
    let server = mesh.network.accept(listener).expect("the app was dialed");
    assert_eq!(server.read(100), Ok(Some(b"GET / HTTP/1.1".to_vec())));
    drop((client, server));
    assert_eq!(mesh.finish_gateway()[0].reason, CloseReason::Complete);
}

#[test]
fn who_was_looked_at_waits_for_the_first_certificate_like_anybody() {
    let mut mesh = Mesh::routed(9, Faults::NONE, mesh_gateway(WAREHOUSE, &[PUBLIC]));
    let certified = mesh.warehouse(DefaultPolicy::Allow);
    let bare = Arc::new(Service { identity: None, ..clone(&certified) });
    let ended = |service: &Arc<Service>| {
        let way = Way::Terminate { service: Arc::clone(service), app: None };
        settings(vec![("warehouse", asks_for(WAREHOUSE), way)])
    };
    mesh.publish_router(Some(ended(&bare)));
    mesh.turns(50);
    let listener = mesh.network.listen(APP);
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"early");
    mesh.turns(500);
    assert_eq!(client.read(1), Ok(None), "held, neither answered nor refused");
    mesh.publish_router(Some(ended(&certified)));
    mesh.turns(500);
    let server = mesh.network.accept(listener).expect("the app was dialed once the certificate came");
    assert_eq!(server.read(100), Ok(Some(b"early".to_vec())));
    drop((client, server));
    // What is left of counts when a worker ends is looked at there.
    assert_eq!(mesh.finish_gateway().len(), 1);
}

#[test]
fn the_end_of_permissive_mode_drains_what_came_without_tls() {
    let mut mesh = Mesh::routed(10, Faults::NONE, mesh_gateway(WAREHOUSE, &[PUBLIC]));
    let service = mesh.warehouse(DefaultPolicy::Allow);
    let tls = || ("tls", speaks(true), Way::Terminate { service: Arc::clone(&service), app: None });
    let raw = ("raw", speaks(false), Way::Forward(cluster("local_app", &[APP])));
    mesh.publish_router(Some(RouterSettings { permissive: true, ..settings(vec![tls(), raw]) }));
    mesh.turns(50);
    let listener = mesh.network.listen(APP);
    let mut pairs = Vec::new();
    for through in [LISTEN, GATEWAY] {
        let client = mesh.network.connect(through).expect("listens");
        client.write(b"hello");
        mesh.turns(500);
        pairs.push((client, mesh.network.accept(listener).expect("the app was dialed")));
    }
    mesh.publish_router(Some(settings(vec![tls()])));
    mesh.turns(6_000);
    let (with, without) = (&pairs[0], &pairs[1]);
    assert!(with.0.write(b"again").is_some(), "who showed a certificate stays");
    assert!(without.0.read(1).is_err(), "who showed none is drained");
    drop(pairs);
    let gateway = mesh.finish_gateway();
    assert!(gateway.iter().any(|record| record.reason == CloseReason::Drained && record.upstream.as_deref() == Some("raw")));
}
