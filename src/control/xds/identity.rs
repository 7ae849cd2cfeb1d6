//! The identity in the TLS contexts of listeners and clusters, one for the whole proxy.
//!
//! Invariant: certificate and key of an identity come from one context; it is put in use only when key, chain, roots and
//! validity hold together now, otherwise the one before stays. In a rotation listeners and clusters differ for a moment: the
//! newest leaf that is valid wins, and the roots of all contexts of its trust domain are trusted until they agree again.

use std::sync::Arc;
use std::time::SystemTime;

use super::tls_context::Material;
use crate::identity::Svid;
use crate::mesh::Identity;
use crate::tls::verify;
use crate::tls::{TlsParams, WorkerTls};

/// What is in use and what was offered last.
pub(super) struct Identities {
    workers: usize,
    offered: Vec<Arc<Material>>,
    current: Option<Arc<Identity>>,
    made_from: Option<(String, TlsParams)>,
    /// Why the newest offer is not in use.
    refused: Option<String>,
    /// Times that another leaf was put in use.
    pub(super) rotations: u64,
}

impl Identities {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, offered: Vec::new(), current: None, made_from: None, refused: None, rotations: 0 }
    }

    pub(super) fn current(&self) -> Option<&Arc<Identity>> {
        self.current.as_ref()
    }

    pub(super) fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Every context that is held now. Looks at them only when they are others than before, or did not do before.
    pub(super) fn offer<'a>(&mut self, materials: impl Iterator<Item = &'a Arc<Material>>, now: SystemTime) {
        let mut distinct: Vec<Arc<Material>> = Vec::new();
        for material in materials {
            if !distinct.iter().any(|known| Arc::ptr_eq(known, material) || known == material) {
                distinct.push(Arc::clone(material));
            }
        }
        if distinct.is_empty() {
            return;
        }
        let same = distinct.len() == self.offered.len() && distinct.iter().all(|one| self.offered.contains(one));
        if same && self.refused.is_none() && self.current.is_some() {
            return;
        }
        self.offered = distinct;
        self.settle(now);
    }

    fn settle(&mut self, now: SystemTime) {
        let (mut best, mut refused): (Option<(Svid, &Material)>, Option<String>) = (None, None);
        for material in &self.offered {
            match self.validate(material, now) {
                Ok(svid) if best.as_ref().is_none_or(|(known, _)| svid.not_before > known.not_before) => {
                    best = Some((svid, material));
                }
                Ok(_) => {}
                Err(why) => refused = Some(why),
            }
        }
        self.refused = refused;
        let Some((svid, material)) = best else { return };
        let params = self.params();
        let trust_domain = svid.id.trust_domain().to_owned();
        let bundle = match verify::bundle(&trust_domain, &self.roots(&trust_domain)) {
            Ok(bundle) => Arc::new(bundle),
            Err(why) => {
                self.refused = Some(why.to_string());
                return;
            }
        };
        let made_from = (material.chain_pem.clone(), params.clone());
        let unchanged = self.made_from.as_ref() == Some(&made_from);
        if unchanged && self.current.as_ref().is_some_and(|current| current.bundle == bundle) {
            return;
        }
        match WorkerTls::for_workers(&svid, &bundle, &params, true, self.workers) {
            Ok(tls) => {
                if self.made_from.as_ref().is_none_or(|before| before.0 != made_from.0) {
                    self.rotations += 1;
                }
                self.current = Some(Arc::new(Identity { svid: Arc::new(svid), bundle, tls }));
                self.made_from = Some(made_from);
            }
            Err(why) => self.refused = Some(why.to_string()),
        }
    }

    fn validate(&self, material: &Material, now: SystemTime) -> Result<Svid, String> {
        let id = verify::leaf_id(&material.chain_pem).map_err(|why| why.to_string())?;
        let Some(service) = id.service_name() else {
            return Err(format!("the certificate is for {id}, which is no service"));
        };
        let bundle = verify::bundle(id.trust_domain(), &[&material.roots_pem]).map_err(|why| why.to_string())?;
        verify::svid(&material.chain_pem, &material.key_pem, &service.service, &bundle, now).map_err(|why| why.to_string())
    }

    /// The roots of every context of a trust domain, each text once.
    fn roots(&self, trust_domain: &str) -> Vec<&str> {
        let mut roots: Vec<&str> = Vec::new();
        for material in &self.offered {
            let ours = verify::leaf_id(&material.chain_pem).is_ok_and(|id| id.trust_domain() == trust_domain);
            if ours && !roots.contains(&material.roots_pem.as_str()) {
                roots.push(&material.roots_pem);
            }
        }
        roots
    }

    /// The versions that every context allows; where they leave none, the configuration says so when it is made.
    fn params(&self) -> TlsParams {
        let allowed = |of: fn(&TlsParams) -> bool| self.offered.iter().all(|material| of(&material.params));
        TlsParams { tls12: allowed(|params| params.tls12), tls13: allowed(|params| params.tls13) }
    }
}
