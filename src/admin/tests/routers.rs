//! What the pages say of listeners with routes: a gateway, a transparent proxy, permissive mode; and of peered trust domains.

use super::*;
use crate::mesh::router::{Match, Network, Original, Route, Router, RouterSettings, Way};
use crate::tls::fixtures::{Ca, key_pem};
use serde_json::{Value, json};

const DB: &str = "db.default.dc1.internal.t.consul";
const LEGACY: &str = "legacy.default.dc1.internal.t.consul";

fn service_of(identity: &Arc<Identity>, public: Option<PublicListener>) -> Arc<Service> {
    Arc::new(Service {
        name: "web".into(),
        proxy_id: "web-sidecar-proxy".into(),
        identity: Some(Arc::clone(identity)),
        intentions: Arc::new(Intentions::new(Vec::new(), DefaultPolicy::Deny)),
        public: public.map(Arc::new),
        upstreams: Vec::new(),
    })
}

fn leads_to(name: &str, sni: &str, ports: &[u16]) -> Arc<Upstream> {
    // One target a priority, as xDS has them.
    let target = |(priority, port): (usize, &u16)| {
        let endpoint = Endpoint { address: ([10, 0, 0, 1], *port).into(), weight: 1, healthy: true };
        let expected = if sni.is_empty() { [].into() } else { [id("db")].into() };
        let id = if priority == 0 { name.to_owned() } else { format!("{name}#{priority}") };
        Arc::new(Target { id: id.into(), sni: sni.into(), expected, endpoints: [endpoint].into(), access: None })
    };
    Arc::new(Upstream {
        max_connections: Some(9),
        ..Upstream::new(name, tcp(15_001), ports.iter().enumerate().map(target).collect())
    })
}

fn router(name: &str, port: u16, permissive: bool, routes: Vec<(&str, Match, Way)>) -> Arc<Router> {
    let routes = routes.into_iter().map(|(name, matches, way)| Arc::new(Route { name: name.into(), matches, way }));
    let mut routes: Vec<Arc<Route>> = routes.collect();
    let last = routes.pop_if(|route| route.matches == Match::default());
    let transparent = last.as_ref().is_some_and(|route| matches!(route.way, Way::Original(_)));
    let settings = RouterSettings {
        name: name.into(),
        service: "web".into(),
        proxy_id: "web-sidecar-proxy".into(),
        bind: tcp(port),
        transparent,
        permissive,
        inspect_timeout: Duration::from_secs(1),
        silent_is_raw: false,
        routes,
        fallback: last,
    };
    Arc::new(Router::new(settings).expect("it can be served"))
}

fn by_name(name: &str) -> Match {
    Match { server_names: vec![name.parse().expect("a name")], ..Match::default() }
}

/// The snapshot, and the key in it.
fn routed() -> (Snapshot, String) {
    let (ca, peer) = (Ca::new("t.consul"), Ca::new("peer.consul"));
    let svid = ca.svid("web");
    let key = key_pem(&svid.key);
    let mut bundle = TrustBundle::clone(&ca.bundle());
    bundle.peers = vec![peer.as_peer(true)];
    let identity = Arc::new(Identity { svid: Arc::new(svid), bundle: Arc::new(bundle), tls: Vec::new() });
    let public = PublicListener {
        bind: tcp(21_000),
        app: vec![Address::Tcp(([127, 0, 0, 1], 8_080).into())],
        local_connect_timeout: Duration::from_secs(5),
        handshake_timeout: Duration::from_secs(5),
        local_keepalive: None,
        max_inbound_connections: 7,
        idle_timeout: None,
    };
    let terminate = Way::Terminate { service: service_of(&identity, Some(public)), app: None };
    let raw = Match { tls: Some(false), ..Match::default() };
    let originate = Way::Originate { service: service_of(&identity, None), upstream: leads_to(DB, DB, &[1, 2]) };
    let original = Way::Original(Original {
        connect_timeout: Duration::from_secs(3),
        max_connections: Some(4),
        idle_timeout: None,
        keepalive: None,
    });
    let network = Network::new([10, 1, 0, 0].into(), 16).expect("a network");
    let to_db = Match { networks: vec![network], port: Some(5_432), ..Match::default() };
    let routers = vec![
        router(
            "public_listener:127.0.0.1:21000",
            21_000,
            true,
            vec![
                ("local_app for tls", Match { tls: Some(true), ..Match::default() }, terminate),
                ("local_app for raw", raw, Way::Forward(leads_to("local_app", "", &[8_080]))),
            ],
        ),
        router(
            "default:127.0.0.1:21512",
            21_512,
            false,
            vec![(LEGACY, by_name(LEGACY), Way::Forward(leads_to(LEGACY, "", &[7])))],
        ),
        router(
            "outbound_listener:127.0.0.1:15001",
            15_001,
            false,
            vec![(DB, to_db, originate), ("original-destination", Match::default(), original)],
        ),
    ];
    (Snapshot { services: vec![service_of(&identity, None)], routers, ..Snapshot::default() }, key)
}

async fn published() -> (Port, String) {
    let mut port = port().await;
    let (snapshot, key) = routed();
    port.publisher.publish(snapshot);
    (port, key)
}

#[cfg(feature = "xds")]
#[tokio::test]
async fn every_answer_is_envoys_message_and_has_no_key() {
    let (port, key) = published().await;
    let lines: Vec<&str> = key.lines().filter(|line| !line.starts_with("---")).collect();
    for (path, message) in [
        ("/config_dump", "envoy.admin.v3.ConfigDump"),
        ("/config_dump?include_eds", "envoy.admin.v3.ConfigDump"),
        ("/config_dump?resource=dynamic_listeners", "envoy.admin.v3.ConfigDump"),
        ("/clusters?format=json", "envoy.admin.v3.Clusters"),
        ("/listeners?format=json", "envoy.admin.v3.Listeners"),
        ("/certs", "envoy.admin.v3.Certificates"),
    ] {
        let answer = port.json(path).await;
        envoy::read_as(message, &answer);
        let text = answer.to_string();
        assert!(!text.contains("PRIVATE KEY") && !lines.iter().any(|line| text.contains(line)), "{path}");
    }
    for path in ["/snapshot", "/clusters", "/stats"] {
        let text = port.ask("GET", path).await.body;
        assert!(!text.contains("PRIVATE KEY") && !lines.iter().any(|line| text.contains(line)), "{path}");
    }
}

#[tokio::test]
async fn clusters_behind_routes_are_told_with_what_their_routes_counted() {
    let (mut port, _) = published().await;
    for (upstream, attempts) in [("local_app for raw", 2), (LEGACY, 3), (DB, 4)] {
        let cells = Arc::new(ListenerCells::new(Direction::Outbound, "web".into(), Some(upstream.into())));
        cells.connect_attempts.add(attempts);
        port.worker.send(Event::RouteUp { cells });
    }
    let inbound = Arc::new(ListenerCells::new(Direction::Inbound, "web".into(), None));
    inbound.connect_attempts.add(5);
    port.worker.send(Event::RouteUp { cells: inbound });
    let text = port.ask("GET", "/clusters").await.body;
    for line in [
        // The app is the same cluster by both ways.
        "local_app::127.0.0.1:8080::weight::1".to_owned(),
        format!("{LEGACY}::10.0.0.1:7::cx_total::3"),
        format!("{LEGACY}::default_priority::max_connections::9"),
        // Two endpoints: which one had what is not known.
        format!("{DB}::10.0.0.1:1::cx_total::0"),
        format!("{DB}::10.0.0.1:2::priority::1"),
        "original-destination::default_priority::max_connections::4".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let json = port.json("/clusters?format=json").await;
    let clusters = json["cluster_statuses"].as_array().expect("clusters");
    let names: Vec<&str> = clusters.iter().filter_map(|one| one["name"].as_str()).collect();
    assert_eq!(names, ["local_app", LEGACY, DB, "original-destination"]);
    assert_eq!(clusters[2]["host_statuses"][1]["priority"], 1);
    let stats = port.ask("GET", "/stats?filter=upstream_cx_total").await.body;
    for line in ["cluster.local_app.upstream_cx_total: 7".to_owned(), format!("cluster.{DB}.upstream_cx_total: 4")] {
        assert!(stats.lines().any(|found| found == line), "{line} is not in\n{stats}");
    }
}

#[tokio::test]
async fn listeners_with_routes_have_consuls_names_and_a_chain_a_route() {
    let (port, _) = published().await;
    let wanted = [
        "public_listener:127.0.0.1:21000::127.0.0.1:21000",
        "default:127.0.0.1:21512::127.0.0.1:21512",
        "outbound_listener:127.0.0.1:15001::127.0.0.1:15001",
    ];
    assert_eq!(port.ask("GET", "/listeners").await.body.lines().collect::<Vec<_>>(), wanted);
    let dump = port.json("/config_dump?resource=dynamic_listeners").await;
    let listener = |index: usize| dump["configs"][index]["active_state"]["listener"].clone();
    let names = |chain: &Value| -> Vec<String> {
        let filters = chain["filters"].as_array().expect("filters").clone();
        filters.iter().filter_map(|filter| filter["name"].as_str()?.rsplit('.').next().map(str::to_owned)).collect()
    };
    let public = listener(0);
    assert_eq!(names(&public["filter_chains"][0]), ["rbac", "connection_limit", "tcp_proxy"]);
    assert_eq!(public["filter_chains"][0]["filter_chain_match"], json!({"transport_protocol": "tls"}));
    assert_eq!(names(&public["filter_chains"][1]), ["tcp_proxy"]);
    assert_eq!(listener(1)["filter_chains"][0]["filter_chain_match"], json!({"server_names": [LEGACY]}));
    let outbound = listener(2);
    let matched = json!({"destination_port": 5_432, "prefix_ranges": [{"address_prefix": "10.1.0.0", "prefix_len": 16}]});
    assert_eq!(outbound["filter_chains"][0]["filter_chain_match"], matched);
    let proxy = |chain: &Value| chain["filters"][0]["typed_config"].clone();
    assert_eq!(proxy(&outbound["filter_chains"][0])["stat_prefix"], "upstream.db.default.dc1");
    assert_eq!(proxy(&outbound["default_filter_chain"])["cluster"], "original-destination");
}

#[tokio::test]
async fn a_leaf_is_told_once_with_the_roots_of_peers() {
    let (port, _) = published().await;
    let certs = port.json("/certs").await;
    let all = certs["certificates"].as_array().expect("certificates");
    assert_eq!(all.len(), 1, "{certs:#}");
    assert_eq!(all[0]["cert_chain"][0]["subject_alt_names"], json!([{"uri": id("web").as_str()}]));
    assert_eq!(all[0]["ca_cert"].as_array().map(Vec::len), Some(2));
    let snapshot = port.json("/snapshot").await;
    let identity = &snapshot["services"][0]["identity"];
    assert_eq!((&identity["peers"][0]["trust_domain"], &identity["peers"][0]["calls"]), (&json!("peer.consul"), &json!(true)));
    assert_ne!(identity["peers"][0]["roots"], identity["roots"]);
}

#[tokio::test]
async fn an_upstream_behind_a_route_can_be_asked_for() {
    let (port, _) = published().await;
    for to in [DB, "db"] {
        let reach = port.json(&format!("/reach?identity=web&to={to}")).await;
        assert_eq!((&reach["upstream"], &reach["decision"]), (&json!(DB), &json!("unknown")), "{reach}");
        assert_eq!(reach["endpoints"].as_array().map(Vec::len), Some(2));
    }
    let none = port.ask("GET", "/reach?identity=web&to=nope").await;
    assert_eq!(none.status, 404);
    assert!(none.body.contains(DB) && !none.body.contains(LEGACY), "{}", none.body);
}
