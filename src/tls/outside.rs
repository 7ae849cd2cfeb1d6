//! TLS towards an app outside of the mesh, as a terminating gateway speaks it: the server is known by a CA and, where that is
//! asked for, by a name in its certificate. Nobody has a SPIFFE ID there.
//!
//! Invariant: no handshake is begun without roots, and none completes with a server that they do not vouch for; sessions are
//! not resumed, so each is checked. As in Envoy a certificate that is itself among the roots is trusted as it stands.
//!
//! Must not know policy or sockets. Fails with a [`TlsError`] at build time.

use std::fmt;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use zeroize::Zeroizing;

use super::backend::provider as library;
use super::handshake::Handshake;
use super::provider::{TlsError, TlsParams, algorithms, sent_name, versions};
use super::verify::{OutsideTrust, San};

/// What an app outside of the mesh is shown and must show.
#[derive(Clone, PartialEq, Eq)]
pub struct OutsideSettings {
    /// CAs, or certificates that are trusted as they stand.
    pub roots: Vec<CertificateDer<'static>>,
    /// Where they were read, for people: a file, or `<inline>`.
    pub roots_from: Box<str>,
    /// What the app gets if it asks for a certificate.
    pub certificate: Option<Shown>,
    /// The server name that is asked for; none if empty.
    pub sni: Arc<str>,
    /// The certificate must carry one of these; any does if there are none.
    pub names: Vec<San>,
    /// Application protocols to offer, first choice first.
    pub protocols: Vec<Vec<u8>>,
    /// Versions and suites.
    pub params: TlsParams,
}

/// A certificate with its key.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// PEM.
    pub key_pem: Zeroizing<String>,
    /// Where the chain was read, as [`OutsideSettings::roots_from`].
    pub from: Box<str>,
}

/// The configurations made of [`OutsideSettings`], one a worker.
pub struct OutsideTls {
    settings: OutsideSettings,
    workers: Vec<Arc<ClientConfig>>,
}

impl OutsideTls {
    /// Configurations for each of `workers`.
    pub fn new(settings: OutsideSettings, workers: usize) -> Result<Self, TlsError> {
        // Shared by all: handshakes ask it and never count it.
        let trust = Arc::new(OutsideTrust::new(&settings.roots, &settings.names, algorithms())?);
        let workers = (0..workers).map(|_| config(&settings, &trust).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self { settings, workers })
    }

    /// What it was made of.
    pub fn settings(&self) -> &OutsideSettings {
        &self.settings
    }

    /// That of the first worker, for clients of tests.
    #[cfg(test)]
    pub(crate) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.workers[0])
    }

    /// A client-role handshake on that worker; none where it was made for fewer.
    pub fn connect(&self, worker: usize) -> Option<Result<Handshake, TlsError>> {
        let config = Arc::clone(self.workers.get(worker)?);
        let (name, _) = sent_name(&self.settings.sni);
        Some(UnbufferedClientConnection::new(config, name).map(Handshake::with_app).map_err(TlsError::from))
    }
}

impl PartialEq for OutsideTls {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings && self.workers.len() == other.workers.len()
    }
}

impl Eq for OutsideTls {}

impl fmt::Debug for OutsideTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.fmt(f)
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").field("certificates", &self.chain.len()).field("from", &self.from).finish_non_exhaustive()
    }
}

impl fmt::Debug for OutsideSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutsideSettings")
            .field("roots", &self.roots.len())
            .field("sni", &self.sni)
            .field("names", &self.names)
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

fn config(settings: &OutsideSettings, trust: &Arc<OutsideTrust>) -> Result<ClientConfig, TlsError> {
    let versions = versions(&settings.params)?;
    let suites = settings.params.suites.with_tls13();
    let provider = Arc::new(CryptoProvider { cipher_suites: suites, ..library::default_provider() });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(trust) as _);
    let mut config = match &settings.certificate {
        Some(shown) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified(shown)?))),
        None => builder.with_no_client_auth(),
    };
    config.enable_secret_extraction = true;
    config.enable_sni = sent_name(&settings.sni).1;
    config.resumption = Resumption::disabled();
    config.alpn_protocols.clone_from(&settings.protocols);
    Ok(config)
}

pub(super) fn certified(shown: &Shown) -> Result<CertifiedKey, TlsError> {
    let key = PrivateKeyDer::from_pem_slice(shown.key_pem.as_bytes()).map_err(|_| TlsError::Key)?;
    let key = Zeroizing::new(key);
    let certified = CertifiedKey::new(shown.chain.clone(), library::sign::any_supported_type(&key)?);
    certified.keys_match()?;
    Ok(certified)
}
