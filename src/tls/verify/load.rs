//! What the control plane receives as PEM, checked whole before it is published: our SVID and the trust bundle.
//!
//! Invariant: an [`Svid`] made here has the key of its leaf, chains to the bundle in both roles where that has roots of its
//! domain, names the expected service and is valid now. Key material never appears in an error.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{CHAIN_CERTIFICATES_MAX, Role, Trust, Validity, VerifyError, certificate_validity, spiffe_id};
use crate::identity::{SpiffeId, Svid, TrustBundle};
use crate::tls::provider;

/// Most roots in one bundle; Consul keeps two or three around a rotation.
const ROOTS_MAX: usize = 64;

/// Why a leaf cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// The chain's PEM.
    #[error("the leaf's CertPEM cannot be read ({detail}): expected one or more CERTIFICATE blocks, leaf first")]
    ChainPem {
        /// What the PEM reader said.
        detail: String,
    },
    /// Too many certificates to present.
    #[error("the leaf's CertPEM has {0} certificates, at most {CHAIN_CERTIFICATES_MAX} are presented: check the CA provider")]
    ChainTooLong(usize),
    /// The key's PEM.
    #[error("the leaf's PrivateKeyPEM cannot be read: expected one EC PRIVATE KEY, PRIVATE KEY or RSA PRIVATE KEY block")]
    KeyPem,
    /// A key of a kind that cannot sign in TLS here.
    #[error("the leaf's private key is of no usable kind: expected ECDSA P-256 or P-384, Ed25519 or RSA of 2048 bits or more")]
    KeyKind,
    /// Key and leaf belong to different issuances.
    #[error("the private key does not belong to the leaf {id} (serial {serial}): ask the agent for the leaf again")]
    KeyMismatch {
        /// The leaf's identity.
        id: Box<str>,
        /// Its serial number.
        serial: Box<str>,
    },
    /// The leaf is no SVID.
    #[error("the leaf is not a usable SVID: {0}")]
    Leaf(#[source] VerifyError),
    /// It names another service.
    #[error("the leaf is for {presented}, expected service {expected:?} of trust domain {trust_domain}: check -sidecar-for")]
    OtherService {
        /// Who the leaf names.
        presented: Box<str>,
        /// The service asked for.
        expected: Box<str>,
        /// Our trust domain.
        trust_domain: Box<str>,
    },
    /// Too early or too late.
    #[error(
        "the leaf {id} (serial {serial}) is valid from {from} to {until} and now is {now} (Unix seconds): check this host's clock, \
         then the agent's rotation"
    )]
    NotValidNow {
        /// The leaf's identity.
        id: Box<str>,
        /// Its serial number.
        serial: Box<str>,
        /// Start.
        from: u64,
        /// End.
        until: u64,
        /// Now.
        now: u64,
    },
    /// It does not chain to the bundle.
    #[error("the leaf {id} does not chain to the roots of {trust_domain} ({roots} known): {source}; fetch roots and leaf again")]
    Untrusted {
        /// The leaf's identity.
        id: Box<str>,
        /// Our trust domain.
        trust_domain: Box<str>,
        /// How many roots there are.
        roots: usize,
        /// What chain building said.
        #[source]
        source: Box<VerifyError>,
    },
    /// The bundle itself.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Why roots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// No roots at all.
    #[error("the trust bundle of {trust_domain:?} has no roots: check that Connect is enabled and its CA initialised")]
    Empty {
        /// The trust domain.
        trust_domain: String,
    },
    /// The trust domain is none.
    #[error("trust domain {0:?} is not usable: expected <cluster id>.consul as in the TrustDomain of the roots")]
    TrustDomain(String),
    /// None, where there must be one, or too many.
    #[error("there are {0} roots, expected one to {1}")]
    TooMany(usize, usize),
    /// What is no certificate among those that an app outside of the mesh is known by.
    #[error("certificate number {index} that the app is known by cannot be used ({detail}): check CAFile, or trusted_ca")]
    Outside {
        /// Counted from 0.
        index: usize,
        /// What was wrong.
        detail: String,
    },
    /// A root that is not a CA certificate.
    #[error("root number {index} of the trust bundle cannot be used ({detail}): check RootCert in the agent's roots")]
    Root {
        /// Counted from 0.
        index: usize,
        /// What was wrong.
        detail: String,
    },
}

/// Reads and checks a leaf with its key for `expected_service` (its name) under `bundle`.
pub fn svid(
    chain_pem: &str,
    key_pem: &str,
    expected_service: &str,
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<Svid, SvidError> {
    let chain = chain(chain_pem)?;
    let leaf = &chain[0];
    let id = spiffe_id(leaf).map_err(SvidError::Leaf)?;
    let serial = serial(leaf).map_err(SvidError::Leaf)?;
    let validity = certificate_validity(leaf).map_err(SvidError::Leaf)?;

    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| SvidError::KeyPem)?;
    let signing = rustls::crypto::ring::sign::any_supported_type(&key).map_err(|_| SvidError::KeyKind)?;
    // Made before any check that can fail, so that the key is wiped on every way out.
    let svid = Svid {
        id: id.clone(),
        not_before: at(validity.not_before),
        not_after: at(validity.not_after),
        serial: serial.clone(),
        chain,
        key,
    };
    if CertifiedKey::new(svid.chain.clone(), signing).keys_match().is_err() {
        return Err(SvidError::KeyMismatch { id: id.as_str().into(), serial: serial.into() });
    }
    if id.trust_domain() != bundle.trust_domain.to_lowercase() || !names_service(&id, expected_service) {
        return Err(SvidError::OtherService {
            presented: id.as_str().into(),
            expected: expected_service.into(),
            trust_domain: bundle.trust_domain.as_ref().into(),
        });
    }
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    if !validity.contains(now.as_secs()) {
        let Validity { not_before: from, not_after: until } = validity;
        return Err(SvidError::NotValidNow { id: id.as_str().into(), serial: serial.into(), from, until, now: now.as_secs() });
    }
    // Roots of peers say nothing of our own leaf. Whoever is shown it knows.
    if !bundle.roots.is_empty() || bundle.peers.is_empty() {
        check_trusted(&svid.chain, &id, bundle, now)?;
    }
    Ok(svid)
}

/// Whose leaf `chain_pem` begins with, not yet verified.
pub fn leaf_id(chain_pem: &str) -> Result<SpiffeId, SvidError> {
    spiffe_id(&chain(chain_pem)?[0]).map_err(SvidError::Leaf)
}

/// Reads and checks the roots of `trust_domain`, one or more PEM certificates in each text. Doubles are dropped.
pub fn bundle(trust_domain: &str, roots_pem: &[impl AsRef<str>]) -> Result<TrustBundle, BundleError> {
    let trust_domain = trust_domain.to_ascii_lowercase();
    if SpiffeId::parse(&format!("spiffe://{trust_domain}")).is_err() {
        return Err(BundleError::TrustDomain(trust_domain));
    }
    let mut roots: Vec<CertificateDer<'static>> = Vec::with_capacity(roots_pem.len());
    for (index, pem) in roots_pem.iter().enumerate() {
        let mut found = false;
        for certificate in CertificateDer::pem_slice_iter(pem.as_ref().as_bytes()) {
            let root = certificate.map_err(|error| BundleError::Root { index, detail: error.to_string() })?;
            anchor(index, &root)?;
            found = true;
            if !roots.contains(&root) {
                roots.push(root);
            }
            if roots.len() > ROOTS_MAX {
                return Err(BundleError::TooMany(roots.len(), ROOTS_MAX));
            }
        }
        if !found {
            return Err(BundleError::Root { index, detail: "no CERTIFICATE block in it".to_owned() });
        }
    }
    if roots.is_empty() {
        return Err(BundleError::Empty { trust_domain });
    }
    Ok(TrustBundle { trust_domain: trust_domain.into(), roots, peers: Vec::new() })
}

/// The trust anchor in a root certificate, which must be a CA.
pub(super) fn anchor(index: usize, root: &CertificateDer<'_>) -> Result<(TrustAnchor<'static>, Validity), BundleError> {
    let bad = |detail: String| BundleError::Root { index, detail };
    let anchor = webpki::anchor_from_trusted_cert(root).map_err(|error| bad(error.to_string()))?.to_owned();
    let (_, parsed) = X509Certificate::from_der(root).map_err(|_| bad("not X.509 in DER".to_owned()))?;
    // A version 1 root has no extensions to say so.
    if parsed.version().0 >= 2 && !parsed.is_ca() {
        return Err(bad(format!("{} is not a CA certificate", parsed.subject())));
    }
    let validity = certificate_validity(root).map_err(|error| bad(error.to_string()))?;
    Ok((anchor, validity))
}

fn chain(pem: &str) -> Result<Vec<CertificateDer<'static>>, SvidError> {
    let mut chain = Vec::with_capacity(3);
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        chain.push(certificate.map_err(|error| SvidError::ChainPem { detail: error.to_string() })?);
        if chain.len() > CHAIN_CERTIFICATES_MAX {
            return Err(SvidError::ChainTooLong(chain.len()));
        }
    }
    if chain.is_empty() {
        return Err(SvidError::ChainPem { detail: "no CERTIFICATE block in it".to_owned() });
    }
    Ok(chain)
}

/// As Consul prints it: lower-case hex of the number's bytes, without the sign octet.
fn serial(leaf: &CertificateDer<'_>) -> Result<String, VerifyError> {
    use std::fmt::Write as _;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| VerifyError::Malformed("the leaf is not X.509 in DER"))?;
    let raw = parsed.raw_serial();
    let start = raw.iter().position(|byte| *byte != 0).unwrap_or(raw.len());
    let mut text = String::with_capacity(2 * raw.len());
    for byte in &raw[start..] {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

fn names_service(id: &SpiffeId, expected: &str) -> bool {
    id.service_name().is_some_and(|name| *name.service == *expected)
}

/// Both roles: the same leaf is shown to callers and to those that we call.
fn check_trusted(chain: &[CertificateDer<'static>], id: &SpiffeId, bundle: &TrustBundle, now: UnixTime) -> Result<(), SvidError> {
    let trust = Trust::new(bundle, provider::algorithms())?;
    for role in [Role::Client, Role::Server] {
        trust.check(&chain[0], &chain[1..], role, now).map_err(|source| SvidError::Untrusted {
            id: id.as_str().into(),
            trust_domain: bundle.trust_domain.as_ref().into(),
            roots: bundle.roots.len(),
            source: Box::new(source),
        })?;
    }
    Ok(())
}

fn at(seconds: u64) -> SystemTime {
    // X.509 ends with the year 9999, far inside the range of the clock's 64 bits.
    UNIX_EPOCH + Duration::from_secs(seconds)
}
