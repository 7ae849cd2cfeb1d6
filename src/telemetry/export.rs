//! Prometheus metrics: the workers' cells as absolute values, and whatever other rooms record with the `metrics` macros.
//!
//! Invariant: every name in [`METRICS`] has a HELP text and a unit, and nothing else is published here. Counters never
//! fall; a gauge whose subject is gone reads zero, or NaN where zero would be a lie (certificate expiry).
//!
//! Rendering happens on the admin thread on request; workers only ever wrote plain cells. The listeners' sums have a recorder of
//! their own for each page: of five hundred upstreams that is three megabytes, and most of the time nobody looks at them.

mod names;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{Histogram, Key as MetricKey, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::cells::{Direction, WorkerCells};
use super::close::CloseReason;
use super::hub::{Callers, Key, Listeners, Series, Totals};
use super::log::Counts;
use super::record::ConnectionRecord;
use super::stats::Which;
use crate::mesh::Snapshot;

pub use names::{Kind, METRICS, Metric};

/// Bounds of all duration histograms, in seconds: from a loopback connect to a long-lived connection.
const SECONDS_BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0, 3600.0];
/// Keys with histograms of their own; further ones share one.
const HISTOGRAM_KEYS_MAX: usize = 512;

static METADATA: Metadata<'static> = Metadata::new("ringfence", Level::INFO, None);

/// The process's recorder and what is fed into it from here.
pub struct Exporter {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
    durations: HashMap<Key, Durations>,
    /// Service and proxy id of every leaf published last.
    leaves: HashSet<(Arc<str>, Arc<str>)>,
    installed: bool,
}

/// The listeners' sums at one moment.
#[derive(Debug)]
pub struct Sums(Vec<(Key, Totals)>);

impl Sums {
    /// With [`Which::Used`] those of upstreams that something was counted for, and those of ways in.
    pub(super) fn of(series: &Series, which: Which) -> Self {
        let wanted = |key: &Key, totals: &Totals| {
            which == Which::All || key.direction == Direction::Inbound || *totals != Totals::default()
        };
        let all = series.totals().filter(|(key, totals)| wanted(key, totals));
        Self(all.map(|(key, totals)| (key.clone(), totals)).collect())
    }

    /// In the text format. Takes its time where there are many.
    pub fn text(&self) -> String {
        let recorder = PrometheusBuilder::new().build_recorder();
        describe(&recorder);
        for (key, totals) in &self.0 {
            publish_totals(&recorder, key, totals);
        }
        recorder.handle().render()
    }
}

struct Durations {
    connect: Histogram,
    handshake: Histogram,
    total: Histogram,
}

impl Exporter {
    /// A recorder with every metric described.
    pub(super) fn new() -> Self {
        // Refused only when the list is empty, which it is not; then the default (summaries) would still be right.
        let builder = PrometheusBuilder::new().set_buckets(&SECONDS_BUCKETS).unwrap_or_default();
        let recorder = Arc::new(builder.build_recorder());
        describe(&recorder);
        let exporter =
            Self { handle: recorder.handle(), recorder, durations: HashMap::new(), leaves: HashSet::new(), installed: false };
        exporter.publish_process();
        exporter
    }

    /// Makes the recorder the process's. Returns whether it is in place now.
    pub(super) fn install(&mut self) -> bool {
        self.installed = self.installed || metrics::set_global_recorder(Arc::clone(&self.recorder)).is_ok();
        self.installed
    }

    fn publish_process(&self) {
        let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.gauge("process_start_time_seconds", Vec::new(), start.as_secs_f64());
        self.gauge("ringfence_build_info", vec![Label::new("version", env!("CARGO_PKG_VERSION"))], 1.0);
    }

    /// Takes a connection's durations in.
    pub(super) fn observe(&mut self, record: &ConnectionRecord) {
        if record.reason == CloseReason::Probe {
            return;
        }
        let durations = self.durations_of(record);
        durations.total.record(record.total.as_secs_f64());
        if let Some(connect) = record.connect {
            durations.connect.record(connect.as_secs_f64());
        }
        if let Some(handshake) = record.handshake {
            durations.handshake.record(handshake.as_secs_f64());
        }
    }

    fn durations_of(&mut self, record: &ConnectionRecord) -> &Durations {
        let mut key =
            Key { direction: record.direction, service: Arc::clone(&record.service), upstream: record.upstream.clone() };
        if self.durations.len() >= HISTOGRAM_KEYS_MAX && !self.durations.contains_key(&key) {
            key = Key::other(record.direction);
        }
        let recorder = &self.recorder;
        self.durations.entry(key).or_insert_with_key(|key| {
            let histogram =
                |name: &'static str| recorder.register_histogram(&MetricKey::from_parts(name, labels(key)), &METADATA);
            Durations {
                connect: histogram("ringfence_connect_duration_seconds"),
                handshake: histogram("ringfence_handshake_duration_seconds"),
                total: histogram("ringfence_connection_duration_seconds"),
            }
        })
    }

    /// Publishes who talked to whom. Runs and tries are no labels: they never end.
    pub(super) fn publish_callers(&self, callers: &Callers) {
        for (speaker, upstream, counts) in callers.totals() {
            let labels = || {
                let (name, value) = speaker.label();
                vec![Label::new(name, value.to_owned()), Label::new("upstream", upstream.to_string())]
            };
            self.counter("ringfence_caller_connections_total", labels(), counts.connections);
            self.counter("ringfence_caller_denied_total", labels(), counts.denied);
            for (flow, value) in [("from_mesh", counts.bytes_from_mesh), ("to_mesh", counts.bytes_to_mesh)] {
                self.counter("ringfence_caller_bytes_total", with(labels(), "flow", flow), value);
            }
        }
    }

    /// Publishes what one worker counts for itself.
    pub(super) fn publish_worker(&self, worker: usize, cells: &WorkerCells) {
        let labels = || vec![Label::new("worker", worker.to_string())];
        let counters = [
            ("ringfence_worker_enters_total", &cells.enters),
            ("ringfence_worker_completions_total", &cells.completions),
            ("ringfence_worker_stale_completions_total", &cells.stale_completions),
            ("ringfence_worker_accept_errors_total", &cells.accept_errors),
            ("ringfence_worker_payload_bytes_moved_total", &cells.payload_bytes_moved),
            ("ringfence_worker_buffer_ring_empty_total", &cells.buffer_ring_empty),
            ("ringfence_worker_events_dropped_total", &cells.events_dropped),
        ];
        for (name, cell) in counters {
            self.counter(name, labels(), cell.value());
        }
        let gauges = [
            ("ringfence_worker_buffer_bytes_leased", &cells.buffer_bytes_leased),
            ("ringfence_worker_connections_active", &cells.connections),
            ("ringfence_worker_handshakes_active", &cells.handshakes_active),
            ("ringfence_worker_generation", &cells.generation),
            ("ringfence_worker_listeners", &cells.listeners),
        ];
        for (name, cell) in gauges {
            self.gauge(name, labels(), cell.value() as f64);
        }
    }

    /// Publishes how many listeners are bound.
    pub(super) fn publish_listeners(&self, listeners: &Listeners) {
        let failed = listeners.iter().filter(|listener| listener.failed() > 0).count();
        let bound = listeners.iter().filter(|listener| listener.failed() == 0).count();
        for (state, count) in [("bound", bound), ("failed", failed)] {
            self.gauge("ringfence_listeners", vec![Label::new("state", state)], count as f64);
        }
    }

    /// Publishes what became of the connection log's lines.
    pub(super) fn publish_log(&self, counts: Counts) {
        self.counter("ringfence_log_lines_total", Vec::new(), counts.written);
        self.counter("ringfence_log_lines_dropped_total", Vec::new(), counts.dropped);
        self.counter("ringfence_log_errors_total", Vec::new(), counts.errors);
    }

    /// Publishes what is enforced: the generation, how far the workers are, and when each leaf ends.
    pub fn publish_snapshot(&mut self, snapshot: &Snapshot, acknowledged: u64) {
        self.gauge("ringfence_snapshot_generation", Vec::new(), snapshot.generation as f64);
        self.gauge("ringfence_snapshot_generation_acknowledged", Vec::new(), acknowledged as f64);
        let mut gone = std::mem::take(&mut self.leaves);
        for service in snapshot.all_services() {
            let Some(identity) = &service.identity else { continue };
            let end = identity.svid.not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
            let leaf = (Arc::clone(&service.name), Arc::clone(&service.proxy_id));
            self.publish_leaf(&leaf, end.as_secs_f64());
            gone.remove(&leaf);
            self.leaves.insert(leaf);
        }
        for leaf in gone {
            // Zero would alert as expired, the last value as expiring.
            self.publish_leaf(&leaf, f64::NAN);
        }
    }

    fn publish_leaf(&self, (service, proxy): &(Arc<str>, Arc<str>), end: f64) {
        let labels = vec![Label::new("service", service.to_string()), Label::new("proxy", proxy.to_string())];
        self.gauge("ringfence_leaf_not_after_timestamp_seconds", labels, end);
    }

    /// Takes recorded samples in, so that they do not pile up between scrapes.
    pub(super) fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Everything but the listeners' sums, in the text format.
    pub(super) fn render(&self) -> String {
        self.handle.render()
    }

    fn counter(&self, name: &'static str, labels: Vec<Label>, value: u64) {
        counter(&self.recorder, name, labels, value);
    }

    fn gauge(&self, name: &'static str, labels: Vec<Label>, value: f64) {
        gauge(&self.recorder, name, labels, value);
    }
}

fn publish_totals(recorder: &PrometheusRecorder, key: &Key, totals: &Totals) {
    let counters = [
        ("ringfence_connections_total", totals.connections),
        ("ringfence_handshakes_total", totals.handshakes),
        ("ringfence_handshakes_resumed_total", totals.handshakes_resumed),
        ("ringfence_connect_attempts_total", totals.connect_attempts),
        ("ringfence_connect_failures_total", totals.connect_failures),
    ];
    for (name, value) in counters {
        counter(recorder, name, labels(key), value);
    }
    match key.direction {
        Direction::Inbound => counter(recorder, "ringfence_connections_allowed_total", labels(key), totals.allowed),
        Direction::Outbound => counter(recorder, "ringfence_ejections_total", labels(key), totals.ejections),
    }
    for (flow, value) in [("from_mesh", totals.bytes_from_mesh), ("to_mesh", totals.bytes_to_mesh)] {
        counter(recorder, "ringfence_bytes_total", with(labels(key), "flow", flow), value);
    }
    gauge(recorder, "ringfence_connections_active", labels(key), totals.active as f64);
    for (reason, value) in CloseReason::ALL.iter().zip(totals.closed) {
        // Reasons that never happened would be most of the page. A first denial must be visible to rate(), though.
        let always = *reason == CloseReason::Denied && key.direction == Direction::Inbound;
        if value > 0 || always {
            counter(recorder, "ringfence_connections_closed_total", with(labels(key), "reason", reason.as_str()), value);
        }
    }
}

fn describe(recorder: &PrometheusRecorder) {
    for metric in METRICS {
        let (name, unit, help) = (metric.name.into(), Some(metric.unit), metric.help.into());
        match metric.kind {
            Kind::Counter => recorder.describe_counter(name, unit, help),
            Kind::Gauge => recorder.describe_gauge(name, unit, help),
            Kind::Histogram => recorder.describe_histogram(name, unit, help),
        }
    }
}

fn counter(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<Label>, value: u64) {
    recorder.register_counter(&MetricKey::from_parts(name, labels), &METADATA).absolute(value);
}

fn gauge(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<Label>, value: f64) {
    recorder.register_gauge(&MetricKey::from_parts(name, labels), &METADATA).set(value);
}

fn labels(key: &Key) -> Vec<Label> {
    let mut labels = Vec::with_capacity(4);
    labels.push(Label::new("direction", key.direction.as_str()));
    labels.push(Label::new("service", key.service.to_string()));
    labels.extend(key.upstream.as_ref().map(|upstream| Label::new("upstream", upstream.to_string())));
    labels
}

fn with(mut labels: Vec<Label>, name: &'static str, value: &'static str) -> Vec<Label> {
    labels.push(Label::new(name, value));
    labels
}

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exporter").field("installed", &self.installed).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(super) mod tests;
