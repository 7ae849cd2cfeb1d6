//! A deterministic kernel for tests: several rings and the test's own ends share one [`Network`], and a seed decides what
//! comes short, late, refused or reset.
//!
//! Invariant: what it does is something that Linux may do. Bytes of a stream keep their order; an operation completes once;
//! a cancelled one completes with `ECANCELED` or with what it had just done.
//!
//! Why unsafe: it writes to the same spans that the real kernel would.
#![allow(unsafe_code, reason = "plays the kernel's part on the caller's leases")]

mod network;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

pub use network::{End, Faults, Network, Random};

use super::{Completion, Local, Push, Remote, Ring, RingError, SHARED_BUFFERS, Socket, Token};
use crate::buffer::{Class, HEADROOM_BYTES, Lease, Pool, RECORD_ROOM_BYTES, Span};
use crate::config::Keepalive;
use crate::sys::SocketOwner;

/// One worker's ring on a simulated network.
#[derive(Debug)]
pub struct Sim {
    network: Network,
    pending: Vec<Pending>,
    completions: VecDeque<Completion>,
    leases: Vec<Lease>,
    addresses: Vec<Span>,
    available: VecDeque<u16>,
    now: Instant,
    turns: u64,
}

#[derive(Debug)]
struct Pending {
    token: Token,
    socket: Socket,
    what: What,
}

#[derive(Debug)]
enum What {
    Accept,
    Connect(SocketAddr),
    ReceiveShared { len_max: usize },
    Receive { parts: Vec<Span> },
    Send { bytes: Vec<u8>, sent: usize },
}

impl Sim {
    /// A ring on `network`, with its shared buffers from `pool`.
    ///
    /// # Panics
    /// When the pool is too small for the shared buffers.
    pub fn new(network: &Network, pool: &mut Pool) -> Self {
        let leases: Vec<_> = (0..SHARED_BUFFERS).map(|_| pool.lease(Class::Slot).expect("room for shared buffers")).collect();
        let addresses = leases.iter().map(|lease| pool.span(lease, HEADROOM_BYTES, RECORD_ROOM_BYTES - HEADROOM_BYTES)).collect();
        Self {
            network: network.clone(),
            pending: Vec::new(),
            completions: VecDeque::new(),
            leases,
            addresses,
            available: (0..SHARED_BUFFERS).collect(),
            now: network.now(),
            turns: 0,
        }
    }

    /// Shared buffers that the kernel side holds now: all of them when no connection has one.
    pub fn available_buffers(&self) -> usize {
        self.available.len()
    }

    /// Operations in flight.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    fn queue(&mut self, token: Token, socket: Socket, what: What) {
        self.pending.push(Pending { token, socket, what });
    }

    fn complete(&mut self, token: Token, result: i32) {
        self.completions.push_back(Completion { token, result, buffer: None, more: false, nonempty: false });
    }

    /// Tries one operation; gives it back when it must wait on.
    fn attempt(&mut self, mut pending: Pending) -> Option<Pending> {
        let network = self.network.clone();
        if network.chance(network.faults().late) {
            return Some(pending);
        }
        let token = pending.token;
        match &mut pending.what {
            What::Accept => return self.attempt_accept(pending),
            What::Connect(address) => match network.connect_socket(pending.socket.0, *address) {
                Ok(()) => self.complete(token, 0),
                Err(errno) => self.complete(token, -errno),
            },
            What::ReceiveShared { len_max } => {
                if !network.is_readable(pending.socket.0) {
                    return Some(pending);
                }
                if self.available.is_empty() || network.chance(network.faults().no_buffers) {
                    self.complete(token, -libc::ENOBUFS);
                    return None;
                }
                let buffer = self.available.pop_front()?;
                let span = self.addresses[usize::from(buffer)];
                let len = (*len_max).min(span.len());
                let received = network.receive(pending.socket.0, len);
                self.deliver(token, Some(buffer), &[span], received, network.is_readable(pending.socket.0));
            }
            What::Receive { parts } => {
                if !network.is_readable(pending.socket.0) {
                    return Some(pending);
                }
                let room = parts.iter().map(Span::len).sum();
                let received = network.receive(pending.socket.0, room);
                self.deliver(token, None, parts, received, network.is_readable(pending.socket.0));
            }
            What::Send { bytes, sent } => match network.send(pending.socket.0, &bytes[*sent..]) {
                Ok(more) => {
                    *sent += more;
                    if *sent < bytes.len() {
                        return Some(pending);
                    }
                    let total = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
                    self.complete(token, total);
                }
                Err(errno) => {
                    let result = if *sent > 0 { i32::try_from(*sent).unwrap_or(i32::MAX) } else { -errno };
                    self.complete(token, result);
                }
            },
        }
        None
    }

    fn attempt_accept(&mut self, pending: Pending) -> Option<Pending> {
        let network = self.network.clone();
        if !network.has_waiting(pending.socket.0) {
            return Some(pending);
        }
        if network.chance(network.faults().no_descriptors) {
            self.complete(pending.token, -libc::EMFILE);
            return None;
        }
        let result = network.accept_socket(pending.socket.0)?;
        self.completions.push_back(Completion { token: pending.token, result, buffer: None, more: true, nonempty: false });
        Some(pending)
    }

    fn deliver(&mut self, token: Token, buffer: Option<u16>, parts: &[Span], received: Result<Vec<u8>, i32>, nonempty: bool) {
        match received {
            Ok(bytes) => {
                let mut left = bytes.as_slice();
                for part in parts {
                    let (now, rest) = left.split_at(left.len().min(part.len()));
                    // SAFETY: the span lies in a lease that the caller keeps until this completion, and is long enough.
                    unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), part.start.as_ptr(), now.len()) };
                    left = rest;
                }
                let result = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
                self.completions.push_back(Completion { token, result, buffer, more: false, nonempty });
            }
            Err(errno) => {
                self.available.extend(buffer);
                self.complete(token, -errno);
            }
        }
    }
}

impl Ring for Sim {
    fn listen(&mut self, local: &Local) -> io::Result<Socket> {
        match local {
            Local::Tcp { address, .. } => Ok(Socket(self.network.listen(*address))),
            Local::Loopback { .. } | Local::Unix { .. } => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        }
    }

    fn open(&mut self, _remote: &Remote, _keepalive: Option<Keepalive>) -> io::Result<Socket> {
        if self.network.chance(self.network.faults().no_descriptors) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok(Socket(self.network.open()))
    }

    fn peer_address(&mut self, _socket: Socket) -> Option<SocketAddr> {
        None
    }

    fn local_address(&mut self, socket: Socket) -> Option<SocketAddr> {
        self.network.local(socket.0)
    }

    fn acknowledged(&mut self, socket: Socket) -> Option<u64> {
        self.network.sent(socket.0)
    }

    fn original_destination(&mut self, socket: Socket) -> Option<SocketAddr> {
        self.network.original(socket.0)
    }

    fn owner(&mut self, _socket: Socket, _original: Option<SocketAddr>) -> Option<SocketOwner> {
        None
    }

    fn accept(&mut self, listener: Socket, token: Token) {
        self.queue(token, listener, What::Accept);
    }

    fn connect(&mut self, socket: Socket, remote: &Remote, token: Token) {
        match remote {
            Remote::Tcp(address) => self.queue(token, socket, What::Connect(*address)),
            Remote::Unix(_) => self.complete(token, -libc::EAFNOSUPPORT),
        }
    }

    fn receive_shared(&mut self, socket: Socket, len_max: usize, _poll_first: bool, token: Token) {
        self.queue(token, socket, What::ReceiveShared { len_max });
    }

    fn receive(&mut self, socket: Socket, parts: &[Span], _poll_first: bool, token: Token) {
        self.queue(token, socket, What::Receive { parts: parts.to_vec() });
    }

    fn send(&mut self, socket: Socket, parts: &[Span], _push: Push, token: Token) {
        let mut bytes = Vec::new();
        for part in parts {
            // SAFETY: the span lies in a lease that the caller keeps until the completion.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(part.start.as_ptr(), part.len()) });
        }
        self.queue(token, socket, What::Send { bytes, sent: 0 });
    }

    fn cancel(&mut self, socket: Socket, token: Token) {
        let pending = std::mem::take(&mut self.pending);
        let mut result = -libc::ENOENT;
        for pending in pending {
            if pending.socket != socket {
                self.pending.push(pending);
                continue;
            }
            result = 0;
            // The race: the operation may just have completed with a result of its own.
            let left = if self.network.chance(self.network.faults().cancel_race) { self.attempt(pending) } else { Some(pending) };
            match left {
                Some(Pending { what: What::Send { sent, .. }, token, .. }) if sent > 0 => {
                    self.complete(token, i32::try_from(sent).unwrap_or(i32::MAX));
                }
                Some(left) => self.complete(left.token, -libc::ECANCELED),
                None => {}
            }
        }
        let at = if self.network.chance(0.5) { 0 } else { self.completions.len() };
        self.completions.insert(at, Completion { token, result, buffer: None, more: false, nonempty: false });
    }

    fn shutdown_write(&mut self, socket: Socket) {
        self.network.shutdown_write(socket.0);
    }

    fn close(&mut self, socket: Socket, reset: bool) {
        assert!(self.pending.iter().all(|pending| pending.socket != socket), "closed with operations pending");
        self.network.close(socket.0, reset);
    }

    fn close_listener(&mut self, listener: Socket, _file: Option<&Path>) {
        self.close(listener, false);
    }

    fn accept_left(&mut self, _local: &Local) -> Option<Socket> {
        None
    }

    fn close_left(&mut self) {}

    fn shared(&self, buffer: u16) -> &Lease {
        &self.leases[usize::from(buffer)]
    }

    fn recycle(&mut self, buffer: u16) {
        assert!(!self.available.contains(&buffer), "buffer {buffer} given back twice");
        self.available.push_back(buffer);
    }

    fn turn(&mut self, _wait: Option<Duration>) -> Result<(), RingError> {
        self.turns += 1;
        self.now = self.network.now();
        let mut pending = std::mem::take(&mut self.pending);
        // Order between sockets is not promised; order on one socket and direction is kept by having one operation each.
        self.network.shuffle(&mut pending);
        for pending in pending {
            if let Some(left) = self.attempt(pending) {
                self.pending.push(left);
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    fn now(&self) -> Instant {
        self.now
    }

    fn enters(&self) -> u64 {
        self.turns
    }
}
