//! In steady state a worker allocates nothing and moves no payload byte in user space, and enters the kernel a counted
//! number of times: a pair of sidecars on the real kernel, without and with a mesh gateway between them, measured by a counting
//! allocator and the workers' own cells.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringfence::config::DataPlane;
use ringfence::mesh::router::{Match, Route, Router, RouterSettings, Way};
use ringfence::mesh::{Address, Bind, Endpoint, Identity, PublicListener, Service, Snapshot, Target, Upstream};
use ringfence::policy::{DefaultPolicy, Intentions};
use ringfence::proxy::{self, Workers};
use ringfence::store::{self, Publisher};
use ringfence::sys::handover::Inherited;
use ringfence::telemetry::cells::WorkerCells;
use ringfence::telemetry::channel;
use ringfence::tls::fixtures::Ca;
use ringfence::tls::{TlsParams, WorkerTls};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: std::cell::Cell<Option<bool>> = const { std::cell::Cell::new(None) };
}

/// Counts on worker threads only; a thread's name is looked at once, after it was given.
fn count() {
    let counted = COUNTED.try_with(|counted| match counted.get() {
        Some(known) => known,
        None => {
            counted.set(Some(false));
            let mut name = [0_u8; 16];
            // The kernel's own name for the thread: asking std would allocate.
            if let Ok(mut file) = std::fs::File::open("/proc/thread-self/comm") {
                let _ = file.read(&mut name);
            }
            let is_worker = name.starts_with(b"worker-");
            counted.set(Some(is_worker));
            is_worker
        }
    });
    if counted == Ok(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

#[allow(unsafe_code, reason = "a global allocator is an unsafe trait; it only counts and passes on")]
// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps GlobalAlloc's contract, which is passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Side {
    workers: Workers,
    _publisher: Publisher<Snapshot>,
    cells: Arc<WorkerCells>,
    _events: channel::Receiver,
}

fn side(service: Service) -> Side {
    side_of(Snapshot { services: vec![Arc::new(service)], ..Snapshot::default() })
}

fn side_of(snapshot: Snapshot) -> Side {
    let plane = DataPlane { workers: 1, ..DataPlane::default() };
    let (mut publisher, readers) = store::new(Snapshot::default(), 1);
    let (sender, events) = channel::pair();
    let cells = Arc::clone(&sender.cells);
    let workers = proxy::spawn(&plane, readers, vec![sender], Vec::new(), &mut Inherited::default()).expect("workers start");
    for wake in workers.wakes() {
        publisher.add_wake(wake);
    }
    publisher.publish(snapshot);
    Side { workers, _publisher: publisher, cells, _events: events }
}

fn identity(ca: &Ca, service: &str) -> Arc<Identity> {
    let (svid, bundle) = (ca.svid(service), ca.bundle());
    let tls = WorkerTls::new(&svid, &bundle, &TlsParams::default()).expect("a good identity");
    Arc::new(Identity { svid: Arc::new(svid), bundle, tls: vec![tls] })
}

fn free_port() -> SocketAddr {
    // Below the ephemeral range, so that no outgoing connection takes it meanwhile.
    (0..1_000_u16)
        .map(|offset| 20_000 + (std::process::id() as u16 % 5_000) + offset)
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
        .find(|address| TcpListener::bind(address).is_ok())
        .expect("a free port")
}

/// Client and server, the gateway between them if there is to be one, and where the client listens.
fn mesh(app: SocketAddr, through_gateway: bool) -> (Vec<Side>, SocketAddr) {
    let ca = Ca::new("mesh.consul");
    let public = free_port();
    let server = side(Service {
        name: "warehouse".into(),
        proxy_id: "warehouse-sidecar-proxy".into(),
        identity: Some(identity(&ca, "warehouse")),
        intentions: Arc::new(Intentions::new(Vec::new(), DefaultPolicy::Allow)),
        public: Some(Arc::new(PublicListener {
            bind: Bind::Tcp(public),
            app: vec![Address::Tcp(app)],
            local_connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            local_keepalive: None,
            max_inbound_connections: 0,
            idle_timeout: None,
        })),
        upstreams: Vec::new(),
    });
    wait_for("the public listener", || TcpStream::connect(public).is_ok());
    let gateway = through_gateway.then(|| gateway(public));
    let endpoint = gateway.as_ref().map_or(public, |(_, front)| *front);
    let listen = free_port();
    let target = Target {
        id: "warehouse".into(),
        sni: "warehouse.default.dc1.internal.mesh.consul".into(),
        expected: [ca.svid("warehouse").id.clone()].into(),
        endpoints: [Endpoint { address: endpoint, weight: 1, healthy: true }].into(),
        access: None,
    };
    let client = side(Service {
        name: "airflow-worker".into(),
        proxy_id: "airflow-worker-sidecar-proxy".into(),
        identity: Some(identity(&ca, "airflow-worker")),
        intentions: Arc::new(Intentions::unknown()),
        public: None,
        upstreams: vec![Arc::new(Upstream::new("warehouse", Bind::Tcp(listen), vec![Arc::new(target)]))],
    });
    wait_for("the upstream listener", || TcpStream::connect(listen).is_ok());
    (gateway.into_iter().map(|(side, _)| side).chain([client, server]).collect(), listen)
}

/// A router that passes the warehouse's TLS on to `public`, and where it listens.
fn gateway(public: SocketAddr) -> (Side, SocketAddr) {
    let front = free_port();
    let name = "warehouse.default.dc1.internal.mesh.consul";
    let target = Target {
        id: "warehouse".into(),
        sni: name.into(),
        expected: [].into(),
        endpoints: [Endpoint { address: public, weight: 1, healthy: true }].into(),
        access: None,
    };
    let cluster = Upstream::new(name, Bind::Tcp(front), vec![Arc::new(target)]);
    let matches = Match { server_names: vec![name.parse().expect("a server name")], ..Match::default() };
    let route = Route { name: name.into(), matches, way: Way::Forward(Arc::new(cluster)) };
    let settings = RouterSettings {
        name: "default".into(),
        service: "mesh-gateway".into(),
        proxy_id: "mesh-gateway".into(),
        bind: Bind::Tcp(front),
        transparent: false,
        permissive: false,
        inspect_timeout: Duration::from_secs(10),
        silent_is_raw: false,
        routes: vec![Arc::new(route)],
        fallback: None,
    };
    let router = Router::new(settings).expect("a good router");
    let side = side_of(Snapshot { routers: vec![Arc::new(router)], ..Snapshot::default() });
    wait_for("the gateway", || TcpStream::connect(front).is_ok());
    (side, front)
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come in time");
        std::thread::yield_now();
    }
}

/// Echoes each connection on its own thread.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let address = listener.local_addr().expect("address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut reader, mut writer) = (stream.try_clone().expect("dup"), stream);
                let mut buffer = vec![0; 256 << 10];
                while let Ok(read @ 1..) = reader.read(&mut buffer) {
                    if writer.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

fn exchange(stream: &mut TcpStream, request: &[u8], answer: &mut [u8]) {
    stream.write_all(request).expect("request");
    stream.read_exact(answer).expect("answer");
    assert_eq!(request, answer);
}

/// Sends `mib` MiB and reads as many back, with a pattern that shows any slip.
fn bulk(stream: &TcpStream, mib: usize) {
    let chunk: Vec<u8> = (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().expect("dup");
        let sent = &chunk;
        scope.spawn(move || (0..mib).for_each(|_| writer.write_all(sent).expect("write")));
        let mut reader = stream.try_clone().expect("dup");
        let mut received = vec![0; chunk.len()];
        for _ in 0..mib {
            reader.read_exact(&mut received).expect("read");
            assert!(received == chunk, "bytes changed on the way");
        }
    });
}

/// Until every flow has the regions that a bulk gets: on a busy machine receives stay small for a while.
fn warm_up(stream: &TcpStream) {
    const ROUNDS_MAX: usize = 16;
    let settled = (0..ROUNDS_MAX).any(|_| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        bulk(stream, 64);
        ALLOCATIONS.load(Ordering::Relaxed) == before
    });
    assert!(settled, "each of {ROUNDS_MAX} bulks allocated: there is no steady state");
}

#[test]
fn steady_state_allocates_nothing_and_moves_nothing() {
    for through_gateway in [false, true] {
        let (sides, listen) = mesh(echo(), through_gateway);
        println!("{} proxies:", sides.len());
        measure(&sides, listen);
        for side in sides {
            side.workers.stop();
            side.workers.join().expect("clean end");
        }
    }
}

fn measure(sides: &[Side], listen: SocketAddr) {
    let mut stream = TcpStream::connect(listen).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    let all = |value: fn(&WorkerCells) -> u64| sides.iter().map(|side| value(&side.cells)).sum::<u64>();
    let enters = |cells: &WorkerCells| cells.enters.value();
    let (request, mut answer) = (vec![7_u8; 100], vec![0_u8; 100]);

    (0..500).for_each(|_| exchange(&mut stream, &request, &mut answer));
    let (allocations, before) = (ALLOCATIONS.load(Ordering::Relaxed), all(enters));
    assert!(allocations > 0, "the counter does not see the worker threads");
    let requests = 2_000;
    (0..requests).for_each(|_| exchange(&mut stream, &request, &mut answer));
    let (allocated, entered) = (ALLOCATIONS.load(Ordering::Relaxed) - allocations, all(enters) - before);
    println!(
        "request/response of 100 B: {:.2} io_uring_enter a request for all of them, {allocated} allocations",
        entered as f64 / f64::from(requests)
    );
    assert_eq!(allocated, 0, "a request allocates");

    warm_up(&stream);
    let (allocations, before) = (ALLOCATIONS.load(Ordering::Relaxed), all(enters));
    let moved = all(|cells| cells.payload_bytes_moved.value());
    let mib = 256;
    bulk(&stream, mib);
    let (allocated, entered) = (ALLOCATIONS.load(Ordering::Relaxed) - allocations, all(enters) - before);
    let moved = all(|cells| cells.payload_bytes_moved.value()) - moved;
    println!(
        "bulk both ways: {:.2} io_uring_enter a MiB for all of them, {allocated} allocations, {moved} payload bytes moved",
        entered as f64 / (2 * mib) as f64
    );
    assert_eq!(allocated, 0, "bulk allocates");
    assert_eq!(moved, 0, "payload was moved in user space");
}
