//! Turns a denied local client away: tells it why in its own protocol, waits until it has read that, then closes.
//!
//! Invariant: nothing was dialed for it and nothing of it is passed on; the last word is followed by FIN, never by a reset
//! that could overtake it; everything ends within [`REPLY_TIME`].

use super::close::CloseReason;
use super::connection::{Connection, Io, Next, PLAIN, Stage};
use super::limits::REPLY_TIME;
use super::reply::{Reply, Step};
use crate::buffer::{Class, HEADROOM_BYTES, Lease, RECORD_ROOM_BYTES};
use crate::ring::{Completion, Errno, Op, Push, Ring};

/// A reply under way.
pub(super) struct Replying {
    reply: Reply,
    /// The bytes being sent.
    output: Option<Lease>,
    /// Where the client's bytes go, when the shared buffers were all out.
    input: Option<Lease>,
    /// What is being sent, or was, is the last word: the rest of what the client says is thrown away.
    last: bool,
}

impl Connection {
    /// Ends a connection that has no far leg and nothing pending. Without a reply the client is reset.
    pub(super) fn turn_away<R: Ring>(&mut self, io: &mut Io<'_, R>, reason: CloseReason, reply: Option<Reply>) -> Next {
        let Some(reply) = reply else { return self.close(io, reason, true) };
        self.facts.reason = reason;
        self.stage = Stage::Reply;
        self.deadline = Some(io.now + REPLY_TIME);
        let step = reply.begin();
        self.replying = Some(Box::new(Replying { reply, output: None, input: None, last: false }));
        self.step_reply(io, step)
    }

    pub(super) fn on_reply<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, completion: Completion) -> Next {
        match (op, completion.outcome()) {
            (Op::Send, Ok(_)) => self.reply_sent(io),
            (Op::Receive, Ok(received)) if received > 0 => self.reply_received(io, completion, received as usize),
            (Op::Receive, Err(Errno(libc::ENOBUFS))) => self.receive_reply_directly(io),
            // It has read what it wanted, and left.
            (Op::Receive, Ok(_)) => {
                if let Some(buffer) = completion.buffer {
                    io.ring.recycle(buffer);
                }
                self.close(io, self.facts.reason, false)
            }
            _ => self.close(io, self.facts.reason, true),
        }
    }

    fn reply_received<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion, received: usize) -> Next {
        let Some(replying) = &mut self.replying else { return self.close(io, self.facts.reason, true) };
        let own = replying.input.take();
        let lease = own.as_ref().or_else(|| completion.buffer.map(|buffer| io.ring.shared(buffer)));
        let Some(lease) = lease else { return self.close(io, self.facts.reason, true) };
        let step = if replying.last {
            Step::Read
        } else {
            let bytes = io.pool.bytes(lease);
            replying.reply.received(&bytes[HEADROOM_BYTES..HEADROOM_BYTES + received])
        };
        if let Some(lease) = own {
            io.pool.give_back(lease);
        }
        if let Some(buffer) = completion.buffer {
            io.ring.recycle(buffer);
        }
        self.step_reply(io, step)
    }

    /// The shared buffers are all out: whoever is denied is told all the same.
    fn receive_reply_directly<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        io.worker.buffer_ring_empty.add(1);
        let (Some(lease), Some(replying)) = (io.pool.lease(Class::Slot), &mut self.replying) else {
            return self.close(io, self.facts.reason, true);
        };
        let span = io.pool.span(&lease, HEADROOM_BYTES, RECORD_ROOM_BYTES - HEADROOM_BYTES);
        replying.input = Some(lease);
        let (socket, token) = self.begin(Op::Receive, PLAIN);
        io.ring.receive(socket, &[span], false, token);
        Next::Wait
    }

    fn step_reply<R: Ring>(&mut self, io: &mut Io<'_, R>, step: Step) -> Next {
        match step {
            Step::Read => {
                let (socket, token) = self.begin(Op::Receive, PLAIN);
                io.ring.receive_shared(socket, usize::MAX, false, token);
                Next::Wait
            }
            Step::Answer(bytes) => self.send_reply(io, &bytes, false),
            Step::Last(bytes) => self.send_reply(io, &bytes, true),
            Step::End => self.close(io, self.facts.reason, true),
        }
    }

    fn send_reply<R: Ring>(&mut self, io: &mut Io<'_, R>, bytes: &[u8], last: bool) -> Next {
        let (Some(lease), Some(replying)) = (io.pool.lease(Class::Slot), &mut self.replying) else {
            return self.close(io, self.facts.reason, true);
        };
        io.pool.bytes(&lease)[..bytes.len()].copy_from_slice(bytes);
        let span = io.pool.span(&lease, 0, bytes.len());
        replying.output = Some(lease);
        replying.last = last;
        let (socket, token) = self.begin(Op::Send, PLAIN);
        io.ring.send(socket, &[span], Push::Now, token);
        Next::Wait
    }

    fn reply_sent<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.release_reply(io.pool);
        if self.replying.as_ref().is_some_and(|replying| replying.last) {
            self.told = true;
            if let Some(socket) = self.legs[PLAIN].socket {
                io.ring.shutdown_write(socket);
            }
        }
        self.step_reply(io, Step::Read)
    }

    /// Gives the buffers back. Only when nothing under way uses them.
    pub(super) fn release_reply(&mut self, pool: &mut crate::buffer::Pool) {
        let Some(replying) = &mut self.replying else { return };
        [replying.output.take(), replying.input.take()].into_iter().flatten().for_each(|lease| pool.give_back(lease));
    }
}
