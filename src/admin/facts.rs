//! What this process says of itself where Envoy would: `/server_info`, `/memory` and the small answers beside them.
//!
//! Invariant: the version has Envoy's form and names the Envoy whose place is taken, because scripts and Consul look there;
//! who really answers stands in the node's `user_agent_name` and build metadata. No field holds a secret.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::routes::{self, Admin, TEXT};
use super::{Shared, health, proto_json};
use crate::config;
use crate::mesh::Snapshot;

/// Settings that are shown.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `-envoy-version`, `X.Y.Z`.
    pub envoy_version: String,
    /// Where the admin port is bound.
    pub admin: Option<SocketAddr>,
    /// `-admin-access-log-path`, as given.
    pub access_log: Option<PathBuf>,
    /// Worker threads.
    pub workers: usize,
    /// How long connections go on after SIGTERM.
    pub drain_time: Duration,
    /// Where the Consul agent is, when it is one address.
    pub agent: Option<config::AgentAddress>,
    /// `node` of a bootstrap: id, cluster and metadata.
    pub node: Option<(String, String, Map<String, Value>)>,
    /// `--component-log-level`, as given.
    pub component_levels: String,
}

impl Default for Facts {
    fn default() -> Self {
        Self {
            envoy_version: config::ENVOY_VERSION.to_owned(),
            admin: None,
            access_log: None,
            workers: 1,
            drain_time: config::DRAIN_TIME,
            agent: None,
            node: None,
            component_levels: String::new(),
        }
    }
}

/// The library that does handshakes.
const TLS_LIBRARY: &str = if cfg!(feature = "aws-lc-rs") { "AWS-LC" } else { "ring" };

impl Facts {
    /// `<revision>/<version of Envoy>/Clean/RELEASE/<TLS library>`.
    pub(super) fn version(&self) -> String {
        format!("{}/{}/Clean/RELEASE/{TLS_LIBRARY}", revision(), self.envoy_version)
    }

    /// `envoy.config.core.v3.Node`. Without a bootstrap, the first service's registration.
    pub(super) fn node(&self, snapshot: &Snapshot) -> Value {
        let (id, cluster, mut metadata) = match (&self.node, snapshot.services.first()) {
            (Some(node), _) => node.clone(),
            (None, Some(service)) => (service.proxy_id.to_string(), service.name.to_string(), Map::new()),
            (None, None) => (String::new(), String::new(), Map::new()),
        };
        metadata.entry("envoy_version").or_insert_with(|| self.envoy_version.as_str().into());
        metadata.entry("namespace").or_insert_with(|| "default".into());
        let mut numbers = self.envoy_version.split('.').map(|number| number.parse::<u32>().unwrap_or_default());
        let mut number = || numbers.next().unwrap_or_default();
        let version = json!({"major_number": number(), "minor_number": number(), "patch": number()});
        json!({
            "id": id,
            "cluster": cluster,
            "metadata": metadata,
            "user_agent_name": "ringfence",
            "user_agent_build_version": {
                "version": version,
                "metadata": {
                    "build.type": "RELEASE",
                    "revision.sha": revision(),
                    "revision.status": "Clean",
                    "ringfence.version": env!("CARGO_PKG_VERSION"),
                    "ssl.version": TLS_LIBRARY,
                },
            },
        })
    }

    /// Fields of `envoy.admin.v3.CommandLineOptions` that mean something here; the rest has its default.
    fn options(&self, level: &str) -> Value {
        json!({
            "base_id": "0",
            "concurrency": self.workers,
            "config_path": "",
            "config_yaml": "",
            "allow_unknown_static_fields": false,
            "admin_address_path": "",
            "local_address_ip_version": if self.admin.is_some_and(|admin| admin.is_ipv6()) { "v6" } else { "v4" },
            "log_level": level,
            "component_log_level": self.component_levels,
            "log_format": "",
            "log_path": "",
            "service_cluster": "",
            "service_node": "",
            "service_zone": "",
            "file_flush_interval": "0s",
            "drain_time": proto_json::duration(self.drain_time),
            "parent_shutdown_time": proto_json::duration(config::HANDOVER_DRAIN),
            "mode": "Serve",
            "disable_hot_restart": true,
            "restart_epoch": 0,
            "drain_strategy": "Immediate",
        })
    }
}

/// Forty hexadecimal digits that stand for this release where Envoy has its commit.
fn revision() -> String {
    let name = concat!("ringfence ", env!("CARGO_PKG_VERSION"));
    routes::hex(ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, name.as_bytes()).as_ref())
}

pub(super) async fn server_info(State(shared): Admin) -> Response {
    let state = {
        let mut hub = shared.hub.lock().await;
        hub.drain();
        health::state(&shared, &hub)
    };
    let facts = &shared.facts;
    let uptime = proto_json::duration(Duration::from_secs(shared.start.elapsed().as_secs()));
    let mut node = facts.node(&shared.viewer.current());
    node["listening_addresses"] = json!([]);
    node["client_features"] = json!([]);
    node["extensions"] = json!([]);
    proto_json::answer(&json!({
        "version": facts.version(),
        "state": state.as_str(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": facts.options(&shared.levels.lock().await.overall()),
        "node": node,
        "hot_restart_initializing": false,
    }))
}

pub(super) async fn memory() -> Response {
    let status = own_status();
    let bytes = |key: &str| (status_kib(&status, key) << 10).to_string();
    proto_json::answer(&json!({
        "allocated": bytes("RssAnon:"),
        "heap_size": bytes("VmData:"),
        "pageheap_unmapped": "0",
        "pageheap_free": "0",
        "total_thread_cache": "0",
        "total_physical_bytes": bytes("VmRSS:"),
    }))
}

pub(super) async fn memory_text() -> Response {
    let status = own_status();
    let lines: String =
        status.lines().filter(|line| line.starts_with("Vm") || line.starts_with("Rss")).fold(String::new(), |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        });
    routes::answer(StatusCode::OK, TEXT, lines)
}

/// Empty where /proc is not there: then every figure is 0.
fn own_status() -> String {
    std::fs::read_to_string("/proc/self/status").unwrap_or_default()
}

fn status_kib(status: &str, key: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    value.trim().trim_end_matches(" kB").parse().unwrap_or_default()
}

/// What keeps the process from being ready, where Envoy has targets of its init manager.
pub(super) async fn init_dump(State(shared): Admin) -> Response {
    let mut hub = shared.hub.lock().await;
    hub.drain();
    let waiting = matches!(health::state(&shared, &hub), health::State::PreInitializing | health::State::Initializing);
    let problems = if waiting { health::problems(&shared, &hub) } else { Vec::new() };
    if problems.is_empty() {
        return proto_json::answer(&json!({}));
    }
    let dumps: Vec<Value> =
        problems.into_iter().map(|problem| json!({"name": problem.subject, "target_names": [problem.problem]})).collect();
    proto_json::answer(&json!({ "unready_targets_dumps": dumps }))
}

/// The paths whose whole answer never changes: status and text.
pub(super) fn fixed(path: &str) -> Option<(StatusCode, &'static str)> {
    Some(match path {
        "/hot_restart_version" => (StatusCode::OK, "disabled"),
        "/contention" => {
            (StatusCode::OK, "Mutex contention tracing is not enabled. There is no lock between workers that it could trace.")
        }
        "/heap_dump" | "/peak_heap_dump" => (StatusCode::NOT_IMPLEMENTED, "The current build does not support heap dumps"),
        "/heapprofiler" => (StatusCode::NOT_IMPLEMENTED, "The current build does not support heap profiler"),
        _ => return None,
    })
}

/// What is switched on or off, and cannot be.
pub(super) fn profiler(path: &str, enable: Option<&str>) -> Response {
    match (path, enable) {
        (_, None) => routes::answer(StatusCode::BAD_REQUEST, TEXT, "?enable=<y|n>\n"),
        (_, Some("n")) => routes::answer(StatusCode::OK, TEXT, "OK\n"),
        ("/cpuprofiler", Some("y")) => routes::answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "failure to start the profiler"),
        ("/allocprofiler", Some("y")) => {
            routes::answer(StatusCode::NOT_IMPLEMENTED, TEXT, "The current build does not support allocation profiler")
        }
        _ => routes::answer(StatusCode::BAD_REQUEST, TEXT, "?enable=<y|n>\n"),
    }
}

pub(super) async fn runtime() -> Response {
    proto_json::answer(&json!({"entries": {}, "layers": []}))
}

/// There is no layer that could be changed.
pub(super) fn runtime_modify(parameters: usize) -> Response {
    if parameters == 0 {
        let usage = "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n       or send the parameters as form \
                     values\nuse an empty value to remove a previously added override";
        return routes::answer(StatusCode::BAD_REQUEST, TEXT, usage);
    }
    routes::answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, "No admin layer specified")
}

/// When what is enforced now came into force, and since when each resource of a dump is as it is.
#[derive(Debug)]
pub(super) struct Since {
    generation: u64,
    at: SystemTime,
    versions: std::collections::HashMap<String, (String, SystemTime)>,
}

impl Since {
    pub(super) fn new() -> Self {
        Self { generation: 0, at: SystemTime::now(), versions: std::collections::HashMap::new() }
    }

    /// Notes a new generation. Call with every tick.
    pub(super) fn note(&mut self, shared: &Shared) {
        let generation = shared.viewer.current().generation;
        if generation != self.generation {
            (self.generation, self.at) = (generation, SystemTime::now());
        }
    }

    /// Since when the resource `key` has this version. One that is seen with a new version has it since the newest
    /// generation, at the latest.
    pub(super) fn of(&mut self, key: &str, version: &str) -> SystemTime {
        match self.versions.get(key) {
            Some((known, at)) if known == version => *at,
            _ => {
                self.versions.insert(key.to_owned(), (version.to_owned(), self.at));
                self.at
            }
        }
    }

    /// Forgets what a dump did not hold, so that the table is no longer than the configuration.
    pub(super) fn keep(&mut self, holds: impl Fn(&str) -> bool) {
        self.versions.retain(|key, _| holds(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_by_who_looks_for_envoys() {
        let facts = Facts { envoy_version: "1.35.2".to_owned(), ..Facts::default() };
        let version = facts.version();
        let parts: Vec<&str> = version.split('/').collect();
        assert_eq!((parts.len(), parts[0].len(), parts[1]), (5, 40, "1.35.2"));
        assert_eq!(facts.node(&Snapshot::default())["user_agent_build_version"]["version"]["minor_number"], 35);
    }

    #[test]
    fn memory_of_the_kernel_is_read() {
        assert_eq!(status_kib("VmPeak:\t  10 kB\nVmRSS:\t  2048 kB\n", "VmRSS:"), 2048);
        assert_eq!(status_kib("", "VmRSS:"), 0);
    }
}
