//! Verification of servers outside of the mesh: by CA, and by a name where one is asked for.
//!
//! Source of the semantics: Envoy's `DefaultCertValidator` with `trusted_ca` and subject alternative name matchers, as Consul
//! sends them for terminating gateways. Without a matcher any certificate of the CA does.

use std::fmt;
use std::net::IpAddr;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::roles::refuse;
use super::{BundleError, CHAIN_CERTIFICATES_MAX, Domain, Role, VerifyError, certificate_validity, load};

/// Most roots: what operating systems bring has about 150.
const ROOTS_MAX: usize = 1_024;
/// Most of a certificate's names that an error shows.
const SHOWN_MAX: usize = 8;

/// A name that a certificate must carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct San {
    /// Where it must stand; anywhere if none.
    pub kind: Option<SanKind>,
    /// The name; a DNS name may be met by a certificate's wildcard.
    pub exact: Box<str>,
}

/// A kind of subject alternative name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SanKind {
    /// A host name.
    Dns,
    /// A URI.
    Uri,
    /// An e-mail address.
    Email,
    /// An IP address.
    Ip,
}

/// The roots and names of one app.
pub(in crate::tls) struct OutsideTrust {
    /// All that was given, CA or not: each is trusted as it stands.
    given: Vec<CertificateDer<'static>>,
    cas: Domain,
    names: Vec<San>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl OutsideTrust {
    pub(in crate::tls) fn new(
        roots: &[CertificateDer<'static>],
        names: &[San],
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Result<Self, BundleError> {
        if roots.is_empty() || roots.len() > ROOTS_MAX {
            return Err(BundleError::TooMany(roots.len(), ROOTS_MAX));
        }
        let mut cas = Vec::with_capacity(roots.len());
        for (index, root) in roots.iter().enumerate() {
            match load::anchor(index, root) {
                Ok(_) => cas.push(root.clone()),
                // No CA, and yet a certificate: it can only stand for itself.
                Err(_) if X509Certificate::from_der(root).is_ok() => {}
                Err(BundleError::Root { index, detail }) => return Err(BundleError::Outside { index, detail }),
                Err(why) => return Err(why),
            }
        }
        Ok(Self { given: roots.to_vec(), cas: Domain::new("", &cas, false)?, names: names.to_vec(), algorithms })
    }

    fn check(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<(), VerifyError> {
        let presented = 1 + intermediates.len();
        if presented > CHAIN_CERTIFICATES_MAX {
            return Err(VerifyError::ChainTooLong(presented));
        }
        if self.given.iter().any(|given| given == leaf) {
            certificate_validity(leaf)?.check(now).map_err(VerifyError::Chain)?;
        } else {
            self.cas.check_chain(self.algorithms, leaf, intermediates, Role::Client, now)?;
        }
        self.check_name(leaf)
    }

    fn check_name(&self, leaf: &CertificateDer<'_>) -> Result<(), VerifyError> {
        if self.names.is_empty() {
            return Ok(());
        }
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| VerifyError::Malformed("the leaf is not X.509 in DER"))?;
        let found = parsed.subject_alternative_name().map_err(|_| VerifyError::Malformed("the subject alternative name"))?;
        let found = found.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        if found.iter().any(|name| self.names.iter().any(|wanted| wanted.is_met_by(name))) {
            return Ok(());
        }
        let presented = match found {
            [] => "no name but its subject's, which does not count".to_owned(),
            found => found.iter().take(SHOWN_MAX).map(ToString::to_string).collect::<Vec<_>>().join(", "),
        };
        let expected = self.names.iter().map(|name| &*name.exact).collect::<Vec<_>>().join(" or ");
        Err(VerifyError::Name { presented, expected })
    }
}

impl ServerCertVerifier for OutsideTrust {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(leaf, intermediates, now).map_err(refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, leaf, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, leaf, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl San {
    fn is_met_by(&self, name: &GeneralName<'_>) -> bool {
        let wanted = |kind| self.kind.is_none_or(|wanted| wanted == kind);
        match name {
            GeneralName::DNSName(name) => wanted(SanKind::Dns) && is_dns_match(&self.exact, name),
            GeneralName::URI(uri) => wanted(SanKind::Uri) && *self.exact == **uri,
            GeneralName::RFC822Name(address) => wanted(SanKind::Email) && *self.exact == **address,
            GeneralName::IPAddress(bytes) => wanted(SanKind::Ip) && ip(bytes).is_some_and(|ip| self.exact.parse() == Ok(ip)),
            _ => false,
        }
    }
}

/// Whether the certificate's `pattern` stands for `name`: itself, or with `*` for the whole of the first label.
fn is_dns_match(name: &str, pattern: &str) -> bool {
    let (name, pattern) = (name.to_ascii_lowercase(), pattern.to_ascii_lowercase());
    let under = |parent: &str| name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == parent);
    name == pattern || pattern.strip_prefix("*.").is_some_and(under)
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

impl fmt::Debug for OutsideTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutsideTrust").field("roots", &self.given.len()).field("names", &self.names).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::provider::algorithms;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType, date_time_ymd};

    fn key() -> KeyPair {
        KeyPair::generate().expect("a key")
    }

    fn params(names: Vec<SanType>) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.distinguished_name.push(DnType::CommonName, "db");
        params
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().expect("a DNS name"))
    }

    struct Office(Issuer<'static, KeyPair>, CertificateDer<'static>);

    impl Office {
        fn new() -> Self {
            let (key, mut params) = (key(), CertificateParams::default());
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(DnType::CommonName, "a CA of the office");
            let root = params.self_signed(&key).expect("a root").der().clone();
            Self(Issuer::new(params, key), root)
        }

        fn issue(&self, params: &CertificateParams) -> CertificateDer<'static> {
            params.signed_by(&key(), &self.0).expect("a certificate").der().clone()
        }
    }

    fn check(roots: &[CertificateDer<'static>], names: &[San], leaf: &CertificateDer<'_>) -> Result<(), String> {
        let trust = OutsideTrust::new(roots, names, algorithms()).expect("usable roots");
        trust.check(leaf, &[], UnixTime::now()).map_err(|error| error.to_string())
    }

    fn any_kind(name: &str) -> [San; 1] {
        [San { kind: None, exact: name.into() }]
    }

    #[test]
    fn the_ca_decides_and_then_the_name() {
        let (office, other) = (Office::new(), Office::new());
        let ip = "192.0.2.7".parse().expect("an address");
        let names = vec![dns("*.example.com"), SanType::IpAddress(ip), SanType::URI("urn:db".try_into().expect("a URI"))];
        let leaf = office.issue(&params(names));
        let roots = [office.1.clone()];
        assert_eq!(check(&roots, &[], &leaf), Ok(()), "any name does where none is asked for");
        for name in ["db.example.com", "DB.Example.COM", "192.0.2.7", "urn:db"] {
            assert_eq!(check(&roots, &any_kind(name), &leaf), Ok(()), "{name}");
        }
        for name in ["example.com", "a.db.example.com", ".example.com", "192.0.2.8", "urn:other", "db"] {
            let why = check(&roots, &any_kind(name), &leaf).expect_err(name);
            assert!(why.contains("*.example.com") && why.ends_with(&format!("expected {name}")), "{why}");
        }
        let as_uri = [San { kind: Some(SanKind::Uri), exact: "db.example.com".into() }];
        assert!(check(&roots, &as_uri, &leaf).is_err(), "a host name is no URI");
        let why = check(&[other.1], &any_kind("db.example.com"), &leaf).expect_err("another CA");
        assert!(why.contains("not trusted"), "{why}");
    }

    #[test]
    fn a_certificate_that_was_given_is_trusted_as_it_stands_while_it_is_valid() {
        for is_ca in [IsCa::NoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
            let mut params = params(vec![dns("db.example.com")]);
            params.is_ca = is_ca;
            let leaf = params.self_signed(&key()).expect("a certificate").der().clone();
            assert_eq!(check(std::slice::from_ref(&leaf), &any_kind("db.example.com"), &leaf), Ok(()));
            assert!(check(std::slice::from_ref(&leaf), &any_kind("other.example.com"), &leaf).is_err());
            let twin = params.self_signed(&key()).expect("a certificate").der().clone();
            assert!(check(&[leaf], &[], &twin).is_err(), "another key under the same name");
            params.not_after = date_time_ymd(2020, 1, 1);
            let old = params.self_signed(&key()).expect("a certificate").der().clone();
            assert!(check(std::slice::from_ref(&old), &[], &old).is_err_and(|why| why.contains("Expired")));
        }
    }

    #[test]
    fn roots_that_are_none_are_refused() {
        let refused = |roots: &[CertificateDer<'static>]| OutsideTrust::new(roots, &[], algorithms()).map(|_| ()).unwrap_err();
        assert!(matches!(refused(&[]), BundleError::TooMany(0, _)));
        assert!(matches!(refused(&[vec![1, 2, 3].into()]), BundleError::Outside { index: 0, .. }));
    }
}
