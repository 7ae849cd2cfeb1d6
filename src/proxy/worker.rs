//! One core's loop: enter the kernel once, step what completed, then timers, listeners, snapshot and orders.
//!
//! Invariant: a completion is acted on only when its token names a connection that lives; every accepted connection ends in
//! exactly one record; nothing here waits but [`Ring::turn`].
//!
//! `listeners` holds what is accepted, `routing` where it is handed on to, `callers` who is behind it, `steps` what a connection asks of its worker, `adoption` what a new snapshot changes.

mod adoption;
pub(super) mod callers;
mod listeners;
mod routing;
mod steps;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::connection::{Connection, Io, Stage};
use super::limits::{COMPLETIONS_PER_TURN_MAX, REGION_IDLE, TEARDOWN};
use super::listener::{Gates, Listener};
use super::timer::{Owner, Wheel};
use super::{Attribution, Order, Orders, ProxyError};
use crate::buffer::{Class, Pool};
use crate::config::DataPlane;
use crate::mesh::{Service, Snapshot};
use crate::policy::Intentions;
use crate::ring::{Completion, Op, Ring, SHARED_BUFFERS};
use crate::store::Reader;
use crate::telemetry::cells::Direction;
use crate::telemetry::channel::Sender;
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::{ConnectionRecord, Event};

/// What a worker is made of.
pub(super) struct Parts<R> {
    pub(super) index: usize,
    pub(super) ring: R,
    pub(super) pool: Pool,
    pub(super) reader: Reader<Snapshot>,
    pub(super) telemetry: Sender,
    pub(super) attribution: Option<Attribution>,
    pub(super) plane: DataPlane,
    pub(super) orders: Arc<Orders>,
    pub(super) gates: Arc<Gates>,
}

/// One worker. The ring stands before the pool: it must be gone before its buffers are.
pub(super) struct Worker<R: Ring> {
    index: usize,
    ring: R,
    pool: Pool,
    reader: Reader<Snapshot>,
    telemetry: Sender,
    attribution: Option<Attribution>,
    plane: DataPlane,
    orders: Arc<Orders>,
    gates: Arc<Gates>,
    connections: Slab,
    listeners: Vec<Option<Listener>>,
    listener_generation: u32,
    wheel: Wheel,
    due: Vec<Owner>,
    batch: Vec<Completion>,
    /// Where the sweep after an intention change stands.
    sweep: Option<u32>,
    held: usize,
    handshakes: u32,
    order: Order,
    /// What was left and no listener wanted is closed.
    settled: bool,
    /// What was done about listeners that are closed on purpose.
    closed: u8,
    drain_deadline: Option<Instant>,
    teardown_deadline: Option<Instant>,
    next_region_sweep: Instant,
    /// The earliest time that a listener wants to bind or accept again.
    listeners_due: Option<Instant>,
    listeners_bound: u64,
    /// Whose the listeners for redirected connections are.
    redirect: Arc<Service>,
    /// Denials so far, and when this worker began (seconds): together they name each.
    denials: u32,
    epoch: u64,
}

impl<R: Ring> Worker<R> {
    pub(super) fn new(parts: Parts<R>) -> Self {
        let Parts { index, ring, pool, reader, telemetry, attribution, plane, orders, gates } = parts;
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = ring.now();
        Self {
            index,
            ring,
            pool,
            reader,
            telemetry,
            attribution,
            plane,
            orders,
            gates,
            connections: Slab::default(),
            listeners: Vec::new(),
            listener_generation: 0,
            wheel: Wheel::new(now),
            due: Vec::new(),
            batch: Vec::with_capacity(COMPLETIONS_PER_TURN_MAX),
            sweep: None,
            held: 0,
            handshakes: 0,
            order: Order::Run,
            settled: false,
            closed: 0,
            drain_deadline: None,
            teardown_deadline: None,
            next_region_sweep: now,
            listeners_due: None,
            listeners_bound: 0,
            redirect: Arc::new(redirects()),
            denials: 0,
            epoch: since_epoch.as_secs(),
        }
    }

    /// Runs until drained or stopped.
    pub(super) fn run(mut self) -> Result<(), ProxyError> {
        while !self.is_over() {
            self.turn()?;
        }
        // The last closes are only queued yet.
        self.ring.turn(Some(Duration::ZERO))?;
        self.telemetry.send(Event::Drained { worker: self.index });
        Ok(())
    }

    /// One turn of the loop.
    pub(super) fn turn(&mut self) -> Result<(), ProxyError> {
        let wait = self.wait();
        self.ring.turn(wait)?;
        self.step_completions();
        self.take_answers();
        self.step_deadlines();
        self.step_orders();
        self.adopt_snapshot();
        self.sweep_authorisations();
        self.retry_listeners();
        self.sweep_regions();
        self.publish_gauges();
        Ok(())
    }

    fn now(&self) -> Instant {
        self.ring.now()
    }

    /// How long the ring may sleep.
    fn wait(&self) -> Option<Duration> {
        if self.sweep.is_some() {
            return Some(Duration::ZERO);
        }
        let now = self.now();
        let regions = (self.pool.leased_bytes() > shared_bytes()).then_some(self.next_region_sweep);
        [self.listeners_due, regions, self.drain_deadline, self.teardown_deadline]
            .into_iter()
            .flatten()
            .map(|at| at.saturating_duration_since(now).max(Duration::from_millis(1)))
            .chain(self.wheel.next_in(now))
            .min()
    }

    fn step_completions(&mut self) {
        // Copied out first: stepping a connection queues operations, which may make the ring reap again.
        self.batch.clear();
        while self.batch.len() < COMPLETIONS_PER_TURN_MAX {
            match self.ring.next() {
                Some(completion) => self.batch.push(completion),
                None => break,
            }
        }
        self.telemetry.cells.completions.add(self.batch.len() as u64);
        for at in 0..self.batch.len() {
            self.step(self.batch[at]);
        }
    }

    fn step(&mut self, completion: Completion) {
        match completion.token.op() {
            Some(Op::Accept) => self.on_accept(completion),
            Some(Op::AcceptCancel) => self.on_accept_cancelled(completion.token),
            Some(Op::Wake) => {}
            // Only failures are reported, and there is nothing left to do for that socket.
            Some(Op::Close) | None => self.telemetry.cells.stale_completions.add(1),
            Some(op @ (Op::Connect | Op::Receive | Op::Send | Op::Cancel)) => self.on_connection(op, completion),
        }
    }

    fn on_connection(&mut self, op: Op, completion: Completion) {
        let (slot, generation) = (completion.token.slot(), completion.token.generation());
        let Some(mut connection) = self.connections.take(slot, generation) else {
            // Cannot happen while slots outlive their operations; counted, never acted on.
            self.telemetry.cells.stale_completions.add(1);
            if let Some(buffer) = completion.buffer {
                self.ring.recycle(buffer);
            }
            return;
        };
        let next = self.with_io(&mut connection, |connection, io| connection.on_completion(io, op, completion));
        self.drive(connection, next);
    }

    fn step_deadlines(&mut self) {
        let now = self.now();
        let mut due = std::mem::take(&mut self.due);
        self.wheel.expire(now, &mut due);
        for owner in due.drain(..) {
            let Some(mut connection) = self.connections.take(owner.slot, owner.generation) else { continue };
            if connection.deadline.is_some_and(|deadline| deadline <= now) {
                let next = self.with_io(&mut connection, |connection, io| connection.on_deadline(io));
                self.drive(connection, next);
            } else {
                self.connections.put(connection);
            }
        }
        self.due = due;
    }

    fn step_orders(&mut self) {
        let order = self.orders.current();
        if order != self.order {
            self.order = order;
            self.remove_all_listeners();
            match order {
                Order::Run => {}
                Order::Drain => self.drain_deadline = Some(self.now() + self.orders.drain_time()),
                Order::Stop => self.close_all(CloseReason::Shutdown),
            }
        }
        if !self.settled && self.orders.settled.load(Ordering::Relaxed) {
            self.settled = true;
            self.ring.close_left();
            self.telemetry.cells.listener_changes.add(1);
        }
        self.close_listeners_on_purpose();
        if self.drain_deadline.is_some_and(|deadline| deadline <= self.now()) {
            self.drain_deadline = None;
            self.close_all(CloseReason::Drained);
        }
    }

    fn close_all(&mut self, reason: CloseReason) {
        let deadline = self.ring.now() + TEARDOWN;
        self.teardown_deadline.get_or_insert(deadline);
        for slot in 0..self.connections.slots() {
            let Some(mut connection) = self.connections.take_any(slot) else { continue };
            // Cut, not ended: the app must not take what it has for the whole.
            let next = self.with_io(&mut connection, |connection, io| connection.close(io, reason, true));
            self.drive(connection, next);
        }
    }

    pub(super) fn is_over(&self) -> bool {
        if self.order == Order::Run {
            return false;
        }
        let quiet = self.connections.live() == 0 && self.listeners.iter().flatten().all(|listener| listener.socket.is_none());
        // What the kernel has not given back by then dies with the process.
        quiet || self.teardown_deadline.is_some_and(|deadline| deadline <= self.now())
    }

    fn sweep_regions(&mut self) {
        let now = self.now();
        if now < self.next_region_sweep || self.pool.leased_bytes() <= shared_bytes() {
            return;
        }
        self.next_region_sweep = now + REGION_IDLE;
        for slot in 0..self.connections.slots() {
            let Some(mut connection) = self.connections.take_any(slot) else { continue };
            self.with_io(&mut connection, |connection, io| connection.demote_if_idle(io));
            self.connections.put(connection);
        }
    }

    fn publish_gauges(&mut self) {
        let cells = &self.telemetry.cells;
        cells.enters.set(self.ring.enters());
        cells.buffer_bytes_leased.set((self.pool.leased_bytes().saturating_sub(shared_bytes())) as u64);
        cells.connections.set(u64::from(self.connections.live()));
        cells.handshakes_active.set(u64::from(self.handshakes));
        cells.listeners.set(self.listeners_bound);
    }

    /// Steps a connection with everything it may use, and keeps the count of handshakes.
    fn with_io<T>(&mut self, connection: &mut Connection, step: impl FnOnce(&mut Connection, &mut Io<'_, R>) -> T) -> T {
        let now = self.ring.now();
        let awaited = |stage| matches!(stage, Stage::Inspect | Stage::Handshake | Stage::ClientHandshake);
        let before = awaited(connection.stage);
        let cells = self.listeners[connection.listener as usize].as_ref().map(|listener| Arc::as_ref(&listener.cells));
        let cells = cells.expect("a listener's place is kept while its connections live");
        let mut io = Io { ring: &mut self.ring, pool: &mut self.pool, worker: &self.telemetry.cells, cells, now };
        let result = step(connection, &mut io);
        match (before, awaited(connection.stage)) {
            (false, true) => self.handshakes += 1,
            (true, false) => self.handshakes -= 1,
            _ => {}
        }
        result
    }
}

/// The name under which listeners for redirected connections stand in logs and metrics.
fn redirects() -> Service {
    Service {
        name: "redirect".into(),
        proxy_id: "redirect".into(),
        identity: None,
        intentions: Arc::new(Intentions::unknown()),
        public: None,
        upstreams: Vec::new(),
    }
}

fn shared_bytes() -> usize {
    usize::from(SHARED_BUFFERS) * Class::Slot.bytes()
}

fn slot_of(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

#[cfg(test)]
impl Worker<crate::ring::sim::Sim> {
    /// Peers and clients whose handshake is under way.
    pub(super) fn handshakes(&self) -> u32 {
        self.handshakes
    }

    /// What must hold when a worker is over: nobody has a socket, a lease or a shared buffer.
    pub(super) fn assert_nothing_left(&self) {
        assert_eq!(self.connections.live(), 0, "connections left");
        assert_eq!(self.ring.pending(), 0, "operations left");
        assert_eq!(self.ring.available_buffers(), usize::from(SHARED_BUFFERS), "shared buffers lost");
        assert_eq!(self.pool.leases(), usize::from(SHARED_BUFFERS), "leases lost");
        assert_eq!((self.held, self.handshakes), (0, 0), "counts off");
    }
}

/// Connections by slot, each life of a slot with its own generation.
#[derive(Default)]
struct Slab {
    slots: Vec<Slot>,
    free: Vec<u32>,
    live: u32,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    connection: Option<Box<Connection>>,
}

impl Slab {
    fn live(&self) -> u32 {
        self.live
    }

    fn slots(&self) -> u32 {
        slot_of(self.slots.len())
    }

    /// A slot and its new generation; the connection is put there by `put`.
    fn reserve(&mut self) -> (u32, u32) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            slot_of(self.slots.len() - 1)
        });
        let place = &mut self.slots[slot as usize];
        place.generation = place.generation.wrapping_add(1);
        self.live += 1;
        (slot, place.generation)
    }

    fn take(&mut self, slot: u32, generation: u32) -> Option<Box<Connection>> {
        let place = self.slots.get_mut(slot as usize).filter(|place| place.generation == generation)?;
        place.connection.take()
    }

    fn take_any(&mut self, slot: u32) -> Option<Box<Connection>> {
        self.slots.get_mut(slot as usize)?.connection.take()
    }

    fn put(&mut self, connection: Box<Connection>) {
        let slot = connection.slot as usize;
        self.slots[slot].connection = Some(connection);
    }

    /// The connection is over; its slot may be used again.
    fn release(&mut self, slot: u32) {
        self.free.push(slot);
        self.live -= 1;
    }
}

/// Which SPIFFE role a connection's own identity has, for the log.
fn own_side(direction: Direction, record: &mut ConnectionRecord) -> &mut Option<crate::identity::SpiffeId> {
    match direction {
        Direction::Inbound => &mut record.destination,
        Direction::Outbound => &mut record.source,
    }
}
