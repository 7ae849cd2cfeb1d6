//! What a connection asks of its worker: to start, to be judged, to be dialed on, to be laid to rest.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::super::connection::{Connection, MESH, Next, PLAIN, Stage};
use super::super::limits::{CONNECT_ATTEMPTS_MAX, HELD_MAX};
use super::super::listener::Role;
use super::super::secure::Handshaking;
use super::super::timer::Owner;
use super::super::upstream::{Choice, Dial};
use super::{Order, Worker, own_side};
use crate::config::HANDSHAKE_TIMEOUT;
use crate::mesh::{Address, Service};
use crate::policy::Authorized;
use crate::ring::Ring;
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::{Decision, Event};
use crate::tls::{FrontTls, Handshake, TlsError};

/// What a denied peer is told (RFC 8446 `access_denied`).
const ALERT_ACCESS_DENIED: u8 = 49;
const TOO_MANY_HANDSHAKES: &str = "too many handshakes at once";

impl<R: Ring> Worker<R> {
    /// Begins with an accepted or held connection, or holds it.
    pub(super) fn start(&mut self, mut connection: Box<Connection>) {
        let next = self.begin(&mut connection);
        self.drive(connection, next);
    }

    /// The first step on the way that its listener leads.
    pub(super) fn begin(&mut self, connection: &mut Connection) -> Next {
        match self.listener(connection).role {
            Role::Forward(_) | Role::Original(_) => self.start_raw(connection),
            _ => match connection.direction {
                Direction::Inbound => self.start_inbound(connection),
                Direction::Outbound => self.start_outbound(connection),
            },
        }
    }

    fn start_inbound(&mut self, connection: &mut Connection) -> Next {
        let service = self.service(connection);
        let Some(identity) = &service.identity else { return self.hold(connection) };
        if service.intentions.is_unknown() {
            return self.hold(connection);
        }
        if let Some(reason) = self.too_many_handshakes(connection.direction) {
            return self.end(connection, reason, TOO_MANY_HANDSHAKES);
        }
        *own_side(Direction::Inbound, &mut connection.facts) = Some(identity.svid.id.clone());
        let Role::Public { public, .. } = &self.listener(connection).role else {
            return self.end(connection, CloseReason::Shutdown, "listener changed its kind");
        };
        let timeout = public.handshake_timeout;
        let accepted = identity.tls.get(self.index).map(crate::tls::WorkerTls::accept);
        self.accept(connection, accepted, timeout)
    }

    /// Why none may be begun now. On the way out a limit would be one of the upstream's.
    fn too_many_handshakes(&self, direction: Direction) -> Option<CloseReason> {
        (self.handshakes >= self.plane.handshakes_max).then_some(match direction {
            Direction::Inbound => CloseReason::Limit,
            Direction::Outbound => CloseReason::HandshakeFailed,
        })
    }

    /// Begins the handshake that a peer, or a client outside of the mesh, is to make.
    fn accept(&mut self, connection: &mut Connection, tls: Option<Result<Handshake, TlsError>>, timeout: Duration) -> Next {
        match tls {
            Some(Ok(tls)) => self.with_io(connection, |connection, io| connection.start_accepting(io, tls, timeout)),
            Some(Err(error)) => self.end(connection, CloseReason::HandshakeFailed, &error.to_string()),
            None => self.end(connection, CloseReason::NoIdentity, "no TLS configuration for this worker"),
        }
    }

    fn start_outbound(&mut self, connection: &mut Connection) -> Next {
        let identity = match self.identity_for(connection) {
            Ok(Some(identity)) => identity,
            Ok(None) => return self.hold(connection),
            Err(next) => return next,
        };
        let Role::Upstream(balancer) = &self.listener(connection).role else {
            return self.end(connection, CloseReason::Shutdown, "listener changed its kind");
        };
        if balancer.upstream().targets.is_empty() {
            return self.hold(connection);
        }
        *own_side(Direction::Outbound, &mut connection.facts) = Some(identity.svid.id.clone());
        if let Err(next) = self.check_access(connection, &identity) {
            return next;
        }
        connection.identity = Some(identity);
        // Nobody is dialed for a client before TLS stands with it.
        if self.front(connection).is_some() {
            self.meet_client(connection)
        } else {
            self.dial_next_endpoint(connection, CloseReason::NoEndpoint)
        }
    }

    /// What TLS clients of its listener must speak. Borrowed: its count is shared between cores.
    fn front(&self, connection: &Connection) -> Option<&FrontTls> {
        self.listener(connection).role.balancer()?.upstream().front.as_deref()
    }

    /// Begins TLS with a client outside of the mesh.
    fn meet_client(&mut self, connection: &mut Connection) -> Next {
        if let Some(reason) = self.too_many_handshakes(connection.direction) {
            return self.end(connection, reason, TOO_MANY_HANDSHAKES);
        }
        let tls = self.front(connection).and_then(|front| front.accept(self.index));
        self.accept(connection, tls, HANDSHAKE_TIMEOUT)
    }

    /// On the ways where bytes go as they are.
    fn start_raw(&mut self, connection: &mut Connection) -> Next {
        connection.raw = true;
        match &self.listener(connection).role {
            Role::Forward(balancer) if balancer.upstream().targets.is_empty() => self.hold(connection),
            Role::Original(original) => {
                let how = Dial { timeout: original.connect_timeout, keepalive: original.keepalive };
                let Some(address) = connection.facts.original else {
                    let why = "it came to a passthrough without being redirected; connect to the service's own address";
                    return self.end(connection, CloseReason::NoRoute, why);
                };
                self.with_io(connection, |connection, io| connection.dial_endpoint(io, address, how))
            }
            _ => self.dial_next_endpoint(connection, CloseReason::NoEndpoint),
        }
    }

    /// Waits for the first certificate, intentions or endpoints, within bounds.
    fn hold(&mut self, connection: &mut Connection) -> Next {
        if connection.held {
            return Next::Wait;
        }
        if self.held >= HELD_MAX {
            return self.end(connection, CloseReason::NoIdentity, "too many connections wait for the first certificate");
        }
        self.held += 1;
        connection.held = true;
        connection.stage = Stage::Held;
        connection.deadline = Some(self.ring.now() + self.plane.hold_time);
        Next::Wait
    }

    /// Goes on until nothing is left to do at once.
    pub(super) fn drive(&mut self, mut connection: Box<Connection>, mut next: Next) {
        loop {
            next = match next {
                Next::Wait => return self.park(connection),
                Next::Over => return self.finish(connection),
                Next::Authorise => self.authorise(&mut connection),
                Next::Inspected { tls } => self.route_inspected(&mut connection, tls),
                Next::AppReady => self.app_ready(&mut connection),
                Next::ClientReady => self.dial_next_endpoint(&mut connection, CloseReason::NoEndpoint),
                Next::AppFailed => self.dial_next_app(&mut connection),
                Next::EndpointFailed(reason) => self.endpoint_failed(&mut connection, reason),
                Next::EndpointReady => self.endpoint_ready(&mut connection),
            };
        }
    }

    fn park(&mut self, mut connection: Box<Connection>) {
        self.count_held(&mut connection);
        let late = connection.stage == Stage::Relay && connection.drain_by.is_none() && self.order == Order::Run;
        if late && self.listener(&connection).drains() {
            // Its listener went away while it was being set up.
            connection.must_end_by(self.ring.now() + self.plane.drain_time);
        }
        if connection.deadline != connection.armed {
            connection.armed = connection.deadline;
            if let Some(deadline) = connection.deadline {
                self.wheel.add(Owner { slot: connection.slot, generation: connection.generation }, deadline);
            }
        }
        self.connections.put(connection);
    }

    fn count_held(&mut self, connection: &mut Connection) {
        if connection.held && connection.stage != Stage::Held {
            connection.held = false;
            self.held -= 1;
        }
    }

    /// Decides on a peer whose identity is proven, before anything of the app is touched.
    fn authorise(&mut self, connection: &mut Connection) -> Next {
        let Some(peer) = connection.facts.source.clone() else {
            return self.end(connection, CloseReason::HandshakeFailed, "no peer identity");
        };
        match self.decide(connection, &peer) {
            Ok(authorized) => {
                connection.facts.decision = Some(Decision { allowed: true, by: authorized.by().clone() });
                connection.authorized = Some(authorized);
                self.listener(connection).cells.allowed.add(1);
                connection.app_index = 0;
                self.dial_app(connection)
            }
            Err(denied) => {
                connection.facts.decision = Some(Decision { allowed: false, by: denied.by });
                connection.facts.denial = Some(self.next_denial());
                self.with_io(connection, |connection, io| connection.refuse(io, ALERT_ACCESS_DENIED, CloseReason::Denied))
            }
        }
    }

    fn dial_app(&mut self, connection: &mut Connection) -> Next {
        let Some(proof) = connection.authorized.clone() else {
            return self.end(connection, CloseReason::Denied, "no authorisation");
        };
        let Role::Public { public, app } = &self.listener(connection).role else {
            return self.end(connection, CloseReason::Shutdown, "listener changed its kind");
        };
        if app.is_some() {
            return self.dial_app_endpoint(connection, &proof);
        }
        let public = Arc::clone(public);
        let Some(app) = public.app.get(connection.app_index) else {
            return self.with_io(connection, |connection, io| connection.close(io, CloseReason::AppUnreachable, true));
        };
        let how = Dial { timeout: public.local_connect_timeout, keepalive: public.local_keepalive };
        self.with_io(connection, |connection, io| connection.dial_app(io, &proof, app, how))
    }

    fn dial_next_app(&mut self, connection: &mut Connection) -> Next {
        connection.app_index += 1;
        if let Some(address) = connection.endpoint.take() {
            self.count_failure(connection, address, CloseReason::AppUnreachable);
        }
        self.dial_app(connection)
    }

    /// Dials an app that is a set of endpoints.
    fn dial_app_endpoint(&mut self, connection: &mut Connection, proof: &Authorized) -> Next {
        let (choice, how) = match self.choose(connection) {
            Ok(chosen) => chosen,
            Err(nothing) => {
                if connection.tried.is_empty() {
                    connection.facts.detail = Some(nothing);
                }
                return self.with_io(connection, |connection, io| connection.close(io, CloseReason::AppUnreachable, true));
            }
        };
        let index = self.index;
        let app = self.listener(connection).role.balancer();
        let outside = app.and_then(|app| app.upstream().outside.as_ref()).map(|outside| outside.connect(index));
        match outside {
            None => {}
            Some(Some(Ok(handshake))) => connection.handshaking = Some(Handshaking::new(handshake, PLAIN)),
            Some(Some(Err(error))) => return self.end(connection, CloseReason::AppUnreachable, &error.to_string()),
            Some(None) => return self.end(connection, CloseReason::AppUnreachable, "no TLS configuration for this worker"),
        }
        let address = Address::Tcp(choice.address);
        self.with_io(connection, |connection, io| connection.dial_app(io, proof, &address, how))
    }

    fn app_ready(&mut self, connection: &mut Connection) -> Next {
        if let (Some(address), Some(app)) = (connection.endpoint, self.listener_mut(connection).role.balancer_mut()) {
            app.succeeded(address);
        }
        // Another of the app's addresses may have failed before.
        connection.facts.detail = None;
        connection.tried = Vec::new();
        self.relay(connection)
    }

    fn relay(&mut self, connection: &mut Connection) -> Next {
        let idle_timeout = self.listener(connection).role.idle_timeout();
        self.with_io(connection, |connection, io| connection.start_relay(io, idle_timeout))
    }

    fn dial_next_endpoint(&mut self, connection: &mut Connection, failure: CloseReason) -> Next {
        let (choice, how) = match self.choose(connection) {
            Ok(chosen) => chosen,
            Err(nothing) => {
                if failure == CloseReason::NoEndpoint {
                    connection.facts.detail = Some(nothing);
                }
                return self.with_io(connection, |connection, io| connection.close(io, failure, true));
            }
        };
        if connection.raw {
            return self.with_io(connection, |connection, io| connection.dial_endpoint(io, choice.address, how));
        }
        let (identity, index) = (connection.identity.clone(), self.index);
        let Role::Upstream(balancer) = &mut self.listener_mut(connection).role else {
            return self.end(connection, CloseReason::Shutdown, "listener changed its kind");
        };
        let handshake = identity.and_then(|identity| Some(balancer.dialer(&identity, index, &choice)?.connect()));
        match handshake {
            Some(Ok(handshake)) => self.with_io(connection, |connection, io| {
                connection.handshaking = Some(Handshaking::new(handshake, MESH));
                connection.dial_endpoint(io, choice.address, how)
            }),
            Some(Err(error)) => self.end(connection, CloseReason::HandshakeFailed, &error.to_string()),
            None => self.end(connection, CloseReason::NoIdentity, "no certificate for this worker"),
        }
    }

    /// The endpoint to dial next and how, or why there is none. It counts as opened.
    fn choose(&mut self, connection: &mut Connection) -> Result<(Choice, Dial), Box<str>> {
        let now = self.ring.now();
        let client = connection.facts.downstream.map(|address| address.ip().to_canonical());
        let Some(balancer) = self.listener_mut(connection).role.balancer_mut() else { return Err("no endpoints here".into()) };
        let attempts_max = balancer.upstream().connect_attempts.unwrap_or(CONNECT_ATTEMPTS_MAX);
        let may_try = connection.tried.len() < attempts_max as usize;
        let choice = match (balancer.upstream().original, connection.facts.original) {
            (true, None) => return Err("it was not redirected here; connect to the service's own address".into()),
            (true, Some(wanted)) => connection.tried.is_empty().then(|| balancer.original(wanted)).flatten(),
            (false, _) => may_try.then(|| balancer.choose(client, &connection.tried, now)).flatten(),
        };
        let Some(choice) = choice else {
            let upstream = balancer.upstream();
            // In panic everybody is tried, so there is nobody; Envoy counts that too.
            let in_panic = connection.tried.is_empty() && !upstream.original && upstream.panic_percent > 0;
            let nothing = no_endpoint(upstream);
            if in_panic {
                self.listener(connection).cells.in_panic.add(1);
            }
            return Err(nothing);
        };
        balancer.opened(choice.address);
        if let Some(facts) = &mut connection.facts.access {
            // Without TLS of ours no server name is sent that could name the cluster.
            let meshed = connection.direction == Direction::Outbound && !connection.raw;
            facts.cluster = Some(if meshed { choice.target.cluster().into() } else { Arc::clone(&balancer.upstream().name) });
        }
        connection.endpoint = Some(choice.address);
        connection.tried.push(choice.address);
        let how = Dial::to(balancer.upstream());
        if choice.in_panic {
            self.listener(connection).cells.in_panic.add(1);
        }
        Ok((choice, how))
    }

    fn endpoint_failed(&mut self, connection: &mut Connection, reason: CloseReason) -> Next {
        let Some(address) = connection.endpoint.take() else {
            return self.with_io(connection, |connection, io| connection.close(io, reason, true));
        };
        self.count_failure(connection, address, reason);
        if reason == CloseReason::DeniedByPeer {
            // Nothing of what the client said has gone anywhere, so it can still be told.
            connection.facts.reason = reason;
            return self.turn_away(connection, reason);
        }
        self.dial_next_endpoint(connection, reason)
    }

    fn count_failure(&mut self, connection: &Connection, address: SocketAddr, reason: CloseReason) {
        let now = self.ring.now();
        let listener = self.listener_mut(connection);
        let Some(balancer) = listener.role.balancer_mut() else { return };
        balancer.closed(address);
        // A denial is the peer's policy, not its health.
        let ejected = (reason != CloseReason::DeniedByPeer).then(|| balancer.failed(address, now)).flatten();
        if let Some(duration) = ejected {
            let upstream = Arc::clone(&balancer.upstream().name);
            listener.cells.ejections.add(1);
            self.telemetry.send(Event::Ejected { upstream, endpoint: address, duration });
        }
    }

    fn endpoint_ready(&mut self, connection: &mut Connection) -> Next {
        if let (Some(address), Some(balancer)) = (connection.endpoint, self.listener_mut(connection).role.balancer_mut()) {
            balancer.succeeded(address);
        }
        // What failed before was not the end of it: `attempts` tells of it.
        connection.facts.detail = None;
        connection.tried = Vec::new();
        // A connection that lives for days must not keep the key of a certificate that has long been replaced.
        connection.identity = None;
        self.relay(connection)
    }

    /// Ends a connection for a reason that this worker found.
    pub(super) fn end(&mut self, connection: &mut Connection, reason: CloseReason, detail: &str) -> Next {
        connection.facts.detail = Some(detail.into());
        self.with_io(connection, |connection, io| connection.close(io, reason, true))
    }

    /// Everything is given back: tells the story and frees the place.
    fn finish(&mut self, mut connection: Box<Connection>) {
        self.count_held(&mut connection);
        if connection.facts.reason == CloseReason::DeniedByPeer && connection.facts.denial.is_none() {
            connection.facts.denial = Some(self.next_denial());
        }
        let Connection { slot, listener: index, accepted, endpoint, mut facts, left_gate, far_open, .. } = *connection;
        facts.total = self.ring.now() - accepted;
        if let Some(listener) = &mut self.listeners[index as usize] {
            listener.live -= 1;
            if !left_gate {
                listener.gate.leave();
            }
            match listener.role {
                // What it hands on counts there.
                Role::Router(_) => listener.cells.connections.add(1),
                _ => listener.cells.active.sub(1),
            }
            if far_open {
                listener.cells.far_active.sub(1);
            }
            listener.cells.closed[facts.reason as usize].add(1);
            if let (Some(address), Some(balancer)) = (endpoint, listener.role.balancer_mut()) {
                balancer.closed(address);
            }
        }
        self.telemetry.send(Event::Connection(facts));
        self.connections.release(slot);
        self.close_if_removed(index);
    }

    pub(super) fn listener(&self, connection: &Connection) -> &super::Listener {
        self.listeners[connection.listener as usize].as_ref().expect("a listener's place is kept while its connections live")
    }

    fn listener_mut(&mut self, connection: &Connection) -> &mut super::Listener {
        self.listeners[connection.listener as usize].as_mut().expect("a listener's place is kept while its connections live")
    }

    pub(super) fn service(&self, connection: &Connection) -> Arc<Service> {
        Arc::clone(&self.listener(connection).service)
    }
}

/// Says what there would be to dial, for the log.
fn no_endpoint(upstream: &crate::mesh::Upstream) -> Box<str> {
    let endpoints = || upstream.targets.iter().flat_map(|target| target.endpoints.iter());
    match (endpoints().count(), endpoints().filter(|endpoint| endpoint.healthy).count()) {
        (0, _) => "Consul knows no instance of the upstream".into(),
        (known, 0) => format!("none of {known} known instances is healthy in Consul").into(),
        (known, healthy) => {
            format!("{healthy} of {known} known instances are healthy in Consul, but ejected here after failed connects").into()
        }
    }
}
