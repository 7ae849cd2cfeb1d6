//! Hands connections of routers on to their routes, at once or after a look at their first bytes.
//!
//! Invariant: a connection counts for the router only when it ends there, and from then on for its route: opened is closed and
//! active for each. A route that a new snapshot lacks takes nobody on; those who took it live on while the router does, unless
//! TLS ends there: then its intentions went with it, and they are drained.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Worker, slot_of};
use crate::mesh::router::{Router, Seen};
use crate::proxy::connection::{Connection, MESH, Next, PLAIN, Stage};
use crate::proxy::inspect::Patience;
use crate::proxy::limits::BIND_RETRY;
use crate::proxy::listener::{self, Key, Listener, Part, Role, Routing};
use crate::ring::{Ring, Socket};
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::{AccessFacts, ConnectionRecord, Event};

impl<R: Ring> Worker<R> {
    /// A connection came in at a router.
    pub(super) fn on_routed(&mut self, index: u32, socket: Socket) {
        let Some(router) = self.router(index) else { return self.ring.close(socket, true) };
        let settings = router.settings();
        let original = settings.transparent.then(|| self.ring.original_destination(socket)).flatten();
        if router.inspects() {
            return self.inspect(index, socket, original, &router);
        }
        let destination = original.or_else(|| self.ring.local_address(socket));
        match self.place(index, &router, &Seen { destination, ..Seen::default() }) {
            Some(route) => self.admit(route, socket, |facts| facts.original = original),
            None => self.refuse_unrouted(index, socket, original, no_route(&router, destination, None)),
        }
    }

    /// Begins a connection that belongs to the router until its first bytes are here.
    fn inspect(&mut self, index: u32, socket: Socket, original: Option<SocketAddr>, router: &Router) {
        let now = self.now();
        let full = self.connections.live() >= self.plane.connections_max;
        let busy = self.handshakes >= self.plane.handshakes_max;
        let Some(Some(listener)) = self.listeners.get_mut(index as usize) else { return };
        let open = !listener.removed || self.orders.handed_over.load(Ordering::Acquire);
        let mut facts = Box::new(ConnectionRecord::new(&listener.cells, self.ring.peer_address(socket)));
        facts.original = original;
        if self.telemetry.cells.access_facts.is_set() {
            let downstream_local = self.ring.local_address(socket);
            facts.access = Some(Box::new(AccessFacts { downstream_local, ..AccessFacts::default() }));
        }
        listener.live += 1;
        let (slot, generation) = self.connections.reserve();
        let mut connection = Box::new(Connection::new(slot, generation, index, socket, facts, now));
        // A router has no limit of its own: its routes have.
        connection.left_gate = true;
        let next = match (open, full, busy) {
            (false, _, _) => self.end(&mut connection, CloseReason::Drained, "the listener is closing"),
            (_, true, _) => self.end(&mut connection, CloseReason::Limit, "this worker carries as many connections as it may"),
            (_, _, true) => self.end(&mut connection, CloseReason::Limit, "too many handshakes at once"),
            (true, false, false) => {
                let settings = router.settings();
                let patience = Patience { timeout: settings.inspect_timeout, silent_is_raw: settings.silent_is_raw };
                self.with_io(&mut connection, |connection, io| connection.start_inspecting(io, patience))
            }
        };
        self.drive(connection, next);
    }

    /// The first bytes are here.
    pub(super) fn route_inspected(&mut self, connection: &mut Connection, tls: bool) -> Next {
        // As one just accepted: nothing is pending, and it waits for no bytes that a bound is on.
        self.with_io(connection, |connection, _| connection.stage = Stage::Held);
        let Some(router) = self.router(connection.listener) else {
            return self.end(connection, CloseReason::Drained, "the router is gone");
        };
        if let Some(access) = &mut connection.facts.access {
            access.server_name.clone_from(&connection.facts.server_name);
        }
        let socket = connection.legs[PLAIN].socket;
        let destination = connection.facts.original.or_else(|| self.ring.local_address(socket?));
        let server_name = connection.facts.server_name.as_deref();
        let place = self.place(connection.listener, &router, &Seen { destination, server_name, tls });
        match place {
            Some(route) => self.hand_on(connection, route),
            None => {
                let why = no_route(&router, destination, Some((tls, server_name)));
                self.end(connection, CloseReason::NoRoute, &why)
            }
        }
    }

    /// Makes an inspected connection one of its route's.
    fn hand_on(&mut self, connection: &mut Connection, route: u32) -> Next {
        let router = std::mem::replace(&mut connection.listener, route);
        let Some(Some(listener)) = self.listeners.get_mut(route as usize) else {
            connection.listener = router;
            return self.end(connection, CloseReason::Drained, "the route is gone");
        };
        let admitted = listener.gate.enter(listener.connections_max());
        listener.live += 1;
        listener.cells.connections.add(1);
        listener.cells.active.add(1);
        connection.left_gate = !admitted;
        connection.direction = listener.cells.direction;
        connection.facts.direction = listener.cells.direction;
        connection.facts.service = Arc::clone(&listener.cells.service);
        connection.facts.upstream.clone_from(&listener.cells.upstream);
        if connection.direction == Direction::Inbound {
            connection.legs.swap(PLAIN, MESH);
        }
        if let Some(Some(before)) = self.listeners.get_mut(router as usize) {
            before.live -= 1;
        }
        self.close_if_removed(router);
        if !admitted {
            return self.end(connection, CloseReason::Limit, "max connections reached");
        }
        self.begin(connection)
    }

    fn router(&self, index: u32) -> Option<Arc<Router>> {
        match &self.listeners.get(index as usize)?.as_ref()?.role {
            Role::Router(Routing { router, .. }) => Some(Arc::clone(router)),
            _ => None,
        }
    }

    /// Where the route stands that a connection of the router at `index` takes.
    fn place(&self, index: u32, router: &Router, seen: &Seen<'_>) -> Option<u32> {
        let Some(Some(Listener { role: Role::Router(routing), .. })) = self.listeners.get(index as usize) else { return None };
        routing.places.get(router.route(seen)?).copied().flatten()
    }

    /// After a new snapshot: finds each router's routes, and lets go of those that went.
    pub(super) fn link_routes(&mut self) {
        let is_router = |listener: &Listener| matches!(listener.role, Role::Router(_));
        if !self.listeners.iter().flatten().any(|listener| is_router(listener) || listener.part.is_route()) {
            return;
        }
        let current =
            self.listeners.iter().enumerate().filter_map(|(index, listener)| Some((slot_of(index), listener.as_ref()?)));
        let current = current.filter(|(_, listener)| !listener.removed);
        let (routers, routes): (Vec<_>, Vec<_>) = current.partition(|(_, listener)| is_router(listener));
        let routes: HashMap<Key, u32> = routes
            .into_iter()
            .filter(|(_, listener)| listener.part.is_route())
            .map(|(index, listener)| (listener.key(), index))
            .collect();
        let routers: Vec<u32> = routers.into_iter().map(|(index, _)| index).collect();
        let mut of: HashMap<u32, u32> = HashMap::new();
        for index in routers {
            let Some(Some(Listener { role: Role::Router(routing), .. })) = self.listeners.get_mut(index as usize) else {
                continue;
            };
            let router = Arc::clone(&routing.router);
            routing.places = router.routes().map(|route| routes.get(&listener::key_of(&router, route)).copied()).collect();
            of.extend(routing.places.iter().flatten().map(|route| (*route, index)));
        }
        self.let_go_of_routes(&of);
        let now = self.now();
        of.into_values().collect::<std::collections::HashSet<_>>().into_iter().for_each(|router| {
            self.announce_routes(router as usize, now);
        });
    }

    /// `of` says whose each route is now.
    fn let_go_of_routes(&mut self, of: &HashMap<u32, u32>) {
        let standing = |listener: &Listener, listeners: &[Option<Listener>]| {
            let raw = matches!(listener.part, Part::Forward(_) | Part::Original(_));
            let same = |other: &Listener| match &other.role {
                // Where intentions are enforced now, what passed them by in permissive mode does not live on for ever.
                Role::Router(routing) => other.bind == listener.bind && !other.removed && !(raw && routing.router.enforces()),
                _ => false,
            };
            listeners.iter().flatten().any(same)
        };
        for index in 0..self.listeners.len() {
            let Some(listener) = &self.listeners[index] else { continue };
            if !listener.part.is_route() {
                continue;
            }
            let router = of.get(&slot_of(index)).copied();
            let ends_tls = matches!(listener.part, Part::Terminate(_));
            let outlived = listener.removed && !ends_tls && standing(listener, &self.listeners);
            if let Some(listener) = &mut self.listeners[index] {
                listener.router = router;
                listener.outlived = outlived;
            }
            if router.is_none() {
                self.close_if_removed(slot_of(index));
            }
        }
    }

    /// Tells whose counters a bound router's routes are.
    pub(super) fn announce_routes(&mut self, index: usize, now: Instant) {
        let places = match &self.listeners[index] {
            Some(Listener { role: Role::Router(routing), socket: Some(_), .. }) => routing.places.clone(),
            _ => return,
        };
        for place in places.into_iter().flatten() {
            let Some(Some(route)) = self.listeners.get_mut(place as usize) else { continue };
            if !route.announced {
                route.announced = self.telemetry.send(Event::RouteUp { cells: Arc::clone(&route.cells) });
                if !route.announced {
                    self.announce_again(index, now);
                    return;
                }
            }
        }
    }

    fn announce_again(&mut self, index: usize, now: Instant) {
        if let Some(router) = &mut self.listeners[index] {
            router.retry_at = Some(now + BIND_RETRY);
        }
        self.wake_listeners_at(now + BIND_RETRY);
    }

    /// Whether a connection that its router is looking at may still be handed on to it.
    pub(super) fn may_yet_be_taken(&self, index: u32) -> bool {
        let router = self.listeners.get(index as usize).and_then(|listener| listener.as_ref()?.router);
        router.is_some_and(|router| matches!(self.listeners.get(router as usize), Some(Some(_))))
    }

    /// The router at `index` is gone, and with it whoever could have taken its routes.
    pub(super) fn close_routes_of(&mut self, index: u32) {
        for at in 0..self.listeners.len() {
            let Some(route) = self.listeners[at].as_mut().filter(|listener| listener.router == Some(index)) else { continue };
            route.router = None;
            self.close_if_removed(slot_of(at));
        }
    }
}

/// Says what did not match, for the log.
fn no_route(router: &Router, destination: Option<SocketAddr>, first: Option<(bool, Option<&str>)>) -> String {
    let to = destination.map_or_else(String::new, |destination| format!(" to {destination}"));
    let said = match first {
        None => String::new(),
        Some((false, _)) => " without TLS".to_owned(),
        Some((true, None)) => " with TLS and no server name".to_owned(),
        Some((true, Some(name))) => format!(" for server name {name:?}"),
    };
    format!("no route of {} matches a connection{to}{said}", router.settings().name)
}
