//! Boot order, threads, signals, shutdown: the only room that sees all others.
//!
//! Boot: process limits, the kernel's features, the admin port's socket, the store, workers, admin thread, rotation
//! thread. What can fail for the user's reasons fails before the first thread runs.
//!
//! Invariant: a [`Sidecar`] holds no global state, so one process may run several (the demo runs two). A thread that ends
//! unasked ends the sidecar; a panic anywhere ends the process ([`abort_on_panic`]).

mod callers;
mod logs;
mod notify;
mod port;
mod process;
mod shelf;
mod sidecar;
mod supervise;
mod threads;

pub use logs::{init as init_logs, to_file as log_to_file};
pub use process::{abort_on_panic, prepare as prepare_process};
pub use sidecar::Sidecar;
pub use supervise::run;

/// Why a sidecar could not start or had to end; the kinds are exit codes.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The kernel refuses what is needed. Exit code 69.
    #[error("{0}")]
    Unavailable(String),
    /// A setting or file cannot work. Exit code 78.
    #[error("{0}")]
    Config(String),
    /// A fault of this program. Exit code 70.
    #[error("{0}")]
    Internal(String),
}
