//! Consul's escape hatches: a listener or cluster of Envoy's, as JSON in a registration.
//!
//! Invariant: what is read holds plain TCP and nothing that would be enforced by Envoy alone; anything else is refused with
//! its field. TLS is not looked at: Consul puts its own in its place (`agent/xds/listeners.go`, `clusters.go`). Pure.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterMessage;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerMessage;
use prost::{Message, Name};
use serde_json::Value;

use super::bootstrap::old::renewed_resource;
use super::cluster::{self, Discovery};
use super::endpoint::Host;
use super::listener::{Listener, Plain};
use super::proto_json::Protos;
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

/// Reads a listener.
pub(in crate::control) fn listener(text: &str) -> Result<Plain, String> {
    let mut message: ListenerMessage = read(text)?;
    for chain in &mut message.filter_chains {
        chain.transport_socket = None;
    }
    Listener::plain(&message).map_err(|why| why.to_string())
}

/// Reads a cluster.
pub(in crate::control) fn cluster(text: &str) -> Result<Cluster, String> {
    let mut message: ClusterMessage = read(text)?;
    message.transport_socket = None;
    let cluster = cluster::Cluster::parse(&message).map_err(|why| why.to_string())?;
    let members = match &cluster.discovery {
        Discovery::Eds(_) => Members::Eds,
        Discovery::Static(told) | Discovery::Dns(told, _) => Members::Told(told.places().map(|place| app(&place.host)).collect()),
        Discovery::Aggregate(_) | Discovery::OriginalDestination => Members::Other,
    };
    let cluster::Cluster { name, connect_timeout, balance, max_connections, outlier, .. } = cluster;
    Ok(Cluster { name, connect_timeout, balance, max_connections, outlier, members })
}

fn app(host: &Host) -> App {
    match host {
        Host::Tcp(host, port) => App::Tcp { host: host.clone(), port: *port },
        Host::Unix(path) => App::Unix(path.clone()),
    }
}

/// The message in `text`, which may be in Envoy's old API.
fn read<T: Message + Name + Default>(text: &str) -> Result<T, String> {
    let json: Value = serde_json::from_str(text).map_err(|error| format!("it is no JSON: {error}"))?;
    let mut json = renewed_resource(&json);
    let Some(fields) = json.as_object_mut() else { return Err("it is no JSON object".to_owned()) };
    let name = T::full_name();
    if let Some(kind) = fields.shift_remove("@type")
        && kind.as_str().and_then(|url| url.rsplit('/').next()) != Some(&name)
    {
        return Err(format!("@type: {kind}; expected a {name}"));
    }
    // What Consul overrides, under its old name.
    if let Some(Value::Array(chains)) = fields.get_mut("filter_chains") {
        for chain in chains.iter_mut().filter_map(Value::as_object_mut) {
            chain.shift_remove("tls_context");
        }
    }
    Protos::load().decode(&json).map_err(|error| error.to_string())
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
        let old = listener(&old_listener().to_string()).expect("read");
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
        assert_eq!(listener(&new.to_string()), Ok(Plain { max_connections: Some(7), ..old }));
    }

    #[test]
    fn a_cluster_tells_its_members_or_leaves_them_to_consul() {
        let old = json!({
            "@type": "type.googleapis.com/envoy.api.v2.Cluster", "name": "local_app", "connect_timeout": "3s",
            "hosts": [{"socket_address": {"address": "127.0.0.1", "port_value": 8080}}],
        });
        let local = cluster(&old.to_string()).expect("read");
        assert_eq!(local.members, Members::Told(vec![App::Tcp { host: "127.0.0.1".into(), port: 8080 }]));
        assert_eq!(local.connect_timeout, Duration::from_secs(3));
        let new = json!({
            "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "db", "type": "EDS",
            "eds_cluster_config": {"eds_config": {"ads": {}}}, "lb_policy": "RANDOM",
            "circuit_breakers": {"thresholds": [{"max_connections": 9}]},
        });
        let upstream = cluster(&new.to_string()).expect("read");
        assert_eq!((upstream.members, upstream.balance, upstream.max_connections), (Members::Eds, Balance::Random, Some(9)));
        assert_eq!(upstream.outlier.enforcing_percent, 0, "it asks for no ejection");
    }

    #[test]
    fn what_is_not_plain_is_refused_by_its_field() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut value = old_listener();
            change(&mut value);
            listener(&value.to_string()).expect_err("refused")
        };
        assert!(refused(&|v| v["@type"] = json!("type.googleapis.com/envoy.api.v2.Cluster")).contains("@type"));
        assert!(refused(&|v| v["nonsense"] = json!(1)).contains("nonsense"));
        assert!(
            refused(&|v| v["listener_filters"] = json!([{"name": "envoy.filters.listener.proxy_protocol"}]))
                .contains("proxy_protocol")
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
        assert!(listener("{").is_err_and(|why| why.contains("JSON")) && listener("[]").is_err() && cluster("3").is_err());
    }
}
