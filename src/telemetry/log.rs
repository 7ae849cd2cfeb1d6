//! The connection log: one JSON line a connection, and a warning for whoever is turned away.
//!
//! Invariant: nothing here blocks (`spool`), and no line holds a secret: identities, addresses and sizes only. Probes are
//! counted, not logged. A denial is always told to the operator, at most once in [`DENIAL_INTERVAL`] for a source and a
//! service, with the count of those in between.
//!
//! Knows no worker: the hub hands the records over on the admin thread.

mod access;
mod line;
mod spool;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::close::CloseReason;
use super::limiter::Limiter;
use super::record::ConnectionRecord;
use crate::identity::SpiffeId;
use crate::mesh::caller::Who;

pub use access::{AccessLogs, check as check_access_log};
pub use line::Rfc3339;
pub use spool::{BATCH_BYTES_MAX, BATCHES_MAX, Counts, Destination, Reopener, Spool};

/// One warning a source and service in this time.
pub const DENIAL_INTERVAL: Duration = Duration::from_secs(10);

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be opened for appending.
    #[error("log file {path}: {source}; its folder must exist and be writable by this user, or choose stdout, stderr or none")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No thread for the writer.
    #[error("no thread for the log's writer: {0}; raise TasksMax or RLIMIT_NPROC")]
    Thread(std::io::Error),
    /// An access log's format cannot be read.
    #[error("access log format: {0}")]
    Format(String),
}

/// Writes connection records.
#[derive(Debug)]
pub struct ConnectionLog {
    spool: Spool,
    denials: Limiter<Denial>,
    /// Reused for each line.
    line: Vec<u8>,
}

/// A record as the object that its line is.
pub(super) fn json(record: &ConnectionRecord) -> serde_json::Result<Box<serde_json::value::RawValue>> {
    serde_json::value::to_raw_value(&line::Line::from(record))
}

/// What denials are counted by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Denial {
    source: Option<SpiffeId>,
    /// A local caller's name, without run and try.
    caller: Option<Arc<str>>,
    service: Arc<str>,
}

impl ConnectionLog {
    /// Opens the log; `reopener` makes it open its file again.
    pub fn open(destination: &Destination, reopener: &Reopener) -> Result<Self, LogError> {
        Ok(Self { spool: Spool::open(destination, reopener)?, denials: Limiter::new(DENIAL_INTERVAL), line: Vec::new() })
    }

    /// Takes one record.
    pub fn record(&mut self, record: &ConnectionRecord, now: Instant) {
        if record.reason == CloseReason::Probe {
            return;
        }
        if record.denial.is_some() {
            self.warn_denied(record, now);
        }
        if !self.spool.is_on() {
            return;
        }
        self.line.clear();
        if let Err(error) = serde_json::to_writer(&mut self.line, &line::Line::from(record)) {
            // Writing to memory cannot fail and the types have no fallible part; if they ever do, say so.
            tracing::error!(%error, "a connection log line could not be made");
            return;
        }
        self.spool.push(&self.line);
    }

    /// Hands lines to the writer and tells of denials that were kept back. Call with every tick.
    pub fn flush(&mut self, now: Instant) {
        self.spool.flush();
        for (denial, suppressed) in self.denials.due(now) {
            match denial {
                Some(denial) => tracing::warn!(
                    source = denial.source.as_ref().map_or("unknown", |id| id.as_str()),
                    service = &*denial.service,
                    suppressed,
                    "denied again"
                ),
                None => tracing::warn!(suppressed, "denied more sources than can be told one by one; see the connection log"),
            }
        }
    }

    /// What became of the lines so far.
    pub fn counts(&self) -> Counts {
        self.spool.counts()
    }

    fn warn_denied(&mut self, record: &ConnectionRecord, now: Instant) {
        let caller = record.caller.as_deref().map(|caller| match &caller.who {
            Who::Task(task) => Arc::clone(&task.dag),
            Who::Component(name) => Arc::clone(name),
            Who::Stranger(stranger) => format!("uid {:?} {}", stranger.uid, stranger.command).into(),
        });
        let service = record.upstream.as_ref().unwrap_or(&record.service);
        let denial = Denial { source: record.source.clone(), caller, service: Arc::clone(service) };
        let Some(suppressed) = self.denials.ask(denial, now) else { return };
        let by = record.decision.as_ref().map(|decision| decision.by.to_string()).unwrap_or_default();
        tracing::warn!(
            source = record.source.as_ref().map_or("unknown", |id| id.as_str()),
            service = &**service,
            by,
            why = super::denial::reason(record).unwrap_or_default(),
            remedy = super::denial::remedy(record).unwrap_or_default(),
            reason = record.reason.as_str(),
            denial = %record.denial.map(|id| id.to_string()).unwrap_or_default(),
            suppressed,
            "denied"
        );
    }
}

#[cfg(test)]
pub(crate) mod tests;
