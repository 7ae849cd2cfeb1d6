//! rustls's two verifier traits over [`Trust`].
//!
//! Invariant: both check the signature over the handshake with webpki, whatever the cache knew of the chain, and a refusal
//! keeps its reason on the way through rustls.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};

use super::{Role, Trust, VerifyError};
use crate::identity::SpiffeId;

/// Hands a refusal to rustls so that the alert on the wire is the one that fits.
pub(super) fn refuse(error: VerifyError) -> rustls::Error {
    let known = match &error {
        VerifyError::Chain(webpki::Error::UnknownIssuer) => Some(CertificateError::UnknownIssuer),
        VerifyError::Chain(webpki::Error::CertExpired { time, not_after }) => {
            Some(CertificateError::ExpiredContext { time: *time, not_after: *not_after })
        }
        VerifyError::Chain(webpki::Error::CertNotValidYet { time, not_before }) => {
            Some(CertificateError::NotValidYetContext { time: *time, not_before: *not_before })
        }
        VerifyError::Chain(webpki::Error::InvalidSignatureForPublicKey) => Some(CertificateError::BadSignature),
        VerifyError::Chain(webpki::Error::RequiredEkuNotFoundContext(_)) => Some(CertificateError::InvalidPurpose),
        VerifyError::Malformed(_) | VerifyError::Chain(webpki::Error::BadDer) => Some(CertificateError::BadEncoding),
        _ => None,
    };
    known.unwrap_or_else(|| CertificateError::Other(OtherError(Arc::new(error)))).into()
}

/// Checks who calls us.
#[derive(Debug)]
pub(in crate::tls) struct CallerVerifier {
    pub(in crate::tls) trust: Arc<Trust>,
}

impl ClientCertVerifier for CallerVerifier {
    /// None: a peer has one certificate to choose from, and the names of the roots would cost bytes in each handshake.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.peer(leaf, intermediates, Role::Server, now).map_err(refuse)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, leaf, signed, &self.trust.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, leaf, signed, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

/// Checks who answers us, for one connection.
#[derive(Debug)]
pub(in crate::tls) struct AnswererVerifier {
    pub(in crate::tls) trust: Arc<Trust>,
    pub(in crate::tls) expected: Arc<[SpiffeId]>,
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
        self.trust.expected_peer(leaf, intermediates, &self.expected, now).map_err(refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, leaf, signed, &self.trust.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, leaf, signed, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}
