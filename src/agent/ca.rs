//! The in-process certificate authority: a root, its rotation with cross-signing, and leaves as Consul issues them.
//!
//! Invariant: exactly one root is active; every leaf verifies against every root that was active within a rotation of it, given
//! the chain that comes with the leaf. A CA key exists in memory only, and only for the active root: it is dropped on rotation.
//!
//! No clock of its own beyond the `now` passed in, no sockets. The facts copied are those of a live Consul: EC P-256, one URI
//! SAN, 32-byte key ids, SEC1 private keys, validity back-dated by a minute.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::sec1;
use crate::identity::SpiffeId;

/// How far a leaf's validity starts in the past; less for leaves so short that it would eat them up.
pub(super) const BACK_DATE: Duration = Duration::from_secs(60);
/// Life of a certificate that cross-signs a new root (Consul: 7 days).
const CROSS_SIGNED_TTL: Duration = Duration::from_secs(7 * 24 * 3_600);
/// Most roots listed at once; the oldest inactive one goes when a rotation would exceed it.
pub(super) const ROOTS_MAX: usize = 16;

/// Why the CA could not do its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum CaError {
    /// rcgen refused.
    #[error("certificate generation failed: {0}")]
    Generate(#[from] rcgen::Error),
    /// A service name that no SPIFFE ID can carry.
    #[error("service {service:?} has no SPIFFE ID: {reason}")]
    Name {
        /// The name.
        service: String,
        /// What is wrong with it.
        reason: crate::identity::IdentityError,
    },
    /// A key in a form that Consul would not have made.
    #[error("{0}")]
    Key(#[from] sec1::KeyError),
}

/// The authority of one agent.
pub(super) struct Authority {
    /// `<cluster id>.consul`.
    pub(super) trust_domain: String,
    cluster_id: String,
    root_ttl: Duration,
    active: ActiveRoot,
    retired: Vec<Root>,
    serial: u64,
}

struct ActiveRoot {
    public: Root,
    params: CertificateParams,
    key: KeyPair,
}

/// What the world may know of a root.
#[derive(Debug, Clone)]
pub(super) struct Root {
    /// SHA-1 of the certificate, hex with colons.
    pub(super) id: String,
    pub(super) serial: u64,
    /// Key id, hex with colons.
    pub(super) signing_key_id: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    pub(super) pem: String,
    /// This root's key, certified by the root before it.
    pub(super) cross_signed: Option<String>,
    pub(super) create_index: u64,
    pub(super) modify_index: u64,
    /// When it stopped being the active one.
    pub(super) retired_at: Option<SystemTime>,
}

/// A leaf with its key.
pub(super) struct Leaf {
    pub(super) serial: String,
    /// The leaf, then the cross-signing certificate if there is one.
    pub(super) chain_pem: String,
    pub(super) key_pem: Zeroizing<String>,
    pub(super) uri: String,
    pub(super) valid_after: SystemTime,
    pub(super) valid_before: SystemTime,
    /// Key id of the root that signed it.
    pub(super) signing_key_id: String,
}

impl Authority {
    /// Makes a new cluster id and its first root.
    pub(super) fn new(root_ttl: Duration, now: SystemTime) -> Result<Self, CaError> {
        let cluster_id = uuid::Uuid::new_v4().to_string();
        let mut serial = 6;
        let active = make_root(&cluster_id, next(&mut serial), root_ttl, now, None)?;
        Ok(Self { trust_domain: format!("{cluster_id}.consul"), cluster_id, root_ttl, active, retired: Vec::new(), serial })
    }

    /// Every root, the active one first.
    pub(super) fn roots(&self) -> impl Iterator<Item = &Root> {
        std::iter::once(&self.active.public).chain(&self.retired)
    }

    /// The root that signs.
    pub(super) fn active(&self) -> &Root {
        &self.active.public
    }

    /// The cluster's id: the trust domain without `.consul`.
    pub(super) fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Replaces the root by a new one (with `key`, or a fresh key), cross-signed by the old one. Nothing changes on an error.
    pub(super) fn rotate(&mut self, key: Option<KeyPair>, index: u64, now: SystemTime) -> Result<(), CaError> {
        let mut serial = self.serial;
        let mut new = make_root(&self.cluster_id, next(&mut serial), self.root_ttl, now, key)?;
        let mut cross = new.params.clone();
        cross.serial_number = Some(serial_number(next(&mut serial)));
        let end = (now + CROSS_SIGNED_TTL).min(self.active.public.not_after);
        cross.not_after = OffsetDateTime::from(end);
        let issuer = Issuer::from_params(&self.active.params, &self.active.key);
        new.public.cross_signed = Some(pem(&cross.signed_by(&new.key, &issuer)?));
        (new.public.create_index, new.public.modify_index) = (index, index);

        self.serial = serial;
        let old = std::mem::replace(&mut self.active, new);
        self.retired.insert(0, Root { retired_at: Some(now), modify_index: index, cross_signed: None, ..old.public });
        self.retired.truncate(ROOTS_MAX - 1);
        Ok(())
    }

    /// Forgets roots that retired before `before`; tells whether there were any.
    pub(super) fn prune(&mut self, before: SystemTime) -> bool {
        let count = self.retired.len();
        self.retired.retain(|root| root.retired_at.is_none_or(|at| at > before));
        self.retired.len() != count
    }

    /// When the first retired root retired.
    pub(super) fn oldest_retirement(&self) -> Option<SystemTime> {
        self.retired.iter().filter_map(|root| root.retired_at).min()
    }

    /// Sets the index under which the first root appeared.
    pub(super) fn stamp(&mut self, index: u64) {
        (self.active.public.create_index, self.active.public.modify_index) = (index, index);
    }

    /// Issues a leaf with a new key.
    pub(super) fn issue(&mut self, service: &str, datacenter: &str, ttl: Duration, now: SystemTime) -> Result<Leaf, CaError> {
        let id = SpiffeId::service(&self.trust_domain, "", "", datacenter, service)
            .map_err(|reason| CaError::Name { service: service.to_owned(), reason })?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let valid_after = whole_seconds(now - BACK_DATE.min(ttl / 4));
        let valid_before = (valid_after + ttl).min(self.active.public.not_after);
        let serial = next(&mut self.serial);

        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(format!("{service}.svc.default.{}.consul", short(&self.cluster_id)));
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.serial_number = Some(serial_number(serial));
        (params.not_before, params.not_after) = (valid_after.into(), valid_before.into());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
            KeyUsagePurpose::DataEncipherment,
            KeyUsagePurpose::KeyAgreement,
        ];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.key_identifier_method = KeyIdMethod::PreSpecified(key_id(&key));
        let issuer = Issuer::from_params(&self.active.params, &self.active.key);
        let mut chain_pem = pem(&params.signed_by(&key, &issuer)?);
        chain_pem.extend(self.active.public.cross_signed.as_deref());

        let der = Zeroizing::new(key.serialize_der());
        Ok(Leaf {
            serial: format!("{:0width$x}", serial, width = hex_width(serial)),
            chain_pem,
            key_pem: sec1::pem_from_pkcs8(&der)?,
            uri: id.as_str().to_owned(),
            valid_after,
            valid_before,
            signing_key_id: self.active.public.signing_key_id.clone(),
        })
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .field("active", &self.active.public.id)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Leaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leaf")
            .field("uri", &self.uri)
            .field("serial", &self.serial)
            .field("key", &"[redacted]")
            .finish_non_exhaustive()
    }
}

fn make_root(cluster_id: &str, serial: u64, ttl: Duration, now: SystemTime, key: Option<KeyPair>) -> Result<ActiveRoot, CaError> {
    let key = match key {
        Some(key) => key,
        None => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?,
    };
    // Back-dated like a leaf, so that no leaf is older than its root.
    let not_before = whole_seconds(now - BACK_DATE);
    let not_after = whole_seconds(now + ttl);
    let mut params = CertificateParams::default();
    let random = &uuid::Uuid::new_v4().simple().to_string()[..8];
    params.distinguished_name = common_name(format!("pri-{random}.consul.ca.{}.consul", short(cluster_id)));
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{cluster_id}.consul").as_str().try_into()?)];
    params.serial_number = Some(serial_number(serial));
    (params.not_before, params.not_after) = (not_before.into(), not_after.into());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    let key_id = key_id(&key);
    params.key_identifier_method = KeyIdMethod::PreSpecified(key_id.clone());
    let certificate = params.self_signed(&key)?;
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, certificate.der());
    let public = Root {
        id: colons(digest.as_ref()),
        serial,
        signing_key_id: colons(&key_id),
        not_before,
        not_after,
        pem: pem(&certificate),
        cross_signed: None,
        create_index: 1,
        modify_index: 1,
        retired_at: None,
    };
    Ok(ActiveRoot { public, params, key })
}

/// SHA-256 of the public key, whole as Consul has it.
fn key_id(key: &KeyPair) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, &key.subject_public_key_info()).as_ref().to_vec()
}

fn common_name(name: String) -> DistinguishedName {
    let mut out = DistinguishedName::new();
    // X.520 bounds a common name at 64; a longer one makes some verifiers refuse the certificate.
    out.push(DnType::CommonName, name.chars().take(64).collect::<String>());
    out
}

fn pem(certificate: &Certificate) -> String {
    certificate.pem().replace("\r\n", "\n")
}

fn next(serial: &mut u64) -> u64 {
    *serial += 1;
    *serial
}

/// Without leading zero bytes: DER integers are minimal.
fn serial_number(serial: u64) -> SerialNumber {
    let bytes = serial.to_be_bytes();
    let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len() - 1);
    SerialNumber::from_slice(&bytes[start..])
}

/// An even number of digits: Consul prints whole bytes.
fn hex_width(serial: u64) -> usize {
    let digits = 16 - serial.leading_zeros() as usize / 4;
    digits + digits % 2
}

fn colons(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

fn short(cluster_id: &str) -> &str {
    cluster_id.get(..8).unwrap_or(cluster_id)
}

/// X.509 knows no fractions of a second.
fn whole_seconds(at: SystemTime) -> SystemTime {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
    use webpki::{EndEntityCert, KeyUsage};

    const HOUR: Duration = Duration::from_secs(3_600);

    fn authority() -> Authority {
        Authority::new(HOUR * 24 * 365, SystemTime::now()).expect("a CA")
    }

    fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("PEM")
    }

    /// Verifies as a peer would: `roots` are the anchors, the rest of the chain is untrusted.
    fn verifies(chain: &[CertificateDer<'static>], roots: &[&str], usage: KeyUsage) -> bool {
        let roots: Vec<_> = roots.iter().flat_map(|pem| certificates(pem)).collect();
        let anchors: Vec<_> = roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).expect("an anchor")).collect();
        let leaf = EndEntityCert::try_from(&chain[0]).expect("a leaf");
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        leaf.verify_for_usage(algorithms.all, &anchors, &chain[1..], UnixTime::now(), usage, None, None).is_ok()
    }

    #[test]
    fn a_leaf_has_consuls_facts() {
        let mut ca = authority();
        let leaf = ca.issue("web", "dc1", HOUR * 72, SystemTime::now()).expect("issued");
        let chain = certificates(&leaf.chain_pem);
        assert_eq!(chain.len(), 1);
        let (_, parsed) = x509_parser::parse_x509_certificate(&chain[0]).expect("X.509");
        let san = parsed.subject_alternative_name().expect("parses").expect("there").value;
        assert_eq!(san.general_names.len(), 1);
        assert_eq!(format!("{:?}", san.general_names[0]), format!("URI({:?})", leaf.uri));
        assert_eq!(leaf.uri, format!("spiffe://{}/ns/default/dc/dc1/svc/web", ca.trust_domain));
        let usage = parsed.key_usage().expect("parses").expect("there");
        assert!(usage.critical && usage.value.flags == 0b1_1101, "{:b}", usage.value.flags);
        let extended = parsed.extended_key_usage().expect("parses").expect("there").value;
        assert!(extended.client_auth && extended.server_auth);
        let basic = parsed.basic_constraints().expect("parses").expect("there");
        assert!(basic.critical && !basic.value.ca);
        assert_eq!(leaf.valid_before.duration_since(leaf.valid_after).expect("order"), HOUR * 72);
        let age = SystemTime::now().duration_since(leaf.valid_after).expect("back-dated");
        assert!((59..=62).contains(&age.as_secs()), "{age:?}");
        assert_eq!(leaf.serial, "08");
        assert!(leaf.key_pem.starts_with("-----BEGIN EC PRIVATE KEY-----\n"));
        let key = PrivateKeyDer::from_pem_slice(leaf.key_pem.as_bytes()).expect("a key");
        let provider = rustls::crypto::ring::default_provider();
        let certified = rustls::sign::CertifiedKey::from_der(chain, key, &provider).expect("SEC1 loads");
        certified.keys_match().expect("key matches leaf");
        assert!(!format!("{leaf:?}").contains("PRIVATE"));
    }

    #[test]
    fn every_leaf_has_its_own_key() {
        let mut ca = authority();
        let now = SystemTime::now();
        let (a, b) = (ca.issue("web", "dc1", HOUR, now).expect("issued"), ca.issue("web", "dc1", HOUR, now).expect("issued"));
        assert_ne!(*a.key_pem, *b.key_pem);
        assert_ne!(a.serial, b.serial);
    }

    #[test]
    fn after_a_rotation_old_and_new_roots_both_verify_the_presented_chain() {
        let mut ca = authority();
        let now = SystemTime::now();
        let old_root = ca.active().pem.clone();
        let old_leaf = certificates(&ca.issue("web", "dc1", HOUR, now).expect("issued").chain_pem);
        ca.rotate(None, 7, now).expect("rotated");
        let new_root = ca.active().pem.clone();
        let new_leaf = certificates(&ca.issue("web", "dc1", HOUR, now).expect("issued").chain_pem);

        assert_eq!(new_leaf.len(), 2);
        for usage in [KeyUsage::client_auth, KeyUsage::server_auth] {
            assert!(verifies(&new_leaf, &[&old_root], usage()), "old root with the presented chain");
            assert!(verifies(&new_leaf, &[&new_root], usage()), "new root alone");
            assert!(verifies(&old_leaf, &[&old_root, &new_root], usage()), "an old leaf while both are listed");
        }
        assert!(!verifies(&new_leaf[..1], &[&old_root], KeyUsage::client_auth()), "old root without the chain");
        assert!(!verifies(&old_leaf, &[&new_root], KeyUsage::client_auth()), "an old leaf after its root has gone");
    }

    #[test]
    fn rotations_keep_the_trust_domain_and_prune_the_old() {
        let mut ca = authority();
        let (trust_domain, now) = (ca.trust_domain.clone(), SystemTime::now());
        for index in 0..20 {
            ca.rotate(None, index, now).expect("rotated");
        }
        assert_eq!(ca.trust_domain, trust_domain);
        assert_eq!(ca.roots().count(), ROOTS_MAX);
        assert!(!ca.prune(now - HOUR));
        assert!(ca.prune(now + HOUR));
        assert_eq!(ca.roots().count(), 1);
    }

    #[test]
    fn names_that_no_identity_can_carry_are_refused() {
        let mut ca = authority();
        assert!(ca.issue("a/b", "dc1", HOUR, SystemTime::now()).is_err());
        assert!(ca.issue("", "dc1", HOUR, SystemTime::now()).is_err());
    }

    #[test]
    fn serials_are_whole_bytes() {
        for (serial, width) in [(0, 2), (8, 2), (0xff, 2), (0x100, 4), (0xfff, 4), (0x1_0000, 6)] {
            assert_eq!(hex_width(serial).max(2), width, "{serial:x}");
        }
    }
}
