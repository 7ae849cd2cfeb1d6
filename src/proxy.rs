//! The data plane: one thread a core, each with its own ring, listeners, connections and buffers.
//!
//! Invariant: a worker shares nothing that is written on the data path. It reads snapshots from `store`, orders from one
//! atomic, and writes counters that only it writes.
//!
//! Knows no Consul, no HTTP, and no clock but the loop's.

mod close;
mod connection;
mod idle;
mod inspect;
mod leg;
mod limits;
mod linger;
mod listener;
mod refusal;
mod relay;
mod reply;
mod secure;
#[cfg(test)]
mod simulation;
mod timer;
mod upstream;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::buffer::Pool;
use crate::config::{self, DataPlane};
use crate::mesh::Snapshot;
use crate::ring::RingError;
use crate::ring::uring::Uring;
use crate::store::{Reader, Wake};
use crate::sys::handover::Inherited;
use crate::sys::{self, EventFd, StreamOptions};
use crate::telemetry::cells::Direction;
use crate::telemetry::channel::Sender;

pub use worker::callers::Attribution;

/// Why the data plane could not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The ring refused.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Buffers, descriptors or threads could not be had.
    #[error("cannot start worker {worker}: {what}: {source}")]
    Start {
        /// Which worker.
        worker: usize,
        /// What failed.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Readers, senders or attributions do not match the number of workers.
    #[error(
        "{workers} workers need as many snapshot readers and event senders, not {readers} and {senders}; attribution is for all or none, not {attributions}"
    )]
    Mismatch {
        /// Workers wanted.
        workers: usize,
        /// Readers given.
        readers: usize,
        /// Senders given.
        senders: usize,
        /// Attributions given.
        attributions: usize,
    },
    /// A worker thread panicked: a broken invariant.
    #[error("worker {0} ended by a panic")]
    Panicked(usize),
}

/// What the process orders of its workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    Run = 0,
    Drain = 1,
    Stop = 2,
}

/// Values of [`Orders::closed`].
const INBOUND_CLOSED: u8 = 1;
const ALL_CLOSED: u8 = 2;

/// The order in force, shared with every worker. It only ever moves up.
#[derive(Debug, Default)]
struct Orders {
    order: AtomicU8,
    /// Somebody else has the listening sockets too: their files stay, and what was accepted already is this process's to serve.
    handed_over: AtomicBool,
    /// How long connections may go on after [`Order::Drain`]. Set before it.
    drain_ms: AtomicU64,
    /// This process was left sockets by another: it accepts only what it can serve.
    successor: bool,
    /// Nobody else has the sockets, so their files are this process's to remove.
    in_charge: AtomicBool,
    /// Every listener is bound: what is left beside them is wanted by none.
    settled: AtomicBool,
    /// Which listeners are closed on purpose while the workers go on: none, those of inbound connections, all. It only
    /// ever moves up.
    closed: AtomicU8,
}

impl Orders {
    fn raise(&self, order: Order) {
        self.order.fetch_max(order as u8, Ordering::AcqRel);
    }

    fn drain_time(&self) -> Duration {
        Duration::from_millis(self.drain_ms.load(Ordering::Acquire))
    }

    /// Whether listeners of this direction are closed on purpose.
    fn closed(&self, direction: Direction) -> bool {
        let from = match direction {
            Direction::Inbound => INBOUND_CLOSED,
            Direction::Outbound => ALL_CLOSED,
        };
        self.closed.load(Ordering::Acquire) >= from
    }

    fn current(&self) -> Order {
        match self.order.load(Ordering::Acquire) {
            0 => Order::Run,
            1 => Order::Drain,
            _ => Order::Stop,
        }
    }
}

/// The running workers.
#[derive(Debug)]
pub struct Workers {
    orders: Arc<Orders>,
    threads: Vec<JoinHandle<Result<(), ProxyError>>>,
    wakes: Vec<EventFd>,
}

/// Starts one thread a worker, `worker-N`; with a worker for each core that this process may use, each is pinned to its own.
///
/// Listening sockets of `inherited` are used instead of binding anew. With one of `attributions` a worker, outbound connections speak as their callers; with none, as their listener's service.
pub fn spawn(
    plane: &DataPlane,
    readers: Vec<Reader<Snapshot>>,
    senders: Vec<Sender>,
    attributions: Vec<Attribution>,
    inherited: &mut Inherited,
) -> Result<Workers, ProxyError> {
    let (workers, readers_given, senders_given, given) = (plane.workers, readers.len(), senders.len(), attributions.len());
    if readers_given != workers || senders_given != workers || ![0, workers].contains(&given) {
        return Err(ProxyError::Mismatch { workers, readers: readers_given, senders: senders_given, attributions: given });
    }
    let mut attributions = attributions.into_iter();
    let successor = inherited.has_predecessor() || inherited.is_orphaned();
    let orders = Arc::new(Orders { successor, in_charge: AtomicBool::new(!successor), ..Orders::default() });
    let mut hands = inherited.deal(workers).into_iter();
    let gates = Arc::new(listener::Gates::default());
    let cores = sys::allowed_cores();
    let mut workers = Workers { orders: Arc::clone(&orders), threads: Vec::new(), wakes: Vec::new() };
    for (index, (reader, telemetry)) in readers.into_iter().zip(senders).enumerate() {
        let start = |what: &'static str| move |source| ProxyError::Start { worker: index, what, source };
        let wake = EventFd::new().map_err(start("eventfd"))?;
        workers.wakes.push(wake.try_clone().map_err(start("eventfd"))?);
        let mut pool = Pool::new(plane.buffer_bytes_max).map_err(start("mapping buffers"))?;
        let mut ring = Uring::new(&mut pool, StreamOptions { keepalive: plane.keepalive.into() }, wake)?;
        ring.inherit(hands.next().unwrap_or_default());
        // Fewer workers than cores leave the choice to the scheduler: several such processes would else meet on core 0.
        let core = (plane.pin && plane.workers >= cores.len()).then(|| cores.get(index % cores.len().max(1)).copied()).flatten();
        let parts = worker::Parts {
            index,
            ring,
            pool,
            reader,
            telemetry,
            attribution: attributions.next(),
            plane: plane.clone(),
            orders: Arc::clone(&orders),
            gates: Arc::clone(&gates),
        };
        let thread = std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || {
                if let Some(core) = core {
                    // A core that went away since is no reason not to serve.
                    let _ = sys::pin_to_core(core);
                }
                worker::Worker::new(parts).run()
            })
            .map_err(start("spawning its thread"))?;
        workers.threads.push(thread);
    }
    Ok(workers)
}

impl Workers {
    /// Handles that rouse each worker, for the publisher.
    pub fn wakes(&self) -> Vec<Box<dyn Wake>> {
        self.wakes.iter().filter_map(|wake| wake.try_clone().ok()).map(|wake| Box::new(Waker(wake)) as Box<dyn Wake>).collect()
    }

    /// Stops accepting; live connections go on until the drain time is over.
    pub fn drain(&self, time: Duration) {
        self.orders.drain_ms.store(u64::try_from(time.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
        self.order(Order::Drain);
    }

    /// Closes the listeners, only those of inbound connections on demand. Live connections and the workers go on.
    pub fn close_listeners(&self, inbound_only: bool) {
        self.orders.closed.fetch_max(if inbound_only { INBOUND_CLOSED } else { ALL_CLOSED }, Ordering::AcqRel);
        for wake in &self.wakes {
            wake.signal();
        }
    }

    /// Nobody else accepts at the sockets any more: this process is in charge of their files and of what is leased.
    pub fn take_charge(&self) {
        self.orders.in_charge.store(true, Ordering::Release);
    }

    /// Every listener is bound: sockets that were left and are wanted by none of them are closed.
    pub fn settle(&self) {
        self.orders.settled.store(true, Ordering::Release);
        self.wakes.iter().for_each(EventFd::signal);
    }

    /// Stops accepting because another process has the sockets now; live connections end when they are done.
    pub fn hand_over(&self) {
        self.leave(config::HANDOVER_DRAIN);
    }

    /// Stops accepting because the sockets are kept for the next process; live connections go on until `time` is over.
    pub fn leave(&self, time: Duration) {
        self.leave_files();
        self.orders.handed_over.store(true, Ordering::Release);
        self.drain(time);
    }

    /// The files of the sockets are not this process's to remove.
    pub fn leave_files(&self) {
        self.orders.in_charge.store(false, Ordering::Release);
    }

    /// Ends every connection at once.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    fn order(&self, order: Order) {
        self.orders.raise(order);
        for wake in &self.wakes {
            wake.signal();
        }
    }

    /// Whether every worker has ended, or one has without having been told to: then its connections and its share of each
    /// address are gone, and the process must not go on with the rest in silence. [`Self::join`] has the reason.
    pub fn is_finished(&self) -> bool {
        let mut ended = self.threads.iter().map(JoinHandle::is_finished);
        match self.orders.current() {
            Order::Run => ended.any(|ended| ended),
            Order::Drain | Order::Stop => ended.all(|ended| ended),
        }
    }

    /// Waits for every worker to end, after `drain` or `stop`.
    pub fn join(self) -> Result<(), ProxyError> {
        let mut first = Ok(());
        for (index, thread) in self.threads.into_iter().enumerate() {
            let ended = thread.join().unwrap_or(Err(ProxyError::Panicked(index)));
            if first.is_ok() {
                first = ended;
            }
        }
        first
    }
}

struct Waker(EventFd);

impl Wake for Waker {
    fn wake(&self) {
        self.0.signal();
    }
}
