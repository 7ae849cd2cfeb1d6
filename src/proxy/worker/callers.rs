//! Whose connection it is: asked of the kernel, looked up, or asked of the thread that knows; and what follows from it.
//!
//! Invariant: where callers are told apart, an outbound connection is dialed only under the identity that its own caller was
//! granted. Who cannot be told in time is nobody, and nobody has no identity.

use std::sync::Arc;

use super::super::connection::{Connection, Next, Stage};
use super::super::listener::Role;
use super::super::reply::Reply;
use super::Worker;
use crate::mesh::Identity;
use crate::mesh::caller::{Caller, Callers, Lease, Refusal, Route, Stranger, Tier, Who};
use crate::ring::{Ring, Socket};
use crate::store::Reader;
use crate::store::desk::{Inquirer, Origin, Question};
use crate::sys::SocketOwner;
use crate::telemetry::close::CloseReason;
use crate::telemetry::denial::{self, DenialId};
use crate::telemetry::record::Decision;

/// What one worker tells callers apart with.
#[derive(Debug)]
pub struct Attribution {
    /// Those whom one look-up finds.
    pub callers: Reader<Callers>,
    /// Answers for the others.
    pub inquirer: Inquirer,
}

impl<R: Ring> Worker<R> {
    /// What an outbound connection speaks as: `Ok(None)` is to wait, `Err` is over.
    pub(super) fn identity_for(&mut self, connection: &mut Connection) -> Result<Option<Arc<Identity>>, Next> {
        if self.attribution.is_none() {
            return Ok(self.service(connection).identity.clone());
        }
        if connection.facts.caller.is_none() {
            connection.facts.caller = self.look_up(connection);
        }
        let Some(caller) = connection.facts.caller.clone() else { return Ok(None) };
        let Ok(grant) = &caller.verdict else { return Err(self.deny_caller(connection)) };
        let identity = self.reader.current().identities.get(grant.identity()).map(Arc::clone);
        if identity.is_none()
            && let Some(attribution) = &mut self.attribution
        {
            // A full desk has somebody ask for the same; the deadline does the rest.
            attribution.inquirer.ask(Question::Warm(Arc::clone(grant.identity())));
        }
        Ok(identity)
    }

    /// Who opened it, when that is known at once; otherwise the question is on its way.
    fn look_up(&mut self, connection: &mut Connection) -> Option<Arc<Caller>> {
        if connection.asked {
            return None;
        }
        let owner = connection.legs[super::super::connection::PLAIN]
            .socket
            .and_then(|socket| self.ring.owner(socket, connection.facts.original));
        self.refresh_callers();
        let attribution = self.attribution.as_mut()?;
        let known = owner.and_then(|owner| attribution.callers.current().by_cgroup.get(&owner.cgroup));
        if let Some(caller) = known {
            return Some(Arc::clone(caller));
        }
        connection.asked = true;
        let question = Question::Who { slot: connection.slot, generation: connection.generation, origin: owner.map(origin) };
        if attribution.inquirer.ask(question) {
            return None;
        }
        Some(Arc::new(nobody(owner, "too many connections wait to be attributed", "find the process that opens them")))
    }

    fn refresh_callers(&mut self) {
        if let Some(attribution) = &mut self.attribution
            && attribution.callers.refresh().is_some()
        {
            attribution.callers.acknowledge();
        }
    }

    /// The lease of the address that a connection came in at, for the user who has it.
    pub(super) fn lease_of(&mut self, socket: Socket) -> Option<Lease> {
        let address = self.ring.local_address(socket)?.ip();
        // Of a client that has closed, the kernel may not know the user any more.
        let owner = self.ring.owner(socket, None).filter(|owner| owner.inode != 0)?;
        self.refresh_callers();
        let callers = self.attribution.as_ref()?.callers.current();
        let lease = callers.leases.get(&address)?;
        // Whom the kernel names as another task is not this one, whatever address it learned.
        (lease.uid == owner.uid && !callers.by_cgroup.contains_key(&owner.cgroup)).then(|| lease.clone())
    }

    /// Where redirected connections lead.
    pub(super) fn routes(&mut self) -> Option<Arc<[Route]>> {
        self.refresh_callers();
        self.attribution.as_ref().map(|attribution| Arc::clone(&attribution.callers.current().routes))
    }

    /// Goes on with the connections whose callers are known now.
    pub(super) fn take_answers(&mut self) {
        while let Some(answer) = self.attribution.as_mut().and_then(|attribution| attribution.inquirer.answer()) {
            let Some(mut connection) = self.connections.take(answer.slot, answer.generation) else { continue };
            if connection.stage == Stage::Held {
                connection.facts.caller = Some(answer.caller);
                self.start(connection);
            } else {
                self.connections.put(connection);
            }
        }
    }

    /// Whether the upstream would refuse this identity, as far as is known here.
    pub(super) fn check_access(&mut self, connection: &mut Connection, identity: &Identity) -> Result<(), Next> {
        let Role::Upstream(balancer) = &self.listener(connection).role else { return Ok(()) };
        let Some(target) = balancer.upstream().targets.first().filter(|_| self.attribution.is_some()) else { return Ok(()) };
        let Some(Err(denied)) = target.access.as_ref().map(|access| access.decide(&identity.svid.id)) else { return Ok(()) };
        connection.facts.destination = target.expected.first().cloned();
        connection.facts.decision = Some(Decision { allowed: false, by: denied.by });
        Err(self.deny_caller(connection))
    }

    fn deny_caller(&mut self, connection: &mut Connection) -> Next {
        self.turn_away(connection, CloseReason::CallerDenied)
    }

    /// Turns a local client away, with the reason where its protocol has room for one.
    pub(super) fn turn_away(&mut self, connection: &mut Connection, why: CloseReason) -> Next {
        let id = self.next_denial();
        connection.facts.denial = Some(id);
        let protocol = match &self.listener(connection).role {
            // Within TLS nothing is said in plain.
            _ if connection.sessions[super::super::connection::PLAIN].is_some() => crate::mesh::DenyReply::Close,
            Role::Upstream(balancer) => balancer.upstream().deny_reply,
            Role::Public { .. } | Role::Router(_) | Role::Forward(_) | Role::Original(_) | Role::Redirect | Role::Lease => {
                crate::mesh::DenyReply::Close
            }
        };
        let reason = denial::reason(&connection.facts).unwrap_or_default();
        let remedy = denial::remedy(&connection.facts).unwrap_or_default();
        let message = format!("mesh: {reason}, id={id}");
        let reply = Reply::new(protocol, &message, &format!("{remedy}; see: ringfence explain {id}"));
        if !std::mem::replace(&mut connection.left_gate, true) {
            // Whoever is denied must not hold a place of those who are not.
            self.listener(connection).gate.leave();
        }
        self.with_io(connection, |connection, io| connection.turn_away(io, why, reply))
    }

    /// The name of the next denial.
    pub(super) fn next_denial(&mut self) -> DenialId {
        self.denials = self.denials.wrapping_add(1);
        DenialId::new(self.epoch, self.index, self.denials)
    }
}

fn origin(owner: SocketOwner) -> Origin {
    let SocketOwner { uid, inode, cgroup, pid } = owner;
    Origin { uid, inode, cgroup, pid }
}

fn nobody(owner: Option<SocketOwner>, why: &str, remedy: &str) -> Caller {
    let stranger = Stranger { uid: owner.map(|owner| owner.uid), ..Stranger::default() };
    let refusal = Refusal { rule: "default".into(), why: why.into(), remedy: remedy.into() };
    Caller { who: Who::Stranger(stranger), tier: Tier::Unidentified, verdict: Err(refusal) }
}
