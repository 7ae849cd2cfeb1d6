//! The last connections to each upstream that came to nothing: what somebody wants to see who asks why it does not work.
//!
//! Invariant: [`FAILURES_MAX`] an upstream, of at most [`UPSTREAMS_MAX`] upstreams. A denial here is none of them: it has an id
//! and a place of its own (`denials`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use crate::mesh::Address;
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::ConnectionRecord;

/// Kept of one upstream.
const FAILURES_MAX: usize = 5;
/// Upstreams with failures kept, over the life of the process.
const UPSTREAMS_MAX: usize = 1_024;

/// One connection that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// When it ended.
    pub time: SystemTime,
    /// Why.
    pub reason: CloseReason,
    /// The endpoint tried last.
    pub endpoint: Option<Address>,
    /// What rustls or the system said.
    pub detail: Option<Box<str>>,
}

/// By upstream.
#[derive(Debug, Default)]
pub struct Failures(HashMap<Arc<str>, VecDeque<Failure>>);

impl Failures {
    /// Keeps a record that tells of a failure.
    pub(super) fn note(&mut self, record: &ConnectionRecord) {
        let Some(upstream) = record.upstream.as_ref().filter(|_| is_failure(record.reason)) else { return };
        if self.0.len() >= UPSTREAMS_MAX && !self.0.contains_key(upstream) {
            return;
        }
        let failures = self.0.entry(Arc::clone(upstream)).or_default();
        failures.truncate(FAILURES_MAX - 1);
        failures.push_front(Failure {
            time: record.start.checked_add(record.total).unwrap_or(record.start),
            reason: record.reason,
            endpoint: record.endpoint.clone(),
            detail: record.detail.clone(),
        });
    }

    /// Those of one upstream, the newest first.
    pub fn of(&self, upstream: &str) -> impl Iterator<Item = &Failure> {
        self.0.get(upstream).into_iter().flatten()
    }
}

/// Whether the way to the upstream is at fault, or the upstream itself; not the local client, a denial here, or our own end.
fn is_failure(reason: CloseReason) -> bool {
    match reason {
        CloseReason::DeniedByPeer
        | CloseReason::PeerReset
        | CloseReason::Truncated
        | CloseReason::HandshakeFailed
        | CloseReason::IdentityMismatch
        | CloseReason::HandshakeTimeout
        | CloseReason::ProtocolError
        | CloseReason::ConnectFailed
        | CloseReason::ConnectTimeout
        | CloseReason::NoEndpoint
        | CloseReason::Limit
        | CloseReason::NoIdentity
        | CloseReason::OutOfBuffers => true,
        CloseReason::Complete
        | CloseReason::Probe
        | CloseReason::Denied
        | CloseReason::CallerDenied
        | CloseReason::Revoked
        | CloseReason::LocalReset
        | CloseReason::AppUnreachable
        | CloseReason::NoRoute
        | CloseReason::Drained
        | CloseReason::Shutdown
        | CloseReason::Idle => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::callers::tests::{outbound, task};
    use super::*;

    fn failed(upstream: &str, second: u64, reason: CloseReason) -> ConnectionRecord {
        let record = outbound(task("d", "t", "r", 1), upstream, None);
        ConnectionRecord { start: record.start + Duration::from_secs(second), reason, ..record }
    }

    #[test]
    fn the_last_failures_of_an_upstream_are_kept_and_successes_are_not() {
        let mut failures = Failures::default();
        for second in 0..20 {
            failures.note(&failed("db", second, CloseReason::ConnectFailed));
            failures.note(&failed("db", second, CloseReason::Complete));
        }
        failures.note(&failed("cache", 0, CloseReason::CallerDenied));
        let times: Vec<_> = failures.of("db").map(|failure| failure.time).collect();
        assert_eq!(times.len(), FAILURES_MAX);
        assert!(times.is_sorted_by(|a, b| a > b), "the newest first");
        assert_eq!(failures.of("cache").count(), 0, "a denial here is told by its id");
    }

    #[test]
    fn upstreams_without_end_cost_no_memory_without_end() {
        let mut failures = Failures::default();
        for number in 0..UPSTREAMS_MAX + 10 {
            failures.note(&failed(&format!("u{number}"), 0, CloseReason::NoEndpoint));
        }
        assert_eq!(failures.0.len(), UPSTREAMS_MAX);
    }
}
