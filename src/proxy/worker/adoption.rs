//! What a new snapshot changes on a worker: listeners come, stay or go; held connections start; live ones are judged again.
//!
//! Invariant: a connection that is still allowed never notices a new snapshot, whatever else is in it.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::connection::{Connection, Next, Stage};
use super::super::limits::SWEEP_PER_TURN_MAX;
use super::super::listener::{self, Key, Listener, Wanted};
use super::{Order, Worker};
use crate::identity::SpiffeId;
use crate::mesh::Bind;
use crate::policy::{Authorized, Denied, Subject};
use crate::ring::Ring;
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::{Decision, Event};

impl<R: Ring> Worker<R> {
    /// Takes the newest snapshot, if there is one: one load of an unchanged line when there is none.
    pub(super) fn adopt_snapshot(&mut self) {
        if self.order == Order::Stop || self.reader.refresh().is_none() {
            return;
        }
        let snapshot = Arc::clone(self.reader.current());
        let mut wanted: HashMap<Key, Wanted> = listener::wanted(&snapshot, &self.plane, &self.redirect)
            .into_iter()
            .map(|wanted| (wanted.key.clone(), wanted))
            .collect();
        let mut policy_changed = false;
        for index in 0..self.listeners.len() {
            let Some(listener) = self.listeners[index].as_mut() else { continue };
            let found = wanted.remove(&listener.key());
            // Also of a listener that goes: its last connections are judged by what is in force.
            if let Some(service) = listener::service_of(listener, found.as_ref(), &snapshot) {
                policy_changed |= !Arc::ptr_eq(&listener.service.intentions, &service.intentions);
                listener.adopt(&service, &snapshot);
            }
            match found {
                Some(wanted) if !listener.removed => listener.update(wanted),
                Some(again) => {
                    wanted.insert(again.key.clone(), again);
                }
                None => self.remove_listener(index),
            }
        }
        if self.order == Order::Run {
            for (_, wanted) in wanted {
                if !self.orders.closed(wanted.place.direction()) {
                    self.add_listener(wanted);
                }
            }
            self.link_routes();
            self.drop_connections_of_removed_listeners();
        }
        self.start_held();
        if policy_changed || self.sweep.is_some() {
            // A sweep under way starts over: what it has judged was judged by an older set.
            self.sweep = Some(0);
        } else {
            self.acknowledge();
        }
    }

    /// A worker has one line a generation: when nothing older decides anything here.
    fn acknowledge(&mut self) {
        self.reader.acknowledge();
        let generation = self.reader.current().generation;
        self.telemetry.cells.generation.set(generation);
        self.telemetry.send(Event::Adopted { worker: self.index, generation });
    }

    fn add_listener(&mut self, wanted: Wanted) {
        self.listener_generation = self.listener_generation.wrapping_add(1);
        let gate = self.gates.gate(&wanted.key);
        let seed = u64::from(self.listener_generation) << 32 | self.index as u64;
        let mut listener = Listener::new(self.listener_generation, wanted, gate, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if !listener.part.is_route() {
            listener.retry_at = Some(self.ring.now());
            self.wake_listeners_at(self.ring.now());
        }
        match self.listeners.iter().position(Option::is_none) {
            Some(index) => self.listeners[index] = Some(listener),
            None => self.listeners.push(Some(listener)),
        }
    }

    /// Connections of a listener that went away get the drain time, as at the end of the process.
    fn drop_connections_of_removed_listeners(&mut self) {
        let removed = self.listeners.iter().flatten().any(|listener| listener.drains() && listener.live > 0);
        if !removed {
            return;
        }
        let deadline = self.ring.now() + self.plane.drain_time;
        for slot in 0..self.connections.slots() {
            let Some(mut connection) = self.connections.take_any(slot) else { continue };
            if self.listener(&connection).drains() && connection.stage == Stage::Relay {
                connection.must_end_by(deadline);
            }
            self.drive(connection, Next::Wait);
        }
    }

    fn start_held(&mut self) {
        if self.held == 0 {
            return;
        }
        for slot in 0..self.connections.slots() {
            let Some(connection) = self.connections.take_any(slot) else { continue };
            if connection.stage == Stage::Held {
                self.start(connection);
            } else {
                self.connections.put(connection);
            }
        }
    }

    /// Judges live inbound connections again after an intention change, a bounded number a turn.
    pub(super) fn sweep_authorisations(&mut self) {
        let Some(from) = self.sweep else { return };
        let to = from.saturating_add(SWEEP_PER_TURN_MAX as u32).min(self.connections.slots());
        for slot in from..to {
            let Some(connection) = self.connections.take_any(slot) else { continue };
            self.judge_again(connection);
        }
        self.sweep = (to < self.connections.slots()).then_some(to);
        if self.sweep.is_none() {
            self.acknowledge();
        }
    }

    /// Whether `peer`, whose connection this is, may reach the service of its listener.
    pub(super) fn decide(&self, connection: &Connection, peer: &SpiffeId) -> Result<Authorized, Denied> {
        let listener = self.listener(connection);
        let local = match &listener.bind {
            Bind::Tcp(address) if !address.ip().is_unspecified() => Some(*address),
            Bind::Tcp(_) | Bind::Unix { .. } => None,
        };
        let facts = &connection.facts;
        // Where it wanted to go, before it was redirected here.
        let local = facts.original.or(local);
        let subject = Subject { peer, remote: facts.downstream, local, server_name: facts.server_name.as_deref() };
        listener.service.intentions.decide_on(&subject)
    }

    fn judge_again(&mut self, mut connection: Box<Connection>) {
        let judged = connection.direction == Direction::Inbound && connection.authorized.is_some();
        let denied = judged.then(|| connection.facts.source.as_ref().map(|peer| self.decide(&connection, peer))).flatten();
        match denied {
            Some(Err(denied)) => {
                connection.facts.decision = Some(Decision { allowed: false, by: denied.by });
                connection.facts.denial = Some(self.next_denial());
                let next = self.with_io(&mut connection, |connection: &mut Connection, io| {
                    connection.authorized = None;
                    connection.close(io, CloseReason::Revoked, true)
                });
                self.drive(connection, next);
            }
            Some(Ok(authorized)) => {
                connection.facts.decision = Some(Decision { allowed: true, by: authorized.by().clone() });
                connection.authorized = Some(authorized);
                self.connections.put(connection);
            }
            None => self.connections.put(connection),
        }
    }
}
