//! The fields of every document that the agent takes, as tables for the strict decoder.
//!
//! Names are Consul's, from its API documentation and the captured answers; opaque parts are marked so.

use super::Shape::{Duration as Span, Flag, Integer, List, Map as MapOf, Opaque, Struct as Object, Text};
use super::{Shape, Struct};

static TEXTS: Shape = List(&Text);
static ADDRESS: Struct = Struct(&[("Address", Text), ("Port", Integer)]);
static WEIGHTS: Struct = Struct(&[("Passing", Integer), ("Warning", Integer)]);
static MESH_GATEWAY: Struct = Struct(&[("Mode", Text)]);
static TRANSPARENT: Struct = Struct(&[("OutboundListenerPort", Integer), ("DialedDirectly", Flag)]);
static EXPOSE_PATH: Struct = Struct(&[
    ("Path", Text),
    ("ListenerPort", Integer),
    ("LocalPathPort", Integer),
    ("Protocol", Text),
    ("ParsedFromCheck", Flag),
]);
static EXPOSE: Struct = Struct(&[("Checks", Flag), ("Paths", List(&Object(&EXPOSE_PATH)))]);

static UPSTREAM: Struct = Struct(&[
    ("DestinationType", Text),
    ("DestinationNamespace", Text),
    ("DestinationPartition", Text),
    ("DestinationPeer", Text),
    ("DestinationName", Text),
    ("Datacenter", Text),
    ("LocalBindAddress", Text),
    ("LocalBindPort", Integer),
    ("LocalBindSocketPath", Text),
    ("LocalBindSocketMode", Text),
    ("Config", Opaque),
    ("MeshGateway", Object(&MESH_GATEWAY)),
    ("CentrallyConfigured", Flag),
]);

static PROXY: Struct = Struct(&[
    ("DestinationServiceName", Text),
    ("DestinationServiceID", Text),
    ("LocalServiceAddress", Text),
    ("LocalServicePort", Integer),
    ("LocalServiceSocketPath", Text),
    ("Mode", Text),
    ("TransparentProxy", Object(&TRANSPARENT)),
    ("Config", Opaque),
    ("Upstreams", List(&Object(&UPSTREAM))),
    ("MeshGateway", Object(&MESH_GATEWAY)),
    ("Expose", Object(&EXPOSE)),
]);

/// `PUT /v1/agent/check/register`, and `check` in a service.
pub(in crate::agent) static CHECK: Struct = Struct(&[
    ("ID", Text),
    ("CheckID", Text),
    ("Name", Text),
    ("Notes", Text),
    ("ServiceID", Text),
    ("Status", Text),
    ("Token", Text),
    ("Namespace", Text),
    ("ScriptArgs", TEXTS_SHAPE),
    ("Args", TEXTS_SHAPE),
    ("HTTP", Text),
    ("H2PING", Text),
    ("Header", MapOf(&TEXTS)),
    ("Method", Text),
    ("Body", Text),
    ("TCP", Text),
    ("UDP", Text),
    ("GRPC", Text),
    ("GRPCUseTLS", Flag),
    ("TLSSkipVerify", Flag),
    ("TLSServerName", Text),
    ("Shell", Text),
    ("DockerContainerID", Text),
    ("Interval", Span),
    ("Timeout", Span),
    ("TTL", Span),
    ("AliasNode", Text),
    ("AliasService", Text),
    ("SuccessBeforePassing", Integer),
    ("FailuresBeforeCritical", Integer),
    ("FailuresBeforeWarning", Integer),
    ("OutputMaxSize", Integer),
    ("DeregisterCriticalServiceAfter", Span),
]);

const TEXTS_SHAPE: Shape = List(&Text);

static CONNECT: Struct = Struct(&[("Native", Flag), ("SidecarService", Object(&SERVICE))]);

/// `PUT /v1/agent/service/register` and `service {}` in a file.
pub(in crate::agent) static SERVICE: Struct = Struct(&[
    ("Kind", Text),
    ("ID", Text),
    ("Name", Text),
    ("Service", Text),
    ("Tags", List(&Text)),
    ("Address", Text),
    ("TaggedAddresses", MapOf(&Object(&ADDRESS))),
    ("Meta", MapOf(&Text)),
    ("Port", Integer),
    ("SocketPath", Text),
    ("Check", Object(&CHECK)),
    ("Checks", List(&Object(&CHECK))),
    ("Weights", Object(&WEIGHTS)),
    ("Token", Text),
    ("EnableTagOverride", Flag),
    ("Proxy", Object(&PROXY)),
    ("Connect", Object(&CONNECT)),
    ("Namespace", Text),
    ("Partition", Text),
]);

static PERMISSION_SOURCE: Struct = Struct(&[
    ("Name", Text),
    ("Namespace", Text),
    ("Partition", Text),
    ("Peer", Text),
    ("SamenessGroup", Text),
    ("Action", Text),
    ("Permissions", List(&Opaque)),
    ("Precedence", Integer),
    ("Type", Text),
    ("Description", Text),
    ("LegacyID", Text),
    ("LegacyMeta", MapOf(&Text)),
    ("LegacyCreateTime", Text),
    ("LegacyUpdateTime", Text),
]);

static SUBSET: Struct = Struct(&[("Filter", Text), ("OnlyPassing", Flag)]);
static REDIRECT: Struct = Struct(&[
    ("Service", Text),
    ("ServiceSubset", Text),
    ("Namespace", Text),
    ("Partition", Text),
    ("Datacenter", Text),
    ("Peer", Text),
]);
static FAILOVER_TARGET: Struct = Struct(&[
    ("Service", Text),
    ("ServiceSubset", Text),
    ("Namespace", Text),
    ("Partition", Text),
    ("Datacenter", Text),
    ("Peer", Text),
]);
static FAILOVER: Struct = Struct(&[
    ("Service", Text),
    ("ServiceSubset", Text),
    ("Namespace", Text),
    ("Datacenters", List(&Text)),
    ("Targets", List(&Object(&FAILOVER_TARGET))),
]);
static LEAST_REQUEST: Struct = Struct(&[("ChoiceCount", Integer)]);
static RING_HASH: Struct = Struct(&[("MinimumRingSize", Integer), ("MaximumRingSize", Integer)]);
static LOAD_BALANCER: Struct = Struct(&[
    ("Policy", Text),
    ("RingHashConfig", Object(&RING_HASH)),
    ("LeastRequestConfig", Object(&LEAST_REQUEST)),
    ("HashPolicies", List(&Opaque)),
]);

const COMMON: [(&str, Shape); 6] =
    [("Kind", Text), ("Name", Text), ("Namespace", Text), ("Partition", Text), ("Meta", MapOf(&Text)), ("CreateIndex", Integer)];

static UPSTREAM_CONFIG: Struct = Struct(&[
    ("Name", Text),
    ("Namespace", Text),
    ("Partition", Text),
    ("Peer", Text),
    ("EnvoyListenerJSON", Text),
    ("EnvoyClusterJSON", Text),
    ("Protocol", Text),
    ("ConnectTimeoutMs", Integer),
    ("Limits", Opaque),
    ("PassiveHealthCheck", Opaque),
    ("MeshGateway", Object(&MESH_GATEWAY)),
    ("BalanceOutboundConnections", Text),
]);
static UPSTREAM_CONFIGS: Struct =
    Struct(&[("Defaults", Object(&UPSTREAM_CONFIG)), ("Overrides", List(&Object(&UPSTREAM_CONFIG)))]);

macro_rules! entry {
    ($($field:expr),* $(,)?) => {
        Struct(&[COMMON[0], COMMON[1], COMMON[2], COMMON[3], COMMON[4], COMMON[5], ("ModifyIndex", Integer), $($field),*])
    };
}

/// `proxy-defaults`.
pub(in crate::agent) static PROXY_DEFAULTS: Struct = entry![
    ("Config", Opaque),
    ("MeshGateway", Object(&MESH_GATEWAY)),
    ("Expose", Object(&EXPOSE)),
    ("Mode", Text),
    ("TransparentProxy", Object(&TRANSPARENT)),
];

/// `service-defaults`.
pub(in crate::agent) static SERVICE_DEFAULTS: Struct = entry![
    ("Protocol", Text),
    ("MeshGateway", Object(&MESH_GATEWAY)),
    ("Expose", Object(&EXPOSE)),
    ("ExternalSNI", Text),
    ("Mode", Text),
    ("TransparentProxy", Object(&TRANSPARENT)),
    ("UpstreamConfig", Object(&UPSTREAM_CONFIGS)),
    ("MaxInboundConnections", Integer),
    ("LocalConnectTimeoutMs", Integer),
    ("LocalRequestTimeoutMs", Integer),
    ("BalanceInboundConnections", Text),
];

/// `service-resolver`.
pub(in crate::agent) static SERVICE_RESOLVER: Struct = entry![
    ("DefaultSubset", Text),
    ("Subsets", MapOf(&Object(&SUBSET))),
    ("Redirect", Object(&REDIRECT)),
    ("Failover", MapOf(&Object(&FAILOVER))),
    ("ConnectTimeout", Span),
    ("RequestTimeout", Span),
    ("LoadBalancer", Object(&LOAD_BALANCER)),
];

/// `service-intentions`.
pub(in crate::agent) static SERVICE_INTENTIONS: Struct = entry![("Sources", List(&Object(&PERMISSION_SOURCE))), ("JWT", Opaque)];

/// `mesh`. Its parts are passed on as they are: only proxies read them.
pub(in crate::agent) static MESH: Struct = entry![
    ("TransparentProxy", Opaque),
    ("AllowEnablingPermissiveMutualTLS", Flag),
    ("TLS", Opaque),
    ("HTTP", Opaque),
    ("Peering", Opaque),
];

/// `POST /v1/connect/intentions` and friends, and `intentions = []` in a file.
pub(in crate::agent) static INTENTION: Struct = Struct(&[
    ("ID", Text),
    ("Description", Text),
    ("SourceNS", Text),
    ("SourceName", Text),
    ("SourcePartition", Text),
    ("SourcePeer", Text),
    ("SourceSamenessGroup", Text),
    ("DestinationNS", Text),
    ("DestinationName", Text),
    ("DestinationPartition", Text),
    ("SourceType", Text),
    ("Action", Text),
    ("Permissions", List(&Opaque)),
    ("DefaultAddr", Text),
    ("DefaultPort", Integer),
    ("Meta", MapOf(&Text)),
    ("Precedence", Integer),
    ("CreatedAt", Text),
    ("UpdatedAt", Text),
    ("Hash", Opaque),
    ("CreateIndex", Integer),
    ("ModifyIndex", Integer),
]);

static QUERY_FAILOVER: Struct =
    Struct(&[("NearestN", Integer), ("Datacenters", List(&Text)), ("Targets", List(&Object(&FAILOVER_TARGET)))]);
static QUERY_SERVICE: Struct = Struct(&[
    ("Service", Text),
    ("Failover", Object(&QUERY_FAILOVER)),
    ("OnlyPassing", Flag),
    ("IgnoreCheckIDs", List(&Text)),
    ("Near", Text),
    ("Tags", List(&Text)),
    ("NodeMeta", MapOf(&Text)),
    ("ServiceMeta", MapOf(&Text)),
    ("Connect", Flag),
    ("Namespace", Text),
    ("Partition", Text),
    ("Peer", Text),
    ("SamenessGroup", Text),
]);
static QUERY_DNS: Struct = Struct(&[("TTL", Text)]);
static QUERY_TEMPLATE: Struct = Struct(&[("Type", Text), ("Regexp", Text), ("RemoveEmptyTags", Flag)]);

/// `POST /v1/query`.
pub(in crate::agent) static QUERY: Struct = Struct(&[
    ("ID", Text),
    ("Name", Text),
    ("Session", Text),
    ("Token", Text),
    ("Template", Object(&QUERY_TEMPLATE)),
    ("Service", Object(&QUERY_SERVICE)),
    ("DNS", Object(&QUERY_DNS)),
    ("CreateIndex", Integer),
    ("ModifyIndex", Integer),
]);

/// `POST /v1/agent/connect/authorize`.
pub(in crate::agent) static AUTHORIZE: Struct =
    Struct(&[("Target", Text), ("ClientCertURI", Text), ("ClientCertSerial", Text), ("Namespace", Text), ("Partition", Text)]);

/// `POST /v1/discovery-chain/:service`.
pub(in crate::agent) static CHAIN_OVERRIDES: Struct =
    Struct(&[("OverrideConnectTimeout", Span), ("OverrideProtocol", Text), ("OverrideMeshGateway", Object(&MESH_GATEWAY))]);

/// `PUT /v1/connect/ca/configuration`.
pub(in crate::agent) static CA_CONFIGURATION: Struct = Struct(&[
    ("Provider", Text),
    ("Config", Opaque),
    ("State", Opaque),
    ("ForceWithoutCrossSigning", Flag),
    ("CreateIndex", Integer),
    ("ModifyIndex", Integer),
]);
