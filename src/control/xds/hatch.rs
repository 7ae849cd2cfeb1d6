//! Consul's escape hatches: a listener or cluster of Envoy's, as JSON in a registration.
//!
//! Invariant: what is read holds plain TCP, and every field of it is honoured or has no meaning here; any other is refused by its
//! name. TLS is left out where Consul puts its own in its place (`agent/xds/listeners.go`, `clusters.go`), and refused elsewhere.
//! Pure.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterMessage;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerMessage;
use prost::{Message, Name};
use serde_json::Value;

use super::bootstrap::old::renewed_resource;
use super::cluster::{self, Discovery};
use super::endpoint::Host;
use super::listener::Plain;
use super::proto_json::Protos;
use crate::config::Keepalive;
use crate::control::definition::App;
use crate::mesh::{Balance, Outlier};

/// A cluster and how its members are found and treated.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::control) struct Cluster {
    pub(in crate::control) name: String,
    pub(in crate::control) connect_timeout: Duration,
    pub(in crate::control) balance: Balance,
    pub(in crate::control) max_connections: Option<u32>,
    pub(in crate::control) outlier: Outlier,
    pub(in crate::control) panic_percent: u32,
    pub(in crate::control) keepalive: Option<Keepalive>,
    pub(in crate::control) members: Members,
}

/// Where a cluster's members are told.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::control) enum Members {
    /// By Consul.
    Eds,
    /// Here.
    Told(Vec<App>),
    /// Elsewhere.
    Other,
}

/// What becomes of TLS that a hatch asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::control) enum Tls {
    /// Consul overrides it.
    Consuls,
    /// It would hold in Envoy.
    Refused,
}

/// Fields of listeners that are read, or that say nothing of what is done with bytes.
const LISTENER: &[&str] = &[
    "name",
    "address",
    "filter_chains",
    "access_log",
    "traffic_direction",
    "stat_prefix",
    "per_connection_buffer_limit_bytes",
    "drain_type",
];
const CHAIN: &[&str] = &["name", "filters", "filter_chain_match"];
const FILTER: &[&str] = &["name", "typed_config"];
/// Of `tcp_proxy` and `connection_limit`.
const FILTER_CONFIG: &[&str] =
    &["@type", "stat_prefix", "cluster", "idle_timeout", "max_connect_attempts", "access_log", "max_connections"];
const CLUSTER: &[&str] = &[
    "name",
    "alt_stat_name",
    "type",
    "eds_cluster_config",
    "connect_timeout",
    "per_connection_buffer_limit_bytes",
    "lb_policy",
    "least_request_lb_config",
    "load_assignment",
    "circuit_breakers",
    "outlier_detection",
    "common_lb_config",
    "upstream_connection_options",
    "dns_refresh_rate",
    "dns_lookup_family",
];

/// Reads a listener.
pub(in crate::control) fn listener(text: &str, tls: Tls) -> Result<Plain, String> {
    let mut json = object::<ListenerMessage>(text)?;
    known(&json, LISTENER, "")?;
    for (index, chain) in list_mut(&mut json, "filter_chains").enumerate() {
        let place = format!("filter_chains[{index}].");
        leave_out_tls(chain, tls, &place)?;
        known(chain, CHAIN, &place)?;
        for (index, filter) in list_mut(chain, "filters").enumerate() {
            let place = format!("{place}filters[{index}].");
            known(filter, FILTER, &place)?;
            if let Some(config) = filter.get("typed_config") {
                known(config, FILTER_CONFIG, &format!("{place}typed_config."))?;
            }
        }
    }
    Plain::read(&decode(&json)?).map_err(|why| why.to_string())
}

/// Reads a cluster.
pub(in crate::control) fn cluster(text: &str, tls: Tls) -> Result<Cluster, String> {
    let mut json = object::<ClusterMessage>(text)?;
    leave_out_tls(&mut json, tls, "")?;
    known(&json, CLUSTER, "")?;
    let cluster = cluster::Cluster::parse(&decode(&json)?).map_err(|why| why.to_string())?;
    let members = match &cluster.discovery {
        Discovery::Eds(_) => Members::Eds,
        Discovery::Static(told) | Discovery::Dns(told, _) => Members::Told(told.places().map(|place| app(&place.host)).collect()),
        Discovery::Aggregate(_) | Discovery::OriginalDestination => Members::Other,
    };
    let cluster::Cluster { name, connect_timeout, balance, max_connections, outlier, panic_percent, keepalive, .. } = cluster;
    Ok(Cluster { name, connect_timeout, balance, max_connections, outlier, panic_percent, keepalive, members })
}

fn app(host: &Host) -> App {
    match host {
        Host::Tcp(host, port) => App::Tcp { host: host.clone(), port: *port },
        Host::Unix(path) => App::Unix(path.clone()),
    }
}

/// The object in `text`, which may be in Envoy's old API, without its type: that must be `T`'s.
fn object<T: Name>(text: &str) -> Result<Value, String> {
    let json: Value = serde_json::from_str(text).map_err(|error| format!("it is no JSON: {error}"))?;
    let mut json = renewed_resource(&json);
    let Some(fields) = json.as_object_mut() else { return Err("it is no JSON object".to_owned()) };
    let name = T::full_name();
    match fields.shift_remove("@type") {
        Some(kind) if kind.as_str().and_then(|url| url.rsplit('/').next()) != Some(&name) => {
            Err(format!("@type: {kind}; expected a {name}"))
        }
        _ => Ok(json),
    }
}

fn decode<T: Message + Name + Default>(json: &Value) -> Result<T, String> {
    Protos::load().decode(json).map_err(|error| error.to_string())
}

/// The objects in a list, under its name in either spelling.
fn list_mut<'a>(json: &'a mut Value, name: &str) -> impl Iterator<Item = &'a mut Value> {
    let fields = json.as_object_mut().into_iter().flatten();
    let found = fields.filter(move |(key, _)| snake(key) == name).map(|(_, value)| value);
    found.filter_map(Value::as_array_mut).flatten()
}

/// TLS is under these names, in the current API and in the old one.
fn leave_out_tls(json: &mut Value, tls: Tls, place: &str) -> Result<(), String> {
    let Some(fields) = json.as_object_mut() else { return Ok(()) };
    let found: Vec<String> =
        fields.keys().filter(|key| matches!(&*snake(key), "transport_socket" | "tls_context")).cloned().collect();
    for key in found {
        if tls == Tls::Refused {
            return Err(format!("{place}{key}: present; Consul does not override it here, so expected none"));
        }
        fields.shift_remove(&key);
    }
    Ok(())
}

/// Refuses the first field that is not among these.
fn known(json: &Value, names: &[&str], place: &str) -> Result<(), String> {
    let mut fields = json.as_object().into_iter().flatten();
    match fields.find(|(key, _)| !names.contains(&&*snake(key))) {
        Some((key, _)) => {
            let key = key.escape_default();
            Err(format!("{place}{key}: it is not honoured here; expected none but {}", names.join(", ")))
        }
        None => Ok(()),
    }
}

/// Proto JSON has names in two spellings.
fn snake(name: &str) -> String {
    let mut text = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            text.push('_');
        }
        text.push(letter.to_ascii_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use std::time::Duration;

    use super::*;
    use crate::mesh::Bind;

    fn old_listener() -> Value {
        json!({
            "@type": "type.googleapis.com/envoy.api.v2.Listener",
            "name": "mine:127.0.0.1:9191",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9191}},
            "filter_chains": [{
                "tls_context": {"require_client_certificate": true},
                "filters": [{"name": "envoy.tcp_proxy", "config": {"stat_prefix": "x", "cluster": "db", "idle_timeout": "600s",
                    "max_connect_attempts": 5}}],
            }],
        })
    }

    #[test]
    fn both_apis_say_the_same() {
        let old = listener(&old_listener().to_string(), Tls::Consuls).expect("read");
        assert_eq!(old.bind, Bind::Tcp("127.0.0.1:9191".parse().expect("address")));
        assert_eq!((old.cluster.as_str(), old.max_connections, old.tuning.connect_attempts), ("db", None, Some(5)));
        assert_eq!(old.tuning.idle_timeout, Some(Duration::from_secs(600)));
        let tcp = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
        let limit = "type.googleapis.com/envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit";
        let new = json!({
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9191}},
            "filterChains": [{"filters": [
                {"name": "limit", "typed_config": {"@type": limit, "stat_prefix": "x", "max_connections": 7}},
                {"name": "tcp", "typed_config": {"@type": tcp, "cluster": "db", "idle_timeout": "600s", "maxConnectAttempts": 5}},
            ]}],
        });
        assert_eq!(listener(&new.to_string(), Tls::Refused), Ok(Plain { max_connections: Some(7), ..old }));
    }

    #[test]
    fn a_cluster_tells_its_members_or_leaves_them_to_consul() {
        let old = json!({
            "@type": "type.googleapis.com/envoy.api.v2.Cluster", "name": "local_app", "connect_timeout": "3s",
            "hosts": [{"socket_address": {"address": "127.0.0.1", "port_value": 8080}}],
        });
        let local = cluster(&old.to_string(), Tls::Refused).expect("read");
        assert_eq!(local.members, Members::Told(vec![App::Tcp { host: "127.0.0.1".into(), port: 8080 }]));
        assert_eq!(local.connect_timeout, Duration::from_secs(3));
        let new = json!({
            "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "db", "type": "EDS",
            "eds_cluster_config": {"eds_config": {"ads": {}}}, "lb_policy": "RANDOM",
            "circuit_breakers": {"thresholds": [{"max_connections": 9}]},
        });
        let upstream = cluster(&new.to_string(), Tls::Consuls).expect("read");
        assert_eq!((upstream.members, upstream.balance, upstream.max_connections), (Members::Eds, Balance::Random, Some(9)));
        assert_eq!(upstream.outlier.enforcing_percent, 0, "it asks for no ejection");
    }

    #[test]
    fn what_is_not_plain_is_refused_by_its_field() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut value = old_listener();
            change(&mut value);
            listener(&value.to_string(), Tls::Consuls).expect_err("refused")
        };
        assert!(refused(&|v| v["@type"] = json!("type.googleapis.com/envoy.api.v2.Cluster")).contains("@type"));
        assert!(refused(&|v| v["nonsense"] = json!(1)).contains("nonsense"));
        assert!(
            refused(&|v| v["listener_filters"] = json!([{"name": "envoy.filters.listener.proxy_protocol"}]))
                .contains("listener_filters")
        );
        let lua = json!([{"name": "envoy.lua", "config": {}}]);
        assert!(refused(&|v| v["filter_chains"][0]["filters"] = lua.clone()).contains("config"));
        assert!(refused(&|v| v["filter_chains"][0]["filter_chain_match"] = json!({"server_names": ["a"]})).contains("match"));
        let rbac = json!({"@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC", "stat_prefix": "x"});
        assert!(
            refused(&|v| {
                let filters = v["filter_chains"][0]["filters"].as_array_mut().expect("a list");
                filters.insert(0, json!({"name": "rbac", "typed_config": rbac}));
            })
            .contains("rbac")
        );
        for (field, value) in [("use_proxy_proto", json!(true)), ("useOriginalDst", json!(true)), ("reuse_port", json!(false))] {
            assert!(refused(&|v| v[field] = value.clone()).starts_with(&format!("{field}: ")));
        }
        let subset = json!({"filter_metadata": {"envoy.lb": {"version": "v1"}}});
        let told = refused(&|v| v["filter_chains"][0]["filters"][0]["config"]["metadata_match"] = subset.clone());
        assert!(told.starts_with("filter_chains[0].filters[0].typed_config.metadata_match: "), "{told}");
        assert!(listener("{", Tls::Refused).is_err_and(|why| why.contains("JSON")));
        assert!(listener("[]", Tls::Refused).is_err() && cluster("3", Tls::Refused).is_err());
    }

    #[test]
    fn tls_that_would_hold_is_not_left_out() {
        let told = listener(&old_listener().to_string(), Tls::Refused).expect_err("refused");
        assert!(told.starts_with("filter_chains[0].tls_context: "), "{told}");
        let mut value = old_listener();
        let chain = value["filter_chains"][0].as_object_mut().expect("a chain");
        chain.remove("tls_context");
        chain.insert("transportSocket".to_owned(), json!({"name": "tls"}));
        assert!(listener(&value.to_string(), Tls::Refused).is_err() && listener(&value.to_string(), Tls::Consuls).is_ok());
        let app = json!({"name": "local_app", "hosts": [], "tls_context": {"sni": "app"}});
        assert!(cluster(&app.to_string(), Tls::Refused).expect_err("refused").starts_with("transport_socket: "));
        assert!(cluster(&app.to_string(), Tls::Consuls).is_ok());
    }
}
