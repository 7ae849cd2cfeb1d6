//! TLS configurations of one identity for one worker.

use std::sync::Arc;

use super::handshake::Handshake;
use crate::identity::{SpiffeId, Svid, TrustBundle};

/// What mesh configuration may change about TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsParams {
    /// Whether TLS 1.2 is spoken too (needed by Envoy as a client).
    pub tls12: bool,
    /// Whether TLS 1.3 is spoken.
    pub tls13: bool,
}

/// One identity's rustls configurations for one worker; not shared between cores.
#[derive(Clone)]
pub struct WorkerTls {
    _private: (),
}

/// Why configurations could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls refused key, chain or roots.
    #[error("TLS configuration refused: {0}")]
    Rustls(#[from] rustls::Error),
}

impl WorkerTls {
    /// Configurations for `svid` trusting `bundle`.
    pub fn new(_svid: &Svid, _bundle: &Arc<TrustBundle>, _params: &TlsParams) -> Result<Self, TlsError> {
        todo!()
    }

    /// A server-role handshake: client certificate required, any service of the trust domain accepted.
    pub fn accept(&self) -> Result<Handshake, TlsError> {
        todo!()
    }

    /// A client-role handshake that sends `sni` and accepts exactly one of `expected`.
    pub fn connect(&self, _sni: &str, _expected: &Arc<[SpiffeId]>) -> Result<Handshake, TlsError> {
        todo!()
    }
}
