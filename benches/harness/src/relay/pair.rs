//! One relayed connection of the io_uring relay, as a state machine without I/O: two sockets, two directions.
//!
//! Invariant: a direction has one buffer and one operation, either a receive into it or a send out of it; that is the back-pressure.
//! Must not know the ring.

use socket2::Socket;

/// Buffer of a direction at first: an idle connection costs two of them.
const BUFFER_BYTES_MIN: usize = 4 * 1024;
/// What a buffer may grow to. It doubles whenever a receive fills it and does not shrink again.
const BUFFER_BYTES_MAX: usize = 256 * 1024;

/// A side of the pair; direction `n` receives from side `n` and sends to the other.
pub(crate) const NEAR: usize = 0;
/// See [`NEAR`].
pub(crate) const FAR: usize = 1;

/// One accepted connection and the one dialed for it.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) sockets: [Socket; 2],
    pub(crate) flows: [Flow; 2],
    /// Operations whose completion has not come. The slot lives until there are none.
    pub(crate) in_flight: u32,
    /// Something failed: both sockets are to be reset.
    pub(crate) is_broken: bool,
}

/// One direction.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) buffer: Vec<u8>,
    filled: usize,
    sent: usize,
    /// Whether the socket held more when the last receive came back.
    pub(crate) has_more: bool,
    is_over: bool,
}

impl Pair {
    pub(crate) fn new(near: Socket, far: Socket) -> Self {
        Self { sockets: [near, far], flows: [Flow::new(), Flow::new()], in_flight: 0, is_broken: false }
    }

    /// Nothing is left to do but to close.
    pub(crate) fn is_over(&self) -> bool {
        self.in_flight == 0 && (self.is_broken || self.flows.iter().all(|flow| flow.is_over))
    }
}

impl Flow {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES_MIN], filled: 0, sent: 0, has_more: false, is_over: false }
    }

    /// `len` bytes came, or the end of the stream if 0.
    pub(crate) fn received(&mut self, len: usize, has_more: bool) {
        (self.filled, self.sent, self.has_more, self.is_over) = (len, 0, has_more, len == 0);
    }

    /// `len` bytes went out. True if all did and the buffer is free.
    pub(crate) fn sent(&mut self, len: usize) -> bool {
        self.sent += len;
        if self.sent < self.filled {
            return false;
        }
        if self.filled == self.buffer.len() && self.filled < BUFFER_BYTES_MAX {
            self.buffer = vec![0; self.buffer.len() * 2];
        }
        true
    }

    /// What is still to be sent.
    pub(crate) fn unsent(&self) -> &[u8] {
        &self.buffer[self.sent..self.filled]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_send_leaves_the_rest() {
        let mut flow = Flow::new();
        flow.received(10, false);
        assert!(!flow.sent(4));
        assert_eq!(flow.unsent().len(), 6);
        assert!(flow.sent(6));
        assert!(flow.unsent().is_empty());
    }

    #[test]
    fn a_buffer_grows_only_when_filled_and_only_to_its_bound() {
        let mut flow = Flow::new();
        flow.received(BUFFER_BYTES_MIN - 1, true);
        assert!(flow.sent(BUFFER_BYTES_MIN - 1));
        assert_eq!(flow.buffer.len(), BUFFER_BYTES_MIN);
        for _ in 0..20 {
            let len = flow.buffer.len();
            flow.received(len, true);
            assert!(flow.sent(len));
        }
        assert_eq!(flow.buffer.len(), BUFFER_BYTES_MAX);
    }
}
