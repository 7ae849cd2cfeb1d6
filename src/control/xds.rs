//! Consul's delta ADS stream as a second feeder of [`Snapshot`].

pub mod access_log;
pub mod bootstrap;
pub mod proto_json;

use tokio::sync::{mpsc, watch};

use super::{Command, ControlError, Status, dump};
use crate::config::envoy::Xds;
use crate::mesh::Snapshot;
use crate::store::Publisher;

/// [`super::run`], fed by Consul's xDS server.
pub async fn run(
    _settings: Xds,
    _workers: usize,
    _publisher: Publisher<Snapshot>,
    _status: watch::Sender<Status>,
    _commands: mpsc::Receiver<Command>,
    _resources: dump::Sender,
) -> Result<(), ControlError> {
    Err(ControlError::Config("the xDS feeder is not there yet".to_owned()))
}
