//! Verification of servers outside of the mesh: by CA, and by a name where one is asked for.
//!
//! Source of the semantics: Envoy's `DefaultCertValidator` with `trusted_ca` and subject alternative name matchers, as Consul
//! sends them for terminating gateways. Without a matcher any certificate of the CA does.

use std::fmt;
use std::net::IpAddr;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

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
        if roots.is_empty() {
            return Err(BundleError::Empty { trust_domain: "an app outside of the mesh".to_owned() });
        }
        if roots.len() > ROOTS_MAX {
            return Err(BundleError::TooMany(roots.len(), ROOTS_MAX));
        }
        let mut cas = Vec::with_capacity(roots.len());
        for (index, root) in roots.iter().enumerate() {
            match load::anchor(index, root) {
                Ok(_) => cas.push(root.clone()),
                // No CA, and yet a certificate: it can only stand for itself.
                Err(_) if X509Certificate::from_der(root).is_ok() => {}
                Err(why) => return Err(why),
            }
        }
        Ok(Self { given: roots.to_vec(), cas: Domain::new("", &cas, false)?, names: names.to_vec(), algorithms })
    }

    pub(in crate::tls) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), VerifyError> {
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
        let presented = found.iter().take(SHOWN_MAX).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let expected = self.names.iter().map(|name| &*name.exact).collect::<Vec<_>>().join(" or ");
        Err(VerifyError::Name { presented, expected })
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
