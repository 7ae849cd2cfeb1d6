//! Which route a connection takes, and which routers are refused. Envoy 1.40 was asked the same of the same chains and took the
//! same, for exact names, suffixes, ports, networks and what is spoken.

use super::*;
use crate::policy::Intentions;

fn cluster(name: &str) -> Way {
    Way::Forward(Arc::new(Upstream::new(name, Bind::Tcp("127.0.0.1:1".parse().expect("an address")), Vec::new())))
}

fn ended() -> Way {
    let public = crate::mesh::PublicListener {
        bind: Bind::Tcp("127.0.0.1:1".parse().expect("an address")),
        app: Vec::new(),
        local_connect_timeout: Duration::from_secs(5),
        handshake_timeout: Duration::from_secs(10),
        local_keepalive: None,
        max_inbound_connections: 0,
        idle_timeout: None,
    };
    Way::Terminate { service: Arc::new(service(Some(public))), app: None }
}

fn service(public: Option<crate::mesh::PublicListener>) -> Service {
    Service {
        name: "db".into(),
        proxy_id: "gateway".into(),
        identity: None,
        intentions: Arc::new(Intentions::unknown()),
        public: public.map(Arc::new),
        upstreams: Vec::new(),
    }
}

fn matching(port: Option<u16>, networks: &[(&str, u8)], names: &[&str], tls: Option<bool>) -> Match {
    let network =
        |(address, prefix): &(&str, u8)| Network::new(address.parse().expect("an address"), *prefix).expect("a network");
    Match {
        port,
        networks: networks.iter().map(network).collect(),
        server_names: names.iter().map(|name| name.parse().expect("a server name")).collect(),
        tls,
    }
}

fn settings(routes: Vec<(&str, Match, Way)>) -> RouterSettings {
    RouterSettings {
        name: "front".into(),
        service: "gateway".into(),
        proxy_id: "gateway".into(),
        bind: Bind::Tcp("127.0.0.1:8443".parse().expect("an address")),
        transparent: true,
        permissive: false,
        inspect_timeout: Duration::from_secs(10),
        silent_is_raw: false,
        routes: routes.into_iter().map(|(name, matches, way)| Arc::new(Route { name: name.into(), matches, way })).collect(),
        fallback: None,
    }
}

fn router(routes: Vec<(&str, Match)>) -> Router {
    let routes = routes.into_iter().map(|(name, matches)| (name, matches, cluster(name))).collect();
    Router::new(settings(routes)).expect("a good router")
}

/// The name of the route that a connection takes.
fn taken<'a>(router: &'a Router, to: &str, server_name: Option<&str>, tls: bool) -> Option<&'a str> {
    let seen = Seen { destination: Some(to.parse().expect("an address")), server_name, tls };
    router.route(&seen).map(|place| &*router.routes().nth(place).expect("a route").name)
}

#[test]
fn the_most_specific_server_name_wins_whatever_the_order() {
    let mut routes = vec![
        ("any", matching(None, &[], &[], None)),
        ("dc2", matching(None, &[], &["*.dc2.internal.x"], None)),
        ("all-internal", matching(None, &[], &[".internal.x"], None)),
        ("db", matching(None, &[], &["DB.default.dc2.internal.x", "db2.default.dc2.internal.x"], None)),
    ];
    for _ in 0..routes.len() {
        routes.rotate_left(1);
        let router = router(routes.clone());
        let taken = |name| taken(&router, "10.0.0.1:443", name, true);
        assert_eq!(taken(Some("db.default.dc2.internal.x")), Some("db"));
        assert_eq!(taken(Some("db2.default.dc2.internal.x")), Some("db"));
        assert_eq!(taken(Some("web.default.dc2.internal.x")), Some("dc2"));
        assert_eq!(taken(Some("dc2.internal.x")), Some("all-internal"), "a suffix needs something before its dot");
        assert_eq!(taken(Some("internal.x")), Some("any"));
        assert_eq!(taken(Some(".internal.x")), Some("all-internal"));
        assert_eq!(taken(Some("")), Some("any"));
        assert_eq!(taken(None), Some("any"));
    }
}

#[test]
fn port_comes_before_network_before_name_and_nothing_is_looked_at_twice() {
    let router = router(vec![
        ("wide", matching(None, &[("10.0.0.0", 8)], &[], None)),
        ("narrow", matching(None, &[("10.1.2.3", 32), ("fd00::1", 128)], &["db.x"], None)),
        ("port", matching(Some(5_432), &[("10.0.0.0", 8)], &[], None)),
        ("rest", matching(None, &[], &[], Some(true))),
    ]);
    assert_eq!(taken(&router, "10.9.9.9:80", None, false), Some("wide"));
    assert_eq!(taken(&router, "10.1.2.3:80", Some("db.x"), true), Some("narrow"));
    assert_eq!(taken(&router, "[::ffff:10.1.2.3]:80", Some("db.x"), true), Some("narrow"));
    assert_eq!(taken(&router, "[fd00::1]:80", Some("db.x"), true), Some("narrow"));
    assert_eq!(taken(&router, "10.1.2.3:80", Some("web.x"), true), None, "the longest prefix is not left again");
    assert_eq!(taken(&router, "10.1.2.3:5432", Some("db.x"), true), Some("port"));
    assert_eq!(taken(&router, "192.0.2.1:5432", Some("db.x"), true), None, "nor is the port");
    assert_eq!(taken(&router, "192.0.2.1:80", None, true), Some("rest"));
    assert_eq!(taken(&router, "192.0.2.1:80", None, false), None);
}

#[test]
fn what_is_spoken_decides_last_and_the_fallback_takes_the_rest() {
    let mut settings = settings(vec![
        ("tls", matching(None, &[], &[], Some(true)), cluster("tls")),
        ("raw", matching(Some(80), &[], &[], Some(false)), cluster("raw")),
    ]);
    settings.fallback = Some(Arc::new(Route { name: "rest".into(), matches: Match::default(), way: cluster("rest") }));
    let router = Router::new(settings).expect("a good router");
    assert!(router.inspects());
    assert_eq!(taken(&router, "10.0.0.1:443", Some("x"), true), Some("tls"));
    assert_eq!(taken(&router, "10.0.0.1:80", None, false), Some("raw"));
    assert_eq!(taken(&router, "10.0.0.1:443", None, false), Some("rest"));
    assert_eq!(taken(&router, "10.0.0.1:80", None, true), Some("rest"));
}

#[test]
fn destinations_alone_need_no_look_at_the_bytes() {
    assert!(!router(vec![("wide", matching(None, &[("10.0.0.0", 8)], &[], None))]).inspects());
    assert!(router(vec![("named", matching(None, &[], &["db.x"], None))]).inspects());
}

#[test]
fn bytes_never_pass_intentions_unless_permissive_mode_says_so() {
    let raw = || matching(None, &[], &[], Some(false));
    let tls = || matching(None, &[], &[], Some(true));
    let mut mixed = settings(vec![("public", tls(), ended()), ("raw", raw(), cluster("app"))]);
    let error = Router::new(mixed.clone()).expect_err("raw beside intentions");
    assert_eq!(error, RouterError::PastIntentions { router: "front".into(), route: "raw".into() });
    mixed.permissive = true;
    Router::new(mixed).expect("permissive mode");
    let mut passthrough = settings(vec![("public", tls(), ended())]);
    let original =
        Original { connect_timeout: Duration::from_secs(5), max_connections: None, idle_timeout: None, keepalive: None };
    passthrough.fallback = Some(Arc::new(Route { name: "rest".into(), matches: raw(), way: Way::Original(original) }));
    assert!(matches!(Router::new(passthrough.clone()), Err(RouterError::PastIntentions { .. })));
    passthrough.routes.clear();
    passthrough.transparent = false;
    assert!(matches!(Router::new(passthrough), Err(RouterError::NotTransparent { .. })));
    let ends_raw = Router::new(settings(vec![("public", raw(), ended())]));
    assert!(matches!(ends_raw, Err(RouterError::TerminatesRaw { .. })));
    let without_app = Way::Terminate { service: Arc::new(service(None)), app: None };
    let error = Router::new(settings(vec![("public", tls(), without_app)])).expect_err("no app");
    assert_eq!(error, RouterError::NoApp { router: "front".into(), route: "public".into(), service: "db".into() });
}

#[test]
fn routes_that_cannot_be_told_apart_are_refused() {
    let overlapping = vec![
        ("one", matching(None, &[], &["a.x", "b.x"], None), cluster("one")),
        ("two", matching(None, &[], &["B.x"], None), cluster("two")),
    ];
    let error = Router::new(settings(overlapping)).expect_err("an overlap");
    assert!(error.to_string().contains("one and two") && error.to_string().contains("b.x"), "{error}");
    let networks = vec![
        ("one", matching(None, &[("10.1.0.0", 16)], &[], None), cluster("one")),
        ("two", matching(None, &[("10.1.255.255", 16)], &[], None), cluster("two")),
    ];
    assert!(matches!(Router::new(settings(networks)), Err(RouterError::Overlap { .. })), "the same network");
    let named = vec![
        ("one", matching(None, &[], &["a.x"], None), cluster("one")),
        ("one", matching(None, &[], &["b.x"], None), cluster("two")),
    ];
    assert!(matches!(Router::new(settings(named)), Err(RouterError::SameName { .. })));
}

#[test]
fn names_and_networks_that_match_nothing_are_refused() {
    for text in ["", "*", "*.", ".", "a*.x", "*a.x", "*.*.x", "a b", "ä.x"] {
        assert_eq!(text.parse::<ServerName>(), Err(RouterError::NoServerName(text.into())), "{text}");
    }
    let v4 = "10.0.0.0".parse().expect("an address");
    assert_eq!(Network::new(v4, 33), Err(RouterError::NoNetwork { address: v4, prefix: 33 }));
    let everything = Network::new(v4, 0).expect("a network");
    assert!(everything.contains("192.0.2.1".parse().expect("an address")));
    assert!(!everything.contains("fd00::1".parse().expect("an address")));
}
