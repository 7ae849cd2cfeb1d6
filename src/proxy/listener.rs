//! Listeners of one worker: what is bound, what is accepted, and the counts that span workers.
//!
//! A router's routes stand here too, each as a listener without a socket, so that each has its own counters, limits and endpoints.
//!
//! Invariant: a listener that a new snapshot still has keeps its socket; one that it lacks stops accepting at once and goes
//! away with its last connection. Limits over all workers are exact: one shared counter a listener, touched only at
//! accept and close.

mod wanted;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

pub(super) use self::wanted::{Place, Wanted, key_of, service_of, wanted};
use super::upstream::Balancer;
use crate::config::UPSTREAM_CONNECTIONS_MAX;
use crate::mesh::router::{Original, Route, Router, Way};
use crate::mesh::{Bind, PublicListener, Service, Snapshot};
use crate::ring::{Local, Socket};
use crate::telemetry::cells::{Direction, ListenerCells};

/// What a listener leads to.
#[derive(Debug)]
pub(super) enum Role {
    /// Mutual TLS in, the app behind.
    Public {
        public: Arc<PublicListener>,
        /// The endpoints to choose from, instead of `public.app`.
        app: Option<Balancer>,
    },
    /// Plain in, or TLS of clients outside of the mesh, an upstream behind.
    Upstream(Balancer),
    /// Told apart, then handed on to one of its routes.
    Router(Routing),
    /// Bytes go as they are to an endpoint of a cluster.
    Forward(Balancer),
    /// Bytes go as they are to where the connection was redirected from.
    Original(Original),
    /// Plain in, redirected: handed on to the listener of the upstream that its destination stands for.
    Redirect,
    /// Plain in, at an address that was leased to a task: handed on to the upstream of the lease.
    Lease,
}

/// A router and where its routes stand among the worker's listeners, in their order.
#[derive(Debug)]
pub(super) struct Routing {
    pub(super) router: Arc<Router>,
    pub(super) places: Vec<Option<u32>>,
}

/// One listener of one worker.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) generation: u32,
    pub(super) bind: Bind,
    pub(super) part: Part,
    pub(super) service: Arc<Service>,
    pub(super) role: Role,
    pub(super) cells: Arc<ListenerCells>,
    pub(super) gate: Arc<Gate>,
    pub(super) socket: Option<Socket>,
    /// An accept is armed or being cancelled.
    pub(super) accepting: bool,
    pub(super) cancelling: bool,
    /// When to try to bind or accept again.
    pub(super) retry_at: Option<Instant>,
    /// The last bind failure was told already.
    pub(super) failure_told: bool,
    /// The admin thread was told that it is bound.
    pub(super) announced: bool,
    /// Connections that came through it and live.
    pub(super) live: u32,
    /// The snapshot has it no more, or the process drains.
    pub(super) removed: bool,
    /// The router whose route it is, while that has it or connections that may yet take it.
    pub(super) router: Option<u32>,
    /// Its route is gone and its router is not: connections that took it live on.
    pub(super) outlived: bool,
    /// Closed on purpose (`/drain_listeners`): its connections end when they are done.
    pub(super) spared: bool,
}

/// What identifies a listener across snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) bind: Bind,
    pub(super) proxy_id: Arc<str>,
    pub(super) part: Part,
}

/// Which listener of its proxy it is, and of what kind: a route that leads another way than before is another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Part {
    Public,
    Upstream(Arc<str>),
    Redirect,
    Lease,
    Router(Arc<str>),
    /// A route that forwards, by its name; so with the others.
    Forward(Arc<str>),
    Terminate(Arc<str>),
    Originate(Arc<str>),
    Original(Arc<str>),
}

impl Part {
    fn of(route: &Route) -> Self {
        let name = Arc::clone(&route.name);
        match &route.way {
            Way::Forward(_) => Self::Forward(name),
            Way::Terminate { .. } => Self::Terminate(name),
            Way::Originate { .. } => Self::Originate(name),
            Way::Original(_) => Self::Original(name),
        }
    }

    /// Whether it is a route, which has no socket of its own.
    pub(super) fn is_route(&self) -> bool {
        match self {
            Self::Forward(_) | Self::Terminate(_) | Self::Originate(_) | Self::Original(_) => true,
            Self::Public | Self::Upstream(_) | Self::Redirect | Self::Lease | Self::Router(_) => false,
        }
    }

    /// What stands as the upstream in logs and metrics. An inbound route counts for its service, as a public listener does.
    fn upstream(&self) -> Option<&Arc<str>> {
        match self {
            Self::Public | Self::Redirect | Self::Lease | Self::Terminate(_) => None,
            Self::Upstream(name) | Self::Router(name) | Self::Forward(name) | Self::Originate(name) | Self::Original(name) => {
                Some(name)
            }
        }
    }
}

impl Role {
    fn new(place: Place, seed: u64) -> Self {
        match place {
            Place::Public(public) => Self::Public { public, app: None },
            Place::Upstream(upstream) => Self::Upstream(Balancer::new(upstream, seed)),
            Place::Redirect => Self::Redirect,
            Place::Lease => Self::Lease,
            Place::Router(router) => Self::Router(Routing { router, places: Vec::new() }),
            Place::Route(route) => match &route.way {
                Way::Forward(cluster) => Self::Forward(Balancer::new(Arc::clone(cluster), seed)),
                Way::Terminate { service, app } => Self::Public {
                    public: Arc::clone(service.public.as_ref().expect("a router is made only of routes with an app")),
                    app: app.as_ref().map(|app| Balancer::new(Arc::clone(app), seed)),
                },
                Way::Originate { upstream, .. } => Self::Upstream(Balancer::new(Arc::clone(upstream), seed)),
                Way::Original(original) => Self::Original(*original),
            },
        }
    }

    fn direction(&self) -> Direction {
        match self {
            Self::Public { .. } => Direction::Inbound,
            Self::Upstream(_) | Self::Router(_) | Self::Forward(_) | Self::Original(_) | Self::Redirect | Self::Lease => {
                Direction::Outbound
            }
        }
    }

    /// The endpoints behind it, if it chooses among some.
    pub(super) fn balancer(&self) -> Option<&Balancer> {
        match self {
            Self::Upstream(balancer) | Self::Forward(balancer) => Some(balancer),
            Self::Public { app, .. } => app.as_ref(),
            Self::Router(_) | Self::Original(_) | Self::Redirect | Self::Lease => None,
        }
    }

    /// The same, to choose one.
    pub(super) fn balancer_mut(&mut self) -> Option<&mut Balancer> {
        match self {
            Self::Upstream(balancer) | Self::Forward(balancer) => Some(balancer),
            Self::Public { app, .. } => app.as_mut(),
            Self::Router(_) | Self::Original(_) | Self::Redirect | Self::Lease => None,
        }
    }

    fn update(&mut self, place: Place, seed: u64) {
        match (self, place) {
            (Self::Public { public, .. }, Place::Public(next)) => *public = next,
            (Self::Upstream(balancer), Place::Upstream(next)) => balancer.adopt(next),
            (Self::Router(routing), Place::Router(next)) => routing.router = next,
            (role, Place::Route(route)) => match (role, &route.way) {
                (Self::Forward(balancer), Way::Forward(next)) => balancer.adopt(Arc::clone(next)),
                (Self::Upstream(balancer), Way::Originate { upstream, .. }) => balancer.adopt(Arc::clone(upstream)),
                (Self::Original(original), Way::Original(next)) => *original = *next,
                (Self::Public { public, app }, Way::Terminate { service, app: next }) => {
                    if let Some(next) = &service.public {
                        *public = Arc::clone(next);
                    }
                    match (app, next) {
                        (Some(balancer), Some(next)) => balancer.adopt(Arc::clone(next)),
                        (app, next) => *app = next.as_ref().map(|next| Balancer::new(Arc::clone(next), seed)),
                    }
                }
                // The key tells the ways apart.
                (_, Way::Forward(_) | Way::Terminate { .. } | Way::Originate { .. } | Way::Original(_)) => {}
            },
            // The key tells the parts apart.
            (_, Place::Public(_) | Place::Upstream(_) | Place::Redirect | Place::Lease | Place::Router(_)) => {}
        }
    }

    /// How long its connections may move no byte.
    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        match self {
            Self::Public { public, .. } => public.idle_timeout,
            Self::Upstream(balancer) | Self::Forward(balancer) => balancer.upstream().idle_timeout,
            Self::Original(original) => original.idle_timeout,
            Self::Router(_) | Self::Redirect | Self::Lease => None,
        }
    }

    /// Most connections at once over all workers; `None` is unlimited.
    fn connections_max(&self) -> Option<u32> {
        let of = |max: Option<u32>| max.unwrap_or(UPSTREAM_CONNECTIONS_MAX);
        match self {
            Self::Public { public, app } => {
                let inbound = (public.max_inbound_connections > 0).then_some(public.max_inbound_connections);
                let cluster = app.as_ref().map(|app| of(app.upstream().max_connections));
                inbound.into_iter().chain(cluster).min()
            }
            Self::Upstream(balancer) | Self::Forward(balancer) => Some(of(balancer.upstream().max_connections)),
            Self::Original(original) => Some(of(original.max_connections)),
            Self::Router(_) | Self::Redirect | Self::Lease => None,
        }
    }
}

impl Listener {
    pub(super) fn new(generation: u32, wanted: Wanted, gate: Arc<Gate>, seed: u64) -> Self {
        let Wanted { key, service, place } = wanted;
        let role = Role::new(place, seed);
        let cells = Arc::new(ListenerCells::new(role.direction(), Arc::clone(&service.name), key.part.upstream().cloned()));
        Self {
            generation,
            bind: key.bind,
            part: key.part,
            service,
            role,
            cells,
            gate,
            socket: None,
            accepting: false,
            cancelling: false,
            retry_at: None,
            failure_told: false,
            announced: false,
            live: 0,
            removed: false,
            router: None,
            outlived: false,
            spared: false,
        }
    }

    pub(super) fn key(&self) -> Key {
        Key { bind: self.bind.clone(), proxy_id: Arc::clone(&self.service.proxy_id), part: self.part.clone() }
    }

    /// Takes over the newest state of its service.
    pub(super) fn adopt(&mut self, service: &Arc<Service>, snapshot: &Snapshot) {
        if let Role::Upstream(balancer) = &mut self.role {
            balancer.keep_dialers(|identity| {
                let granted = identity.svid.id.service_name().and_then(|name| snapshot.identities.get(&name.service));
                [service.identity.as_ref(), granted].into_iter().flatten().any(|current| Arc::ptr_eq(current, identity))
            });
        }
        self.service = Arc::clone(service);
    }

    /// Takes over what a new snapshot says of it. The socket stays.
    pub(super) fn update(&mut self, wanted: Wanted) {
        self.role.update(wanted.place, u64::from(self.generation));
    }

    /// Whether its connections are to end within the drain time.
    pub(super) fn drains(&self) -> bool {
        self.removed && !self.outlived && !self.spared
    }

    /// Most connections at once over all workers; `None` is unlimited.
    pub(super) fn connections_max(&self) -> Option<u32> {
        self.role.connections_max()
    }

    /// Where to listen, or `None` when this worker must wait (the first worker binds first) or need not (a unix socket
    /// cannot be shared by `SO_REUSEPORT`; the first worker serves it).
    pub(super) fn local(&self, worker: usize) -> Option<Local> {
        match &self.bind {
            Bind::Tcp(_) if worker > 0 && !self.gate.bound.load(Ordering::Acquire) => None,
            Bind::Tcp(address) => {
                // A socket of another worker that has not yet seen the listener go is no stranger.
                let exclusive = worker == 0 && self.gate.holders.load(Ordering::Acquire) == 0;
                if matches!(self.role, Role::Lease) {
                    return Some(Local::Loopback { port: address.port(), exclusive });
                }
                Some(Local::Tcp { address: *address, exclusive })
            }
            Bind::Unix { .. } if worker > 0 => None,
            Bind::Unix { path, mode } => Some(Local::Unix { path: path.clone(), mode: *mode }),
        }
    }
}

/// What workers share about one listener.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// The first worker has the address, so the others may join it. Only the first worker writes it.
    pub(super) bound: AtomicBool,
    /// Workers that have a socket on it.
    pub(super) holders: AtomicU32,
    connections: AtomicU32,
}

impl Gate {
    /// Counts one connection in, unless `max` are there already.
    pub(super) fn enter(&self, max: Option<u32>) -> bool {
        let before = self.connections.fetch_add(1, Ordering::AcqRel);
        if max.is_some_and(|max| before >= max) {
            self.leave();
            return false;
        }
        true
    }

    /// Counts one out.
    pub(super) fn leave(&self) {
        self.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The gates of all listeners, found by key. Looked up only when a listener appears.
#[derive(Debug, Default)]
pub(super) struct Gates(ArcSwap<HashMap<Key, Arc<Gate>>>);

impl Gates {
    /// The one gate of `key`, which whoever asks for it holds from before it is in the map: so nobody's clearing up can take it
    /// away between the two.
    pub(super) fn gate(&self, key: &Key) -> Arc<Gate> {
        let fresh = Arc::<Gate>::default();
        loop {
            if let Some(gate) = self.0.load().get(key) {
                return Arc::clone(gate);
            }
            self.0.rcu(|gates| {
                let mut gates = HashMap::clone(gates);
                // Held by the old map and this clone alone: no listener has it any more.
                gates.retain(|_, gate| Arc::strong_count(gate) > 2);
                gates.entry(key.clone()).or_insert_with(|| Arc::clone(&fresh));
                gates
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_counts_exactly_over_threads() {
        let gate = Arc::new(Gate::default());
        let entered: u32 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let gate = Arc::clone(&gate);
                    scope.spawn(move || (0..100).filter(|_| gate.enter(Some(150))).count() as u32)
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("thread")).sum()
        });
        assert_eq!(entered, 150);
        gate.leave();
        assert!(gate.enter(Some(150)) && !gate.enter(Some(150)));
        assert!(!Gate::default().enter(Some(0)), "zero blocks all");
    }

    #[test]
    fn workers_find_the_same_gate() {
        let gates = Gates::default();
        let key = Key { bind: Bind::Tcp("127.0.0.1:1".parse().expect("address")), proxy_id: "p".into(), part: Part::Public };
        assert!(Arc::ptr_eq(&gates.gate(&key), &gates.gate(&key)));
    }

    #[test]
    fn workers_that_come_at_the_same_time_find_the_same_gates() {
        let key = |port: u16| Key { bind: Bind::Tcp(([127, 0, 0, 1], port).into()), proxy_id: "p".into(), part: Part::Public };
        for _ in 0..200 {
            let (gates, arrived) = (Gates::default(), AtomicU32::new(0));
            let found: Vec<Vec<Arc<Gate>>> = std::thread::scope(|scope| {
                let worker = || {
                    arrived.fetch_add(1, Ordering::AcqRel);
                    while arrived.load(Ordering::Acquire) < 4 {
                        std::hint::spin_loop();
                    }
                    (1..=4).map(|port| gates.gate(&key(port))).collect()
                };
                let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
                workers.into_iter().map(|worker| worker.join().expect("thread")).collect()
            });
            for (of_one, of_other) in found.iter().flat_map(|one| one.iter().zip(&found[0])) {
                assert!(Arc::ptr_eq(of_one, of_other));
            }
        }
    }
}
