//! The TLS context of a listener for clients outside of the mesh: what an ingress gateway speaks to them.
//!
//! Invariant: nobody is asked for a certificate, and so nobody is decided on by one. Envoy asks for one where the context has roots,
//! as Consul's has, and does nothing with it.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;

use super::{outside, params};
use crate::control::xds::refusal::Refusal;
use crate::tls::{FrontSettings, FrontTls};

pub(super) fn settings(common: &pb::CommonTlsContext) -> Result<FrontSettings, Refusal> {
    let Some(certificate) = outside::certificate(common)? else {
        return Err(Refusal::missing("tls_certificates", "expected one with its key: clients are shown it"));
    };
    let settings = FrontSettings {
        certificate,
        protocols: common.alpn_protocols.iter().map(|name| name.clone().into_bytes()).collect(),
        params: params(common.tls_params.as_ref())?,
    };
    // Made once here, so that what cannot be used is refused where it was sent.
    FrontTls::new(settings.clone(), 1).map_err(|why| Refusal::new("common_tls_context", why, "expected a usable certificate"))?;
    Ok(settings)
}

/// The TLS of one listener, in the snapshot as long as it stays what it is.
pub(in crate::control::xds) fn keep(
    settings: &FrontSettings,
    workers: usize,
    old: Option<&Arc<FrontTls>>,
) -> Result<Arc<FrontTls>, String> {
    match old {
        Some(old) if old.settings() == settings => Ok(Arc::clone(old)),
        _ => FrontTls::new(settings.clone(), workers).map(Arc::new).map_err(|why| why.to_string()),
    }
}
