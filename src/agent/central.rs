//! Central configuration: how `proxy-defaults` and `service-defaults` flow into a proxy's definition.
//!
//! Precedence, as Consul's: the registration, then `service-defaults` (overrides before defaults), then `proxy-defaults`;
//! `Config` is merged key by key. Pure.

use serde_json::{Map, Value, json};

use super::definition::{Definition, Proxy, Upstream};
use super::entries::Entry;
use super::state::Entries;

/// The definition of a proxy with central configuration merged in; anything else comes back as it was.
pub(super) fn merge(definition: &Definition, entries: &Entries) -> Definition {
    let mut out = definition.clone();
    if let Some(proxy) = out.proxy.as_mut().filter(|_| !definition.kind.is_empty()) {
        merge_proxy(proxy, entries);
    }
    out
}

fn merge_proxy(proxy: &mut Proxy, entries: &Entries) {
    let global = find(entries, "proxy-defaults", "global");
    let service = find(entries, "service-defaults", &proxy.destination_service_name);

    let mut config = global.and_then(|entry| object(entry, "Config")).cloned().unwrap_or_default();
    if let Some(service) = service {
        for (field, key) in [
            ("Protocol", "protocol"),
            ("MaxInboundConnections", "max_inbound_connections"),
            ("LocalConnectTimeoutMs", "local_connect_timeout_ms"),
            ("LocalRequestTimeoutMs", "local_request_timeout_ms"),
            ("BalanceInboundConnections", "balance_inbound_connections"),
        ] {
            if let Some(value) = service.body.get(field).filter(|value| !is_empty(value)) {
                config.insert(key.to_owned(), value.clone());
            }
        }
    }
    config.extend(std::mem::take(&mut proxy.config));
    proxy.config = sorted(config);

    for entry in [service, global].into_iter().flatten() {
        if proxy.mode.is_empty() {
            proxy.mode = entry.body.get("Mode").and_then(Value::as_str).unwrap_or_default().to_owned();
        }
        fill(&mut proxy.mesh_gateway, object(entry, "MeshGateway"));
        fill(&mut proxy.expose, object(entry, "Expose"));
        if proxy.transparent_proxy.is_none() {
            proxy.transparent_proxy = entry.body.get("TransparentProxy").cloned();
        }
    }
    let gateway = proxy.mesh_gateway.clone();
    for upstream in proxy.upstreams.iter_mut().filter(|upstream| upstream.destination_type != "prepared_query") {
        merge_upstream(upstream, service, &gateway, entries);
    }
}

fn merge_upstream(upstream: &mut Upstream, service: Option<&Entry>, gateway: &Map<String, Value>, entries: &Entries) {
    let mut config = Map::new();
    // The destination's own protocol is the weakest opinion about an upstream; `proxy-defaults` has none of its own here.
    let protocol = find(entries, "service-defaults", &upstream.destination_name).and_then(|entry| entry.body.get("Protocol"));
    if let Some(protocol) = protocol.filter(|value| !is_empty(value)) {
        config.insert("protocol".to_owned(), protocol.clone());
    }
    let central = service.and_then(|entry| object(entry, "UpstreamConfig"));
    let defaults = central.and_then(|central| central.get("Defaults")).and_then(Value::as_object);
    let overrides = central
        .and_then(|central| central.get("Overrides"))
        .and_then(Value::as_array)
        .and_then(|list| list.iter().find(|item| item.get("Name").and_then(Value::as_str) == Some(&upstream.destination_name)))
        .and_then(Value::as_object);
    for source in [defaults, overrides].into_iter().flatten() {
        config.extend(upstream_config(source));
    }
    config.extend(std::mem::take(&mut upstream.config));
    upstream.config = sorted(config);
    for source in [overrides, defaults].into_iter().flatten() {
        fill(&mut upstream.mesh_gateway, source.get("MeshGateway").and_then(Value::as_object));
    }
    // Consul leaves an inherited mode out of a registered upstream when nothing central names one.
    if upstream.mesh_gateway.is_empty() && !gateway.is_empty() {
        upstream.mesh_gateway = gateway.clone();
    }
}

/// One of `UpstreamConfig` in the words of an upstream's opaque `config`.
fn upstream_config(source: &Map<String, Value>) -> Map<String, Value> {
    let mut out = Map::new();
    for (field, key) in [
        ("EnvoyListenerJSON", "envoy_listener_json"),
        ("EnvoyClusterJSON", "envoy_cluster_json"),
        ("Protocol", "protocol"),
        ("ConnectTimeoutMs", "connect_timeout_ms"),
        ("BalanceOutboundConnections", "balance_outbound_connections"),
        ("Limits", "limits"),
        ("PassiveHealthCheck", "passive_health_check"),
    ] {
        if let Some(value) = source.get(field).filter(|value| !is_empty(value)) {
            let nested = matches!(key, "limits" | "passive_health_check");
            out.insert(key.to_owned(), if nested { snake_case(value) } else { value.clone() });
        }
    }
    out
}

/// Keys of `Limits` and `PassiveHealthCheck` as the opaque `config` spells them.
fn snake_case(value: &Value) -> Value {
    let value = match value {
        Value::Array(items) if items.len() == 1 => &items[0],
        other => other,
    };
    let Value::Object(fields) = value else {
        return value.clone();
    };
    let spell = |key: &str| {
        let mut out = String::new();
        for (at, letter) in key.chars().enumerate() {
            if letter.is_ascii_uppercase() && at > 0 {
                out.push('_');
            }
            out.push(letter.to_ascii_lowercase());
        }
        out
    };
    Value::Object(fields.iter().map(|(key, value)| (spell(key), value.clone())).collect())
}

fn find<'a>(entries: &'a Entries, kind: &str, name: &str) -> Option<&'a Entry> {
    entries.get(&(kind.to_owned(), name.to_owned()))
}

fn object<'a>(entry: &'a Entry, key: &str) -> Option<&'a Map<String, Value>> {
    entry.body.get(key).and_then(Value::as_object)
}

fn fill(into: &mut Map<String, Value>, from: Option<&Map<String, Value>>) {
    for (key, value) in from.into_iter().flatten() {
        into.entry(key.clone()).or_insert_with(|| value.clone());
    }
}

fn is_empty(value: &Value) -> bool {
    *value == json!("") || *value == json!(0) || *value == json!({}) || value.is_null()
}

/// Go prints maps in the order of their keys.
fn sorted(map: Map<String, Value>) -> Map<String, Value> {
    let mut pairs: Vec<_> = map.into_iter().collect();
    pairs.sort_by(|a, b| a.0.cmp(&b.0));
    pairs.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(documents: &[Value]) -> Entries {
        documents
            .iter()
            .map(|document| Entry::decode(document.clone()).expect("valid"))
            .map(|entry| ((entry.kind.clone(), entry.name.clone()), entry))
            .collect()
    }

    fn proxy(document: Value, central: &[Value]) -> Proxy {
        let mut fields =
            json!({"Kind": "connect-proxy", "Name": "web-proxy", "Port": 1, "Proxy": {"DestinationServiceName": "web"}});
        for (key, value) in document.as_object().expect("an object") {
            fields["Proxy"][key] = value.clone();
        }
        merge(&Definition::decode(fields).expect("valid"), &entries(central)).proxy.expect("a proxy")
    }

    #[test]
    fn registration_beats_service_beats_proxy_defaults() {
        let central = [
            json!({"Kind": "proxy-defaults", "Name": "global", "Config": {"a": 1, "b": 1, "local_connect_timeout_ms": 1000},
                   "MeshGateway": {"Mode": "remote"}}),
            json!({"Kind": "service-defaults", "Name": "web", "Protocol": "tcp", "MaxInboundConnections": 200,
                   "MeshGateway": {"Mode": "local"}}),
        ];
        let merged = proxy(json!({"Config": {"b": 2}}), &central);
        let expected =
            json!({"a": 1, "b": 2, "local_connect_timeout_ms": 1000, "max_inbound_connections": 200, "protocol": "tcp"});
        assert_eq!(Value::Object(merged.config), expected);
        assert_eq!(merged.mesh_gateway["Mode"], "local");
    }

    #[test]
    fn upstreams_take_overrides_before_defaults_and_queries_take_nothing() {
        let central = [
            json!({"Kind": "service-defaults", "Name": "db", "Protocol": "tcp"}),
            json!({"Kind": "service-defaults", "Name": "web", "UpstreamConfig": {
                "Defaults": {"ConnectTimeoutMs": 1000, "Limits": {"MaxConnections": 3}},
                "Overrides": [{"Name": "db", "ConnectTimeoutMs": 2000}]}}),
        ];
        let upstreams = json!({"Upstreams": [
            {"DestinationName": "db", "LocalBindPort": 1, "Config": {"limits": {"max_connections": 64}}},
            {"DestinationName": "api", "LocalBindPort": 2},
            {"DestinationName": "q", "DestinationType": "prepared_query", "LocalBindPort": 3}]});
        let merged = proxy(upstreams, &central).upstreams;
        assert_eq!(
            Value::Object(merged[0].config.clone()),
            json!({"connect_timeout_ms": 2000, "limits": {"max_connections": 64}, "protocol": "tcp"})
        );
        assert_eq!(
            Value::Object(merged[1].config.clone()),
            json!({"connect_timeout_ms": 1000, "limits": {"max_connections": 3}})
        );
        assert!(merged[2].config.is_empty());
    }
}
