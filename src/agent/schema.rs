//! Strict decoding: which fields Consul's documents have, so that a misspelt one is refused by name.
//!
//! Consul takes `snake_case` and `CamelCase`, and its HCL gives a block as a list of one object. [`normalise`] turns all of that
//! into one canonical `CamelCase` document, and whatever the shape does not know is a [`DecodeError`] with its path.
//! Opaque parts (`Config`, `Meta`) are left as they are. Pure; recursion is bounded by the shapes and [`DEPTH_MAX`].

use serde_json::{Map, Value};

use super::duration;

/// Deepest nesting followed in a document.
const DEPTH_MAX: usize = 32;

/// What a value must look like.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    /// A string.
    Text,
    /// An integer.
    Integer,
    /// A boolean.
    Flag,
    /// A Go duration, or an integer of nanoseconds; kept as text.
    Duration,
    /// Anything, kept as it is (one-element lists of objects are Consul's own business there).
    Opaque,
    /// An object with these fields and no others.
    Struct(&'static Struct),
    /// A list; a single element stands for a list of one.
    List(&'static Self),
    /// An object with free keys.
    Map(&'static Self),
}

/// The fields of an object: canonical name and shape.
#[derive(Debug)]
pub(super) struct Struct(pub(super) &'static [(&'static str, Shape)]);

/// Why a document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// A field that the document's kind does not have.
    #[error("unknown field \"{name}\"{}", at(path))]
    Unknown {
        /// The object that holds it, dotted; empty at the top.
        path: String,
        /// The field.
        name: String,
    },
    /// A value of the wrong type.
    #[error("{path} must be {expected}, not {found}")]
    Type {
        /// The field, dotted.
        path: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
}

/// Brings `value` into canonical form. `null` counts as absent, as in Go.
pub(super) fn normalise(shape: Shape, value: Value, path: &str, depth: usize) -> Result<Value, DecodeError> {
    if depth > DEPTH_MAX {
        return Err(wrong(path, "nested less deeply", &value));
    }
    match (shape, value) {
        (Shape::Opaque, value) => Ok(value),
        (Shape::Text, value @ Value::String(_)) | (Shape::Flag, value @ Value::Bool(_)) => Ok(value),
        (Shape::Integer, Value::Number(number)) if number.is_i64() || number.is_u64() => Ok(Value::Number(number)),
        // HCL writes numbers as floats when they have a fraction of zero.
        (Shape::Integer, Value::Number(number)) => integral(&number).ok_or_else(|| wrong(path, "an integer", &Value::Number(number))),
        (Shape::Duration, value) => duration_text(value, path),
        (Shape::List(of), Value::Array(items)) => items
            .into_iter()
            .enumerate()
            .map(|(at, item)| normalise(*of, item, &format!("{path}[{at}]"), depth + 1))
            .collect::<Result<_, _>>()
            .map(Value::Array),
        (Shape::List(of @ Shape::Struct(_)), value @ Value::Object(_)) => {
            Ok(Value::Array(vec![normalise(*of, value, path, depth + 1)?]))
        }
        (Shape::Map(of), Value::Object(fields)) => {
            let mut out = Map::new();
            for (key, item) in fields.into_iter().filter(|(_, item)| !item.is_null()) {
                let inner = join(path, &key);
                out.insert(key, normalise(*of, item, &inner, depth + 1)?);
            }
            Ok(Value::Object(out))
        }
        (Shape::Struct(fields), Value::Object(object)) => structure(fields, object, path, depth),
        (shape @ (Shape::Struct(_) | Shape::Map(_)), Value::Array(mut items)) if items.len() == 1 => {
            normalise(shape, items.remove(0), path, depth + 1)
        }
        (shape, value) => Err(wrong(path, shape.wanted(), &value)),
    }
}

fn structure(fields: &Struct, object: Map<String, Value>, path: &str, depth: usize) -> Result<Value, DecodeError> {
    let mut out = Map::new();
    for (key, value) in object {
        let known = fields.0.iter().find(|(name, _)| same_field(name, &key));
        let Some((name, shape)) = known else {
            return Err(DecodeError::Unknown { path: path.to_owned(), name: key });
        };
        if !value.is_null() {
            let inner = join(path, &key);
            out.insert((*name).to_owned(), normalise(*shape, value, &inner, depth + 1)?);
        }
    }
    Ok(Value::Object(out))
}

/// Whether `key` means the field `name`: case and underscores do not count, as in Consul.
fn same_field(name: &str, key: &str) -> bool {
    let letters = |text: &str| text.bytes().filter(|b| *b != b'_').map(|b| b.to_ascii_lowercase()).collect::<Vec<_>>();
    letters(name) == letters(key)
}

fn duration_text(value: Value, path: &str) -> Result<Value, DecodeError> {
    let parsed = match &value {
        Value::String(text) if text.is_empty() => return Ok(value),
        Value::String(text) => duration::parse(text),
        Value::Number(number) => number.as_u64().map(std::time::Duration::from_nanos),
        _ => None,
    };
    match parsed.filter(|found| *found <= duration::DURATION_MAX) {
        Some(found) => Ok(Value::String(duration::format(found))),
        None => Err(wrong(path, "a duration such as \"10s\"", &value)),
    }
}

fn integral(number: &serde_json::Number) -> Option<Value> {
    let float = number.as_f64()?;
    // 2^53: beyond it a float no longer holds every integer.
    (float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0).then(|| Value::from(float as i64))
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" in {path}") }
}

fn wrong(path: &str, expected: &'static str, value: &Value) -> DecodeError {
    // The value itself may be a token: only its type is named, except for short numbers.
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
    };
    DecodeError::Type { path: if path.is_empty() { "the document".to_owned() } else { path.to_owned() }, expected, found }
}

impl Shape {
    fn wanted(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Integer => "an integer",
            Self::Flag => "true or false",
            Self::Duration => "a duration such as \"10s\"",
            Self::Opaque => "anything",
            Self::List(_) => "a list",
            Self::Struct(_) | Self::Map(_) => "an object",
        }
    }
}

use Shape::{Duration as Span, Flag, Integer, List, Map as MapOf, Opaque, Struct as Object, Text};

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
pub(super) static CHECK: Struct = Struct(&[
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
pub(super) static SERVICE: Struct = Struct(&[
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
pub(super) static PROXY_DEFAULTS: Struct = entry![
    ("Config", Opaque),
    ("MeshGateway", Object(&MESH_GATEWAY)),
    ("Expose", Object(&EXPOSE)),
    ("Mode", Text),
    ("TransparentProxy", Object(&TRANSPARENT)),
];

/// `service-defaults`.
pub(super) static SERVICE_DEFAULTS: Struct = entry![
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
pub(super) static SERVICE_RESOLVER: Struct = entry![
    ("DefaultSubset", Text),
    ("Subsets", MapOf(&Object(&SUBSET))),
    ("Redirect", Object(&REDIRECT)),
    ("Failover", MapOf(&Object(&FAILOVER))),
    ("ConnectTimeout", Span),
    ("RequestTimeout", Span),
    ("LoadBalancer", Object(&LOAD_BALANCER)),
];

/// `service-intentions`.
pub(super) static SERVICE_INTENTIONS: Struct =
    entry![("Sources", List(&Object(&PERMISSION_SOURCE))), ("JWT", Opaque)];

/// `mesh`. Its parts are passed on as they are: only proxies read them.
pub(super) static MESH: Struct = entry![
    ("TransparentProxy", Opaque),
    ("AllowEnablingPermissiveMutualTLS", Flag),
    ("TLS", Opaque),
    ("HTTP", Opaque),
    ("Peering", Opaque),
];

/// `POST /v1/connect/intentions` and friends, and `intentions = []` in a file.
pub(super) static INTENTION: Struct = Struct(&[
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
pub(super) static QUERY: Struct = Struct(&[
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
pub(super) static AUTHORIZE: Struct =
    Struct(&[("Target", Text), ("ClientCertURI", Text), ("ClientCertSerial", Text), ("Namespace", Text), ("Partition", Text)]);

/// `POST /v1/discovery-chain/:service`.
pub(super) static CHAIN_OVERRIDES: Struct =
    Struct(&[("OverrideConnectTimeout", Span), ("OverrideProtocol", Text), ("OverrideMeshGateway", Object(&MESH_GATEWAY))]);

/// `PUT /v1/connect/ca/configuration`.
pub(super) static CA_CONFIGURATION: Struct = Struct(&[
    ("Provider", Text),
    ("Config", Opaque),
    ("State", Opaque),
    ("ForceWithoutCrossSigning", Flag),
    ("CreateIndex", Integer),
    ("ModifyIndex", Integer),
]);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn service(value: Value) -> Result<Value, DecodeError> {
        normalise(Object(&SERVICE), value, "", 0)
    }

    #[test]
    fn snake_case_and_camel_case_mean_the_same() {
        let snake = service(json!({"name": "web", "connect": {"sidecar_service": [{"proxy": {"upstreams": {
            "destination_name": "db", "local_bind_port": 1, "config": {"connect_timeout_ms": 1}}}}]}}));
        let camel = service(json!({"Name": "web", "Connect": {"SidecarService": {"Proxy": {"Upstreams": [
            {"DestinationName": "db", "LocalBindPort": 1, "Config": {"connect_timeout_ms": 1}}]}}}}));
        assert_eq!(snake.expect("decodes"), camel.expect("decodes"));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let error = service(json!({"Name": "web", "Connect": {"SidecarService": {"Prox": {}}}})).expect_err("refused");
        assert_eq!(error.to_string(), "unknown field \"Prox\" in Connect.SidecarService");
    }

    #[test]
    fn a_wrong_type_names_field_and_remedy_but_no_text() {
        let error = service(json!({"Name": "web", "Port": "s3cret"})).expect_err("refused").to_string();
        assert_eq!(error, "Port must be an integer, not a string");
        let error = service(json!({"Check": {"TTL": "soon"}})).expect_err("refused").to_string();
        assert_eq!(error, "Check.TTL must be a duration such as \"10s\", not a string");
    }

    #[test]
    fn durations_take_text_and_nanoseconds() {
        let value = service(json!({"Check": {"Interval": 2_000_000_000_u64, "Timeout": "90s"}})).expect("decodes");
        assert_eq!(value, json!({"Check": {"Interval": "2s", "Timeout": "1m30s"}}));
    }

    proptest! {
        #[test]
        fn hostile_json_is_an_error_not_a_panic(text in "[\\[\\]{}\",:a-zA-Z0-9_.-]{0,120}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                let _ = service(value);
            }
        }
    }
}
