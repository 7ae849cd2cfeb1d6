//! One of a connection's two sockets, and what is pending on it.
//!
//! Invariant: at most one operation of a kind is pending on a leg; it is quiet when none is, and only then may it be closed.

use crate::ring::{Op, Socket};

/// The two legs of a connection.
pub(super) const PLAIN: usize = 0;
pub(super) const MESH: usize = 1;

/// What is pending on a leg.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pending(u8);

impl Pending {
    fn bit(op: Op) -> u8 {
        match op {
            Op::Connect => 1,
            Op::Receive => 2,
            Op::Send => 4,
            Op::Cancel => 8,
            Op::Accept | Op::AcceptCancel | Op::Wake | Op::Close => 0,
        }
    }
}

/// One socket of a connection.
#[derive(Debug, Default)]
pub(super) struct Leg {
    pub(super) socket: Option<Socket>,
    pending: Pending,
    /// The last receive left bytes in the socket.
    pub(super) nonempty: bool,
}

impl Leg {
    pub(super) fn is_pending(&self, op: Op) -> bool {
        self.pending.0 & Pending::bit(op) != 0
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.pending == Pending::default()
    }

    pub(super) fn begin(&mut self, op: Op) {
        assert!(!self.is_pending(op), "one {op:?} at a time on a leg");
        self.pending.0 |= Pending::bit(op);
    }

    pub(super) fn end(&mut self, op: Op) {
        self.pending.0 &= !Pending::bit(op);
    }
}
