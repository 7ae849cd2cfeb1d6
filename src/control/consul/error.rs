//! What can go wrong with the agent, told apart by what one would do about it.
//!
//! Statuses and texts: Consul 1.8 to current; only `ACL not found` is matched by text, because 403 has two meanings.

use std::error::Error;
use std::time::Duration;

use rustls::AlertDescription;

/// Longest piece of an agent's error text that is repeated in ours.
const TEXT_CHARS_MAX: usize = 300;
/// Most errors below an error that are looked at; HTTP over TLS over TCP has five.
const SOURCES_MAX: usize = 16;

/// An endpoint that this proxy calls: its name in errors and metrics, the right it needs, the largest body believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Endpoint {
    Services,
    Definition,
    Checks,
    Roots,
    Leaf,
    Match,
    IntentionIndex,
    Authorize,
    Chain,
    Health,
    Gateways,
    Query,
    Mesh,
    Login,
    Logout,
}

impl Endpoint {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Services => "agent/services",
            Self::Definition => "agent/service",
            Self::Checks => "agent/checks",
            Self::Roots => "connect/ca/roots",
            Self::Leaf => "connect/ca/leaf",
            Self::Match => "intentions/match",
            Self::IntentionIndex => "intentions",
            Self::Authorize => "connect/authorize",
            Self::Chain => "discovery-chain",
            Self::Health => "health/connect",
            Self::Gateways => "health/service",
            Self::Query => "query/execute",
            Self::Mesh => "config/mesh",
            Self::Login => "acl/login",
            Self::Logout => "acl/logout",
        }
    }

    fn right(self) -> &'static str {
        match self {
            Self::Services | Self::Definition => "service:read on the sidecar's own service name (NAME-sidecar-proxy)",
            Self::Checks => "service:read on the service",
            Self::Leaf | Self::Authorize => "service:write on the service",
            Self::Match | Self::IntentionIndex => "intentions:read on the service (service:write implies it)",
            Self::Chain | Self::Health | Self::Gateways | Self::Query => "service:read and node:read on the upstream",
            Self::Roots | Self::Mesh => "any valid token",
            Self::Login | Self::Logout => "an auth method with a binding rule that matches the bearer token",
        }
    }

    /// The largest answer believed. Lists grow with the catalog, everything else is small.
    pub(crate) fn body_bytes_max(self) -> usize {
        match self {
            Self::Services | Self::Health | Self::Gateways | Self::Query => 32 << 20,
            Self::Match | Self::Chain | Self::Definition | Self::Checks => 8 << 20,
            _ => 1 << 20,
        }
    }
}

/// Why a call did not give an answer to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error(
        "Consul agent at {address} cannot be reached: {detail}; check that it runs and that -http-addr or CONSUL_HTTP_ADDR names it"
    )]
    Unreachable { address: String, detail: String },
    #[error(
        "Consul agent at {address} closed the connection without answering {}: it is restarting, or limits.http_max_conns_per_client (200) is reached",
        endpoint.name()
    )]
    Reset { address: String, endpoint: Endpoint, soon: bool },
    #[error(
        "Consul agent at {address} wants a TLS client certificate and got none, or one that it does not accept \
         (alert {alert:?}): name one that the agent's CA signed, with its key, by -client-cert and -client-key \
         (CONSUL_CLIENT_CERT, CONSUL_CLIENT_KEY)"
    )]
    ClientCertificate { address: String, alert: AlertDescription },
    #[error("Consul agent did not answer {} within {after:?}", endpoint.name())]
    Timeout { endpoint: Endpoint, after: Duration },
    #[error(
        "{}: the agent does not know the ACL token (expired or deleted): replace it in the token file or log in again",
        endpoint.name()
    )]
    TokenUnknown { endpoint: Endpoint },
    #[error("{}: {text}; the token needs {}", endpoint.name(), endpoint.right())]
    Forbidden { endpoint: Endpoint, text: String },
    #[error("{}: {text}", endpoint.name())]
    NotFound { endpoint: Endpoint, text: String },
    #[error("{}: the agent answered 429 (too many connections or requests); raise limits.http_max_conns_per_client", endpoint.name())]
    Congested { endpoint: Endpoint },
    #[error("{}: the agent refused the request with {status}: {text}", endpoint.name())]
    Rejected { endpoint: Endpoint, status: u16, text: String },
    #[error("{}: the agent answered {status}: {text}", endpoint.name())]
    Server { endpoint: Endpoint, status: u16, text: String },
    #[error("{}: the answer is longer than {max} bytes and was not read", endpoint.name())]
    TooLarge { endpoint: Endpoint, max: usize },
    #[error("{}: the answer cannot be used: {detail}", endpoint.name())]
    Malformed { endpoint: Endpoint, detail: String },
    /// An empty list that is empty because the token may not see it.
    #[error("{}: the list is empty because the token may not see it; the token needs {}", endpoint.name(), endpoint.right())]
    Hidden { endpoint: Endpoint },
}

impl AgentError {
    /// Sorts an answer that is no success.
    pub(crate) fn from_status(endpoint: Endpoint, status: u16, body: &[u8]) -> Self {
        let text = printable(body);
        match status {
            403 if text.contains("ACL not found") && endpoint != Endpoint::Login => Self::TokenUnknown { endpoint },
            403 => Self::Forbidden { endpoint, text },
            404 => Self::NotFound { endpoint, text },
            429 => Self::Congested { endpoint },
            500.. => Self::Server { endpoint, status, text },
            _ => Self::Rejected { endpoint, status, text },
        }
    }

    /// Whether the agent itself answered, so that it is reachable.
    pub(crate) fn answered(&self) -> bool {
        !matches!(self, Self::Unreachable { .. } | Self::Reset { .. } | Self::ClientCertificate { .. } | Self::Timeout { .. })
    }

    /// Whether it is a sign of too many connections.
    pub(crate) fn congestion(&self) -> bool {
        matches!(self, Self::Congested { .. } | Self::Reset { soon: true, .. })
    }

    /// The value of the metric's label.
    pub(crate) fn outcome(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Reset { .. } => "reset",
            Self::ClientCertificate { .. } => "client_certificate",
            Self::Timeout { .. } => "timeout",
            Self::TokenUnknown { .. } => "token_unknown",
            Self::Forbidden { .. } => "forbidden",
            Self::NotFound { .. } => "not_found",
            Self::Congested { .. } => "congested",
            Self::Rejected { .. } => "rejected",
            Self::Server { .. } => "server_error",
            Self::TooLarge { .. } => "too_large",
            Self::Malformed { .. } => "malformed",
            Self::Hidden { .. } => "hidden",
        }
    }
}

/// The alert with which the agent refused our client certificate, or the lack of one, if that is why a call failed.
///
/// TLS 1.2 sends it within the handshake and TLS 1.3 after it, so it hides at different depths of the error.
pub(crate) fn certificate_alert(error: &(dyn Error + 'static)) -> Option<AlertDescription> {
    let mut next = Some(error);
    for _ in 0..SOURCES_MAX {
        let error = next?;
        if let Some(rustls::Error::AlertReceived(alert)) = error.downcast_ref() {
            return refuses_certificate(*alert).then_some(*alert);
        }
        // The `source` of an I/O error leaves out the error that it wraps.
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

/// Alerts that speak of a certificate. Go's TLS 1.2 calls a missing one `BadCertificate`.
fn refuses_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::CertificateRequired
            | AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
    )
}

/// The agent's text on one line, bounded, without control characters.
pub(crate) fn printable(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(TEXT_CHARS_MAX * 4)]);
    let clean: String = text.trim().chars().take(TEXT_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if clean.is_empty() { "no further text".to_owned() } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_become_what_one_would_do() {
        let of = |status, body: &str| AgentError::from_status(Endpoint::Leaf, status, body.as_bytes());
        assert!(matches!(of(403, "rpc error making call: ACL not found"), AgentError::TokenUnknown { .. }));
        let forbidden = of(403, "Permission denied");
        assert!(matches!(forbidden, AgentError::Forbidden { .. }));
        assert!(forbidden.to_string().contains("service:write"), "{forbidden}");
        assert!(matches!(of(404, "x"), AgentError::NotFound { .. }));
        assert!(of(429, "").congestion());
        assert!(matches!(of(500, "No known Consul servers"), AgentError::Server { status: 500, .. }));
        assert!(matches!(of(400, "Bad request"), AgentError::Rejected { status: 400, .. }));
        assert!(
            matches!(AgentError::from_status(Endpoint::Login, 403, b"ACL not found"), AgentError::Forbidden { .. }),
            "an unknown auth method is no unknown token"
        );
    }

    #[test]
    fn only_an_alert_about_certificates_is_one() {
        let wrapped = |alert| {
            let inner = std::io::Error::new(std::io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert));
            certificate_alert(&std::io::Error::other(inner))
        };
        for alert in [AlertDescription::CertificateRequired, AlertDescription::BadCertificate, AlertDescription::UnknownCA] {
            assert_eq!(wrapped(alert), Some(alert));
        }
        assert_eq!(wrapped(AlertDescription::HandshakeFailure), None);
        assert_eq!(wrapped(AlertDescription::UnrecognisedName), None);
        assert_eq!(certificate_alert(&std::io::Error::from(std::io::ErrorKind::ConnectionReset)), None);
    }

    #[test]
    fn hostile_text_is_one_bounded_line() {
        let text = printable("a\nb\u{1b}[31m".repeat(5_000).as_bytes());
        assert!(text.chars().count() <= TEXT_CHARS_MAX && !text.contains(['\n', '\u{1b}']));
    }
}
