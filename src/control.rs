//! The rotation thread: talks to Consul, validates, publishes snapshots. Knows no proxy and no ring.
//!
//! Invariant: nothing unvalidated is published, and nothing published is withdrawn because Consul is away.

mod backoff;
mod build;
pub(crate) mod consul;
mod definition;
pub mod dump;
mod feeder;
mod granted;
mod opaque;
mod report;
mod rotation;
mod state;
mod tally;
#[cfg(feature = "xds")]
pub mod xds;

#[cfg(feature = "xds")]
pub use xds::run as run_xds;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::config;
use crate::config::envoy::{AccessLog, PageListener};
use crate::mesh::Snapshot;
use crate::store::Publisher;
use crate::telemetry::stats::Told;

/// What the control plane says of itself, for readiness and the admin port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Every proxy has its definition, identity, policy and listeners published at least once.
    pub ready: bool,
    /// Whether the agent answered last.
    pub agent_reachable: bool,
    /// One a proxy.
    pub services: Vec<ServiceStatus>,
    /// The access logs that Consul asks for, over all proxies.
    pub access_logs: Vec<AccessLog>,
    /// What the proxies' definitions say of stats.
    pub stats: StatsWishes,
    /// What was told of clusters, listeners and members, and what that changed.
    pub told: Told,
}

/// What definitions say of stats, over all proxies: `envoy_stats_tags`, `envoy_statsd_url`, `envoy_dogstatsd_url` and
/// `envoy_stats_flush_interval`. The first one to name a tag, a sink or the interval has its way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StatsWishes {
    /// Fixed tags.
    pub tags: Vec<config::envoy::StatTag>,
    /// Where stats are sent.
    pub sinks: Vec<config::envoy::StatSink>,
    /// Between two flushes.
    pub flush_interval: Option<Duration>,
}

/// One proxy's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceStatus {
    /// The registration's id, or the flag's text until it is resolved.
    pub proxy_id: Arc<str>,
    /// Service name, once known.
    pub service: Option<Arc<str>>,
    /// SPIFFE ID, once issued.
    pub spiffe_id: Option<String>,
    /// Serial number of the leaf in use.
    pub leaf_serial: Option<String>,
    /// When the leaf in use ends.
    pub leaf_not_after: Option<SystemTime>,
    /// Times that a new leaf was published.
    pub rotations: u64,
    /// Listeners for pages of the admin port that the registration asks for.
    pub pages: Vec<PageListener>,
    /// What is missing or wrong, for a person; `None` when all is well.
    pub problem: Option<String>,
}

/// What the process asks of the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A local caller was granted this identity (a Consul service name): have a certificate for it.
    Warm(Arc<str>),
    /// SIGHUP: read token and certificate files again.
    Reload,
    /// Drain has begun: stop watching, log out.
    Stop,
}

/// Why the control plane could not start or had to end. What heals by itself is retried and is no error.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A setting cannot work.
    #[error("{0}")]
    Config(String),
}

/// Runs until [`Command::Stop`]. `workers` is how many TLS configurations each identity needs.
///
/// Publishes into `publisher` and tells `status` of every change. Ends in an error only before anything runs.
pub async fn run(
    settings: config::Consul,
    workers: usize,
    publisher: Publisher<Snapshot>,
    status: watch::Sender<Status>,
    commands: tokio::sync::mpsc::Receiver<Command>,
) -> Result<(), ControlError> {
    feeder::Feeder::new(settings, workers, publisher, status)?.run(commands).await;
    Ok(())
}

/// [`run`], fed by Consul's xDS server.
#[cfg(not(feature = "xds"))]
pub async fn run_xds(
    _: config::envoy::Xds,
    _: usize,
    _: Publisher<Snapshot>,
    _: watch::Sender<Status>,
    _: tokio::sync::mpsc::Receiver<Command>,
    _: dump::Sender,
) -> Result<(), ControlError> {
    Err(ControlError::Config(
        "this ringfence was built without xDS: run `ringfence connect`, or build it with the feature xds".into(),
    ))
}

/// The `response` of a captured answer of Consul 1.10.
#[cfg(test)]
pub(crate) fn fixture(name: &str) -> serde_json::Value {
    let path = format!("{}/tests/fixtures/consul-1.10/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("the fixture is there");
    let mut capture: serde_json::Value = serde_json::from_str(&text).expect("the fixture is JSON");
    capture["response"].take()
}

#[cfg(test)]
mod tests;
