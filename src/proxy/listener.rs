//! Listeners of one worker: what is bound, what is accepted, and the counts that span workers.
//!
//! Invariant: a listener that a new snapshot still has keeps its socket; one that it lacks stops accepting at once and goes
//! away with its last connection. Limits over all workers are exact: one shared counter a listener, touched only at
//! accept and close.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;

use super::upstream::Balancer;
use crate::config::{DataPlane, UPSTREAM_CONNECTIONS_MAX};
use crate::mesh::{Bind, PublicListener, Service, Snapshot};
use crate::ring::{Local, Socket};
use crate::telemetry::cells::{Direction, ListenerCells};

/// What a listener leads to.
#[derive(Debug)]
pub(super) enum Role {
    /// Mutual TLS in, the app behind.
    Public(Arc<PublicListener>),
    /// Plain in, an upstream behind.
    Upstream(Balancer),
    /// Plain in, redirected: handed on to the listener of the upstream that its destination stands for.
    Redirect,
    /// Plain in, at an address that was leased to a task: handed on to the upstream of the lease.
    Lease,
}

/// One listener of one worker.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) generation: u32,
    pub(super) bind: Bind,
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
}

/// What identifies a listener across snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) bind: Bind,
    pub(super) proxy_id: Arc<str>,
    pub(super) upstream: Option<Arc<str>>,
}

/// A listener that a snapshot wants.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) key: Key,
    pub(super) service: Arc<Service>,
    pub(super) place: Place,
}

/// Which part of its service a wanted listener is.
#[derive(Debug)]
pub(super) enum Place {
    Public(Arc<PublicListener>),
    Upstream(Arc<crate::mesh::Upstream>),
    Redirect,
    Lease,
}

/// Every listener that `snapshot` has, and those that lead to upstreams by other ways, which are `redirect`'s.
pub(super) fn wanted(snapshot: &Snapshot, plane: &DataPlane, redirect: &Arc<Service>) -> Vec<Wanted> {
    let mut all = Vec::new();
    if let Some(port) = plane.lease_port {
        let bind = Bind::Tcp((Ipv4Addr::UNSPECIFIED, port).into());
        let key = Key { bind, proxy_id: Arc::clone(&redirect.proxy_id), upstream: None };
        all.push(Wanted { key, service: Arc::clone(redirect), place: Place::Lease });
    }
    for address in &plane.redirects {
        let key = Key { bind: Bind::Tcp(*address), proxy_id: Arc::clone(&redirect.proxy_id), upstream: None };
        all.push(Wanted { key, service: Arc::clone(redirect), place: Place::Redirect });
    }
    for service in &snapshot.services {
        if let Some(public) = &service.public {
            let key = Key { bind: public.bind.clone(), proxy_id: Arc::clone(&service.proxy_id), upstream: None };
            all.push(Wanted { key, service: Arc::clone(service), place: Place::Public(Arc::clone(public)) });
        }
        for upstream in &service.upstreams {
            let key = Key {
                bind: upstream.bind.clone(),
                proxy_id: Arc::clone(&service.proxy_id),
                upstream: Some(Arc::clone(&upstream.name)),
            };
            all.push(Wanted { key, service: Arc::clone(service), place: Place::Upstream(Arc::clone(upstream)) });
        }
    }
    all
}

impl Listener {
    pub(super) fn new(generation: u32, wanted: Wanted, gate: Arc<Gate>, seed: u64) -> Self {
        let Wanted { key, service, place } = wanted;
        let (direction, role) = match place {
            Place::Public(public) => (Direction::Inbound, Role::Public(public)),
            Place::Upstream(upstream) => (Direction::Outbound, Role::Upstream(Balancer::new(upstream, seed))),
            Place::Redirect => (Direction::Outbound, Role::Redirect),
            Place::Lease => (Direction::Outbound, Role::Lease),
        };
        let cells = Arc::new(ListenerCells::new(direction, Arc::clone(&service.name), key.upstream));
        Self {
            generation,
            bind: key.bind,
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
        }
    }

    pub(super) fn key(&self) -> Key {
        Key { bind: self.bind.clone(), proxy_id: Arc::clone(&self.service.proxy_id), upstream: self.cells.upstream.clone() }
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
        match (&mut self.role, wanted.place) {
            (Role::Public(public), Place::Public(next)) => *public = next,
            (Role::Upstream(balancer), Place::Upstream(next)) => {
                if !Arc::ptr_eq(balancer.upstream(), &next) {
                    balancer.update(next);
                }
            }
            // The key tells the two apart.
            (Role::Public(_) | Role::Upstream(_) | Role::Redirect | Role::Lease, _) => {}
        }
    }

    /// Most connections at once over all workers; `None` is unlimited.
    pub(super) fn connections_max(&self) -> Option<u32> {
        match &self.role {
            Role::Public(public) => (public.max_inbound_connections > 0).then_some(public.max_inbound_connections),
            Role::Upstream(balancer) => Some(balancer.upstream().max_connections.unwrap_or(UPSTREAM_CONNECTIONS_MAX)),
            Role::Redirect | Role::Lease => None,
        }
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
        let key = Key { bind: Bind::Tcp("127.0.0.1:1".parse().expect("address")), proxy_id: "p".into(), upstream: None };
        assert!(Arc::ptr_eq(&gates.gate(&key), &gates.gate(&key)));
    }

    #[test]
    fn workers_that_come_at_the_same_time_find_the_same_gates() {
        let key = |port: u16| Key { bind: Bind::Tcp(([127, 0, 0, 1], port).into()), proxy_id: "p".into(), upstream: None };
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
