//! One connection as one JSON line.
//!
//! Invariant: the keys and their order never change within a major version; a value that is not known is `null`. Only
//! `remedy`, `denial` and `why` are left out when nobody was denied, `caller` where local
//! callers are not told apart, `original` unless it was redirected, `server_name` unless it chose the
//! route. Text from peers is escaped by serde, so a line stays one line.

use std::fmt::Display;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};

use crate::mesh::caller;
use crate::telemetry::denial::{self, DenialId};
use crate::telemetry::record::ConnectionRecord;

/// Every key of a line and of its caller, by which `%RINGFENCE(field)%` names them.
pub(super) const FIELDS: [&str; 38] = [
    "time",
    "direction",
    "service",
    "upstream",
    "source",
    "destination",
    "decision",
    "by",
    "remedy",
    "bytes_from_mesh",
    "bytes_to_mesh",
    "connect_ms",
    "handshake_ms",
    "total_ms",
    "tls_version",
    "tls_suite",
    "tls_resumed",
    "downstream",
    "endpoint",
    "attempts",
    "reason",
    "detail",
    "original",
    "denial",
    "why",
    "dag",
    "task",
    "run",
    "try",
    "map_index",
    "component",
    "uid",
    "pid",
    "command",
    "ancestry",
    "identity",
    "tier",
    "rule",
];

/// The line's keys, in the order in which they are printed.
#[derive(Serialize)]
pub(super) struct Line<'a> {
    time: Text<Rfc3339>,
    direction: &'static str,
    service: &'a str,
    upstream: Option<&'a str>,
    source: Option<&'a str>,
    destination: Option<&'a str>,
    decision: Option<&'static str>,
    by: Option<Text<&'a crate::policy::Ground>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
    bytes_from_mesh: u64,
    bytes_to_mesh: u64,
    connect_ms: Option<f64>,
    handshake_ms: Option<f64>,
    total_ms: f64,
    tls_version: Option<Text<TlsVersion>>,
    tls_suite: Option<Text<TlsSuite>>,
    tls_resumed: bool,
    downstream: Option<Text<std::net::SocketAddr>>,
    endpoint: Option<Text<&'a crate::mesh::Address>>,
    attempts: u16,
    reason: &'static str,
    detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    original: Option<Text<std::net::SocketAddr>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<Caller<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    denial: Option<Text<DenialId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl<'a> From<&'a ConnectionRecord> for Line<'a> {
    fn from(record: &'a ConnectionRecord) -> Self {
        Self {
            time: Text(Rfc3339(record.start)),
            direction: record.direction.as_str(),
            service: &record.service,
            upstream: record.upstream.as_deref(),
            source: record.source.as_ref().map(|id| id.as_str()),
            destination: record.destination.as_ref().map(|id| id.as_str()),
            decision: record.decision.as_ref().map(|decision| if decision.allowed { "allowed" } else { "denied" }),
            by: record.decision.as_ref().map(|decision| Text(&decision.by)),
            caller: record.caller.as_deref().map(Caller::from),
            denial: record.denial.map(Text),
            why: record.denial.and_then(|_| denial::reason(record)),
            remedy: denial::remedy(record),
            bytes_from_mesh: record.bytes_from_mesh,
            bytes_to_mesh: record.bytes_to_mesh,
            connect_ms: record.connect.map(milliseconds),
            handshake_ms: record.handshake.map(milliseconds),
            total_ms: milliseconds(record.total),
            tls_version: record.tls_version.map(|version| Text(TlsVersion(version))),
            tls_suite: record.tls_suite.map(|suite| Text(TlsSuite(suite))),
            tls_resumed: record.tls_resumed,
            downstream: record.downstream.map(Text),
            original: record.original.map(Text),
            server_name: record.server_name.as_deref(),
            endpoint: record.endpoint.as_ref().map(Text),
            attempts: record.attempts,
            reason: record.reason.as_str(),
            detail: record.detail.as_deref(),
        }
    }
}

/// Who opened the connection, how that is known, and what it speaks as.
#[derive(Serialize)]
pub(crate) struct Caller<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    dag: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<&'a str>,
    #[serde(rename = "try", skip_serializing_if = "Option::is_none")]
    try_number: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    map_index: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    component: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "str::is_empty")]
    command: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    ancestry: &'a str,
    identity: Option<&'a str>,
    tier: &'static str,
    rule: &'a str,
}

impl<'a> From<&'a caller::Caller> for Caller<'a> {
    fn from(caller: &'a caller::Caller) -> Self {
        let task = caller.task();
        let (component, stranger) = match &caller.who {
            caller::Who::Task(_) => (None, None),
            caller::Who::Component(name) => (Some(&**name), None),
            caller::Who::Stranger(stranger) => (None, Some(stranger)),
        };
        Self {
            dag: task.map(|task| &*task.dag),
            task: task.map(|task| &*task.task),
            run: task.map(|task| &*task.run),
            try_number: task.map(|task| task.try_number),
            map_index: task.map(|task| task.map_index),
            component,
            uid: stranger.and_then(|stranger| stranger.uid),
            pid: stranger.and_then(|stranger| stranger.pid),
            command: stranger.map_or("", |stranger| &stranger.command),
            ancestry: stranger.map_or("", |stranger| &stranger.ancestry),
            identity: caller.verdict.as_ref().ok().map(|grant| &**grant.identity()),
            tier: caller.tier.as_str(),
            rule: caller.rule(),
        }
    }
}

/// Fractions to the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Anything printable as a JSON string, without a copy of its own.
struct Text<T>(T);

impl<T: Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// A moment in UTC with milliseconds, as logs and the admin port print it.
#[derive(Debug, Clone, Copy)]
pub struct Rfc3339(pub SystemTime);

impl Display for Rfc3339 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let since = self.0.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // Certificates may end in the year 9999 and later; `time` ends there.
        let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        let Ok(at) = time::OffsetDateTime::from_unix_timestamp(seconds) else { return f.write_str("9999-12-31T23:59:59.999Z") };
        let (date, clock, ms) = (at.date(), at.time(), since.subsec_millis());
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{ms:03}Z",
            date.year(),
            u8::from(date.month()),
            date.day(),
            clock.hour(),
            clock.minute(),
            clock.second(),
        )
    }
}

/// A TLS version number as its name.
pub(super) fn tls_version(number: u16) -> String {
    TlsVersion(number).to_string()
}

/// A cipher suite number as its registered name.
pub(super) fn tls_suite(number: u16) -> String {
    TlsSuite(number).to_string()
}

struct TlsVersion(u16);

impl Display for TlsVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0x0303 => f.write_str("TLSv1.2"),
            0x0304 => f.write_str("TLSv1.3"),
            other => write!(f, "0x{other:04x}"),
        }
    }
}

struct TlsSuite(u16);

impl Display for TlsSuite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match rustls::CipherSuite::from(self.0).as_str() {
            // rustls marks the 1.3 suites; the registry's name has no such mark.
            Some(name) => match name.strip_prefix("TLS13_") {
                Some(rest) => write!(f, "TLS_{rest}"),
                None => f.write_str(name),
            },
            None => write!(f, "0x{:04x}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_have_their_registered_names() {
        let name = |number| TlsSuite(number).to_string();
        assert_eq!(name(0x1301), "TLS_AES_128_GCM_SHA256");
        assert_eq!(name(0xc02b), "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256");
        assert_eq!(name(0xfff0), "0xfff0");
    }

    #[test]
    fn moments_are_rfc_3339_at_both_ends_of_time() {
        let at = |seconds| Rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(1_767_323_045), "2026-01-02T03:04:05.000Z");
        assert_eq!(at(1 << 40), "9999-12-31T23:59:59.999Z");
    }
}
