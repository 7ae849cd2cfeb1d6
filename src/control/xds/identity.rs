//! The identities in the TLS contexts of listeners and clusters: one for a sidecar, one a service for a terminating gateway.
//!
//! Invariant: certificate and key of an identity come from one context; it is put in use only when key, chain, roots and
//! validity hold together now, otherwise the one before stays. Where all roots are of peers, none can vouch for the chain: whoever
//! is shown it decides. In a rotation listeners and clusters differ for a moment: the
//! newest leaf that is valid wins, and the roots of all contexts are trusted until they agree again. Roots vouch for the trust
//! domain that their context names and for no other; those of a peer vouch for callers only where a listener says so. One peer's
//! roots that cannot be used keep that peer out, and nobody else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::tls_context::Material;
use crate::identity::{PeerBundle, SpiffeId, Svid, TrustBundle};
use crate::mesh::Identity;
use crate::tls::verify;
use crate::tls::{Suites, TlsParams, WorkerTls};

/// Every identity of the proxy.
pub(super) struct Identities {
    workers: usize,
    by_id: BTreeMap<SpiffeId, Candidate>,
    /// Times that another leaf was put in use.
    pub(super) rotations: u64,
}

/// What is in use for one SPIFFE ID and what was offered last.
#[derive(Default)]
struct Candidate {
    offered: Vec<Arc<Material>>,
    current: Option<Arc<Identity>>,
    made_from: Option<(String, TlsParams)>,
    /// Why the newest offer is not in use.
    refused: Option<String>,
}

impl Identities {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, by_id: BTreeMap::new(), rotations: 0 }
    }

    /// How many workers each is made for.
    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    /// The identity in use that `material` is a part of.
    pub(super) fn of(&self, material: &Material) -> Option<&Arc<Identity>> {
        self.by_id.get(&material.leaf)?.current.as_ref()
    }

    /// Every identity in use.
    pub(super) fn in_use(&self) -> impl Iterator<Item = &Arc<Identity>> {
        self.by_id.values().filter_map(|candidate| candidate.current.as_ref())
    }

    /// Whether some are offered and none can be used.
    pub(super) fn has_none_of_its_offers(&self) -> bool {
        !self.by_id.is_empty() && self.in_use().next().is_none()
    }

    /// Why newest offers are not in use.
    pub(super) fn refused(&self) -> impl Iterator<Item = &str> {
        self.by_id.values().filter_map(|candidate| candidate.refused.as_deref())
    }

    /// Every context that is held now. Looks at them only when they are others than before, or did not do before. Whether another
    /// identity came into use.
    pub(super) fn offer<'a>(&mut self, materials: impl Iterator<Item = &'a Arc<Material>>, now: SystemTime) -> bool {
        let mut offered: BTreeMap<&SpiffeId, Vec<Arc<Material>>> = BTreeMap::new();
        for material in materials {
            let of_id = offered.entry(&material.leaf).or_default();
            if !of_id.iter().any(|known| Arc::ptr_eq(known, material) || known == material) {
                of_id.push(Arc::clone(material));
            }
        }
        // Nothing at all is what a server that starts over tells: what was in use is good until its end.
        if offered.is_empty() {
            return false;
        }
        let mut changed = false;
        self.by_id.retain(|id, _| offered.contains_key(id));
        for (id, materials) in offered {
            let candidate = self.by_id.entry(id.clone()).or_default();
            let before = candidate.current.as_ref().map(Arc::as_ptr);
            self.rotations += u64::from(candidate.offer(materials, self.workers, now));
            changed |= candidate.current.as_ref().map(Arc::as_ptr) != before;
        }
        changed
    }
}

impl Candidate {
    /// Whether another leaf was put in use.
    fn offer(&mut self, materials: Vec<Arc<Material>>, workers: usize, now: SystemTime) -> bool {
        let same = materials.len() == self.offered.len() && materials.iter().all(|one| self.offered.contains(one));
        if same && self.refused.is_none() && self.current.is_some() {
            return false;
        }
        self.offered = materials;
        self.settle(workers, now).unwrap_or_else(|why| {
            self.refused = Some(why);
            false
        })
    }

    fn settle(&mut self, workers: usize, now: SystemTime) -> Result<bool, String> {
        self.refused = None;
        let Some(first) = self.offered.first() else { return Ok(false) };
        let (bundle, mut refused) = self.bundle(first.leaf.trust_domain())?;
        let bundle = Arc::new(bundle);
        let mut best: Option<(Svid, &Material)> = None;
        for material in &self.offered {
            match validate(material, &bundle, now) {
                Ok(svid) if best.as_ref().is_none_or(|(known, _)| svid.not_before > known.not_before) => {
                    best = Some((svid, material));
                }
                Ok(_) => {}
                Err(why) => refused = Some(why),
            }
        }
        let Some((svid, material)) = best else { return refused.map_or(Ok(false), Err) };
        let made_from = (material.chain_pem.clone(), self.params());
        self.refused = refused;
        let unchanged = self.made_from.as_ref() == Some(&made_from);
        if unchanged && self.current.as_ref().is_some_and(|current| current.bundle == bundle) {
            return Ok(false);
        }
        let tls = WorkerTls::for_workers(&svid, &bundle, &made_from.1, true, workers).map_err(|why| why.to_string())?;
        let rotated = self.made_from.as_ref().is_none_or(|before| before.0 != made_from.0);
        self.current = Some(Arc::new(Identity { svid: Arc::new(svid), bundle, tls }));
        self.made_from = Some(made_from);
        Ok(rotated)
    }

    /// The roots of every context, by whom they vouch for, and why a peer's are not among them.
    fn bundle(&self, ours: &str) -> Result<(TrustBundle, Option<String>), String> {
        let mut by_domain: BTreeMap<&str, (Vec<&str>, bool)> = BTreeMap::new();
        for roots in self.offered.iter().flat_map(|material| &material.roots) {
            let (pems, callers) = by_domain.entry(&roots.trust_domain).or_default();
            if !pems.contains(&roots.pem.as_str()) {
                pems.push(&roots.pem);
            }
            *callers |= roots.callers;
        }
        let mut bundle = match by_domain.remove(ours) {
            Some((own, _)) => verify::bundle(ours, &own).map_err(|why| why.to_string())?,
            // All that is called is of peers.
            None => TrustBundle { trust_domain: ours.into(), roots: Vec::new(), peers: Vec::new() },
        };
        let mut refused = None;
        for (domain, (pems, calls)) in by_domain {
            match verify::bundle(domain, &pems) {
                Ok(TrustBundle { trust_domain, roots, .. }) => bundle.peers.push(PeerBundle { trust_domain, roots, calls }),
                Err(why) => refused = Some(format!("peer {domain}: {why}")),
            }
        }
        if bundle.roots.is_empty() && bundle.peers.is_empty() {
            return Err(refused.unwrap_or_else(|| format!("no TLS context has roots that {ours} could trust")));
        }
        Ok((bundle, refused))
    }

    /// The versions and suites that every context allows; where they leave none, the configuration says so when it is made.
    fn params(&self) -> TlsParams {
        let allowed = |of: fn(&TlsParams) -> bool| self.offered.iter().all(|material| of(&material.params));
        let suites = self.offered.iter().fold(Suites::ALL, |suites, material| suites.and(material.params.suites));
        TlsParams { tls12: allowed(|params| params.tls12), tls13: allowed(|params| params.tls13), suites }
    }
}

fn validate(material: &Material, bundle: &TrustBundle, now: SystemTime) -> Result<Svid, String> {
    let Some(service) = material.leaf.service_name() else {
        return Err(format!("the certificate is for {}, which is no service", material.leaf));
    };
    verify::svid(&material.chain_pem, &material.key_pem, &service.service, bundle, now).map_err(|why| why.to_string())
}
