//! The rotation thread: talks to Consul, validates, publishes snapshots. Knows no proxy and no ring.
//!
//! Invariant: nothing unvalidated is published, and nothing published is withdrawn because Consul is away.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::config;
use crate::mesh::Snapshot;
use crate::store::Publisher;

/// What the control plane says of itself, for readiness and the admin port.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Every proxy has its definition, identity, policy and listeners published at least once.
    pub ready: bool,
    /// Whether the agent answered last.
    pub agent_reachable: bool,
    /// One a proxy.
    pub services: Vec<ServiceStatus>,
}

/// One proxy's state.
#[derive(Debug, Clone)]
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
    /// What is missing or wrong, for a person; `None` when all is well.
    pub problem: Option<String>,
}

/// What the process asks of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
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
pub async fn run(
    _settings: config::Consul,
    _workers: usize,
    _publisher: Publisher<Snapshot>,
    _status: watch::Sender<Status>,
    _commands: tokio::sync::mpsc::Receiver<Command>,
) -> Result<(), ControlError> {
    todo!()
}
