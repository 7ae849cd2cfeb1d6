//! What a run counted, and the JSON object that says so.
//!
//! Invariant: every message that was begun ends in exactly one place: `messages` or one of the failures. Latency is kept in
//! nanoseconds with three significant digits and told in microseconds. Must not know shapes. Cannot fail: a latency beyond the
//! histogram's range is kept as its maximum.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::wire::{Failure, Traffic};

/// The longest latency that is told apart, in nanoseconds: 10 minutes.
const LATENCY_NS_MAX: u64 = 600_000_000_000;
/// Failures that standard error describes; the rest is only counted.
const FAILURES_SHOWN_MAX: u64 = 10;

/// Everything counted.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) traffic: Rc<Traffic>,
    pub(crate) latency: Latency,
    pub(crate) connect: Latency,
    pub(crate) first_answer: Latency,
    connections_opened: Cell<u64>,
    messages: Cell<u64>,
    denied_ok: Cell<u64>,
    failures: RefCell<Failures>,
    failures_shown: Cell<u64>,
}

/// Failed messages and connections by kind.
#[derive(Debug, Default, Clone, Serialize)]
pub(crate) struct Failures {
    pub(crate) connect: u64,
    pub(crate) reset: u64,
    pub(crate) eof: u64,
    pub(crate) mismatch: u64,
    pub(crate) timeout: u64,
    /// An address that had to refuse gave an answer.
    pub(crate) denied_answered: u64,
}

/// The result, as printed.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) shape: String,
    pub(crate) seconds: f64,
    pub(crate) offered_per_s: Option<f64>,
    connections_opened: u64,
    messages: u64,
    bytes_sent: u64,
    bytes_received: u64,
    failures: Failures,
    denied_ok: u64,
    latency_us: Summary,
    connect_us: Option<Summary>,
    first_answer_us: Option<Summary>,
}

/// One latency distribution in microseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    count: u64,
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
    curve: Vec<(f64, f64)>,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self {
            traffic: Rc::default(),
            latency: Latency::new(),
            connect: Latency::new(),
            first_answer: Latency::new(),
            connections_opened: Cell::new(0),
            messages: Cell::new(0),
            denied_ok: Cell::new(0),
            failures: RefCell::default(),
            failures_shown: Cell::new(0),
        }
    }

    pub(crate) fn opened(&self) {
        self.connections_opened.set(self.connections_opened.get() + 1);
    }

    pub(crate) fn message(&self) {
        self.messages.set(self.messages.get() + 1);
    }

    pub(crate) fn denied_ok(&self) {
        self.denied_ok.set(self.denied_ok.get() + 1);
    }

    pub(crate) fn denied_answered(&self) {
        self.failures.borrow_mut().denied_answered += 1;
        self.show("an address of --denied answered");
    }

    /// Counts messages that could never be sent.
    pub(crate) fn given_up(&self, count: u64) {
        self.failures.borrow_mut().timeout += count;
        if count > 0 {
            self.show(&format!("timeout: {count} messages were still unsent --timeout-s after the end. Lower --rate."));
        }
    }

    pub(crate) fn failure(&self, failure: &Failure) {
        let mut failures = self.failures.borrow_mut();
        let counter = match failure {
            Failure::Connect(_) => &mut failures.connect,
            Failure::Reset(_) => &mut failures.reset,
            Failure::Eof => &mut failures.eof,
            Failure::Mismatch(_) => &mut failures.mismatch,
            Failure::Timeout => &mut failures.timeout,
        };
        *counter += 1;
        self.show(&failure.to_string());
    }

    fn show(&self, what: &str) {
        let shown = self.failures_shown.get();
        self.failures_shown.set(shown + 1);
        if shown < FAILURES_SHOWN_MAX {
            eprintln!("bench-load: {what}");
        } else if shown == FAILURES_SHOWN_MAX {
            eprintln!("bench-load: more failures are only counted");
        }
    }

    /// The report of a run that took `elapsed`.
    pub(crate) fn report(&self, shape: String, elapsed: Duration, offered_per_s: Option<f64>) -> Report {
        Report {
            shape,
            seconds: elapsed.as_secs_f64(),
            offered_per_s,
            connections_opened: self.connections_opened.get(),
            messages: self.messages.get(),
            bytes_sent: self.traffic.sent_bytes.get(),
            bytes_received: self.traffic.received_bytes.get(),
            failures: self.failures.borrow().clone(),
            denied_ok: self.denied_ok.get(),
            latency_us: self.latency.summary(),
            connect_us: self.connect.summary_if_any(),
            first_answer_us: self.first_answer.summary_if_any(),
        }
    }
}

/// A distribution under construction.
#[derive(Debug)]
pub(crate) struct Latency(RefCell<Histogram<u64>>);

impl Latency {
    fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("constant bounds in range");
        Self(RefCell::new(histogram))
    }

    pub(crate) fn record(&self, latency: Duration) {
        let latency_ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.0.borrow_mut().saturating_record(latency_ns.max(1));
    }

    fn summary_if_any(&self) -> Option<Summary> {
        (!self.0.borrow().is_empty()).then(|| self.summary())
    }

    fn summary(&self) -> Summary {
        let histogram = self.0.borrow();
        let at = |percentile| round_us(histogram.value_at_percentile(percentile) as f64);
        Summary {
            count: histogram.len(),
            mean: round_us(histogram.mean()),
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            p999: at(99.9),
            max: round_us(histogram.max() as f64),
            curve: if histogram.is_empty() {
                Vec::new()
            } else {
                curve_percentiles().map(|percentile| (percentile, at(percentile))).collect()
            },
        }
    }
}

/// Nanoseconds to microseconds with one decimal.
fn round_us(value_ns: f64) -> f64 {
    (value_ns / 100.0).round() / 10.0
}

/// 39 points, denser towards the tail: 0 to 90 by 5, to 99 by 1, to 99.9 by 0.1, then 99.95 and 99.99.
fn curve_percentiles() -> impl Iterator<Item = f64> {
    let body = (0..=18).map(|step| f64::from(step) * 5.0);
    let tail = (1..=9).map(|step| 90.0 + f64::from(step));
    let far_tail = (991..=999).map(|step| f64::from(step) / 10.0);
    body.chain(tail).chain(far_tail).chain([99.95, 99.99])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_rises_to_99_99_in_about_40_points() {
        let percentiles: Vec<f64> = curve_percentiles().collect();
        assert_eq!(percentiles.len(), 39);
        assert!(percentiles.is_sorted_by(|a, b| a < b), "{percentiles:?}");
        assert_eq!((percentiles.first(), percentiles.last()), (Some(&0.0), Some(&99.99)));
    }

    #[test]
    fn percentiles_come_out_in_microseconds() {
        let latency = Latency::new();
        for micros in 1..=10_000 {
            latency.record(Duration::from_micros(micros));
        }
        let summary = latency.summary();
        assert_eq!(summary.count, 10_000);
        for (got, want) in [(summary.p50, 5_000.0), (summary.p99, 9_900.0), (summary.p999, 9_990.0), (summary.max, 10_000.0)] {
            assert!((got - want).abs() <= want * 0.002, "{got} instead of {want}");
        }
        assert!(summary.curve.is_sorted_by(|a, b| a.1 <= b.1), "{:?}", summary.curve);
    }

    #[test]
    fn an_empty_distribution_has_no_curve_and_a_long_latency_is_kept() {
        let latency = Latency::new();
        assert!(latency.summary().curve.is_empty());
        assert!(latency.summary_if_any().is_none());
        latency.record(Duration::from_secs(10_000));
        assert_eq!(latency.summary().count, 1);
    }

    #[test]
    fn the_report_names_every_failure_even_when_there_is_none() {
        let recorder = Recorder::new();
        recorder.failure(&Failure::Eof);
        let report = serde_json::to_value(recorder.report("request".into(), Duration::from_secs(1), None)).unwrap();
        for kind in ["connect", "reset", "mismatch", "timeout", "denied_answered"] {
            assert_eq!(report["failures"][kind], 0, "{kind}");
        }
        assert_eq!(report["failures"]["eof"], 1);
        assert_eq!(report["latency_us"]["count"], 0);
        assert!(report["connect_us"].is_null() && report["offered_per_s"].is_null());
    }
}
