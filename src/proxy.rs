//! The data plane's door: workers that each own a ring, their listeners and their connections.
//!
//! Knows no Consul and no HTTP. This build carries the door only; [`spawn`] refuses until the workers are in the tree.

use crate::config;
use crate::mesh::Snapshot;
use crate::store::{Reader, Wake};
use crate::telemetry::channel::Sender;

/// The running worker threads.
#[derive(Debug)]
pub struct Workers;

/// Why workers could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The data plane is not part of this build.
    #[error("this build has no data plane: build the whole tree")]
    Missing,
}

/// Starts one worker a reader.
pub fn spawn(_plane: &config::DataPlane, _readers: Vec<Reader<Snapshot>>, _senders: Vec<Sender>) -> Result<Workers, ProxyError> {
    Err(ProxyError::Missing)
}

impl Workers {
    /// One a worker.
    pub fn wakes(&self) -> Vec<Box<dyn Wake>> {
        Vec::new()
    }

    /// Stops accepting; live connections go on until the drain time, then close.
    pub fn drain(&self) {}

    /// Closes all at once.
    pub fn stop(&self) {}

    /// Whether every worker has ended.
    pub fn is_finished(&self) -> bool {
        true
    }

    /// Waits for every worker.
    pub fn join(self) -> Result<(), ProxyError> {
        Ok(())
    }
}
