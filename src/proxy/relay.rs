//! The two byte directions of a connection: plain to mesh is sealed in place, mesh to plain is opened in place; where the app
//! or client speaks TLS too, each is opened and sealed again in place; where a route says so, both are passed on as they are.
//!
//! Invariant: a flow either receives or sends, never both, so its buffer has one user; it receives again only when all it
//! had was sent, which is the whole back-pressure. Payload is never copied in user space, nor moved but for what came behind a handshake: a receive stops where
//! every record that has begun still fits the slack behind it.
//!
//! Ends: EOF on the plain leg becomes close_notify and FIN on the mesh leg; close_notify becomes FIN on the plain leg; an
//! EOF without close_notify, or a reset, becomes a reset on the other leg. Only of an app or client that speaks TLS
//! an EOF between two records is an end like any other: outside of the mesh close_notify is often left out, and Envoy takes it so.

mod control;
mod kept;
mod open;
mod raw;
mod reseal;
mod seal;

use std::time::{Duration, Instant};

use super::close::{CloseReason, Side};
use super::connection::{Connection, Control, Io, MESH, Next, PLAIN, Stage};
use super::idle::Idle;
use super::limits::{REGION_IDLE, SMALL_RECEIVES_MAX};
use crate::buffer::{Class, Lease, Pool, Span};
use crate::ring::{Completion, Op, PARTS_MAX, Ring};
use crate::tls::record::PAYLOAD_BYTES_MAX;

/// A receive below this counts as small: a region is not worth holding for it.
const SMALL_RECEIVE_BYTES: usize = PAYLOAD_BYTES_MAX / 4;

const ALERT_RECORD_OVERFLOW: u8 = 22;

/// One byte direction.
pub(super) struct Flow {
    hold: Hold,
    state: State,
    /// The size the next receive wants; grows when a receive filled its buffer.
    wanted: Class,
    small_receives: u8,
    /// Opening: raw bytes not yet opened, within the hold. Sealing: the sealed run being sent.
    start: usize,
    end: usize,
    /// Opening: how long the record at `start` is, as far as known.
    need: usize,
    /// What of the hold is being sent.
    parts: Vec<(u32, u32)>,
    /// The last receive asked for this much.
    asked: usize,
    /// Sealing: bytes received, or opened, that wait for a control record to go first.
    deferred: usize,
    /// Sealing what was opened: the byte behind it that the longer trailer lies on until it is sent.
    covered: Option<u8>,
    /// The source said that it is done.
    ended: bool,
    waiting_since: Option<Instant>,
}

/// Which memory a flow's bytes lie in.
enum Hold {
    None,
    Shared(u16),
    Own(Lease),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Receiving,
    Sending,
    Finished,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            hold: Hold::None,
            state: State::Idle,
            wanted: Class::Slot,
            small_receives: 0,
            start: 0,
            end: 0,
            need: 0,
            parts: Vec::new(),
            asked: 0,
            deferred: 0,
            covered: None,
            ended: false,
            waiting_since: None,
        }
    }
}

impl Flow {
    /// Gives the buffer back. Only when no operation uses it.
    pub(super) fn release<R: Ring>(&mut self, ring: &mut R, pool: &mut Pool) {
        match std::mem::replace(&mut self.hold, Hold::None) {
            Hold::None => {}
            Hold::Shared(buffer) => ring.recycle(buffer),
            Hold::Own(lease) => pool.give_back(lease),
        }
    }

    /// Starts with bytes that came in the same receive as the end of the handshake.
    pub(super) fn preload(&mut self, lease: Lease, filled: usize) {
        self.hold = Hold::Own(lease);
        self.start = 0;
        self.end = filled;
    }

    /// What was received is on its way out.
    pub(super) fn is_sending(&self) -> bool {
        self.state == State::Sending
    }

    fn lease<'a, R: Ring>(&'a self, ring: &'a R) -> Option<&'a Lease> {
        match &self.hold {
            Hold::None => None,
            Hold::Shared(buffer) => Some(ring.shared(*buffer)),
            Hold::Own(lease) => Some(lease),
        }
    }

    /// Makes the hold a region of the wanted class if there is room; says whether it is one.
    fn hold_region<R: Ring>(&mut self, ring: &mut R, pool: &mut Pool) -> bool {
        if self.wanted == Class::Slot {
            return false;
        }
        if !matches!(&self.hold, Hold::Own(lease) if lease.class() == self.wanted) {
            self.release(ring, pool);
            match pool.lease(self.wanted) {
                Some(lease) => {
                    self.hold = Hold::Own(lease);
                    // Once, so that a stream of any mix of records never grows it.
                    self.parts.reserve(PARTS_MAX - self.parts.len());
                }
                // The budget is spent: one record at a time still works.
                None => return false,
            }
        }
        true
    }

    /// Grows after a receive that filled its buffer, shrinks after several small ones.
    fn learn(&mut self, received: usize) {
        if received == self.asked {
            self.small_receives = 0;
            self.wanted = match self.wanted {
                Class::Slot => Class::Medium,
                Class::Medium | Class::Large => Class::Large,
            };
        } else if received < SMALL_RECEIVE_BYTES && self.wanted != Class::Slot {
            self.small_receives += 1;
            if self.small_receives >= SMALL_RECEIVES_MAX {
                self.small_receives = 0;
                self.wanted = Class::Slot;
            }
        } else {
            self.small_receives = 0;
        }
    }
}

impl Connection {
    /// Both legs are open and the peer is known: bytes flow.
    pub(super) fn start_relay<R: Ring>(&mut self, io: &mut Io<'_, R>, idle_timeout: Option<Duration>) -> Next {
        self.stage = Stage::Relay;
        self.idle = idle_timeout.map(|limit| Box::new(Idle::new(limit, io.now)));
        self.rearm_relay(io.now);
        if self.raw {
            return self.start_raw(io);
        }
        let first = if self.sessions[PLAIN].is_some() {
            self.start_opening(io, PLAIN)
        } else if self.flows[PLAIN].has_kept() {
            self.seal_kept(io)
        } else {
            self.seal_receive(io)
        };
        match first {
            Next::Wait => self.start_opening(io, MESH),
            other => other,
        }
    }

    /// Begins with what came behind the handshake, if anything did.
    fn start_opening<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        if self.flows[from].has_kept() {
            self.make_headroom(io, from);
            return self.open_records(io, from);
        }
        self.open_receive(io, from)
    }

    pub(super) fn on_relay<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, leg: usize, completion: Completion) -> Next {
        match op {
            Op::Receive if self.raw => self.raw_received(io, leg, completion),
            Op::Receive if self.sessions[leg].is_some() => self.open_received(io, leg, completion),
            Op::Receive => self.seal_received(io, completion),
            Op::Send if self.raw => self.raw_sent(io, leg, completion),
            Op::Send if !matches!(self.controls[leg], Control::None) => self.control_sent(io, leg, completion),
            Op::Send if self.sessions[other(leg)].is_some() => self.parts_sent(io, other(leg), completion),
            Op::Send => self.seal_sent(io, completion),
            // The cancel of `demote_if_idle`; what it cancelled speaks for itself.
            _ => Next::Wait,
        }
    }

    /// Takes its region from a flow that has waited for bytes too long. The cancelled receive comes back through
    /// `seal_received` or `open_received`, which then wait on the shared buffers.
    pub(super) fn demote_if_idle<R: Ring>(&mut self, io: &mut Io<'_, R>) {
        if self.stage != Stage::Relay {
            return;
        }
        for leg in [PLAIN, MESH] {
            let now = io.now;
            let flow = &mut self.flows[leg];
            let idle = flow.state == State::Receiving
                && flow.start == flow.end
                && matches!(&flow.hold, Hold::Own(_))
                && flow.waiting_since.is_some_and(|since| now.saturating_duration_since(since) >= REGION_IDLE);
            // A cancel ends all that is pending on the socket: only when the receive is all there is.
            if idle && !self.legs[leg].is_pending(Op::Send) && !self.legs[leg].is_pending(Op::Cancel) {
                flow.wanted = Class::Slot;
                let (socket, token) = self.begin(Op::Cancel, leg);
                io.ring.cancel(socket, token);
            }
        }
    }

    /// Counts payload that came in on `from`.
    fn count<R: Ring>(&mut self, io: &Io<'_, R>, from: usize, bytes: u64) {
        if from == PLAIN {
            self.facts.bytes_to_mesh += bytes;
            io.cells.bytes_to_mesh.add(bytes);
        } else {
            self.facts.bytes_from_mesh += bytes;
            io.cells.bytes_from_mesh.add(bytes);
        }
    }

    fn finish_if_both_ended<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if self.flows.iter().all(|flow| flow.state == State::Finished) {
            return self.close(io, CloseReason::Complete, false);
        }
        Next::Wait
    }
}

fn other(leg: usize) -> usize {
    if leg == PLAIN { MESH } else { PLAIN }
}

fn side(leg: usize) -> Side {
    if leg == PLAIN { Side::Plain } else { Side::Mesh }
}

/// Calls with the spans that are there, without allocating.
fn with_spans<T>(spans: &[Option<Span>; PARTS_MAX], call: impl FnOnce(&[Span]) -> T) -> T {
    let first = spans.iter().flatten().next().copied();
    let Some(first) = first else { return call(&[]) };
    let mut dense = [first; PARTS_MAX];
    let mut count = 0;
    for (place, span) in dense.iter_mut().zip(spans.iter().flatten()) {
        *place = *span;
        count += 1;
    }
    call(&dense[..count])
}
