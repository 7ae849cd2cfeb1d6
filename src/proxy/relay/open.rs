//! Mesh to plain: receive into one region, open each record where it lies, send the payloads from between headers and tags.

use super::{ALERT_RECORD_OVERFLOW, Hold, State, with_spans};
use crate::buffer::{Class, HEADROOM_BYTES, RECORD_ROOM_BYTES, SLACK_BYTES};
use crate::proxy::close::{self, CloseReason, Side};
use crate::proxy::connection::{Connection, Io, MESH, Next, PLAIN, Stage};
use crate::ring::{Completion, Errno, Op, PARTS_MAX, Push, Ring};
use crate::tls::Open;
use crate::tls::record::PAYLOAD_BYTES_MAX;

impl Connection {
    pub(super) fn open_receive<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
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

    pub(super) fn open_received<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
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
    pub(super) fn open_records<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
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
        with_spans(&spans, |spans| io.ring.send(socket, spans, Push::Now, token));
        Next::Wait
    }

    pub(super) fn open_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
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
