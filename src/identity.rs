//! Who a peer is: SPIFFE IDs, the SVID that proves one, and the trust bundle that checks one.
//!
//! Invariant: a [`SpiffeId`] is well formed, its trust domain is lower case, and two of them are equal exactly when their
//! URIs are. An [`Svid`] has been checked by whoever built it (`tls::verify::svid`); this room only holds it.
//!
//! Knows no file, socket or clock. Hostile text is an [`IdentityError`], never a panic.
//!
//! Formats: `reference` Consul `agent/connect/uri*.go`; SPIFFE-ID section 2 for lengths and the trust domain's letters.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The longest SPIFFE ID accepted, in bytes (SPIFFE-ID 2.3).
pub const SPIFFE_ID_BYTES_MAX: usize = 2_048;

/// A checked SPIFFE ID, cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    trust_domain_end: u16,
    kind: Kind,
}

/// What a mesh SPIFFE ID names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A Connect service, the only kind that intentions speak of.
    Service(ServiceName),
    /// A mesh gateway. Never a source of intentions.
    MeshGateway,
    /// Anything else that Consul signs (agents, servers, the CA itself).
    Other,
}

/// The service that a SPIFFE ID of [`Kind::Service`] names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Admin partition; `default` when the URI has none.
    pub partition: Arc<str>,
    /// Namespace; `default` in Consul OSS.
    pub namespace: Arc<str>,
    /// Datacenter that issued the identity.
    pub datacenter: Arc<str>,
    /// Service name.
    pub service: Arc<str>,
}

/// Why a text is not a SPIFFE ID that this mesh can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The URI is longer than [`SPIFFE_ID_BYTES_MAX`].
    #[error("SPIFFE ID of {0} bytes is longer than {SPIFFE_ID_BYTES_MAX}")]
    TooLong(usize),
    /// It does not start with `spiffe://`.
    #[error("not a SPIFFE ID: the scheme is not spiffe://")]
    Scheme,
    /// The trust domain is empty or has a letter that SPIFFE forbids.
    #[error("SPIFFE ID has an empty or malformed trust domain")]
    TrustDomain,
    /// A path segment is empty, `.`/`..`, or badly percent-encoded; or there is a query or fragment.
    #[error("SPIFFE ID has a malformed path")]
    Path,
}

impl SpiffeId {
    /// Parses and checks `uri`.
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        if uri.len() > SPIFFE_ID_BYTES_MAX {
            return Err(IdentityError::TooLong(uri.len()));
        }
        let rest = uri.strip_prefix("spiffe://").ok_or(IdentityError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_trust_domain(trust_domain) {
            return Err(IdentityError::TrustDomain);
        }
        let kind = parse_path(path, rest.len() != trust_domain.len())?;
        let trust_domain_end = u16::try_from("spiffe://".len() + trust_domain.len()).map_err(|_| IdentityError::TrustDomain)?;
        Ok(Self { uri: uri.into(), trust_domain_end, kind })
    }

    /// Builds the ID of a service. `partition` is left out of the URI when it is empty or `default`.
    pub fn service(
        trust_domain: &str,
        partition: &str,
        namespace: &str,
        datacenter: &str,
        service: &str,
    ) -> Result<Self, IdentityError> {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        let partition = match partition {
            "" | "default" => String::new(),
            name => format!("/ap/{}", encode(name)),
        };
        Self::parse(&format!(
            "spiffe://{}{partition}/ns/{}/dc/{}/svc/{}",
            trust_domain.to_ascii_lowercase(),
            encode(namespace),
            encode(datacenter),
            encode(service),
        ))
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain, lower case.
    pub fn trust_domain(&self) -> &str {
        &self.uri["spiffe://".len()..usize::from(self.trust_domain_end)]
    }

    /// What it names.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The service it names, if it names one.
    pub fn service_name(&self) -> Option<&ServiceName> {
        match &self.kind {
            Kind::Service(name) => Some(name),
            Kind::MeshGateway | Kind::Other => None,
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

/// An X.509 SVID with its key: what a service presents in both roles.
pub struct Svid {
    /// The identity that the leaf's URI SAN carries.
    pub id: SpiffeId,
    /// Leaf first, then every intermediate that Consul sent, in its order.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key. Wiped when dropped, never printed.
    pub key: PrivateKeyDer<'static>,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Serial number, lower-case hex without separators, as Consul prints it.
    pub serial: String,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("certificates", &self.chain.len())
            .field("key", &"[redacted]")
            .finish_non_exhaustive()
    }
}

impl Drop for Svid {
    fn drop(&mut self) {
        use zeroize::Zeroize;
        self.key.zeroize();
    }
}

/// The roots that a peer's chain may end in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    /// `<cluster id>.consul`, lower case.
    pub trust_domain: Arc<str>,
    /// Every root that Consul lists, active or not. None where all that is called is of peers: then nobody of ours is trusted.
    pub roots: Vec<CertificateDer<'static>>,
    /// Other trust domains that this one is peered with, each named once and none of them ours.
    pub peers: Vec<PeerBundle>,
}

/// The roots of a peered trust domain. They vouch for that domain and for no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerBundle {
    /// Its name, lower case.
    pub trust_domain: Arc<str>,
    /// Its roots, at least one.
    pub roots: Vec<CertificateDer<'static>>,
    /// Whether its services may call ours, as far as intentions let them; otherwise they only answer.
    pub calls: bool,
}

fn is_trust_domain(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_'))
}

/// `path` is what follows the trust domain's slash; `slash` tells whether there was one.
fn parse_path(path: &str, slash: bool) -> Result<Kind, IdentityError> {
    if !slash {
        return Ok(Kind::Other);
    }
    let mut segments = Vec::with_capacity(8);
    for raw in path.split('/') {
        segments.push(decode_segment(raw)?);
        if segments.len() > 16 {
            return Err(IdentityError::Path);
        }
    }
    let (partition, rest) = match segments.as_slice() {
        [ap, name, rest @ ..] if &**ap == "ap" => (Arc::clone(name), rest),
        rest => (Arc::from("default"), rest),
    };
    Ok(match rest {
        [ns, namespace, dc, datacenter, svc, service] if &**ns == "ns" && &**dc == "dc" && &**svc == "svc" => {
            Kind::Service(ServiceName {
                partition,
                namespace: Arc::clone(namespace),
                datacenter: Arc::clone(datacenter),
                service: Arc::clone(service),
            })
        }
        [gateway, mesh, dc, _] if &**gateway == "gateway" && &**mesh == "mesh" && &**dc == "dc" => Kind::MeshGateway,
        _ => Kind::Other,
    })
}

fn decode_segment(raw: &str) -> Result<Arc<str>, IdentityError> {
    let plain =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b'+' | b'@' | b':' | b'$' | b'&' | b'=');
    if raw.is_empty() || raw == "." || raw == ".." || !raw.bytes().all(|b| plain(b) || b == b'%') {
        return Err(IdentityError::Path);
    }
    if !raw.contains('%') {
        return Ok(raw.into());
    }
    let bytes = raw.as_bytes();
    for (at, _) in raw.match_indices('%') {
        let hex = bytes.get(at + 1..at + 3).ok_or(IdentityError::Path)?;
        if !hex.iter().all(u8::is_ascii_hexdigit) {
            return Err(IdentityError::Path);
        }
    }
    let decoded = percent_encoding::percent_decode_str(raw).decode_utf8().map_err(|_| IdentityError::Path)?;
    if decoded.contains(['/', '\0']) {
        return Err(IdentityError::Path);
    }
    Ok(decoded.as_ref().into())
}

fn encode(segment: &str) -> impl fmt::Display + '_ {
    const KEEP: percent_encoding::AsciiSet =
        percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    const SET: &percent_encoding::AsciiSet = &KEEP;
    percent_encoding::utf8_percent_encode(segment, SET)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn service_id_has_its_parts() {
        let id = SpiffeId::parse("spiffe://4a2d.consul/ns/default/dc/dc1/svc/web").expect("valid");
        let name = id.service_name().expect("a service");
        assert_eq!(
            (id.trust_domain(), &*name.service, &*name.datacenter, &*name.partition),
            ("4a2d.consul", "web", "dc1", "default")
        );
        assert_eq!(id, SpiffeId::service("4a2d.consul", "", "", "dc1", "web").expect("valid"));
    }

    #[test]
    fn partition_gateway_and_signing_ids_are_told_apart() {
        let id = SpiffeId::parse("spiffe://t.consul/ap/team/ns/n/dc/d/svc/s").expect("valid");
        assert_eq!(&*id.service_name().expect("service").partition, "team");
        assert_eq!(*SpiffeId::parse("spiffe://t.consul/gateway/mesh/dc/d").expect("valid").kind(), Kind::MeshGateway);
        assert_eq!(*SpiffeId::parse("spiffe://t.consul").expect("valid").kind(), Kind::Other);
    }

    #[test]
    fn malformed_ids_are_refused() {
        for bad in [
            "",
            "http://t/ns/a/dc/b/svc/c",
            "spiffe://",
            "spiffe:///ns/a/dc/b/svc/c",
            "spiffe://T.consul/ns/a/dc/b/svc/c",
            "spiffe://t/ns//dc/b/svc/c",
            "spiffe://t/",
            "spiffe://t/a%2",
            "spiffe://t/a%2fb",
            "spiffe://t/a?b",
            "spiffe://t/a#b",
            "spiffe://t/../b",
            "spiffe://u@t/ns/a/dc/b/svc/c",
            "spiffe://t:1/ns/a/dc/b/svc/c",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad} was accepted");
        }
    }

    proptest! {
        #[test]
        fn parse_never_panics(text in "\\PC{0,300}") {
            let _ = SpiffeId::parse(&text);
            let _ = SpiffeId::parse(&format!("spiffe://{text}"));
        }

        #[test]
        fn built_ids_parse_back(svc in "[a-zA-Z0-9 _./%-]{1,40}", ns in "[a-z0-9-]{1,20}") {
            prop_assume!(!svc.contains('/') && svc != "." && svc != "..");
            let id = SpiffeId::service("t.consul", "p", &ns, "dc1", &svc).expect("built from valid parts");
            let name = id.service_name().expect("service").clone();
            prop_assert_eq!(&*name.service, svc.as_str());
            prop_assert_eq!(&*name.namespace, ns.as_str());
        }
    }
}
