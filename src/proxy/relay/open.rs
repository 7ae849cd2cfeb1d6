//! From a leg that speaks TLS: receive into one region, open each record where it lies, send the payloads from between headers
//! and tags; where the other leg speaks TLS too they are sealed again first (`reseal`).

use super::{ALERT_RECORD_OVERFLOW, Hold, State, other, side, with_spans};
use crate::buffer::{Class, HEADROOM_BYTES, RECORD_ROOM_BYTES, SLACK_BYTES};
use crate::proxy::close::{self, CloseReason};
use crate::proxy::connection::{Connection, Io, MESH, Next, Stage};
use crate::ring::{Completion, Errno, Op, PARTS_MAX, Push, Ring};
use crate::tls::record::PAYLOAD_BYTES_MAX;
use crate::tls::{Open, alert};

impl Connection {
    pub(super) fn open_receive<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let record = match &self.sessions[from] {
            Some(session) => session.header_len() + PAYLOAD_BYTES_MAX + session.trailer_len(),
            None => return Next::Wait,
        };
        let poll_first = !self.legs[from].nonempty;
        let (socket, token) = self.begin(Op::Receive, from);
        // A header that is longer than the one that came needs room before the first record.
        let base = if self.sessions[other(from)].is_some() { HEADROOM_BYTES } else { 0 };
        let flow = &mut self.flows[from];
        flow.state = State::Receiving;
        flow.waiting_since = Some(io.now);
        if flow.end > flow.start {
            let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
            // Up to the slack anything may come; within it only the rest of the record that has begun.
            let upto = (lease.class().bytes() - SLACK_BYTES).max(flow.start + flow.need);
            let span = io.pool.span(lease, flow.end, upto - flow.end);
            flow.asked = span.len();
            io.ring.receive(socket, &[span], poll_first, token);
            return Next::Wait;
        }
        if !flow.hold_region(io.ring, io.pool) {
            flow.release(io.ring, io.pool);
            flow.asked = record;
            flow.start = HEADROOM_BYTES;
            flow.end = HEADROOM_BYTES;
            io.ring.receive_shared(socket, record, poll_first, token);
            return Next::Wait;
        }
        flow.start = base;
        flow.end = base;
        let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
        // A whole number of full records: a stream of these never leaves a partial one at the end.
        let len = (lease.class().bytes() - SLACK_BYTES - base) / record * record;
        let span = io.pool.span(lease, base, len);
        flow.asked = len;
        io.ring.receive(socket, &[span], poll_first, token);
        Next::Wait
    }

    pub(super) fn open_received<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize, completion: Completion) -> Next {
        let flow = &mut self.flows[from];
        flow.state = State::Idle;
        if let Some(buffer) = completion.buffer {
            flow.hold = Hold::Shared(buffer);
        }
        match completion.outcome() {
            Ok(0) if from == MESH => self.close(io, CloseReason::Truncated, true),
            Ok(0) if flow.has_kept() => self.outsider_broke_off(io, "it closed within a record"),
            Ok(0) => {
                flow.ended = true;
                self.open_continue(io, from)
            }
            Ok(received) => {
                flow.learn(received as usize);
                flow.end += received as usize;
                self.open_records(io, from)
            }
            Err(Errno(libc::ENOBUFS)) => self.open_receive_directly(io, from),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => self.open_receive(io, from),
            Err(errno) => self.broken(io, side(from), errno),
        }
    }

    fn open_receive_directly<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        io.worker.buffer_ring_empty.add(1);
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        let span = io.pool.span(&lease, HEADROOM_BYTES, RECORD_ROOM_BYTES - HEADROOM_BYTES);
        let flow = &mut self.flows[from];
        flow.hold = Hold::Own(lease);
        flow.start = HEADROOM_BYTES;
        flow.end = HEADROOM_BYTES;
        flow.asked = span.len();
        flow.state = State::Receiving;
        let (socket, token) = self.begin(Op::Receive, from);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    /// Opens every whole record that is there and sends the payloads from where they lie.
    pub(super) fn open_records<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let parts_max = self.parts_max(from);
        let mut payload_bytes = 0_u64;
        self.flows[from].parts.clear();
        while self.flows[from].parts.len() < parts_max && self.flows[from].has_kept() {
            let flow = &mut self.flows[from];
            let Some(session) = self.sessions[from].as_mut() else { return Next::Wait };
            let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
            let base = flow.start;
            let bytes = &mut io.pool.bytes(lease)[base..flow.end];
            match session.open(bytes) {
                Ok(Open::Data { record_len, payload }) => {
                    if !payload.is_empty() {
                        payload_bytes += payload.len() as u64;
                        flow.parts.push(((base + payload.start) as u32, payload.len() as u32));
                    }
                    flow.start += record_len;
                }
                Ok(Open::Control { record_len }) => flow.start += record_len,
                Ok(Open::CloseNotify { .. }) => {
                    // What follows close_notify is not ours to read (RFC 8446 6.1).
                    flow.ended = true;
                    flow.start = flow.end;
                }
                Ok(Open::Incomplete { need }) if need <= SLACK_BYTES => {
                    flow.need = need;
                    break;
                }
                Ok(Open::Incomplete { .. }) => {
                    return self.break_off(io, from, ALERT_RECORD_OVERFLOW, "a record is longer than any suite makes it");
                }
                Ok(Open::Alert { code }) => return self.alerted(io, from, code),
                Err(error) => return self.break_off(io, from, error.alert, error.what),
            }
        }
        self.count(io, from, payload_bytes);
        let answered = self.answer_key_update(io, from);
        if self.stage != Stage::Relay {
            return answered;
        }
        match (self.flows[from].parts.is_empty(), &self.sessions[other(from)]) {
            (true, _) => self.open_continue(io, from),
            (false, None) => self.send_parts(io, from),
            (false, Some(_)) => self.reseal(io, from),
        }
    }

    /// What came on `from` is no TLS that may be: a mesh peer is told with `alert`.
    fn break_off<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize, alert: u8, what: &'static str) -> Next {
        if from == MESH {
            self.facts.detail = Some(what.into());
            return self.refuse(io, alert, CloseReason::ProtocolError);
        }
        self.outsider_broke_off(io, what)
    }

    fn outsider_broke_off<R: Ring>(&mut self, io: &mut Io<'_, R>, what: &str) -> Next {
        self.tell_of_outsider(what);
        self.close(io, CloseReason::LocalReset, true)
    }

    fn alerted<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize, code: u8) -> Next {
        let told = format!("sent alert {} ({code})", alert::name(code));
        if from == MESH {
            self.facts.detail = Some(format!("the peer {told}").into());
            return self.close(io, close::alert(code).unwrap_or(CloseReason::PeerReset), true);
        }
        self.outsider_broke_off(io, &format!("it {told}"))
    }

    pub(super) fn send_parts<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let (socket, token) = self.begin(Op::Send, other(from));
        let flow = &mut self.flows[from];
        flow.state = State::Sending;
        let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
        let mut spans = [None; PARTS_MAX];
        for (span, &(start, len)) in spans.iter_mut().zip(&flow.parts) {
            *span = Some(io.pool.span(lease, start as usize, len as usize));
        }
        with_spans(&spans, |spans| io.ring.send(socket, spans, Push::Now, token));
        Next::Wait
    }

    pub(super) fn parts_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize, completion: Completion) -> Next {
        let sent = match completion.outcome() {
            Ok(sent) => sent as usize,
            Err(Errno(libc::EINTR | libc::EAGAIN)) => 0,
            Err(errno) => return self.broken(io, side(other(from)), errno),
        };
        drop_front(&mut self.flows[from].parts, sent);
        if !self.flows[from].parts.is_empty() {
            return self.send_parts(io, from);
        }
        self.uncover(io, from);
        self.flows[from].state = State::Idle;
        if self.flows[from].has_kept() { self.open_records(io, from) } else { self.open_continue(io, from) }
    }

    fn open_continue<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let flow = &mut self.flows[from];
        if !flow.ended {
            return self.open_receive(io, from);
        }
        flow.release(io.ring, io.pool);
        if self.sessions[other(from)].is_some() {
            return self.send_close_notify(io, other(from));
        }
        flow.state = State::Finished;
        if let Some(socket) = self.legs[other(from)].socket {
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
