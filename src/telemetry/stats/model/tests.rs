//! The model beside the names of a real Envoy with the same listeners and clusters, and its sums.

mod routes;

use std::time::Instant;

use super::*;
use crate::mesh::{Endpoint, PublicListener, Target};
use crate::policy::Intentions;
use crate::telemetry::cells::ListenerCells;
use crate::telemetry::channel;
use crate::telemetry::log::{ConnectionLog, Destination, Reopener};
use crate::telemetry::record::Event;

const SNI: &str = "v1.warehouse.default.dc1.internal.97d2480b-024d-49f9-e76e-de4d1e3eb356.consul";

fn upstream(name: &str, port: u16, sni: &str) -> Arc<Upstream> {
    let endpoint = |port, healthy| Endpoint { address: ([127, 0, 0, 1], port).into(), weight: 1, healthy };
    let target = Target {
        id: "v1.warehouse.default.dc1".into(),
        sni: sni.into(),
        expected: Arc::new([]),
        endpoints: Arc::new([endpoint(1, true), endpoint(2, true), endpoint(3, false)]),
        access: None,
    };
    let bind = Bind::Tcp(([127, 0, 0, 1], port).into());
    Arc::new(Upstream { max_connections: Some(2), ..Upstream::new(name, bind, vec![Arc::new(target)]) })
}

fn service(upstreams: Vec<Arc<Upstream>>) -> Service {
    let ca = crate::tls::fixtures::Ca::new("97d2480b-024d-49f9-e76e-de4d1e3eb356.consul");
    let identity = Identity { svid: Arc::new(ca.svid("airflow-worker")), bundle: ca.bundle(), tls: Vec::new() };
    Service {
        name: "airflow-worker".into(),
        proxy_id: "airflow-worker-sidecar-proxy".into(),
        identity: Some(Arc::new(identity)),
        intentions: Arc::new(Intentions::unknown()),
        public: Some(Arc::new(PublicListener {
            bind: Bind::Tcp(([0, 0, 0, 0], 25_000).into()),
            app: vec![crate::mesh::Address::Tcp(([127, 0, 0, 1], 8_793).into())],
            local_connect_timeout: config::LOCAL_CONNECT_TIMEOUT,
            handshake_timeout: config::HANDSHAKE_TIMEOUT,
            local_keepalive: None,
            max_inbound_connections: 100,
            idle_timeout: None,
        })),
        upstreams,
    }
}

fn snapshot(upstreams: Vec<Arc<Upstream>>) -> Snapshot {
    Snapshot { generation: 3, services: vec![Arc::new(service(upstreams))], ..Snapshot::default() }
}

/// A hub that was told of these cells, which are the worker's.
fn hub(cells: &[Arc<ListenerCells>]) -> Hub {
    let (mut worker, receiver) = channel::pair();
    let log = ConnectionLog::open(&Destination::None, &Reopener::default()).expect("no log");
    let mut hub = Hub::new(vec![receiver], log);
    for (port, cells) in cells.iter().enumerate() {
        let bind = Bind::Tcp(([127, 0, 0, 1], port as u16).into());
        worker.send(Event::ListenerUp { bind, cells: Arc::clone(cells) });
        hub.drain();
    }
    hub
}

fn number(stats: &[Stat], name: &str) -> u64 {
    match stats.iter().find(|stat| stat.name == name).map(|stat| &stat.value) {
        Some(Value::Counter(number) | Value::Gauge(number)) => *number,
        other => panic!("{name}: {other:?}"),
    }
}

/// What a name is of, whatever its listener, its cluster and its worker are called.
fn kind_of_name(name: &str) -> String {
    let scopes = regex::Regex::new(
        r"^(cluster\.(?:local_app|.*\.consul)|listener\.[\d.]+_\d+|tcp\.(?:public_listener|upstream\..*\.dc1))\.",
    )
    .expect("well-formed");
    let first = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    match scopes.find(name) {
        Some(scope) => format!("{}.*.{}", first(name), &name[scope.end()..]),
        None => name.to_owned(),
    }
}

/// Envoy's names that mean nothing at layer 4, or that name what this process has none of: HTTP's requests and retries, zones
/// and subsets, threads of Envoy's, SDS, and what only a handshake of its library tells.
fn is_beyond(name: &str) -> bool {
    let beyond = r"upstream_rq|http[123]|_0_rtt|max_requests|preconnect|lb_(subsets|zone|local|recalculate)|retry_or_shadow|internal_redirect|queue_overloaded|original_dst|default\.total_match|circuit_breakers\.high|ssl_socket_factory|ssl\.(curves|sigalgs)|watchdog|worker_0$";
    regex::Regex::new(beyond).expect("well-formed").is_match(name)
}

#[tokio::test]
async fn every_name_of_envoy_at_layer_four_is_there() {
    let inbound = Arc::new(ListenerCells::new(Direction::Inbound, "airflow-worker".into(), None));
    let outbound = Arc::new(ListenerCells::new(Direction::Outbound, "airflow-worker".into(), Some("warehouse".into())));
    for cells in [&inbound, &outbound] {
        cells.connections.add(1);
        cells.handshakes.add(1);
        cells.count_suite(0xc02b);
    }
    let facts = Facts::capture(&hub(&[inbound, outbound]));
    let snapshot = snapshot(vec![upstream("warehouse", 15_432, SNI)]);
    let stats = build(&snapshot, &facts, &Process::default(), Which::All).await;
    let ours: BTreeSet<String> = stats.iter().map(|stat| kind_of_name(&stat.name)).collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/envoy-1.40/stats.names");
    let envoys = std::fs::read_to_string(path).expect("the fixture is there");
    let missing: BTreeSet<String> =
        envoys.lines().filter(|name| !is_beyond(name)).map(kind_of_name).filter(|name| !ours.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(stats.is_sorted_by(|a, b| a.name <= b.name));
    let names: BTreeSet<&String> = stats.iter().map(|stat| &stat.name).collect();
    assert_eq!(names.len(), stats.len(), "no name twice");
    let used = build(&snapshot, &facts, &Process::default(), Which::Used).await;
    assert_eq!(used, stats.iter().filter(|stat| stat.used).cloned().collect::<Vec<_>>());
    assert!(!used.is_empty() && used.len() < stats.len() / 2, "{} of {}", used.len(), stats.len());
}

#[tokio::test]
async fn numbers_are_those_that_were_counted_and_balance() {
    let cells = Arc::new(ListenerCells::new(Direction::Outbound, "airflow-worker".into(), Some("warehouse".into())));
    cells.connections.add(10);
    cells.active.add(3);
    cells.bytes_to_mesh.add(700);
    cells.bytes_from_mesh.add(900);
    cells.connect_attempts.add(12);
    cells.connect_failures.add(4);
    cells.connect_timeouts.add(1);
    cells.far_active.add(2);
    cells.count_suite(0x1301);
    cells.closed[CloseReason::NoEndpoint as usize].add(5);
    let facts = Facts::capture(&hub(&[cells]));
    // A second listener that leads to the same cluster has counted nothing.
    let upstreams = vec![upstream("warehouse", 15_432, SNI), upstream("old-warehouse?dc=dc2", 15_433, SNI)];
    let stats = build(&snapshot(upstreams), &facts, &Process { connected: true, ..Process::default() }, Which::All).await;
    let cluster = format!("cluster.{SNI}");
    let expected = [
        ("listener.127.0.0.1_15432.downstream_cx_total", 10),
        ("listener.127.0.0.1_15432.downstream_cx_active", 3),
        ("listener.127.0.0.1_15432.downstream_cx_destroy", 7),
        ("listener.127.0.0.1_15432.worker_0.downstream_cx_total", 10),
        ("tcp.upstream.warehouse.default.dc1.downstream_cx_rx_bytes_total", 700),
        ("tcp.upstream.warehouse.default.dc1.downstream_cx_tx_bytes_total", 900),
        ("tcp.upstream.old-warehouse.default.dc2.downstream_cx_total", 0),
        ("connect_authz.rbac.allowed", 0),
        ("cluster.local_app.membership_healthy", 1),
        ("control_plane.connected_state", 1),
    ];
    for (name, value) in expected {
        assert_eq!(number(&stats, name), value, "{name}");
    }
    let expected = [
        ("upstream_cx_total", 12),
        ("upstream_cx_active", 2),
        ("upstream_cx_destroy", 10),
        ("upstream_cx_connect_fail", 4),
        ("upstream_cx_connect_timeout", 1),
        ("upstream_cx_none_healthy", 5),
        ("upstream_cx_rx_bytes_total", 900),
        ("upstream_cx_tx_bytes_total", 700),
        ("membership_total", 3),
        ("membership_healthy", 2),
        ("circuit_breakers.default.cx_open", 1),
        ("ssl.versions.TLSv1.3", 1),
        ("ssl.ciphers.TLS_AES_128_GCM_SHA256", 1),
    ];
    for (name, value) in expected {
        assert_eq!(number(&stats, &format!("{cluster}.{name}")), value, "{name}");
    }
    assert!(number(&stats, &format!("{cluster}.ssl.certificate.unnamed_cert_e3b0c442.expiration_unix_time_seconds")) > 0);
}

#[test]
fn upstreams_have_consuls_prefixes() {
    let service = service(Vec::new());
    let prefix = |name: &str| stat_prefix(&upstream(name, 1, SNI), &service);
    assert_eq!(prefix("db"), "upstream.db.default.dc1");
    assert_eq!(prefix("prepared_query:warehouse-query"), "upstream.prepared_query_warehouse-query");
    assert_eq!(prefix("db?dc=dc7"), "upstream.db.default.dc7");
    assert_eq!(prefix("finance/db"), "upstream.db.finance.dc1");
}

#[test]
fn addresses_are_written_as_envoy_writes_them() {
    assert_eq!(address(&Bind::Tcp("[::1]:80".parse().expect("address"))), "[__1]_80");
    assert_eq!(address(&Bind::Unix { path: "/run/a.sock".into(), mode: None }), "/run/a.sock");
}

#[test]
fn memory_is_read_from_the_kernels_text() {
    let memory = Memory::parse("VmPeak:\t 1 kB\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\nVmData:\t nonsense\n");
    assert_eq!(memory, Memory { allocated: 1 << 20, heap: 0, physical: 2 << 20 });
    assert!(Memory::now().physical > 0);
}

/// Prints what a scrape of 500 upstreams costs; the bounds only catch another order of magnitude.
#[tokio::test]
async fn five_hundred_upstreams_are_told_quickly_and_the_hub_is_held_shortly() {
    let cells = |index: usize| {
        Arc::new(ListenerCells::new(Direction::Outbound, "airflow-worker".into(), Some(format!("u{index}").into())))
    };
    let hub = hub(&(0..500).map(cells).collect::<Vec<_>>());
    let upstreams = (0..500)
        .map(|index| upstream(&format!("u{index}"), 20_000 + index as u16, &SNI.replace("warehouse", &format!("u{index}"))));
    let snapshot = snapshot(upstreams.collect());
    let start = Instant::now();
    let facts = Facts::capture(&hub);
    let held = start.elapsed();
    let stats = build(&snapshot, &facts, &Process::default(), Which::All).await;
    let built = start.elapsed();
    let count = stats.len();
    let mut tagger = crate::telemetry::stats::Tagger::new(
        crate::telemetry::stats::tags::Dialect::Prometheus,
        &crate::telemetry::stats::tags::of_consul(false),
        true,
    )
    .expect("Consul's tags");
    tagger.set_owners(owners(&snapshot));
    let mut bytes = 0;
    for round in ["first", "second"] {
        let start = Instant::now();
        let page = crate::telemetry::stats::prometheus::Page::new(stats.clone(), &mut tagger).await;
        bytes = page.map(|piece| piece.len()).sum();
        eprintln!("{round} page: {:?}", start.elapsed());
    }
    eprintln!("{count} stats: hub held {held:?}, built after {built:?}, page of {bytes} bytes");
    assert!(count > 30_000 && bytes > 20_000_000, "{count} stats, {bytes} bytes");
    assert!(held < Duration::from_millis(500), "{held:?}");
}
