//! The snapshot: all that a worker needs to enforce, immutable, built by the control plane and published whole.
//!
//! Invariant: everything in a [`Snapshot`] was validated before it was published; a worker checks nothing again. A part
//! that did not change between two snapshots is the same `Arc`, so workers see by pointer what they need not touch.
//!
//! Knows no Consul, no HTTP and no ring: the HTTP feeder and the xDS feeder both end here.

pub mod caller;
pub mod router;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::router::Router;
use crate::config::{self, Keepalive};
use crate::identity::{SpiffeId, Svid, TrustBundle};
use crate::policy::Intentions;
use crate::tls::{FrontTls, OutsideTls, WorkerTls};

/// One consistent state of the mesh as seen from this host.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Grows by one with each publication; 0 is the empty snapshot that workers start with. Set by `store::Publisher`.
    pub generation: u64,
    /// Every local service that this process fronts.
    pub services: Vec<Arc<Service>>,
    /// Listeners whose connections are told apart first: gateways, transparent proxying, permissive mode.
    pub routers: Vec<Arc<Router>>,
    /// Identities that local callers may be granted, by Consul service name; those with a valid leaf only.
    pub identities: Arc<HashMap<Arc<str>, Arc<Identity>>>,
}

/// Anything publishable: `store::Publisher` tells it its generation before it is shared.
pub trait Generation {
    /// Stores the generation that the publisher gave it.
    fn set_generation(&mut self, generation: u64);
}

impl Snapshot {
    /// Every service that TLS is spoken for, also on routes; one that stands at several places comes several times.
    pub fn all_services(&self) -> impl Iterator<Item = &Arc<Service>> {
        let of_routes = self.routers.iter().flat_map(|router| router.routes()).filter_map(|route| route.way.service());
        self.services.iter().chain(of_routes)
    }

    /// Every upstream, also on routes.
    pub fn all_upstreams(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        let of_routes = self.routers.iter().flat_map(|router| router.routes()).filter_map(|route| route.upstream());
        self.services.iter().flat_map(|service| &service.upstreams).chain(of_routes)
    }

    /// Every address that it has workers listen on.
    pub fn binds(&self) -> impl Iterator<Item = &Bind> {
        let of_services = self.services.iter().flat_map(|service| {
            let public = service.public.iter().map(|listener| &listener.bind);
            public.chain(service.upstreams.iter().map(|upstream| &upstream.bind))
        });
        of_services.chain(self.routers.iter().map(|router| &router.settings().bind))
    }
}

impl Target {
    /// The cluster that it is for Consul and Envoy: named as its SNI, or by its id where none is sent. Targets of one cluster
    /// that differ by priority alone have ids that differ after a `#`; those at original destinations have a name of their own
    /// (Consul's `makePassthroughClusters`) and the SNI of the cluster that is dialed otherwise.
    pub fn cluster(&self) -> &str {
        let by_id = self.sni.is_empty() || self.id.starts_with("passthrough~");
        if by_id { self.id.split('#').next().unwrap_or_default() } else { &self.sni }
    }
}

impl Generation for Snapshot {
    fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }
}

/// One local service: an identity, a way in, and ways out.
#[derive(Debug)]
pub struct Service {
    /// Service name as intentions write it.
    pub name: Arc<str>,
    /// Consul's id of the sidecar registration, for logs.
    pub proxy_id: Arc<str>,
    /// What the service presents and trusts. `None` until the first valid leaf: listeners hold connections meanwhile.
    pub identity: Option<Arc<Identity>>,
    /// Who may come in. [`Intentions::unknown`] until learned.
    pub intentions: Arc<Intentions>,
    /// Mutual TLS in, plain to the app.
    pub public: Option<Arc<PublicListener>>,
    /// Plain in, mutual TLS out.
    pub upstreams: Vec<Arc<Upstream>>,
}

/// An SVID with the bundle it is used with and the TLS configurations made of both, one a worker.
pub struct Identity {
    /// Certificate and key.
    pub svid: Arc<Svid>,
    /// Roots that peers are checked against.
    pub bundle: Arc<TrustBundle>,
    /// Indexed by worker, so that no reference count is shared between cores in a handshake.
    pub tls: Vec<WorkerTls>,
}

/// Where a listener accepts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Bind {
    /// A TCP address. Each worker has its own socket on it (`SO_REUSEPORT`).
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Permission bits to set, or what the umask leaves.
        mode: Option<u32>,
    },
}

/// Where a connection is opened to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix stream socket's path.
    Unix(PathBuf),
}

/// The public listener of a service and the app behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicListener {
    /// Where peers come in.
    pub bind: Bind,
    /// The app, in the order to try (a host name may resolve to several addresses).
    pub app: Vec<Address>,
    /// Bound on opening a connection to the app.
    pub local_connect_timeout: Duration,
    /// Keepalive towards the app; `None` is this proxy's own.
    pub local_keepalive: Option<Keepalive>,
    /// Bound on the TLS handshake.
    pub handshake_timeout: Duration,
    /// Most connections at once over all workers; 0 is unlimited.
    pub max_inbound_connections: u32,
    /// As [`Upstream::idle_timeout`].
    pub idle_timeout: Option<Duration>,
}

/// One upstream: a local listener and the targets behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Destination as configured, for logs and metrics (`db`, `prepared_query:db-query`, `db?dc=dc2`).
    pub name: Arc<str>,
    /// Where local clients connect.
    pub bind: Bind,
    /// Bound on TCP connect plus handshake.
    pub connect_timeout: Duration,
    /// How an endpoint is chosen.
    pub balance: Balance,
    /// Most connections at once over all workers; `None` is Envoy's 1,024, `Some(0)` blocks all.
    pub max_connections: Option<u32>,
    /// Passive health checking.
    pub outlier: Outlier,
    /// A connection that moves no byte either way for so long, or an eighth longer, is cut. `None` is never: Envoy's default of
    /// an hour cuts pooled database connections, and dead peers are found by keepalive.
    pub idle_timeout: Option<Duration>,
    /// With a smaller share of healthy members than this, in per cent, all of them are used: Envoy's panic threshold. 0 is never,
    /// which is Consul's setting for what discovery chains of a sidecar lead to.
    pub panic_percent: u32,
    /// Keepalive towards its members; `None` is this proxy's own.
    pub keepalive: Option<Keepalive>,
    /// Endpoints that one connection tries; `None` is this proxy's own number.
    pub connect_attempts: Option<u32>,
    /// What TLS clients must speak, where it is that of an ingress gateway; they speak in plain if none.
    pub front: Option<Arc<FrontTls>>,
    /// What TLS is spoken to its members with where it is the app behind a terminating gateway; plain if none.
    pub outside: Option<Arc<OutsideTls>>,
    /// Its one target has no endpoint of its own: a redirected connection goes where it wanted to.
    pub original: bool,
    /// How a local client that is denied is told.
    pub deny_reply: DenyReply,
    /// In failover order: a target is used only when none before it has a healthy endpoint.
    pub targets: Vec<Arc<Target>>,
}

impl Upstream {
    /// An upstream of which nothing else is said: Consul's defaults for what a discovery chain leads to, in plain towards clients.
    pub fn new(name: impl Into<Arc<str>>, bind: Bind, targets: Vec<Arc<Target>>) -> Self {
        Self {
            name: name.into(),
            bind,
            connect_timeout: config::CONNECT_TIMEOUT,
            balance: Balance::default(),
            max_connections: None,
            outlier: Outlier::default(),
            idle_timeout: None,
            panic_percent: 0,
            keepalive: None,
            connect_attempts: None,
            front: None,
            outside: None,
            original: false,
            deny_reply: DenyReply::default(),
            targets,
        }
    }
}

/// One resolved target of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Consul's opaque target id.
    pub id: Arc<str>,
    /// SNI to send, verbatim from Consul.
    pub sni: Arc<str>,
    /// The identities that may answer: exact URIs.
    pub expected: Arc<[SpiffeId]>,
    /// Where to dial, mesh gateways included.
    pub endpoints: Arc<[Endpoint]>,
    /// Who may call it, where this process knows: a caller whom the other side would refuse is turned away here, with the
    /// reason. It never lets anybody in: that is for the other side to decide.
    pub access: Option<Arc<Intentions>>,
}

/// The protocol in which a denied local client is told so. Never guessed from its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DenyReply {
    /// Only closed.
    #[default]
    Close,
    /// `ErrorResponse`.
    Postgres,
    /// `ERR_Packet`.
    Mysql,
    /// 403 with a JSON body.
    Http,
    /// `-NOPERM`.
    Redis,
}

/// One address of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Address to dial.
    pub address: SocketAddr,
    /// 1 to 128.
    pub weight: u32,
    /// Consul's health, computed as Envoy does; unhealthy ones are not dialed but below [`Upstream::panic_percent`].
    pub healthy: bool,
}

/// Load-balancing policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    /// Weighted, per worker.
    #[default]
    RoundRobin,
    /// The least loaded of `choices` random ones.
    LeastRequest {
        /// How many are compared, at least 2.
        choices: u32,
    },
    /// Weighted random.
    Random,
    /// Consistent hashing on the client's address.
    RingHash,
    /// Maglev on the client's address.
    Maglev,
}

/// Passive health checking with Envoy's meaning: consecutive connect failures eject an endpoint for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outlier {
    /// Consecutive failures that eject.
    pub max_failures: u32,
    /// Chance of ejection in per cent; 0 switches it off.
    pub enforcing_percent: u32,
    /// Most endpoints ejected at once, in per cent; at least one always may be.
    pub max_ejection_percent: u32,
    /// First ejection; the n-th lasts n times as long, at most 300 s.
    pub base_ejection: Duration,
    /// How often ejected endpoints are looked at again.
    pub interval: Duration,
}

impl Default for Outlier {
    /// Envoy's defaults, which Consul always switches on.
    fn default() -> Self {
        Self {
            max_failures: 5,
            enforcing_percent: 100,
            max_ejection_percent: 10,
            base_ejection: Duration::from_secs(30),
            interval: Duration::from_secs(10),
        }
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("svid", &self.svid)
            .field("trust_domain", &self.bundle.trust_domain)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Display for Bind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { path, .. } => write!(f, "unix://{}", path.display()),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}
