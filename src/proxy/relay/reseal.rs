//! Between two legs that both speak TLS: what was opened is sealed for the other leg where it lies, and sent as records.
//!
//! Each version and suite frames a record a little differently, so a record may need more room before its payload or behind it
//! than it came with. Invariant: no byte that is still to be opened is lost to that. Where the new frames do not fit between
//! the payloads, one record is opened, sealed and sent at a time, and reaches only over what was sent before; a trailer reaches
//! at most one byte further than the one that came, and that byte is put back when it is sent.

use super::{State, other};
use crate::buffer::HEADROOM_BYTES;
use crate::proxy::close::CloseReason;
use crate::proxy::connection::{Connection, Io, Next};
use crate::ring::{Op, PARTS_MAX, Ring};
use crate::tls::Session;

impl Connection {
    /// Most payloads from `from` that may be opened before they are sent.
    pub(super) fn parts_max(&self, from: usize) -> usize {
        let frame = |session: &Session| session.header_len() + session.trailer_len();
        match (&self.sessions[from], &self.sessions[other(from)]) {
            (Some(came), Some(goes)) if frame(goes) > frame(came) => 1,
            _ => PARTS_MAX,
        }
    }

    /// What came behind a handshake lies at the front of its lease, where a longer header has no room before it.
    pub(super) fn make_headroom<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) {
        let flow = &mut self.flows[from];
        if self.sessions[other(from)].is_none() || flow.start >= HEADROOM_BYTES {
            return;
        }
        let Some(lease) = flow.lease(io.ring) else { return };
        let len = flow.end - flow.start;
        // At most a record's room, and a lease has that twice.
        io.pool.bytes(lease).copy_within(flow.start..flow.end, HEADROOM_BYTES);
        io.worker.payload_bytes_moved.add(len as u64);
        (flow.start, flow.end) = (HEADROOM_BYTES, HEADROOM_BYTES + len);
    }

    /// Seals the opened payloads and sends them, a KeyUpdate first where one is due.
    pub(super) fn reseal<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let to = other(from);
        let busy = self.legs[to].is_pending(Op::Send);
        let flow = &mut self.flows[from];
        let Some(session) = self.sessions[to].as_mut() else { return Next::Wait };
        if busy || session.wants_control() {
            flow.deferred = flow.parts.len();
            flow.state = State::Sending;
            return if busy { Next::Wait } else { self.send_key_update(io, to) };
        }
        let (header, trailer) = (session.header_len(), session.trailer_len());
        let mut records = std::mem::take(&mut flow.parts);
        let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
        let bytes = io.pool.bytes(lease);
        let mut sealed = Ok(());
        for (start, len) in &mut records {
            let (first, end) = (*start as usize - header, *start as usize + *len as usize + trailer);
            if end > flow.start {
                flow.covered = Some(bytes[flow.start]);
            }
            sealed = sealed.and_then(|()| session.seal(&mut bytes[first..end]));
            (*start, *len) = (first as u32, (end - first) as u32);
        }
        records.dedup_by(|next, run| {
            let adjoins = run.0 + run.1 == next.0;
            run.1 += if adjoins { next.1 } else { 0 };
            adjoins
        });
        flow.parts = records;
        match sealed {
            Ok(()) => self.send_parts(io, from),
            Err(error) => {
                self.facts.detail = Some(error.what.into());
                self.close(io, CloseReason::ProtocolError, true)
            }
        }
    }

    /// Puts back what a trailer lay on.
    pub(super) fn uncover<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) {
        let flow = &mut self.flows[from];
        let Some(byte) = flow.covered.take() else { return };
        if let Some(lease) = flow.lease(io.ring) {
            io.pool.bytes(lease)[flow.start] = byte;
        }
    }
}
