//! TLS contexts of listeners and clusters: certificate, key, roots, versions, and who may answer.
//!
//! Invariant: a [`Material`] has a key that belongs to its certificate, and says of all roots which trust domain they vouch
//! for. Whether it is valid now and chains to its roots is looked at when it is put in use (`identity`), because the first
//! changes by itself and the second in the middle of a root rotation. Secrets are wiped when dropped and never shown.

mod front;
mod outside;

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

pub(super) use self::front::{Front, SecretName, keep as keep_front, secret};
pub(super) use self::outside::keep as keep_outside;
use super::refusal::{Refusal, message_name, unpack};
use crate::identity::SpiffeId;
use crate::tls::verify::{self, CHAIN_CERTIFICATES_MAX};
use crate::tls::{OutsideSettings, Suites, TlsParams};

const UPSTREAM: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const DOWNSTREAM: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const SPIFFE: &str = "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
/// Identities that one target may have.
const EXPECTED_MAX: usize = 1_024;
/// Trust domains that one context may name.
const TRUST_DOMAINS_MAX: usize = 256;

/// What one context presents and trusts.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Material {
    /// Whose certificate it is.
    pub(super) leaf: SpiffeId,
    pub(super) chain_pem: String,
    pub(super) key_pem: Zeroizing<String>,
    /// By trust domain, each named once.
    pub(super) roots: Vec<Roots>,
    pub(super) params: TlsParams,
}

/// Roots and whom they vouch for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Roots {
    pub(super) trust_domain: String,
    pub(super) pem: String,
    /// Whether they vouch for callers, or only for those who answer.
    pub(super) callers: bool,
}

/// What is spoken to a cluster's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spoken {
    /// What comes, as it is.
    Plain,
    /// Mutual TLS of the mesh.
    Mesh(Upstream),
    /// TLS of apps outside of it.
    Outside(Arc<OutsideSettings>),
}

impl Spoken {
    /// Of the mesh, if it is that.
    pub(super) fn mesh(&self) -> Option<&Upstream> {
        match self {
            Self::Mesh(tls) => Some(tls),
            Self::Plain | Self::Outside(_) => None,
        }
    }
}

/// What clients of a filter chain must speak.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Downstream {
    #[default]
    Plain,
    /// Mutual TLS of the mesh.
    Mesh(Arc<Material>),
    /// TLS in which they show no certificate: they are nobody of the mesh.
    Front(Arc<Front>),
}

/// TLS of a cluster of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Upstream {
    pub(super) material: Arc<Material>,
    pub(super) sni: Arc<str>,
    /// Nobody may answer where it is empty.
    pub(super) expected: Arc<[SpiffeId]>,
}

/// The context in a cluster's transport socket.
pub(super) fn upstream(socket: Option<&core::TransportSocket>) -> Result<Spoken, Refusal> {
    let Some(any) = typed(socket)? else { return Ok(Spoken::Plain) };
    let context: pb::UpstreamTlsContext = unpack(any, UPSTREAM, "transport_socket.typed_config")?;
    let place = "transport_socket.typed_config.common_tls_context";
    let common = common(context.common_tls_context.as_ref()).and_then(without_secrets).map_err(|why| why.under(place))?;
    if outside::is_outside(common) {
        let settings = outside::settings(&context, common).map_err(|why| why.under(place))?;
        return Ok(Spoken::Outside(Arc::new(settings)));
    }
    let validation = validation(common).map_err(|why| why.under(place))?;
    let inner = format!("{place}.validation_context");
    let expected = expected(validation).map_err(|why| why.under(&inner))?;
    let roots = roots_of_answerers(validation, &expected).map_err(|why| why.under(&inner))?;
    let material = material(common, |_| roots).map_err(|why| why.under(place))?;
    Ok(Spoken::Mesh(Upstream { material: Arc::new(material), sni: context.sni.as_str().into(), expected }))
}

/// The context in a filter chain's transport socket.
#[expect(deprecated, reason = "Consul up to 1.10 sends match_subject_alt_names")]
pub(super) fn downstream(socket: Option<&core::TransportSocket>) -> Result<Downstream, Refusal> {
    let Some(any) = typed(socket)? else { return Ok(Downstream::Plain) };
    let context: pb::DownstreamTlsContext = unpack(any, DOWNSTREAM, "transport_socket.typed_config")?;
    let place = "transport_socket.typed_config.common_tls_context";
    let common = common(context.common_tls_context.as_ref()).map_err(|why| why.under(place))?;
    if !context.require_client_certificate.as_ref().is_some_and(|required| required.value) {
        let front = Front::read(common).map_err(|why| why.under(place))?;
        return Ok(Downstream::Front(Arc::new(front)));
    }
    let common = without_secrets(common).map_err(|why| why.under(place))?;
    let validation = validation(common).map_err(|why| why.under(place))?;
    if !validation.match_subject_alt_names.is_empty() || !validation.match_typed_subject_alt_names.is_empty() {
        let wanted = "callers are decided on by the RBAC filter, expected no matchers";
        return Err(Refusal::new(format!("{place}.validation_context.match_typed_subject_alt_names"), "present", wanted));
    }
    let roots = roots_of_callers(validation).map_err(|why| why.under(&format!("{place}.validation_context")))?;
    let ours = |leaf: &SpiffeId| match roots {
        Callers::Ours(pem) => vec![Roots { trust_domain: leaf.trust_domain().to_owned(), pem, callers: true }],
        Callers::Named(roots) => roots,
    };
    material(common, ours).map(|material| Downstream::Mesh(Arc::new(material))).map_err(|why| why.under(place))
}

fn typed(socket: Option<&core::TransportSocket>) -> Result<Option<&envoy_types::pb::google::protobuf::Any>, Refusal> {
    match socket {
        None => Ok(None),
        Some(core::TransportSocket { config_type: Some(core::transport_socket::ConfigType::TypedConfig(any)), .. }) => {
            Ok(Some(any))
        }
        Some(socket) => {
            Err(Refusal::new("transport_socket", &socket.name, "expected a TLS context in typed_config, or no transport socket"))
        }
    }
}

fn common(context: Option<&pb::CommonTlsContext>) -> Result<&pb::CommonTlsContext, Refusal> {
    let context = context.ok_or_else(|| Refusal::missing("tls_certificates", "expected a certificate with its key inline"))?;
    if context.custom_handshaker.is_some() || context.custom_tls_certificate_selector.is_some() {
        return Err(Refusal::new("custom_handshaker", "present", "expected a plain TLS context"));
    }
    Ok(context)
}

/// The certificate of the mesh is that of the stream which tells the mesh.
fn without_secrets(context: &pb::CommonTlsContext) -> Result<&pb::CommonTlsContext, Refusal> {
    if context.tls_certificate_sds_secret_configs.is_empty() {
        return Ok(context);
    }
    let wanted = "secrets by name are fetched for clients of ingress gateways only: expected tls_certificates, as Consul sends";
    Err(Refusal::new("tls_certificate_sds_secret_configs", "present", wanted))
}

fn validation(context: &pb::CommonTlsContext) -> Result<&pb::CertificateValidationContext, Refusal> {
    use pb::common_tls_context::ValidationContextType as Kind;
    let found = match &context.validation_context_type {
        Some(Kind::ValidationContext(found)) => found,
        Some(_) => {
            let wanted = "expected validation_context with trusted_ca inline";
            return Err(Refusal::new("validation_context_type", "a context by name or combined", wanted));
        }
        None => return Err(Refusal::missing("validation_context", "expected trusted_ca inline")),
    };
    let refused = |field: &str, wanted: &str| Err(Refusal::new(format!("validation_context.{field}"), "present", wanted));
    if !found.verify_certificate_hash.is_empty() || !found.verify_certificate_spki.is_empty() {
        return refused("verify_certificate_hash", "pinned certificates are not checked: expected matchers of URIs");
    }
    if found.crl.is_some() {
        return refused("crl", "revocation lists are not checked: expected none");
    }
    if found.allow_expired_certificate || found.trust_chain_verification != 0 {
        return refused("trust_chain_verification", "peers are always verified: expected VERIFY_TRUST_CHAIN");
    }
    Ok(found)
}

/// Every matcher must be the exact URI of somebody.
#[expect(deprecated, reason = "Consul up to 1.10 sends match_subject_alt_names")]
fn expected(validation: &pb::CertificateValidationContext) -> Result<Arc<[SpiffeId]>, Refusal> {
    let typed = validation.match_typed_subject_alt_names.iter().enumerate().map(|(index, san)| {
        let field = format!("match_typed_subject_alt_names[{index}]");
        if san.san_type == pb::subject_alt_name_matcher::SanType::Uri as i32 {
            uri(san.matcher.as_ref(), field)
        } else {
            let kind = pb::subject_alt_name_matcher::SanType::try_from(san.san_type).map_or("unknown", |kind| kind.as_str_name());
            Err(Refusal::new(format!("{field}.san_type"), kind, "an SVID is known by its URI: expected URI"))
        }
    });
    let untyped = validation.match_subject_alt_names.iter().enumerate();
    let untyped = untyped.map(|(index, san)| uri(Some(san), format!("match_subject_alt_names[{index}]")));
    let mut ids = typed.chain(untyped).take(EXPECTED_MAX + 1).collect::<Result<Vec<_>, _>>()?;
    if ids.len() > EXPECTED_MAX {
        let wanted = format!("at most {EXPECTED_MAX} identities are expected of one cluster");
        return Err(Refusal::new("match_subject_alt_names", ids.len(), wanted));
    }
    ids.sort();
    ids.dedup();
    Ok(ids.into())
}

fn uri(san: Option<&matcher::StringMatcher>, field: String) -> Result<SpiffeId, Refusal> {
    match san.and_then(|san| san.match_pattern.as_ref()) {
        Some(matcher::string_matcher::MatchPattern::Exact(uri)) => {
            SpiffeId::parse(uri).map_err(|why| Refusal::new(format!("{field}.exact"), uri, why.to_string()))
        }
        Some(other) => Err(Refusal::new(field, format!("{other:?}"), "expected exact with a SPIFFE ID")),
        None => Err(Refusal::missing(field, "expected exact with a SPIFFE ID")),
    }
}

/// Whose roots a listener has.
enum Callers {
    /// Those of the trust domain that the leaf is of.
    Ours(String),
    /// Those of the domains that are named: there are peers.
    Named(Vec<Roots>),
}

fn roots_of_callers(validation: &pb::CertificateValidationContext) -> Result<Callers, Refusal> {
    let Some(custom) = &validation.custom_validator_config else {
        return roots(validation.trusted_ca.as_ref(), "trusted_ca").map(Callers::Ours);
    };
    let place = "custom_validator_config";
    let any = match &custom.typed_config {
        Some(any) if message_name(any) == SPIFFE => any,
        _ => return Err(Refusal::new(format!("{place}.name"), &custom.name, format!("of these only {SPIFFE} is known"))),
    };
    let config: pb::SpiffeCertValidatorConfig = unpack(any, SPIFFE, &format!("{place}.typed_config"))?;
    let place = format!("{place}.typed_config.trust_domains");
    if config.trust_bundles.is_some() {
        return Err(Refusal::new("custom_validator_config.typed_config.trust_bundles", "present", "expected trust_domains"));
    }
    if config.trust_domains.is_empty() || config.trust_domains.len() > TRUST_DOMAINS_MAX {
        let wanted = format!("expected one to {TRUST_DOMAINS_MAX} trust domains, each with its trust_bundle inline");
        return Err(Refusal::new(place, format!("{} of them", config.trust_domains.len()), wanted));
    }
    let mut named: Vec<Roots> = Vec::with_capacity(config.trust_domains.len());
    for (index, domain) in config.trust_domains.iter().enumerate() {
        let trust_domain = domain.name.to_ascii_lowercase();
        let field = format!("{place}[{index}]");
        if SpiffeId::parse(&format!("spiffe://{trust_domain}")).is_err()
            || named.iter().any(|one| one.trust_domain == trust_domain)
        {
            return Err(Refusal::new(format!("{field}.name"), &domain.name, "expected a trust domain that is named once"));
        }
        let pem = roots(domain.trust_bundle.as_ref(), &format!("{field}.trust_bundle"))?;
        named.push(Roots { trust_domain, pem, callers: true });
    }
    Ok(Callers::Named(named))
}

/// The roots of a cluster vouch for the trust domain of those who may answer. Where nobody may, they vouch for nobody.
fn roots_of_answerers(validation: &pb::CertificateValidationContext, expected: &[SpiffeId]) -> Result<Vec<Roots>, Refusal> {
    if let Some(custom) = &validation.custom_validator_config {
        let wanted = "who answers is checked against trusted_ca: expected none";
        return Err(Refusal::new("custom_validator_config", &custom.name, wanted));
    }
    let pem = roots(validation.trusted_ca.as_ref(), "trusted_ca")?;
    let Some(first) = expected.first() else { return Ok(Vec::new()) };
    if let Some(other) = expected.iter().find(|id| id.trust_domain() != first.trust_domain()) {
        let wanted = format!("one bundle vouches for one trust domain: expected all of {}", first.trust_domain());
        return Err(Refusal::new("match_typed_subject_alt_names", other, wanted));
    }
    Ok(vec![Roots { trust_domain: first.trust_domain().to_owned(), pem, callers: false }])
}

fn material(common: &pb::CommonTlsContext, roots: impl FnOnce(&SpiffeId) -> Vec<Roots>) -> Result<Material, Refusal> {
    let [certificate] = common.tls_certificates.as_slice() else {
        let wanted = "expected exactly one certificate with its key inline";
        return Err(Refusal::new("tls_certificates", format!("{} of them", common.tls_certificates.len()), wanted));
    };
    let chain_pem = inline(certificate.certificate_chain.as_ref(), "tls_certificates[0].certificate_chain")?;
    let key_pem = Zeroizing::new(inline(certificate.private_key.as_ref(), "tls_certificates[0].private_key")?);
    check_pair(&chain_pem, &key_pem).map_err(|why| why.under("tls_certificates[0]"))?;
    let leaf = verify::leaf_id(&chain_pem).map_err(|why| {
        Refusal::new("tls_certificates[0].certificate_chain", why, "expected a leaf with the SPIFFE ID of a service")
    })?;
    let params = params(common.tls_params.as_ref())?;
    Ok(Material { roots: roots(&leaf), leaf, chain_pem, key_pem, params })
}

fn inline(source: Option<&core::DataSource>, field: &str) -> Result<String, Refusal> {
    use core::data_source::Specifier;
    match source.and_then(|source| source.specifier.as_ref()) {
        Some(Specifier::InlineString(text)) => Ok(text.clone()),
        Some(Specifier::InlineBytes(bytes)) => {
            String::from_utf8(bytes.clone()).map_err(|_| Refusal::new(field, "bytes that are no text", "expected PEM"))
        }
        Some(Specifier::Filename(path)) => Err(Refusal::new(format!("{field}.filename"), path, "expected PEM inline")),
        Some(Specifier::EnvironmentVariable(name)) => {
            Err(Refusal::new(format!("{field}.environment_variable"), name, "expected PEM inline"))
        }
        None => Err(Refusal::missing(field, "expected PEM inline")),
    }
}

/// The certificates, refused where Envoy does so too: unreadable PEM, and a key of another certificate.
fn check_pair(chain_pem: &str, key_pem: &str) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    let field = "certificate_chain";
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
        .take(CHAIN_CERTIFICATES_MAX + 1)
        .collect::<Result<_, _>>()
        .map_err(|_| Refusal::new(field, "unreadable", "expected CERTIFICATE blocks, leaf first"))?;
    if chain.is_empty() || chain.len() > CHAIN_CERTIFICATES_MAX {
        let wanted = format!("expected one to {CHAIN_CERTIFICATES_MAX}, leaf first");
        return Err(Refusal::new(field, format!("{} certificates", chain.len()), wanted));
    }
    let field = "private_key";
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|_| Refusal::new(field, "unreadable", "expected one EC PRIVATE KEY, PRIVATE KEY or RSA PRIVATE KEY block"))?;
    let signing = rustls::crypto::ring::sign::any_supported_type(&key);
    let key = Zeroizing::new(key);
    let signing = signing.map_err(|_| Refusal::new(field, "of no usable kind", "expected ECDSA, Ed25519 or RSA"))?;
    drop(key);
    let certified = CertifiedKey::new(chain, signing);
    match certified.keys_match() {
        Ok(()) => Ok(certified.cert),
        Err(_) => Err(Refusal::new(field, "of another certificate", "expected the key of certificate_chain's leaf")),
    }
}

fn roots(source: Option<&core::DataSource>, field: &str) -> Result<String, Refusal> {
    let pem = inline(source, field)?;
    let blocks: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    // What the reader says would quote the line, which may be of a key.
    let blocks = blocks.map_err(|_| Refusal::new(field, "unreadable", "expected CERTIFICATE blocks"))?;
    if blocks.is_empty() {
        return Err(Refusal::new(field, "no certificate", "expected CERTIFICATE blocks"));
    }
    // Whose they are makes no difference to whether they can be.
    match verify::bundle("roots.consul", &[&pem]) {
        Ok(_) => Ok(pem),
        Err(why) => Err(Refusal::new(field, why, "expected certificates of CAs")),
    }
}

/// Curves are not narrowed: what is spoken here is a subset of Envoy's defaults already.
fn params(params: Option<&pb::TlsParameters>) -> Result<TlsParams, Refusal> {
    use pb::tls_parameters::TlsProtocol;
    let Some(params) = params else { return Ok(TlsParams::default()) };
    let suites = Suites::named(params.cipher_suites.iter().map(String::as_str));
    let version = |number: i32| TlsProtocol::try_from(number).unwrap_or(TlsProtocol::TlsAuto);
    let (least, most) = (version(params.tls_minimum_protocol_version), version(params.tls_maximum_protocol_version));
    let tls12 = !matches!(least, TlsProtocol::TlSv13);
    let tls13 = !matches!(most, TlsProtocol::TlSv10 | TlsProtocol::TlSv11 | TlsProtocol::TlSv12);
    let too_old = matches!(most, TlsProtocol::TlSv10 | TlsProtocol::TlSv11);
    if too_old || !(tls12 || tls13) {
        let wanted = "TLS 1.2 and 1.3 are spoken: expected TLSv1_2, TLSv1_3 or TLS_AUTO";
        return Err(Refusal::new("tls_params.tls_maximum_protocol_version", most.as_str_name(), wanted));
    }
    if suites.is_empty() && !tls13 {
        let wanted = format!("none of these is spoken in TLS 1.2, and 1.3 is not allowed: expected one of {}", Suites::known());
        return Err(Refusal::new("tls_params.cipher_suites", params.cipher_suites.join(","), wanted));
    }
    if suites.is_empty() && tls12 {
        let asked = params.cipher_suites.join(",");
        tracing::warn!(%asked, spoken = %Suites::known(), "no cipher suite that is asked for is spoken here, so TLS 1.2 is off");
    }
    Ok(TlsParams { tls12: tls12 && !suites.is_empty(), tls13, suites })
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Material")
            .field("leaf", &self.leaf)
            .field("key_pem", &"[redacted]")
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}
