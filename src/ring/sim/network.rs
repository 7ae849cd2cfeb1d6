//! The simulated network: listeners, streams with bounded buffers, a clock and a dice.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Bytes that a stream holds before its sender waits.
const STREAM_BYTES_MAX: usize = 48 << 10;

/// How likely each fault is, 0 to 1.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    /// An operation that could complete waits for a later turn.
    pub late: f64,
    /// A receive or send moves fewer bytes than it could.
    pub short: f64,
    /// The shared buffers are said to be all out.
    pub no_buffers: f64,
    /// Accept or open fails with EMFILE.
    pub no_descriptors: f64,
    /// A connect is refused.
    pub refused: f64,
    /// A stream is reset while bytes flow.
    pub reset: f64,
    /// A cancelled operation completes just before.
    pub cancel_race: f64,
}

impl Faults {
    /// None at all.
    pub const NONE: Self =
        Self { late: 0.0, short: 0.0, no_buffers: 0.0, no_descriptors: 0.0, refused: 0.0, reset: 0.0, cancel_race: 0.0 };
}

/// A small deterministic dice.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// A number below `bound`, which must not be zero.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.number() % bound as u64) as usize
    }

    /// True with this chance.
    pub fn chance(&mut self, chance: f64) -> bool {
        chance > 0.0 && (self.number() % 1_000_000) as f64 / 1e6 < chance
    }
}

/// What rings and the test's ends share. Clones are handles on the same one.
#[derive(Debug, Clone)]
pub struct Network(Rc<RefCell<State>>);

#[derive(Debug)]
struct State {
    now: Instant,
    random: Random,
    faults: Faults,
    next_socket: i32,
    listeners: HashMap<i32, SocketAddr>,
    waiting: HashMap<SocketAddr, VecDeque<i32>>,
    streams: HashMap<i32, Stream>,
    /// Where connects of the test's own ends to an address arrive instead.
    redirects: HashMap<SocketAddr, SocketAddr>,
}

/// One side of a stream.
#[derive(Debug, Default)]
struct Stream {
    peer: Option<i32>,
    inbox: VecDeque<u8>,
    /// Bytes that went to the peer's inbox.
    sent: u64,
    fin: bool,
    reset: bool,
    /// Of an accepted one: where it came in at, and where its client wanted to go.
    local: Option<SocketAddr>,
    original: Option<SocketAddr>,
}

/// The test's own side of a stream.
#[derive(Debug)]
pub struct End {
    network: Network,
    socket: i32,
}

impl Network {
    /// A network whose faults follow `seed`.
    pub fn new(seed: u64, faults: Faults) -> Self {
        Self(Rc::new(RefCell::new(State {
            now: Instant::now(),
            random: Random::new(seed),
            faults,
            next_socket: 3,
            listeners: HashMap::new(),
            waiting: HashMap::new(),
            streams: HashMap::new(),
            redirects: HashMap::new(),
        })))
    }

    /// The simulated time.
    pub fn now(&self) -> Instant {
        self.0.borrow().now
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        self.0.borrow_mut().now += by;
    }

    /// Changes how likely faults are.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// Sockets that exist: zero when everybody closed what they had.
    pub fn sockets(&self) -> usize {
        self.0.borrow().streams.len()
    }

    /// Connects an end of the test's to `address`, or `None` when nobody listens.
    pub fn connect(&self, address: SocketAddr) -> Option<End> {
        let socket = self.open();
        let redirected = self.0.borrow().redirects.get(&address).copied();
        match self.connect_pair(socket, redirected.unwrap_or(address), redirected.map(|_| address)) {
            Ok(()) => Some(End { network: self.clone(), socket }),
            Err(_) => {
                self.close(socket, true);
                None
            }
        }
    }

    /// An end of the test's that somebody connected to at `address`, which [`Network::listen`] opened.
    pub fn accept(&self, listener: i32) -> Option<End> {
        self.accept_socket(listener).map(|socket| End { network: self.clone(), socket })
    }

    /// Opens a listener.
    pub fn listen(&self, address: SocketAddr) -> i32 {
        let mut state = self.0.borrow_mut();
        let socket = state.new_socket();
        state.listeners.insert(socket, address);
        state.waiting.entry(address).or_default();
        socket
    }

    /// Closes a listener of the test's own, with what waits on it.
    pub fn close_listener(&self, listener: i32) {
        self.close(listener, false);
    }

    /// From now on what the test's own ends connect to at `from` arrives at `to`, as a host's firewall would have it.
    pub fn redirect(&self, from: SocketAddr, to: SocketAddr) {
        self.0.borrow_mut().redirects.insert(from, to);
    }

    pub(super) fn faults(&self) -> Faults {
        self.0.borrow().faults
    }

    pub(super) fn chance(&self, chance: f64) -> bool {
        self.0.borrow_mut().random.chance(chance)
    }

    pub(super) fn shuffle<T>(&self, items: &mut [T]) {
        let random = &mut self.0.borrow_mut().random;
        for at in (1..items.len()).rev() {
            items.swap(at, random.below(at + 1));
        }
    }

    pub(super) fn open(&self) -> i32 {
        let mut state = self.0.borrow_mut();
        let socket = state.new_socket();
        state.streams.insert(socket, Stream::default());
        socket
    }

    pub(super) fn connect_socket(&self, socket: i32, address: SocketAddr) -> Result<(), i32> {
        if self.chance(self.faults().refused) {
            return Err(libc::ECONNREFUSED);
        }
        self.connect_pair(socket, address, None)
    }

    /// Where an accepted stream came in at.
    pub(super) fn local(&self, socket: i32) -> Option<SocketAddr> {
        self.0.borrow().streams.get(&socket)?.local
    }

    /// Bytes that its peer has or had.
    pub(super) fn sent(&self, socket: i32) -> Option<u64> {
        Some(self.0.borrow().streams.get(&socket)?.sent)
    }

    /// Where its client wanted to go, if it was redirected.
    pub(super) fn original(&self, socket: i32) -> Option<SocketAddr> {
        self.0.borrow().streams.get(&socket)?.original
    }

    fn connect_pair(&self, socket: i32, address: SocketAddr, original: Option<SocketAddr>) -> Result<(), i32> {
        let mut state = self.0.borrow_mut();
        if !state.listeners.values().any(|listening| *listening == address) {
            return Err(libc::ECONNREFUSED);
        }
        let other = state.new_socket();
        state.streams.insert(other, Stream { peer: Some(socket), local: Some(address), original, ..Stream::default() });
        state.streams.entry(socket).or_default().peer = Some(other);
        state.waiting.entry(address).or_default().push_back(other);
        Ok(())
    }

    pub(super) fn has_waiting(&self, listener: i32) -> bool {
        let state = self.0.borrow();
        state.listeners.get(&listener).and_then(|address| state.waiting.get(address)).is_some_and(|waiting| !waiting.is_empty())
    }

    pub(super) fn accept_socket(&self, listener: i32) -> Option<i32> {
        let mut state = self.0.borrow_mut();
        let address = *state.listeners.get(&listener)?;
        state.waiting.get_mut(&address)?.pop_front()
    }

    pub(super) fn is_readable(&self, socket: i32) -> bool {
        let state = self.0.borrow();
        state.streams.get(&socket).is_none_or(|stream| !stream.inbox.is_empty() || stream.fin || stream.reset)
    }

    pub(super) fn receive(&self, socket: i32, room: usize) -> Result<Vec<u8>, i32> {
        let mut state = self.0.borrow_mut();
        let State { random, streams, faults, .. } = &mut *state;
        let stream = streams.get_mut(&socket).ok_or(libc::EBADF)?;
        if stream.reset {
            return Err(libc::ECONNRESET);
        }
        let mut len = stream.inbox.len().min(room);
        if len > 1 && random.chance(faults.short) {
            len = 1 + random.below(len);
        }
        if len > 0 && random.chance(faults.reset) {
            state.reset(socket);
            return Err(libc::ECONNRESET);
        }
        Ok(stream.inbox.drain(..len).collect())
    }

    /// Takes what fits; zero means that the sender must wait.
    pub(super) fn send(&self, socket: i32, bytes: &[u8]) -> Result<usize, i32> {
        let mut state = self.0.borrow_mut();
        let State { random, streams, faults, .. } = &mut *state;
        let stream = streams.get(&socket).ok_or(libc::EBADF)?;
        if stream.reset {
            return Err(libc::ECONNRESET);
        }
        let peer = stream.peer.and_then(|peer| streams.get_mut(&peer)).ok_or(libc::EPIPE)?;
        let mut len = bytes.len().min(STREAM_BYTES_MAX.saturating_sub(peer.inbox.len()));
        if len > 1 && random.chance(faults.short) {
            len = 1 + random.below(len);
        }
        peer.inbox.extend(&bytes[..len]);
        if let Some(stream) = streams.get_mut(&socket) {
            stream.sent += len as u64;
        }
        Ok(len)
    }

    pub(super) fn shutdown_write(&self, socket: i32) {
        let mut state = self.0.borrow_mut();
        if let Some(peer) = state.streams.get(&socket).and_then(|stream| stream.peer)
            && let Some(peer) = state.streams.get_mut(&peer)
        {
            peer.fin = true;
        }
    }

    pub(super) fn close(&self, socket: i32, reset: bool) {
        let mut state = self.0.borrow_mut();
        if let Some(address) = state.listeners.remove(&socket) {
            for waiting in state.waiting.remove(&address).into_iter().flatten() {
                state.reset(waiting);
                state.streams.remove(&waiting);
            }
            return;
        }
        // Unread bytes make the kernel answer with a reset, whatever the closer meant.
        let unread = state.streams.get(&socket).is_some_and(|stream| !stream.inbox.is_empty());
        if reset || unread {
            state.reset(socket);
        } else if let Some(peer) = state.streams.get(&socket).and_then(|stream| stream.peer)
            && let Some(peer) = state.streams.get_mut(&peer)
        {
            peer.fin = true;
        }
        state.streams.remove(&socket);
    }
}

impl State {
    fn new_socket(&mut self) -> i32 {
        self.next_socket += 1;
        self.next_socket
    }

    fn reset(&mut self, socket: i32) {
        let peer = self.streams.get(&socket).and_then(|stream| stream.peer);
        for socket in [Some(socket), peer].into_iter().flatten() {
            if let Some(stream) = self.streams.get_mut(&socket) {
                stream.reset = true;
                stream.inbox.clear();
            }
        }
    }
}

impl End {
    /// Writes what fits; 0 when the peer must read first. `None` when the stream is broken.
    pub fn write(&self, bytes: &[u8]) -> Option<usize> {
        self.network.send(self.socket, bytes).ok()
    }

    /// Reads what is there: `Some` of some bytes, `Some` of none at the end, `None` when nothing is there yet; `Err` on reset.
    pub fn read(&self, room: usize) -> Result<Option<Vec<u8>>, i32> {
        if self.network.is_readable(self.socket) { self.network.receive(self.socket, room).map(Some) } else { Ok(None) }
    }

    /// Ends the sending side.
    pub fn shutdown_write(&self) {
        self.network.shutdown_write(self.socket);
    }

    /// Resets the stream.
    pub fn reset(self) {
        self.network.close(self.socket, true);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.network.close(self.socket, false);
    }
}
