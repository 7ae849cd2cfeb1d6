//! The names in each of Envoy's scopes, with what this proxy knows of them.
//!
//! Invariant: a scope has all of Envoy's names at layer 4, known or not, so that no query of a dashboard comes back empty; the
//! list is checked against a real Envoy's.

use std::sync::Arc;
use std::time::SystemTime;

use super::{Made, Members, Memory, PROCESS, Process, Stat, Updates, Value, Which, closed, unix_seconds};
use crate::config;
use crate::mesh::{Identity, Upstream};
use crate::telemetry::cells::{Direction, SUITES};
use crate::telemetry::close::CloseReason;
use crate::telemetry::hub::{Span, Totals};
use crate::telemetry::stats::Histogram;

/// Envoy names a certificate without a file by the hash of its empty path.
const UNNAMED: &str = "e3b0c442";

const LISTENER_UNKNOWN: [&str; 9] = [
    "downstream_cx_overflow",
    "downstream_cx_overload_reject",
    "downstream_cx_transport_socket_connect_timeout",
    "downstream_global_cx_overflow",
    "downstream_listener_filter_error",
    "downstream_listener_filter_remote_close",
    "downstream_pre_cx_timeout",
    "extension_config_missing",
    "network_extension_config_missing",
];
const TCP_UNKNOWN: [&str; 8] = [
    "downstream_cx_drain_close",
    "downstream_cx_overload_close",
    "downstream_flow_control_paused_reading_total",
    "downstream_flow_control_resumed_reading_total",
    "early_data_received_count_total",
    "max_downstream_connection_duration",
    "route_delayed_total",
    "upstream_flush_total",
];
const CLUSTER_UNKNOWN: [&str; 20] = [
    "assignment_stale",
    "assignment_timeout_received",
    "assignment_use_cached",
    "bind_errors",
    "update_failure",
    "upstream_cx_close_notify",
    "upstream_cx_connect_with_0_rtt",
    "upstream_cx_destroy_local",
    "upstream_cx_destroy_local_with_active_rq",
    "upstream_cx_destroy_remote",
    "upstream_cx_destroy_remote_with_active_rq",
    "upstream_cx_destroy_with_active_rq",
    "upstream_cx_idle_timeout",
    "upstream_cx_max_duration_reached",
    "upstream_cx_pool_overflow",
    "upstream_cx_preconnect_skipped",
    "upstream_cx_protocol_error",
    "upstream_flow_control_backed_up_total",
    "upstream_flow_control_drained_total",
    "upstream_flow_control_paused_reading_total",
];
const CLUSTER_GAUGES_UNKNOWN: [&str; 11] = [
    "circuit_breakers.default.cx_pool_open",
    "circuit_breakers.default.rq_open",
    "circuit_breakers.default.rq_pending_open",
    "circuit_breakers.default.rq_retry_open",
    "max_host_weight",
    "membership_degraded",
    "membership_excluded",
    "upstream_cx_rx_bytes_buffered",
    "upstream_cx_tx_bytes_buffered",
    "version",
    "warming_state",
];
const OUTLIER_UNKNOWN: [&str; 17] = [
    "ejections_detected_consecutive_gateway_failure",
    "ejections_detected_consecutive_local_origin_failure",
    "ejections_detected_degradation",
    "ejections_detected_failure_percentage",
    "ejections_detected_local_origin_failure_percentage",
    "ejections_detected_local_origin_success_rate",
    "ejections_detected_success_rate",
    "ejections_enforced_consecutive_gateway_failure",
    "ejections_enforced_consecutive_local_origin_failure",
    "ejections_enforced_failure_percentage",
    "ejections_enforced_local_origin_failure_percentage",
    "ejections_enforced_local_origin_success_rate",
    "ejections_enforced_success_rate",
    "ejections_overflow",
    "ejections_success_rate",
    "ejections_consecutive_5xx",
    "ejections_total",
];
const SSL_UNKNOWN: [&str; 8] = [
    "fail_verify_cert_hash",
    "fail_verify_error",
    "fail_verify_no_cert",
    "no_certificate",
    "ocsp_staple_failed",
    "ocsp_staple_omitted",
    "ocsp_staple_requests",
    "ocsp_staple_responses",
];
const SERVER_UNKNOWN: [&str; 10] = [
    "debug_assertion_failures",
    "dropped_stat_flushes",
    "dynamic_unknown_fields",
    "envoy_bug_failures",
    "envoy_notifications",
    "main_thread.watchdog_mega_miss",
    "main_thread.watchdog_miss",
    "static_unknown_fields",
    "stats_recent_lookups",
    "wip_protos",
];
const SERVER_GAUGES_UNKNOWN: [&str; 5] = [
    "compilation_settings.fips_mode",
    "hot_restart_epoch",
    "parent_connections",
    "seconds_until_first_ocsp_response_expiring",
    "version",
];
const PROCESS_UNKNOWN: [&str; 16] = [
    "cluster_manager.cds.update_failure",
    "cluster_manager.cluster_updated",
    "cluster_manager.cluster_updated_via_merge",
    "cluster_manager.update_merge_cancelled",
    "cluster_manager.update_out_of_merge_window",
    "control_plane.rate_limit_enforced",
    "listener_manager.lds.update_failure",
    "listener_manager.listener_create_failure",
    "listener_manager.listener_create_success",
    "listener_manager.listener_in_place_updated",
    "listener_manager.listener_stopped",
    "runtime.deprecated_feature_use",
    "runtime.load_error",
    "runtime.load_success",
    "runtime.override_dir_exists",
    "runtime.override_dir_not_exists",
];
const PROCESS_GAUGES_UNKNOWN: [&str; 8] = [
    "control_plane.pending_requests",
    "listener_manager.total_filter_chains_draining",
    "listener_manager.total_listeners_draining",
    "listener_manager.workers_pinned",
    "runtime.admin_overrides_active",
    "runtime.deprecated_feature_seen_since_process_start",
    "runtime.num_keys",
    "runtime.num_layers",
];

/// Where stats of one scope go.
#[derive(Debug)]
pub(super) struct Scope<'a> {
    made: &'a mut Made,
    owner: usize,
    prefix: String,
}

impl<'a> Scope<'a> {
    pub(super) fn new(made: &'a mut Made, owner: usize, prefix: &str) -> Self {
        Self { made, owner, prefix: prefix.to_owned() }
    }

    /// A scope within this one.
    fn within(&mut self, name: &str) -> Scope<'_> {
        Scope { prefix: format!("{}.{name}", self.prefix), made: &mut *self.made, owner: self.owner }
    }

    /// Whether a stat is made at all.
    fn wants(&self, used: bool) -> bool {
        used || self.made.which == Which::All
    }

    fn push(&mut self, name: &str, value: Value, used: bool) {
        if !self.wants(used) {
            return;
        }
        let name = if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) };
        self.made.stats.push(Stat { name, owner: self.owner, value, used });
    }

    pub(super) fn counter(&mut self, name: &str, value: u64) {
        self.push(name, Value::Counter(value), value > 0);
    }

    pub(super) fn gauge(&mut self, name: &str, value: u64, used: bool) {
        self.push(name, Value::Gauge(value), used);
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        let used = histogram.count() > 0;
        if self.wants(used) {
            self.push(name, Value::Histogram(Box::new(histogram.clone())), used);
        }
    }

    fn zero(&mut self, counters: &[&str], gauges: &[&str]) {
        if !self.wants(false) {
            return;
        }
        counters.iter().for_each(|name| self.counter(name, 0));
        gauges.iter().for_each(|name| self.gauge(name, 0, false));
    }
}

pub(super) fn listener(scope: &mut Scope<'_>, totals: &Totals, length: &Histogram) {
    let seen = totals.connections > 0;
    scope.counter("downstream_cx_total", totals.connections);
    // Not the sum of the reasons: a connection is open until it is not, so these three always agree.
    scope.counter("downstream_cx_destroy", totals.connections.saturating_sub(totals.active));
    scope.gauge("downstream_cx_active", totals.active, seen);
    scope.gauge("downstream_pre_cx_active", 0, false);
    scope.histogram("downstream_cx_length_ms", length);
    scope.histogram("connections_accepted_per_socket_event", &Histogram::default());
    scope.counter("no_filter_chain_match", closed(totals, CloseReason::NoRoute));
    scope.zero(&LISTENER_UNKNOWN, &[]);
}

/// What goes through filters of one `stat_prefix`.
#[derive(Debug, Default)]
pub(super) struct Tcp {
    connections: u64,
    received: u64,
    sent: u64,
    no_route: u64,
    idle: u64,
}

impl Tcp {
    pub(super) fn take(&mut self, totals: &Totals, direction: Direction) {
        let (received, sent) = match direction {
            Direction::Inbound => (totals.bytes_from_mesh, totals.bytes_to_mesh),
            Direction::Outbound => (totals.bytes_to_mesh, totals.bytes_from_mesh),
        };
        self.connections += totals.connections;
        (self.received, self.sent) = (self.received + received, self.sent + sent);
        self.no_route += closed(totals, CloseReason::NoRoute);
        self.idle += closed(totals, CloseReason::Idle);
    }

    pub(super) fn tell(&self, scope: &mut Scope<'_>) {
        scope.counter("downstream_cx_total", self.connections);
        scope.counter("downstream_cx_rx_bytes_total", self.received);
        scope.counter("downstream_cx_tx_bytes_total", self.sent);
        scope.counter("downstream_cx_no_route", self.no_route);
        scope.counter("idle_timeout", self.idle);
        let gauges = ["downstream_cx_rx_bytes_buffered", "downstream_cx_tx_bytes_buffered", "upstream_flush_active"];
        scope.zero(&TCP_UNKNOWN, &gauges);
    }
}

pub(super) fn authorisation(made: &mut Made, owner: usize, totals: &Totals, limited: bool) {
    let mut scope = Scope::new(made, owner, "connect_authz.rbac");
    scope.counter("allowed", totals.allowed);
    scope.counter("denied", closed(totals, CloseReason::Denied));
    scope.zero(&["shadow_allowed", "shadow_denied"], &[]);
    let mut scope = Scope::new(made, owner, "connection_limit.inbound_connection_limit");
    scope.gauge("active_connections", totals.active, limited);
    scope.counter("limited_connections", closed(totals, CloseReason::Limit));
}

/// `errors` is how many handshakes failed.
pub(super) fn ssl(scope: &mut Scope<'_>, totals: &Totals, errors: u64, identity: &Identity) {
    let mut scope = scope.within("ssl");
    scope.counter("handshake", totals.handshakes);
    scope.counter("session_reused", totals.handshakes_resumed);
    scope.counter("connection_error", errors);
    scope.counter("fail_verify_san", closed(totals, CloseReason::IdentityMismatch));
    for version in ["TLSv1.2", "TLSv1.3"] {
        let of = |(_, count): (&(u16, &str, &str), &u64)| *count;
        let count = SUITES.iter().zip(&totals.suites).filter(|((_, name, _), _)| *name == version).map(of).sum();
        if count > 0 {
            scope.counter(&format!("versions.{version}"), count);
        }
    }
    for ((_, _, suite), count) in SUITES.iter().zip(totals.suites).filter(|(_, count)| *count > 0) {
        scope.counter(&format!("ciphers.{suite}"), count);
    }
    scope.zero(&SSL_UNKNOWN, &[]);
    expiry(&mut scope, "unnamed_cert", unix_seconds(identity.svid.not_after));
    if let Some(first) = scope.made.first_root_end(identity) {
        expiry(&mut scope, "unnamed_ca_cert", first);
    }
}

fn expiry(scope: &mut Scope<'_>, name: &str, at: u64) {
    scope.gauge(&format!("certificate.{name}_{UNNAMED}.expiration_unix_time_seconds"), at, true);
}

/// TLS of clients outside of the mesh that ends at a listener; several certificates are told by the first that ends.
pub(super) fn front_tls(scope: &mut Scope<'_>, totals: &Totals, not_after: SystemTime) {
    outside_tls(scope, totals);
    expiry(&mut scope.within("ssl"), "unnamed_cert", unix_seconds(not_after));
}

/// TLS with whoever is outside of the mesh: the app behind a gateway, or clients before one.
fn outside_tls(scope: &mut Scope<'_>, totals: &Totals) {
    scope.counter("ssl.handshake", totals.outside_handshakes);
    scope.counter("ssl.connection_error", totals.outside_handshakes_failed);
}

/// What is behind one or more listeners.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    totals: Totals,
    span: Span,
    received: u64,
    sent: u64,
    members: u64,
    healthy: u64,
    ejected: u64,
    full: bool,
    outlier: bool,
    /// Whom TLS to its members is spoken as.
    identity: Option<Arc<Identity>>,
    /// They are apps outside of the mesh that speak TLS themselves.
    outside: bool,
}

impl Cluster {
    pub(super) fn take_app(&mut self, totals: &Totals, span: Span, addresses: usize) {
        self.take(Direction::Inbound, totals, span);
        // Two listeners that lead to one cluster share its members.
        (self.members, self.healthy) = (self.members.max(addresses as u64), self.healthy.max(addresses as u64));
    }

    pub(super) fn take_upstream(&mut self, upstream: &Upstream, direction: Direction, totals: &Totals, span: Span, ejected: u64) {
        let first = !self.outlier;
        self.take(direction, totals, span);
        let max = upstream.max_connections.unwrap_or(config::UPSTREAM_CONNECTIONS_MAX);
        self.full |= totals.active >= u64::from(max);
        self.outlier = true;
        self.outside |= upstream.outside.is_some();
        if first {
            let endpoints = || upstream.targets.iter().flat_map(|target| target.endpoints.iter());
            self.members = endpoints().count() as u64;
            self.healthy = endpoints().filter(|endpoint| endpoint.healthy).count() as u64;
        }
        self.ejected = self.ejected.max(ejected);
    }

    /// Wherever the client wanted to go: it has no members.
    pub(super) fn take_original(&mut self, totals: &Totals, span: Span) {
        self.take(Direction::Outbound, totals, span);
    }

    pub(super) fn speaks_as(&mut self, identity: Option<&Arc<Identity>>) {
        self.identity = identity.map(Arc::clone);
    }

    fn take(&mut self, direction: Direction, totals: &Totals, span: Span) {
        let (received, sent) = match direction {
            Direction::Inbound => (totals.bytes_to_mesh, totals.bytes_from_mesh),
            Direction::Outbound => (totals.bytes_from_mesh, totals.bytes_to_mesh),
        };
        (self.received, self.sent) = (self.received + received, self.sent + sent);
        self.totals.merge(totals);
        self.span.connect.merge(&span.connect);
        self.span.far_length.merge(&span.far_length);
    }

    pub(super) fn tell(&self, scope: &mut Scope<'_>, members: Members) {
        let totals = &self.totals;
        let seen = totals.connect_attempts > 0;
        scope.counter("upstream_cx_total", totals.connect_attempts);
        scope.counter("upstream_cx_destroy", totals.connect_attempts.saturating_sub(totals.far_active));
        scope.gauge("upstream_cx_active", totals.far_active, seen);
        scope.counter("upstream_cx_connect_fail", totals.connect_failures);
        scope.counter("upstream_cx_connect_timeout", totals.connect_timeouts);
        let exceeded = [CloseReason::ConnectFailed, CloseReason::ConnectTimeout, CloseReason::AppUnreachable];
        scope.counter("upstream_cx_connect_attempts_exceeded", exceeded.iter().map(|reason| closed(totals, *reason)).sum());
        scope.counter("upstream_cx_rx_bytes_total", self.received);
        scope.counter("upstream_cx_tx_bytes_total", self.sent);
        scope.counter("upstream_cx_none_healthy", closed(totals, CloseReason::NoEndpoint));
        // Of the local app no connection is too many: what is over a limit never gets to it.
        scope.counter("upstream_cx_overflow", if self.outlier { closed(totals, CloseReason::Limit) } else { 0 });
        scope.gauge("circuit_breakers.default.cx_open", u64::from(self.full), seen);
        scope.gauge("membership_total", self.members, true);
        scope.gauge("membership_healthy", self.healthy.saturating_sub(self.ejected), true);
        scope.counter("lb_healthy_panic", totals.in_panic);
        scope.counter("membership_change", members.changes);
        let fetched = members.fetched.unwrap_or_default();
        scope.counter("update_attempt", members.fetched.map_or(0, |fetched| fetched.answers.attempts()));
        scope.counter("update_success", fetched.answers.accepted);
        scope.counter("update_rejected", fetched.answers.rejected);
        scope.counter("update_no_rebuild", fetched.unchanged);
        scope.counter("update_empty", fetched.empty);
        scope.histogram("upstream_cx_connect_ms", &self.span.connect);
        scope.histogram("upstream_cx_length_ms", &self.span.far_length);
        scope.zero(&CLUSTER_UNKNOWN, &CLUSTER_GAUGES_UNKNOWN);
        scope.counter("upstream_flow_control_resumed_reading_total", 0);
        if self.outlier {
            self.tell_outliers(scope);
            if let Some(identity) = &self.identity {
                // Some may have failed before anybody here was dialed: with clients of an ingress gateway.
                let of_clients = if self.outside { 0 } else { totals.outside_handshakes_failed };
                let errors = closed(totals, CloseReason::HandshakeFailed).saturating_sub(of_clients);
                ssl(scope, totals, errors, identity);
            }
        }
        if self.outside {
            outside_tls(scope, totals);
        }
    }

    fn tell_outliers(&self, scope: &mut Scope<'_>) {
        let ejections = self.totals.ejections;
        let mut scope = scope.within("outlier_detection");
        scope.gauge("ejections_active", self.ejected, ejections > 0);
        for name in ["ejections_detected_consecutive_5xx", "ejections_enforced_consecutive_5xx", "ejections_enforced_total"] {
            scope.counter(name, ejections);
        }
        scope.zero(&OUTLIER_UNKNOWN, &[]);
    }
}

pub(super) fn server(scope: &mut Scope<'_>, process: &Process, connections: u64, workers: usize) {
    let Memory { allocated, heap, physical } = process.memory;
    scope.gauge("live", 1, true);
    scope.gauge("state", process.state, true);
    scope.gauge("uptime", process.uptime.as_secs(), true);
    scope.gauge("concurrency", workers as u64, true);
    scope.gauge("memory_allocated", allocated, true);
    scope.gauge("memory_heap_size", heap, true);
    scope.gauge("memory_physical_size", physical, true);
    scope.gauge("total_connections", connections, true);
    scope.histogram("initialization_time_ms", &Histogram::default());
    scope.zero(&SERVER_UNKNOWN, &SERVER_GAUGES_UNKNOWN);
}

/// Each kind with its updates and how many of it are active.
pub(super) fn managers(made: &mut Made, (cds, clusters): (Updates, u64), (lds, listeners): (Updates, u64), connected: bool) {
    let mut scope = Scope::new(made, PROCESS, "");
    for (prefix, of_one, updates) in
        [("cluster_manager.cds", "cluster_manager.cluster", cds), ("listener_manager.lds", "listener_manager.listener", lds)]
    {
        let Updates { answers, changes, warming: _ } = updates;
        scope.counter(&format!("{prefix}.update_attempt"), answers.attempts());
        scope.counter(&format!("{prefix}.update_success"), answers.accepted);
        scope.counter(&format!("{prefix}.update_rejected"), answers.rejected);
        scope.counter(&format!("{of_one}_added"), changes.added);
        scope.counter(&format!("{of_one}_modified"), changes.modified);
        scope.counter(&format!("{of_one}_removed"), changes.removed);
    }
    scope.gauge("cluster_manager.warming_clusters", cds.warming, cds.warming > 0);
    scope.gauge("listener_manager.total_listeners_warming", lds.warming, lds.warming > 0);
    scope.gauge("cluster_manager.active_clusters", clusters, true);
    scope.gauge("listener_manager.total_listeners_active", listeners, true);
    scope.gauge("listener_manager.workers_started", 1, true);
    scope.gauge("control_plane.connected_state", u64::from(connected), true);
    scope.push("control_plane.identifier", Value::Text(String::new()), true);
    scope.zero(&PROCESS_UNKNOWN, &PROCESS_GAUGES_UNKNOWN);
}
