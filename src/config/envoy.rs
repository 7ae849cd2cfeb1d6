//! What Envoy's bootstrap says, typed: where the xDS stream goes, which small listeners this process has of its own, how
//! stats are named and sent. Filled by `cli::envoy` from a bootstrap, or from `consul connect envoy`'s settings.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

/// Envoy's default between two flushes of stats to sinks.
pub const STATS_FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// Consul's default of `-prometheus-scrape-path`.
pub const SCRAPE_PATH: &str = "/metrics";

/// Consul's xDS server, and who this proxy is to it.
#[derive(Clone, PartialEq)]
pub struct Xds {
    /// `node.id`: the proxy's service id.
    pub node_id: String,
    /// `node.cluster`: the service.
    pub node_cluster: String,
    /// `node.metadata`, as JSON.
    pub node_metadata: serde_json::Map<String, serde_json::Value>,
    /// The cluster that `ads_config` names (`local_agent`); none runs on the static resources alone.
    pub server: Option<GrpcServer>,
    /// `initial_metadata`: `x-consul-token` is among it.
    pub initial_metadata: Vec<(String, Zeroizing<String>)>,
    /// Listeners of the bootstrap that are not this process's own pages: each an encoded `envoy.config.listener.v3.Listener`.
    pub static_listeners: Vec<Vec<u8>>,
    /// Clusters of the bootstrap that traffic may go to: each an encoded `envoy.config.cluster.v3.Cluster`.
    pub static_clusters: Vec<Vec<u8>>,
    /// Static clusters that a gRPC server can be behind, by name: some may be where secrets come from.
    pub grpc_servers: std::collections::BTreeMap<String, GrpcServer>,
    /// HTTP services are served as bytes: their apps do not trust `x-forwarded-client-cert`, which nobody writes then.
    pub http_as_tcp: bool,
    /// The bootstrap as `/config_dump` may show it: canonical proto JSON without secrets.
    pub bootstrap: serde_json::Value,
}

/// Without the token, and without the static resources, which may hold keys.
impl std::fmt::Debug for Xds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let server = self.server.as_ref().map(|server| &server.addresses);
        f.debug_struct("Xds").field("node_id", &self.node_id).field("server", &server).finish_non_exhaustive()
    }
}

/// Where a gRPC server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcServer {
    /// Tried in turn; a host name is resolved at each connect.
    pub addresses: Vec<GrpcAddress>,
    /// TLS to it, when the cluster has a transport socket.
    pub tls: Option<GrpcTls>,
    /// The cluster's `connect_timeout`.
    pub connect_timeout: Duration,
}

/// One address of a gRPC server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrpcAddress {
    /// Host name or IP address, and port.
    Tcp(String, u16),
    /// A unix stream socket.
    Unix(PathBuf),
}

/// How a gRPC server is verified.
#[derive(Clone, PartialEq, Eq)]
pub struct GrpcTls {
    /// PEM of the CAs that are trusted.
    pub ca_pem: String,
    /// Server name to send and to verify; the address where absent.
    pub server_name: Option<String>,
    /// Certificate chain and key in PEM, when the server wants them.
    pub client: Option<(String, Zeroizing<String>)>,
}

/// Without the key.
impl std::fmt::Debug for GrpcTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrpcTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// A listener that serves some of this process's own admin pages, as Consul adds them to a bootstrap for Prometheus, stats
/// and readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageListener {
    /// Its name, for logs.
    pub name: String,
    /// Where.
    pub bind: SocketAddr,
    /// First match wins; nothing matches: 404.
    pub routes: Vec<PageRoute>,
    /// Where TLS is asked for: certificate chain and key files in PEM, and the CA file that clients are verified against.
    pub tls: Option<PageTls>,
    /// Who may connect, by network address and prefix length; everybody where there is none.
    pub sources: Vec<(IpAddr, u8)>,
}

/// One route of a [`PageListener`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRoute {
    /// What is matched.
    pub path: PathMatch,
    /// The answer.
    pub answer: PageAnswer,
}

/// How a path is matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// The whole path, without the query.
    Exact(String),
    /// Its beginning.
    Prefix(String),
}

/// What a [`PageRoute`] leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageAnswer {
    /// This process's admin port, with the matched part of the path replaced where `rewrite` is given.
    Admin {
        /// `prefix_rewrite`.
        rewrite: Option<String>,
    },
    /// Another local HTTP server (`-prometheus-backend-port`, `expose`).
    Backend {
        /// Where.
        address: SocketAddr,
        /// `prefix_rewrite`.
        rewrite: Option<String>,
        /// It speaks HTTP/2 without TLS and from the first byte, as gRPC does; otherwise HTTP/1.1.
        http2: bool,
    },
    /// A fixed status without a body.
    Status(u16),
}

/// TLS of a [`PageListener`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageTls {
    /// Certificate chain, PEM file.
    pub cert_file: PathBuf,
    /// Key, PEM file.
    pub key_file: PathBuf,
    /// CAs of clients, PEM file or folder; none asks for no certificate.
    pub ca: Option<PathBuf>,
}

/// What flags of `consul connect envoy` say of the listener that `envoy_prometheus_bind_addr` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scrape {
    /// `-prometheus-scrape-path`.
    pub path: String,
    /// `-prometheus-backend-port`: what answers in the admin port's place.
    pub backend: Option<SocketAddr>,
    /// `-prometheus-cert-file` and its companions.
    pub tls: Option<PageTls>,
}

impl Default for Scrape {
    fn default() -> Self {
        Self { path: SCRAPE_PATH.to_owned(), backend: None, tls: None }
    }
}

/// How stats are tagged and where they are sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// `stats_config.stats_tags`, in order.
    pub tags: Vec<StatTag>,
    /// `use_all_default_tags`: Envoy's own tags besides.
    pub default_tags: bool,
    /// `stats_sinks`.
    pub sinks: Vec<StatSink>,
    /// `stats_flush_interval`.
    pub flush_interval: Duration,
    /// Envoy's stats that stayed zero, and ringfence's own of upstreams that were never used, are left out of Prometheus' format,
    /// as with `?usedonly`.
    pub omit_unused: bool,
    /// `-omit-deprecated-tags`: of Consul's tags only the names since 1.9, where this process brings them itself.
    pub omit_deprecated_tags: bool,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            tags: Vec::new(),
            default_tags: true,
            sinks: Vec::new(),
            flush_interval: STATS_FLUSH_INTERVAL,
            omit_unused: false,
            omit_deprecated_tags: false,
        }
    }
}

/// One entry of `stats_tags`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatTag {
    /// `tag_name`.
    pub name: String,
    /// Where its value comes from.
    pub value: StatTagValue,
}

/// Where a tag's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatTagValue {
    /// `fixed_value`.
    Fixed(String),
    /// `regex`: the first group is cut out of the name, the second (or the first) is the value.
    Regex(String),
}

/// Where stats are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatSink {
    /// Statsd's lines, or with tags as DogStatsD has them.
    pub dialect: StatDialect,
    /// Where.
    pub address: StatAddress,
    /// `prefix`; Envoy's default is `envoy`.
    pub prefix: String,
}

/// How a sink writes its lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatDialect {
    /// `name:value|type`.
    Statsd,
    /// With `|#tag:value`.
    DogStatsd,
}

/// How a sink is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatAddress {
    /// Datagrams.
    Udp(SocketAddr),
    /// Datagrams to a unix socket.
    Unix(PathBuf),
    /// A stream (`tcp_cluster_name`).
    Tcp(SocketAddr),
}

/// One access log, as `accessLogs` of Consul's proxy-defaults or a listener's `access_log` sets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLog {
    /// Where lines go.
    pub target: super::LogTarget,
    /// How a line looks.
    pub format: AccessLogFormat,
    /// Those connections that no listener wanted (Consul's `listenerLogs`, filter on the flag NR) instead of all others.
    pub unmatched_only: bool,
    /// Of these listeners alone. `None` is all.
    pub only: Option<BTreeSet<Logged>>,
}

/// Whose connections an access log has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Logged {
    /// The local service, where there may be several.
    pub service: Option<String>,
    /// An upstream, route or router; none is whatever comes in by mutual TLS.
    pub upstream: Option<String>,
}

/// The shape of access log lines; operators are Envoy's (`%START_TIME%`, `%RESPONSE_FLAGS%`, ...).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogFormat {
    /// Envoy's default text format.
    Default,
    /// `text_format`.
    Text(String),
    /// `json_format`: strings may hold operators.
    Json(serde_json::Map<String, serde_json::Value>),
}

impl AccessLogFormat {
    /// Consul's JSON format where `accessLogs` gives none (`agent/xds/accesslogs`).
    pub fn consul() -> Self {
        let keys = [
            ("start_time", "%START_TIME%"),
            ("route_name", "%ROUTE_NAME%"),
            ("method", "%REQ(:METHOD)%"),
            ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
            ("protocol", "%PROTOCOL%"),
            ("response_code", "%RESPONSE_CODE%"),
            ("response_flags", "%RESPONSE_FLAGS%"),
            ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
            ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
            ("bytes_received", "%BYTES_RECEIVED%"),
            ("bytes_sent", "%BYTES_SENT%"),
            ("duration", "%DURATION%"),
            ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
            ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
            ("user_agent", "%REQ(USER-AGENT)%"),
            ("request_id", "%REQ(X-REQUEST-ID)%"),
            ("authority", "%REQ(:AUTHORITY)%"),
            ("upstream_host", "%UPSTREAM_HOST%"),
            ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
            ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
            ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
            ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
            ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
            ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
        ];
        Self::Json(keys.into_iter().map(|(key, operator)| (key.to_owned(), operator.into())).collect())
    }
}
