//! `/clusters`: the app, each upstream target and their endpoints, as text and as JSON.
//!
//! Invariant: what is not known is 0 and never guessed. Connections are counted a listener, not an endpoint, so an
//! endpoint has figures only where its cluster has one endpoint and its listener one cluster. Clusters are named as Consul
//! names them: `local_app`, and the SNI of the target.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use regex::Regex;
use serde_json::{Value, json};

use super::proto_json;
use super::routes::{self, Admin, Parameters, TEXT};
use crate::config::UPSTREAM_CONNECTIONS_MAX;
use crate::mesh::{Address, Service, Snapshot, Target, Upstream};
use crate::telemetry::cells::Direction;
use crate::telemetry::hub::{Hub, Key, Totals};

/// One cluster of the snapshot.
pub(super) struct Cluster<'a> {
    pub(super) name: String,
    pub(super) service: &'a Service,
    /// What it is dialed for; `None` is the app.
    pub(super) target: Option<(&'a Upstream, &'a Target)>,
    pub(super) hosts: Vec<Host>,
}

/// One endpoint.
pub(super) struct Host {
    pub(super) address: Address,
    pub(super) weight: u32,
    pub(super) healthy: bool,
}

/// Every cluster, each name once.
pub(super) fn clusters(snapshot: &Snapshot) -> Vec<Cluster<'_>> {
    let mut all: Vec<Cluster<'_>> = snapshot
        .services
        .iter()
        .filter_map(|service| {
            let public = service.public.as_ref()?;
            let host = |address: &Address| Host { address: address.clone(), weight: 1, healthy: true };
            let hosts = public.app.iter().map(host).collect();
            Some(Cluster { name: local_app(snapshot, service), service, target: None, hosts })
        })
        .collect();
    let mut seen = HashSet::new();
    for service in &snapshot.services {
        for upstream in &service.upstreams {
            for target in &upstream.targets {
                if seen.insert(cluster_name(target)) {
                    all.push(Cluster::of_target(service, upstream, target));
                }
            }
        }
    }
    all
}

/// `local_app`; with several services in one process, the name says whose.
pub(super) fn local_app(snapshot: &Snapshot, service: &Service) -> String {
    if snapshot.services.len() == 1 { "local_app".to_owned() } else { format!("local_app:{}", service.proxy_id) }
}

/// The SNI, or the target's id where none is sent.
pub(super) fn cluster_name(target: &Target) -> &str {
    if target.sni.is_empty() { &target.id } else { &target.sni }
}

impl<'a> Cluster<'a> {
    fn of_target(service: &'a Service, upstream: &'a Upstream, target: &'a Target) -> Self {
        let hosts = target.endpoints.iter().map(|endpoint| Host {
            address: Address::Tcp(endpoint.address),
            weight: endpoint.weight,
            healthy: endpoint.healthy,
        });
        let name = cluster_name(target).to_owned();
        Self { name, service, target: Some((upstream, target)), hosts: hosts.collect() }
    }

    fn connections_max(&self) -> u32 {
        self.target.and_then(|(upstream, _)| upstream.max_connections).unwrap_or(UPSTREAM_CONNECTIONS_MAX)
    }

    /// Whose counters are the counters of this cluster's only endpoint.
    fn key(&self) -> Option<Key> {
        let sole = self.hosts.len() == 1 && self.target.is_none_or(|(upstream, _)| upstream.targets.len() == 1);
        sole.then(|| Key {
            direction: if self.target.is_some() { Direction::Outbound } else { Direction::Inbound },
            service: Arc::clone(&self.service.name),
            upstream: self.target.map(|(upstream, _)| Arc::clone(&upstream.name)),
        })
    }
}

/// What the hub knows, taken out so that its lock is not held while the answer is made.
struct Known {
    totals: Vec<(Key, Totals)>,
    ejected: HashSet<(Arc<str>, SocketAddr)>,
}

/// Of one endpoint.
#[derive(Default)]
struct Figures {
    active: u64,
    failed: u64,
    total: u64,
    ejected: bool,
}

impl Known {
    fn new(hub: &Hub) -> Self {
        Self {
            totals: hub.series().totals().map(|(key, totals)| (key.clone(), totals)).collect(),
            ejected: hub.ejections().into_iter().map(|ejection| (ejection.upstream, ejection.endpoint)).collect(),
        }
    }

    fn figures(&self, cluster: &Cluster<'_>, host: &Host) -> Figures {
        let totals = cluster.key().and_then(|key| {
            let at = self.totals.binary_search_by(|(known, _)| known.cmp(&key)).ok()?;
            self.totals.get(at).map(|(_, totals)| totals)
        });
        let ejected = match (cluster.target, &host.address) {
            (Some((upstream, _)), Address::Tcp(address)) => self.ejected.contains(&(Arc::clone(&upstream.name), *address)),
            _ => false,
        };
        match totals {
            None => Figures { ejected, ..Figures::default() },
            Some(totals) => {
                Figures { active: totals.active, failed: totals.connect_failures, total: totals.connect_attempts, ejected }
            }
        }
    }
}

pub(super) async fn answer(State(shared): Admin, Query(parameters): Query<Parameters>) -> Response {
    let filter = match routes::parameter(&parameters, "filter").map(Regex::new).transpose() {
        Ok(filter) => filter,
        Err(_) => return routes::answer(StatusCode::BAD_REQUEST, TEXT, "Invalid re2 regex"),
    };
    let snapshot = shared.viewer.current();
    let known = {
        let mut hub = shared.hub.lock().await;
        hub.drain();
        Known::new(&hub)
    };
    let mut clusters = clusters(&snapshot);
    clusters.retain(|cluster| filter.as_ref().is_none_or(|filter| filter.is_match(&cluster.name)));
    if routes::parameter(&parameters, "format") != Some("json") {
        let text: String = clusters.iter().map(|cluster| text(cluster, &known)).collect();
        return routes::answer(StatusCode::OK, TEXT, text);
    }
    let statuses: Vec<Value> = clusters.iter().map(|cluster| status(cluster, &known)).collect();
    proto_json::answer(&if statuses.is_empty() { json!({}) } else { json!({ "cluster_statuses": statuses }) })
}

fn text(cluster: &Cluster<'_>, known: &Known) -> String {
    let name = &cluster.name;
    let mut text = format!("{name}::observability_name::{name}\n");
    let mut line = |rest: &str| {
        text.push_str(name);
        text.push_str("::");
        text.push_str(rest);
        text.push('\n');
    };
    if cluster.target.is_some() {
        for kind in ["success_rate", "local_origin_success_rate"] {
            line(&format!("outlier::{kind}_average::-1"));
            line(&format!("outlier::{kind}_ejection_threshold::-1"));
        }
    }
    for (priority, connections) in [("default", cluster.connections_max()), ("high", UPSTREAM_CONNECTIONS_MAX)] {
        line(&format!("{priority}_priority::max_connections::{connections}"));
        line(&format!("{priority}_priority::max_pending_requests::1024"));
        line(&format!("{priority}_priority::max_requests::1024"));
        line(&format!("{priority}_priority::max_retries::3"));
    }
    line("added_via_api::true");
    for host in &cluster.hosts {
        let Figures { active, failed, total, ejected } = known.figures(cluster, host);
        let at = &host.address;
        let mut stat = |name: &str, value: &dyn std::fmt::Display| line(&format!("{at}::{name}::{value}"));
        stat("cx_active", &active);
        stat("cx_connect_fail", &failed);
        stat("cx_total", &total);
        for name in ["rq_active", "rq_error", "rq_pending_active", "rq_success", "rq_timeout", "rq_total"] {
            stat(name, &0);
        }
        stat("hostname", &"");
        stat("health_flags", &health_flags(host.healthy, ejected));
        stat("weight", &host.weight);
        for name in ["region", "zone", "sub_zone"] {
            stat(name, &"");
        }
        stat("canary", &false);
        stat("priority", &0);
        stat("success_rate", &-1);
        stat("local_origin_success_rate", &-1);
    }
    text
}

fn health_flags(healthy: bool, ejected: bool) -> &'static str {
    match (healthy, ejected) {
        (true, false) => "healthy",
        (true, true) => "/failed_outlier_check",
        (false, false) => "/failed_eds_health",
        (false, true) => "/failed_outlier_check/failed_eds_health",
    }
}

/// `envoy.admin.v3.ClusterStatus`.
fn status(cluster: &Cluster<'_>, known: &Known) -> Value {
    let threshold = |connections: u32| json!({"max_connections": connections, "max_pending_requests": 1024, "max_requests": 1024, "max_retries": 3});
    let mut high = json!({"priority": "HIGH"});
    if let (Some(high), Value::Object(fields)) = (high.as_object_mut(), threshold(UPSTREAM_CONNECTIONS_MAX)) {
        high.extend(fields);
    }
    let mut status = json!({"name": cluster.name, "added_via_api": true});
    if !cluster.hosts.is_empty() {
        status["host_statuses"] = cluster.hosts.iter().map(|host| host_status(host, &known.figures(cluster, host))).collect();
    }
    status["circuit_breakers"] = json!({"thresholds": [threshold(cluster.connections_max()), high]});
    status["observability_name"] = json!(cluster.name);
    status
}

/// `envoy.admin.v3.HostStatus`. As in Envoy, a counter that is 0 has no value.
fn host_status(host: &Host, figures: &Figures) -> Value {
    let stat = |gauge: bool, name: &str, value: u64| {
        let mut stat = json!({});
        if gauge {
            stat["type"] = json!("GAUGE");
        }
        stat["name"] = json!(name);
        if value > 0 {
            stat["value"] = json!(value.to_string());
        }
        stat
    };
    let stats = [
        stat(false, "cx_connect_fail", figures.failed),
        stat(false, "cx_total", figures.total),
        stat(false, "rq_error", 0),
        stat(false, "rq_success", 0),
        stat(false, "rq_timeout", 0),
        stat(false, "rq_total", 0),
        stat(true, "cx_active", figures.active),
        stat(true, "rq_active", 0),
        stat(true, "rq_pending_active", 0),
    ];
    let mut health = json!({"eds_health_status": if host.healthy { "HEALTHY" } else { "UNHEALTHY" }});
    if figures.ejected {
        health["failed_outlier_check"] = json!(true);
    }
    json!({
        "address": proto_json::address(&host.address),
        "stats": stats,
        "health_status": health,
        "weight": host.weight,
        "locality": {},
    })
}
