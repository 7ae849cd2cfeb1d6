//! Records that carry no payload, on either leg that speaks TLS: KeyUpdate, and close_notify with the FIN behind it.
//!
//! Invariant: a leg sends one thing at a time, and data that a KeyUpdate must precede waits for it (`Flow::deferred`).
//! Nothing is sealed behind close_notify.

use super::{State, other, side};
use crate::buffer::{Class, Lease};
use crate::proxy::close::CloseReason;
use crate::proxy::connection::{Connection, Control, Io, Next};
use crate::ring::{Completion, Op, Push, Ring};
use crate::tls::Session;
use crate::tls::record::RecordError;

impl Connection {
    pub(super) fn send_key_update<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize) -> Next {
        self.send_control(io, leg, Control::KeyUpdate, |session, out| session.seal_control(out))
    }

    /// Tells the peer on `leg` that what came for it has ended.
    pub(super) fn send_close_notify<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize) -> Next {
        self.flows[other(leg)].state = State::Sending;
        if self.legs[leg].is_pending(Op::Send) {
            // A control record is on its way; `after_key_update` comes back here.
            return Next::Wait;
        }
        self.send_control(io, leg, Control::CloseNotify, |session, out| session.seal_alert(0, out))
    }

    /// A KeyUpdate that the peer asked for goes out at once when nothing else is being sent to it; else whatever is sent next
    /// sees to it.
    pub(super) fn answer_key_update<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize) -> Next {
        let wanted = self.sessions[leg].as_ref().is_some_and(|session| session.wants_control());
        if wanted && !self.flows[other(leg)].ended && !self.legs[leg].is_pending(Op::Send) {
            return self.send_key_update(io, leg);
        }
        Next::Wait
    }

    pub(super) fn control_sent<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize, completion: Completion) -> Next {
        let from = other(leg);
        let closing = matches!(self.controls[leg], Control::CloseNotify(_));
        match completion.outcome() {
            Ok(_) => {}
            // Only our own close_notify was lost on a peer that had said it is done: what it sent is still delivered.
            Err(_) if closing && self.flows.iter().all(|flow| flow.ended) => {
                self.controls[leg].release(io.pool);
                self.flows[from].state = State::Finished;
                return self.finish_if_both_ended(io);
            }
            Err(errno) => return self.broken(io, side(leg), errno),
        }
        self.controls[leg].release(io.pool);
        if !closing {
            return self.after_key_update(io, leg);
        }
        if let Some(socket) = self.legs[leg].socket {
            io.ring.shutdown_write(socket);
        }
        self.flows[from].state = State::Finished;
        self.finish_if_both_ended(io)
    }

    fn after_key_update<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize) -> Next {
        let from = other(leg);
        let resealed = self.sessions[from].is_some();
        match std::mem::take(&mut self.flows[from].deferred) {
            0 if self.flows[from].ended => self.send_close_notify(io, leg),
            // Sealed data was all out, and the KeyUpdate came before the next receive.
            0 if !resealed && self.flows[from].state == State::Idle => self.seal_receive(io),
            0 => Next::Wait,
            _ if resealed => self.reseal(io, from),
            deferred => self.seal_run(io, deferred),
        }
    }

    fn send_control<R: Ring>(
        &mut self,
        io: &mut Io<'_, R>,
        leg: usize,
        kind: fn(Lease) -> Control,
        seal: fn(&mut Session, &mut [u8]) -> Result<usize, RecordError>,
    ) -> Next {
        let Some(session) = self.sessions[leg].as_mut() else { return Next::Wait };
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, CloseReason::OutOfBuffers, true) };
        match seal(session, io.pool.bytes(&lease)) {
            Ok(len) => {
                let span = io.pool.span(&lease, 0, len);
                self.controls[leg] = kind(lease);
                // The FIN that follows takes a close_notify along.
                let push = if matches!(self.controls[leg], Control::CloseNotify(_)) { Push::WithNext } else { Push::Now };
                let (socket, token) = self.begin(Op::Send, leg);
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
