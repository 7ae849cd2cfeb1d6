//! The resources that Consul's xDS server would have sent for what the snapshot holds.
//!
//! Invariant: everything here is in the snapshot; nothing is read from elsewhere. One cluster a target, under the SNI that
//! it is dialed with; an upstream with failover leads to an aggregate of its targets, in their order.

mod routers;

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::super::clusters::{self, Cluster, Kind};
use super::super::facts::{Facts, Since};
use super::super::{proto_json, routes};
use super::{rbac, tls};
use crate::config::AgentAddress;
use crate::config::envoy::{PageAnswer, PageListener, PathMatch};
use crate::control::dump::{Resource, Resources};
use crate::mesh::{Balance, Outlier, PublicListener, Service, Snapshot, Upstream};

const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
const ASSIGNMENT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const FILTERS: &str = "type.googleapis.com/envoy.extensions.filters.";
const AGGREGATE: &str = "type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig";

/// `started` is when the process read its settings.
pub(super) fn resources(
    snapshot: &Snapshot,
    facts: &Facts,
    pages: &[PageListener],
    started: SystemTime,
    since: &mut Since,
) -> Resources {
    let fixed = |name: &str, json: Value| Resource {
        name: name.to_owned(),
        version_info: String::new(),
        last_updated: started,
        json,
        warming: None,
        error_state: None,
    };
    let static_clusters: Vec<Resource> =
        facts.agent.iter().map(|agent| fixed("local_agent", typed(CLUSTER, local_agent(agent)))).collect();
    let static_listeners: Vec<Resource> =
        pages.iter().map(|page| fixed(&page.name, typed(LISTENER, page_listener(page)))).collect();
    let mut seen = HashSet::new();
    let mut made = |kind: &str, name: String, json: Value| {
        let digest = ring::digest::digest(&ring::digest::SHA256, json.to_string().as_bytes());
        let version_info = routes::hex(digest.as_ref());
        let key = format!("{kind} {name}");
        let last_updated = since.of(&key, &version_info);
        seen.insert(key);
        Resource { name, version_info, last_updated, json, warming: None, error_state: None }
    };
    let all = clusters::clusters(snapshot);
    let mut clusters: Vec<Resource> =
        all.iter().map(|one| made("cluster", one.name.clone(), typed(CLUSTER, cluster(one)))).collect();
    let mut aggregates = HashSet::new();
    let of_services = snapshot.services.iter().flat_map(|service| &service.upstreams);
    let routes = snapshot.routers.iter().flat_map(|router| router.routes());
    for upstream in of_services.chain(routes.filter_map(|route| route.upstream())).filter(|one| leads_to_several(one)) {
        let name = leads_to(upstream);
        if aggregates.insert(name.clone()) {
            clusters.push(made("cluster", name, typed(CLUSTER, aggregate(upstream))));
        }
    }
    let endpoints = all.iter().map(|one| made("endpoint", one.name.clone(), typed(ASSIGNMENT, assignment(one)))).collect();
    let mut listeners = Vec::new();
    for service in &snapshot.services {
        if let Some(listener) = public_listener(snapshot, service) {
            listeners.push(made("listener", listener_name(&listener), typed(LISTENER, listener)));
        }
        for upstream in &service.upstreams {
            let listener = upstream_listener(service, upstream);
            listeners.push(made("listener", listener_name(&listener), typed(LISTENER, listener)));
        }
    }
    for router in &snapshot.routers {
        let listener = routers::listener(router);
        listeners.push(made("listener", listener_name(&listener), typed(LISTENER, listener)));
    }
    since.keep(|key| seen.contains(key));
    let (static_json, listeners_json) = (bare(&static_clusters), bare(&static_listeners));
    let bootstrap = bootstrap(snapshot, facts, static_json, listeners_json);
    Resources {
        bootstrap,
        bootstrap_at: started,
        static_clusters,
        static_listeners,
        static_secrets: Vec::new(),
        clusters,
        endpoints,
        listeners,
        routes: Vec::new(),
        secrets: Vec::new(),
    }
}

fn typed(kind: &str, value: Value) -> Value {
    super::typed(kind, value)
}

fn listener_name(listener: &Value) -> String {
    listener["name"].as_str().unwrap_or_default().to_owned()
}

/// Without `@type`, as they stand in a bootstrap.
fn bare(resources: &[Resource]) -> Vec<Value> {
    resources
        .iter()
        .map(|resource| match &resource.json {
            Value::Object(fields) => {
                fields.iter().filter(|(name, _)| *name != "@type").map(|(n, v)| (n.clone(), v.clone())).collect()
            }
            other => other.clone(),
        })
        .collect()
}

/// What `consul connect envoy` would have written.
fn bootstrap(snapshot: &Snapshot, facts: &Facts, clusters: Vec<Value>, listeners: Vec<Value>) -> Value {
    let mut fixed = Map::new();
    for (name, list) in [("listeners", listeners), ("clusters", clusters)] {
        if !list.is_empty() {
            fixed.insert(name.to_owned(), list.into());
        }
    }
    let mut admin = Map::new();
    if let Some(log) = &facts.access_log {
        admin.insert("access_log_path".to_owned(), log.to_string_lossy().into());
    }
    if let Some(address) = facts.admin {
        admin.insert("address".to_owned(), proto_json::socket(address));
    }
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    json!({
        "node": facts.node(snapshot),
        "static_resources": fixed,
        "dynamic_resources": {
            "lds_config": ads,
            "cds_config": ads,
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "local_agent"}}],
            },
        },
        "admin": admin,
    })
}

fn local_agent(agent: &AgentAddress) -> Value {
    let (kind, address) = match agent {
        AgentAddress::Unix(path) => ("STATIC", json!({"pipe": {"path": path.to_string_lossy()}})),
        AgentAddress::Http { host, port, .. } => {
            let kind = if host.parse::<std::net::IpAddr>().is_ok() { "STATIC" } else { "STRICT_DNS" };
            (kind, json!({"socket_address": {"address": host, "port_value": port}}))
        }
    };
    json!({
        "name": "local_agent",
        "type": kind,
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": "local_agent",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    })
}

fn cluster(cluster: &Cluster<'_>) -> Value {
    let (upstream, target, tls) = match cluster.kind {
        Kind::Target { upstream, target, tls } => (upstream, target, tls),
        Kind::Original => {
            return json!({
                "name": cluster.name,
                "type": "ORIGINAL_DST",
                "lb_policy": "CLUSTER_PROVIDED",
                "connect_timeout": proto_json::duration(cluster.connect_timeout),
            });
        }
        Kind::App => {
            let endpoints: Vec<Value> =
                cluster.hosts.iter().map(|host| json!({"endpoint": {"address": proto_json::address(&host.address)}})).collect();
            return json!({
                "name": cluster.name,
                "type": "STATIC",
                "connect_timeout": proto_json::duration(cluster.connect_timeout),
                "load_assignment": {"cluster_name": cluster.name, "endpoints": [{"lb_endpoints": endpoints}]},
            });
        }
    };
    let mut json = json!({
        "name": cluster.name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}},
        "connect_timeout": proto_json::duration(upstream.connect_timeout),
    });
    let policy = match upstream.balance {
        Balance::RoundRobin => None,
        Balance::LeastRequest { .. } => Some("LEAST_REQUEST"),
        Balance::Random => Some("RANDOM"),
        Balance::RingHash => Some("RING_HASH"),
        Balance::Maglev => Some("MAGLEV"),
    };
    if let Some(policy) = policy {
        json["lb_policy"] = json!(policy);
    }
    if let Balance::LeastRequest { choices } = upstream.balance {
        json["least_request_lb_config"] = json!({"choice_count": choices});
    }
    json["circuit_breakers"] = upstream
        .max_connections
        .map_or_else(|| json!({}), |connections| json!({"thresholds": [{"max_connections": connections}]}));
    json["outlier_detection"] = outlier(&upstream.outlier);
    if let Some(identity) = tls {
        json["transport_socket"] = tls::upstream(identity, &target.sni, &target.expected);
    }
    json["common_lb_config"] = match upstream.panic_percent {
        0 => json!({"healthy_panic_threshold": {}}),
        percent => json!({"healthy_panic_threshold": {"value": percent}}),
    };
    json["alt_stat_name"] = json!(cluster.name);
    json
}

/// Envoy's defaults are not written, as Consul does not.
fn outlier(outlier: &Outlier) -> Value {
    let (default, mut json) = (Outlier::default(), json!({}));
    if outlier.max_failures != default.max_failures {
        json["consecutive_5xx"] = json!(outlier.max_failures);
    }
    if outlier.interval != default.interval {
        json["interval"] = json!(proto_json::duration(outlier.interval));
    }
    if outlier.base_ejection != default.base_ejection {
        json["base_ejection_time"] = json!(proto_json::duration(outlier.base_ejection));
    }
    if outlier.max_ejection_percent != default.max_ejection_percent {
        json["max_ejection_percent"] = json!(outlier.max_ejection_percent);
    }
    if outlier.enforcing_percent != default.enforcing_percent {
        json["enforcing_consecutive_5xx"] = json!(outlier.enforcing_percent);
    }
    json
}

fn aggregate(upstream: &Upstream) -> Value {
    let mut names: Vec<&str> = upstream.targets.iter().map(|target| target.cluster()).collect();
    names.dedup();
    json!({
        "name": leads_to(upstream),
        "connect_timeout": proto_json::duration(upstream.connect_timeout),
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {"@type": AGGREGATE, "clusters": names},
        },
    })
}

/// The cluster that an upstream's listener names.
fn leads_to(upstream: &Upstream) -> String {
    match &upstream.targets[..] {
        [] => upstream.name.to_string(),
        [first, ..] if leads_to_several(upstream) => format!("failover~{}", first.cluster()),
        [first, ..] => first.cluster().to_owned(),
    }
}

/// Targets of one cluster differ by priority alone.
fn leads_to_several(upstream: &Upstream) -> bool {
    upstream.targets.windows(2).any(|pair| pair[0].cluster() != pair[1].cluster())
}

fn assignment(cluster: &Cluster<'_>) -> Value {
    let endpoints: Vec<Value> = cluster
        .hosts
        .iter()
        .map(|host| {
            json!({
                "endpoint": {"address": proto_json::address(&host.address), "health_check_config": {}},
                "health_status": if host.healthy { "HEALTHY" } else { "UNHEALTHY" },
                "load_balancing_weight": host.weight,
            })
        })
        .collect();
    let mut json = json!({"cluster_name": cluster.name});
    if !endpoints.is_empty() {
        json["endpoints"] = json!([{"locality": {}, "lb_endpoints": endpoints}]);
    }
    json["policy"] = json!({"overprovisioning_factor": 140});
    json
}

fn public_listener(snapshot: &Snapshot, service: &Service) -> Option<Value> {
    let public = service.public.as_ref()?;
    let mut filters = inbound_filters(service, public);
    filters.push(tcp_proxy("public_listener", &clusters::local_app(snapshot, service), public.idle_timeout));
    Some(json!({
        "name": format!("public_listener:{}", public.bind),
        "address": proto_json::bind(&public.bind),
        "filter_chains": [{"filters": filters, "transport_socket": tls::downstream(service.identity.as_deref())}],
        "traffic_direction": "INBOUND",
    }))
}

/// What decides on who comes in.
fn inbound_filters(service: &Service, public: &PublicListener) -> Vec<Value> {
    let mut filters = vec![rbac::filter(&service.intentions)];
    if public.max_inbound_connections > 0 {
        filters.push(json!({"name": "envoy.filters.network.connection_limit", "typed_config": {
            "@type": format!("{FILTERS}network.connection_limit.v3.ConnectionLimit"),
            "stat_prefix": "inbound_connection_limit",
            "max_connections": public.max_inbound_connections.to_string(),
        }}));
    }
    filters
}

fn upstream_listener(service: &Service, upstream: &Upstream) -> Value {
    json!({
        "name": format!("{}:{}", upstream.name, upstream.bind),
        "address": proto_json::bind(&upstream.bind),
        "filter_chains": [{"filters": [tcp_proxy(&stat_prefix(service, upstream), &leads_to(upstream), upstream.idle_timeout)]}],
        "traffic_direction": "OUTBOUND",
    })
}

/// `upstream.SERVICE.NAMESPACE.DATACENTER`: the destination as it is written, from where this service is.
fn stat_prefix(service: &Service, upstream: &Upstream) -> String {
    if upstream.name.starts_with("prepared_query:") {
        return format!("upstream.{}", upstream.name.replace(':', "_"));
    }
    let own = service.identity.as_deref().and_then(|identity| identity.svid.id.service_name());
    let (namespace, datacenter) = own.map_or(("default", ""), |own| (&*own.namespace, &*own.datacenter));
    let (name, datacenter) = match upstream.name.split_once("?dc=") {
        Some((name, datacenter)) => (name, datacenter),
        None => (&*upstream.name, datacenter),
    };
    format!("upstream.{name}.{namespace}.{datacenter}")
}

fn tcp_proxy(stat_prefix: &str, cluster: &str, idle_timeout: Option<Duration>) -> Value {
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": format!("{FILTERS}network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": stat_prefix,
        "cluster": cluster,
        // Left out it would be an hour.
        "idle_timeout": proto_json::duration(idle_timeout.unwrap_or_default()),
    }})
}

/// A listener for some of the admin port's pages.
fn page_listener(page: &PageListener) -> Value {
    let routes: Vec<Value> = page
        .routes
        .iter()
        .map(|route| {
            let matched = match &route.path {
                PathMatch::Exact(path) => json!({"path": path}),
                PathMatch::Prefix(prefix) => json!({"prefix": prefix}),
            };
            match &route.answer {
                PageAnswer::Status(status) => json!({"match": matched, "direct_response": {"status": status}}),
                PageAnswer::Admin { rewrite } => routed(matched, "self_admin", rewrite.as_deref()),
                PageAnswer::Backend { rewrite, .. } => routed(matched, "prometheus_backend", rewrite.as_deref()),
            }
        })
        .collect();
    let host = json!({"name": "self_admin", "domains": ["*"], "routes": routes});
    let router =
        json!({"name": "envoy.filters.http.router", "typed_config": {"@type": format!("{FILTERS}http.router.v3.Router")}});
    json!({
        "name": page.name,
        "address": proto_json::socket(page.bind),
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
            "@type": format!("{FILTERS}network.http_connection_manager.v3.HttpConnectionManager"),
            "codec_type": "HTTP1",
            "stat_prefix": page.name.trim_end_matches("_listener"),
            "route_config": {"name": "self_admin_route", "virtual_hosts": [host]},
            "http_filters": [router],
        }}]}],
    })
}

fn routed(matched: Value, cluster: &str, rewrite: Option<&str>) -> Value {
    let mut route = json!({"cluster": cluster});
    if let Some(rewrite) = rewrite {
        route["prefix_rewrite"] = json!(rewrite);
    }
    json!({"match": matched, "route": route})
}
