//! TLS contexts of a dump: certificates whole, keys never.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::identity::SpiffeId;
use crate::mesh::Identity;

const PACKAGE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.";
const LINE_CHARS: usize = 64;

/// The transport socket of a public listener.
pub(super) fn downstream(identity: Option<&Identity>) -> Value {
    json!({"name": "tls", "typed_config": {
        "@type": format!("{PACKAGE}DownstreamTlsContext"),
        "common_tls_context": common(identity, &[]),
        "require_client_certificate": true,
    }})
}

/// The transport socket of a cluster that is dialed under `sni` and must answer as one of `expected`.
pub(super) fn upstream(identity: Option<&Identity>, sni: &str, expected: &[SpiffeId]) -> Value {
    json!({"name": "tls", "typed_config": {
        "@type": format!("{PACKAGE}UpstreamTlsContext"),
        "common_tls_context": common(identity, expected),
        "sni": sni,
    }})
}

fn common(identity: Option<&Identity>, expected: &[SpiffeId]) -> Value {
    let mut context = Map::from_iter([("tls_params".to_owned(), json!({}))]);
    // Until the first certificate connections are held: there is no context yet.
    if let Some(identity) = identity {
        let chain: String = identity.svid.chain.iter().map(|certificate| pem(certificate)).collect();
        let certificate = json!({"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": "[redacted]"}});
        context.insert("tls_certificates".to_owned(), json!([certificate]));
        let roots: String = identity.bundle.roots.iter().map(|root| pem(root)).collect();
        let mut validation = Map::from_iter([("trusted_ca".to_owned(), json!({"inline_string": roots}))]);
        if !expected.is_empty() {
            let matchers: Vec<Value> =
                expected.iter().map(|id| json!({"san_type": "URI", "matcher": {"exact": id.as_str()}})).collect();
            validation.insert("match_typed_subject_alt_names".to_owned(), matchers.into());
        }
        context.insert("validation_context".to_owned(), validation.into());
    }
    context.into()
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::with_capacity(text.len() + text.len() / LINE_CHARS + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(LINE_CHARS));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;

    #[test]
    fn the_text_is_read_back_whole() {
        for length in [1, 47, 48, 49, 500] {
            let der = vec![7; length];
            assert_eq!(*CertificateDer::from_pem_slice(pem(&der).as_bytes()).expect("PEM"), der[..]);
        }
    }
}
