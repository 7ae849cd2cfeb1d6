//! What a hatch says, put in its place.

use std::collections::BTreeSet;

use super::{CLUSTER, LISTENER, LOCAL_CLUSTER, PUBLIC_LISTENER};
use crate::config::envoy::{AccessLog, Logged};
use crate::control::definition::upstream::{Destination, Upstream};
use crate::control::definition::{App, Public};
use crate::control::opaque::Opaque;
use crate::control::xds::hatch::{self, Members, Tls};

/// What Consul calls the app's cluster.
const LOCAL_APP: &str = "local_app";

/// The public listener and the app behind it.
pub(in super::super) fn of_public(
    config: &Opaque<'_>,
    public: &mut Public,
    service: &str,
    logs: &mut Vec<AccessLog>,
) -> Result<(), String> {
    let refused = |key: &str, why: &str| format!("proxy.config.{key}: {why}; change it, or remove the key");
    let mut app = LOCAL_APP.to_owned();
    if let Some(text) = config.text(LOCAL_CLUSTER)? {
        let refused = |why: &str| refused(LOCAL_CLUSTER, why);
        let cluster = hatch::cluster(&text, Tls::Refused).map_err(|why| refused(&why))?;
        let Members::Told(members) = cluster.members else {
            return Err(refused("type: where the app is must be told in it; expected STATIC or STRICT_DNS"));
        };
        public.app = match <[App; 1]>::try_from(members) {
            Ok([app]) => app,
            Err(members) => {
                return Err(refused(&format!("load_assignment: {} members; expected one app", members.len())));
            }
        };
        public.local_connect_timeout = cluster.connect_timeout;
        public.local_keepalive = cluster.keepalive;
        if let Some(most) = cluster.max_connections {
            limit(public, most).map_err(|why| refused(&format!("circuit_breakers.{why}")))?;
        }
        app = cluster.name;
    }
    if let Some(text) = config.text(PUBLIC_LISTENER)? {
        let refused = |why: &str| refused(PUBLIC_LISTENER, why);
        let listener = hatch::listener(&text, Tls::Consuls).map_err(|why| refused(&why))?;
        if listener.cluster != app {
            let (there, app) = (listener.cluster.escape_default(), app.escape_default());
            return Err(refused(&format!("it leads to cluster {there}; expected {app}")));
        }
        public.bind = listener.bind;
        public.idle_timeout = listener.tuning.idle_timeout;
        if let Some(most) = listener.max_connections {
            limit(public, most).map_err(|why| refused(&why))?;
        }
        logs.extend(of_listener(listener.access_logs, service, None));
    }
    Ok(())
}

/// The logs of one listener, for its connections alone.
fn of_listener(logs: Vec<AccessLog>, service: &str, upstream: Option<&str>) -> impl Iterator<Item = AccessLog> {
    let only = BTreeSet::from([Logged { service: Some(service.to_owned()), upstream: upstream.map(str::to_owned) }]);
    logs.into_iter().map(move |log| AccessLog { only: Some(only.clone()), ..log })
}

/// 0 would be no limit here, and everything in Envoy.
fn limit(public: &mut Public, most: u32) -> Result<(), String> {
    match (public.max_inbound_connections, most) {
        (_, 0) => return Err("max_connections: 0; expected 1 or more".to_owned()),
        (0, most) => public.max_inbound_connections = most,
        (before, most) => public.max_inbound_connections = before.min(most),
    }
    Ok(())
}

/// One upstream; whether it has any. What they may say changes no destination.
pub(in super::super) fn of_upstream(
    config: &Opaque<'_>,
    upstream: &mut Upstream,
    (service, place): (&str, &str),
) -> Result<bool, String> {
    let refused = |key: &str, why: &str| format!("{place}.{key}: {why}; change it, or remove the key");
    let mut named = None;
    let mut any = false;
    if let Some(text) = config.text(CLUSTER)? {
        let refused = |why: &str| refused(CLUSTER, why);
        let cluster = hatch::cluster(&text, Tls::Consuls).map_err(|why| refused(&why))?;
        if cluster.members != Members::Eds {
            return Err(refused("type: who answers is told by Consul; expected EDS"));
        }
        upstream.connect_timeout = Some(cluster.connect_timeout);
        upstream.max_connections = cluster.max_connections;
        upstream.outlier = cluster.outlier;
        upstream.tuning.balance = Some(cluster.balance);
        upstream.tuning.panic_percent = Some(cluster.panic_percent);
        upstream.tuning.keepalive = cluster.keepalive;
        named = Some(cluster.name);
        any = true;
    }
    if let Some(text) = config.text(LISTENER)? {
        let refused = |why: &str| refused(LISTENER, why);
        let listener = hatch::listener(&text, Tls::Refused).map_err(|why| refused(&why))?;
        if named.as_ref() != Some(&listener.cluster) && !is_of(&listener.cluster, &upstream.destination) {
            let there = listener.cluster.escape_default();
            return Err(refused(&format!("it leads to cluster {there}; expected the one of this upstream")));
        }
        if listener.max_connections.is_some() {
            return Err(refused("connection_limit: connections are limited by the upstream; expected limits.max_connections"));
        }
        upstream.bind = listener.bind;
        upstream.tuning.idle_timeout = listener.tuning.idle_timeout;
        upstream.tuning.connect_attempts = listener.tuning.connect_attempts;
        upstream.access_logs.extend(of_listener(listener.access_logs, service, Some(&upstream.label)));
        any = true;
    }
    Ok(any)
}

/// Whether Consul would name a cluster so: `[HASH~]SERVICE.NAMESPACE[.PARTITION].DATACENTER.internal...`, `QUERY.default.DATACENTER
/// .query...`, or it is the bare name. Subsets are other members, and the destination's own datacenter is not known here.
fn is_of(cluster: &str, destination: &Destination) -> bool {
    let (name, namespace, datacenter) = match destination {
        Destination::Service { name, datacenter } => (&name.service, name.namespace.as_str(), datacenter),
        Destination::Query { name, datacenter } => (name, "", datacenter),
        Destination::Unsupported(_) => return false,
    };
    let sni = cluster.rsplit('~').next().unwrap_or_default();
    let labels: Vec<&str> = sni.split('.').collect();
    let namespace = if namespace.is_empty() { "default" } else { namespace };
    match labels.as_slice() {
        [only] => only == name,
        [first, second, rest @ ..] => {
            let there = rest.iter().take(2).any(|label| label == datacenter);
            first == name && *second == namespace && (datacenter.is_empty() || there)
        }
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use serde_json::{Value, json};

    use crate::config::Keepalive;
    use crate::config::envoy::{Logged, Scrape};
    use crate::control::consul::wire;
    use crate::control::definition::{App, Definition, parse};
    use crate::mesh::{Balance, Bind};

    fn listener(port: u16, cluster: &str) -> Value {
        json!({
            "@type": "type.googleapis.com/envoy.api.v2.Listener", "name": "mine",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
            "filter_chains": [{"filters": [{"name": "envoy.tcp_proxy", "config": {"cluster": cluster, "idle_timeout": "60s"}}]}],
        })
    }

    fn cluster(change: Value) -> Value {
        let mut cluster = json!({"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "local_app"});
        for (key, value) in change.as_object().expect("an object") {
            cluster[key] = value.clone();
        }
        cluster
    }

    fn with(of_proxy: &[(&str, Value)], of_warehouse: &[(&str, Value)]) -> Result<Definition, String> {
        let mut value = crate::control::fixture("agent-service-sidecar");
        for (key, hatch) in of_proxy {
            value["Proxy"]["Config"][*key] = json!(hatch.to_string());
        }
        for (key, hatch) in of_warehouse {
            value["Proxy"]["Upstreams"][0]["Config"][*key] = json!(hatch.to_string());
        }
        let service: wire::Service = serde_json::from_value(value).expect("parses");
        parse(&service, &Scrape::default())
    }

    #[test]
    fn logs_of_a_listener_are_for_its_connections() {
        let mut mine = listener(9_001, "warehouse");
        let file = json!({"@type": "type.googleapis.com/envoy.config.accesslog.v2.FileAccessLog", "path": "/var/log/mine"});
        mine["filter_chains"][0]["filters"][0]["config"]["access_log"] =
            json!([{"name": "envoy.file_access_log", "typed_config": file}]);
        let definition = with(&[], &[("envoy_listener_json", mine)]).expect("accepted");
        let only: Vec<_> = definition.upstreams[0].access_logs.iter().map(|log| log.only.clone()).collect();
        let of = Logged { service: Some(definition.name.service), upstream: Some("warehouse".to_owned()) };
        assert_eq!(only, [Some([of].into())]);
    }

    #[test]
    fn plain_tcp_holds() {
        let app = cluster(json!({"connect_timeout": "3s", "load_assignment": {"cluster_name": "local_app", "endpoints": [
            {"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": "/run/app.sock"}}}}]}]},
            "circuit_breakers": {"thresholds": [{"max_connections": 5}]}}));
        let hatches = [("envoy_public_listener_json", listener(9_000, "local_app")), ("envoy_local_cluster_json", app)];
        let sni = "warehouse.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul";
        let of_cluster = json!({"name": sni, "type": "EDS", "connect_timeout": "4s", "lb_policy": "MAGLEV",
            "common_lb_config": {"healthy_panic_threshold": {"value": 20}},
            "upstream_connection_options": {"tcp_keepalive": {"keepalive_probes": 0}}});
        let of_warehouse = [("envoy_listener_json", listener(9_001, sni)), ("envoy_cluster_json", of_cluster)];
        let definition = with(&hatches, &of_warehouse).expect("accepted");
        let public = definition.public.expect("a public listener");
        assert_eq!(public.bind, Bind::Tcp("127.0.0.1:9000".parse().expect("address")));
        assert_eq!(public.app, App::Unix(PathBuf::from("/run/app.sock")));
        assert_eq!((public.idle_timeout, public.max_inbound_connections), (Some(Duration::from_secs(60)), 5));
        assert_eq!(public.local_connect_timeout, Duration::from_secs(3));
        let warehouse = &definition.upstreams[0];
        assert_eq!(warehouse.bind, Bind::Tcp("127.0.0.1:9001".parse().expect("address")));
        assert_eq!(warehouse.connect_timeout, Some(Duration::from_secs(4)));
        assert_eq!(warehouse.tuning.balance, Some(Balance::Maglev));
        assert_eq!(warehouse.tuning.idle_timeout, Some(Duration::from_secs(60)));
        assert_eq!((warehouse.tuning.panic_percent, warehouse.tuning.keepalive), (Some(20), Some(Keepalive::Off)));
        let plain = warehouse.unhatched.as_deref().expect("what it is without");
        assert_ne!(
            (&plain.bind, plain.connect_timeout, plain.tuning),
            (&warehouse.bind, warehouse.connect_timeout, warehouse.tuning)
        );
        assert!(definition.upstreams[1..].iter().all(|upstream| upstream.unhatched.is_none()));
        assert_eq!(definition.warnings, [""; 0]);
    }

    #[test]
    fn nobody_is_led_elsewhere() {
        let refused =
            |of_proxy: &[(&str, Value)], of_warehouse: &[(&str, Value)]| with(of_proxy, of_warehouse).expect_err("refused");
        let told = refused(&[("envoy_public_listener_json", listener(9_000, "ext"))], &[]);
        assert!(told.contains("envoy_public_listener_json") && told.contains("ext"), "{told}");
        let told = refused(&[], &[("envoy_listener_json", listener(9_001, "broker.default.dc1.internal.x.consul"))]);
        assert!(told.contains("warehouse") && told.contains("envoy_listener_json") && told.contains("broker"), "{told}");
        for elsewhere in ["v2.warehouse.default.dc1.internal.x.consul", "db.warehouse.dc1.internal.x.consul", "ext"] {
            assert!(refused(&[], &[("envoy_listener_json", listener(9_001, elsewhere))]).contains(elsewhere));
        }
        let fixed = json!({"name": "warehouse", "type": "STATIC"});
        assert!(refused(&[], &[("envoy_cluster_json", fixed)]).contains("EDS"));
        assert!(refused(&[("envoy_local_cluster_json", cluster(json!({"type": "EDS"})))], &[]).contains("STATIC"));
        assert!(refused(&[("envoy_local_cluster_json", cluster(json!({"type": "STATIC"})))], &[]).contains("0 members"));
        let nobody = json!({"type": "STATIC", "circuit_breakers": {"thresholds": [{"max_connections": 0}]},
            "load_assignment": {"endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}}}}]}]}});
        assert!(refused(&[("envoy_local_cluster_json", cluster(nobody))], &[]).contains("max_connections"));
        // In the other one's place Consul would not see them either.
        assert!(refused(&[("envoy_listener_json", listener(9_001, "x"))], &[]).contains("envoy_listener_json"));
        assert!(refused(&[], &[("envoy_local_cluster_json", cluster(json!({})))]).contains("envoy_local_cluster_json"));
    }
}
