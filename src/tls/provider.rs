//! TLS configurations of one identity for one worker.
//!
//! Invariant: every reference count that a handshake touches belongs to one worker: provider, key, chain, verifier and
//! configurations are built per [`WorkerTls`], never shared between two (only the expected IDs of a target are the snapshot's).
//! Sessions are resumed only where that was asked for, and then only within the identity that they were made with
//! (`resume`): a new leaf or trust bundle makes new configurations, which know nothing of the old ones.
//!
//! Must not know policy or sockets. Fails with a [`TlsError`] at build time, or for a name in `dialer` not at all.

use std::fmt;
use std::sync::Arc;

use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{IpAddr, Ipv4Addr, ServerName};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};

use super::backend::provider as library;
use super::handshake::Handshake;
use super::resume::{Sessions, TicketKey};
use super::suites::Suites;
use super::verify::{AnswererVerifier, BundleError, CallerVerifier, Trust, VerifyError};
use crate::identity::{SpiffeId, Svid, TrustBundle};

/// What mesh configuration may change about TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsParams {
    /// Whether TLS 1.2 is spoken too (needed by Envoy as a client).
    pub tls12: bool,
    /// Whether TLS 1.3 is spoken.
    pub tls13: bool,
    /// With which suites TLS 1.2 is spoken. Where there is none, it is not.
    pub suites: Suites,
}

impl TlsParams {
    /// Both versions: Envoy dials with 1.2, our own kind with 1.3.
    pub const DEFAULT: Self = Self { tls12: true, tls13: true, suites: Suites::ALL };
}

impl Default for TlsParams {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// One identity's rustls configurations for one worker; not shared between cores.
#[derive(Clone)]
pub struct WorkerTls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    trust: Arc<Trust>,
    resumption: bool,
}

/// What one worker dials one endpoint with: a configuration made once, and the sessions that may be resumed there.
pub struct Dialer {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    sni: Arc<str>,
    trust: Arc<Trust>,
    expected: Arc<[SpiffeId]>,
    resumption: bool,
}

/// Why configurations could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls refused key, chain or roots.
    #[error("TLS configuration refused: {0}")]
    Rustls(#[from] rustls::Error),
    /// The key of a certificate that somebody outside of the mesh is shown.
    #[error("the key of the certificate cannot be read: expected PEM")]
    Key,
    /// The certificate that somebody outside of the mesh is shown.
    #[error("the certificate cannot be read: {0}")]
    Certificate(#[from] VerifyError),
    /// The roots cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Both versions are switched off.
    #[error(
        "TLS 1.2 and TLS 1.3 are both switched off: check TLSMinVersion, TLSMaxVersion and CipherSuites of the mesh config entry"
    )]
    NoVersion,
}

impl WorkerTls {
    /// Configurations for `svid` trusting `bundle`, one for each of `workers`. With `resumption` both roles resume sessions
    /// that were made with these very configurations, whichever worker a client comes back to.
    pub fn for_workers(
        svid: &Svid,
        bundle: &Arc<TrustBundle>,
        params: &TlsParams,
        resumption: bool,
        workers: usize,
    ) -> Result<Vec<Self>, TlsError> {
        // Without randomness there are no tickets either; rustls then says what is wrong with the first handshake.
        let tickets = resumption.then(TicketKey::random).flatten();
        (0..workers).map(|_| Self::build(svid, bundle, params, tickets.as_ref())).collect()
    }

    /// Configurations for one worker that does a full handshake every time.
    pub fn new(svid: &Svid, bundle: &Arc<TrustBundle>, params: &TlsParams) -> Result<Self, TlsError> {
        Self::build(svid, bundle, params, None)
    }

    fn build(svid: &Svid, bundle: &Arc<TrustBundle>, params: &TlsParams, tickets: Option<&TicketKey>) -> Result<Self, TlsError> {
        let versions = versions(params)?;
        let provider = Arc::new(CryptoProvider { cipher_suites: params.suites.with_tls13(), ..library::default_provider() });
        let trust = Arc::new(Trust::new(bundle, provider.signature_verification_algorithms)?);
        let key = library::sign::any_supported_type(&svid.key)?;
        let certified = CertifiedKey::new(svid.chain.clone(), key);
        certified.keys_match()?;
        let resolver = Arc::new(SingleCertAndKey::from(certified));

        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)?
            .with_client_cert_verifier(Arc::new(CallerVerifier { trust: Arc::clone(&trust) }))
            .with_cert_resolver(resolver.clone());
        keep_to_tickets(&mut server, tickets);

        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(nobody(&trust)))
            .with_client_cert_resolver(resolver);
        client.enable_secret_extraction = true;
        client.resumption = Resumption::disabled();

        Ok(Self { server: Arc::new(server), client: Arc::new(client), trust, resumption: tickets.is_some() })
    }

    /// A server-role handshake: client certificate required, any service of the trust domain accepted.
    pub fn accept(&self) -> Result<Handshake, TlsError> {
        let connection = UnbufferedServerConnection::new(Arc::clone(&self.server))?;
        Ok(Handshake::server(connection, Arc::clone(&self.trust)))
    }

    /// What to dial an endpoint with that gets `sni` and must be exactly one of `expected`. Kept by the worker for as long
    /// as this identity is in use: what it remembers is worth nothing anywhere else.
    ///
    /// An `sni` that is no valid DNS name is left out: it routes nothing between sidecars, and the identity is what counts.
    pub fn dialer(&self, sni: &Arc<str>, expected: &Arc<[SpiffeId]>) -> Dialer {
        let mut config = ClientConfig::clone(&self.client);
        let verifier = AnswererVerifier { trust: Arc::clone(&self.trust), expected: Arc::clone(expected) };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        if self.resumption {
            config.resumption = Resumption::store(Arc::new(Sessions::new()));
        }
        let (name, sent) = sent_name(sni);
        config.enable_sni = sent;
        Dialer {
            config: Arc::new(config),
            name,
            sni: Arc::clone(sni),
            trust: Arc::clone(&self.trust),
            expected: Arc::clone(expected),
            resumption: self.resumption,
        }
    }
}

impl Dialer {
    /// A client-role handshake.
    pub fn connect(&self) -> Result<Handshake, TlsError> {
        let connection = UnbufferedClientConnection::new(Arc::clone(&self.config), self.name.clone())?;
        let (trust, expected) = (Arc::clone(&self.trust), Arc::clone(&self.expected));
        Ok(Handshake::client(connection, trust, expected, self.resumption))
    }

    /// Whether it was made for such a target.
    pub fn fits(&self, sni: &str, expected: &[SpiffeId]) -> bool {
        *self.sni == *sni && *self.expected == *expected
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").field("sni", &self.sni).field("resumption", &self.resumption).finish_non_exhaustive()
    }
}

impl fmt::Debug for WorkerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerTls").field("trust", &self.trust).finish_non_exhaustive()
    }
}

/// The signature algorithms that chains and handshakes may use: ECDSA, RSA and Ed25519.
pub(super) fn algorithms() -> WebPkiSupportedAlgorithms {
    library::default_provider().signature_verification_algorithms
}

/// What rustls is to ask for, and whether it is sent: only a DNS name is.
pub(super) fn sent_name(sni: &str) -> (ServerName<'static>, bool) {
    match ServerName::try_from(sni) {
        Ok(name @ ServerName::DnsName(_)) => (name.to_owned(), true),
        _ => (ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0; 4]))), false),
    }
}

/// What every server configuration here has: secrets for the record layer, and sessions in tickets of this key or none.
pub(super) fn keep_to_tickets(server: &mut ServerConfig, tickets: Option<&TicketKey>) {
    server.enable_secret_extraction = true;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    if let Some(tickets) = tickets.and_then(TicketKey::tickets) {
        server.ticketer = Arc::new(tickets);
        // A ticket serves one connection, and each connection brings the next.
        server.send_tls13_tickets = 1;
    }
}

/// The verifier of the base configuration, which accepts nobody; each connection brings its own.
fn nobody(trust: &Arc<Trust>) -> AnswererVerifier {
    AnswererVerifier { trust: Arc::clone(trust), expected: Arc::from([]) }
}

pub(super) fn versions(params: &TlsParams) -> Result<Vec<&'static SupportedProtocolVersion>, TlsError> {
    let mut versions = Vec::with_capacity(2);
    if params.tls13 {
        versions.push(&rustls::version::TLS13);
    }
    if params.tls12 && !params.suites.is_empty() {
        versions.push(&rustls::version::TLS12);
    }
    if versions.is_empty() { Err(TlsError::NoVersion) } else { Ok(versions) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::fixtures::Ca;

    #[test]
    fn no_reference_count_is_shared_between_workers() {
        let ca = Ca::new("t.consul");
        let svid = ca.svid("web");
        let bundle = ca.bundle();
        let make = || WorkerTls::new(&svid, &bundle, &TlsParams::default()).expect("a configuration");
        let (one, two) = (make(), make());
        assert!(!Arc::ptr_eq(&one.trust, &two.trust));
        assert!(!Arc::ptr_eq(one.server.crypto_provider(), two.server.crypto_provider()));
        assert_eq!(Arc::strong_count(&bundle), 1, "the bundle is copied, not held");
    }

    #[test]
    fn a_foreign_key_and_no_version_are_refused() {
        let ca = Ca::new("t.consul");
        let mut svid = ca.svid("web");
        let none = TlsParams { tls12: false, tls13: false, ..TlsParams::DEFAULT };
        assert!(matches!(WorkerTls::new(&svid, &ca.bundle(), &none), Err(TlsError::NoVersion)));
        let no_suite = TlsParams { tls12: true, tls13: false, suites: Suites::named(["AES128-SHA"]) };
        assert!(matches!(WorkerTls::new(&svid, &ca.bundle(), &no_suite), Err(TlsError::NoVersion)));
        svid.key = ca.svid("db").key.clone_key();
        let refused = WorkerTls::new(&svid, &ca.bundle(), &TlsParams::default());
        assert!(matches!(refused, Err(TlsError::Rustls(rustls::Error::InconsistentKeys(_)))));
    }
}
