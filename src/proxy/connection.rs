//! One proxied connection as a state machine: completions and deadlines go in, operations on the ring come out, and what
//! only the worker can do comes back as a [`Next`].
//!
//! Invariant: no byte reaches the local app before [`Authorized`] was shown to [`Connection::dial_app`]; a socket is closed
//! and a lease given back only when nothing is pending on it; a connection ends exactly once, with one reason.
//!
//! Knows no listener, no snapshot and no clock but `Io::now`. `inspect` looks at the first bytes, `secure` holds the handshake,
//! `relay` the two byte directions, `idle` how long they may rest, `linger` the last word to a refused peer.

use std::sync::Arc;
use std::time::Instant;

use super::close::{self, CloseReason, Side};
use super::idle::Idle;
pub(super) use super::leg::{Leg, MESH, PLAIN};
use super::refusal::Replying;
use super::relay::Flow;
use super::secure::Handshaking;
use super::upstream::Dial;
use crate::buffer::{Lease, Pool};
use crate::mesh::{Address, Identity};
use crate::policy::Authorized;
use crate::ring::{Completion, Op, Remote, Ring, Socket, Token};
use crate::telemetry::cells::{Direction, ListenerCells, WorkerCells};
use crate::telemetry::record::ConnectionRecord;
use crate::tls::Session;

/// What a connection may use while it is stepped.
pub(super) struct Io<'a, R> {
    pub(super) ring: &'a mut R,
    pub(super) pool: &'a mut Pool,
    pub(super) worker: &'a WorkerCells,
    pub(super) cells: &'a ListenerCells,
    pub(super) now: Instant,
}

/// What the worker must do for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: an operation or a deadline is pending.
    Wait,
    /// The peer is known: decide, then call `dial_app` or `refuse`.
    Authorise,
    /// The app's current address did not answer: `dial_app` with the next one, or `close`.
    AppFailed,
    /// The endpoint did not answer: choose another and `dial_endpoint`, or `close` with this reason.
    EndpointFailed(CloseReason),
    /// The endpoint answered and its identity holds.
    EndpointReady,
    /// The first bytes are here and tell whether TLS is spoken, and which server name is asked for: route it.
    Inspected {
        /// They are a ClientHello.
        tls: bool,
    },
    /// The app answered.
    AppReady,
    /// TLS stands with a client of outside the mesh, who is nobody in particular: dial.
    ClientReady,
    /// Over: nothing is pending, everything is given back.
    Over,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Waits for a certificate, an endpoint, or word of who opened it.
    Held,
    /// Waits for the first bytes, which say where it leads.
    Inspect,
    /// TLS handshake on the mesh leg.
    Handshake,
    /// TLS handshake with the app.
    AppHandshake,
    /// TLS handshake with a client outside of the mesh.
    ClientHandshake,
    /// Outbound: dialing the endpoint. Inbound: dialing the app.
    Connecting,
    /// Bytes flow.
    Relay,
    /// A denied local client is being told so.
    Reply,
    /// A failed mesh leg is being taken down so that another endpoint can be tried.
    Retreat(CloseReason),
    /// The peer gets a moment to read its alert.
    Linger,
    /// Pending operations are being cancelled.
    Closing,
}

pub(super) struct Connection {
    pub(super) slot: u32,
    pub(super) generation: u32,
    pub(super) listener: u32,
    pub(super) direction: Direction,
    pub(super) stage: Stage,
    pub(super) legs: [Leg; 2],
    /// The byte directions, by the leg that each begins on.
    pub(super) flows: [Flow; 2],
    pub(super) handshaking: Option<Box<Handshaking>>,
    /// By leg. One on both is a gateway to an app, or for clients, that speak TLS; none is on a connection that goes as it came.
    pub(super) sessions: [Option<Box<Session>>; 2],
    /// By leg: what its send slot carries besides data.
    pub(super) controls: [Control; 2],
    pub(super) authorized: Option<Authorized>,
    pub(super) facts: Box<ConnectionRecord>,
    pub(super) accepted: Instant,
    /// When the current step, dial or handshake, began.
    pub(super) step_began: Instant,
    pub(super) deadline: Option<Instant>,
    /// The deadline that the worker's wheel knows of.
    pub(super) armed: Option<Instant>,
    /// Which of the app's addresses is being dialed.
    pub(super) app_index: usize,
    /// Endpoints that this connection has tried.
    pub(super) tried: Vec<std::net::SocketAddr>,
    /// The endpoint whose active count this connection holds.
    pub(super) endpoint: Option<std::net::SocketAddr>,
    /// Counted by the worker among those that wait for a certificate.
    pub(super) held: bool,
    /// The question who opened it is on its way, or was answered.
    pub(super) asked: bool,
    /// What it speaks as (outbound).
    pub(super) identity: Option<Arc<Identity>>,
    pub(super) replying: Option<Box<Replying>>,
    /// The local client was told why it is turned away: it gets a FIN.
    pub(super) told: bool,
    /// It is counted among its listener's connections no more.
    pub(super) left_gate: bool,
    /// Its route passes bytes on without TLS of ours.
    pub(super) raw: bool,
    /// If it says nothing in time, it speaks no TLS.
    pub(super) silent_is_raw: bool,
    /// The far leg counts as open.
    pub(super) far_open: bool,
    /// It must be over by then: its listener went away.
    pub(super) drain_by: Option<Instant>,
    /// How long it may move no byte, where that is bounded.
    pub(super) idle: Option<Box<Idle>>,
    reset: bool,
}

/// What a leg's send slot carries besides data.
#[derive(Debug, Default)]
pub(super) enum Control {
    /// Nothing.
    #[default]
    None,
    /// A KeyUpdate.
    KeyUpdate(Lease),
    /// close_notify, after which the sending side is shut.
    CloseNotify(Lease),
    /// A fatal alert, after which the connection lingers.
    Alert(Lease),
}

impl Control {
    /// Gives its buffer back. Only when it is not being sent.
    pub(super) fn release(&mut self, pool: &mut Pool) {
        match std::mem::take(self) {
            Self::None => {}
            Self::KeyUpdate(lease) | Self::CloseNotify(lease) | Self::Alert(lease) => pool.give_back(lease),
        }
    }
}

impl Connection {
    pub(super) fn new(
        slot: u32,
        generation: u32,
        listener: u32,
        socket: Socket,
        facts: Box<ConnectionRecord>,
        now: Instant,
    ) -> Self {
        let direction = facts.direction;
        let mut legs = [Leg::default(), Leg::default()];
        let accepted_leg = match direction {
            Direction::Inbound => MESH,
            Direction::Outbound => PLAIN,
        };
        legs[accepted_leg].socket = Some(socket);
        Self {
            slot,
            generation,
            listener,
            direction,
            stage: Stage::Held,
            legs,
            flows: [Flow::default(), Flow::default()],
            handshaking: None,
            sessions: [None, None],
            controls: [Control::None, Control::None],
            authorized: None,
            facts,
            accepted: now,
            step_began: now,
            deadline: None,
            armed: None,
            app_index: 0,
            tried: Vec::new(),
            endpoint: None,
            held: false,
            asked: false,
            identity: None,
            replying: None,
            told: false,
            left_gate: false,
            raw: false,
            silent_is_raw: false,
            far_open: false,
            drain_by: None,
            idle: None,
            reset: false,
        }
    }

    pub(super) fn token(&self, op: Op, leg: usize) -> Token {
        Token::new(op, u8::from(leg == MESH), self.slot, self.generation)
    }

    /// Registers an operation as pending and gives its socket and token.
    pub(super) fn begin(&mut self, op: Op, leg: usize) -> (Socket, Token) {
        let token = self.token(op, leg);
        self.legs[leg].begin(op);
        let socket = self.legs[leg].socket.expect("operations are only begun on open legs");
        (socket, token)
    }

    /// One completion of this connection.
    pub(super) fn on_completion<R: Ring>(&mut self, io: &mut Io<'_, R>, op: Op, completion: Completion) -> Next {
        let leg = usize::from(completion.token.leg());
        self.legs[leg].end(op);
        if op == Op::Receive {
            self.legs[leg].nonempty = completion.nonempty;
        }
        match self.stage {
            Stage::Closing | Stage::Retreat(_) => {
                if let Some(buffer) = completion.buffer {
                    io.ring.recycle(buffer);
                }
                self.settle(io)
            }
            Stage::Linger => self.on_linger(io, op, completion),
            Stage::Reply => self.on_reply(io, op, completion),
            Stage::Inspect => self.on_inspect(io, op, completion),
            Stage::Handshake | Stage::AppHandshake | Stage::ClientHandshake => self.on_handshake(io, op, completion),
            Stage::Connecting => self.on_connected(io, completion),
            Stage::Relay => self.on_relay(io, op, leg, completion),
            // Nothing is pending while held, so nothing can complete.
            Stage::Held => Next::Wait,
        }
    }

    /// The deadline is over.
    pub(super) fn on_deadline<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        self.deadline = None;
        match (self.stage, self.direction) {
            (Stage::Held, _) => {
                let waited_for = if self.asked && self.facts.caller.is_none() {
                    "nobody could tell in time who opened it; see the process's log"
                } else {
                    "no certificate, no intentions or no endpoint came in time; see the agent's state at /healthz"
                };
                self.facts.detail = Some(waited_for.into());
                self.close(io, CloseReason::NoIdentity, true)
            }
            (Stage::Inspect, _) => self.inspected_too_long(io),
            (Stage::Handshake, Direction::Inbound) | (Stage::ClientHandshake, _) => {
                self.close(io, CloseReason::HandshakeTimeout, true)
            }
            (Stage::AppHandshake, _) => self.app_handshake_failed(io, "it did not answer in time; does it speak TLS?"),
            (Stage::Handshake | Stage::Connecting, Direction::Outbound) => self.retreat(io, CloseReason::ConnectTimeout),
            (Stage::Connecting, Direction::Inbound) => self.retreat(io, CloseReason::AppUnreachable),
            (Stage::Linger | Stage::Reply, _) => self.close(io, self.facts.reason, true),
            (Stage::Relay, _) => self.relayed_too_long(io),
            (Stage::Retreat(_) | Stage::Closing, _) => Next::Wait,
        }
    }

    /// Opens the app's leg, for TLS where a handshake waits. `_proof` is why it may.
    pub(super) fn dial_app<R: Ring>(&mut self, io: &mut Io<'_, R>, _proof: &Authorized, app: &Address, how: Dial) -> Next {
        self.dial(io, PLAIN, app, how)
    }

    /// Opens the mesh leg to an endpoint.
    pub(super) fn dial_endpoint<R: Ring>(&mut self, io: &mut Io<'_, R>, address: std::net::SocketAddr, how: Dial) -> Next {
        self.facts.attempts = self.facts.attempts.saturating_add(1);
        self.dial(io, MESH, &Address::Tcp(address), how)
    }

    fn dial<R: Ring>(&mut self, io: &mut Io<'_, R>, leg: usize, address: &Address, how: Dial) -> Next {
        self.deadline = Some(io.now + how.timeout);
        let remote = match address {
            Address::Tcp(address) => Remote::Tcp(*address),
            Address::Unix(path) => Remote::Unix(path.clone()),
        };
        self.facts.endpoint = Some(address.clone());
        self.step_began = io.now;
        self.stage = Stage::Connecting;
        io.cells.connect_attempts.add(1);
        io.cells.far_active.add(1);
        self.far_open = true;
        match io.ring.open(&remote, how.keepalive) {
            Ok(socket) => {
                self.legs[leg].socket = Some(socket);
                let (socket, token) = self.begin(Op::Connect, leg);
                io.ring.connect(socket, &remote, token);
                Next::Wait
            }
            Err(error) => {
                // Our own want of descriptors: no word against the endpoint.
                io.cells.connect_failures.add(1);
                self.count_far_end(io.cells);
                self.facts.detail = Some(format!("no socket could be opened: {error}; raise LimitNOFILE").into());
                self.close(io, self.connect_failure(), true)
            }
        }
    }

    fn connect_failure(&self) -> CloseReason {
        match self.direction {
            Direction::Inbound => CloseReason::AppUnreachable,
            Direction::Outbound => CloseReason::ConnectFailed,
        }
    }

    fn on_connected<R: Ring>(&mut self, io: &mut Io<'_, R>, completion: Completion) -> Next {
        let far = self.far_leg();
        if let (Some(facts), Some(socket)) = (&mut self.facts.access, self.legs[far].socket) {
            facts.upstream_local = io.ring.local_address(socket);
        }
        match completion.outcome() {
            Ok(_) => {
                if self.handshaking.is_some() && far == PLAIN {
                    self.stage = Stage::AppHandshake;
                    return self.step_handshake(io);
                }
                self.facts.connect = Some(io.now - self.step_began);
                if self.handshaking.is_some() {
                    self.step_began = io.now;
                    self.stage = Stage::Handshake;
                    return self.step_handshake(io);
                }
                self.deadline = None;
                match self.direction {
                    Direction::Inbound => Next::AppReady,
                    Direction::Outbound => Next::EndpointReady,
                }
            }
            Err(errno) => {
                self.facts.detail = Some(std::io::Error::from(errno).to_string().into());
                self.retreat(io, self.connect_failure())
            }
        }
    }

    /// Takes the failed far leg down; ends in `AppFailed` or `EndpointFailed` once it is quiet.
    pub(super) fn retreat<R: Ring>(&mut self, io: &mut Io<'_, R>, reason: CloseReason) -> Next {
        io.cells.connect_failures.add(1);
        if reason == CloseReason::ConnectTimeout {
            io.cells.connect_timeouts.add(1);
        }
        self.count_far_end(io.cells);
        self.stage = Stage::Retreat(reason);
        self.deadline = None;
        self.cancel_pending(io);
        self.settle(io)
    }

    /// The far leg that was counted as open is gone, or as good as.
    pub(super) fn count_far_end(&mut self, cells: &ListenerCells) {
        if std::mem::take(&mut self.far_open) {
            cells.far_active.sub(1);
        }
    }

    pub(super) fn far_leg(&self) -> usize {
        match self.direction {
            Direction::Inbound => PLAIN,
            Direction::Outbound => MESH,
        }
    }

    /// Ends the connection: cancels what is pending, then closes both legs, with RST when `reset`.
    pub(super) fn close<R: Ring>(&mut self, io: &mut Io<'_, R>, reason: CloseReason, reset: bool) -> Next {
        if self.stage == Stage::Closing {
            return Next::Wait;
        }
        self.stage = Stage::Closing;
        self.deadline = None;
        self.facts.reason = reason;
        self.reset = reset;
        self.cancel_pending(io);
        self.settle(io)
    }

    fn cancel_pending<R: Ring>(&mut self, io: &mut Io<'_, R>) {
        for leg in [PLAIN, MESH] {
            if !self.legs[leg].is_quiet() && !self.legs[leg].is_pending(Op::Cancel) {
                let (socket, token) = self.begin(Op::Cancel, leg);
                io.ring.cancel(socket, token);
            }
        }
    }

    /// Goes on with a take-down as far as pending operations allow.
    fn settle<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if !self.legs.iter().all(Leg::is_quiet) {
            // A cancel that was under way before may have missed an operation begun after it.
            self.cancel_pending(io);
            return Next::Wait;
        }
        if let Stage::Retreat(reason) = self.stage {
            let far = self.far_leg();
            if let Some(socket) = self.legs[far].socket.take() {
                io.ring.close(socket, true);
            }
            if let Some(handshaking) = self.handshaking.take() {
                handshaking.give_back(io.pool);
            }
            return match self.direction {
                Direction::Inbound => Next::AppFailed,
                Direction::Outbound => Next::EndpointFailed(reason),
            };
        }
        for leg in [PLAIN, MESH] {
            // The local side takes a FIN for the whole: only a stream that both sides ended may close with one.
            let whole = self.facts.reason == CloseReason::Complete || self.told;
            let reset = self.reset || (leg == PLAIN && !whole);
            if let Some(socket) = self.legs[leg].socket.take() {
                io.ring.close(socket, reset);
            }
        }
        self.drop_tls(io);
        Next::Over
    }

    fn drop_tls<R: Ring>(&mut self, io: &mut Io<'_, R>) {
        if let Some(handshaking) = self.handshaking.take() {
            handshaking.give_back(io.pool);
        }
        self.flows.iter_mut().for_each(|flow| flow.release(io.ring, io.pool));
        self.controls.iter_mut().for_each(|control| control.release(io.pool));
        self.release_reply(io.pool);
        self.sessions = [None, None];
    }

    /// A socket broke while bytes were flowing.
    pub(super) fn broken<R: Ring>(&mut self, io: &mut Io<'_, R>, side: Side, errno: crate::ring::Errno) -> Next {
        self.facts.detail = Some(std::io::Error::from(errno).to_string().into());
        self.close(io, close::broken(side), true)
    }
}

#[cfg(test)]
mod tests {
    use rustls::client::ClientConnectionData;
    use rustls::kernel::KernelConnection;

    use super::*;

    /// What a connection that only waits owns, by component; what rustls boxes behind its key schedule (the peer's chain,
    /// secrets) and the AEAD's expanded keys come on top. It owns no buffer: `demote_if_idle` and the simulation see to that.
    #[test]
    fn a_waiting_connection_is_its_state_its_record_and_its_keys() {
        let parts = [
            ("state", size_of::<Connection>(), 512),
            ("record for the log", size_of::<ConnectionRecord>(), 512),
            ("session with inline keys", size_of::<Session>(), 1_536),
            ("key schedule", size_of::<KernelConnection<ClientConnectionData>>(), 640),
        ];
        for (part, bytes, bytes_max) in parts {
            println!("{bytes:5} bytes  {part}");
            assert!(bytes <= bytes_max, "{part} grew to {bytes} bytes, above {bytes_max}");
        }
        let total: usize = parts.iter().map(|(_, bytes, _)| bytes).sum();
        println!("{total:5} bytes  together");
    }
}
