//! The TLS context of a listener for clients outside of the mesh: what an ingress gateway speaks to them.
//!
//! Invariant: nobody is asked for a certificate, and so nobody is decided on by one. Envoy asks for one where the context has roots,
//! as Consul's has, and refuses one that they do not vouch for, but not a client that shows none.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;

use super::{outside, params};
use crate::control::xds::refusal::Refusal;
use crate::control::xds::secrets::Secret;
use crate::tls::{FrontSettings, FrontTls, Shown, TlsParams};

/// What clients must speak. Their certificate may come by a name of its own, from an SDS server (Consul's `TLS.SDS` of ingress
/// gateways).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control::xds) struct Front {
    certificate: Certificate,
    protocols: Vec<Vec<u8>>,
    params: TlsParams,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Certificate {
    Inline(Shown),
    Secret(SecretName),
}

/// A secret and where it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::control::xds) struct SecretName {
    /// The static cluster of the SDS server.
    pub(in crate::control::xds) cluster: String,
    pub(in crate::control::xds) name: String,
}

impl Front {
    pub(super) fn read(common: &pb::CommonTlsContext) -> Result<Self, Refusal> {
        let inline = outside::certificate(common)?;
        let certificate = match (inline, common.tls_certificate_sds_secret_configs.as_slice()) {
            (Some(shown), []) => Certificate::Inline(shown),
            (None, [config]) => {
                let place = "tls_certificate_sds_secret_configs[0]";
                Certificate::Secret(SecretName::read(config).map_err(|why| why.under(place))?)
            }
            (None, []) => {
                let wanted = "expected one with its key, or one tls_certificate_sds_secret_configs: clients are shown it";
                return Err(Refusal::missing("tls_certificates", wanted));
            }
            (inline, secrets) => {
                let found = format!("{} of them besides {} inline", secrets.len(), usize::from(inline.is_some()));
                return Err(Refusal::new("tls_certificate_sds_secret_configs", found, "expected one certificate"));
            }
        };
        // Envoy translates between the versions of HTTP. Here the app gets what the client speaks: what it speaks is h2.
        let h2 = common.alpn_protocols.iter().any(|name| name == "h2");
        let protocols = common.alpn_protocols.iter().filter(|name| !h2 || *name == "h2");
        let protocols = protocols.map(|name| name.clone().into_bytes()).collect();
        let front = Self { certificate, protocols, params: params(common.tls_params.as_ref())? };
        if let Some(settings) = front.settings(&BTreeMap::new()) {
            // Made once here, so that what cannot be used is refused where it was sent.
            FrontTls::new(settings, 1).map_err(|why| Refusal::new("tls_certificates", why, "expected a usable certificate"))?;
        }
        Ok(front)
    }

    /// The secret that it needs.
    pub(in crate::control::xds) fn secret(&self) -> Option<&SecretName> {
        match &self.certificate {
            Certificate::Inline(_) => None,
            Certificate::Secret(name) => Some(name),
        }
    }

    /// What is spoken, once the secret is there.
    pub(in crate::control::xds) fn settings(&self, secrets: &BTreeMap<SecretName, Arc<Secret>>) -> Option<FrontSettings> {
        let certificate = match &self.certificate {
            Certificate::Inline(shown) => shown,
            Certificate::Secret(name) => &secrets.get(name)?.shown,
        };
        let Self { protocols, params, .. } = self.clone();
        Some(FrontSettings { certificate: certificate.clone(), protocols, params })
    }
}

impl SecretName {
    fn read(config: &pb::SdsSecretConfig) -> Result<Self, Refusal> {
        use core::config_source::ConfigSourceSpecifier;
        use core::grpc_service::TargetSpecifier;
        let wanted = "expected api_config_source of type GRPC with one envoy_grpc, as Consul writes TLS.SDS";
        let refused = |found: &str| Refusal::new("sds_config", found, wanted);
        let source = config.sds_config.as_ref().and_then(|source| source.config_source_specifier.as_ref());
        let api = match source {
            Some(ConfigSourceSpecifier::ApiConfigSource(api)) => api,
            Some(_) => return Err(refused("another source")),
            None => return Err(Refusal::missing("sds_config", wanted)),
        };
        if api.api_type != core::api_config_source::ApiType::Grpc as i32 {
            return Err(refused("another api_type"));
        }
        let [service] = api.grpc_services.as_slice() else { return Err(refused("none or several grpc_services")) };
        if !service.initial_metadata.is_empty() {
            return Err(refused("initial_metadata"));
        }
        match &service.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(grpc)) if !config.name.is_empty() => {
                Ok(Self { cluster: grpc.cluster_name.clone(), name: config.name.clone() })
            }
            Some(TargetSpecifier::EnvoyGrpc(_)) => Err(Refusal::missing("name", "expected the name of a secret")),
            _ => Err(refused("another target")),
        }
    }
}

impl std::fmt::Display for SecretName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of cluster {}", self.name, self.cluster)
    }
}

/// A certificate that came by its name, refused where Envoy does so too.
pub(in crate::control::xds) fn secret(message: &pb::Secret) -> Result<Shown, Refusal> {
    match &message.r#type {
        Some(pb::secret::Type::TlsCertificate(certificate)) => {
            let shown = outside::shown(certificate).map_err(|why| why.under("tls_certificate"))?;
            let settings = FrontSettings { certificate: shown.clone(), protocols: Vec::new(), params: TlsParams::default() };
            FrontTls::new(settings, 1).map_err(|why| Refusal::new("tls_certificate", why, "expected a usable certificate"))?;
            Ok(shown)
        }
        _ => Err(Refusal::new("type", "another kind of secret", "expected tls_certificate")),
    }
}

/// The TLS of one listener, in the snapshot as long as it stays what it is.
pub(in crate::control::xds) fn keep(
    settings: FrontSettings,
    workers: usize,
    old: Option<&Arc<FrontTls>>,
) -> Result<Arc<FrontTls>, String> {
    match old {
        Some(old) if *old.settings() == settings => Ok(Arc::clone(old)),
        _ => FrontTls::new(settings, workers).map(Arc::new).map_err(|why| why.to_string()),
    }
}
