//! What a feeder has accepted, as JSON, for the admin port's `/config_dump`.
//!
//! Invariant: whoever makes [`Resources`] has redacted them: private keys, tokens and generic secrets are `[redacted]` before
//! they come here, because the admin port prints the rest as it is. JSON is canonical proto JSON with the protobufs' own field
//! names (snake_case), and every `Any` is expanded with its `@type`.
//!
//! The channel carries what is needed to make them, not the JSON itself: that is many times as large, and hardly anybody asks.
//!
//! Knows no protobuf and no HTTP. A feeder without resources of its own leaves the channel at `None`: then the admin port
//! makes the resources up from the snapshot.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::Value;
use tokio::sync::watch;

/// What a feeder has accepted, in whatever form it keeps that.
pub trait Accepted: std::fmt::Debug + Send + Sync {
    /// The resources as they are shown. Takes its time and some megabytes: not for a thread that others wait for.
    fn resources(&self) -> Resources;
}

/// Where a feeder puts what it has accepted. Replaced whole at each change.
pub type Sender = watch::Sender<Option<Arc<dyn Accepted>>>;
/// Where the admin port reads it.
pub type Receiver = watch::Receiver<Option<Arc<dyn Accepted>>>;

/// Nothing accepted yet.
pub fn channel() -> (Sender, Receiver) {
    watch::channel(None)
}

/// Every resource that is in force, in the order in which it is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Resources {
    /// `envoy.config.bootstrap.v3.Bootstrap`, without `@type`.
    pub bootstrap: Value,
    /// When the bootstrap was read.
    pub bootstrap_at: SystemTime,
    /// `envoy.config.cluster.v3.Cluster`, of the bootstrap.
    pub static_clusters: Vec<Resource>,
    /// `envoy.config.listener.v3.Listener`, of the bootstrap.
    pub static_listeners: Vec<Resource>,
    /// `envoy.extensions.transport_sockets.tls.v3.Secret`, of the bootstrap.
    pub static_secrets: Vec<Resource>,
    /// `envoy.config.cluster.v3.Cluster`, by CDS.
    pub clusters: Vec<Resource>,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment`, by EDS.
    pub endpoints: Vec<Resource>,
    /// `envoy.config.listener.v3.Listener`, by LDS.
    pub listeners: Vec<Resource>,
    /// `envoy.config.route.v3.RouteConfiguration`, by RDS.
    pub routes: Vec<Resource>,
    /// `envoy.extensions.transport_sockets.tls.v3.Secret`, by SDS.
    pub secrets: Vec<Resource>,
}

/// One resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// The version that the server gave it; empty for static ones.
    pub version_info: String,
    /// When it came into force.
    pub last_updated: SystemTime,
    /// The resource with its `@type`, redacted; `Value::Null` when none of this name is in force.
    pub json: Value,
    /// Its newest version, where that waits for what it needs; what is in force goes on meanwhile.
    pub warming: Option<Box<Self>>,
    /// The newest update of this name, when it was refused.
    pub error_state: Option<Refused>,
}

/// An update that was refused, while the last good one stays in force.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// When it came.
    pub at: SystemTime,
    /// Why it was refused, as the nack said.
    pub details: String,
    /// Its version.
    pub version_info: String,
}

/// Resources that are JSON already.
impl Accepted for Resources {
    fn resources(&self) -> Resources {
        self.clone()
    }
}
