//! An admin port in this process, fed with connections of tasks by hand: what the page and the commands show is then known to
//! the letter.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    reason = "as the rest of the harness: each test uses its own part"
)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ringfence::admin::{self, Lifecycle};
use ringfence::identity::{SpiffeId, Svid, TrustBundle};
use ringfence::mesh::caller::{Caller, Grant, Refusal, Stranger, Task, Tier, Who};
use ringfence::mesh::{Bind, Endpoint, Identity, Service, Snapshot, Target, Upstream};
use ringfence::policy::{Action, DefaultPolicy, Ground, Intention, Intentions};
use ringfence::store::{self, Publisher, Reader};
use ringfence::telemetry::cells::{Direction, ListenerCells};
use ringfence::telemetry::channel::{self, Sender};
use ringfence::telemetry::close::CloseReason;
use ringfence::telemetry::denial::DenialId;
use ringfence::telemetry::hub::Hub;
use ringfence::telemetry::log::{ConnectionLog, Destination, Reopener};
use ringfence::telemetry::record::{ConnectionRecord, Decision, Event};
use tokio::sync::{mpsc, watch};

/// The port, and the worker that tells it things.
pub struct Port {
    pub address: SocketAddr,
    worker: Sender,
    publisher: Publisher<Snapshot>,
    _readers: Vec<Reader<Snapshot>>,
    shutdown: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Port {
    pub fn start() -> Self {
        let (worker, receiver) = channel::pair();
        let (publisher, readers) = store::new(Snapshot::default(), 1);
        let viewer = publisher.viewer();
        let (shutdown, shutdown_seen) = watch::channel(false);
        let listener = super::support::ports::listener();
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("nonblocking");
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let log = ConnectionLog::open(&Destination::None, &Reopener::default()).expect("opens");
                let (_status, status) = watch::channel(ringfence::control::Status::default());
                let (_lifecycle, lifecycle) = watch::channel(Lifecycle::Live);
                let (_upgrade, upgrade) = watch::channel(admin::Upgrade::default());
                let (actions, _actions) = mpsc::channel(1);
                let settings = admin::Settings::default();
                let hub = Hub::new(vec![receiver], log);
                let closing = shutdown_seen.clone();
                let resources = ringfence::control::dump::channel().1;
                let context = admin::Context { hub, viewer, status, resources, lifecycle, upgrade, actions, closing, settings };
                let listener = tokio::net::TcpListener::from_std(listener).expect("listens");
                admin::run(listener, context, shutdown_seen).await;
            });
        });
        Self { address, worker, publisher, _readers: readers, shutdown, thread: Some(thread) }
    }

    pub fn publish(&mut self, snapshot: Snapshot) {
        self.publisher.publish(snapshot);
    }

    /// A connection of `caller` to `upstream` closed.
    pub fn closed(&mut self, caller: Caller, upstream: &str) {
        assert!(self.worker.send(Event::Connection(Box::new(record(caller, upstream)))));
    }

    /// One was denied by an intention of the upstream, or because the caller has no identity. Gives its id.
    pub fn denied(&mut self, caller: Caller, upstream: &str, number: u32) -> String {
        let id = DenialId::new(0x00ab_cdef, 1, number);
        let identity = caller.verdict.as_ref().ok().map(|grant| Arc::clone(grant.identity()));
        let by = identity.as_ref().map(|identity| format!("{identity} -> {upstream} deny (precedence 9)"));
        let record = ConnectionRecord {
            source: identity.as_ref().map(|identity| spiffe(identity)),
            decision: by.map(|by| Decision { allowed: false, by: Ground::Intention(by.into()) }),
            denial: Some(id),
            reason: CloseReason::CallerDenied,
            bytes_from_mesh: 0,
            ..record(caller, upstream)
        };
        assert!(self.worker.send(Event::Connection(Box::new(record))));
        id.to_string()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.shutdown.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; the test fails by itself.
            let _ = thread.join();
        }
    }
}

pub fn spiffe(service: &str) -> SpiffeId {
    SpiffeId::service("t.consul", "", "", "dc1", service).expect("valid")
}

/// A task with an identity of its DAG's rule.
pub fn task(dag: &str, task: &str, identity: &str) -> Caller {
    let (run, instance) = ("manual__2026-11-24".into(), "".into());
    let task = Task { dag: dag.into(), task: task.into(), run, try_number: 1, map_index: -1, instance };
    let grant = Grant::by_rule(identity.into(), "by-dag".into());
    Caller { who: Who::Task(Arc::new(task)), tier: Tier::Cgroup, verdict: Ok(grant) }
}

/// A process that nobody knows.
pub fn stranger(command: &str) -> Caller {
    let stranger = Stranger { uid: Some(1_000), pid: Some(4_711), command: command.into(), ancestry: "bash, sshd".into() };
    let refusal = Refusal { rule: "default".into(), why: "nobody known opened it".into(), remedy: "run it as a task".into() };
    Caller { who: Who::Stranger(stranger), tier: Tier::Unidentified, verdict: Err(refusal) }
}

fn record(caller: Caller, upstream: &str) -> ConnectionRecord {
    let cells = ListenerCells::new(Direction::Outbound, "airflow-worker".into(), Some(upstream.into()));
    ConnectionRecord {
        start: SystemTime::now() - Duration::from_secs(3),
        caller: Some(Arc::new(caller)),
        bytes_from_mesh: 2_048,
        bytes_to_mesh: 512,
        total: Duration::from_secs(1),
        attempts: 1,
        reason: CloseReason::Complete,
        ..ConnectionRecord::new(&cells, Some(([127, 0, 0, 1], 30_001).into()))
    }
}

/// A worker host: upstream `warehouse` that lets `airflow-payroll` in and nobody else, and a certificate for each of `warm`.
pub fn snapshot(warm: &[&str]) -> Snapshot {
    let allow = Intention {
        id: String::new(),
        source: "airflow-payroll".into(),
        source_namespace: String::new(),
        source_partition: String::new(),
        source_peer: String::new(),
        destination: "warehouse".into(),
        action: Action::Allow,
        precedence: 9,
    };
    let target = Target {
        id: "warehouse.default.dc1".into(),
        sni: "warehouse.default.dc1.internal.t.consul".into(),
        expected: [spiffe("warehouse")].into(),
        endpoints: [Endpoint { address: ([10, 0, 0, 9], 20_000).into(), weight: 1, healthy: true }].into(),
        access: Some(Arc::new(Intentions::new(vec![allow], DefaultPolicy::Deny))),
    };
    let upstream = Upstream::new("warehouse", Bind::Tcp(([127, 0, 0, 1], 25_435).into()), vec![Arc::new(target)]);
    let service = Service {
        name: "airflow-worker".into(),
        proxy_id: "airflow-worker-sidecar-proxy".into(),
        identity: Some(identity("airflow-worker")),
        intentions: Arc::new(Intentions::unknown()),
        public: None,
        upstreams: vec![Arc::new(upstream)],
    };
    let identities: HashMap<_, _> = warm.iter().map(|name| (Arc::from(*name), identity(name))).collect();
    Snapshot { services: vec![Arc::new(service)], identities: Arc::new(identities), ..Snapshot::default() }
}

fn identity(service: &str) -> Arc<Identity> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
    let now = SystemTime::now();
    let svid = Svid {
        id: spiffe(service),
        chain: vec![CertificateDer::from(b"leaf".to_vec())],
        key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(b"no key".to_vec())),
        not_before: now - Duration::from_secs(3_600),
        not_after: now + Duration::from_secs(71 * 3_600 + 30),
        serial: "0a1b".into(),
    };
    let bundle = TrustBundle { trust_domain: "t.consul".into(), roots: Vec::new(), peers: Vec::new() };
    Arc::new(Identity { svid: Arc::new(svid), bundle: Arc::new(bundle), tls: Vec::new() })
}
