//! Where the events of all workers arrive on the admin thread.
//!
//! Invariant: [`Hub::drain`] takes at most [`EVENTS_PER_DRAIN_MAX`] events a call, in turn from all workers, so that one
//! busy worker neither starves another nor holds up the admin port. Every table is bounded, and what counted once goes on
//! counting: a listener that goes away leaves its totals.
//!
//! Knows no HTTP and no control plane. A listener that cannot be bound is an error line with a remedy, once a change.

pub(crate) mod callers;
mod denials;
mod durations;
mod failures;
mod listeners;
mod series;
mod tries;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::channel::Receiver;
use super::export::{Exporter, Sums};
use super::log::{self, AccessLogs, ConnectionLog};
use super::record::{ConnectionRecord, Event};
use super::stats::Which;
use crate::config::envoy::AccessLog;

pub use callers::{Callers, Counts, Speaker};
pub use denials::{DENIALS_MAX, Denial, Denials};
pub use durations::{Durations, Sample, Span};
pub use failures::{Failure, Failures};
pub use listeners::{Listener, Listeners, Serves, Unbound, WorkerListener};
pub use series::{Key, Series, Share, Totals};
pub use tries::{Seen, Tries, Try};

/// Events taken from the rings by one [`Hub::drain`].
pub const EVENTS_PER_DRAIN_MAX: usize = 4_096;
/// Ejections remembered at once, over all workers.
const EJECTIONS_MAX: usize = 4_096;
/// How often counters of closed listeners are folded, and histograms taken in.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What one [`Hub::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Events taken.
    pub events: usize,
    /// The bound was reached: there may be more.
    pub more: bool,
}

/// An endpoint that passive health checking keeps out now.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ejection {
    /// The upstream.
    pub upstream: Arc<str>,
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// How many workers keep it out.
    pub workers: usize,
    /// Until the last of them lets it in again.
    pub remaining: Duration,
}

/// What one worker last said of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Worker {
    /// The generation that it has adopted.
    pub generation: u64,
    /// It was told to drain and has no connection left.
    pub drained: bool,
}

/// Receives, keeps and passes on what workers say.
#[derive(Debug)]
pub struct Hub {
    receivers: Vec<Receiver>,
    /// The receiver to begin with next time.
    first: usize,
    log: ConnectionLog,
    access: Option<AccessLogs>,
    exporter: Exporter,
    listeners: Listeners,
    series: Series,
    durations: Durations,
    callers: Callers,
    denials: Denials,
    failures: Failures,
    ejections: HashMap<(usize, Arc<str>, SocketAddr), Instant>,
    workers: Vec<Worker>,
    drained: watch::Sender<bool>,
    sweep_at: Option<Instant>,
    since: SystemTime,
}

impl Hub {
    /// One receiver a worker, in the workers' order.
    pub fn new(receivers: Vec<Receiver>, log: ConnectionLog) -> Self {
        let workers = receivers.len();
        Self {
            receivers,
            first: 0,
            log,
            access: None,
            exporter: Exporter::new(),
            listeners: Listeners::new(workers),
            series: Series::default(),
            durations: Durations::default(),
            callers: Callers::default(),
            denials: Denials::default(),
            failures: Failures::default(),
            ejections: HashMap::new(),
            workers: vec![Worker::default(); workers],
            drained: watch::Sender::new(false),
            sweep_at: None,
            since: SystemTime::now(),
        }
    }

    /// Writes access logs besides the connection log. Call before the workers start, so that they miss no fact.
    pub fn set_access_logs(&mut self, logs: AccessLogs) {
        self.want_access_facts(logs.are_on());
        self.access = Some(logs);
    }

    /// Takes the access logs that the control plane asks for, instead of those that it asked for before.
    pub fn learn_access_logs(&mut self, settings: &[AccessLog]) {
        let Some(logs) = &mut self.access else { return };
        logs.learn(settings);
        let are_on = logs.are_on();
        self.want_access_facts(are_on);
    }

    fn want_access_facts(&self, wanted: bool) {
        for receiver in &self.receivers {
            receiver.cells.access_facts.set(wanted);
        }
    }

    /// Makes this hub's recorder the process's, so that `metrics` macros of other rooms are exported too. Call once, before
    /// the first of them runs; returns whether it is in place.
    pub fn install_recorder(&mut self) -> bool {
        self.exporter.install()
    }

    /// Takes what the workers have sent, up to the bound.
    pub fn drain(&mut self) -> Progress {
        self.drain_at(Instant::now())
    }

    fn drain_at(&mut self, now: Instant) -> Progress {
        let workers = self.receivers.len();
        let mut events = 0;
        let mut empty = 0;
        let mut worker = self.first;
        // Ends when every ring in a row was empty, or at the bound.
        while empty < workers && events < EVENTS_PER_DRAIN_MAX {
            match self.receivers[worker].next() {
                Some(event) => {
                    self.take(worker, event, now);
                    events += 1;
                    empty = 0;
                }
                None => empty += 1,
            }
            worker = (worker + 1) % workers;
        }
        self.first = if workers == 0 { 0 } else { worker };
        self.tell(now);
        Progress { events, more: events == EVENTS_PER_DRAIN_MAX }
    }

    fn take(&mut self, worker: usize, event: Event, now: Instant) {
        match event {
            Event::Connection(record) => self.closed(&record, now),
            Event::ListenerUp { bind, cells } => {
                self.series.add(worker, &cells);
                self.listeners.up(worker, bind, &cells);
            }
            Event::RouteUp { cells } => self.series.add(worker, &cells),
            Event::ListenerDown { bind } => self.listeners.down(worker, &bind),
            Event::BindFailed { bind, error } => self.listeners.bind_failed(worker, bind, &error),
            Event::AcceptFailed { bind, error } => self.listeners.accept_failed(bind, &error, now),
            Event::Ejected { upstream, endpoint, duration } => self.eject(worker, upstream, endpoint, now + duration),
            // The worker's own number is its ring's: an event cannot speak for another worker.
            Event::Adopted { worker: _, generation } => self.workers[worker].generation = generation,
            Event::Drained { worker: _ } => {
                self.workers[worker].drained = true;
                self.drained.send_if_modified(|all| {
                    let before = std::mem::replace(all, self.workers.iter().all(|worker| worker.drained));
                    before != *all
                });
            }
        }
    }

    fn closed(&mut self, record: &ConnectionRecord, now: Instant) {
        self.exporter.observe(record);
        self.durations.observe(record);
        self.callers.count(record);
        self.failures.note(record);
        if let Some(id) = record.denial {
            match log::json(record) {
                Ok(line) => self.denials.keep(id, record, line),
                // As in the log: it cannot happen, and if it ever does, it is said.
                Err(error) => tracing::error!(%error, denial = %id, "a denial cannot be kept"),
            }
        }
        self.log.record(record, now);
        if let Some(logs) = &mut self.access {
            logs.record(record);
        }
    }

    fn eject(&mut self, worker: usize, upstream: Arc<str>, endpoint: SocketAddr, until: Instant) {
        if self.ejections.len() < EJECTIONS_MAX {
            self.ejections.insert((worker, upstream, endpoint), until);
        }
    }

    /// What is due after each drain: lines handed to their writer, and from time to time a sweep.
    fn tell(&mut self, now: Instant) {
        self.log.flush(now);
        if let Some(logs) = &mut self.access {
            logs.flush();
        }
        self.listeners.tell(now);
        if self.sweep_at.is_none_or(|at| at <= now) {
            self.sweep_at = Some(now + SWEEP_INTERVAL);
            self.series.fold();
            self.ejections.retain(|_, until| *until > now);
            self.exporter.upkeep();
        }
    }

    /// The listeners, bound or not, for readiness.
    pub fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    /// The listeners' counters, added up.
    pub fn series(&self) -> &Series {
        &self.series
    }

    /// How long connections took.
    pub fn durations(&self) -> &Durations {
        &self.durations
    }

    /// The same, to begin an interval or take samples out.
    pub fn durations_mut(&mut self) -> &mut Durations {
        &mut self.durations
    }

    /// Connections that each worker has open now, in the workers' order.
    pub fn worker_connections(&self) -> Vec<u64> {
        self.receivers.iter().map(|receiver| receiver.cells.connections.value()).collect()
    }

    /// Who of this host talked to whom.
    pub fn callers(&self) -> &Callers {
        &self.callers
    }

    /// The last denials.
    pub fn denials(&self) -> &Denials {
        &self.denials
    }

    /// The last connections to each upstream that failed.
    pub fn failures(&self) -> &Failures {
        &self.failures
    }

    /// Since when all this is counted.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// What each worker last said, in the workers' order.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Turns true when every worker has said that it has drained.
    pub fn drained(&self) -> watch::Receiver<bool> {
        self.drained.subscribe()
    }

    /// The endpoints that are kept out now, in a stable order.
    pub fn ejections(&self) -> Vec<Ejection> {
        let now = Instant::now();
        let mut ejections: HashMap<(&Arc<str>, SocketAddr), Ejection> = HashMap::new();
        for ((_, upstream, endpoint), until) in self.ejections.iter().filter(|(_, until)| **until > now) {
            let ejection = ejections.entry((upstream, *endpoint)).or_insert_with(|| Ejection {
                upstream: Arc::clone(upstream),
                endpoint: *endpoint,
                workers: 0,
                remaining: Duration::ZERO,
            });
            ejection.workers += 1;
            ejection.remaining = ejection.remaining.max(*until - now);
        }
        let mut ejections: Vec<_> = ejections.into_values().collect();
        ejections.sort_unstable();
        ejections
    }

    /// Everything but the listeners' sums in Prometheus' text format: the cells as they stand now, and what other rooms recorded.
    pub fn render(&mut self) -> String {
        self.exporter.publish_callers(&self.callers);
        for (worker, receiver) in self.receivers.iter().enumerate() {
            self.exporter.publish_worker(worker, &receiver.cells);
        }
        self.exporter.publish_listeners(&self.listeners);
        self.exporter.publish_log(self.log.counts() + self.access_log_counts());
        self.exporter.render()
    }

    /// The listeners' sums as they stand now, to be written when nobody waits for the hub.
    pub fn sums(&self, which: Which) -> Sums {
        Sums::of(&self.series, which)
    }

    /// What became of the connection log's lines.
    pub fn log_counts(&self) -> log::Counts {
        self.log.counts()
    }

    /// What became of the access logs' lines.
    pub fn access_log_counts(&self) -> log::Counts {
        self.access.as_ref().map(AccessLogs::counts).unwrap_or_default()
    }

    /// For what only the admin room knows.
    pub fn exporter(&mut self) -> &mut Exporter {
        &mut self.exporter
    }
}

#[cfg(test)]
mod tests;
