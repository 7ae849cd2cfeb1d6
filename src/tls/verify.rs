//! SPIFFE verification for both roles.
//!
//! A peer passes when every certificate on its path is valid now, the leaf is no CA and carries exactly one URI SAN, that URI
//! is a SPIFFE ID of a trust domain in the bundle, the path ends in a root of that very domain, and: where we dialed, it is one
//! of the expected IDs; where we accepted, it names a service. The same as Envoy under Consul, which also checks the trust domain.
//!
//! Invariant: nothing is skipped by the cache but work already done: a hit means that this very chain passed for this very
//! bundle and role, and that now still lies in the validity of all certificates on its path. The expected IDs and the
//! signature over the handshake are checked every time.
//!
//! Must not know intentions (that is `policy`) or sockets. Fails with a [`VerifyError`] that tells what was presented.

mod cache;
mod load;
mod outside;
mod roles;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

pub use load::{BundleError, SvidError, bundle, leaf_id, svid};
pub(super) use outside::OutsideTrust;
pub use outside::{San, SanKind};
pub(super) use roles::{AnswererVerifier, CallerVerifier};

use crate::identity::{IdentityError, Kind, SpiffeId, TrustBundle};

/// Most certificates that a peer may present. Consul sends three at most; path building costs grow with each.
pub const CHAIN_CERTIFICATES_MAX: usize = 10;

/// Which end of the connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We dialed: the peer is a server.
    Client,
    /// We accepted: the peer is a client.
    Server,
}

/// Why a peer's certificate is refused.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// More certificates than [`CHAIN_CERTIFICATES_MAX`].
    #[error("the peer presented {0} certificates, at most {CHAIN_CERTIFICATES_MAX} are accepted")]
    ChainTooLong(usize),
    /// A certificate is not one.
    #[error("the peer's certificate cannot be decoded: {0}")]
    Malformed(&'static str),
    /// Chain building refused.
    #[error("the peer's certificate chain is not trusted: {0}")]
    Chain(webpki::Error),
    /// A key usage that an SVID must not have, or lacks.
    #[error("the peer's certificate has a key usage that an SVID must not have: {0}")]
    KeyUsage(&'static str),
    /// Not exactly one URI SAN.
    #[error("the peer's certificate carries {0} URI SANs, an SVID carries exactly one")]
    Uris(usize),
    /// The URI SAN is no SPIFFE ID.
    #[error("the peer's URI SAN is refused: {0}")]
    NotSpiffe(#[from] IdentityError),
    /// Another mesh.
    #[error("the peer is {presented} of another trust domain, ours is {expected}")]
    TrustDomain {
        /// Who it says it is.
        presented: SpiffeId,
        /// Our trust domain.
        expected: Box<str>,
    },
    /// We dialed and somebody else answered.
    #[error("the peer presented {presented}, expected {}", list(expected))]
    Unexpected {
        /// Who answered.
        presented: SpiffeId,
        /// Who may.
        expected: Arc<[SpiffeId]>,
    },
    /// A gateway, an agent or a CA called us.
    #[error("the peer presented {0}, which names no service; only services may call a service")]
    NotService(SpiffeId),
    /// A server outside of the mesh whose certificate has none of the names that were asked for.
    #[error("the certificate is for {presented}, expected {expected}")]
    Name {
        /// The first of its names.
        presented: String,
        /// Those that would do.
        expected: String,
    },
}

impl VerifyError {
    /// Whether the chain was good and only the identity was not.
    pub fn is_identity(&self) -> bool {
        match self {
            Self::Uris(_) | Self::NotSpiffe(_) | Self::TrustDomain { .. } | Self::Unexpected { .. } | Self::NotService(_) => true,
            Self::Name { .. } => true,
            Self::ChainTooLong(_) | Self::Malformed(_) | Self::Chain(_) | Self::KeyUsage(_) => false,
        }
    }
}

/// A trust bundle made ready for verification. One a worker and identity.
pub(super) struct Trust {
    own: Domain,
    peers: Vec<Domain>,
    /// Names the bundle's contents in cache keys, so that a new generation with other roots never meets an old entry.
    digest: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

/// One trust domain and the roots that vouch for it and for no other.
struct Domain {
    name: Box<str>,
    anchors: Vec<TrustAnchor<'static>>,
    /// Validity of the root behind the anchor of the same index: webpki ignores a root's dates, Envoy does not.
    validity: Vec<Validity>,
    /// Whether its services may call.
    calls: bool,
}

/// Seconds since the epoch, both inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Validity {
    not_before: u64,
    not_after: u64,
}

impl Trust {
    pub(super) fn new(bundle: &TrustBundle, algorithms: WebPkiSupportedAlgorithms) -> Result<Self, BundleError> {
        let own = Domain::new(&bundle.trust_domain, &bundle.roots, true)?;
        // A gateway may know the roots of peers alone: then it trusts nobody of its own domain.
        if own.anchors.is_empty() && bundle.peers.is_empty() {
            return Err(BundleError::Empty { trust_domain: own.name.into() });
        }
        let mut digest = cache::digest(bundle.trust_domain.as_bytes(), bundle.roots.iter().map(AsRef::as_ref));
        let mut peers = Vec::with_capacity(bundle.peers.len());
        for peer in &bundle.peers {
            peers.push(Domain::new(&peer.trust_domain, &peer.roots, peer.calls)?);
            let calls = [u8::from(peer.calls)];
            let parts = [peer.trust_domain.as_bytes(), &calls].into_iter();
            digest = cache::digest(&digest, parts.chain(peer.roots.iter().map(AsRef::as_ref)));
        }
        Ok(Self { own, peers, digest, algorithms })
    }

    /// The checks of both roles but for the expected IDs, from the cache where possible.
    pub(super) fn peer(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<SpiffeId, VerifyError> {
        let presented = 1 + intermediates.len();
        if presented > CHAIN_CERTIFICATES_MAX {
            return Err(VerifyError::ChainTooLong(presented));
        }
        let key = cache::key(&self.digest, role, leaf, intermediates);
        if let Some(id) = cache::get(&key, now.as_secs()) {
            return Ok(id);
        }
        let (id, validity) = self.check(leaf, intermediates, role, now)?;
        cache::put(key, id.clone(), validity);
        Ok(id)
    }

    /// As [`Trust::peer`] for a peer that we dialed.
    pub(super) fn expected_peer(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        expected: &Arc<[SpiffeId]>,
        now: UnixTime,
    ) -> Result<SpiffeId, VerifyError> {
        let presented = self.peer(leaf, intermediates, Role::Client, now)?;
        if expected.contains(&presented) {
            Ok(presented)
        } else {
            Err(VerifyError::Unexpected { presented, expected: Arc::clone(expected) })
        }
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<(SpiffeId, Validity), VerifyError> {
        let claimed = spiffe_id(leaf);
        let domain = self.domain(claimed.as_ref().ok(), role);
        let validity = domain.check_chain(self.algorithms, leaf, intermediates, role, now)?;
        let id = claimed?;
        if id.trust_domain() != &*domain.name {
            return Err(VerifyError::TrustDomain { presented: id, expected: domain.name.clone() });
        }
        if role == Role::Server && !matches!(id.kind(), Kind::Service(_)) {
            return Err(VerifyError::NotService(id));
        }
        Ok((id, validity))
    }

    /// The domain whose roots decide on who claims to be `claimed`; ours where it is nobody we know of.
    fn domain(&self, claimed: Option<&SpiffeId>, role: Role) -> &Domain {
        let known = |domain: &Domain| claimed.is_some_and(|id| id.trust_domain() == &*domain.name);
        let mut peers = self.peers.iter().filter(|domain| role == Role::Client || domain.calls);
        peers.find(|domain| known(domain)).unwrap_or(&self.own)
    }
}

impl Domain {
    fn new(name: &str, roots: &[CertificateDer<'static>], calls: bool) -> Result<Self, BundleError> {
        let mut anchors = Vec::with_capacity(roots.len());
        let mut validity = Vec::with_capacity(roots.len());
        for (index, root) in roots.iter().enumerate() {
            let (anchor, dates) = load::anchor(index, root)?;
            anchors.push(anchor);
            validity.push(dates);
        }
        Ok(Self { name: name.to_lowercase().into(), anchors, validity, calls })
    }

    /// Builds a path to one of its roots and returns the time in which all of it is valid.
    fn check_chain(
        &self,
        algorithms: WebPkiSupportedAlgorithms,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<Validity, VerifyError> {
        // Consul lists a secondary datacenter's intermediate twice; one of each keeps path building linear.
        let mut candidates: Vec<CertificateDer<'_>> = Vec::with_capacity(intermediates.len());
        for certificate in intermediates {
            if certificate != leaf && !candidates.contains(certificate) {
                candidates.push(CertificateDer::from(certificate.as_ref()));
            }
        }
        let usage = match role {
            Role::Client => KeyUsage::server_auth(),
            Role::Server => KeyUsage::client_auth(),
        };
        let check_path = |path: &VerifiedPath<'_>| self.check_path(path, now);
        let end_entity = EndEntityCert::try_from(leaf).map_err(VerifyError::Chain)?;
        let path = end_entity
            .verify_for_usage(algorithms.all, &self.anchors, &candidates, now, usage, None, Some(&check_path))
            .map_err(VerifyError::Chain)?;

        let mut validity = self.anchor_validity(path.anchor()).unwrap_or(Validity { not_before: 0, not_after: u64::MAX });
        validity = validity.and(certificate_validity(leaf)?);
        for certificate in path.intermediate_certificates() {
            validity = validity.and(certificate_validity(&certificate.der())?);
        }
        Ok(validity)
    }

    /// What webpki leaves out: the root's dates, and that an issuer may sign certificates.
    fn check_path(&self, path: &VerifiedPath<'_>, now: UnixTime) -> Result<(), webpki::Error> {
        let Some(root) = self.anchor_validity(path.anchor()) else {
            return Err(webpki::Error::UnknownIssuer);
        };
        root.check(now)?;
        for certificate in path.intermediate_certificates() {
            let der = certificate.der();
            let (_, parsed) = X509Certificate::from_der(&der).map_err(|_| webpki::Error::BadDer)?;
            let usage = parsed.key_usage().map_err(|_| webpki::Error::MalformedExtensions)?;
            if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
                return Err(webpki::Error::EndEntityUsedAsCa);
            }
        }
        Ok(())
    }

    fn anchor_validity(&self, anchor: &TrustAnchor<'_>) -> Option<Validity> {
        let index = self.anchors.iter().position(|known| std::ptr::eq(known, anchor) || known == anchor)?;
        self.validity.get(index).copied()
    }
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust")
            .field("trust_domain", &self.own.name)
            .field("roots", &self.own.anchors.len())
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

impl Validity {
    fn and(self, other: Self) -> Self {
        Self { not_before: self.not_before.max(other.not_before), not_after: self.not_after.min(other.not_after) }
    }

    fn check(self, now: UnixTime) -> Result<(), webpki::Error> {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        if now.as_secs() > self.not_after {
            return Err(webpki::Error::CertExpired { time: now, not_after: at(self.not_after) });
        }
        if now.as_secs() < self.not_before {
            return Err(webpki::Error::CertNotValidYet { time: now, not_before: at(self.not_before) });
        }
        Ok(())
    }

    fn contains(self, seconds: u64) -> bool {
        (self.not_before..=self.not_after).contains(&seconds)
    }
}

/// The one URI SAN of a leaf, which must not be fit to sign certificates.
fn spiffe_id(leaf: &CertificateDer<'_>) -> Result<SpiffeId, VerifyError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| VerifyError::Malformed("the leaf is not X.509 in DER"))?;
    let usage = parsed.key_usage().map_err(|_| VerifyError::Malformed("the key usage extension"))?;
    if let Some(usage) = usage {
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(VerifyError::KeyUsage("it may sign certificates or revocation lists"));
        }
        if !usage.value.digital_signature() {
            return Err(VerifyError::KeyUsage("digitalSignature is not set"));
        }
    }
    if parsed.is_ca() {
        return Err(VerifyError::Chain(webpki::Error::CaUsedAsEndEntity));
    }
    let names = parsed.subject_alternative_name().map_err(|_| VerifyError::Malformed("the subject alternative name"))?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => Ok(SpiffeId::parse(uri)?),
        (None, _) => Err(VerifyError::Uris(0)),
        (Some(_), more) => Err(VerifyError::Uris(1 + more)),
    }
}

fn certificate_validity(certificate: &CertificateDer<'_>) -> Result<Validity, VerifyError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_| VerifyError::Malformed("a certificate is not X.509 in DER"))?;
    let seconds = |at: x509_parser::time::ASN1Time| u64::try_from(at.timestamp()).unwrap_or(0);
    Ok(Validity { not_before: seconds(parsed.validity().not_before), not_after: seconds(parsed.validity().not_after) })
}

/// When a certificate ends.
pub(super) fn expiry(certificate: &CertificateDer<'_>) -> Result<SystemTime, VerifyError> {
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(certificate_validity(certificate)?.not_after))
}

fn list(ids: &[SpiffeId]) -> String {
    const SHOWN_MAX: usize = 8;
    let mut text = ids.iter().take(SHOWN_MAX).map(SpiffeId::as_str).collect::<Vec<_>>().join(" or ");
    if ids.is_empty() {
        text.push_str("nobody (the target has no known identity yet)");
    } else if ids.len() > SHOWN_MAX {
        text.push_str(" or others");
    }
    text
}

#[cfg(test)]
mod tests;
