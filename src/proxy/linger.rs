//! Refuses a mesh peer whose identity is known: an alert says why, and it gets a moment to read that.
//!
//! Invariant: nothing of it is passed on any more; what it still sends is thrown away, within [`LINGER`].

use super::close::CloseReason;
use super::connection::{Connection, Control, Io, MESH, Next, PLAIN, Stage};
use super::limits::LINGER;
use crate::buffer::Class;
use crate::ring::{Completion, Op, Push, Ring};

impl Connection {
    /// Refuses the peer: `code` as an alert, a moment to read it, then the end.
    pub(super) fn refuse<R: Ring>(&mut self, io: &mut Io<'_, R>, code: u8, reason: CloseReason) -> Next {
        if self.legs[MESH].is_pending(Op::Send) {
            return self.close(io, reason, true);
        }
        let Some(session) = self.sessions[MESH].as_mut() else { return self.close(io, reason, true) };
        let Some(lease) = io.pool.lease(Class::Slot) else { return self.close(io, reason, true) };
        match session.seal_alert(code, io.pool.bytes(&lease)) {
            Ok(len) => {
                self.facts.reason = reason;
                self.stage = Stage::Linger;
                self.deadline = Some(io.now + LINGER);
                let span = io.pool.span(&lease, 0, len);
                self.controls[MESH] = Control::Alert(lease);
                let (socket, token) = self.begin(Op::Send, MESH);
                io.ring.send(socket, &[span], Push::Now, token);
                Next::Wait
            }
            Err(_) => {
                io.pool.give_back(lease);
                self.close(io, reason, true)
            }
        }
    }

    /// A refused peer reads its alert; what it still sends is thrown away until it leaves or time is up.
    pub(super) fn on_linger<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, completion: Completion) -> Next {
        if let Some(buffer) = completion.buffer {
            io.ring.recycle(buffer);
        }
        if usize::from(completion.token.leg()) == PLAIN {
            // What the local side still does does not matter any more; the end cancels it.
            return Next::Wait;
        }
        let reason = self.facts.reason;
        match (op, completion.outcome()) {
            (Op::Send, Ok(_)) => {
                if let Some(socket) = self.legs[MESH].socket {
                    io.ring.shutdown_write(socket);
                }
                self.receive_and_discard(io)
            }
            (Op::Receive, Ok(bytes)) if bytes > 0 && self.legs[MESH].is_pending(Op::Send) => Next::Wait,
            (Op::Receive, Ok(bytes)) if bytes > 0 => self.receive_and_discard(io),
            (Op::Receive, Ok(_)) if self.legs[MESH].is_pending(Op::Send) => Next::Wait,
            (Op::Receive, Ok(_)) => self.close(io, reason, false),
            // Of an idle flow that was about to give its region up.
            (Op::Cancel, _) => Next::Wait,
            _ => self.close(io, reason, true),
        }
    }

    fn receive_and_discard<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if !self.legs[MESH].is_pending(Op::Receive) {
            let (socket, token) = self.begin(Op::Receive, MESH);
            io.ring.receive_shared(socket, usize::MAX, false, token);
        }
        Next::Wait
    }
}
