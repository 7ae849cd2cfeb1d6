//! rustls configurations for both sides of a pair: SPIFFE leaves, verified by chain and URI, never by DNS name.
//!
//! Invariant: no peer passes whose chain does not reach the roots for its role, or whose leaf has not exactly the URI that was asked
//! for. Every handshake is a full one: no tickets, no session store. Fails at the start with the file's name, later with an alert.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use clap::ValueEnum;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::cipher_suite as suites;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Which side of the relay speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// TLS in, plain out
    Accept,
    /// Plain in, TLS out
    Dial,
}

/// Where identity and trust come from.
#[derive(Debug)]
pub(crate) struct Files<'a> {
    pub(crate) cert: &'a Path,
    pub(crate) key: &'a Path,
    pub(crate) roots: &'a Path,
    pub(crate) expect_uri: Option<&'a str>,
}

/// The TLS side of a relay.
#[derive(Debug, Clone)]
pub(crate) enum Tls {
    Accept(Arc<ServerConfig>),
    Dial(Arc<ClientConfig>),
}

/// Reads the files and makes the configuration for `role`.
pub(crate) fn load(role: Role, files: Files<'_>) -> anyhow::Result<Tls> {
    let provider = Arc::new(provider());
    let chain = certificates(files.cert)?;
    let key = PrivateKeyDer::from_pem_file(files.key)
        .with_context(|| format!("--key {}: give a private key in PEM", files.key.display()))?;
    let roots = certificates(files.roots)?;
    match role {
        Role::Accept => {
            let verifier = CallerVerifier::new(&provider, roots, files.expect_uri)?;
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_client_cert_verifier(Arc::new(verifier))
                .with_single_cert(chain, key)?;
            config.send_tls13_tickets = 0;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            Ok(Tls::Accept(Arc::new(config)))
        }
        Role::Dial => {
            let expect_uri = files.expect_uri.context("--tls dial needs --expect-uri: whom the chain alone does not tell")?;
            let verifier = AnswererVerifier::new(&provider, &roots, expect_uri)?;
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(verifier))
                .with_client_auth_cert(chain, key)?;
            config.resumption = Resumption::disabled();
            config.enable_sni = false;
            Ok(Tls::Dial(Arc::new(config)))
        }
    }
}

/// The name that rustls wants of every client; it is neither sent nor checked.
pub(crate) fn unused_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into())
}

/// AES-128-GCM first, as ringfence and Envoy choose it, so that all of them pay for the same cipher.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        suites::TLS13_AES_128_GCM_SHA256,
        suites::TLS13_AES_256_GCM_SHA384,
        suites::TLS13_CHACHA20_POLY1305_SHA256,
        suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let remedy = || format!("{}: give at least one certificate in PEM", file.display());
    let certificates =
        CertificateDer::pem_file_iter(file).with_context(remedy)?.collect::<Result<Vec<_>, _>>().with_context(remedy)?;
    anyhow::ensure!(!certificates.is_empty(), remedy());
    Ok(certificates)
}

/// Whether the leaf has one URI SAN, and it is `expected`.
fn check_uri(leaf: &CertificateDer<'_>, expected: &str) -> Result<(), rustls::Error> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| CertificateError::BadEncoding)?;
    let names = parsed.subject_alternative_name().map_err(|_| CertificateError::BadEncoding)?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    if uris == [expected] { Ok(()) } else { Err(CertificateError::NotValidForName.into()) }
}

/// Checks who calls: webpki's client verifier, then the URI.
#[derive(Debug)]
struct CallerVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    expect_uri: Option<String>,
}

impl CallerVerifier {
    fn new(
        provider: &Arc<CryptoProvider>,
        roots: Vec<CertificateDer<'static>>,
        expect_uri: Option<&str>,
    ) -> anyhow::Result<Self> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root).context("--roots holds a certificate that cannot be a root")?;
        }
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider)).build()?;
        Ok(Self { chain, expect_uri: expect_uri.map(str::to_owned) })
    }
}

impl ClientCertVerifier for CallerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        self.expect_uri.as_deref().map_or(Ok(()), |expected| check_uri(leaf, expected))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Checks who answers: the chain by webpki without a name, then the URI.
#[derive(Debug)]
struct AnswererVerifier {
    anchors: Vec<TrustAnchor<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    expect_uri: String,
}

impl AnswererVerifier {
    fn new(provider: &CryptoProvider, roots: &[CertificateDer<'static>], expect_uri: &str) -> anyhow::Result<Self> {
        let anchors = roots
            .iter()
            .map(|root| {
                Ok(anchor_from_trusted_cert(root).context("--roots holds a certificate that cannot be a root")?.to_owned())
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { anchors, algorithms: provider.signature_verification_algorithms, expect_uri: expect_uri.to_owned() })
    }
}

impl ServerCertVerifier for AnswererVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let usage = KeyUsage::server_auth();
        EndEntityCert::try_from(leaf)
            .and_then(|end| {
                end.verify_for_usage(self.algorithms.all, &self.anchors, intermediates, now, usage, None, None).map(drop)
            })
            .map_err(|error| match error {
                webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
                webpki::Error::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
                other => CertificateError::Other(rustls::OtherError(Arc::new(other))),
            })?;
        check_uri(leaf, &self.expect_uri)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
