//! A worker's listeners: bound, armed, told of, and closed when a snapshot lacks them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Worker, slot_of};
use crate::mesh::Bind;
use crate::proxy::connection::Connection;
use crate::proxy::limits::{ACCEPT_BACKOFF, BIND_FOLLOW, BIND_RETRY, LEFT_WAITING_MAX};
use crate::proxy::listener::{Listener, Role, Routing};
use crate::ring::{Completion, Errno, Op, Ring, Socket, Token};
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::{AccessFacts, ConnectionRecord, Event};

impl<R: Ring> Worker<R> {
    pub(super) fn on_accept(&mut self, completion: Completion) {
        let now = self.now();
        let Some(listener) = find_listener(&mut self.listeners, completion.token) else {
            self.drop_accepted(completion);
            return;
        };
        if !completion.more {
            listener.accepting = false;
            if listener.removed {
                let index = completion.token.slot();
                if completion.outcome().is_ok() {
                    self.on_accepted(index, Socket(completion.result));
                }
                self.close_if_removed(index);
                return;
            }
            if !listener.cancelling {
                listener.retry_at = Some(now);
                self.wake_listeners_at(now);
            }
        }
        match completion.outcome() {
            Ok(_) => self.on_accepted(completion.token.slot(), Socket(completion.result)),
            Err(Errno(libc::ECANCELED)) => {}
            Err(errno) => {
                let Some(listener) = find_listener(&mut self.listeners, completion.token) else { return };
                listener.retry_at = Some(now + ACCEPT_BACKOFF);
                let bind = listener.bind.clone();
                self.wake_listeners_at(now + ACCEPT_BACKOFF);
                self.telemetry.cells.accept_errors.add(1);
                self.telemetry.send(Event::AcceptFailed { bind, error: errno.into() });
            }
        }
    }

    /// Looks at the listeners again at `at`, or earlier.
    pub(super) fn wake_listeners_at(&mut self, at: Instant) {
        self.listeners_due = Some(self.listeners_due.map_or(at, |due| due.min(at)));
    }

    fn drop_accepted(&mut self, completion: Completion) {
        if completion.outcome().is_ok() {
            self.ring.close(Socket(completion.result), true);
        }
        self.telemetry.cells.stale_completions.add(1);
    }

    pub(super) fn on_accept_cancelled(&mut self, token: Token) {
        if let Some(listener) = find_listener(&mut self.listeners, token) {
            listener.cancelling = false;
            self.close_if_removed(token.slot());
        }
    }

    fn on_accepted(&mut self, index: u32, socket: Socket) {
        let role = self.listeners.get(index as usize).and_then(|listener| listener.as_ref()).map(|listener| &listener.role);
        match role {
            Some(Role::Redirect) => self.on_redirected(index, socket),
            Some(Role::Lease) => self.on_leased(index, socket),
            Some(Role::Router(_)) => self.on_routed(index, socket),
            _ => self.admit(index, socket, |_| {}),
        }
    }

    fn on_redirected(&mut self, index: u32, socket: Socket) {
        let original = self.ring.original_destination(socket);
        let upstream = original.and_then(|original| {
            let route = self.routes()?.iter().find(|route| route.matches(original)).map(|route| Arc::clone(&route.upstream));
            self.listener_of(&route?)
        });
        let why = || match original {
            Some(original) => format!("no route leads to an upstream for {original}; add a [[route]] to the rules"),
            None => "it came to the redirect listener without being redirected; connect to an upstream's own listener".to_owned(),
        };
        match upstream {
            Some(upstream) => self.admit(upstream, socket, |facts| facts.original = original),
            None => self.refuse_unrouted(index, socket, original, why()),
        }
    }

    fn on_leased(&mut self, index: u32, socket: Socket) {
        let lease = self.lease_of(socket);
        match lease.and_then(|lease| Some((self.listener_of(&lease.upstream)?, lease.caller))) {
            Some((upstream, caller)) => self.admit(upstream, socket, |facts| facts.caller = Some(caller)),
            None => {
                let address = self.ring.local_address(socket);
                let why = "nobody of this user has a lease of this address; ask for the Connection again".to_owned();
                self.refuse_unrouted(index, socket, address, why);
            }
        }
    }

    /// The listener of an upstream by its name.
    fn listener_of(&self, upstream: &str) -> Option<u32> {
        let handed_over = self.orders.handed_over.load(Ordering::Acquire);
        let leads_there = |listener: &Listener| match &listener.role {
            Role::Upstream(balancer) => *balancer.upstream().name == *upstream && (!listener.removed || handed_over),
            Role::Public { .. } | Role::Router(_) | Role::Forward(_) | Role::Original(_) | Role::Redirect | Role::Lease => false,
        };
        self.listeners.iter().position(|listener| listener.as_ref().is_some_and(leads_there)).map(slot_of)
    }

    pub(super) fn refuse_unrouted(&mut self, index: u32, socket: Socket, original: Option<SocketAddr>, why: String) {
        let downstream = self.ring.peer_address(socket);
        let Some(Some(listener)) = self.listeners.get_mut(index as usize) else { return };
        listener.cells.connections.add(1);
        listener.cells.closed[CloseReason::NoRoute as usize].add(1);
        let mut facts = Box::new(ConnectionRecord::new(&listener.cells, downstream));
        facts.original = original;
        facts.reason = CloseReason::NoRoute;
        facts.detail = Some(why.into());
        self.telemetry.send(Event::Connection(facts));
        self.ring.close(socket, true);
    }

    pub(super) fn admit(&mut self, index: u32, socket: Socket, know: impl FnOnce(&mut ConnectionRecord)) {
        let now = self.now();
        let Some(Some(listener)) = self.listeners.get_mut(index as usize) else { return };
        let full = self.connections.live() >= self.plane.connections_max;
        // What was accepted in the moment of a hand-over is this process's to serve: nobody else has it.
        let open = !listener.removed || self.orders.handed_over.load(Ordering::Acquire);
        let admitted = !full && open && listener.gate.enter(listener.connections_max());
        listener.cells.connections.add(1);
        let mut facts = Box::new(ConnectionRecord::new(&listener.cells, self.ring.peer_address(socket)));
        know(&mut facts);
        if self.telemetry.cells.access_facts.is_set() {
            let cluster = match &listener.role {
                Role::Upstream(balancer) => balancer.upstream().targets.first().map(|target| target.cluster().into()),
                Role::Forward(balancer) => Some(Arc::clone(&balancer.upstream().name)),
                Role::Public { .. } | Role::Router(_) | Role::Original(_) | Role::Redirect | Role::Lease => None,
            };
            let downstream_local = self.ring.local_address(socket);
            facts.access = Some(Box::new(AccessFacts { downstream_local, cluster, ..AccessFacts::default() }));
        }
        if !admitted {
            let (reason, detail) = match (listener.removed, full) {
                (true, _) => (CloseReason::Drained, "the listener is closing"),
                (false, true) => (CloseReason::Limit, "this worker carries as many connections as it may"),
                (false, false) => (CloseReason::Limit, "max connections reached"),
            };
            facts.reason = reason;
            facts.detail = Some(detail.into());
            listener.cells.closed[reason as usize].add(1);
            self.telemetry.send(Event::Connection(facts));
            self.ring.close(socket, true);
            return;
        }
        listener.live += 1;
        listener.cells.active.add(1);
        let (slot, generation) = self.connections.reserve();
        let connection = Box::new(Connection::new(slot, generation, index, socket, facts, now));
        self.start(connection);
    }

    /// Binds what is not bound, arms what does not accept.
    pub(super) fn retry_listeners(&mut self) {
        let now = self.now();
        if self.listeners_due.is_none_or(|at| at > now) {
            return;
        }
        for index in 0..self.listeners.len() {
            let Some(listener) = &mut self.listeners[index] else { continue };
            if listener.removed || listener.retry_at.is_none_or(|at| at > now) {
                continue;
            }
            listener.retry_at = None;
            if listener.socket.is_none() {
                self.bind(index, now);
            }
            self.announce(index, now);
            self.announce_routes(index, now);
            self.arm(index);
        }
        self.listeners_due = self.listeners.iter().flatten().filter_map(|listener| listener.retry_at).min();
    }

    fn bind(&mut self, index: usize, now: Instant) {
        let Some(listener) = &mut self.listeners[index] else { return };
        let Some(local) = listener.local(self.index) else {
            let waits_for_first = matches!(listener.bind, Bind::Tcp(_));
            listener.retry_at = waits_for_first.then_some(now + BIND_FOLLOW);
            return;
        };
        let bind = listener.bind.clone();
        if self.listeners.iter().flatten().any(|other| other.removed && other.socket.is_some() && other.bind == bind) {
            // An older listener of ours is about to leave the address.
            self.listeners[index].as_mut().into_iter().for_each(|listener| listener.retry_at = Some(now + BIND_FOLLOW));
            return;
        }
        let Some(listener) = &mut self.listeners[index] else { return };
        match self.ring.listen(&local) {
            Ok(socket) => {
                listener.socket = Some(socket);
                listener.gate.holders.fetch_add(1, Ordering::AcqRel);
                if self.index == 0 {
                    listener.gate.bound.store(true, Ordering::Release);
                }
                listener.failure_told = false;
                self.listeners_bound += 1;
                self.telemetry.cells.listener_changes.add(1);
            }
            Err(error) => {
                listener.retry_at = Some(now + BIND_RETRY);
                if !listener.failure_told {
                    listener.failure_told = self.telemetry.send(Event::BindFailed { bind, error });
                }
            }
        }
    }

    /// Tells of a bound listener: readiness depends on it, so a full event ring means another try.
    fn announce(&mut self, index: usize, now: Instant) {
        let Some(listener) = self.listeners[index].as_mut().filter(|listener| listener.socket.is_some() && !listener.announced)
        else {
            return;
        };
        let event = Event::ListenerUp { bind: listener.bind.clone(), cells: Arc::clone(&listener.cells) };
        listener.announced = self.telemetry.send(event);
        if !listener.announced {
            listener.retry_at = Some(now + BIND_RETRY);
        }
    }

    fn arm(&mut self, index: usize) {
        let Some(listener) = &mut self.listeners[index] else { return };
        let waits = self.orders.successor
            && match listener.role {
                Role::Public { .. } | Role::Upstream(_) => listener.service.identity.is_none(),
                Role::Router(Routing { ref router, .. }) => router.lacks_identity(),
                // Without a socket nothing is armed.
                Role::Forward(_) | Role::Original(_) => false,
                // Routes lead to upstreams of any service, and leases are the predecessor's until then.
                Role::Redirect | Role::Lease => !self.orders.in_charge.load(Ordering::Acquire),
            };
        if waits {
            // The predecessor still serves this address: what it could answer must not wait here for a certificate.
            let at = self.ring.now() + BIND_FOLLOW;
            listener.retry_at = Some(at);
            self.wake_listeners_at(at);
            return;
        }
        if let (Some(socket), false, false) = (listener.socket, listener.accepting, listener.cancelling) {
            listener.accepting = true;
            let token = Token::new(Op::Accept, 0, slot_of(index), listener.generation);
            self.ring.accept(socket, token);
            self.accept_left(index);
        }
    }

    /// Takes what waits at sockets that were left for the same address and close now: those of workers that are no more.
    fn accept_left(&mut self, index: usize) {
        let Some(local) = self.listeners[index].as_ref().and_then(|listener| listener.local(self.index)) else { return };
        for _ in 0..LEFT_WAITING_MAX {
            let Some(socket) = self.ring.accept_left(&local) else { return };
            self.on_accepted(slot_of(index), socket);
        }
    }

    pub(super) fn remove_all_listeners(&mut self) {
        for index in 0..self.listeners.len() {
            self.remove_listener(index);
        }
    }

    /// Those that the admin port had closed. Their connections stay.
    pub(super) fn close_listeners_on_purpose(&mut self) {
        let closed = self.orders.closed.load(Ordering::Acquire);
        if std::mem::replace(&mut self.closed, closed) == closed {
            return;
        }
        for index in 0..self.listeners.len() {
            let Some(listener) = &mut self.listeners[index] else { continue };
            if !listener.removed && !listener.part.is_route() && self.orders.closed(listener.cells.direction) {
                listener.spared = true;
                self.remove_listener(index);
            }
        }
    }

    /// Stops accepting. The listener's place is kept until its last connection ends.
    pub(super) fn remove_listener(&mut self, index: usize) {
        let Some(listener) = &mut self.listeners[index] else { return };
        if listener.removed {
            return;
        }
        listener.removed = true;
        listener.retry_at = None;
        if self.index == 0 {
            listener.gate.bound.store(false, Ordering::Release);
        }
        if let (Some(socket), true) = (listener.socket, listener.accepting) {
            listener.cancelling = true;
            let token = Token::new(Op::AcceptCancel, 0, slot_of(index), listener.generation);
            self.ring.cancel(socket, token);
        }
        self.close_if_removed(slot_of(index));
    }

    pub(super) fn close_if_removed(&mut self, index: u32) {
        let Some(place) = self.listeners.get_mut(index as usize) else { return };
        let Some(listener) = place else { return };
        if !listener.removed || listener.accepting || listener.cancelling {
            return;
        }
        if let Some(socket) = listener.socket.take() {
            let path = match &listener.bind {
                Bind::Unix { path, .. } if self.orders.in_charge.load(Ordering::Acquire) => Some(path.as_path()),
                Bind::Unix { .. } | Bind::Tcp(_) => None,
            };
            self.ring.close_listener(socket, path);
            self.telemetry.cells.listener_changes.add(1);
            listener.gate.holders.fetch_sub(1, Ordering::AcqRel);
            self.listeners_bound -= 1;
            let bind = listener.bind.clone();
            self.telemetry.send(Event::ListenerDown { bind });
        }
        if listener.live == 0 && !self.may_yet_be_taken(index) {
            self.listeners[index as usize] = None;
            self.close_routes_of(index);
        }
    }
}

fn find_listener(listeners: &mut [Option<Listener>], token: Token) -> Option<&mut Listener> {
    listeners.get_mut(token.slot() as usize)?.as_mut().filter(|listener| listener.generation == token.generation())
}
