//! Plain to mesh: receive into record slots, seal each where it lies, send the run.

use super::{Hold, State, with_spans};
use crate::buffer::{Class, HEADROOM_BYTES};
use crate::proxy::close::{CloseReason, Side};
use crate::proxy::connection::{Connection, Io, MESH, Next, PLAIN};
use crate::ring::{Completion, Errno, Op, PARTS_MAX, Push, Ring};
use crate::tls::Session;
use crate::tls::record::{PAYLOAD_BYTES_MAX, RecordError};

impl Connection {
    pub(super) fn seal_receive<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let (header, trailer) = match &self.sessions[MESH] {
            Some(session) => (session.header_len(), session.trailer_len()),
            None => return Next::Wait,
        };
        let poll_first = !self.legs[PLAIN].nonempty;
        self.flows[PLAIN].state = State::Receiving;
        self.flows[PLAIN].waiting_since = Some(io.now);
        self.flows[PLAIN].start = 0;
        self.flows[PLAIN].end = 0;
        if !self.flows[PLAIN].hold_region(io.ring, io.pool) {
            self.flows[PLAIN].release(io.ring, io.pool);
            self.flows[PLAIN].asked = PAYLOAD_BYTES_MAX;
            let (socket, token) = self.begin(Op::Receive, PLAIN);
            io.ring.receive_shared(socket, PAYLOAD_BYTES_MAX, poll_first, token);
            return Next::Wait;
        }
        let (socket, token) = self.begin(Op::Receive, PLAIN);
        let Some(lease) = self.flows[PLAIN].lease(io.ring) else { return Next::Wait };
        let stride = header + PAYLOAD_BYTES_MAX + trailer;
        let slots = (lease.class().bytes() / stride).min(lease.class().slots());
        let mut spans = [None; PARTS_MAX];
        for (slot, span) in spans.iter_mut().enumerate().take(slots) {
            *span = Some(io.pool.span(lease, slot * stride + header, PAYLOAD_BYTES_MAX));
        }
        self.flows[PLAIN].asked = slots * PAYLOAD_BYTES_MAX;
        with_spans(&spans, |spans| io.ring.receive(socket, spans, poll_first, token));
        Next::Wait
    }

    pub(super) fn seal_received<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        self.flows[PLAIN].state = State::Idle;
        if let Some(buffer) = completion.buffer {
            self.flows[PLAIN].hold = Hold::Shared(buffer);
        }
        match completion.outcome() {
            Ok(0) => {
                self.flows[PLAIN].release(io.ring, io.pool);
                self.flows[PLAIN].ended = true;
                self.send_close_notify(io, MESH)
            }
            Ok(received) => {
                self.flows[PLAIN].learn(received as usize);
                self.seal_plain(io, received as usize)
            }
            Err(Errno(libc::ENOBUFS)) => self.seal_receive_directly(io),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => self.seal_receive(io),
            Err(errno) => self.broken(io, Side::Plain, errno),
        }
    }

    /// Begins with what was read to find the route: it lies as a receive into a slot would have left it.
    pub(super) fn seal_kept<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.seal_plain(io, self.flows[PLAIN].end - self.flows[PLAIN].start)
    }

    fn seal_plain<R: Ring>(&mut self, io: &mut Io<'_, R>, received: usize) -> Next {
        self.count(io, PLAIN, received as u64);
        self.seal_run(io, received)
    }

    /// The shared buffers are all out: receives into a slot of the flow's own.
    fn seal_receive_directly<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        io.worker.buffer_ring_empty.add(1);
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        let span = io.pool.span(&lease, HEADROOM_BYTES, PAYLOAD_BYTES_MAX);
        self.flows[PLAIN].hold = Hold::Own(lease);
        self.flows[PLAIN].asked = PAYLOAD_BYTES_MAX;
        self.flows[PLAIN].state = State::Receiving;
        self.flows[PLAIN].waiting_since = Some(io.now);
        let (socket, token) = self.begin(Op::Receive, PLAIN);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    /// Seals `received` bytes where they lie and sends the run of records, control records first.
    pub(super) fn seal_run<R: Ring>(&mut self, io: &mut Io<'_, R>, received: usize) -> Next {
        let wants_control = self.sessions[MESH].as_ref().is_some_and(|session| session.wants_control());
        if wants_control || self.legs[MESH].is_pending(Op::Send) {
            self.flows[PLAIN].deferred = received;
            self.flows[PLAIN].state = State::Sending;
            return if self.legs[MESH].is_pending(Op::Send) { Next::Wait } else { self.send_key_update(io, MESH) };
        }
        let Some(session) = self.sessions[MESH].as_mut() else { return Next::Wait };
        let Some(lease) = self.flows[PLAIN].lease(io.ring) else { return Next::Wait };
        let start = match lease.class() {
            Class::Slot => HEADROOM_BYTES - session.header_len(),
            Class::Medium | Class::Large => 0,
        };
        let bytes = io.pool.bytes(lease);
        match seal_records(session, &mut bytes[start..], received) {
            Ok(sealed) => {
                self.flows[PLAIN].start = start;
                self.flows[PLAIN].end = start + sealed;
                self.flows[PLAIN].state = State::Sending;
                self.send_sealed(io)
            }
            Err(error) => {
                self.facts.detail = Some(error.what.into());
                self.close(io, CloseReason::ProtocolError, true)
            }
        }
    }

    fn send_sealed<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let (socket, token) = self.begin(Op::Send, MESH);
        let Some(lease) = self.flows[PLAIN].lease(io.ring) else { return Next::Wait };
        let span = io.pool.span(lease, self.flows[PLAIN].start, self.flows[PLAIN].end - self.flows[PLAIN].start);
        io.ring.send(socket, &[span], Push::Now, token);
        Next::Wait
    }

    /// Data is out, or a part of it.
    pub(super) fn seal_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        let sent = match completion.outcome() {
            Ok(sent) => sent as usize,
            Err(Errno(libc::EINTR | libc::EAGAIN)) => 0,
            Err(errno) => return self.broken(io, Side::Mesh, errno),
        };
        self.flows[PLAIN].start += sent;
        if self.flows[PLAIN].start < self.flows[PLAIN].end {
            return self.send_sealed(io);
        }
        self.flows[PLAIN].state = State::Idle;
        if self.sessions[MESH].as_ref().is_some_and(|session| session.wants_control()) {
            return self.send_key_update(io, MESH);
        }
        self.seal_receive(io)
    }
}

/// Seals `payload` bytes that lie in `bytes` at record strides; returns the length of the run.
fn seal_records(session: &mut Session, bytes: &mut [u8], payload: usize) -> Result<usize, RecordError> {
    let overhead = session.header_len() + session.trailer_len();
    let mut left = payload;
    let mut at = 0;
    while left > 0 {
        let len = left.min(PAYLOAD_BYTES_MAX) + overhead;
        session.seal(&mut bytes[at..at + len])?;
        at += len;
        left -= len - overhead;
    }
    Ok(at)
}
