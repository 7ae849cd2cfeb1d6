//! Listeners with routes, as Envoy's listeners with filter chains.
//!
//! Invariant: one chain a route, matched as the route is; where TLS ends, with the filters that decide.

use serde_json::{Map, Value, json};

use super::{inbound_filters, leads_to, tcp_proxy};
use crate::admin::dump::tls;
use crate::admin::proto_json;
use crate::mesh::router::{Match, Route, Router, RouterSettings, Way};
use crate::telemetry::stats::model::route_prefix;

const INSPECTORS: &str = "type.googleapis.com/envoy.extensions.filters.listener.";

pub(super) fn listener(router: &Router) -> Value {
    let settings = router.settings();
    let ends_tls = router.routes().any(|route| matches!(route.way, Way::Terminate { .. }));
    let mut inspectors = Vec::new();
    if settings.transparent {
        inspectors.push(inspector("original_dst", "original_dst.v3.OriginalDst"));
    }
    if router.inspects() {
        inspectors.push(inspector("tls_inspector", "tls_inspector.v3.TlsInspector"));
    }
    let mut json = json!({
        "name": &*settings.name,
        "address": proto_json::bind(&settings.bind),
        "filter_chains": settings.routes.iter().map(|route| chain(settings, route)).collect::<Vec<_>>(),
        "listener_filters": inspectors,
        "listener_filters_timeout": proto_json::duration(settings.inspect_timeout),
        "continue_on_listener_filters_timeout": settings.silent_is_raw,
        "traffic_direction": if ends_tls { "INBOUND" } else { "OUTBOUND" },
    });
    if let Some(fallback) = &settings.fallback {
        json["default_filter_chain"] = chain(settings, fallback);
    }
    json
}

fn inspector(name: &str, kind: &str) -> Value {
    json!({"name": format!("envoy.filters.listener.{name}"), "typed_config": {"@type": format!("{INSPECTORS}{kind}")}})
}

fn chain(settings: &RouterSettings, route: &Route) -> Value {
    let mut chain = Map::new();
    if route.matches != Match::default() {
        chain.insert("filter_chain_match".to_owned(), matches(&route.matches));
    }
    let mut filters = Vec::new();
    if let Way::Terminate { service, .. } = &route.way {
        filters.extend(service.public.iter().flat_map(|public| inbound_filters(service, public)));
        chain.insert("transport_socket".to_owned(), tls::downstream(service.identity.as_deref()));
    }
    let cluster = route.upstream().map_or_else(|| route.cluster().to_owned(), |upstream| leads_to(upstream));
    filters.push(tcp_proxy(&route_prefix(settings, route), &cluster, route.way.idle_timeout()));
    chain.insert("filters".to_owned(), filters.into());
    chain.insert("name".to_owned(), (*route.name).into());
    chain.into()
}

fn matches(matches: &Match) -> Value {
    let mut json = Map::new();
    if let Some(port) = matches.port {
        json.insert("destination_port".to_owned(), port.into());
    }
    let networks: Vec<Value> = matches
        .networks
        .iter()
        .map(|network| json!({"address_prefix": network.address().to_string(), "prefix_len": network.prefix()}))
        .collect();
    let names: Vec<Value> = matches.server_names.iter().map(|name| name.to_string().into()).collect();
    for (field, list) in [("prefix_ranges", networks), ("server_names", names)] {
        if !list.is_empty() {
            json.insert(field.to_owned(), list.into());
        }
    }
    if let Some(tls) = matches.tls {
        json.insert("transport_protocol".to_owned(), if tls { "tls" } else { "raw_buffer" }.into());
    }
    json.into()
}
