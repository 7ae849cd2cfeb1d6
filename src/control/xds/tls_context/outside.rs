//! The TLS context of a cluster whose members are apps outside of the mesh: what a terminating gateway speaks to them.
//!
//! Invariant: no such context is taken without roots. Files are read once, when the context comes, as Envoy does; what cannot be
//! read or used refuses the cluster.

use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use zeroize::Zeroizing;

use super::{check_pair, inline, params, validation};
use crate::control::xds::refusal::Refusal;
use crate::tls::verify::{San, SanKind};
use crate::tls::{OutsideSettings, OutsideTls, Shown};

/// The longest file: what operating systems bring as roots has a fifth of it.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Names of which a certificate must carry one.
const NAMES_MAX: usize = 1_024;

/// Whether a context is none of the mesh: Consul sends those their leaf inline.
pub(super) fn is_outside(common: &pb::CommonTlsContext) -> bool {
    use core::data_source::Specifier;
    let chain = common.tls_certificates.first().and_then(|certificate| certificate.certificate_chain.as_ref());
    let specifier = chain.and_then(|chain| chain.specifier.as_ref());
    !matches!(specifier, Some(Specifier::InlineString(_) | Specifier::InlineBytes(_)))
}

pub(super) fn settings(context: &pb::UpstreamTlsContext, common: &pb::CommonTlsContext) -> Result<OutsideSettings, Refusal> {
    if context.allow_renegotiation || context.auto_host_sni || context.auto_sni_san_validation {
        let wanted = "the server name is the one in sni, and nothing is renegotiated: expected none of these";
        return Err(Refusal::new("auto_host_sni, auto_sni_san_validation or allow_renegotiation", "set", wanted));
    }
    let validation = validation(common)?;
    let field = "validation_context.trusted_ca";
    let Some(source) = &validation.trusted_ca else {
        let wanted =
            "nothing would vouch for the app's certificate: expected a CA, as CAFile of the terminating gateway gives it";
        return Err(Refusal::missing(field, wanted));
    };
    if let Some(custom) = &validation.custom_validator_config {
        let wanted = "an app outside of the mesh is checked against trusted_ca: expected none";
        return Err(Refusal::new("validation_context.custom_validator_config", &custom.name, wanted));
    }
    let roots = CertificateDer::pem_slice_iter(text(source, field)?.as_bytes()).collect::<Result<Vec<_>, _>>();
    let roots = roots.map_err(|_| Refusal::new(field, "unreadable", "expected CERTIFICATE blocks"))?;
    let settings = OutsideSettings {
        roots,
        roots_from: origin(source),
        certificate: certificate(common)?,
        sni: context.sni.as_str().into(),
        names: names(validation)?,
        protocols: common.alpn_protocols.iter().map(|name| name.clone().into_bytes()).collect(),
        params: params(common.tls_params.as_ref())?,
    };
    // Made once here, so that what cannot be used is refused where it was sent.
    OutsideTls::new(settings.clone(), 1)
        .map_err(|why| Refusal::new("common_tls_context", why, "expected usable certificates"))?;
    Ok(settings)
}

pub(super) fn certificate(common: &pb::CommonTlsContext) -> Result<Option<Shown>, Refusal> {
    match common.tls_certificates.as_slice() {
        [] => Ok(None),
        [certificate] => shown(certificate).map(Some).map_err(|why| why.under("tls_certificates[0]")),
        more => Err(Refusal::new("tls_certificates", format!("{} of them", more.len()), "expected one at most")),
    }
}

/// A certificate with its key, wherever they are.
pub(super) fn shown(certificate: &pb::TlsCertificate) -> Result<Shown, Refusal> {
    let (chain_field, key_field) = ("certificate_chain", "private_key");
    let missing = |field: &str| Refusal::missing(field, "expected a file, or PEM inline");
    let source = certificate.certificate_chain.as_ref().ok_or_else(|| missing(chain_field))?;
    let chain = text(source, chain_field)?;
    let key = certificate.private_key.as_ref().ok_or_else(|| missing(key_field))?;
    let key_pem = Zeroizing::new(text(key, key_field)?);
    let chain = check_pair(&chain, &key_pem)?;
    Ok(Shown { chain, key_pem, from: origin(source) })
}

#[expect(deprecated, reason = "Consul up to 1.10 sends match_subject_alt_names")]
fn names(validation: &pb::CertificateValidationContext) -> Result<Vec<San>, Refusal> {
    use pb::subject_alt_name_matcher::SanType;
    let typed = validation.match_typed_subject_alt_names.iter().enumerate().map(|(index, san)| {
        let field = format!("validation_context.match_typed_subject_alt_names[{index}]");
        let kind = match SanType::try_from(san.san_type) {
            Ok(SanType::Dns) => SanKind::Dns,
            Ok(SanType::Uri) => SanKind::Uri,
            Ok(SanType::Email) => SanKind::Email,
            Ok(SanType::IpAddress) => SanKind::Ip,
            other => {
                let found = other.map_or("unknown", |kind| kind.as_str_name());
                return Err(Refusal::new(format!("{field}.san_type"), found, "expected DNS, URI, EMAIL or IP_ADDRESS"));
            }
        };
        san_of(san.matcher.as_ref(), Some(kind), field)
    });
    let untyped = validation.match_subject_alt_names.iter().enumerate();
    let untyped = untyped.map(|(at, san)| san_of(Some(san), None, format!("validation_context.match_subject_alt_names[{at}]")));
    let names = typed.chain(untyped).take(NAMES_MAX + 1).collect::<Result<Vec<_>, _>>()?;
    if names.len() > NAMES_MAX {
        let wanted = format!("at most {NAMES_MAX} names are expected of one app");
        return Err(Refusal::new("validation_context.match_typed_subject_alt_names", names.len(), wanted));
    }
    Ok(names)
}

fn san_of(san: Option<&matcher::StringMatcher>, kind: Option<SanKind>, field: String) -> Result<San, Refusal> {
    match san {
        Some(matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(name)),
            ignore_case: false,
        }) => Ok(San { kind, exact: name.as_str().into() }),
        Some(other) => Err(Refusal::new(field, format!("{other:?}"), "expected exact, with its case")),
        None => Err(Refusal::missing(field, "expected exact")),
    }
}

/// What a source holds, wherever that is.
fn text(source: &core::DataSource, field: &str) -> Result<String, Refusal> {
    use core::data_source::Specifier;
    match &source.specifier {
        Some(Specifier::Filename(path)) => {
            read(path).map_err(|why| Refusal::new(format!("{field}.filename"), path, format!("{why}: expected PEM")))
        }
        Some(Specifier::EnvironmentVariable(name)) => std::env::var(name).map_err(|_| {
            Refusal::new(format!("{field}.environment_variable"), name, "not set for this process: expected PEM in it")
        }),
        Some(Specifier::InlineString(_) | Specifier::InlineBytes(_)) | None => inline(Some(source), field),
    }
}

fn origin(source: &core::DataSource) -> Box<str> {
    match &source.specifier {
        Some(core::data_source::Specifier::Filename(path)) => path.as_str().into(),
        _ => "<inline>".into(),
    }
}

fn read(path: &str) -> Result<String, String> {
    // A pipe would never end, and opening one may wait for ever.
    let len = match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => return Err("it is no regular file".to_owned()),
        Ok(found) if found.len() > FILE_BYTES_MAX => return Err(format!("it is longer than {FILE_BYTES_MAX} bytes")),
        Ok(found) => found.len(),
        Err(error) => return Err(error.to_string()),
    };
    // At once: what grows leaves parts of a key behind.
    let mut text = String::with_capacity(usize::try_from(len).unwrap_or_default() + 1);
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

/// One TLS context of an app, in the snapshot as long as it stays what it is.
pub(in crate::control::xds) fn keep(
    settings: &OutsideSettings,
    workers: usize,
    old: Option<&Arc<OutsideTls>>,
) -> Result<Arc<OutsideTls>, String> {
    match old {
        Some(old) if old.settings() == settings => Ok(Arc::clone(old)),
        _ => OutsideTls::new(settings.clone(), workers).map(Arc::new).map_err(|why| why.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::xds::tls_context::{self, Spoken};
    use crate::tls::fixtures::{Ca, chain_pem, key_pem};
    use envoy_types::pb::google::protobuf::Any;
    use prost::Message as _;

    fn inline_text(text: &str) -> core::DataSource {
        core::DataSource { specifier: Some(core::data_source::Specifier::InlineString(text.to_owned())), ..Default::default() }
    }

    fn file(path: &str) -> core::DataSource {
        core::DataSource { specifier: Some(core::data_source::Specifier::Filename(path.to_owned())), ..Default::default() }
    }

    fn validated(validation: pb::CertificateValidationContext) -> pb::UpstreamTlsContext {
        let kind = pb::common_tls_context::ValidationContextType::ValidationContext(validation);
        let common = pb::CommonTlsContext { validation_context_type: Some(kind), ..Default::default() };
        pb::UpstreamTlsContext { common_tls_context: Some(common), sni: "db.example.com".into(), ..Default::default() }
    }

    fn trusting(ca: core::DataSource) -> pb::UpstreamTlsContext {
        validated(pb::CertificateValidationContext { trusted_ca: Some(ca), ..Default::default() })
    }

    fn showing(context: pb::UpstreamTlsContext, certificates: Vec<pb::TlsCertificate>) -> pb::UpstreamTlsContext {
        let common = context.common_tls_context.unwrap_or_default();
        let common = pb::CommonTlsContext { tls_certificates: certificates, ..common };
        pb::UpstreamTlsContext { common_tls_context: Some(common), ..context }
    }

    fn parse(context: &pb::UpstreamTlsContext) -> Result<Spoken, String> {
        let type_url = format!("type.googleapis.com/{}", tls_context::UPSTREAM);
        let any = Any { type_url, value: context.encode_to_vec() };
        let config_type = Some(core::transport_socket::ConfigType::TypedConfig(any));
        tls_context::upstream(Some(&core::TransportSocket { name: "tls".into(), config_type })).map_err(|why| why.to_string())
    }

    fn taken(context: &pb::UpstreamTlsContext) -> Arc<OutsideSettings> {
        match parse(context) {
            Ok(Spoken::Outside(settings)) => settings,
            other => panic!("{other:?}"),
        }
    }

    fn matcher_of(name: &str) -> matcher::StringMatcher {
        let exact = matcher::string_matcher::MatchPattern::Exact(name.to_owned());
        matcher::StringMatcher { match_pattern: Some(exact), ignore_case: false }
    }

    #[test]
    fn a_ca_alone_is_enough_and_a_certificate_may_lie_in_files() {
        let (ca, folder) = (Ca::new("office.consul"), tempfile::tempdir().expect("a folder"));
        let ca_pem = chain_pem(std::slice::from_ref(ca.certificate()));
        let settings = taken(&trusting(inline_text(&ca_pem)));
        assert_eq!((settings.roots.len(), &*settings.sni, settings.certificate.is_none()), (1, "db.example.com", true));

        let svid = ca.svid("gateway");
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("ca.pem"), &ca_pem).expect("a file");
        std::fs::write(path("gateway.pem"), chain_pem(&svid.chain)).expect("a file");
        std::fs::write(path("gateway.key"), key_pem(&svid.key)).expect("a file");
        let certificate = |key: &str| pb::TlsCertificate {
            certificate_chain: Some(file(&path("gateway.pem"))),
            private_key: Some(file(&path(key))),
            ..Default::default()
        };
        let from_files = trusting(file(&path("ca.pem")));
        let settings = taken(&showing(from_files.clone(), vec![certificate("gateway.key")]));
        assert!(settings.certificate.is_some());
        let debug = format!("{settings:?}");
        assert!(!debug.contains("PRIVATE KEY") && debug.contains("gateway.pem"), "{debug}");

        let refused = |context: &pb::UpstreamTlsContext, wanted: &str| {
            let why = parse(context).expect_err("refused");
            assert!(why.contains(wanted), "{why}");
        };
        refused(&showing(from_files.clone(), vec![certificate("gateway.pem")]), "private_key: unreadable");
        refused(&showing(from_files.clone(), vec![certificate("other.key")]), "other.key; No such file");
        refused(&showing(from_files, vec![certificate("gateway.key"); 2]), "tls_certificates: 2 of them");
        refused(&trusting(file(&path("."))), "it is no regular file");
        refused(&trusting(inline_text("no PEM")), "there are 0 roots, expected one to 1024");
    }

    #[test]
    fn names_are_exact_and_of_their_kind() {
        let pem = chain_pem(std::slice::from_ref(Ca::new("office.consul").certificate()));
        let named = |san_type: i32, matcher: matcher::StringMatcher| {
            let san = pb::SubjectAltNameMatcher { san_type, matcher: Some(matcher), ..Default::default() };
            validated(pb::CertificateValidationContext {
                trusted_ca: Some(inline_text(&pem)),
                match_typed_subject_alt_names: vec![san],
                ..Default::default()
            })
        };
        let settings = taken(&named(2, matcher_of("db.example.com")));
        assert_eq!(settings.names, [San { kind: Some(SanKind::Dns), exact: "db.example.com".into() }]);
        let prefix = matcher::string_matcher::MatchPattern::Prefix("db".into());
        let prefix = matcher::StringMatcher { match_pattern: Some(prefix), ignore_case: false };
        assert!(parse(&named(2, prefix)).is_err_and(|why| why.contains("match_typed_subject_alt_names[0]: ")));
        assert!(parse(&named(5, matcher_of("1.2.3"))).is_err_and(|why| why.contains("san_type: OTHER_NAME")));
    }

    #[test]
    fn nothing_is_spoken_to_whom_nobody_vouches_for() {
        let nobody = validated(pb::CertificateValidationContext::default());
        assert!(parse(&nobody).is_err_and(|why| why.contains("trusted_ca: absent; nothing would vouch")));
        let pem = chain_pem(std::slice::from_ref(Ca::new("office.consul").certificate()));
        let by_host = pb::UpstreamTlsContext { auto_host_sni: true, ..trusting(inline_text(&pem)) };
        assert!(parse(&by_host).is_err_and(|why| why.contains("auto_host_sni")));
        let expired = pb::CertificateValidationContext {
            trusted_ca: Some(inline_text(&pem)),
            allow_expired_certificate: true,
            ..Default::default()
        };
        assert!(parse(&validated(expired)).is_err_and(|why| why.contains("trust_chain_verification")));
    }
}
