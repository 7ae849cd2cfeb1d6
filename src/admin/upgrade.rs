//! `/upgrade`: has the program's file start anew in this process's place, and tells how that goes.
//!
//! Invariant: an answer is of the process that gives it: its own pid and version, and whether it serves. While one process takes
//! over from another both take requests of the one socket, so whoever asks must look at the pid.

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use super::Lifecycle;
use super::routes::{self, Admin};

/// How the last wish for an upgrade goes, decided by `app`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Upgrade {
    /// Wishes so far.
    pub wishes: u32,
    /// The process that is to take over, or has.
    pub successor: Option<u32>,
    /// Why the last one came to nothing. This process goes on then.
    pub error: Option<String>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The process that answers.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// It accepts connections and has all that it needs.
    pub serving: bool,
    /// What it does about being replaced.
    #[serde(flatten)]
    pub upgrade: Upgrade,
}

pub(super) async fn upgrade(State(shared): Admin) -> Response {
    routes::json(&Answer {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        serving: *shared.lifecycle.borrow() == Lifecycle::Live,
        upgrade: shared.upgrade.borrow().clone(),
    })
}
