//! Memory that queued operations point to until their submission is consumed: addresses, message headers, part lists.
//!
//! Why unsafe: the headers hold raw addresses, and are zeroed as C does.
#![allow(unsafe_code, reason = "memory shared with the kernel; one of the three rooms where unsafe may stand")]

use socket2::SockAddr;

use crate::buffer::Span;
use crate::ring::PARTS_MAX;

/// Message headers made at start; a turn with more of them makes more.
const MESSAGES_WARM: usize = 64;

/// Addresses, message headers and part lists of queued operations. Boxes and fixed arrays: growing the outer vectors
/// must not move what the kernel was pointed to.
#[expect(clippy::vec_box, reason = "the kernel holds the address of each until the submission is consumed")]
pub(super) struct Scratch {
    addresses: Vec<Box<SockAddr>>,
    messages: Vec<Box<Message>>,
    messages_used: usize,
}

struct Message {
    header: libc::msghdr,
    parts: [libc::iovec; PARTS_MAX],
}

// SAFETY: the pointers inside lead only into these boxes or into leases of the worker that owns this ring; none is bound
// to a thread.
unsafe impl Send for Scratch {}

impl Default for Scratch {
    fn default() -> Self {
        // SAFETY: all-zero is a valid msghdr and a valid iovec (null with length zero).
        let messages = (0..MESSAGES_WARM).map(|_| Box::new(unsafe { std::mem::zeroed() })).collect();
        Self { addresses: Vec::new(), messages, messages_used: 0 }
    }
}

impl Scratch {
    pub(super) fn address(&mut self, address: SockAddr) -> (*const libc::sockaddr, libc::socklen_t) {
        let address = Box::new(address);
        let place = (address.as_ptr().cast(), address.len());
        self.addresses.push(address);
        place
    }

    pub(super) fn message(&mut self, parts: &[Span]) -> *mut libc::msghdr {
        assert!(parts.len() <= PARTS_MAX, "more parts than a message holds");
        if self.messages_used == self.messages.len() {
            // SAFETY: all-zero is a valid msghdr and a valid iovec (null with length zero).
            self.messages.push(Box::new(unsafe { std::mem::zeroed() }));
        }
        let message = &mut self.messages[self.messages_used];
        self.messages_used += 1;
        for (place, part) in message.parts.iter_mut().zip(parts) {
            *place = libc::iovec { iov_base: part.start.as_ptr().cast(), iov_len: part.len as usize };
        }
        message.header.msg_iov = message.parts.as_mut_ptr();
        message.header.msg_iovlen = parts.len();
        &raw mut message.header
    }

    /// The kernel has consumed every submission. Message boxes are kept for the next turns.
    pub(super) fn clear(&mut self) {
        self.addresses.clear();
        self.messages_used = 0;
    }
}
