//! Where this room touches the rules of certificates, which live in `tls::verify`.

use std::time::SystemTime;

use rustls::pki_types::UnixTime;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{Svid, TrustBundle};
use crate::tls::verify;

pub(super) fn svid(chain: &str, key: &str, service: &str, bundle: &TrustBundle, now: SystemTime) -> Result<Svid, String> {
    verify::svid(chain, key, service, bundle, now).map_err(|error| error.to_string())
}

pub(super) fn bundle(trust_domain: &str, roots: &[&str]) -> Result<TrustBundle, String> {
    verify::bundle(trust_domain, roots).map_err(|error| error.to_string())
}

/// The key id of who signed the leaf, as Consul writes `SigningKeyID`: lower-case hex with colons.
pub(super) fn signer(svid: &Svid) -> Option<String> {
    let (_, leaf) = X509Certificate::from_der(svid.chain.first()?).ok()?;
    let key_id = leaf.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(aki) => aki.key_identifier.as_ref(),
        _ => None,
    })?;
    let hex: Vec<String> = key_id.0.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(hex.join(":"))
}

/// Whether the chain in use ends in one of these roots. Time is left out on purpose: an expired leaf still tells its roots.
pub(super) fn chains(svid: &Svid, bundle: &TrustBundle) -> bool {
    let Some((leaf, intermediates)) = svid.chain.split_first() else { return false };
    let Ok(leaf) = webpki::EndEntityCert::try_from(leaf) else { return false };
    let anchors: Vec<_> = bundle.roots.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
    let within = svid.not_before.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    leaf.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        &anchors,
        intermediates,
        // One minute in: Consul dates leaves back by one minute, and an intermediate may be younger than that.
        UnixTime::since_unix_epoch(within + std::time::Duration::from_secs(61)),
        webpki::KeyUsage::client_auth(),
        None,
        None,
    )
    .is_ok()
}
