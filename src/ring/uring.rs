//! The kernel's ring: one a worker, single issuer, deferred task work, restricted to the operations it uses.
//!
//! Invariant: scratch memory that a queued operation points to (addresses, message headers, part lists) lives until the
//! submission was consumed, which is all the kernel asks for (`IORING_FEAT_SUBMIT_STABLE`); payload memory is the
//! caller's lease and lives until the completion.
//!
//! Fields drop in order: the ring goes before the buffer-ring memory and the descriptors it uses.
//!
//! Why unsafe: pushing a submission hands addresses to the kernel, and the buffer ring is memory shared with it.
#![allow(unsafe_code, reason = "memory shared with the kernel; one of the three rooms where unsafe may stand")]

mod left;
mod scratch;
mod shared;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, register::Restriction, squeue, types};
use left::Left;
use scratch::Scratch;
use shared::SharedBuffers;
use socket2::SockAddr;

use super::{Completion, Local, Op, Push, Remote, Ring, RingError, Socket, Token, probe};
use crate::buffer::{HEADROOM_BYTES, Lease, Pool, RECORD_ROOM_BYTES, Span};
use crate::config::Keepalive;
use crate::sys::handover::Place;
use crate::sys::{self, EventFd, SocketDiag, SocketOwner, StreamOptions};

/// Submissions that fit before the queue is flushed on the way.
const SUBMISSIONS: u32 = 1_024;
/// Completions that fit before the kernel must keep some aside.
const COMPLETIONS: u32 = 8_192;
/// The one buffer group.
const GROUP: u16 = 0;
const POLL_FIRST: u16 = 1;
const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 8;
const ENTER_NO_IOWAIT: u32 = 128;
const REGISTER_RING_FDS: u8 = 20;
const UNREGISTER_RING_FDS: u8 = 21;

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct GetEventsArg {
    sigmask: u64,
    sigmask_sz: u32,
    min_wait_usec: u32,
    ts: u64,
}

/// One worker's ring.
pub struct Uring {
    ring: IoUring,
    shared: SharedBuffers,
    scratch: Scratch,
    options: StreamOptions,
    /// Listening sockets that another process left, until they are asked for.
    left: Left,
    /// Opened by the first question.
    diag: Option<SocketDiag>,
    wake: EventFd,
    wake_count: Box<u64>,
    no_iowait: bool,
    now: Instant,
    enters: u64,
    reaped: Vec<Completion>,
    reaped_next: usize,
    on_its_thread: bool,
}

impl Uring {
    /// Sets a ring up, with its buffers leased from `pool`. It starts on the thread that first calls [`Ring::turn`].
    pub fn new(pool: &mut Pool, options: StreamOptions, wake: EventFd) -> Result<Self, RingError> {
        let ring: IoUring = IoUring::builder()
            .dontfork()
            .setup_clamp()
            .setup_cqsize(COMPLETIONS)
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_r_disabled()
            .build(SUBMISSIONS)
            .map_err(probe::explain_setup)?;
        let shared = SharedBuffers::new(&ring, pool)?;
        let mut allowed = [
            Restriction::sqe_op(opcode::AcceptMulti::CODE),
            Restriction::sqe_op(opcode::Connect::CODE),
            Restriction::sqe_op(opcode::Recv::CODE),
            Restriction::sqe_op(opcode::RecvMsg::CODE),
            Restriction::sqe_op(opcode::Send::CODE),
            Restriction::sqe_op(opcode::SendMsg::CODE),
            Restriction::sqe_op(opcode::AsyncCancel2::CODE),
            Restriction::sqe_op(opcode::Close::CODE),
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_flags_allowed((squeue::Flags::BUFFER_SELECT | squeue::Flags::SKIP_SUCCESS).bits()),
            Restriction::register_op(REGISTER_RING_FDS),
            Restriction::register_op(UNREGISTER_RING_FDS),
        ];
        ring.submitter().register_restrictions(&mut allowed).map_err(call(
            "io_uring_register(RESTRICTIONS)",
            "Allow io_uring_register in the seccomp profile of this service.",
        ))?;
        let no_iowait = ring.params().is_feature_no_iowait();
        Ok(Self {
            ring,
            shared,
            scratch: Scratch::default(),
            options,
            left: Left::default(),
            diag: None,
            wake,
            wake_count: Box::new(0),
            no_iowait,
            now: Instant::now(),
            enters: 0,
            reaped: Vec::with_capacity(COMPLETIONS as usize),
            reaped_next: 0,
            on_its_thread: false,
        })
    }

    /// Uses these instead of binding their addresses anew.
    pub fn inherit(&mut self, sockets: Vec<(Place, OwnedFd)>) {
        self.left = Left(sockets);
    }

    /// The first turn makes the calling thread the ring's only issuer.
    fn start(&mut self) -> Result<(), RingError> {
        self.ring.submitter().register_enable_rings().map_err(call("io_uring_register(ENABLE_RINGS)", ""))?;
        // Saves the descriptor look-up of each enter. Not vital: a full table only costs that look-up.
        let _ = self.ring.submitter().register_ring_fd();
        self.on_its_thread = true;
        self.arm_wake();
        Ok(())
    }

    fn arm_wake(&mut self) {
        let place: *mut u64 = &raw mut *self.wake_count;
        let read = opcode::Read::new(types::Fd(self.wake.raw()), place.cast(), 8).build();
        self.push(read, Token::new(Op::Wake, 0, 0, 0));
    }

    /// Queues `entry`. A caller that uses scratch memory calls [`Self::make_room`] before it takes any, because making
    /// room clears the scratch.
    fn push(&mut self, entry: squeue::Entry, token: Token) {
        self.make_room();
        let entry = entry.user_data(token.0);
        // SAFETY: every address in the entry is a lease of the caller's, kept until the completion; scratch memory, kept
        // until the submission is consumed; or a boxed field of this struct, which lives as long as the ring.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "room was just made");
    }

    /// Hands a full queue over without waiting.
    fn make_room(&mut self) {
        while self.ring.submission().is_full() {
            self.enters += 1;
            match self.ring.submit() {
                Ok(_) => self.clear_scratch(),
                // The completion side is full or memory is short: reap, then try again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM | libc::EINTR)) => {
                    self.reap()
                }
                Err(error) => panic!("io_uring_enter failed for good: {error}"),
            }
        }
    }

    /// Frees scratch memory once every submission was consumed; the kernel may take fewer than it was given.
    fn clear_scratch(&mut self) {
        if self.ring.submission().is_empty() {
            self.scratch.clear();
        }
    }

    fn reap(&mut self) {
        let mut out_of_buffers = false;
        for entry in self.ring.completion() {
            let flags = entry.flags();
            out_of_buffers |= entry.result() == -libc::ENOBUFS;
            self.reaped.push(Completion {
                token: Token(entry.user_data()),
                result: entry.result(),
                buffer: cqueue::buffer_select(flags),
                more: cqueue::more(flags),
                nonempty: cqueue::sock_nonempty(flags),
            });
        }
        // Once, however many sockets went without.
        if out_of_buffers {
            self.shared.grow();
        }
    }

    fn enter(&mut self, wait: Option<Duration>) -> io::Result<()> {
        let timeout = wait.map(|wait| types::Timespec::new().sec(wait.as_secs()).nsec(wait.subsec_nanos()));
        let arg = GetEventsArg {
            sigmask: 0,
            sigmask_sz: 8,
            min_wait_usec: 0,
            ts: timeout.as_ref().map_or(0, |timeout| std::ptr::from_ref(timeout) as u64),
        };
        let mut flags = ENTER_GETEVENTS | ENTER_EXT_ARG;
        if self.no_iowait {
            flags |= ENTER_NO_IOWAIT;
        }
        let queued = {
            let mut submission = self.ring.submission();
            submission.sync();
            submission.len()
        };
        let queued = u32::try_from(queued).unwrap_or(u32::MAX);
        self.enters += 1;
        // SAFETY: the queued entries satisfy `push`'s conditions; `arg` and `timeout` outlive the call.
        unsafe { self.ring.submitter().enter(queued, 1, flags, Some(&arg)) }.map(drop)
    }
}

fn call(call: &'static str, remedy: &'static str) -> impl FnOnce(io::Error) -> RingError {
    move |source| RingError::Call { call, source, remedy }
}

fn sockaddr(remote: &Remote) -> io::Result<SockAddr> {
    match remote {
        Remote::Tcp(address) => Ok((*address).into()),
        Remote::Unix(path) => SockAddr::unix(path),
    }
}

impl Ring for Uring {
    fn listen(&mut self, local: &Local) -> io::Result<Socket> {
        if let Some(socket) = self.left.take(local) {
            return Ok(Socket(socket.into_raw_fd()));
        }
        let fd = match local {
            Local::Tcp { address, exclusive } => sys::listen_tcp(*address, self.options, *exclusive)?,
            Local::Loopback { port, exclusive } => sys::listen_loopback(*port, self.options, *exclusive)?,
            Local::Unix { path, mode } => sys::listen_unix(path, *mode)?,
        };
        Ok(Socket(fd.into_raw_fd()))
    }

    fn open(&mut self, remote: &Remote, keepalive: Option<Keepalive>) -> io::Result<Socket> {
        let keepalive = keepalive.unwrap_or(self.options.keepalive);
        let fd = match remote {
            Remote::Tcp(address) => sys::stream_tcp(*address, StreamOptions { keepalive })?,
            Remote::Unix(_) => sys::stream_unix()?,
        };
        Ok(Socket(fd.into_raw_fd()))
    }

    fn peer_address(&mut self, socket: Socket) -> Option<SocketAddr> {
        sys::peer_address(socket.0)
    }

    fn local_address(&mut self, socket: Socket) -> Option<SocketAddr> {
        sys::local_address(socket.0)
    }

    fn acknowledged(&mut self, socket: Socket) -> Option<u64> {
        sys::acknowledged(socket.0)
    }

    fn original_destination(&mut self, socket: Socket) -> Option<SocketAddr> {
        sys::original_destination(socket.0)
    }

    fn owner(&mut self, socket: Socket, original: Option<SocketAddr>) -> Option<SocketOwner> {
        sys::socket_owner(socket.0, original, &mut self.diag)
    }

    fn accept(&mut self, listener: Socket, token: Token) {
        self.push(opcode::AcceptMulti::new(types::Fd(listener.0)).flags(libc::SOCK_CLOEXEC).build(), token);
    }

    fn connect(&mut self, socket: Socket, remote: &Remote, token: Token) {
        match sockaddr(remote) {
            Ok(address) => {
                self.make_room();
                let address = self.scratch.address(address);
                self.push(opcode::Connect::new(types::Fd(socket.0), address.0, address.1).build(), token);
            }
            // A path too long for a sockaddr: answered like a path that does not exist.
            Err(_) => self.reaped.push(Completion { token, result: -libc::ENOENT, buffer: None, more: false, nonempty: false }),
        }
    }

    fn receive_shared(&mut self, socket: Socket, len_max: usize, poll_first: bool, token: Token) {
        let len = u32::try_from(len_max.min(RECORD_ROOM_BYTES - HEADROOM_BYTES)).unwrap_or(0);
        let entry = opcode::Recv::new(types::Fd(socket.0), std::ptr::null_mut(), len)
            .buf_group(GROUP)
            .ioprio(if poll_first { POLL_FIRST } else { 0 })
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(entry, token);
    }

    fn receive(&mut self, socket: Socket, parts: &[Span], poll_first: bool, token: Token) {
        self.make_room();
        let fd = types::Fd(socket.0);
        let ioprio = if poll_first { POLL_FIRST } else { 0 };
        let entry = match parts {
            [one] => opcode::Recv::new(fd, one.start.as_ptr(), one.len).ioprio(ioprio).build(),
            parts => opcode::RecvMsg::new(fd, self.scratch.message(parts)).ioprio(ioprio).build(),
        };
        self.push(entry, token);
    }

    fn send(&mut self, socket: Socket, parts: &[Span], push: Push, token: Token) {
        self.make_room();
        let fd = types::Fd(socket.0);
        let more = match push {
            Push::Now => 0,
            Push::WithNext => libc::MSG_MORE,
        };
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL | more;
        let entry = match parts {
            [one] => opcode::Send::new(fd, one.start.as_ptr(), one.len).flags(flags).build(),
            parts => opcode::SendMsg::new(fd, self.scratch.message(parts)).flags(flags.cast_unsigned()).build(),
        };
        self.push(entry, token);
    }

    fn cancel(&mut self, socket: Socket, token: Token) {
        self.push(opcode::AsyncCancel2::new(types::CancelBuilder::fd(types::Fd(socket.0)).all()).build(), token);
    }

    fn shutdown_write(&mut self, socket: Socket) {
        // Not as a ring operation: the kernel always sends those to a helper thread.
        sys::shutdown_write(socket.0);
    }

    fn close(&mut self, socket: Socket, reset: bool) {
        if reset {
            sys::reset_on_close(socket.0);
        }
        let entry = opcode::Close::new(types::Fd(socket.0)).build().flags(squeue::Flags::SKIP_SUCCESS);
        self.push(entry, Token::new(Op::Close, 0, 0, 0));
    }

    fn close_listener(&mut self, listener: Socket, file: Option<&Path>) {
        // At once, not with the next turn: clients must be refused from here on.
        sys::close(listener.0);
        if let Some(file) = file {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(file);
        }
    }

    fn accept_left(&mut self, local: &Local) -> Option<Socket> {
        self.left.accept(local)
    }

    fn close_left(&mut self) {
        self.left = Left::default();
    }

    fn shared(&self, buffer: u16) -> &Lease {
        &self.shared.leases[usize::from(buffer)]
    }

    fn recycle(&mut self, buffer: u16) {
        self.shared.provide(buffer);
    }

    fn turn(&mut self, wait: Option<Duration>) -> Result<(), RingError> {
        if !self.on_its_thread {
            self.start()?;
        }
        self.reaped.drain(..self.reaped_next);
        self.reaped_next = 0;
        let wait = if self.reaped.is_empty() { wait } else { Some(Duration::ZERO) };
        match self.enter(wait) {
            Ok(()) => self.clear_scratch(),
            Err(error) => match error.raw_os_error() {
                // Nothing came in time, or a signal came: normal.
                Some(libc::ETIME | libc::EINTR) => self.clear_scratch(),
                // Completions must be reaped first, or memory is short: the next turn submits the rest.
                Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => {}
                _ => return Err(call("io_uring_enter", "This is a defect: please report it with the kernel's version.")(error)),
            },
        }
        self.now = Instant::now();
        self.reap();
        Ok(())
    }

    fn next(&mut self) -> Option<Completion> {
        let completion = *self.reaped.get(self.reaped_next)?;
        self.reaped_next += 1;
        if completion.token.op() == Some(Op::Wake) {
            self.arm_wake();
        }
        Some(completion)
    }

    fn now(&self) -> Instant {
        self.now
    }

    fn enters(&self) -> u64 {
        self.enters
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("enters", &self.enters).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
