//! A certificate authority for tests, simulations and benchmarks: SVIDs by service name, and every way to spoil one.
//!
//! Invariant: what it issues without options is what Consul issues (EC P-256, one URI SAN, both usages, back-dated a minute),
//! so code that works with it works with Consul. Never part of a release: it panics instead of failing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};

use super::provider::algorithms;
use super::verify::{Role, Trust, VerifyError};
use crate::identity::{PeerBundle, SpiffeId, Svid, TrustBundle};

/// The datacenter in the URIs of its SVIDs.
pub const DATACENTER: &str = "dc1";

/// A CA of one trust domain: a root, or an intermediate below one.
#[derive(Debug)]
pub struct Ca {
    trust_domain: String,
    params: CertificateParams,
    key: KeyPair,
    root: CertificateDer<'static>,
    /// What its leaves present behind themselves.
    chain: Vec<CertificateDer<'static>>,
}

/// A leaf to issue, with everything that may be wrong with it.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// URI SANs.
    pub uris: Vec<String>,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Extended key usages; none leaves the extension out.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// Whether it is a CA certificate.
    pub is_ca: bool,
    /// Its key.
    pub key: KeyKind,
    /// Serial number, big endian.
    pub serial: Vec<u8>,
}

/// Kinds of leaf key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// ECDSA P-256, which Consul always uses.
    P256,
    /// ECDSA P-384.
    P384,
    /// Ed25519.
    Ed25519,
    /// RSA with 2048 bits: always the same key, as making one is slow.
    Rsa,
}

/// The check of a caller's chain by itself, for benchmarks: a handshake around it would hide what it costs.
#[derive(Debug)]
pub struct ChainVerifier(Trust);

impl ChainVerifier {
    /// Trusts `bundle`.
    pub fn new(bundle: &TrustBundle) -> Self {
        Self(Trust::new(bundle, algorithms()).expect("a bundle"))
    }

    /// Who presents `chain`, from this thread's cache where it is there.
    pub fn caller(&self, chain: &[CertificateDer<'_>]) -> Result<SpiffeId, VerifyError> {
        let (leaf, intermediates) = chain.split_first().expect("a leaf");
        self.0.peer(leaf, intermediates, Role::Server, UnixTime::now())
    }
}

impl Ca {
    /// A root on ECDSA P-256.
    pub fn new(trust_domain: &str) -> Self {
        Self::root(trust_domain, KeyPair::generate().expect("a P-256 key"))
    }

    /// A root on RSA.
    pub fn rsa(trust_domain: &str) -> Self {
        Self::root(trust_domain, key_pair(KeyKind::Rsa))
    }

    fn root(trust_domain: &str, key: KeyPair) -> Self {
        let params = ca_params("Consul CA", trust_domain, &key);
        let root = params.self_signed(&key).expect("a root").der().clone();
        Self { trust_domain: trust_domain.to_owned(), params, key, root, chain: Vec::new() }
    }

    /// An intermediate below this CA; its leaves present it.
    pub fn intermediate(&self) -> Self {
        self.intermediate_with(|_| {})
    }

    /// An intermediate whose parameters are changed before it is signed.
    pub fn intermediate_with(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().expect("a P-256 key");
        let mut params = ca_params("Consul intermediate", &self.trust_domain, &key);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer()).expect("an intermediate").der().clone();
        let chain = std::iter::once(certificate).chain(self.chain.iter().cloned()).collect();
        Self { trust_domain: self.trust_domain.clone(), params, key, root: self.root.clone(), chain }
    }

    /// This CA's key under the name and signature of `old`, as Consul makes it when roots rotate.
    pub fn cross_signed_by(&self, old: &Self) -> CertificateDer<'static> {
        self.params.signed_by(&self.key, &old.issuer()).expect("a cross-signed certificate").der().clone()
    }

    /// The root certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// A bundle of this CA's root alone.
    pub fn bundle(&self) -> Arc<TrustBundle> {
        self.bundle_with(&[])
    }

    /// A bundle of this CA's root and others.
    pub fn bundle_with(&self, others: &[&Self]) -> Arc<TrustBundle> {
        let roots = std::iter::once(self).chain(others.iter().copied()).map(|ca| ca.root.clone()).collect();
        Arc::new(TrustBundle { trust_domain: self.trust_domain.as_str().into(), roots, peers: Vec::new() })
    }

    /// This CA's domain as one that others are peered with.
    pub fn as_peer(&self, calls: bool) -> PeerBundle {
        PeerBundle { trust_domain: self.trust_domain.as_str().into(), roots: vec![self.root.clone()], calls }
    }

    /// The SPIFFE ID of a service here.
    pub fn id(&self, service: &str) -> SpiffeId {
        SpiffeId::service(&self.trust_domain, "", "default", DATACENTER, service).expect("a SPIFFE ID")
    }

    /// A regular SVID of a service.
    pub fn svid(&self, service: &str) -> Svid {
        self.issue(&self.leaf(service))
    }

    /// What [`Ca::svid`] issues, to be changed first.
    pub fn leaf(&self, service: &str) -> Leaf {
        let now = now();
        Leaf {
            uris: vec![self.id(service).to_string()],
            not_before: now - Duration::from_secs(60),
            not_after: now + Duration::from_secs(72 * 3_600),
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
            is_ca: false,
            key: KeyKind::P256,
            serial: vec![0x0b],
        }
    }

    /// Issues a leaf, good or bad. The SVID's `id` is the first URI if that is one, else that of a service "none".
    pub fn issue(&self, leaf: &Leaf) -> Svid {
        let key = key_pair(leaf.key);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = leaf.not_before.into();
        params.not_after = leaf.not_after.into();
        params.serial_number = Some(SerialNumber::from(leaf.serial.clone()));
        params.subject_alt_names = leaf.uris.iter().map(|uri| uri_name(uri)).collect();
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
            KeyUsagePurpose::DataEncipherment,
            KeyUsagePurpose::KeyAgreement,
        ];
        params.extended_key_usages.clone_from(&leaf.usages);
        params.is_ca = if leaf.is_ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer()).expect("a leaf").der().clone();
        let id = leaf.uris.first().and_then(|uri| SpiffeId::parse(uri).ok()).unwrap_or_else(|| self.id("none"));
        Svid {
            id,
            chain: std::iter::once(certificate).chain(self.chain.iter().cloned()).collect(),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            not_before: leaf.not_before,
            not_after: leaf.not_after,
            serial: leaf.serial.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }
}

/// PEM of certificates, as Consul's CertPEM.
pub fn chain_pem(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect()
}

/// PEM of a key in the form that it has.
pub fn key_pem(key: &PrivateKeyDer<'_>) -> String {
    let label = match key {
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    pem(label, key.secret_der())
}

/// Now in whole seconds, as certificates count.
pub fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(UnixTime::now().as_secs())
}

fn pem(label: &str, der: &[u8]) -> String {
    const LINE_LETTERS: usize = 64;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(LINE_LETTERS).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn ca_params(name: &str, trust_domain: &str, key: &KeyPair) -> CertificateParams {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    // Each CA has its own subject, as Consul puts a part of an id there.
    let mut hasher = DefaultHasher::new();
    key.public_key_raw().hash(&mut hasher);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("{name} {:016x} {trust_domain}", hasher.finish()));
    params.not_before = (now() - Duration::from_secs(3_600)).into();
    params.not_after = (now() + Duration::from_secs(3_650 * 86_400)).into();
    params.subject_alt_names = vec![uri_name(&format!("spiffe://{trust_domain}"))];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn uri_name(uri: &str) -> SanType {
    SanType::URI(uri.try_into().expect("an ASCII URI"))
}

fn key_pair(kind: KeyKind) -> KeyPair {
    match kind {
        KeyKind::P256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
        KeyKind::P384 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
        KeyKind::Ed25519 => KeyPair::generate_for(&rcgen::PKCS_ED25519),
        KeyKind::Rsa => {
            let key = PrivatePkcs8KeyDer::from_pem_slice(RSA_KEY.as_bytes()).expect("the RSA key");
            KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_RSA_SHA256)
        }
    }
    .expect("a key")
}

/// Made for these tests and used nowhere else.
const RSA_KEY: &str = include_str!("fixtures/rsa.pem");
