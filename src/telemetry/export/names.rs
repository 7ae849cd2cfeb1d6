//! Every metric that the data plane publishes: its name, kind, unit and HELP text.
//!
//! Invariant: names follow Prometheus' rules (base units, `_total` on counters) and never change within a major version.

use metrics::Unit;

/// What kind of metric it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// One metric's description.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its unit.
    pub unit: Unit,
    /// Its HELP text.
    pub help: &'static str,
}

const fn counter(name: &'static str, unit: Unit, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, unit, help }
}

const fn gauge(name: &'static str, unit: Unit, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, unit, help }
}

const fn seconds(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram, unit: Unit::Seconds, help }
}

/// All of them, in reading order.
pub const METRICS: &[Metric] = &[
    counter("ringfence_connections_total", Unit::Count, "Connections accepted."),
    gauge("ringfence_connections_active", Unit::Count, "Connections open now."),
    counter("ringfence_connections_allowed_total", Unit::Count, "Inbound connections that intentions let in."),
    counter("ringfence_connections_closed_total", Unit::Count, "Connections ended, by reason; denied ones have reason denied."),
    counter(
        "ringfence_bytes_total",
        Unit::Bytes,
        "Payload bytes carried; flow is from_mesh (towards the local side) or to_mesh.",
    ),
    counter("ringfence_handshakes_total", Unit::Count, "TLS handshakes completed."),
    counter("ringfence_handshakes_resumed_total", Unit::Count, "TLS handshakes completed by resumption."),
    counter("ringfence_connect_attempts_total", Unit::Count, "Connects tried, to the local app or to upstream endpoints."),
    counter("ringfence_connect_failures_total", Unit::Count, "Connects that failed or timed out."),
    counter("ringfence_ejections_total", Unit::Count, "Upstream endpoints taken out by passive health checking."),
    counter(
        "ringfence_caller_connections_total",
        Unit::Count,
        "Closed connections of local callers, by DAG or component of Airflow; component is also unidentified or other.",
    ),
    counter(
        "ringfence_caller_denied_total",
        Unit::Count,
        "Connections of local callers that were turned away, here or by the called side.",
    ),
    counter(
        "ringfence_caller_bytes_total",
        Unit::Bytes,
        "Payload bytes of closed connections of local callers; flow is from_mesh (towards the caller) or to_mesh.",
    ),
    seconds("ringfence_connect_duration_seconds", "Time to open the far side of a connection."),
    seconds("ringfence_handshake_duration_seconds", "Time of the TLS handshake."),
    seconds("ringfence_connection_duration_seconds", "Time from accept to close."),
    gauge("ringfence_listeners", Unit::Count, "Listeners, by state: bound, or failed on at least one worker."),
    counter("ringfence_worker_enters_total", Unit::Count, "io_uring_enter calls."),
    counter("ringfence_worker_completions_total", Unit::Count, "Completions reaped."),
    counter("ringfence_worker_stale_completions_total", Unit::Count, "Completions for a connection that was already gone."),
    counter("ringfence_worker_accept_errors_total", Unit::Count, "Accepts that failed for want of descriptors or memory."),
    counter(
        "ringfence_worker_payload_bytes_moved_total",
        Unit::Bytes,
        "Payload bytes moved in user space (partial records at a region's end).",
    ),
    counter("ringfence_worker_buffer_ring_empty_total", Unit::Count, "Times the shared buffer ring was empty."),
    counter("ringfence_worker_events_dropped_total", Unit::Count, "Events that did not fit the way to the admin thread."),
    gauge("ringfence_worker_buffer_bytes_leased", Unit::Bytes, "Buffer bytes in use now."),
    gauge("ringfence_worker_connections_active", Unit::Count, "Connections that the worker has open now."),
    gauge("ringfence_worker_handshakes_active", Unit::Count, "Handshakes under way now."),
    gauge("ringfence_worker_generation", Unit::Count, "Snapshot generation that the worker uses."),
    gauge("ringfence_worker_listeners", Unit::Count, "Listeners that the worker has bound."),
    gauge("ringfence_snapshot_generation", Unit::Count, "Snapshot generation published last."),
    gauge("ringfence_snapshot_generation_acknowledged", Unit::Count, "Oldest snapshot generation that a worker still uses."),
    gauge(
        "ringfence_leaf_not_after_timestamp_seconds",
        Unit::Seconds,
        "When the leaf certificate in use ends, as Unix time; NaN once the service is gone.",
    ),
    counter("ringfence_log_lines_total", Unit::Count, "Connection log lines written."),
    counter(
        "ringfence_log_lines_dropped_total",
        Unit::Count,
        "Connection log lines dropped because the sink was slow or failed.",
    ),
    counter("ringfence_log_errors_total", Unit::Count, "Writes and reopens of the connection log that failed."),
    gauge("ringfence_build_info", Unit::Count, "Always 1; the version is in the label."),
    gauge("process_start_time_seconds", Unit::Seconds, "When the process started, as Unix time."),
];
