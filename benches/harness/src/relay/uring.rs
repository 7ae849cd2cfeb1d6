//! The floor: a plaintext relay that does nothing but receive and send, one `io_uring_enter` a turn.
//!
//! Invariant: memory that a queued operation points to is a buffer of a pair in its slot, or the address of the far end; a slot is
//! freed only when its last completion came, and the buffer of a direction is not touched while its operation runs. A connection
//! that fails is reset on both sides. Fails for good only if the ring does.
//!
//! Why unsafe: pushing a submission hands addresses to the kernel, and an accepted connection arrives as a bare number.
#![allow(unsafe_code, reason = "addresses for the kernel and descriptors from it")]

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::time::Duration;

use anyhow::{Context, bail};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::pair::{FAR, NEAR, Pair};

/// Submissions that fit before the queue is flushed on the way.
const SUBMISSIONS: u32 = 1_024;
/// Completions that fit before the kernel must keep some aside.
const COMPLETIONS: u32 = 8_192;
/// Pairs at a time: what the token's slot number can tell apart is far more.
const PAIRS_MAX: usize = 100_000;
/// `IORING_RECVSEND_POLL_FIRST`: wait for data before the first try, which saves a try in vain.
const POLL_FIRST: u16 = 1;

/// What a completion belongs to: the low byte of its user data. The slot is above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Op {
    /// Close and cancel, whose outcome changes nothing.
    Ignored,
    Accept,
    Connect,
    ReceiveNear,
    ReceiveFar,
    SendFromNear,
    SendFromFar,
}

const RECEIVE: [Op; 2] = [Op::ReceiveNear, Op::ReceiveFar];
const SEND: [Op; 2] = [Op::SendFromNear, Op::SendFromFar];

struct Relay {
    // Dropped first, before the memory that its operations point to.
    ring: IoUring,
    listener: TcpListener,
    is_accepting: bool,
    to: Box<SockAddr>,
    pairs: Vec<Option<Pair>>,
    free: Vec<usize>,
}

/// Relays until the process is ended.
pub(crate) fn run(listener: TcpListener, to: SocketAddr) -> anyhow::Result<()> {
    let ring: IoUring = IoUring::builder()
        .dontfork()
        .setup_clamp()
        .setup_cqsize(COMPLETIONS)
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(SUBMISSIONS)
        .context("io_uring_setup: needs Linux 6.1 or later, kernel.io_uring_disabled = 0 and a seccomp profile that allows it")?;
    // Saves the descriptor look-up of each enter. Not vital: a full table only costs that look-up.
    let _ = ring.submitter().register_ring_fd();
    let to = Box::new(SockAddr::from(to));
    let mut relay = Relay { ring, listener, is_accepting: false, to, pairs: Vec::new(), free: Vec::new() };
    relay.accept()?;
    println!("ready");
    let mut completions = Vec::with_capacity(COMPLETIONS as usize);
    loop {
        relay.turn(&mut completions)?;
        for completion in completions.drain(..) {
            relay.step(&completion)?;
        }
    }
}

impl Relay {
    /// Submits, waits for at least one completion and takes all that are there.
    fn turn(&mut self, completions: &mut Vec<cqueue::Entry>) -> anyhow::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            // A signal came, or completions must be taken first.
            Err(error) if is_temporary(&error) => {}
            Err(error) => return Err(error).context("io_uring_enter failed for good"),
        }
        completions.extend(self.ring.completion());
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry, op: Op, slot: usize) -> anyhow::Result<()> {
        let entry = entry.user_data((slot as u64) << 8 | op as u64);
        while self.ring.submission().is_full() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if is_temporary(&error) => {}
                Err(error) => return Err(error).context("io_uring_enter failed for good"),
            }
        }
        // SAFETY: the entry points into a flow's buffer, which stays in its slot and untouched until the completion, or to
        // `self.to`, which lives as long as the ring; the descriptor is open, because it is closed only when nothing is in flight.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.context("room was just made")
    }

    fn accept(&mut self) -> anyhow::Result<()> {
        self.is_accepting = true;
        let fd = types::Fd(self.listener.as_raw_fd());
        self.push(opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build(), Op::Accept, 0)
    }

    fn step(&mut self, completion: &cqueue::Entry) -> anyhow::Result<()> {
        let (slot, result) = ((completion.user_data() >> 8) as usize, completion.result());
        let has_more = cqueue::sock_nonempty(completion.flags());
        match completion.user_data() as u8 {
            op if op == Op::Accept as u8 => return self.accepted(result, cqueue::more(completion.flags())),
            op if op == Op::Connect as u8 => self.connected(slot, result)?,
            op if op == Op::ReceiveNear as u8 => self.received(slot, NEAR, result, has_more)?,
            op if op == Op::ReceiveFar as u8 => self.received(slot, FAR, result, has_more)?,
            op if op == Op::SendFromNear as u8 => self.sent(slot, NEAR, result)?,
            op if op == Op::SendFromFar as u8 => self.sent(slot, FAR, result)?,
            _ => return Ok(()),
        }
        self.close_if_over(slot)
    }

    fn accepted(&mut self, result: i32, is_armed: bool) -> anyhow::Result<()> {
        self.is_accepting = is_armed;
        // A client that gave up while it waited is no reason to stop.
        if result < 0 && result != -libc::ECONNABORTED {
            let error = io::Error::from_raw_os_error(-result);
            if self.free.len() == self.pairs.len() {
                bail!("accept failed and no connection is left whose end could help: {error}. Raise `ulimit -n`.");
            }
            eprintln!("accept: {error}. Waiting for a connection to end. If descriptors ran out, raise `ulimit -n`.");
            return Ok(());
        }
        if result < 0 {
            return if self.is_accepting { Ok(()) } else { self.accept() };
        }
        // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
        let near = unsafe { Socket::from_raw_fd(result) };
        match self.dial(near) {
            Ok(pair) => self.start(pair)?,
            Err(error) => eprintln!("connection refused: {error}"),
        }
        if self.is_accepting { Ok(()) } else { self.accept() }
    }

    fn dial(&self, near: Socket) -> io::Result<Pair> {
        near.set_tcp_nodelay(true)?;
        if self.free.is_empty() && self.pairs.len() >= PAIRS_MAX {
            return Err(io::Error::other(format!("{PAIRS_MAX} connections are open")));
        }
        let far = Socket::new(Domain::from(i32::from(self.to.family())), Type::STREAM, Some(Protocol::TCP))?;
        far.set_tcp_nodelay(true)?;
        Ok(Pair::new(near, far))
    }

    fn start(&mut self, mut pair: Pair) -> anyhow::Result<()> {
        let connect = opcode::Connect::new(types::Fd(pair.sockets[FAR].as_raw_fd()), self.to.as_ptr().cast(), self.to.len());
        pair.in_flight = 1;
        let slot = self.free.pop().unwrap_or(self.pairs.len());
        if slot == self.pairs.len() {
            self.pairs.push(None);
        }
        self.pairs[slot] = Some(pair);
        self.push(connect.build(), Op::Connect, slot)
    }

    /// The pair of a completion, which is one operation nearer to its end.
    fn completed(&mut self, slot: usize) -> anyhow::Result<&mut Pair> {
        let pair = self.pairs.get_mut(slot).and_then(Option::as_mut).context("a completion came for a free slot")?;
        pair.in_flight -= 1;
        Ok(pair)
    }

    fn connected(&mut self, slot: usize, result: i32) -> anyhow::Result<()> {
        self.completed(slot)?;
        if result < 0 {
            return self.break_up(slot, result);
        }
        self.receive(slot, NEAR)?;
        self.receive(slot, FAR)
    }

    fn received(&mut self, slot: usize, side: usize, result: i32, has_more: bool) -> anyhow::Result<()> {
        let pair = self.completed(slot)?;
        let Ok(len) = usize::try_from(result) else { return self.break_up(slot, result) };
        if pair.is_broken {
            return Ok(());
        }
        pair.flows[side].received(len, has_more);
        if len > 0 {
            return self.send(slot, side);
        }
        // At once, not as a ring operation: the kernel hands those to a helper thread. The far end may be gone already, and
        // then its own receive says so.
        let _ = pair.sockets[1 - side].shutdown(Shutdown::Write);
        Ok(())
    }

    fn sent(&mut self, slot: usize, side: usize, result: i32) -> anyhow::Result<()> {
        let pair = self.completed(slot)?;
        let Ok(len) = usize::try_from(result) else { return self.break_up(slot, result) };
        if pair.is_broken {
            return Ok(());
        }
        if pair.flows[side].sent(len) { self.receive(slot, side) } else { self.send(slot, side) }
    }

    fn receive(&mut self, slot: usize, side: usize) -> anyhow::Result<()> {
        let Some(pair) = &mut self.pairs[slot] else { return Ok(()) };
        let flow = &mut pair.flows[side];
        let len = u32::try_from(flow.buffer.len()).context("a buffer is at most 256 KiB")?;
        let entry = opcode::Recv::new(types::Fd(pair.sockets[side].as_raw_fd()), flow.buffer.as_mut_ptr(), len)
            .ioprio(if flow.has_more { 0 } else { POLL_FIRST })
            .build();
        pair.in_flight += 1;
        self.push(entry, RECEIVE[side], slot)
    }

    fn send(&mut self, slot: usize, side: usize) -> anyhow::Result<()> {
        let Some(pair) = &mut self.pairs[slot] else { return Ok(()) };
        let bytes = pair.flows[side].unsent();
        let len = u32::try_from(bytes.len()).context("a buffer is at most 256 KiB")?;
        let entry = opcode::Send::new(types::Fd(pair.sockets[1 - side].as_raw_fd()), bytes.as_ptr(), len)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build();
        pair.in_flight += 1;
        self.push(entry, SEND[side], slot)
    }

    /// Cuts both sides: a reset, so that nobody takes a part for the whole.
    fn break_up(&mut self, slot: usize, result: i32) -> anyhow::Result<()> {
        let Some(pair) = &mut self.pairs[slot] else { return Ok(()) };
        if pair.is_broken {
            return Ok(());
        }
        pair.is_broken = true;
        if result == -libc::ECONNREFUSED {
            eprintln!("the far end refuses connections: is the program of --to running?");
        }
        let fds = [pair.sockets[NEAR].as_raw_fd(), pair.sockets[FAR].as_raw_fd()];
        for socket in &pair.sockets {
            // A socket that is gone has no bytes to linger for.
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
        if pair.in_flight > 0 {
            for fd in fds {
                let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::fd(types::Fd(fd)).all()).build();
                self.push(cancel.flags(squeue::Flags::SKIP_SUCCESS), Op::Ignored, 0)?;
            }
        }
        Ok(())
    }

    fn close_if_over(&mut self, slot: usize) -> anyhow::Result<()> {
        let Some(pair) = self.pairs[slot].take_if(|pair| pair.is_over()) else { return Ok(()) };
        self.free.push(slot);
        for socket in pair.sockets {
            let close = opcode::Close::new(types::Fd(socket.into_raw_fd())).build().flags(squeue::Flags::SKIP_SUCCESS);
            self.push(close, Op::Ignored, 0)?;
        }
        if self.is_accepting { Ok(()) } else { self.accept() }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ENOMEM))
}
