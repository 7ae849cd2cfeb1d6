//! How long connections took to open and how long they lived, as distributions and, where a sink wants them, one by one.
//!
//! Invariant: as many keys as `series` tells apart have distributions of their own; at most [`SAMPLES_MAX`] samples wait for
//! sinks, further ones are counted as dropped and are in the distributions all the same.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::series::Key;
use crate::telemetry::record::ConnectionRecord;
use crate::telemetry::stats::Histogram;

/// Keys with distributions of their own.
const KEYS_MAX: usize = 4_096;
/// Samples that wait for sinks.
const SAMPLES_MAX: usize = 8_192;

/// The distributions of one key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Span {
    /// Opening the far leg; on outbound listeners with the handshake.
    pub connect: Histogram,
    /// From accept to close.
    pub length: Histogram,
    /// Of the far leg, from when it was opened.
    pub far_length: Histogram,
}

/// One connection's durations, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Whose.
    pub key: Key,
    /// Opening the far leg, if it was opened.
    pub connect_ms: Option<u64>,
    /// From accept to close.
    pub length_ms: u64,
}

/// Everybody's.
#[derive(Debug, Default)]
pub struct Durations {
    spans: BTreeMap<Key, Span>,
    samples: VecDeque<Sample>,
    wanted: bool,
    dropped: u64,
}

impl Durations {
    pub(super) fn observe(&mut self, record: &ConnectionRecord) {
        let mut key =
            Key { direction: record.direction, service: Arc::clone(&record.service), upstream: record.upstream.clone() };
        if self.spans.len() >= KEYS_MAX && !self.spans.contains_key(&key) {
            key = Key::other(record.direction);
        }
        let connect = record.connect.map(|connect| match key.upstream {
            Some(_) => connect + record.handshake.unwrap_or_default(),
            None => connect,
        });
        let (connect_ms, length_ms) = (connect.map(millis), millis(record.total));
        if self.wanted {
            if self.samples.len() < SAMPLES_MAX {
                self.samples.push_back(Sample { key: key.clone(), connect_ms, length_ms });
            } else {
                self.dropped += 1;
            }
        }
        let span = self.spans.entry(key).or_default();
        span.length.record(length_ms);
        if let Some(connect_ms) = connect_ms {
            span.connect.record(connect_ms);
            span.far_length.record(length_ms);
        }
    }

    /// The distributions, by key.
    pub fn spans(&self) -> &BTreeMap<Key, Span> {
        &self.spans
    }

    /// Begins the next interval of every distribution.
    pub fn turn(&mut self) {
        for span in self.spans.values_mut() {
            [&mut span.connect, &mut span.length, &mut span.far_length].into_iter().for_each(Histogram::turn);
        }
    }

    /// From now on samples are kept for sinks.
    pub fn keep_samples(&mut self) {
        self.wanted = true;
    }

    /// Takes the samples that wait, and how many were dropped since the last time.
    pub fn take_samples(&mut self) -> (VecDeque<Sample>, u64) {
        (std::mem::take(&mut self.samples), std::mem::take(&mut self.dropped))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::log::tests::inbound;

    #[test]
    fn samples_wait_only_when_a_sink_wants_them_and_within_the_bound() {
        let mut durations = Durations::default();
        durations.observe(&inbound(true));
        assert!(durations.take_samples().0.is_empty());
        durations.keep_samples();
        for _ in 0..SAMPLES_MAX + 3 {
            durations.observe(&inbound(true));
        }
        let (samples, dropped) = durations.take_samples();
        assert_eq!((samples.len(), dropped), (SAMPLES_MAX, 3));
        let span = durations.spans().values().next().expect("one key");
        assert_eq!(span.length.count(), SAMPLES_MAX as u64 + 4, "what sinks lost is still counted");
        assert_eq!(durations.take_samples().1, 0);
    }
}
