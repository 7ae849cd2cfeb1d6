//! io_uring as the data plane sees it: operations go in with a token, completions come out with it.
//!
//! Invariant: a completion belongs to exactly one operation, by a token that carries the connection's generation; what the
//! kernel may still touch (sockets, leases) is kept by the caller until the completion came. Operations are only queued
//! here; [`Ring::turn`] is the one place that enters the kernel, once for any number of them.
//!
//! [`uring`] is the kernel; [`sim`] is a deterministic one with seeded faults, for tests. Knows no TLS and no Consul.

pub mod probe;
#[cfg(any(test, feature = "testing"))]
pub mod sim;
pub mod uring;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use probe::{Probe, probe};

use crate::buffer::{Lease, Span};
use crate::config::Keepalive;
use crate::sys::SocketOwner;

/// Entries of the buffer ring that idle sockets receive into. The kernel gets them as they are needed.
pub const SHARED_BUFFERS: u16 = 256;

/// A socket as its ring knows it. Plain and copyable: ownership lies with the state machine that opened or accepted it,
/// which gives it back with [`Ring::close`] exactly once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Socket(pub(crate) i32);

/// What an operation was, within its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Multishot accept of a listener.
    Accept = 1,
    /// Cancel of a listener's accept.
    AcceptCancel,
    /// The wake-up descriptor.
    Wake,
    /// Connect on a leg.
    Connect,
    /// Receive on a leg.
    Receive,
    /// Send on a leg.
    Send,
    /// Cancel of all that is pending on a leg.
    Cancel,
    /// Close of a descriptor; reported only when it fails.
    Close,
}

/// Names an operation: kind(7) | leg(1) | slot(24) | generation(32).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u64);

impl Token {
    /// Slots that a token can name.
    pub const SLOTS_MAX: u32 = 1 << 24;

    /// A token for `op` on `leg` (0 or 1) of the owner in `slot` with `generation`.
    ///
    /// # Panics
    /// When `slot` does not fit: the limits in `proxy::limits` keep it below.
    pub fn new(op: Op, leg: u8, slot: u32, generation: u32) -> Self {
        assert!(slot < Self::SLOTS_MAX && leg < 2, "token out of range");
        Self((u64::from(op as u8) << 57) | (u64::from(leg) << 56) | (u64::from(slot) << 32) | u64::from(generation))
    }

    /// What it was.
    pub fn op(self) -> Option<Op> {
        Some(match self.0 >> 57 {
            1 => Op::Accept,
            2 => Op::AcceptCancel,
            3 => Op::Wake,
            4 => Op::Connect,
            5 => Op::Receive,
            6 => Op::Send,
            7 => Op::Cancel,
            8 => Op::Close,
            _ => return None,
        })
    }

    /// Which leg.
    pub fn leg(self) -> u8 {
        u8::from(self.0 & (1 << 56) != 0)
    }

    /// Whose slot.
    pub fn slot(self) -> u32 {
        ((self.0 >> 32) & 0x00ff_ffff) as u32
    }

    /// Which life of that slot.
    pub fn generation(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }
}

/// When sent bytes go on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Push {
    /// At once.
    Now,
    /// Together with what follows on the socket, data or FIN; alone after a moment (200 ms on Linux) if nothing does.
    WithNext,
}

/// What came of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    /// Which.
    pub token: Token,
    /// Bytes, a descriptor, or a negative errno.
    pub result: i32,
    /// The shared buffer that was filled.
    pub buffer: Option<u16>,
    /// More completions of this operation will come.
    pub more: bool,
    /// The socket had more to read when this receive ended.
    pub nonempty: bool,
}

impl Completion {
    /// The result as a count or an error.
    pub fn outcome(&self) -> Result<u32, Errno> {
        u32::try_from(self.result).map_err(|_| Errno(-self.result))
    }
}

/// An errno that stays a number on the hot path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

/// Where to connect.
#[derive(Debug, Clone)]
pub enum Remote {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

/// Where to listen.
#[derive(Debug, Clone)]
pub enum Local {
    /// A TCP address, shared between workers; `exclusive` proves first that no other process has it.
    Tcp {
        /// The address.
        address: SocketAddr,
        /// See [`crate::sys::listen_tcp`].
        exclusive: bool,
    },
    /// A TCP port on every IPv4 loopback address, shared between workers.
    Loopback {
        /// The port.
        port: u16,
        /// See [`crate::sys::listen_tcp`].
        exclusive: bool,
    },
    /// A unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Permission bits.
        mode: Option<u32>,
    },
}

/// Why a ring could not be set up or driven.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel lacks what the data plane needs.
    #[error("{0}")]
    Unsupported(String),
    /// A call failed.
    #[error("{call}: {source}. {remedy}")]
    Call {
        /// The call.
        call: &'static str,
        /// The system's reason.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
}

/// The kernel, or something that behaves like it. All calls but [`Ring::turn`] only queue or take well under a microsecond.
pub trait Ring {
    /// Opens a listening socket.
    fn listen(&mut self, local: &Local) -> io::Result<Socket>;
    /// Opens an unconnected stream socket for `remote`, with a keepalive of its own where that is said.
    fn open(&mut self, remote: &Remote, keepalive: Option<Keepalive>) -> io::Result<Socket>;
    /// The remote address of a connected TCP socket.
    fn peer_address(&mut self, socket: Socket) -> Option<SocketAddr>;
    /// Which of this host's addresses an accepted connection came in at.
    fn local_address(&mut self, socket: Socket) -> Option<SocketAddr>;
    /// Bytes that the other end of a TCP connection has acknowledged.
    fn acknowledged(&mut self, socket: Socket) -> Option<u64>;
    /// Where the client of a redirected connection wanted to go; `None` for any other.
    fn original_destination(&mut self, socket: Socket) -> Option<SocketAddr>;
    /// Who has the other end of an accepted local connection, which went to `original` if it was redirected. One netlink
    /// question, a few microseconds.
    fn owner(&mut self, socket: Socket, original: Option<SocketAddr>) -> Option<SocketOwner>;

    /// Accepts until cancelled or failed; each connection is a completion with `more`.
    fn accept(&mut self, listener: Socket, token: Token);
    /// Connects.
    fn connect(&mut self, socket: Socket, remote: &Remote, token: Token);
    /// Receives at most `len_max` bytes into a shared buffer, at [`crate::buffer::HEADROOM_BYTES`] of its lease. With `poll_first` the
    /// kernel waits for readiness before it tries.
    fn receive_shared(&mut self, socket: Socket, len_max: usize, poll_first: bool, token: Token);
    /// Receives into `parts` in order, at most [`PARTS_MAX`].
    fn receive(&mut self, socket: Socket, parts: &[Span], poll_first: bool, token: Token);
    /// Sends all of `parts` in order, at most [`PARTS_MAX`]. A shorter result means that the connection failed on the way.
    fn send(&mut self, socket: Socket, parts: &[Span], push: Push, token: Token);
    /// Cancels everything pending on `socket`. What is cancelled completes with `ECANCELED`, the cancel itself too.
    fn cancel(&mut self, socket: Socket, token: Token);
    /// Ends the sending side now. Only when no send is pending.
    fn shutdown_write(&mut self, socket: Socket);
    /// Closes, with RST instead of FIN when `reset`. Only when nothing is pending on it.
    fn close(&mut self, socket: Socket, reset: bool);

    /// Closes a listening socket at once and removes its socket file. Only when no accept is pending on it.
    fn close_listener(&mut self, listener: Socket, file: Option<&Path>);

    /// A connection that waits at one of the sockets that were left for `local` besides the one that listens; one at which
    /// none waits is closed.
    fn accept_left(&mut self, local: &Local) -> Option<Socket>;
    /// Closes what was left by another process and is wanted by no listener.
    fn close_left(&mut self);

    /// The lease behind a shared buffer that a completion named.
    fn shared(&self, buffer: u16) -> &Lease;
    /// Gives a shared buffer back to the kernel.
    fn recycle(&mut self, buffer: u16);

    /// Hands over what is queued and waits for at least one completion, at most `wait` (`None`: as long as it takes).
    fn turn(&mut self, wait: Option<Duration>) -> Result<(), RingError>;
    /// The next completion of the last turn.
    fn next(&mut self) -> Option<Completion>;
    /// The loop's clock: read once a turn.
    fn now(&self) -> Instant;
    /// Calls into the kernel's ring so far.
    fn enters(&self) -> u64;
}

/// Most parts of one receive or send.
pub const PARTS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tokens_carry_everything(op in 1_u8..=8, leg in 0_u8..2, slot in 0_u32..Token::SLOTS_MAX, generation: u32) {
            let op = Token((u64::from(op)) << 57).op().expect("a kind");
            let token = Token::new(op, leg, slot, generation);
            prop_assert_eq!((token.op(), token.leg(), token.slot(), token.generation()), (Some(op), leg, slot, generation));
        }
    }

    #[test]
    fn a_foreign_token_is_no_operation() {
        assert_eq!(Token(0).op(), None);
        assert_eq!(Token(u64::MAX).op(), None);
    }
}
