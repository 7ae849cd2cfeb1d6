//! `/clusters`: the app, each upstream target and their endpoints, as text and as JSON.
//!
//! Invariant: what is not known is 0 and never guessed. Connections are counted a listener, not an endpoint, so an
//! endpoint has figures only where its cluster has one endpoint and its listeners or routes one cluster. Clusters are named as
//! Consul names them: `local_app`, and the SNI of the target.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use regex::Regex;
use serde_json::{Value, json};

use super::proto_json;
use super::routes::{self, Admin, Parameters, TEXT};
use crate::config::UPSTREAM_CONNECTIONS_MAX;
use crate::mesh::router::{Route, RouterSettings, Way};
use crate::mesh::{Address, Identity, PublicListener, Service, Snapshot, Target, Upstream};
use crate::telemetry::hub::{Hub, Key, Totals};

/// One cluster of the snapshot.
pub(super) struct Cluster<'a> {
    pub(super) name: String,
    pub(super) kind: Kind<'a>,
    pub(super) connect_timeout: Duration,
    connections_max: u32,
    pub(super) hosts: Vec<Host>,
    /// Under what its connections are counted.
    counted: Vec<Key>,
    /// All that is counted there is its own.
    alone: bool,
    /// The upstreams that lead to it, as ejections name them.
    upstreams: Vec<&'a Arc<str>>,
}

/// What is behind a cluster's name.
#[derive(Clone, Copy)]
pub(super) enum Kind<'a> {
    /// The app at addresses that are told, reached in plain.
    App,
    /// A target of an upstream.
    Target {
        upstream: &'a Upstream,
        target: &'a Target,
        /// TLS of the mesh is spoken to it, as this once there is a certificate.
        tls: Option<Option<&'a Identity>>,
    },
    /// Wherever the client wanted to go.
    Original,
}

/// One endpoint.
pub(super) struct Host {
    pub(super) address: Address,
    pub(super) weight: u32,
    pub(super) healthy: bool,
    priority: usize,
}

/// Every cluster, each name once.
pub(super) fn clusters(snapshot: &Snapshot) -> Vec<Cluster<'_>> {
    let mut all = All::default();
    for service in &snapshot.services {
        if let Some(public) = &service.public {
            all.add_app(local_app(snapshot, service), public, Key::inbound(&service.name));
        }
    }
    for service in &snapshot.services {
        for upstream in &service.upstreams {
            all.add_targets(upstream, Some(service.identity.as_deref()), &Key::outbound(&service.name, &upstream.name));
        }
    }
    for router in &snapshot.routers {
        router.routes().for_each(|route| all.add_route(router.settings(), route));
    }
    all.clusters
}

/// Clusters in the order in which they are found.
#[derive(Default)]
struct All<'a> {
    clusters: Vec<Cluster<'a>>,
    places: HashMap<String, usize>,
}

impl<'a> All<'a> {
    fn add_route(&mut self, settings: &RouterSettings, route: &'a Route) {
        let key = Key::of_route(settings, route);
        match (&route.way, route.upstream()) {
            (way, Some(upstream)) => {
                let tls = match way {
                    Way::Originate { service, .. } => Some(service.identity.as_deref()),
                    Way::Forward(_) | Way::Terminate { .. } | Way::Original(_) => None,
                };
                self.add_targets(upstream, tls, &key);
            }
            (Way::Terminate { service, .. }, None) => {
                if let Some(public) = &service.public {
                    self.add_app(route.cluster().to_owned(), public, key);
                }
            }
            (Way::Original(original), None) => {
                let connections_max = original.max_connections.unwrap_or(UPSTREAM_CONNECTIONS_MAX);
                self.add(route.cluster().to_owned(), Kind::Original, original.connect_timeout, connections_max, Some(key));
            }
            // These have an upstream.
            (Way::Forward(_) | Way::Originate { .. }, None) => {}
        }
    }

    fn add_app(&mut self, name: String, public: &'a PublicListener, key: Key) {
        let cluster = self.add(name, Kind::App, public.local_connect_timeout, UPSTREAM_CONNECTIONS_MAX, Some(key));
        cluster.take(public.app.iter().map(|address| Host { address: address.clone(), weight: 1, healthy: true, priority: 0 }));
    }

    fn add_targets(&mut self, upstream: &'a Upstream, tls: Option<Option<&'a Identity>>, key: &Key) {
        let connections_max = upstream.max_connections.unwrap_or(UPSTREAM_CONNECTIONS_MAX);
        for (index, target) in upstream.targets.iter().enumerate() {
            let name = target.cluster();
            let priority = upstream.targets[..index].iter().filter(|before| before.cluster() == name).count();
            let alone = upstream.targets.iter().all(|other| other.cluster() == name);
            let kind = Kind::Target { upstream, target, tls };
            let key = Some(key.clone()).filter(|_| alone);
            let cluster = self.add(name.to_owned(), kind, upstream.connect_timeout, connections_max, key);
            if !cluster.upstreams.contains(&&upstream.name) {
                cluster.upstreams.push(&upstream.name);
            }
            cluster.take(target.endpoints.iter().map(|endpoint| Host {
                address: Address::Tcp(endpoint.address),
                weight: endpoint.weight,
                healthy: endpoint.healthy,
                priority,
            }));
        }
    }

    /// The cluster of this name, which the first one to name it describes. `key` has what was counted, when that is all its own.
    fn add(
        &mut self,
        name: String,
        kind: Kind<'a>,
        connect_timeout: Duration,
        connections_max: u32,
        key: Option<Key>,
    ) -> &mut Cluster<'a> {
        let place = *self.places.entry(name.clone()).or_insert(self.clusters.len());
        if place == self.clusters.len() {
            let (hosts, counted, upstreams) = (Vec::new(), Vec::new(), Vec::new());
            self.clusters.push(Cluster { name, kind, connect_timeout, connections_max, hosts, counted, alone: true, upstreams });
        }
        let cluster = &mut self.clusters[place];
        match key {
            Some(key) if !cluster.counted.contains(&key) => cluster.counted.push(key),
            Some(_) => {}
            None => cluster.alone = false,
        }
        cluster
    }
}

/// `local_app`; with several services in one process, the name says whose.
pub(super) fn local_app(snapshot: &Snapshot, service: &Service) -> String {
    if snapshot.services.len() == 1 { "local_app".to_owned() } else { format!("local_app:{}", service.proxy_id) }
}

impl Cluster<'_> {
    /// Several listeners that lead here have the same hosts. `hosts` are told apart already.
    fn take(&mut self, hosts: impl Iterator<Item = Host>) {
        let known = self.hosts.len();
        for host in hosts {
            if !self.hosts[..known].iter().any(|known| known.address == host.address) {
                self.hosts.push(host);
            }
        }
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
        let ejected = match &host.address {
            Address::Tcp(address) => {
                cluster.upstreams.iter().any(|upstream| self.ejected.contains(&(Arc::clone(upstream), *address)))
            }
            Address::Unix(_) => false,
        };
        let mut figures = Figures { ejected, ..Figures::default() };
        if cluster.alone && cluster.hosts.len() == 1 {
            let of = |key: &Key| self.totals.binary_search_by(|(known, _)| known.cmp(key)).ok();
            for (_, totals) in cluster.counted.iter().filter_map(of).filter_map(|at| self.totals.get(at)) {
                figures.active += totals.active;
                figures.failed += totals.connect_failures;
                figures.total += totals.connect_attempts;
            }
        }
        figures
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
    if matches!(cluster.kind, Kind::Target { .. }) {
        for kind in ["success_rate", "local_origin_success_rate"] {
            line(&format!("outlier::{kind}_average::-1"));
            line(&format!("outlier::{kind}_ejection_threshold::-1"));
        }
    }
    for (priority, connections) in [("default", cluster.connections_max), ("high", UPSTREAM_CONNECTIONS_MAX)] {
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
        stat("priority", &host.priority);
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
    status["circuit_breakers"] = json!({"thresholds": [threshold(cluster.connections_max), high]});
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
    let mut status = json!({
        "address": proto_json::address(&host.address),
        "stats": stats,
        "health_status": health,
        "weight": host.weight,
        "locality": {},
    });
    if host.priority > 0 {
        status["priority"] = json!(host.priority);
    }
    status
}
