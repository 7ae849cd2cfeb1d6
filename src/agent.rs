//! The embedded agent's door. This build has no agent behind it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What applies when no intention matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultPolicy {
    /// Let in.
    Allow,
    /// Keep out.
    Deny,
}

/// Settings.
#[derive(Debug, Clone)]
pub struct AgentSettings {
    /// Loopback only.
    pub bind: SocketAddr,
    /// Services and intentions.
    pub file: Option<PathBuf>,
    /// Datacenter name.
    pub datacenter: String,
    /// Life of a leaf.
    pub leaf_ttl: Duration,
    /// Default policy.
    pub default_policy: DefaultPolicy,
}

/// Why it cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent is not part of this build.
    #[error("this build has no embedded agent: build the whole tree")]
    Missing,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent;

impl Agent {
    /// Starts.
    pub async fn start(_settings: AgentSettings) -> Result<Self, AgentError> {
        Err(AgentError::Missing)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        crate::config::EMBEDDED_AGENT_BIND
    }

    /// Makes a new root.
    pub fn rotate_ca(&self) -> Result<(), AgentError> {
        Err(AgentError::Missing)
    }

    /// Ends.
    pub async fn stop(self) {}
}
