//! The first bytes of a connection, read to find its route: they wait in the sealing flow until their way is open.
//!
//! Invariant: they lie in a lease of the flow's own, where a record's header still fits before them, so that either relay and
//! either end of TLS can go on with them.

use super::{Flow, Hold};
use crate::buffer::{Class, HEADROOM_BYTES, Lease, Pool};
use crate::ring::Ring;
use crate::tls::hello::HELLO_BYTES_MAX;

impl Flow {
    /// The lease of what is kept, and where it ends there. It begins at [`HEADROOM_BYTES`].
    pub(in crate::proxy) fn kept(&self) -> Option<(&Lease, usize)> {
        match &self.hold {
            Hold::Own(lease) => Some((lease, self.end)),
            Hold::None | Hold::Shared(_) => None,
        }
    }

    /// Whether anything is.
    pub(in crate::proxy) fn has_kept(&self) -> bool {
        self.end > self.start
    }

    /// Keeps what comes in this lease from now on.
    pub(in crate::proxy) fn keep_in(&mut self, lease: Lease) {
        self.hold = Hold::Own(lease);
        self.start = HEADROOM_BYTES;
        self.end = HEADROOM_BYTES;
    }

    /// That much more came into the lease.
    pub(in crate::proxy) fn keep_more(&mut self, received: usize) {
        self.end += received;
    }

    /// Copies the first receive out of its shared buffer; false when there is no lease for it.
    pub(in crate::proxy) fn keep_copy<R: Ring>(&mut self, ring: &R, pool: &mut Pool, buffer: u16, received: usize) -> bool {
        let Some(lease) = pool.lease(Class::Slot) else { return false };
        let (own, shared) = pool.bytes_of_two(&lease, ring.shared(buffer));
        let upto = HEADROOM_BYTES + received.min(HELLO_BYTES_MAX);
        own[HEADROOM_BYTES..upto].copy_from_slice(&shared[HEADROOM_BYTES..upto]);
        self.keep_in(lease);
        self.end = upto;
        true
    }

    /// What is kept, moved to the front of its lease for a handshake, and how much it is.
    pub(in crate::proxy) fn take_kept(&mut self, pool: &mut Pool) -> Option<(Lease, usize)> {
        let Hold::Own(lease) = std::mem::replace(&mut self.hold, Hold::None) else { return None };
        pool.bytes(&lease).copy_within(self.start..self.end, 0);
        let len = self.end - self.start;
        (self.start, self.end) = (0, 0);
        Some((lease, len))
    }
}
