//! The handshake stage of a connection, in either role. At gateways there is a second one on the other leg: before it with a
//! client, or after it with an app, that speaks TLS.
//!
//! Invariant: handshake bytes are copied once into a lease of the connection's own, so a slow peer never holds one of the
//! shared buffers; what follows the handshake in the same receive stays encrypted and goes to the relay.

use super::close::{self, CloseReason};
use super::connection::{Connection, Io, MESH, Next, PLAIN, Stage};
use crate::buffer::{Class, HEADROOM_BYTES, Lease, Pool, RECORD_ROOM_BYTES};
use crate::ring::{Completion, Op, Push, Ring};
use crate::telemetry::cells::Direction;
use crate::tls::{Failure, FailureKind, Handshake, Progress};

const TOO_LARGE: &str = "a handshake message is larger than 16 KiB";

/// A handshake with its buffers.
pub(super) struct Handshaking {
    tls: Handshake,
    /// With whom: the mesh peer, or the app or client outside of the mesh.
    leg: usize,
    /// Bytes received and not yet consumed, at the front of the lease. None until the first byte came.
    input: Option<Lease>,
    filled: usize,
    output: Option<Lease>,
    /// What to do once the bytes being sent are out.
    after: Option<Progress>,
    /// Whether any byte ever came.
    heard: bool,
}

impl Handshaking {
    pub(super) fn new(tls: Handshake, leg: usize) -> Box<Self> {
        Box::new(Self { tls, leg, input: None, filled: 0, output: None, after: None, heard: false })
    }

    pub(super) fn give_back(self, pool: &mut Pool) {
        for lease in [self.input, self.output].into_iter().flatten() {
            pool.give_back(lease);
        }
    }
}

impl Connection {
    /// Starts the server role with whoever connected, a peer or a client of outside the mesh: with the first bytes where they
    /// were read to find the route, otherwise by waiting for them without owning a buffer.
    pub(super) fn start_accepting<R: Ring>(&mut self, io: &mut Io<'_, R>, tls: Handshake, timeout: std::time::Duration) -> Next {
        let (stage, leg) = match self.direction {
            Direction::Inbound => (Stage::Handshake, MESH),
            Direction::Outbound => (Stage::ClientHandshake, PLAIN),
        };
        self.stage = stage;
        self.deadline = Some(io.now + timeout);
        self.step_began = io.now;
        let mut handshaking = Handshaking::new(tls, leg);
        let Some((input, filled)) = self.flows[PLAIN].take_kept(io.pool) else {
            self.handshaking = Some(handshaking);
            return self.receive_handshake(io);
        };
        handshaking.input = Some(input);
        handshaking.filled = filled;
        handshaking.heard = true;
        self.handshaking = Some(handshaking);
        self.step_handshake(io)
    }

    /// The leg that is, or would be, shaking hands.
    pub(super) fn handshake_leg(&self) -> usize {
        self.handshaking.as_ref().map_or(MESH, |handshaking| handshaking.leg)
    }

    fn receive_handshake<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let leg = self.handshake_leg();
        let poll_first = !self.legs[leg].nonempty;
        let (socket, token) = self.begin(Op::Receive, leg);
        io.ring.receive_shared(socket, usize::MAX, poll_first, token);
        Next::Wait
    }

    pub(super) fn on_handshake<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, completion: Completion) -> Next {
        match op {
            Op::Receive => self.on_handshake_bytes(io, completion),
            Op::Send => match completion.outcome() {
                Ok(_) => match self.handshaking.as_mut().and_then(|handshaking| handshaking.after.take()) {
                    Some(progress) => self.on_progress(io, progress),
                    None => Next::Wait,
                },
                Err(errno) => self.handshake_broken(io, std::io::Error::from(errno).to_string()),
            },
            _ => Next::Wait,
        }
    }

    fn on_handshake_bytes<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        let received = match completion.outcome() {
            Ok(0) => {
                if let Some(buffer) = completion.buffer {
                    io.ring.recycle(buffer);
                }
                let heard = self.handshaking.as_ref().is_some_and(|handshaking| handshaking.heard);
                if self.handshake_leg() != self.far_leg() && !heard {
                    return self.close(io, CloseReason::Probe, false);
                }
                return self.handshake_broken(io, "the peer closed during the handshake".to_owned());
            }
            Ok(received) => received as usize,
            Err(crate::ring::Errno(libc::ENOBUFS)) => {
                io.worker.buffer_ring_empty.add(1);
                return self.receive_handshake_directly(io);
            }
            Err(errno) => return self.handshake_broken(io, std::io::Error::from(errno).to_string()),
        };
        let stored = match completion.buffer {
            Some(buffer) => {
                let stored = self.store_handshake_bytes(io, buffer, received);
                io.ring.recycle(buffer);
                stored
            }
            None => self.count_direct_bytes(received),
        };
        match stored {
            Ok(()) => self.step_handshake(io),
            Err(CloseReason::OutOfBuffers) => self.close(io, CloseReason::OutOfBuffers, true),
            Err(_) => self.handshake_broken(io, TOO_LARGE.to_owned()),
        }
    }

    /// The shared buffers are all out: receives into the handshake's own lease instead.
    fn receive_handshake_directly<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let Some(handshaking) = self.handshaking.as_mut() else { return Next::Wait };
        if handshaking.input.is_none() {
            handshaking.input = io.pool.lease(Class::Slot);
        }
        let Some(input) = &handshaking.input else { return self.close(io, CloseReason::OutOfBuffers, true) };
        if handshaking.filled == RECORD_ROOM_BYTES {
            return self.handshake_broken(io, TOO_LARGE.to_owned());
        }
        let span = io.pool.span(input, handshaking.filled, RECORD_ROOM_BYTES - handshaking.filled);
        let leg = handshaking.leg;
        let (socket, token) = self.begin(Op::Receive, leg);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    fn count_direct_bytes(&mut self, received: usize) -> Result<(), CloseReason> {
        let Some(handshaking) = self.handshaking.as_mut() else { return Err(CloseReason::HandshakeFailed) };
        handshaking.heard = true;
        handshaking.filled += received;
        Ok(())
    }

    fn store_handshake_bytes<R: Ring>(&mut self, io: &mut Io<'_, R>, buffer: u16, received: usize) -> Result<(), CloseReason> {
        let Some(handshaking) = self.handshaking.as_mut() else { return Err(CloseReason::HandshakeFailed) };
        handshaking.heard = true;
        if handshaking.input.is_none() {
            handshaking.input = io.pool.lease(Class::Slot);
        }
        let Some(input) = &handshaking.input else { return Err(CloseReason::OutOfBuffers) };
        let (own, shared) = io.pool.bytes_of_two(input, io.ring.shared(buffer));
        let room = own[..RECORD_ROOM_BYTES].get_mut(handshaking.filled..handshaking.filled + received);
        let Some(room) = room else { return Err(CloseReason::HandshakeFailed) };
        room.copy_from_slice(&shared[HEADROOM_BYTES..HEADROOM_BYTES + received]);
        handshaking.filled += received;
        Ok(())
    }

    /// Lets rustls take what is there, and sends what it wrote.
    pub(super) fn step_handshake<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let Some(handshaking) = self.handshaking.as_mut() else { return Next::Wait };
        for lease in [&mut handshaking.input, &mut handshaking.output] {
            if lease.is_none() {
                *lease = io.pool.lease(Class::Slot);
            }
        }
        let (Some(input), Some(output)) = (&handshaking.input, &handshaking.output) else {
            return self.close(io, CloseReason::OutOfBuffers, true);
        };
        let (incoming, out) = io.pool.bytes_of_two(input, output);
        let step = handshaking.tls.step(&mut incoming[..handshaking.filled], out);
        incoming.copy_within(step.consumed..handshaking.filled, 0);
        handshaking.filled -= step.consumed;
        if step.written == 0 {
            return self.on_progress(io, step.progress);
        }
        let span = io.pool.span(output, 0, step.written);
        // Tickets that end a handshake are nobody's to wait for: they go with the first answer.
        let can_wait = matches!(step.progress, Progress::Done) && handshaking.tls.ends_with_tickets();
        let push = if can_wait { Push::WithNext } else { Push::Now };
        handshaking.after = Some(step.progress);
        let leg = handshaking.leg;
        let (socket, token) = self.begin(Op::Send, leg);
        io.ring.send(socket, &[span], push, token);
        Next::Wait
    }

    fn on_progress<R: Ring>(&mut self, io: &mut Io<'_, R>, progress: Progress) -> Next {
        match progress {
            Progress::NeedBytes => {
                self.spare_output(io);
                self.receive_handshake(io)
            }
            Progress::NeedRoom => self.step_handshake(io),
            Progress::Done => self.establish(io),
            Progress::Failed(failure) => self.handshake_failed(io, self.handshake_leg(), failure),
        }
    }

    /// While the peer thinks, one lease is enough.
    fn spare_output<R: Ring>(&mut self, io: &mut Io<'_, R>) {
        if let Some(lease) = self.handshaking.as_mut().and_then(|handshaking| handshaking.output.take()) {
            io.pool.give_back(lease);
        }
    }

    fn establish<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let Some(handshaking) = self.handshaking.take() else { return Next::Wait };
        let Handshaking { tls, leg, input, filled, output, .. } = *handshaking;
        if let Some(lease) = output {
            io.pool.give_back(lease);
        }
        let shown = self.facts.access.is_some().then(|| tls.peer_certificate()).flatten();
        let peer_certificate = shown.map(Into::into);
        let established = match tls.establish() {
            Ok(established) => established,
            Err(failure) => {
                if let Some(lease) = input {
                    io.pool.give_back(lease);
                }
                return self.handshake_failed(io, leg, failure);
            }
        };
        match input {
            Some(lease) if filled > 0 => {
                // What came with the end of the handshake was moved to the front, once a connection.
                io.worker.payload_bytes_moved.add(filled as u64);
                self.flows[leg].preload(lease, filled);
            }
            Some(lease) => io.pool.give_back(lease),
            None => {}
        }
        self.sessions[leg] = Some(Box::new(established.session));
        self.deadline = None;
        if leg == PLAIN {
            // Counters and the connection log tell of the mesh leg alone; an access log tells of both.
            io.cells.outside_handshakes.add(1);
            if let Some(facts) = &mut self.facts.access {
                facts.outside_tls = Some((established.version, established.suite));
                facts.outside_certificate = peer_certificate;
            }
            if self.direction == Direction::Outbound {
                return Next::ClientReady;
            }
            // The app is connected now, as for Envoy.
            self.facts.connect = Some(io.now - self.step_began);
            return Next::AppReady;
        }
        if let Some(facts) = &mut self.facts.access {
            facts.peer_certificate = peer_certificate;
        }
        self.facts.handshake = Some(io.now - self.step_began);
        self.facts.tls_version = Some(established.version);
        self.facts.tls_suite = Some(established.suite);
        self.facts.tls_resumed = established.resumed;
        io.cells.handshakes.add(1);
        io.cells.count_suite(established.suite);
        if established.resumed {
            io.cells.handshakes_resumed.add(1);
        }
        match self.direction {
            Direction::Inbound => {
                self.facts.source = established.peer;
                Next::Authorise
            }
            Direction::Outbound => {
                self.facts.destination = established.peer;
                Next::EndpointReady
            }
        }
    }

    fn handshake_failed<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize, failure: Failure) -> Next {
        match (leg, self.direction) {
            (PLAIN, Direction::Inbound) => self.app_handshake_failed(io, &failure.detail),
            (PLAIN, Direction::Outbound) => self.client_handshake_failed(io, &failure.detail),
            (_, direction) => {
                self.facts.detail = Some(failure.detail);
                let reason = close::handshake(failure.kind);
                match direction {
                    // The alert is out already; a clean end lets the peer read it.
                    Direction::Inbound => self.close(io, reason, failure.kind == FailureKind::Protocol),
                    Direction::Outbound => self.retreat(io, reason),
                }
            }
        }
    }

    fn handshake_broken<R: Ring>(&mut self, io: &mut Io<'_, R>, detail: String) -> Next {
        match (self.handshake_leg(), self.direction) {
            (PLAIN, Direction::Inbound) => self.app_handshake_failed(io, &detail),
            (PLAIN, Direction::Outbound) => self.client_handshake_failed(io, &detail),
            (_, direction) => {
                self.facts.detail = Some(detail.into());
                match direction {
                    Direction::Inbound => self.close(io, CloseReason::HandshakeFailed, true),
                    Direction::Outbound => self.retreat(io, CloseReason::HandshakeFailed),
                }
            }
        }
    }

    /// The mesh peer is allowed, and the app cannot be reached: another endpoint of it may be.
    pub(super) fn app_handshake_failed<R: Ring>(&mut self, io: &mut Io<'_, R>, why: &str) -> Next {
        self.tell_of_outsider(why);
        io.cells.outside_handshakes_failed.add(1);
        self.retreat(io, CloseReason::AppUnreachable)
    }

    /// Nobody was dialed for that client yet. What alert it gets is out already.
    fn client_handshake_failed<R: Ring>(&mut self, io: &mut Io<'_, R>, why: &str) -> Next {
        self.tell_of_outsider(why);
        io.cells.outside_handshakes_failed.add(1);
        // A FIN, so that the alert is read.
        self.told = true;
        self.close(io, CloseReason::HandshakeFailed, false)
    }

    /// Says what went wrong in TLS with whoever is outside of the mesh.
    pub(super) fn tell_of_outsider(&mut self, what: &str) {
        let who = match self.direction {
            Direction::Inbound => "app",
            Direction::Outbound => "client",
        };
        self.facts.detail = Some(format!("TLS with the {who}: {what}").into());
    }
}
