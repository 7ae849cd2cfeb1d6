//! Consul's delta ADS stream as a second feeder of [`Snapshot`].
//!
//! One stream carries clusters, their endpoints, listeners and their routes; certificates for clients of ingress gateways come on
//! streams of their own (`secrets`). Each resource is understood at L4 (`cluster`, `endpoint`,
//! `listener`, `tls_context`, `rbac`) into values that `build` makes a snapshot of; what cannot be served is refused with its
//! type, name, field and value, and the last good state stays (`shelf`, `held`).
//!
//! Invariant: whom a listener lets in and how it is encrypted in Envoy holds here too, or the listener is refused. What only
//! tunes it has the process's own settings instead: balancing over workers. A changed leaf or RBAC closes no connection that is
//! still allowed. Knows no proxy, and the HTTP API not at all.

pub mod access_log;
pub mod bootstrap;
mod build;
mod cluster;
mod connector;
mod endpoint;
mod feeder;
pub(super) mod hatch;
mod held;
mod identity;
mod listener;
pub mod proto_json;
mod rbac;
mod refusal;
mod resolver;
mod secrets;
mod shelf;
mod shown;
mod stream;
mod subscription;
mod tls_context;

use tokio::sync::{mpsc, watch};

use super::{Command, ControlError, Status, dump};
use crate::config::envoy::Xds;
use crate::mesh::Snapshot;
use crate::store::Publisher;

/// [`super::run`], fed by Consul's xDS server.
pub async fn run(
    settings: Xds,
    workers: usize,
    publisher: Publisher<Snapshot>,
    status: watch::Sender<Status>,
    commands: mpsc::Receiver<Command>,
    resources: dump::Sender,
) -> Result<(), ControlError> {
    feeder::Feeder::new(settings, workers, publisher, status, resources)?.run(commands).await
}

#[cfg(test)]
mod tests;
