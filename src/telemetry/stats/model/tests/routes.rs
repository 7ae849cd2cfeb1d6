//! Listeners with routes: what is counted once, under which names.

use super::*;
use crate::mesh::router::{Match, Original, Route, Router, RouterSettings, Way};

const DB: &str = "db.default.dc1.internal.97d2480b-024d-49f9-e76e-de4d1e3eb356.consul";
const LEGACY: &str = "legacy.default.dc1.internal.97d2480b-024d-49f9-e76e-de4d1e3eb356.consul";

/// Endpoints of a plain cluster, as a gateway has them.
fn plain(name: &str) -> Arc<Upstream> {
    let mut upstream = Upstream::clone(&upstream(name, 1, ""));
    let mut target = Target::clone(&upstream.targets[0]);
    target.id = name.into();
    let second = Target { id: format!("{name}#1").into(), ..target.clone() };
    upstream.targets = vec![Arc::new(target), Arc::new(second)];
    Arc::new(upstream)
}

fn route(name: &str, matches: Match, way: Way) -> Arc<Route> {
    Arc::new(Route { name: name.into(), matches, way })
}

fn by_name(name: &str) -> Match {
    Match { server_names: vec![name.parse().expect("a name")], ..Match::default() }
}

fn router(name: &str, port: u16, permissive: bool, routes: Vec<Arc<Route>>) -> Arc<Router> {
    let transparent = routes.iter().any(|route| matches!(route.way, Way::Original(_)));
    let settings = RouterSettings {
        name: name.into(),
        service: "airflow-worker".into(),
        proxy_id: "airflow-worker-sidecar-proxy".into(),
        bind: Bind::Tcp(([127, 0, 0, 1], port).into()),
        transparent,
        permissive,
        inspect_timeout: Duration::from_secs(1),
        silent_is_raw: false,
        routes,
        fallback: None,
    };
    Arc::new(Router::new(settings).expect("it can be served"))
}

fn counted(direction: Direction, upstream: Option<&str>, connections: u64) -> Arc<ListenerCells> {
    let cells = ListenerCells::new(direction, "airflow-worker".into(), upstream.map(Into::into));
    cells.connections.add(connections);
    cells.active.add(connections);
    cells.connect_attempts.add(connections);
    cells.bytes_to_mesh.add(connections * 10);
    cells.bytes_from_mesh.add(connections * 100);
    Arc::new(cells)
}

async fn told(routers: Vec<Arc<Router>>, cells: &[Arc<ListenerCells>]) -> (Snapshot, Vec<Stat>) {
    let bare = Service { public: None, ..service(Vec::new()) };
    let snapshot = Snapshot { services: vec![Arc::new(bare)], routers, ..Snapshot::default() };
    let stats = build(&snapshot, &Facts::capture(&hub(cells)), &Process::default(), Which::All).await;
    let names: BTreeSet<(usize, &String)> = stats.iter().map(|stat| (stat.owner, &stat.name)).collect();
    assert_eq!(names.len(), stats.len(), "no name twice");
    (snapshot, stats)
}

#[track_caller]
fn assert_numbers(stats: &[Stat], wanted: &[(&str, u64)]) {
    for (name, value) in wanted {
        assert_eq!(number(stats, name), *value, "{name}");
    }
}

#[tokio::test]
async fn a_gateways_clusters_have_their_names_and_its_listener_all_connections() {
    let name = "default:127.0.0.1:21512";
    let routes = [DB, LEGACY].map(|name| route(name, by_name(name), Way::Forward(plain(name)))).to_vec();
    let unrouted = counted(Direction::Outbound, Some(name), 1);
    unrouted.closed[CloseReason::NoRoute as usize].add(1);
    let cells = [counted(Direction::Outbound, Some(DB), 2), counted(Direction::Outbound, Some(LEGACY), 4), unrouted];
    let (snapshot, stats) = told(vec![router(name, 21_512, false, routes)], &cells).await;
    assert_numbers(
        &stats,
        &[
            ("listener.127.0.0.1_21512.downstream_cx_total", 7),
            ("listener.127.0.0.1_21512.worker_0.downstream_cx_total", 7),
            ("listener.127.0.0.1_21512.no_filter_chain_match", 1),
            ("tcp.mesh_gateway_local.default.downstream_cx_total", 6),
            ("tcp.mesh_gateway_local.default.downstream_cx_rx_bytes_total", 60),
            (&format!("cluster.{DB}.upstream_cx_total"), 2),
            (&format!("cluster.{DB}.upstream_cx_rx_bytes_total"), 200),
            (&format!("cluster.{DB}.membership_total"), 6),
            (&format!("cluster.{LEGACY}.upstream_cx_total"), 4),
            ("cluster_manager.active_clusters", 2),
        ],
    );
    let has = |part: &str| stats.iter().any(|stat| stat.name.contains(part));
    assert!(!has("connect_authz") && !has("ssl."), "it holds no key and decides on nobody");
    let names = sample_names(&snapshot);
    let of = |upstream: &str| &names[&Key::outbound(&"airflow-worker".into(), &upstream.into())];
    assert_eq!(of(DB).cluster, Some(format!("cluster.{DB}")));
    assert_eq!((of(name).cluster.as_ref(), of(name).listener.as_str()), (None, "listener.127.0.0.1_21512"));
}

#[tokio::test]
async fn permissive_mode_is_one_way_in_to_the_app() {
    let terminate = Way::Terminate { service: Arc::new(service(Vec::new())), app: None };
    let raw = Match { tls: Some(false), port: Some(5_432), ..Match::default() };
    let routes = vec![
        route("local_app", by_name("db"), terminate.clone()),
        route("local_app for tls", Match { tls: Some(true), ..Match::default() }, terminate),
        route("local_app for port 5432 raw", raw, Way::Forward(plain("local_app"))),
    ];
    let forwarded = counted(Direction::Outbound, Some("local_app for port 5432 raw"), 3);
    let inbound = counted(Direction::Inbound, None, 5);
    inbound.allowed.add(5);
    let name = "public_listener:0.0.0.0:25000";
    let (_, stats) = told(vec![router(name, 25_000, true, routes)], &[inbound, forwarded]).await;
    assert_numbers(
        &stats,
        &[
            ("listener.127.0.0.1_25000.downstream_cx_total", 8),
            ("tcp.public_listener.downstream_cx_total", 8),
            ("tcp.public_listener.downstream_cx_rx_bytes_total", 530),
            ("connect_authz.rbac.allowed", 5),
            ("cluster.local_app.upstream_cx_total", 8),
            ("cluster.local_app.upstream_cx_tx_bytes_total", 530),
        ],
    );
    let certificate = "listener.127.0.0.1_25000.ssl.certificate.unnamed_cert_e3b0c442.expiration_unix_time_seconds";
    assert!(number(&stats, certificate) > 0);
}

#[tokio::test]
async fn a_transparent_proxy_has_upstreams_prefixes() {
    let original =
        Original { connect_timeout: Duration::from_secs(1), max_connections: None, idle_timeout: None, keepalive: None };
    let mut to_db = Upstream::clone(&upstream(DB, 1, DB));
    let mut target = Target::clone(&to_db.targets[0]);
    let id = crate::identity::SpiffeId::service("97d2480b-024d-49f9-e76e-de4d1e3eb356.consul", "", "", "dc1", "db");
    target.expected = Arc::new([id.expect("an id")]);
    to_db.targets = vec![Arc::new(target)];
    let originate = Way::Originate { service: Arc::new(service(Vec::new())), upstream: Arc::new(to_db) };
    let network = "10.0.0.1".parse().ok().and_then(|ip| crate::mesh::router::Network::new(ip, 32).ok()).expect("a network");
    let routes = vec![
        route(DB, Match { networks: vec![network], ..Match::default() }, originate),
        route("original-destination", Match::default(), Way::Original(original)),
    ];
    let cells = [counted(Direction::Outbound, Some(DB), 2), counted(Direction::Outbound, Some("original-destination"), 3)];
    let (_, stats) = told(vec![router("outbound_listener:127.0.0.1:15001", 15_001, false, routes)], &cells).await;
    assert_numbers(
        &stats,
        &[
            ("listener.127.0.0.1_15001.downstream_cx_total", 5),
            ("tcp.upstream.db.default.dc1.downstream_cx_total", 2),
            ("tcp.upstream.original-destination.downstream_cx_total", 3),
            (&format!("cluster.{DB}.upstream_cx_total"), 2),
            (&format!("cluster.{DB}.ssl.handshake"), 0),
            ("cluster.original-destination.upstream_cx_total", 3),
            ("cluster.original-destination.membership_total", 0),
        ],
    );
}

#[tokio::test]
async fn updates_of_resources_have_the_names_of_envoys_managers() {
    let changes = Changes { added: 7, modified: 6, removed: 5 };
    let clusters = Updates { answers: Answers { accepted: 4, rejected: 1 }, changes, warming: 2 };
    let listeners =
        Updates { answers: Answers { accepted: 2, rejected: 3 }, changes: Changes { added: 9, ..changes }, warming: 1 };
    let fetched = Some(Fetched { answers: Answers { accepted: 6, rejected: 2 }, unchanged: 1, empty: 4 });
    let of_members = [(Arc::from("local_app"), Members { changes: 3, fetched })].into();
    let members = Arc::new([(Arc::from("airflow-worker-sidecar-proxy"), of_members)].into());
    let process = Process { connected: true, told: Told { clusters, listeners, members }, ..Process::default() };
    let stats = build(&snapshot(Vec::new()), &Facts::capture(&hub(&[])), &process, Which::All).await;
    assert_numbers(
        &stats,
        &[
            ("control_plane.connected_state", 1),
            ("cluster_manager.cds.update_attempt", 6),
            ("cluster_manager.cds.update_success", 4),
            ("cluster_manager.cds.update_rejected", 1),
            ("cluster_manager.cluster_added", 7),
            ("cluster_manager.cluster_modified", 6),
            ("cluster_manager.cluster_removed", 5),
            ("cluster_manager.warming_clusters", 2),
            ("listener_manager.listener_added", 9),
            ("listener_manager.listener_modified", 6),
            ("listener_manager.listener_removed", 5),
            ("listener_manager.total_listeners_warming", 1),
            ("listener_manager.lds.update_success", 2),
            ("listener_manager.lds.update_rejected", 3),
            ("cluster.local_app.membership_change", 3),
            ("cluster.local_app.update_attempt", 9),
            ("cluster.local_app.update_success", 6),
            ("cluster.local_app.update_rejected", 2),
            ("cluster.local_app.update_no_rebuild", 1),
            ("cluster.local_app.update_empty", 4),
        ],
    );
}
