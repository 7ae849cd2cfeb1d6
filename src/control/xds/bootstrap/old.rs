//! Envoy's old API (v2), renewed to what the current one has for the same: the bootstrap of Consul before 1.10, and what users
//! wrote into registrations then.
//!
//! Only what Consul 1.8 and 1.9 print and what is plain TCP is renewed; anything else of the old API stays and is refused by
//! name later. The xDS of such a Consul is the old one too, so only node, token, admin port, pages and stats are of use.

use serde_json::{Value as Json, json};

/// The messages that a name alone stood for, as `config` then needed no type.
const TYPES: [(&str, &str); 6] = [
    (
        "envoy.http_connection_manager",
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    ),
    ("envoy.tcp_proxy", "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"),
    ("envoy.filters.network.tcp_proxy", "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"),
    ("envoy.router", "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"),
    ("envoy.statsd", "type.googleapis.com/envoy.config.metrics.v3.StatsdSink"),
    ("envoy.dog_statsd", "type.googleapis.com/envoy.config.metrics.v3.DogStatsdSink"),
];

/// Messages under their old names.
const RENAMED: [(&str, &str); 4] = [
    ("envoy.api.v2.Listener", "envoy.config.listener.v3.Listener"),
    ("envoy.api.v2.Cluster", "envoy.config.cluster.v3.Cluster"),
    ("envoy.config.filter.network.tcp_proxy.v2.TcpProxy", "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"),
    ("envoy.config.accesslog.v2.FileAccessLog", "envoy.extensions.access_loggers.file.v3.FileAccessLog"),
];

/// Whether this is the old API: resources are asked for, and not in the current version.
pub(super) fn is_old(json: &Json) -> bool {
    let ads = &json["dynamic_resources"]["ads_config"];
    let version = ads.get("transport_api_version").or_else(|| ads.get("transportApiVersion"));
    ads.is_object() && version != Some(&json!("V3"))
}

/// The same in the current API.
pub(super) fn renewed(json: &Json) -> Json {
    let mut json = json.clone();
    for cluster in json.pointer_mut("/static_resources/clusters").and_then(Json::as_array_mut).into_iter().flatten() {
        renew_cluster(cluster);
    }
    typed(&mut json);
    if let Some(ads) = json.pointer_mut("/dynamic_resources/ads_config").and_then(Json::as_object_mut) {
        ads.insert("api_type".to_owned(), json!("DELTA_GRPC"));
        ads.insert("transport_api_version".to_owned(), json!("V3"));
    }
    json
}

/// One listener or cluster in the current API; one that is in it already is not changed.
pub(in super::super) fn renewed_resource(json: &Json) -> Json {
    let mut json = json.clone();
    renew_cluster(&mut json);
    typed(&mut json);
    renamed(&mut json);
    json
}

fn renamed(json: &mut Json) {
    match json {
        Json::Array(values) => values.iter_mut().for_each(renamed),
        Json::Object(fields) => {
            if let Some(Json::String(url)) = fields.get_mut("@type") {
                let (prefix, name) = url.rsplit_once('/').unwrap_or(("", url));
                if let Some((_, new)) = RENAMED.iter().find(|(old, _)| *old == name) {
                    *url = format!("{prefix}/{new}");
                }
            }
            fields.values_mut().for_each(renamed);
        }
        _ => {}
    }
}

fn renew_cluster(cluster: &mut Json) {
    let Some(fields) = cluster.as_object_mut() else { return };
    if let Some(Json::Array(hosts)) = fields.shift_remove("hosts") {
        let endpoints: Vec<Json> = hosts.into_iter().map(|address| json!({"endpoint": {"address": address}})).collect();
        let name = fields.get("name").cloned().unwrap_or_default();
        fields.insert("load_assignment".to_owned(), json!({"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}));
    }
    if let Some(Json::Object(mut tls)) = fields.shift_remove("tls_context") {
        let kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
        tls.insert("@type".to_owned(), json!(kind));
        fields.insert("transport_socket".to_owned(), json!({"name": "envoy.transport_sockets.tls", "typed_config": tls}));
    }
}

/// Gives each `config` beside a known `name` its type.
fn typed(json: &mut Json) {
    match json {
        Json::Array(values) => values.iter_mut().for_each(typed),
        Json::Object(fields) => {
            let kind = fields.get("name").and_then(Json::as_str);
            let kind = kind.and_then(|name| TYPES.iter().find(|(old, _)| *old == name)).map(|(_, kind)| *kind);
            if let (Some(kind), Some(Json::Object(config))) = (kind, fields.get("config").cloned()) {
                let mut config = config;
                config.insert("@type".to_owned(), json!(kind));
                fields.shift_remove("config");
                fields.insert("typed_config".to_owned(), Json::Object(config));
            }
            fields.values_mut().for_each(typed);
        }
        _ => {}
    }
}
