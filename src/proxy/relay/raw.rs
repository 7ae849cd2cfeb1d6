//! Either direction of a connection on which this process speaks no TLS: what one leg says goes to the other as it is.
//!
//! Invariant: only a connection that was routed so is relayed like this; one with a session never is. An end is passed on as FIN,
//! a reset as a reset, and bytes lie where the kernel put them until they are sent.

use super::{Hold, State, other, side};
use crate::buffer::{Class, HEADROOM_BYTES, RECORD_ROOM_BYTES, SLACK_BYTES};
use crate::proxy::close::CloseReason;
use crate::proxy::connection::{Connection, Io, MESH, Next, PLAIN};
use crate::ring::{Completion, Errno, Op, Push, Ring};
use crate::tls::record::PAYLOAD_BYTES_MAX;

impl Connection {
    /// Begins with what was read to find the route, if anything was.
    pub(super) fn start_raw<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if self.flows[PLAIN].end > self.flows[PLAIN].start {
            self.count(io, PLAIN, (self.flows[PLAIN].end - self.flows[PLAIN].start) as u64);
            self.send_raw(io, PLAIN);
        } else {
            self.receive_raw(io, PLAIN);
        }
        self.receive_raw(io, MESH)
    }

    fn receive_raw<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let (socket, token) = self.begin(Op::Receive, from);
        let poll_first = !self.legs[from].nonempty;
        let now = io.now;
        let flow = &mut self.flows[from];
        flow.state = State::Receiving;
        flow.waiting_since = Some(now);
        flow.start = 0;
        flow.end = 0;
        if !flow.hold_region(io.ring, io.pool) {
            flow.release(io.ring, io.pool);
            flow.asked = PAYLOAD_BYTES_MAX;
            io.ring.receive_shared(socket, PAYLOAD_BYTES_MAX, poll_first, token);
            return Next::Wait;
        }
        let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
        // The slack is for records; left alone, its pages never become real.
        let span = io.pool.span(lease, 0, lease.class().bytes() - SLACK_BYTES);
        flow.asked = span.len();
        io.ring.receive(socket, &[span], poll_first, token);
        Next::Wait
    }

    pub(super) fn raw_received<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize, completion: Completion) -> Next {
        let flow = &mut self.flows[from];
        flow.state = State::Idle;
        if let Some(buffer) = completion.buffer {
            flow.hold = Hold::Shared(buffer);
        }
        match completion.outcome() {
            Ok(0) => {
                flow.release(io.ring, io.pool);
                flow.state = State::Finished;
                if let Some(socket) = self.legs[other(from)].socket {
                    io.ring.shutdown_write(socket);
                }
                self.finish_if_both_ended(io)
            }
            Ok(received) => {
                flow.learn(received as usize);
                flow.start = match flow.hold {
                    Hold::Own(ref lease) if lease.class() != Class::Slot => 0,
                    Hold::None | Hold::Shared(_) | Hold::Own(_) => HEADROOM_BYTES,
                };
                flow.end = flow.start + received as usize;
                self.count(io, from, u64::from(received));
                self.send_raw(io, from)
            }
            Err(Errno(libc::ENOBUFS)) => self.receive_raw_directly(io, from),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => self.receive_raw(io, from),
            Err(errno) => self.broken(io, side(from), errno),
        }
    }

    /// The shared buffers are all out: receives into a slot of the flow's own.
    fn receive_raw_directly<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        io.worker.buffer_ring_empty.add(1);
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        let span = io.pool.span(&lease, HEADROOM_BYTES, RECORD_ROOM_BYTES - HEADROOM_BYTES);
        let now = io.now;
        let flow = &mut self.flows[from];
        flow.hold = Hold::Own(lease);
        flow.asked = PAYLOAD_BYTES_MAX;
        flow.state = State::Receiving;
        flow.waiting_since = Some(now);
        let (socket, token) = self.begin(Op::Receive, from);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    fn send_raw<R: Ring>(&mut self, io: &mut Io<'_, R>, from: usize) -> Next {
        let (socket, token) = self.begin(Op::Send, other(from));
        let flow = &mut self.flows[from];
        flow.state = State::Sending;
        let (start, len) = (flow.start, flow.end - flow.start);
        let Some(lease) = flow.lease(io.ring) else { return Next::Wait };
        let span = io.pool.span(lease, start, len);
        io.ring.send(socket, &[span], Push::Now, token);
        Next::Wait
    }

    /// A send on `leg` is done: of the flow that began on the other.
    pub(super) fn raw_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize, completion: Completion) -> Next {
        let sent = match completion.outcome() {
            Ok(sent) => sent as usize,
            Err(Errno(libc::EINTR | libc::EAGAIN)) => 0,
            Err(errno) => return self.broken(io, side(leg), errno),
        };
        let from = other(leg);
        let flow = &mut self.flows[from];
        flow.start += sent;
        if flow.start < flow.end { self.send_raw(io, from) } else { self.receive_raw(io, from) }
    }
}
