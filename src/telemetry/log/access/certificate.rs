//! What an access log tells of a peer's certificate, which was verified when the connection was set up.

use std::time::{Duration, SystemTime};

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Name};

use super::field::Attribute;
use super::stamp::Stamp;

/// One attribute; `None` where the certificate has it not.
pub(super) fn attribute(der: &[u8], attribute: Attribute) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let text = match attribute {
        Attribute::Subject => name(certificate.subject()),
        Attribute::Issuer => name(certificate.issuer()),
        Attribute::Serial => hex(certificate.raw_serial()),
        Attribute::FingerprintSha256 => hex(ring::digest::digest(&ring::digest::SHA256, der).as_ref()),
        Attribute::DnsNames => names(&certificate, |name| match name {
            GeneralName::DNSName(name) => Some(*name),
            _ => None,
        }),
        Attribute::NotBefore => moment(certificate.validity().not_before.timestamp()),
        Attribute::NotAfter => moment(certificate.validity().not_after.timestamp()),
    };
    printable(text)
}

/// Its URIs, of whoever is no peer of the mesh and may have any.
pub(super) fn uris(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let uris = names(&certificate, |name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    printable(uris)
}

/// On one line, whatever a CA outside of the mesh has signed; `None` where there is nothing.
fn printable(text: String) -> Option<String> {
    let text = if text.contains(char::is_control) { text.escape_debug().to_string() } else { text };
    (!text.is_empty()).then_some(text)
}

/// RFC 2253: the last part first, `CN=db,O=Example`.
fn name(name: &X509Name<'_>) -> String {
    let parts = name.iter_attributes().map(|part| {
        let key = x509_parser::objects::oid2abbrev(part.attr_type(), x509_parser::objects::oid_registry());
        let key = key.map_or_else(|_| part.attr_type().to_id_string(), str::to_owned);
        format!("{key}={}", escaped(part.as_str().unwrap_or_default()))
    });
    let mut parts: Vec<String> = parts.collect();
    parts.reverse();
    parts.join(",")
}

/// Backslashes before what separates the parts of a name.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        if ",+\"\\<>;".contains(c) {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

/// Without the zero that keeps a number positive.
fn hex(bytes: &[u8]) -> String {
    let bytes = match bytes {
        [0, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    };
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Subject alternative names of one kind.
fn names(certificate: &X509Certificate<'_>, of_kind: impl for<'a> Fn(&GeneralName<'a>) -> Option<&'a str>) -> String {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return String::new() };
    names.value.general_names.iter().filter_map(of_kind).collect::<Vec<_>>().join(",")
}

fn moment(seconds: i64) -> String {
    let since = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    SystemTime::UNIX_EPOCH.checked_add(since).map_or_else(String::new, |at| Stamp::new("").print(at))
}
