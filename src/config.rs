//! Typed settings. Flags and environment are parsed into these once (`cli`); after that nothing is validated again.
//!
//! Invariant: every default of the product lives here, with its source. Knows no room above it.

pub mod envoy;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

/// Consul's default agent address (`api/api.go`).
pub const AGENT_ADDRESS: &str = "127.0.0.1:8500";
/// Envoy's admin address under `consul connect envoy` (`-admin-bind`).
pub const ADMIN_BIND: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 19_000);
/// The version of Envoy that this process says it stands in for (`-envoy-version`).
pub const ENVOY_VERSION: &str = "1.40.0";
/// How long live connections go on after SIGTERM.
pub const DRAIN_TIME: Duration = Duration::from_secs(30);
/// How long live connections go on after SIGTERM where the service manager keeps the listening sockets: new connections wait as
/// long, and a peer's dial gives up after 5 s, handshake included ([`CONNECT_TIMEOUT`]).
pub const RESTART_DRAIN_TIME: Duration = Duration::from_secs(3);
/// How long connections may go on in a process whose sockets another one has taken over: a task runs for hours.
pub const HANDOVER_DRAIN: Duration = Duration::from_secs(24 * 3_600);
/// How long a process that shall take over may need to become ready.
pub const HANDOVER_TIMEOUT: Duration = Duration::from_secs(60);
/// TCP keepalive on both legs, where a cluster has none of its own.
pub const KEEPALIVE: Duration = Duration::from_secs(60);
/// Public listener's handshake bound (built-in proxy's default; Envoy has none).
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Dialing the app: Envoy's default (the built-in proxy's is 1 s).
pub const LOCAL_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Dialing an upstream, handshake included: Envoy's and the resolver's default.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an accepted connection waits for the first certificate or the first endpoints.
pub const HOLD_TIME: Duration = Duration::from_secs(10);
/// Envoy's `healthy_panic_threshold` of a cluster that says nothing of it.
pub const PANIC_PERCENT: u32 = 50;
/// Envoy's circuit breaker default for connections of a cluster.
pub const UPSTREAM_CONNECTIONS_MAX: u32 = 1_024;
/// Connections that one worker carries at once.
pub const WORKER_CONNECTIONS_MAX: u32 = 65_536;
/// Handshakes that one worker has under way at once.
pub const WORKER_HANDSHAKES_MAX: u32 = 1_024;
/// Buffer memory that one worker may lease.
pub const WORKER_BUFFER_BYTES_MAX: usize = 64 << 20;

/// Where `ringfence agent` and `ringfence demo` listen: loopback, because the embedded agent has no access control.
pub const EMBEDDED_AGENT_BIND: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8_500);
/// How long the embedded agent's leaf certificates live: Consul's default.
pub const EMBEDDED_LEAF_TTL: Duration = Duration::from_secs(72 * 3_600);
/// Consul's own default datacenter name.
pub const DATACENTER: &str = "dc1";
/// Beyond the drain time, how long the workers have to close what is left before the process ends without them.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// One sidecar process, whole.
#[derive(Debug, Clone, Default)]
pub struct Sidecar {
    /// Consul's HTTP agent API, from which the mesh is learned.
    pub consul: Consul,
    /// Consul's xDS server, from which it is learned instead when this process stands in for Envoy.
    pub xds: Option<envoy::Xds>,
    /// The workers.
    pub plane: DataPlane,
    /// The admin port.
    pub admin: Admin,
    /// Where each connection's line goes.
    pub connection_log: LogTarget,
    /// Access logs in Envoy's formats, besides the connection log.
    pub access_logs: Vec<envoy::AccessLog>,
    /// How stats are named and sent.
    pub stats: envoy::Stats,
    /// Listeners for some of the admin pages.
    pub pages: Vec<envoy::PageListener>,
    /// `-airflow`: the rules that tell local callers apart; `None` has every caller speak as its listener's service.
    pub airflow: Option<PathBuf>,
}

/// The admin port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// `-admin-bind`; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// `-admin-access-log-path`; `None` (and `/dev/null`, Consul's default) writes none.
    pub access_log: Option<PathBuf>,
    /// `-envoy-version`: what `/server_info` and `/config_dump` say, `X.Y.Z`.
    pub envoy_version: String,
    /// `--admin-address-path`: a file that the address is written to once it is bound.
    pub address_path: Option<PathBuf>,
    /// `--component-log-level`: `NAME:LEVEL,...` of Envoy's loggers, checked.
    pub component_levels: String,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            bind: ADMIN_BIND,
            access_log: None,
            envoy_version: ENVOY_VERSION.to_owned(),
            address_path: None,
            component_levels: String::new(),
        }
    }
}

/// `-connection-log`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LogTarget {
    /// No connection log; counters still count.
    None,
    /// Standard output: where Envoy's users look for access logs.
    #[default]
    Stdout,
    /// Standard error, among the process's own log lines.
    Stderr,
    /// A file, appended to, opened again on SIGHUP.
    File(PathBuf),
}

/// The process's own log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// `-log-level`: trace, debug, info, warn or error.
    pub level: LogLevel,
    /// `-log-json`: one JSON object a line.
    pub json: bool,
}

impl Default for Logging {
    fn default() -> Self {
        Self { level: LogLevel::Info, json: false }
    }
}

/// How much the process says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// What a developer asks for.
    Debug,
    /// State changes.
    Info,
    /// What should be looked at.
    Warn,
    /// What is broken.
    Error,
    /// Nothing (Envoy's `off`).
    Off,
}

/// TCP keepalive of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keepalive {
    /// Dead peers are found by what is sent to them alone.
    Off,
    /// After so long without a word the peer is asked, so often until it counts as gone. What is none is the kernel's own.
    On {
        /// Before the first question.
        idle: Option<Duration>,
        /// Between two questions.
        interval: Option<Duration>,
        /// Questions without an answer.
        probes: Option<u32>,
    },
}

impl From<Duration> for Keepalive {
    /// By its idle time; zero switches it off.
    fn from(idle: Duration) -> Self {
        if idle.is_zero() {
            return Self::Off;
        }
        Self::On { idle: Some(idle), interval: Some((idle / 4).max(Duration::from_secs(1))), probes: Some(4) }
    }
}

/// What the data plane needs to know, whatever the control plane is.
#[derive(Debug, Clone)]
pub struct DataPlane {
    /// Worker threads, at least 1.
    pub workers: usize,
    /// TCP keepalive idle time on both legs, where a cluster has none of its own; zero switches it off.
    pub keepalive: Duration,
    /// See [`HOLD_TIME`].
    pub hold_time: Duration,
    /// See [`DRAIN_TIME`].
    pub drain_time: Duration,
    /// See [`RESTART_DRAIN_TIME`].
    pub restart_drain_time: Duration,
    /// Where connections that nftables redirects to this process come in; what they lead to is told by their callers' routes.
    pub redirects: Vec<SocketAddr>,
    /// The port, on every loopback address, at which leased addresses are reached.
    pub lease_port: Option<u16>,
    /// See [`WORKER_CONNECTIONS_MAX`].
    pub connections_max: u32,
    /// See [`WORKER_HANDSHAKES_MAX`].
    pub handshakes_max: u32,
    /// See [`WORKER_BUFFER_BYTES_MAX`].
    pub buffer_bytes_max: usize,
    /// Pin each worker to a core, when there is one for each core.
    pub pin: bool,
}

impl Default for DataPlane {
    fn default() -> Self {
        Self {
            workers: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            keepalive: KEEPALIVE,
            hold_time: HOLD_TIME,
            drain_time: DRAIN_TIME,
            restart_drain_time: RESTART_DRAIN_TIME,
            redirects: Vec::new(),
            lease_port: None,
            connections_max: WORKER_CONNECTIONS_MAX,
            handshakes_max: WORKER_HANDSHAKES_MAX,
            buffer_bytes_max: WORKER_BUFFER_BYTES_MAX,
            pin: true,
        }
    }
}

/// Which proxies this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proxy {
    /// `-sidecar-for ID`: the one sidecar registered for this service instance.
    SidecarFor(String),
    /// `-proxy-id ID`: this registration.
    ProxyId(String),
    /// `-service NAME …`: never registered; everything comes from flags.
    Service(ServiceProxy),
}

/// A service that was never registered as a sidecar (`consul connect proxy -service`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceProxy {
    /// Service name to be.
    pub name: String,
    /// `-listen`: the public listener; none accepts nothing from the mesh.
    pub listen: Option<SocketAddr>,
    /// `-service-addr`: the app behind it.
    pub service_address: Option<String>,
    /// `-upstream NAME:[ADDR:]PORT`.
    pub upstreams: Vec<UpstreamFlag>,
}

/// One `-upstream` flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamFlag {
    /// Destination service.
    pub destination: String,
    /// Local listener.
    pub bind: SocketAddr,
}

/// How the agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// `http://` or `https://`, with an optional path prefix.
    Http {
        /// Host name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
        /// Whether to speak TLS.
        tls: bool,
        /// Path prefix without a trailing slash; mostly empty.
        prefix: String,
    },
    /// `unix:///path`.
    Unix(PathBuf),
}

/// TLS towards the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentTls {
    /// `-ca-file`, CONSUL_CACERT.
    pub ca_file: Option<PathBuf>,
    /// `-ca-path`, CONSUL_CAPATH: a folder of PEM files.
    pub ca_path: Option<PathBuf>,
    /// `-client-cert`, CONSUL_CLIENT_CERT.
    pub client_cert: Option<PathBuf>,
    /// `-client-key`, CONSUL_CLIENT_KEY.
    pub client_key: Option<PathBuf>,
    /// `-tls-server-name`, CONSUL_TLS_SERVER_NAME.
    pub server_name: Option<String>,
    /// CONSUL_HTTP_SSL_VERIFY=false.
    pub skip_verify: bool,
}

/// Where the ACL token comes from.
#[derive(Clone, Default)]
pub enum TokenSource {
    /// None: the agent's default token or anonymous.
    #[default]
    None,
    /// `-token`, CONSUL_HTTP_TOKEN.
    Static(Zeroizing<String>),
    /// `-token-file`, CONSUL_HTTP_TOKEN_FILE: read again on change, on SIGHUP and on 403.
    File(PathBuf),
    /// `-login-method` and friends: a token by auth method, renewed at two thirds of its life.
    Login(Login),
}

/// Login with an auth method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// `-login-method`.
    pub method: String,
    /// `-login-bearer-token-file`: read again at each login.
    pub bearer_token_file: PathBuf,
    /// `-login-meta key=value`.
    pub meta: Vec<(String, String)>,
}

/// The HTTP feeder's settings.
#[derive(Debug, Clone)]
pub struct Consul {
    /// Agent address.
    pub address: AgentAddress,
    /// TLS towards it.
    pub tls: AgentTls,
    /// `user:password` of CONSUL_HTTP_AUTH.
    pub basic_auth: Option<Zeroizing<String>>,
    /// Token.
    pub token: TokenSource,
    /// Enterprise namespace; sent only when set.
    pub namespace: Option<String>,
    /// Enterprise partition; sent only when set.
    pub partition: Option<String>,
    /// `-datacenter`.
    pub datacenter: Option<String>,
    /// Name that mesh gateways are registered under.
    pub mesh_gateway_service: String,
    /// `-tls-resumption`: whether the TLS configurations made of leaf and roots resume their own sessions.
    pub tls_resumption: bool,
    /// Most identities of local callers with a certificate at once; 0 where callers are not told apart.
    pub caller_identities_max: usize,
    /// How Prometheus scrapes where a registration asks for a listener for it.
    pub scrape: envoy::Scrape,
    /// The proxies to run.
    pub proxies: Vec<Proxy>,
}

impl Default for Consul {
    fn default() -> Self {
        Self {
            address: AgentAddress::Http { host: "127.0.0.1".into(), port: 8_500, tls: false, prefix: String::new() },
            tls: AgentTls::default(),
            basic_auth: None,
            token: TokenSource::None,
            namespace: None,
            partition: None,
            datacenter: None,
            mesh_gateway_service: "mesh-gateway".into(),
            tls_resumption: true,
            caller_identities_max: 0,
            scrape: envoy::Scrape::default(),
            proxies: Vec::new(),
        }
    }
}

impl std::fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Static(_) => f.write_str("Static([redacted])"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Login(login) => f.debug_tuple("Login").field(login).finish(),
        }
    }
}
