//! Looks at the first bytes of a connection whose route depends on them, and keeps them to be passed on.
//!
//! Invariant: nothing is answered and nothing is lost: what was read goes on in front of what follows, to the endpoint or to the
//! handshake. Until the first byte comes no buffer is owned, and then never one of the shared ones; time and bytes are bounded.

use std::time::Duration;

use super::close::CloseReason;
use super::connection::{Connection, Io, Next, PLAIN, Stage};
use crate::buffer::{Class, HEADROOM_BYTES};
use crate::ring::{Completion, Errno, Op, Ring};
use crate::tls::hello::{self, HELLO_BYTES_MAX, Hello};

/// What the bound on the first bytes is, and what follows when it is reached.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) timeout: Duration,
    /// Who said nothing at all counts as without TLS.
    pub(super) silent_is_raw: bool,
}

impl Connection {
    /// Waits for the client's first bytes; ends in [`Next::Inspected`].
    pub(super) fn start_inspecting<R: Ring>(&mut self, io: &mut Io<'_, R>, patience: Patience) -> Next {
        self.stage = Stage::Inspect;
        self.deadline = Some(io.now + patience.timeout);
        self.silent_is_raw = patience.silent_is_raw;
        self.receive_first(io)
    }

    fn receive_first<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        let (socket, token) = self.begin(Op::Receive, PLAIN);
        match self.flows[PLAIN].kept() {
            Some((lease, end)) => {
                let span = io.pool.span(lease, end, HEADROOM_BYTES + HELLO_BYTES_MAX - end);
                io.ring.receive(socket, &[span], true, token);
            }
            None => io.ring.receive_shared(socket, HELLO_BYTES_MAX, true, token),
        }
        Next::Wait
    }

    pub(super) fn on_inspect<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, completion: Completion) -> Next {
        if op == Op::Receive {
            match self.take_first(io, completion) {
                Ok(()) => {}
                Err(next) => return next,
            }
        }
        // Time is up and the receive is being cancelled: both have to be back before anything else may begin.
        let timed_out = self.deadline.is_none();
        if !self.legs[PLAIN].is_quiet() {
            return Next::Wait;
        }
        self.look_at_first(io, timed_out)
    }

    /// Keeps what a receive brought.
    fn take_first<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Result<(), Next> {
        match completion.outcome() {
            Ok(0) => {
                if let Some(buffer) = completion.buffer {
                    io.ring.recycle(buffer);
                }
                if !self.flows[PLAIN].has_kept() {
                    return Err(self.close(io, CloseReason::Probe, false));
                }
                self.facts.detail = Some("the client closed within its ClientHello".into());
                Err(self.close(io, CloseReason::HandshakeFailed, true))
            }
            Ok(received) => {
                io.worker.payload_bytes_moved.add(if completion.buffer.is_some() { u64::from(received) } else { 0 });
                let kept = match completion.buffer {
                    Some(buffer) => {
                        let kept = self.flows[PLAIN].keep_copy(io.ring, io.pool, buffer, received as usize);
                        io.ring.recycle(buffer);
                        kept
                    }
                    None => {
                        self.flows[PLAIN].keep_more(received as usize);
                        true
                    }
                };
                if kept { Ok(()) } else { Err(self.close(io, CloseReason::OutOfBuffers, true)) }
            }
            Err(Errno(libc::ENOBUFS)) => {
                io.worker.buffer_ring_empty.add(1);
                match io.pool.lease(Class::Slot) {
                    Some(lease) => {
                        self.flows[PLAIN].keep_in(lease);
                        Ok(())
                    }
                    None => Err(self.close(io, CloseReason::OutOfBuffers, true)),
                }
            }
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => Ok(()),
            Err(errno) => Err(self.broken(io, super::close::Side::Plain, errno)),
        }
    }

    fn look_at_first<R: Ring>(&mut self, io: &mut Io<'_, R>, timed_out: bool) -> Next {
        let first: &[u8] = match self.flows[PLAIN].kept() {
            Some((lease, end)) => &io.pool.bytes(lease)[HEADROOM_BYTES..end],
            None => &[],
        };
        let silent = first.is_empty();
        match hello::read(first) {
            Hello::Whole { server_name } => {
                self.deadline = None;
                self.facts.server_name = server_name;
                Next::Inspected { tls: true }
            }
            Hello::NotTls => {
                self.deadline = None;
                Next::Inspected { tls: false }
            }
            Hello::Incomplete { .. } if timed_out && silent => Next::Inspected { tls: false },
            Hello::Incomplete { .. } if timed_out => self.close(io, CloseReason::HandshakeTimeout, true),
            Hello::Incomplete { .. } => self.receive_first(io),
            Hello::TooLong => {
                self.facts.detail = Some(format!("the ClientHello is longer than {HELLO_BYTES_MAX} bytes").into());
                self.close(io, CloseReason::HandshakeFailed, true)
            }
        }
    }

    /// The time for the first bytes is over.
    pub(super) fn inspected_too_long<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if !self.silent_is_raw || self.flows[PLAIN].has_kept() {
            return self.close(io, CloseReason::HandshakeTimeout, true);
        }
        if self.legs[PLAIN].is_pending(Op::Cancel) {
            return Next::Wait;
        }
        let (socket, token) = self.begin(Op::Cancel, PLAIN);
        io.ring.cancel(socket, token);
        Next::Wait
    }
}
