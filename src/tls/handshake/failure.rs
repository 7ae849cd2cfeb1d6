//! Why a handshake failed, for counters and for the person who reads the log.
//!
//! Invariant: a detail names what was presented and what helps; it carries no key material and no more than
//! [`DETAIL_BYTES_MAX`] of what a peer sent.

use rustls::{CertificateError, Error, OtherError, PeerIncompatible};

use crate::tls::alert;
use crate::tls::verify::VerifyError;

/// Most bytes of a detail.
const DETAIL_BYTES_MAX: usize = 4_096;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// The kind, for counters.
    pub kind: FailureKind,
    /// What rustls or verification said, for the log.
    pub detail: Box<str>,
}

/// The kinds of handshake failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The peer sent what is not TLS, or broke the protocol.
    Protocol,
    /// The peer's certificate was missing or not trusted.
    Certificate,
    /// The chain is good, the SPIFFE ID is not the expected one or none that may come in.
    Identity,
    /// The peer ended it with an alert (its code).
    Alert(u8),
}

/// Whom a handshake is with: what helps differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Other {
    /// A peer of the mesh.
    Peer,
    /// An app outside of it, behind a gateway.
    App,
    /// A client outside of it, in front of a gateway.
    Client,
}

impl Failure {
    pub(super) fn protocol(detail: &str) -> Self {
        Self::new(FailureKind::Protocol, detail.to_owned())
    }

    pub(super) fn from_verify(error: &VerifyError) -> Self {
        let kind = if error.is_identity() { FailureKind::Identity } else { FailureKind::Certificate };
        Self::new(kind, error.to_string())
    }

    pub(super) fn from_rustls(error: &Error, other: Other) -> Self {
        match error {
            Error::AlertReceived(description) => Self::alert(u8::from(*description), other),
            Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => match inner.downcast_ref::<VerifyError>() {
                Some(error) => Self::from_verify(error),
                None => Self::new(FailureKind::Certificate, format!("the peer's certificate is refused: {inner}")),
            },
            Error::InvalidCertificate(reason) => Self::new(
                FailureKind::Certificate,
                format!("the peer's certificate is refused: {reason}{}", remedy(reason, other)),
            ),
            Error::NoCertificatesPresented => Self::new(
                FailureKind::Certificate,
                "the peer presented no certificate: it is not a mesh client, or its sidecar has no leaf yet".to_owned(),
            ),
            Error::PeerIncompatible(reason) => Self::new(FailureKind::Protocol, incompatible(reason)),
            other => Self::new(FailureKind::Protocol, format!("the peer broke the TLS handshake: {other}")),
        }
    }

    /// The five bytes where a record header should be. `first` tells whether anything of TLS came before.
    pub(super) fn not_tls(header: [u8; 5], first: bool, other: Other) -> Self {
        let detail = match &header {
            _ if !first => format!("the peer sent a malformed record header {header:02x?} within the handshake"),
            _ if other == Other::App => {
                format!("its first bytes {header:02x?} are not TLS: leave CAFile out if the app speaks in plain")
            }
            _ if other == Other::Client => {
                format!("its first bytes {header:02x?} are not TLS, which this listener asks for: see TLS of the ingress gateway")
            }
            b"GET /" | b"HEAD " | b"POST " | b"PUT /" | b"DELET" | b"OPTIO" | b"PATCH" | b"CONNE" | b"PRI *" | b"HTTP/" => {
                "the peer speaks plain HTTP to a mutual-TLS port: it must dial its own sidecar, not ours".to_owned()
            }
            [b'S', b'S', b'H', b'-', _] => "the peer speaks SSH to a mutual-TLS port".to_owned(),
            [b'P', b'R', b'O', b'X', b'Y'] => "the peer sends a PROXY protocol header to a mutual-TLS port".to_owned(),
            _ => format!("the peer's first bytes {header:02x?} are not TLS: it must dial its own sidecar, not ours"),
        };
        Self::new(FailureKind::Protocol, detail)
    }

    fn alert(code: u8, other: Other) -> Self {
        let meaning = match other {
            Other::Peer => alert::meaning(code),
            Other::App => meaning_of_app(code),
            Other::Client => meaning_of_client(code),
        };
        let colon = if meaning.is_empty() { "" } else { ": " };
        Self::new(
            FailureKind::Alert(code),
            format!("the peer ended the handshake with alert {} ({code}){colon}{meaning}", alert::name(code)),
        )
    }

    fn new(kind: FailureKind, mut detail: String) -> Self {
        let mut end = detail.len().min(DETAIL_BYTES_MAX);
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        detail.truncate(end);
        Self { kind, detail: detail.into() }
    }
}

/// What an alert of an app behind a terminating gateway usually means.
fn meaning_of_app(code: u8) -> &'static str {
    match code {
        // Some send 42 in TLS 1.2 also where no certificate came.
        42 | 43 | 45 | alert::CERTIFICATE_UNKNOWN | alert::ACCESS_DENIED => {
            "it refused our certificate, or wants one: see CertFile and KeyFile"
        }
        48 => "it does not trust who issued our certificate: see CertFile",
        alert::HANDSHAKE_FAILURE => "if it wants a client certificate, CertFile and KeyFile give one",
        alert::PROTOCOL_VERSION => "it speaks none of the TLS versions that it was offered",
        112 => "it knows no service of that name: see SNI",
        _ => "",
    }
}

/// What an alert of a client of an ingress gateway usually means.
fn meaning_of_client(code: u8) -> &'static str {
    match code {
        42 | 43 | 48 | alert::CERTIFICATE_UNKNOWN => {
            "it refused this listener's certificate: check that it trusts the issuer and calls a name that is in it"
        }
        45 => "this listener's certificate has expired in its view: check both clocks and that rotation works",
        alert::PROTOCOL_VERSION => "it speaks none of this listener's TLS versions: see TLSMinVersion of the ingress gateway",
        alert::HANDSHAKE_FAILURE => "it found no cipher suite, group or signature scheme in common",
        _ => "",
    }
}

fn remedy(reason: &CertificateError, other: Other) -> &'static str {
    match reason {
        CertificateError::UnknownIssuer if other == Other::App => {
            "; none of the certificates that the app is known by issued it: see CAFile"
        }
        CertificateError::UnknownIssuer => "; none of our roots issued it: another mesh, or a root not yet known here",
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "; check both clocks and the rotation of the peer's leaf"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => "; check both clocks",
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "; its extended key usage does not allow this role"
        }
        _ => "",
    }
}

fn incompatible(reason: &PeerIncompatible) -> String {
    format!("the peer speaks no TLS that we do: {reason:?}; TLS 1.2 or 1.3 with ECDHE and an AEAD suite is needed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_explained_by_who_sent_it() {
        let told = |other, code| Failure::alert(code, other).to_string();
        for (other, code, helps) in [
            (Other::Peer, 48, "check that its roots are up to date"),
            (Other::App, 42, "wants one: see CertFile and KeyFile"),
            (Other::App, 48, "see CertFile"),
            (Other::App, 70, "none of the TLS versions that it was offered"),
            (Other::App, 112, "see SNI"),
            (Other::Client, 48, "check that it trusts the issuer"),
            (Other::Client, 70, "see TLSMinVersion of the ingress gateway"),
        ] {
            let text = told(other, code);
            assert!(text.contains(alert::name(code)) && text.contains(helps), "{other:?} {code}: {text}");
        }
        // Nothing of the mesh is of use to whoever is outside of it.
        for code in 0..=u8::MAX {
            for other in [Other::App, Other::Client] {
                let text = told(other, code);
                assert!(!["mesh", "intentions", "sidecar"].iter().any(|word| text.contains(word)), "{other:?} {code}: {text}");
            }
        }
    }
}
