//! Identities: what is offered by the agent, what is in use, and when to ask again. Pure; the clock is handed in.
//!
//! Invariant: an identity is put in use only when key, chain, roots, name and validity all hold together now; on any failure
//! the old one stays. While the leaf in use does not chain to the newest roots, old and new roots are trusted together,
//! so that neither peers nor we are cut off in the middle of a root rotation.

mod seam;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::consul::watch::Name;
use super::consul::wire;
use crate::identity::{Svid, TrustBundle};
use crate::mesh::Identity;
use crate::tls::{TlsParams, WorkerTls};

/// Past this share of its life a leaf is asked for again without an index; the agent renews between 60 and 90 %.
const FORCE_PERCENT: u32 = 90;
/// Past this share, somebody is told.
const ALARM_PERCENT: u32 = 95;
/// How long a leaf of another signer than the active root's may stay: the agent itself waits up to 30 s.
const SIGNER_GRACE: Duration = Duration::from_secs(45);
/// Between two forced reads of one leaf.
const FORCE_INTERVAL: Duration = Duration::from_secs(60);
/// Between two reads that were forced because nothing valid is in use.
const FORCE_INTERVAL_URGENT: Duration = Duration::from_secs(5);

/// All identities of the process.
pub(crate) struct Identities {
    recipe: Recipe,
    roots: Option<Roots>,
    slots: BTreeMap<Name, Slot>,
}

/// How certificate and roots become configurations.
struct Recipe {
    workers: usize,
    resumption: bool,
    params: TlsParams,
}

struct Roots {
    bundle: Arc<TrustBundle>,
    active_signer: String,
}

/// One service's identity.
#[derive(Default)]
struct Slot {
    current: Option<Arc<Identity>>,
    /// What the leaf in use was made from, to tell a repetition from news.
    current_pem: String,
    /// The last leaf offered, kept until it is in use or replaced: it may only wait for its roots.
    candidate: Option<wire::Leaf>,
    /// Key id of the leaf's signer.
    signer: Option<String>,
    refused: Option<String>,
    rotations: u64,
    other_signer_since: Option<SystemTime>,
    forced: Option<SystemTime>,
    alarm: Alarm,
}

/// How near its end a leaf is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Alarm {
    #[default]
    None,
    Near,
    Expired,
}

impl Identities {
    pub(crate) fn new(workers: usize, resumption: bool) -> Self {
        let recipe = Recipe { workers, resumption, params: TlsParams::DEFAULT };
        Self { recipe, roots: None, slots: BTreeMap::new() }
    }

    /// A leaf from the agent. True when it is in use now.
    pub(crate) fn offer_leaf(&mut self, name: &Name, leaf: wire::Leaf, now: SystemTime) -> bool {
        let slot = self.slots.entry(name.clone()).or_default();
        if slot.current.is_some() && slot.current_pem == leaf.cert_pem {
            slot.candidate = None;
            slot.refused = None;
            return false;
        }
        slot.candidate = Some(leaf);
        self.settle(name, now)
    }

    /// Roots from the agent. `Err` keeps the old ones.
    pub(crate) fn offer_roots(&mut self, roots: &wire::Roots, now: SystemTime) -> Result<bool, String> {
        let pems: Vec<&str> = roots.roots.iter().map(|root| root.root_cert.as_str()).collect();
        let bundle = seam::bundle(&roots.trust_domain, &pems)?;
        let active = roots.roots.iter().find(|root| root.id == roots.active_root_id);
        let active_signer = active.map(|root| root.signing_key_id.to_ascii_lowercase()).unwrap_or_default();
        let same = self.roots.as_ref().is_some_and(|known| *known.bundle == bundle);
        let bundle = match self.roots.take() {
            Some(known) if same => known.bundle,
            _ => Arc::new(bundle),
        };
        self.roots = Some(Roots { bundle, active_signer });
        let mut changed = false;
        for name in self.names() {
            changed |= self.settle(&name, now);
        }
        Ok(changed)
    }

    /// TLS versions from the mesh's configuration.
    pub(crate) fn set_params(&mut self, params: TlsParams) -> bool {
        if params == self.recipe.params {
            return false;
        }
        self.recipe.params = params;
        let mut changed = false;
        for name in self.names() {
            let Some(slot) = self.slots.get_mut(&name) else { continue };
            if let Some(current) = slot.current.clone() {
                let made = self.recipe.make(Arc::clone(&current.svid), Arc::clone(&current.bundle));
                changed |= slot.put(made.map(Arc::new));
            }
        }
        changed
    }

    /// Forgets a service that is no longer fronted; its key is wiped with the last snapshot that holds it.
    pub(crate) fn forget(&mut self, name: &Name) {
        self.slots.remove(name);
    }

    pub(crate) fn current(&self, name: &Name) -> Option<&Arc<Identity>> {
        self.slots.get(name)?.current.as_ref()
    }

    pub(crate) fn rotations(&self, name: &Name) -> u64 {
        self.slots.get(name).map_or(0, |slot| slot.rotations)
    }

    pub(crate) fn trust_domain(&self) -> Option<&str> {
        self.roots.as_ref().map(|roots| &*roots.bundle.trust_domain)
    }

    /// What is wrong with a service's identity, for a person.
    pub(crate) fn problem(&self, name: &Name, now: SystemTime) -> Option<String> {
        let slot = self.slots.get(name)?;
        let refused = slot.refused.as_ref().map(|why| format!("; the agent's newest leaf is refused: {why}")).unwrap_or_default();
        let Some(current) = &slot.current else {
            return slot.refused.as_ref().map(|why| format!("no identity: the agent's leaf is refused: {why}"));
        };
        match alarm(&current.svid, now) {
            Alarm::Expired => Some(format!(
                "the certificate has expired: peers refuse new connections; check the agent and its servers{refused}"
            )),
            Alarm::Near => {
                let left = current.svid.not_after.duration_since(now).unwrap_or_default().as_secs();
                Some(format!(
                    "the certificate ends in {left} s and has not been renewed; check the agent and its servers{refused}"
                ))
            }
            Alarm::None if refused.is_empty() => None,
            Alarm::None => Some(format!("the old certificate stays in use{refused}")),
        }
    }

    /// Looks at the clock: which leaves to ask for again without an index, and which alarms are new.
    pub(crate) fn tick(&mut self, now: SystemTime) -> Tick {
        let mut tick = Tick::default();
        for name in self.names() {
            // A leaf that was refused for its time or its roots may be good now.
            tick.changed |= self.settle(&name, now);
            let active_signer = self.roots.as_ref().map_or("", |roots| roots.active_signer.as_str());
            let Some(slot) = self.slots.get_mut(&name) else { continue };
            if slot.wants_force(active_signer, now) {
                slot.forced = Some(now);
                tick.force.push(name.clone());
            }
            let reached = slot.current.as_ref().map_or(Alarm::None, |current| alarm(&current.svid, now));
            if reached > slot.alarm {
                tick.alarms.push((name.clone(), reached));
            }
            slot.alarm = reached;
        }
        tick
    }

    /// The error that kept it from being read, or that it is allowed again (403 cleared): ask without an index.
    pub(crate) fn names(&self) -> Vec<Name> {
        self.slots.keys().cloned().collect()
    }

    /// Puts the best valid combination of leaf and roots in use.
    fn settle(&mut self, name: &Name, now: SystemTime) -> bool {
        let Some(roots) = &self.roots else { return false };
        let Some(slot) = self.slots.get_mut(name) else { return false };
        if let Some(leaf) = &slot.candidate {
            match validate(name, leaf, &roots.bundle, now) {
                Ok(svid) => {
                    slot.signer = seam::signer(&svid);
                    slot.current_pem.clone_from(&leaf.cert_pem);
                    let made = self.recipe.make(Arc::new(svid), Arc::clone(&roots.bundle));
                    let put = slot.put(made.map(Arc::new));
                    if put {
                        slot.candidate = None;
                        slot.rotations += 1;
                        slot.other_signer_since = None;
                    }
                    return put;
                }
                Err(why) => slot.refused = Some(why),
            }
        }
        slot.retrust(&roots.bundle, &self.recipe)
    }
}

/// What the clock asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tick {
    pub(crate) changed: bool,
    pub(crate) force: Vec<Name>,
    pub(crate) alarms: Vec<(Name, Alarm)>,
}

impl Slot {
    fn put(&mut self, made: Result<Arc<Identity>, String>) -> bool {
        match made {
            Ok(identity) => {
                self.current = Some(identity);
                self.refused = None;
                true
            }
            Err(why) => {
                self.refused = Some(why);
                false
            }
        }
    }

    /// Brings the identity in use to the newest roots.
    fn retrust(&mut self, newest: &Arc<TrustBundle>, recipe: &Recipe) -> bool {
        let Some(current) = self.current.clone() else { return false };
        if *current.bundle == **newest || current.svid.id.trust_domain() != &*newest.trust_domain {
            return false;
        }
        let bundle =
            if seam::chains(&current.svid, newest) { Arc::clone(newest) } else { Arc::new(union(&current.bundle, newest)) };
        if bundle == current.bundle {
            return false;
        }
        let refused = self.refused.take();
        let put = self.put(recipe.make(Arc::clone(&current.svid), bundle).map(Arc::new));
        self.refused = self.refused.take().or(refused);
        put
    }

    fn wants_force(&mut self, active_signer: &str, now: SystemTime) -> bool {
        let since = |at: SystemTime| now.duration_since(at).unwrap_or_default();
        let other_signer = match &self.signer {
            Some(signer) if !active_signer.is_empty() && signer != active_signer => {
                since(*self.other_signer_since.get_or_insert(now)) > SIGNER_GRACE
            }
            _ => {
                self.other_signer_since = None;
                false
            }
        };
        let usable = self.current.as_ref().is_some_and(|current| current.svid.not_after > now);
        let late = self.current.as_ref().is_some_and(|current| past(&current.svid, FORCE_PERCENT, now));
        let interval = if usable { FORCE_INTERVAL } else { FORCE_INTERVAL_URGENT };
        let waited = self.forced.is_none_or(|last| since(last) >= interval);
        waited && (other_signer || late || (!usable && self.refused.is_some()))
    }
}

/// The name is checked in full: `svid` looks at the service, this at namespace and partition.
fn validate(name: &Name, leaf: &wire::Leaf, bundle: &TrustBundle, now: SystemTime) -> Result<Svid, String> {
    let svid = seam::svid(&leaf.cert_pem, &leaf.private_key_pem.0, &name.service, bundle, now)?;
    let or_default = |text: &str| if text.is_empty() { "default".to_owned() } else { text.to_owned() };
    match svid.id.service_name() {
        Some(found)
            if *found.service == *name.service
                && *found.namespace == *or_default(&name.namespace)
                && *found.partition == *or_default(&name.partition) =>
        {
            Ok(svid)
        }
        _ => Err(format!("it names {}, not service {}", svid.id, name.service)),
    }
}

impl Recipe {
    fn make(&self, svid: Arc<Svid>, bundle: Arc<TrustBundle>) -> Result<Identity, String> {
        let tls = WorkerTls::for_workers(&svid, &bundle, &self.params, self.resumption, self.workers);
        Ok(Identity { tls: tls.map_err(|error| error.to_string())?, svid, bundle })
    }
}

fn union(old: &TrustBundle, new: &TrustBundle) -> TrustBundle {
    let mut roots = new.roots.clone();
    roots.extend(old.roots.iter().filter(|root| !new.roots.contains(root)).cloned());
    TrustBundle { trust_domain: Arc::clone(&new.trust_domain), roots, peers: new.peers.clone() }
}

fn alarm(svid: &Svid, now: SystemTime) -> Alarm {
    if svid.not_after <= now {
        Alarm::Expired
    } else if past(svid, ALARM_PERCENT, now) {
        Alarm::Near
    } else {
        Alarm::None
    }
}

fn past(svid: &Svid, percent: u32, now: SystemTime) -> bool {
    let life = svid.not_after.duration_since(svid.not_before).unwrap_or_default();
    now >= svid.not_before + life / 100 * percent
}

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identities").field("services", &self.slots.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
