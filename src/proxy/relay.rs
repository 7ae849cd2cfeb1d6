//! The two byte directions of a connection: plain to mesh is sealed in place, mesh to plain is opened in place.
//!
//! Invariant: a flow either receives or sends, never both, so its buffer has one user; it receives again only when all it
//! had was sent, which is the whole back-pressure. Payload is never copied in user space, nor moved: a receive stops where
//! every record that has begun still fits the slack behind it.
//!
//! Ends: EOF on the plain leg becomes close_notify and FIN on the mesh leg; close_notify becomes FIN on the plain leg; an
//! EOF without close_notify, or a reset, becomes a reset on the other leg.

use std::time::Instant;

use super::close::{self, CloseReason, Side};
use super::connection::{Connection, Control, Io, MESH, Next, PLAIN, Stage};
use super::limits::{REGION_IDLE, SMALL_RECEIVES_MAX};
use crate::buffer::{Class, HEADROOM_BYTES, Lease, Pool, RECORD_ROOM_BYTES, SLACK_BYTES, Span};
use crate::ring::{Completion, Errno, Op, PARTS_MAX, Ring};
use crate::tls::record::PAYLOAD_BYTES_MAX;
use crate::tls::{Open, Session};

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
    /// Sealing: bytes received that wait for a control record to go first.
    deferred: usize,
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
            ended: false,
            waiting_since: None,
        }
    }
}

impl Flow {
    pub(super) fn is_finished(&self) -> bool {
        self.state == State::Finished || self.ended
    }

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
                Some(lease) => self.hold = Hold::Own(lease),
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
    pub(super) fn start_relay<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.stage = Stage::Relay;
        self.deadline = None;
        match self.seal_receive(io) {
            Next::Wait => {}
            other => return other,
        }
        if self.open.end > self.open.start { self.open_records(io) } else { self.open_receive(io) }
    }

    pub(super) fn on_relay<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, leg: usize, completion: Completion) -> Next {
        match (op, leg) {
            (Op::Receive, PLAIN) => self.seal_received(io, completion),
            (Op::Receive, _) => self.open_received(io, completion),
            (Op::Send, PLAIN) => self.open_sent(io, completion),
            (Op::Send, _) => self.seal_sent(io, completion),
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
            let flow = if leg == PLAIN { &mut self.seal } else { &mut self.open };
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

    // Plain to mesh.

    fn seal_receive<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
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

    fn seal_received<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
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
                self.facts.bytes_to_mesh += u64::from(received);
                io.cells.bytes_to_mesh.add(u64::from(received));
                self.seal_run(io, received as usize)
            }
            Err(Errno(libc::ENOBUFS)) => self.seal_receive_directly(io),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => self.seal_receive(io),
            Err(errno) => self.broken(io, Side::Plain, errno),
        }
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
        io.ring.send(socket, &[span], token);
        Next::Wait
    }

    fn seal_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        let sent = match completion.outcome() {
            Ok(sent) => sent as usize,
            Err(Errno(libc::EINTR | libc::EAGAIN)) => 0,
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

    fn send_key_update<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
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
        seal: fn(&mut Session, &mut [u8]) -> Result<usize, crate::tls::record::RecordError>,
    ) -> Next {
        let Some(session) = self.session.as_mut() else { return Next::Wait };
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        match seal(session, io.pool.bytes(&lease)) {
            Ok(len) => {
                let span = io.pool.span(&lease, 0, len);
                self.control = kind(lease);
                let (socket, token) = self.begin(Op::Send, MESH);
                io.ring.send(socket, &[span], token);
                Next::Wait
            }
            Err(error) => {
                io.pool.give_back(lease);
                self.facts.detail = Some(error.what.into());
                self.close(io, CloseReason::ProtocolError, true)
            }
        }
    }

    // Mesh to plain.

    fn open_receive<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let record = match &self.session {
            Some(session) => session.header_len() + PAYLOAD_BYTES_MAX + session.trailer_len(),
            None => return Next::Wait,
        };
        self.open.state = State::Receiving;
        self.open.waiting_since = Some(io.now);
        let poll_first = !self.legs[MESH].nonempty;
        if self.open.end > self.open.start {
            let (socket, token) = self.begin(Op::Receive, MESH);
            let Some(lease) = self.open.lease(io.ring) else { return Next::Wait };
            // Up to the slack anything may come; within it only the rest of the record that has begun.
            let upto = (lease.class().bytes() - SLACK_BYTES).max(self.open.start + self.open.need);
            let span = io.pool.span(lease, self.open.end, upto - self.open.end);
            self.open.asked = span.len();
            io.ring.receive(socket, &[span], poll_first, token);
            return Next::Wait;
        }
        if !self.open.hold_region(io.ring, io.pool) {
            self.open.release(io.ring, io.pool);
            self.open.asked = record;
            self.open.start = HEADROOM_BYTES;
            self.open.end = HEADROOM_BYTES;
            let (socket, token) = self.begin(Op::Receive, MESH);
            io.ring.receive_shared(socket, record, poll_first, token);
            return Next::Wait;
        }
        self.open.start = 0;
        self.open.end = 0;
        let (socket, token) = self.begin(Op::Receive, MESH);
        let Some(lease) = self.open.lease(io.ring) else { return Next::Wait };
        // A whole number of full records: a stream of these never leaves a partial one at the end.
        let len = (lease.class().bytes() - SLACK_BYTES) / record * record;
        let span = io.pool.span(lease, 0, len);
        self.open.asked = len;
        io.ring.receive(socket, &[span], poll_first, token);
        Next::Wait
    }

    fn open_received<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        self.open.state = State::Idle;
        if let Some(buffer) = completion.buffer {
            self.open.hold = Hold::Shared(buffer);
        }
        match completion.outcome() {
            Ok(0) => self.close(io, CloseReason::Truncated, true),
            Ok(received) => {
                self.open.learn(received as usize);
                self.open.end += received as usize;
                self.open_records(io)
            }
            Err(Errno(libc::ENOBUFS)) => self.open_receive_directly(io),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => self.open_receive(io),
            Err(errno) => self.broken(io, Side::Mesh, errno),
        }
    }

    fn open_receive_directly<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        io.worker.buffer_ring_empty.add(1);
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        let span = io.pool.span(&lease, HEADROOM_BYTES, RECORD_ROOM_BYTES - HEADROOM_BYTES);
        self.open.hold = Hold::Own(lease);
        self.open.start = HEADROOM_BYTES;
        self.open.end = HEADROOM_BYTES;
        self.open.asked = span.len();
        self.open.state = State::Receiving;
        let (socket, token) = self.begin(Op::Receive, MESH);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    /// Opens every whole record that is there and sends the payloads from where they lie.
    fn open_records<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.open.parts.clear();
        let mut payload_bytes = 0_u64;
        while self.open.parts.len() < PARTS_MAX && self.open.start < self.open.end {
            let Some(session) = self.session.as_mut() else { return Next::Wait };
            let Some(lease) = self.open.lease(io.ring) else { return Next::Wait };
            let base = self.open.start;
            let bytes = &mut io.pool.bytes(lease)[base..self.open.end];
            match session.open(bytes) {
                Ok(Open::Data { record_len, payload }) => {
                    if !payload.is_empty() {
                        payload_bytes += payload.len() as u64;
                        self.open.parts.push(((base + payload.start) as u32, payload.len() as u32));
                    }
                    self.open.start += record_len;
                }
                Ok(Open::Control { record_len }) => self.open.start += record_len,
                Ok(Open::CloseNotify { .. }) => {
                    // What follows close_notify is not ours to read (RFC 8446 6.1).
                    self.open.ended = true;
                    self.open.start = self.open.end;
                }
                Ok(Open::Incomplete { need }) if need <= SLACK_BYTES => {
                    self.open.need = need;
                    break;
                }
                Ok(Open::Incomplete { .. }) => {
                    self.facts.detail = Some("a record is longer than any suite makes it".into());
                    return self.refuse(io, ALERT_RECORD_OVERFLOW, CloseReason::ProtocolError);
                }
                Ok(Open::Alert { code }) => {
                    self.facts.detail = Some(format!("the peer sent alert {code}").into());
                    return self.close(io, close::alert(code).unwrap_or(CloseReason::PeerReset), true);
                }
                Err(error) => {
                    self.facts.detail = Some(error.what.into());
                    return self.refuse(io, error.alert, CloseReason::ProtocolError);
                }
            }
        }
        self.facts.bytes_from_mesh += payload_bytes;
        io.cells.bytes_from_mesh.add(payload_bytes);
        self.answer_key_update(io);
        if self.stage != Stage::Relay {
            return Next::Wait;
        }
        if self.open.parts.is_empty() { self.open_continue(io) } else { self.send_opened(io) }
    }

    /// A KeyUpdate that the peer asked for goes out at once when nothing else is being sent; else `seal_sent` sees to it.
    fn answer_key_update<R: Ring>(&mut self, io: &mut Io<'_, R>) {
        let wanted = self.session.as_ref().is_some_and(|session| session.wants_control());
        if wanted && !self.seal.ended && !self.legs[MESH].is_pending(Op::Send) {
            let _ = self.send_key_update(io);
        }
    }

    fn send_opened<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.open.state = State::Sending;
        let (socket, token) = self.begin(Op::Send, PLAIN);
        let Some(lease) = self.open.lease(io.ring) else { return Next::Wait };
        let mut spans = [None; PARTS_MAX];
        for (span, &(start, len)) in spans.iter_mut().zip(&self.open.parts) {
            *span = Some(io.pool.span(lease, start as usize, len as usize));
        }
        with_spans(&spans, |spans| io.ring.send(socket, spans, token));
        Next::Wait
    }

    fn open_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        let sent = match completion.outcome() {
            Ok(sent) => sent as usize,
            Err(Errno(libc::EINTR | libc::EAGAIN)) => 0,
            Err(errno) => return self.broken(io, Side::Plain, errno),
        };
        drop_front(&mut self.open.parts, sent);
        if !self.open.parts.is_empty() {
            return self.send_opened(io);
        }
        self.open.state = State::Idle;
        if self.open.start < self.open.end { self.open_records(io) } else { self.open_continue(io) }
    }

    fn open_continue<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if !self.open.ended {
            return self.open_receive(io);
        }
        self.open.release(io.ring, io.pool);
        self.open.state = State::Finished;
        if let Some(socket) = self.legs[PLAIN].socket {
            io.ring.shutdown_write(socket);
        }
        self.finish_if_both_ended(io)
    }

    fn finish_if_both_ended<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if self.seal.state == State::Finished && self.open.state == State::Finished {
            return self.close(io, CloseReason::Complete, false);
        }
        Next::Wait
    }
}

/// Seals `payload` bytes that lie in `bytes` at record strides; returns the length of the run.
fn seal_records(session: &mut Session, bytes: &mut [u8], payload: usize) -> Result<usize, crate::tls::record::RecordError> {
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

/// Takes `sent` bytes off the front of a part list.
fn drop_front(parts: &mut Vec<(u32, u32)>, sent: usize) {
    let mut left = u32::try_from(sent).unwrap_or(u32::MAX);
    let whole = parts
        .iter()
        .take_while(|(_, len)| {
            let fits = *len <= left;
            if fits {
                left -= len;
            }
            fits
        })
        .count();
    parts.drain(..whole);
    if let Some((start, len)) = parts.first_mut() {
        *start += left;
        *len -= left;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn dropping_the_front_keeps_the_rest(lens in proptest::collection::vec(1_u32..100, 1..20), cut in 0_usize..2_000) {
            let mut start = 0;
            let mut parts: Vec<(u32, u32)> = lens.iter().map(|len| { start += 1_000; (start, *len) }).collect();
            let bytes = |parts: &[(u32, u32)]| parts.iter().flat_map(|(start, len)| *start..start + len).collect::<Vec<_>>();
            let all = bytes(&parts);
            let cut = cut.min(all.len());
            drop_front(&mut parts, cut);
            prop_assert_eq!(bytes(&parts), &all[cut..]);
        }
    }
}
