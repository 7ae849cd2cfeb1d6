//! The port as a client meets it, over real loopback connections.

use std::net::SocketAddr;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::control::ServiceStatus;
use crate::identity::{SpiffeId, Svid, TrustBundle};
use crate::mesh::{Address, Bind, Endpoint, Identity, PublicListener, Service, Target, Upstream};
use crate::policy::{self, DefaultPolicy, Intention, Intentions};
use crate::store::{Publisher, Reader};
use crate::telemetry::cells::{Direction, ListenerCells};
use crate::telemetry::channel::{self, Sender};
use crate::telemetry::log::tests::{inbound, said};
use crate::telemetry::log::{AccessLogs, ConnectionLog};
use crate::telemetry::record::Event;

mod access_logs;
mod callers;
mod encoding;
mod envoy;
mod page_listeners;
mod routers;

/// Would be seen in any answer that prints the key, as text, base64 or numbers.
const KEY: &[u8] = b"SECRETSECRETSECRETSECRET";

/// A running port and everything that drives it.
struct Port {
    address: SocketAddr,
    worker: Sender,
    publisher: Publisher<Snapshot>,
    readers: Vec<Reader<Snapshot>>,
    status: watch::Sender<Status>,
    resources: crate::control::dump::Sender,
    lifecycle: watch::Sender<Lifecycle>,
    actions: mpsc::Receiver<Action>,
    shutdown: watch::Sender<bool>,
    running: JoinHandle<()>,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

async fn port_with(connection_log: Destination, settings: Settings) -> Port {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (worker, receiver) = channel::pair();
    let log = ConnectionLog::open(&connection_log, &settings.reopener).expect("opens");
    let (publisher, readers) = crate::store::new(Snapshot::default(), 1);
    let (status, status_seen) = watch::channel(Status::default());
    let (resources, resources_seen) = crate::control::dump::channel();
    let (lifecycle, lifecycle_seen) = watch::channel(Lifecycle::default());
    let (_, upgrade) = watch::channel(Upgrade::default());
    let (actions_sent, actions) = mpsc::channel(1);
    let (shutdown, shutdown_seen) = watch::channel(false);
    let mut hub = Hub::new(vec![receiver], log);
    hub.set_access_logs(AccessLogs::open(&[], &settings.reopener).expect("opens"));
    let context = Context {
        hub,
        viewer: publisher.viewer(),
        status: status_seen,
        resources: resources_seen,
        lifecycle: lifecycle_seen,
        upgrade,
        actions: actions_sent,
        closing: shutdown_seen.clone(),
        settings,
    };
    let running = tokio::spawn(run(listener, context, shutdown_seen));
    Port { address, worker, publisher, readers, status, resources, lifecycle, actions, shutdown, running }
}

async fn port() -> Port {
    port_with(Destination::None, Settings::default()).await
}

impl Port {
    async fn ask(&self, method: &str, path: &str) -> Answer {
        self.ask_with(method, path, "").await
    }

    async fn ask_with(&self, method: &str, path: &str, headers: &str) -> Answer {
        let text = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n");
        let mut stream = TcpStream::connect(self.address).await.expect("connects");
        stream.write_all(text.as_bytes()).await.expect("sends");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answers in UTF-8");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        Answer { status, head: head.to_lowercase(), body: body.to_owned() }
    }

    async fn json(&self, path: &str) -> serde_json::Value {
        let answer = self.ask("GET", path).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
        serde_json::from_str(&answer.body).expect("JSON")
    }

    fn listener_up(&mut self, port: u16) -> Arc<ListenerCells> {
        let cells = Arc::new(ListenerCells::new(Direction::Inbound, "db".into(), None));
        self.worker.send(Event::ListenerUp { bind: tcp(port), cells: Arc::clone(&cells) });
        cells
    }
}

fn tcp(port: u16) -> Bind {
    Bind::Tcp(([127, 0, 0, 1], port).into())
}

fn id(service: &str) -> SpiffeId {
    SpiffeId::service("t.consul", "", "", "dc1", service).expect("valid")
}

fn snapshot() -> Snapshot {
    let svid = Svid {
        id: id("db"),
        chain: vec![CertificateDer::from(b"leaf".to_vec()), CertificateDer::from(b"intermediate".to_vec())],
        key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(KEY.to_vec())),
        not_before: SystemTime::UNIX_EPOCH,
        not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_323_045),
        serial: "0a1b".into(),
    };
    let bundle =
        TrustBundle { trust_domain: "t.consul".into(), roots: vec![CertificateDer::from(b"root".to_vec())], peers: Vec::new() };
    let deny = Intention {
        id: "intention-id".into(),
        source: "web".into(),
        source_namespace: String::new(),
        source_partition: String::new(),
        source_peer: String::new(),
        destination: "db".into(),
        action: policy::Action::Deny,
        precedence: 9,
    };
    let allow = Intention { id: String::new(), source: "*".into(), action: policy::Action::Allow, precedence: 8, ..deny.clone() };
    let public = PublicListener {
        bind: tcp(21_000),
        app: vec![Address::Tcp(([127, 0, 0, 1], 5_432).into())],
        local_connect_timeout: Duration::from_secs(5),
        handshake_timeout: Duration::from_secs(10),
        local_keepalive: None,
        max_inbound_connections: 7,
        idle_timeout: None,
    };
    let target = Target {
        id: "cache.default.dc1".into(),
        sni: "cache.default.dc1.internal.t.consul".into(),
        expected: [id("cache")].into(),
        endpoints: [Endpoint { address: ([10, 0, 0, 9], 20_000).into(), weight: 1, healthy: false }].into(),
        access: None,
    };
    let upstream = Upstream { max_connections: Some(3), ..Upstream::new("cache", tcp(9_191), vec![Arc::new(target)]) };
    let service = Service {
        name: "db".into(),
        proxy_id: "db-sidecar-proxy".into(),
        identity: Some(Arc::new(Identity { svid: Arc::new(svid), bundle: Arc::new(bundle), tls: Vec::new() })),
        intentions: Arc::new(Intentions::new(vec![allow, deny], DefaultPolicy::Deny)),
        public: Some(Arc::new(public)),
        upstreams: vec![Arc::new(upstream)],
    };
    Snapshot { services: vec![Arc::new(service)], ..Snapshot::default() }
}

#[tokio::test]
async fn ready_goes_through_envoys_states_and_stays_until_drain() {
    let mut port = port().await;
    async fn is(port: &Port, status: u16, body: &str) {
        let answer = port.ask("GET", "/ready").await;
        assert_eq!((answer.status, answer.body.as_str()), (status, body));
    }
    is(&port, 503, "PRE_INITIALIZING\n").await;
    port.lifecycle.send_replace(Lifecycle::Live);
    is(&port, 503, "INITIALIZING\n").await;
    port.publisher.publish(snapshot());
    port.status.send_replace(Status { ready: true, agent_reachable: true, ..Status::default() });
    is(&port, 503, "INITIALIZING\n").await;
    let _public = port.listener_up(21_000);
    is(&port, 503, "INITIALIZING\n").await;
    let _upstream = port.listener_up(9_191);
    is(&port, 200, "LIVE\n").await;
    // The agent goes away, and a listener: the rest still serves.
    port.status.send_replace(Status::default());
    port.worker.send(Event::ListenerDown { bind: tcp(9_191) });
    is(&port, 200, "LIVE\n").await;
    port.lifecycle.send_replace(Lifecycle::Draining);
    is(&port, 503, "DRAINING\n").await;
}

#[tokio::test]
async fn readiness_is_reached_even_when_nobody_asks() {
    let mut port = port().await;
    port.lifecycle.send_replace(Lifecycle::Live);
    port.publisher.publish(snapshot());
    port.status.send_replace(Status { ready: true, ..Status::default() });
    let _cells = [port.listener_up(21_000), port.listener_up(9_191)];
    tokio::time::sleep(TICK_MAX * 3).await;
    port.worker.send(Event::ListenerDown { bind: tcp(9_191) });
    assert_eq!(port.ask("GET", "/ready").await.body, "LIVE\n");
}

#[tokio::test]
async fn healthz_names_what_is_not_well() {
    let mut port = port().await;
    port.publisher.publish(snapshot());
    let service = ServiceStatus {
        proxy_id: "db-sidecar-proxy".into(),
        service: None,
        spiffe_id: None,
        leaf_serial: None,
        leaf_not_after: None,
        rotations: 0,
        pages: Vec::new(),
        problem: Some("token has no service:write for db".into()),
    };
    port.status.send_replace(Status { services: vec![service], ..Status::default() });
    let _public = port.listener_up(21_000);
    let error = std::io::Error::from_raw_os_error(libc::EADDRINUSE);
    port.worker.send(Event::BindFailed { bind: tcp(9_191), error });
    let health = port.json("/healthz").await;
    let problems: Vec<_> = health["problems"].as_array().expect("a list").iter().map(|p| p["subject"].as_str()).collect();
    assert_eq!(problems, [Some("agent"), Some("db-sidecar-proxy"), Some("127.0.0.1:9191")]);
    assert_eq!(health["problems"][1]["problem"], "token has no service:write for db");
    assert!(health["problems"][2]["problem"].as_str().expect("text").starts_with("0 of 1 workers listen; it cannot be bound"));
    assert_eq!((&health["generation"], &health["acknowledged_generation"]), (&1.into(), &0.into()));
    assert_eq!(health["state"], "PRE_INITIALIZING");
}

#[tokio::test]
async fn snapshot_shows_what_is_enforced_and_no_key() {
    let mut port = port().await;
    port.publisher.publish(snapshot());
    port.readers[0].refresh();
    port.readers[0].acknowledge();
    let _public = port.listener_up(21_000);
    port.worker.send(Event::Ejected {
        upstream: "cache".into(),
        endpoint: ([10, 0, 0, 9], 20_000).into(),
        duration: Duration::from_secs(30),
    });
    let text = port.ask("GET", "/snapshot").await.body;
    for form in ["SECRET", "U0VDUkVU", "83, 69, 67", "53454352", "83,\n"] {
        assert!(!text.contains(form), "the key is shown as {form}");
    }
    let view = port.json("/snapshot").await;
    assert_eq!((&view["generation"], &view["acknowledged_generation"]), (&1.into(), &1.into()));
    let service = &view["services"][0];
    assert_eq!(service["identity"]["spiffe_id"], "spiffe://t.consul/ns/default/dc/dc1/svc/db");
    assert_eq!(service["identity"]["serial"], "0a1b");
    assert_eq!(service["identity"]["not_after"], "2026-01-02T03:04:05.000Z");
    assert_eq!(service["identity"]["chain_length"], 2);
    // `printf root | sha256sum`
    assert_eq!(
        service["identity"]["roots"],
        serde_json::json!(["4813494d137e1631bba301d5acab6e7bb7aa74ce1185d456565ef51d737677b2"])
    );
    assert_eq!(service["intentions"]["default"], "deny");
    assert_eq!(service["intentions"]["ordered"][0]["rule"], "web -> db deny (precedence 9)");
    assert_eq!(service["intentions"]["ordered"][1]["allows"], true);
    assert_eq!(service["public"]["bind"], "127.0.0.1:21000");
    let target = &service["upstreams"][0]["targets"][0];
    assert_eq!(target["sni"], "cache.default.dc1.internal.t.consul");
    assert_eq!(target["expected"][0], "spiffe://t.consul/ns/default/dc/dc1/svc/cache");
    assert_eq!(target["endpoints"][0], serde_json::json!({"address": "10.0.0.9:20000", "weight": 1, "healthy": false}));
    assert_eq!(view["listeners"][0]["workers"], serde_json::json!(["bound"]));
    assert_eq!((&view["ejections"][0]["endpoint"], &view["ejections"][0]["workers"]), (&"10.0.0.9:20000".into(), &1.into()));
}

#[tokio::test]
async fn metrics_show_cells_and_certificate_expiry() {
    let mut port = port().await;
    port.publisher.publish(snapshot());
    let cells = port.listener_up(21_000);
    cells.connections.add(5);
    let answer = port.ask("GET", "/metrics").await;
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    for line in [
        r#"ringfence_connections_total{direction="inbound",service="db"} 5"#,
        r#"ringfence_leaf_not_after_timestamp_seconds{service="db",proxy="db-sidecar-proxy"} 1767323045"#,
        "ringfence_snapshot_generation 1",
    ] {
        assert!(answer.body.lines().any(|found| found == line), "{line} is not in\n{}", answer.body);
    }
}

#[tokio::test]
async fn answers_carry_envoys_headers() {
    let port = port().await;
    for (path, status) in [("/ready", 503), ("/help", 200), ("/nothing", 404)] {
        let answer = port.ask("GET", path).await;
        assert_eq!(answer.status, status);
        for header in
            ["content-type: text/plain; charset=utf-8", "cache-control: no-cache, max-age=0", "x-content-type-options: nosniff"]
        {
            assert!(answer.head.contains(header), "{path}: no {header} in {}", answer.head);
        }
    }
}

#[tokio::test]
async fn an_unknown_path_lists_the_commands() {
    let port = port().await;
    let answer = port.ask("GET", "/config_dumps").await;
    assert_eq!(answer.status, 404);
    assert!(answer.body.starts_with("invalid path. admin commands are:\n  /: "), "{}", answer.body);
    assert!(answer.body.contains("\n  /quitquitquit (POST): exit\n"), "{}", answer.body);
    assert!(port.ask("GET", "/").await.body.contains("<a href=\"/metrics\">"));
}

#[tokio::test]
async fn what_changes_something_needs_post_and_no_browser() {
    let mut port = port().await;
    for path in ["/quitquitquit", "/drain_listeners", "/reopen_logs"] {
        let answer = port.ask("GET", path).await;
        assert_eq!((answer.status, answer.body.as_str()), (405, "Method GET not allowed, POST required."));
        let answer = port.ask_with("POST", path, "origin: http://localhost:19000\r\ncontent-length: 0\r\n").await;
        assert_eq!(answer.status, 403);
    }
    assert!(port.actions.try_recv().is_err(), "nothing was asked of the process");

    for (path, action) in [
        ("/drain_listeners", Action::Drain(Drain::default())),
        ("/reopen_logs", Action::ReopenLogs),
        ("/quitquitquit", Action::Quit),
    ] {
        let answer = port.ask("POST", path).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "OK\n"));
        assert_eq!(port.actions.recv().await, Some(action));
    }
    assert_eq!(port.ask("POST", "/quitquitquit").await.status, 200);
    assert_eq!(port.ask("POST", "/quitquitquit").await.status, 503, "a full queue is said, not waited for");
    // A body that nobody reads does no harm.
    let _ = port.actions.recv().await;
    assert_eq!(port.ask_with("POST", "/quitquitquit", "content-length: 99999999999\r\n").await.status, 200);
}

#[tokio::test]
async fn an_oversized_head_is_refused() {
    let port = port().await;
    let answer = port.ask_with("GET", "/ready", &format!("x: {}\r\n", "x".repeat(20 << 10))).await;
    assert_eq!(answer.status, 431);
}

#[tokio::test]
async fn idle_clients_are_bounded_and_the_tick_goes_on() {
    let mut port = port().await;
    let mut idle = Vec::new();
    for _ in 0..server::CONNECTIONS_MAX {
        idle.push(TcpStream::connect(port.address).await.expect("connects"));
    }
    let waiting = tokio::time::timeout(Duration::from_millis(300), port.ask("GET", "/help")).await;
    assert!(waiting.is_err(), "a connection beyond the bound was served");
    for _ in 0..channel::EVENTS_MAX + 10 {
        port.worker.send(Event::Adopted { worker: 0, generation: 1 });
    }
    let dropped = port.worker.cells.events_dropped.value();
    tokio::time::sleep(TICK_MAX * 2).await;
    port.worker.send(Event::Adopted { worker: 0, generation: 2 });
    assert_eq!(port.worker.cells.events_dropped.value(), dropped, "the hub is drained although the port is full");
    idle.clear();
    assert_eq!(port.ask("GET", "/help").await.status, 200);
}

#[tokio::test]
async fn a_port_that_others_can_reach_is_warned_of() {
    let exposed = TcpListener::bind("0.0.0.0:0").await.expect("a free port");
    let local = TcpListener::bind("[::1]:0").await;
    let text = said(|| warn_if_exposed(&exposed));
    assert!(text.contains("WARN") && text.contains("0.0.0.0:") && text.contains("-admin-bind"), "{text}");
    // A host may have no IPv6.
    let local = match local {
        Ok(local) => local,
        Err(_) => TcpListener::bind("127.0.0.1:0").await.expect("a free port"),
    };
    assert!(!said(|| warn_if_exposed(&local)).contains("WARN"));
}

#[tokio::test]
async fn shutdown_takes_the_last_events_and_writes_the_logs_out() {
    let folder = tempfile::tempdir().expect("folder");
    let (connections, access) = (folder.path().join("c.log"), folder.path().join("a.log"));
    let settings = Settings { access_log: Destination::File(access.clone()), ..Settings::default() };
    let mut port = port_with(Destination::File(connections.clone()), settings).await;
    let _open = TcpStream::connect(port.address).await.expect("an idle client does not hold the end up");
    assert_eq!(port.ask("GET", "/help").await.status, 200);
    // Fewer bytes than the log may hold back, so that a slow disk cannot make it drop lines.
    let records = channel::EVENTS_MAX / 2;
    for _ in 0..records {
        port.worker.send(Event::Connection(Box::new(inbound(true))));
    }
    port.shutdown.send_replace(true);
    tokio::time::timeout(Duration::from_secs(5), port.running).await.expect("ends in time").expect("ends well");
    assert_eq!(std::fs::read_to_string(connections).expect("log").lines().count(), records);
    let access = std::fs::read_to_string(access).expect("access log");
    assert!(access.contains("\"GET /help\" 200 "), "{access}");
}
