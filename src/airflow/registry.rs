//! The registry of tasks: which process speaks for which try of a task instance, from its registration to its last end.
//!
//! Invariant: a registration is a fact about one process, proved by its parents when no author's code had run in it yet, and
//! never changed afterwards but for its effective user. Whatever descends from the process, or lies in its cgroup, belongs to
//! it and can be no other task.
//!
//! Knows the host by [`Host`] and the rules by a closure. Knows no socket and no identity. Its failures are refusals with a
//! remedy; without a cgroup a registration still counts, by ancestry alone.

mod claim;
mod rates;
mod refusal;
mod roots;
mod state;
mod titles;
mod verify;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::cgroup::{Cgroup, Hierarchy, Place};
use super::process::{Chain, Host, HostError, Process};
use crate::mesh::caller::{Task, Tier};
use state::{Remembered, State};

pub(super) use state::{own_text, write_own};

pub(crate) use claim::{Claim, Supervisor};
pub(super) use rates::Rates;
pub(crate) use refusal::RegisterError;
pub(crate) use roots::{Part, Parts};
pub(super) use roots::{Roots, highest};
pub(super) use titles::{Role, TitledTask, role};

/// Registrations alive at once.
pub(crate) const REGISTRATIONS_MAX: usize = 10_000;
/// Registrations of one user a second.
pub(crate) const REGISTRATIONS_A_SECOND: f64 = 200.0;
/// Registrations of one user at once.
pub(crate) const REGISTRATIONS_BURST: f64 = 1_000.0;

/// A process that speaks for a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registration {
    /// The process that registered.
    pub(crate) process: Process,
    /// The user under which the task runs: after `run_as_user`, the other one.
    pub(crate) uid: u32,
    /// What it is.
    pub(crate) task: Arc<Task>,
    /// Airflow's version, as it says.
    pub(crate) airflow: Arc<str>,
    /// Which process registered.
    pub(crate) supervisor: Supervisor,
    /// The cgroup of its own, where there is a place for one.
    pub(crate) cgroup: Option<Cgroup>,
    /// Its process has ended, and others are left in its cgroup.
    pub(crate) has_ended: bool,
}

impl Registration {
    /// How its connections will be attributed.
    pub(crate) fn tier(&self) -> Tier {
        if self.cgroup.is_some() { Tier::Cgroup } else { Tier::Ancestor }
    }
}

/// Who asks to be registered, as the kernel says (`SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Its pid.
    pub(crate) pid: u32,
    /// Its effective user when it connected.
    pub(crate) uid: u32,
}

/// A claim that was accepted.
#[derive(Debug, Clone)]
pub(crate) struct Registered {
    /// What counts from now on.
    pub(crate) registration: Arc<Registration>,
    /// It was registered before, by this process or one above.
    pub(crate) again: bool,
    /// Why it has no cgroup of its own, though there is a place for one.
    pub(crate) notice: Option<String>,
}

/// To whom a chain of processes belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Membership {
    /// To this task.
    Of(Arc<Registration>),
    /// To a task that is not known any more: its cgroup is still there.
    Forgotten(Process),
    /// To no task.
    None,
}

/// What a restart found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Tasks that live still.
    pub(crate) alive: usize,
    /// Tasks that ended meanwhile.
    pub(crate) ended: usize,
    /// Cgroups with processes of tasks that the state file does not know. They have no identity.
    pub(crate) unknown: usize,
}

/// All registrations.
#[derive(Debug)]
pub(crate) struct Registry {
    place: Option<Place>,
    by_process: HashMap<Process, Arc<Registration>>,
    by_cgroup: HashMap<u64, Process>,
    rates: Rates,
    roots: Roots,
    state: Option<State>,
}

impl Registry {
    /// An empty one. Without a place, tasks have no cgroups of their own; without a hierarchy, there are none at all.
    pub(crate) fn new(place: Option<Place>, hierarchy: Option<Hierarchy>) -> Self {
        Self {
            place,
            by_process: HashMap::new(),
            by_cgroup: HashMap::new(),
            rates: Rates::new(REGISTRATIONS_A_SECOND, REGISTRATIONS_BURST),
            roots: Roots::new(hierarchy),
            state: None,
        }
    }

    /// Believes the claim of a process, or says why not. With a place it moves the process, which can take 16 ms.
    pub(crate) fn register(
        &mut self,
        host: &Host,
        parts: &Parts<'_>,
        peer: Peer,
        claim: &Claim,
        now: Instant,
    ) -> Result<Registered, RegisterError> {
        let result = self.checked(host, parts, peer, claim, now);
        if let Err(error) = &result {
            tracing::warn!(pid = peer.pid, uid = peer.uid, dag = claim.dag, task = claim.task, %error, "registration refused");
        }
        result
    }

    fn checked(
        &mut self,
        host: &Host,
        parts: &Parts<'_>,
        peer: Peer,
        claim: &Claim,
        now: Instant,
    ) -> Result<Registered, RegisterError> {
        let task = claim.check()?;
        let chain = host.chain(peer.pid)?.ok_or(RegisterError::Gone { pid: peer.pid })?;
        verify::peer(&chain, peer)?;
        // Before the bound on its user: what a registered task asks for must not cost the tasks that are yet to register.
        match self.member(&chain) {
            Membership::Of(known) => return self.again(&known, &chain, &task),
            Membership::Forgotten(process) => return Err(RegisterError::Forgotten { pid: peer.pid, process }),
            Membership::None => {}
        }
        if !self.rates.take(peer.uid, 1.0, now) {
            return Err(RegisterError::TooFast { uid: peer.uid });
        }
        verify::lineage(host, parts, &mut self.roots, &chain, claim, &task)?;
        if self.by_process.len() >= REGISTRATIONS_MAX {
            return Err(RegisterError::Full);
        }
        self.admit(host, chain.own().process, peer.uid, claim, task)
    }

    /// A task registers again after `sudo` (run_as_user), or because its first answer was lost.
    fn again(&mut self, known: &Arc<Registration>, chain: &Chain, task: &Task) -> Result<Registered, RegisterError> {
        let own = chain.own();
        if *known.task != *task {
            let (pid, process, task) = (own.process.pid, known.process, Arc::clone(&known.task));
            return Err(RegisterError::Other { pid, process, task });
        }
        if known.uid == own.uid {
            return Ok(Registered { registration: Arc::clone(known), again: true, notice: None });
        }
        let registration = Arc::new(Registration { uid: own.uid, ..Registration::clone(known) });
        self.insert(Arc::clone(&registration));
        Ok(Registered { registration, again: true, notice: None })
    }

    fn admit(&mut self, host: &Host, process: Process, uid: u32, claim: &Claim, task: Task) -> Result<Registered, RegisterError> {
        let enclosed = self.place.as_ref().map(|place| place.enclose(process)).transpose();
        let (cgroup, notice) = match enclosed {
            Ok(cgroup) => (cgroup, None),
            Err(error) => (None, Some(format!("no cgroup of its own: {error}"))),
        };
        // If its pid was given out again while it was moved, then somebody else is in that cgroup now: nobody known, who stays so.
        if !host.is_alive(process)? {
            if let Some(cgroup) = cgroup {
                let _ = cgroup.remove();
            }
            return Err(RegisterError::Gone { pid: process.pid });
        }
        let (airflow, supervisor) = (Arc::from(claim.airflow.as_str()), claim.supervisor);
        let registration =
            Arc::new(Registration { process, uid, task: Arc::new(task), airflow, supervisor, cgroup, has_ended: false });
        self.insert(Arc::clone(&registration));
        Ok(Registered { registration, again: false, notice })
    }

    fn insert(&mut self, registration: Arc<Registration>) {
        if let Some(cgroup) = &registration.cgroup {
            self.by_cgroup.insert(cgroup.id, registration.process);
        }
        self.by_process.insert(registration.process, Arc::clone(&registration));
        self.note(|state| state.add(&registration));
    }

    /// The process has ended. Its registration goes with it, unless a cgroup keeps what it left behind.
    pub(crate) fn ended(&mut self, process: Process) -> Option<Arc<Registration>> {
        let registration = self.by_process.get_mut(&process)?;
        if registration.cgroup.is_some() {
            Arc::make_mut(registration).has_ended = true;
            return None;
        }
        self.forget(process)
    }

    /// No process is left in this cgroup: it is removed, and its registration with it. Nothing happens if somebody is.
    pub(crate) fn emptied(&mut self, cgroup: u64) -> Option<Arc<Registration>> {
        let process = *self.by_cgroup.get(&cgroup)?;
        let removed = self.by_process.get(&process)?.cgroup.as_ref()?.remove();
        match removed {
            Ok(true) => self.forget(process),
            Ok(false) => None,
            Err(error) => {
                // An empty cgroup does no harm; a registration that never ends would.
                tracing::warn!(%error, "an empty cgroup cannot be removed");
                self.forget(process)
            }
        }
    }

    fn forget(&mut self, process: Process) -> Option<Arc<Registration>> {
        let registration = self.by_process.remove(&process)?;
        if let Some(cgroup) = &registration.cgroup {
            self.by_cgroup.remove(&cgroup.id);
        }
        self.note(|state| state.remove(process));
        Some(registration)
    }

    /// Forgets which processes were believed to be parts of Airflow: the rules say anew which could be.
    pub(crate) fn forget_roots(&mut self) {
        self.roots.forget();
    }

    /// The task in whose cgroup a socket was made.
    pub(crate) fn by_cgroup(&self, cgroup: u64) -> Option<&Arc<Registration>> {
        self.by_process.get(self.by_cgroup.get(&cgroup)?)
    }

    /// The task that this very process registered.
    #[cfg(test)]
    pub(crate) fn by_process(&self, process: Process) -> Option<&Arc<Registration>> {
        self.by_process.get(&process)
    }

    /// Whether this very process registered.
    pub(crate) fn is_registered(&self, process: Process) -> bool {
        self.by_process.contains_key(&process)
    }

    /// To which task a process belongs: itself registered, in a task's cgroup, or below such a process; the nearest counts.
    pub(crate) fn member(&self, chain: &Chain) -> Membership {
        for facts in &chain.processes {
            if let Some(registration) = self.by_process.get(&facts.process) {
                return Membership::Of(Arc::clone(registration));
            }
            let Some(owner) = self.place.as_ref().and_then(|place| place.owner_of(&facts.cgroup)) else { continue };
            return self.by_process.get(&owner).cloned().map_or(Membership::Forgotten(owner), Membership::Of);
        }
        Membership::None
    }

    /// All registrations, in no order.
    pub(crate) fn registrations(&self) -> impl Iterator<Item = &Arc<Registration>> {
        self.by_process.values()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_process.len()
    }

    /// Knows the tasks that a run which still goes on has in its state file, and changes nothing there.
    pub(crate) fn preview(&mut self, host: &Host, path: &Path) -> Result<(), HostError> {
        for task in State::load(path, &host.boot()?)? {
            self.take_up(host, &task)?;
        }
        Ok(())
    }

    /// Takes up the tasks that an earlier run left in the state file, and keeps that file from now on.
    pub(crate) fn recover(&mut self, host: &Host, path: &Path) -> Result<Recovered, HostError> {
        let boot = host.boot()?;
        let mut recovered = Recovered::default();
        match State::load(path, &boot) {
            Ok(remembered) => {
                for task in remembered {
                    match self.take_up(host, &task)? {
                        true => recovered.alive += 1,
                        false => recovered.ended += 1,
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the tasks of the last run are not known any more; they have no identity"),
        }
        recovered.unknown = self.sweep()?;
        self.state = Some(State::begin(path, boot, self.by_process.values().map(|registration| &**registration))?);
        Ok(recovered)
    }

    /// Whether its process lives, or something in its cgroup does.
    fn take_up(&mut self, host: &Host, remembered: &Remembered) -> Result<bool, HostError> {
        let Remembered { process, uid, enclosed, claim } = remembered;
        let Ok(task) = claim.check() else { return Ok(false) };
        let place = self.place.as_ref().filter(|_| *enclosed);
        let cgroup = place.and_then(|place| place.cgroup_of(*process));
        let is_alive = host.is_alive(*process)?;
        let is_populated = cgroup.as_ref().map(Cgroup::is_populated).transpose()?.unwrap_or(false);
        if self.by_process.len() >= REGISTRATIONS_MAX || !(is_alive || is_populated) {
            return Ok(false);
        }
        let registration = Registration {
            process: *process,
            uid: *uid,
            task: Arc::new(task),
            airflow: Arc::from(claim.airflow.as_str()),
            supervisor: claim.supervisor,
            // An empty one is no longer its process's.
            cgroup: cgroup.filter(|_| is_populated),
            has_ended: !is_alive,
        };
        self.insert(Arc::new(registration));
        Ok(true)
    }

    /// Removes the empty cgroups of earlier runs; the number of those that are not empty and nobody's.
    fn sweep(&self) -> Result<usize, HostError> {
        let Some(place) = &self.place else { return Ok(0) };
        let mut unknown = 0;
        for (process, cgroup) in place.all()? {
            if !self.by_cgroup.contains_key(&cgroup.id) && !cgroup.remove()? {
                tracing::warn!(%process, directory = %cgroup.directory.display(), "a cgroup of a task that is not known any more");
                unknown += 1;
            }
        }
        Ok(unknown)
    }

    /// Writes to the state file. A failure costs the memory of a restart, and no task.
    fn note(&mut self, write: impl FnOnce(&mut State) -> Result<(), HostError>) {
        let Some(state) = &mut self.state else { return };
        let mut written = write(state);
        if state.is_stale(self.by_process.len()) {
            written = state.rewrite(self.by_process.values().map(|registration| &**registration));
        }
        if let Err(error) = written {
            tracing::warn!(%error, "registrations cannot be kept for a restart");
        }
    }
}

#[cfg(test)]
mod tests;
