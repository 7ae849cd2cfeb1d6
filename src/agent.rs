//! The embedded Consul-compatible agent: Consul's HTTP API on loopback, with a certificate authority inside.
//!
//! A development tool. It lets `ringfence demo`, local development and the tests run the very control code that talks to a
//! real Consul. It has no ACLs, one node, no persistence, and hands out private keys without a token.
//!
//! Invariant: it listens on loopback only; a CA key never leaves memory; every answer has the shape of a real agent's.
//! It must not know the proxy, the ring or the control plane: what it knows of them goes over HTTP. It fails at start with an
//! [`AgentError`] that names the remedy; after that a wrong file or request changes nothing.
//!
//! Inside: `state` holds what is known and moves the index, `shared` puts one lock around it and lets queries wait,
//! `http` is the face, `definition`/`entries`/`intentions`/`query` decode with `schema`, `ca`/`leaf` issue, `view`/`central`/`chain`
//! answer, `check` probes, `file` (with `hcl`) reloads.

mod ca;
mod central;
mod chain;
mod check;
mod definition;
mod duration;
mod entries;
mod file;
mod filter;
mod hcl;
mod http;
mod intentions;
mod leaf;
mod query;
mod schema;
mod sec1;
mod shared;
mod state;
mod view;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub use check::Health;
use shared::Shared;
use state::State;

/// How long open requests get to end when the agent stops.
const STOP_TIME: Duration = Duration::from_secs(2);
/// The shortest leaf lifetime: X.509 counts whole seconds.
const LEAF_TTL_MIN: Duration = Duration::from_secs(2);

/// What an embedded agent is started with.
#[derive(Debug, Clone)]
pub struct AgentSettings {
    /// Where to listen: loopback only; port 0 takes a free one.
    pub bind: SocketAddr,
    /// HCL or JSON file with services, intentions and config entries; reloaded on change.
    pub file: Option<PathBuf>,
    /// Name of the one datacenter.
    pub datacenter: String,
    /// Lifetime of leaves (Consul: 72 h, at least 1 h; here 2 s and more, for tests).
    pub leaf_ttl: Duration,
    /// Lifetime of roots (Consul: 10 years).
    pub root_ttl: Duration,
    /// What holds when no intention matches.
    pub default_policy: DefaultPolicy,
    /// Shares of a leaf's life between which a waiting query renews it (Consul: 0.6 to 0.9).
    pub renewal_window: (f64, f64),
    /// Leaves are reissued within this time after a root rotation (Consul: 30 s; here at once).
    pub rotation_jitter: Duration,
    /// How long a retired root stays listed (Consul: twice the leaf lifetime).
    pub old_root_retention: Duration,
    /// Interval of the default check of a sidecar (Consul: 10 s).
    pub check_interval: Duration,
}

impl Default for AgentSettings {
    fn default() -> Self {
        let leaf_ttl = Duration::from_secs(72 * 3_600);
        Self {
            bind: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 8_500),
            file: None,
            datacenter: "dc1".to_owned(),
            leaf_ttl,
            root_ttl: Duration::from_secs(10 * 365 * 24 * 3_600),
            default_policy: DefaultPolicy::Allow,
            renewal_window: (0.6, 0.9),
            rotation_jitter: Duration::ZERO,
            old_root_retention: leaf_ttl * 2,
            check_interval: Duration::from_secs(10),
        }
    }
}

/// What holds when no intention matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultPolicy {
    /// As Consul with ACLs off.
    Allow,
    /// As Consul with ACLs on and `default_policy = "deny"`.
    Deny,
}

/// What an intention does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntentionAction {
    /// Lets the source in.
    Allow,
    /// Keeps the source out.
    Deny,
}

/// Why the agent could not start or do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The address to listen on is not loopback.
    #[error(
        "the embedded agent hands out private keys without a token, so it listens on loopback only, not on {0}: use 127.0.0.1 or [::1]"
    )]
    NotLoopback(SocketAddr),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; stop what listens there or choose another port")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A setting that cannot work.
    #[error("{0}")]
    Setting(String),
    /// The file cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the item.
        reason: String,
    },
    /// A bound was reached.
    #[error("the embedded agent is full: {most} {what} at most")]
    Full {
        /// Of what.
        what: &'static str,
        /// The bound.
        most: usize,
    },
    /// Too many blocking queries wait.
    #[error("Your IP is issuing too many concurrent connections, please rate limit your calls")]
    TooManyWaiting,
    /// A definition or request was refused.
    #[error("{0}")]
    Refused(String),
    /// The certificate authority failed.
    #[error("certificate authority: {0}")]
    Authority(String),
}

impl From<ca::CaError> for AgentError {
    fn from(error: ca::CaError) -> Self {
        Self::Authority(error.to_string())
    }
}

/// A running embedded agent. Dropping it stops it at once; [`Agent::stop`] lets open requests end.
#[derive(Debug)]
pub struct Agent {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
}

impl Agent {
    /// Starts an agent on the current tokio runtime. The file, if any, must be valid.
    pub async fn start(settings: AgentSettings) -> Result<Self, AgentError> {
        check_settings(&settings)?;
        let (bind, path) = (settings.bind, settings.file.clone());
        let plan = path.as_deref().map(file::load).transpose()?;
        let mut state = State::new(settings, SystemTime::now())?;
        if let Some(plan) = plan {
            plan.apply(&mut state)?;
        }
        let bound = |source| AgentError::Bind { address: bind, source };
        let listener = TcpListener::bind(bind).await.map_err(bound)?;
        let address = listener.local_addr().map_err(bound)?;
        let shared = Shared::new(state);
        // Starts the probes of what the file defined.
        shared.change(|_| ());
        let mut tasks = vec![tokio::spawn(shared::housekeeping(Arc::clone(&shared)))];
        if let Some(path) = path {
            tasks.push(file::watch(Arc::clone(&shared), path)?);
        }
        let (router, stop) = (http::router(Arc::clone(&shared)), Arc::clone(&shared));
        let server = tokio::spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(async move { stop.stopped().await });
            if let Err(error) = serving.await {
                tracing::error!(%error, "the embedded agent stopped serving");
            }
        });
        tracing::info!(%address, "embedded agent listening: a development tool, without ACLs");
        Ok(Self { shared, address, server, tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The mesh's trust domain, `<uuid>.consul`.
    pub fn trust_domain(&self) -> String {
        self.shared.read(|state| state.authority.trust_domain.clone())
    }

    /// Every root listed now, in PEM, the active one first.
    pub fn roots_pem(&self) -> Vec<String> {
        self.shared.read(|state| state.authority.roots().map(|root| root.pem.clone()).collect())
    }

    /// Replaces the CA root by one that the old root cross-signs; leaves follow at once or within `rotation_jitter`.
    pub fn rotate_ca(&self) -> Result<(), AgentError> {
        self.shared.change(|state| state.rotate(None))
    }

    /// Registers a service from Consul's own JSON (`PUT /v1/agent/service/register`); `snake_case` is fine.
    pub fn register(&self, definition: Value) -> Result<(), AgentError> {
        let definition = definition::Definition::decode(definition).map_err(|error| AgentError::Refused(error.to_string()))?;
        self.shared.change(|state| state.register(definition, false))
    }

    /// Removes a service and the sidecar made for it; tells whether it was there.
    pub fn deregister(&self, service_id: &str) -> bool {
        self.shared.change(|state| state.deregister(service_id))
    }

    /// The port that a registered service (mostly `<id>-sidecar-proxy`) listens on.
    pub fn port_of(&self, service_id: &str) -> Option<u16> {
        self.shared.read(|state| state.services.get(service_id).map(|service| service.definition.port))
    }

    /// Creates or replaces an intention; `*` is a wildcard.
    pub fn set_intention(&self, source: &str, destination: &str, action: IntentionAction) -> Result<(), AgentError> {
        let action = match action {
            IntentionAction::Allow => "allow",
            IntentionAction::Deny => "deny",
        };
        let document = serde_json::json!({"SourceName": source, "DestinationName": destination, "Action": action});
        let document: intentions::Document =
            serde_json::from_value(document).map_err(|error| AgentError::Refused(error.to_string()))?;
        let (source, destination) = document.into_source().map_err(AgentError::Refused)?;
        self.shared.change(|state| intentions::put(state, source, &destination))
    }

    /// Removes an intention; one that is not there is no error.
    pub fn delete_intention(&self, source: &str, destination: &str) -> Result<(), AgentError> {
        self.shared.change(|state| intentions::delete(state, source, destination))
    }

    /// Stores a config entry from Consul's own JSON (`PUT /v1/config`).
    pub fn put_config_entry(&self, entry: Value) -> Result<(), AgentError> {
        let entry = entries::Entry::decode(entry).map_err(|error| AgentError::Refused(error.to_string()))?;
        self.shared.change(|state| state.put_entry(entry))
    }

    /// Stores a prepared query from Consul's own JSON (`POST /v1/query`) and returns its id.
    pub fn put_query(&self, query: Value) -> Result<String, AgentError> {
        let id = uuid::Uuid::new_v4().to_string();
        let query = query::decode(query, id.clone()).map_err(AgentError::Refused)?;
        self.shared.change(|state| state.put_query(query)).map_err(AgentError::Refused)?;
        Ok(id)
    }

    /// Makes all checks of a service report `health` whatever they observe; `None` goes back to what they observe.
    pub fn set_health(&self, service_id: &str, health: Option<Health>) -> Result<(), AgentError> {
        self.shared.change(|state| state.pin(service_id, health))
    }

    /// Stops: waiting queries are answered, open requests get a moment, then everything ends.
    pub async fn stop(mut self) {
        self.shared.stop();
        if tokio::time::timeout(STOP_TIME, &mut self.server).await.is_err() {
            tracing::debug!("embedded agent: open requests cut after {STOP_TIME:?}");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.stop();
        self.server.abort();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn check_settings(settings: &AgentSettings) -> Result<(), AgentError> {
    if !settings.bind.ip().is_loopback() {
        return Err(AgentError::NotLoopback(settings.bind));
    }
    let refuse = |text: String| Err(AgentError::Setting(text));
    if settings.leaf_ttl < LEAF_TTL_MIN || settings.leaf_ttl > duration::DURATION_MAX {
        return refuse(format!("leaf lifetime {:?} must be between {LEAF_TTL_MIN:?} and a hundred years", settings.leaf_ttl));
    }
    if settings.root_ttl < settings.leaf_ttl || settings.root_ttl > duration::DURATION_MAX {
        return refuse(format!(
            "root lifetime {:?} must not be shorter than the leaf lifetime {:?}",
            settings.root_ttl, settings.leaf_ttl
        ));
    }
    if settings.check_interval.is_zero() {
        return refuse("the check interval must not be zero: use 10s".to_owned());
    }
    let (low, high) = settings.renewal_window;
    if !(0.0..=1.0).contains(&low) || !(low..=1.0).contains(&high) {
        return refuse(format!("renewal window {low} to {high} must lie between 0 and 1, the lower share first"));
    }
    let dc = &settings.datacenter;
    if dc.is_empty() || !dc.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_'))
    {
        return refuse(format!("datacenter {dc:?} may hold lower-case letters, digits, - and _ only"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_loopback_is_listened_on() {
        let bind: SocketAddr = "0.0.0.0:0".parse().expect("an address");
        let error = Agent::start(AgentSettings { bind, ..AgentSettings::default() }).await.expect_err("refused").to_string();
        assert!(error.contains("loopback only, not on 0.0.0.0:0") && error.contains("127.0.0.1"), "{error}");
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let good = AgentSettings::default();
        assert!(check_settings(&good).is_ok());
        for bad in [
            AgentSettings { leaf_ttl: Duration::from_millis(100), ..good.clone() },
            AgentSettings { root_ttl: Duration::from_secs(60), ..good.clone() },
            AgentSettings { datacenter: "DC 1".to_owned(), ..good.clone() },
            AgentSettings { renewal_window: (0.9, 0.6), ..good.clone() },
            AgentSettings { check_interval: Duration::ZERO, ..good },
        ] {
            assert!(check_settings(&bad).is_err(), "{bad:?}");
        }
    }
}
