//! TLS that clients outside of the mesh are met with, as an ingress gateway speaks it: they are shown a certificate and show
//! none.
//!
//! Invariant: whoever completes such a handshake is nobody in particular: it gives no identity, and decides nothing. So a session
//! that is resumed skips no decision; its ticket opens only under the settings that sealed it.
//!
//! Must not know policy or sockets. Fails with a [`TlsError`] at build time.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::UnbufferedServerConnection;
use rustls::sign::SingleCertAndKey;

use super::backend::provider as library;
use super::handshake::Handshake;
use super::outside::{Shown, certified};
use super::provider::{TlsError, TlsParams, keep_to_tickets, versions};
use super::resume::TicketKey;
use super::verify::{self, VerifyError};

/// What clients outside of the mesh are shown.
#[derive(Clone, PartialEq, Eq)]
pub struct FrontSettings {
    /// The certificate of the gateway.
    pub certificate: Shown,
    /// Application protocols that are spoken behind it, first choice first. A client that offers others only is turned away; if
    /// there are none, none is agreed on.
    pub protocols: Vec<Vec<u8>>,
    /// Versions and suites.
    pub params: TlsParams,
}

/// The configurations made of [`FrontSettings`], one a worker.
pub struct FrontTls {
    settings: FrontSettings,
    not_after: SystemTime,
    workers: Vec<Arc<ServerConfig>>,
}

impl FrontTls {
    /// Configurations for each of `workers`.
    pub fn new(settings: FrontSettings, workers: usize) -> Result<Self, TlsError> {
        let leaf = settings.certificate.chain.first().ok_or(VerifyError::Malformed("there is none"))?;
        let not_after = verify::expiry(leaf)?;
        // Without randomness there are no tickets either; rustls then says what is wrong with the first handshake.
        let tickets = TicketKey::random();
        let workers = (0..workers).map(|_| config(&settings, tickets.as_ref()).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self { settings, not_after, workers })
    }

    /// What it was made of.
    pub fn settings(&self) -> &FrontSettings {
        &self.settings
    }

    /// When the leaf ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// A server-role handshake on that worker; none where it was made for fewer.
    pub fn accept(&self, worker: usize) -> Option<Result<Handshake, TlsError>> {
        let config = Arc::clone(self.workers.get(worker)?);
        Some(UnbufferedServerConnection::new(config).map(Handshake::with_client).map_err(TlsError::from))
    }
}

impl PartialEq for FrontTls {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings && self.workers.len() == other.workers.len()
    }
}

impl Eq for FrontTls {}

impl fmt::Debug for FrontTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.fmt(f)
    }
}

impl fmt::Debug for FrontSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontSettings")
            .field("certificate", &self.certificate)
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

fn config(settings: &FrontSettings, tickets: Option<&TicketKey>) -> Result<ServerConfig, TlsError> {
    let versions = versions(&settings.params)?;
    let suites = settings.params.suites.with_tls13();
    let provider = Arc::new(CryptoProvider { cipher_suites: suites, ..library::default_provider() });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified(&settings.certificate)?)));
    keep_to_tickets(&mut config, tickets);
    config.alpn_protocols.clone_from(&settings.protocols);
    Ok(config)
}
