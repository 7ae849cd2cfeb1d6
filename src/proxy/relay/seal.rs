//! Plain to mesh: receive into record slots, seal each where it lies, send the run.

use super::{Hold, State, with_spans};
use crate::buffer::{Class, HEADROOM_BYTES, Lease};
use crate::proxy::close::{CloseReason, Side};
use crate::proxy::connection::{Connection, Control, Io, MESH, Next, PLAIN};
use crate::ring::{Completion, Errno, Op, PARTS_MAX, Push, Ring};
use crate::tls::Session;
use crate::tls::record::{PAYLOAD_BYTES_MAX, RecordError};

impl Connection {
    pub(super) fn seal_receive<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let (header, trailer) = match &self.session {
            Some(session) => (session.header_len(), session.trailer_len()),
            None => return Next::Wait,
        };
        let poll_first = !self.legs[PLAIN].nonempty;
        self.seal.state = State::Receiving;
        self.seal.waiting_since = Some(io.now);
        self.seal.start = 0;
        self.seal.end = 0;
        if !self.seal.hold_region(io.ring, io.pool) {
            self.seal.release(io.ring, io.pool);
            self.seal.asked = PAYLOAD_BYTES_MAX;
            let (socket, token) = self.begin(Op::Receive, PLAIN);
            io.ring.receive_shared(socket, PAYLOAD_BYTES_MAX, poll_first, token);
            return Next::Wait;
        }
        let (socket, token) = self.begin(Op::Receive, PLAIN);
        let Some(lease) = self.seal.lease(io.ring) else { return Next::Wait };
        let stride = header + PAYLOAD_BYTES_MAX + trailer;
        let slots = (lease.class().bytes() / stride).min(lease.class().slots());
        let mut spans = [None; PARTS_MAX];
        for (slot, span) in spans.iter_mut().enumerate().take(slots) {
            *span = Some(io.pool.span(lease, slot * stride + header, PAYLOAD_BYTES_MAX));
        }
        self.seal.asked = slots * PAYLOAD_BYTES_MAX;
        with_spans(&spans, |spans| io.ring.receive(socket, spans, poll_first, token));
        Next::Wait
    }

    pub(super) fn seal_received<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        self.seal.state = State::Idle;
        if let Some(buffer) = completion.buffer {
            self.seal.hold = Hold::Shared(buffer);
        }
        match completion.outcome() {
            Ok(0) => {
                self.seal.release(io.ring, io.pool);
                self.seal.ended = true;
                self.send_close_notify(io)
            }
            Ok(received) => {
                self.seal.learn(received as usize);
                self.seal_plain(io, received as usize)
            }
            Err(Errno(libc::ENOBUFS)) => self.seal_receive_directly(io),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => self.seal_receive(io),
            Err(errno) => self.broken(io, Side::Plain, errno),
        }
    }

    /// Begins with what was read to find the route: it lies as a receive into a slot would have left it.
    pub(super) fn seal_kept<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.seal_plain(io, self.seal.end - self.seal.start)
    }

    fn seal_plain<R: Ring>(&mut self, io: &mut Io<'_, R>, received: usize) -> Next {
        self.facts.bytes_to_mesh += received as u64;
        io.cells.bytes_to_mesh.add(received as u64);
        self.seal_run(io, received)
    }

    /// The shared buffers are all out: receives into a slot of the flow's own.
    fn seal_receive_directly<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        io.worker.buffer_ring_empty.add(1);
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        let span = io.pool.span(&lease, HEADROOM_BYTES, PAYLOAD_BYTES_MAX);
        self.seal.hold = Hold::Own(lease);
        self.seal.asked = PAYLOAD_BYTES_MAX;
        self.seal.state = State::Receiving;
        self.seal.waiting_since = Some(io.now);
        let (socket, token) = self.begin(Op::Receive, PLAIN);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    /// Seals `received` bytes where they lie and sends the run of records, control records first.
    fn seal_run<R: Ring>(&mut self, io: &mut Io<'_, R>, received: usize) -> Next {
        let wants_control = self.session.as_ref().is_some_and(|session| session.wants_control());
        if wants_control || self.legs[MESH].is_pending(Op::Send) {
            self.seal.deferred = received;
            self.seal.state = State::Sending;
            return if self.legs[MESH].is_pending(Op::Send) { Next::Wait } else { self.send_key_update(io) };
        }
        let Some(session) = self.session.as_mut() else { return Next::Wait };
        let Some(lease) = self.seal.lease(io.ring) else { return Next::Wait };
        let start = match lease.class() {
            Class::Slot => HEADROOM_BYTES - session.header_len(),
            Class::Medium | Class::Large => 0,
        };
        let bytes = io.pool.bytes(lease);
        match seal_records(session, &mut bytes[start..], received) {
            Ok(sealed) => {
                self.seal.start = start;
                self.seal.end = start + sealed;
                self.seal.state = State::Sending;
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
        let Some(lease) = self.seal.lease(io.ring) else { return Next::Wait };
        let span = io.pool.span(lease, self.seal.start, self.seal.end - self.seal.start);
        io.ring.send(socket, &[span], Push::Now, token);
        Next::Wait
    }

    pub(super) fn seal_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        let sent = match completion.outcome() {
            Ok(sent) => sent as usize,
            Err(Errno(libc::EINTR | libc::EAGAIN)) if matches!(self.control, Control::None) => 0,
            // Only our own close_notify was lost on a peer that had said it is done: what it sent is still delivered.
            Err(_) if self.seal.ended && self.open.ended => {
                self.release_control(io.pool);
                self.seal.state = State::Finished;
                return self.finish_if_both_ended(io);
            }
            Err(errno) => return self.broken(io, Side::Mesh, errno),
        };
        match std::mem::take(&mut self.control) {
            Control::None => {}
            Control::KeyUpdate(lease) | Control::Alert(lease) => {
                io.pool.give_back(lease);
                return self.after_control(io);
            }
            Control::CloseNotify(lease) => {
                io.pool.give_back(lease);
                if let Some(socket) = self.legs[MESH].socket {
                    io.ring.shutdown_write(socket);
                }
                self.seal.state = State::Finished;
                return self.finish_if_both_ended(io);
            }
        }
        self.seal.start += sent;
        if self.seal.start < self.seal.end {
            return self.send_sealed(io);
        }
        self.seal.state = State::Idle;
        if self.session.as_ref().is_some_and(|session| session.wants_control()) {
            return self.send_key_update(io);
        }
        self.seal_receive(io)
    }

    fn after_control<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let deferred = std::mem::take(&mut self.seal.deferred);
        if deferred > 0 {
            return self.seal_run(io, deferred);
        }
        if self.seal.ended {
            return self.send_close_notify(io);
        }
        if self.seal.state == State::Idle { self.seal_receive(io) } else { Next::Wait }
    }

    pub(super) fn send_key_update<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.send_control(io, Control::KeyUpdate, |session, out| session.seal_control(out))
    }

    fn send_close_notify<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.seal.state = State::Sending;
        if self.legs[MESH].is_pending(Op::Send) {
            // A control record is on its way; `after_control` comes back here.
            return Next::Wait;
        }
        self.send_control(io, Control::CloseNotify, |session, out| session.seal_alert(0, out))
    }

    fn send_control<R: Ring>(
        &mut self,
        io: &mut Io<'_, R>,
        kind: fn(Lease) -> Control,
        seal: fn(&mut Session, &mut [u8]) -> Result<usize, RecordError>,
    ) -> Next {
        let Some(session) = self.session.as_mut() else { return Next::Wait };
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        match seal(session, io.pool.bytes(&lease)) {
            Ok(len) => {
                let span = io.pool.span(&lease, 0, len);
                self.control = kind(lease);
                // The FIN that follows takes a close_notify along.
                let push = if matches!(self.control, Control::CloseNotify(_)) { Push::WithNext } else { Push::Now };
                let (socket, token) = self.begin(Op::Send, MESH);
                io.ring.send(socket, &[span], push, token);
                Next::Wait
            }
            Err(error) => {
                io.pool.give_back(lease);
                self.facts.detail = Some(error.what.into());
                self.close(io, CloseReason::ProtocolError, true)
            }
        }
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
