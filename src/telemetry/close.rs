//! Why a connection ended: one small value that feeds counters and the connection log.

/// Why a proxied connection ended. The order is stable: it indexes counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CloseReason {
    /// Both sides said they were done.
    Complete,
    /// The peer connected and left without a byte (a health check's probe).
    Probe,
    /// Intentions do not let the peer in.
    Denied,
    /// The local caller has no mesh identity, or its identity may not call the upstream.
    CallerDenied,
    /// An intention change took the right away from a live connection.
    Revoked,
    /// The remote sidecar refused us after the handshake (alert `access_denied` or `bad_certificate`).
    DeniedByPeer,
    /// The local client or app reset its connection, or broke off TLS of its own.
    LocalReset,
    /// The mesh peer reset its connection.
    PeerReset,
    /// The mesh peer's stream ended without close_notify.
    Truncated,
    /// The TLS handshake failed (bad certificate, no common version, garbage).
    HandshakeFailed,
    /// The peer's identity is not the expected one.
    IdentityMismatch,
    /// The TLS handshake took too long.
    HandshakeTimeout,
    /// A record did not decrypt or broke the protocol.
    ProtocolError,
    /// The app could not be reached, or TLS with it failed.
    AppUnreachable,
    /// No endpoint answered.
    ConnectFailed,
    /// Opening the connection took too long.
    ConnectTimeout,
    /// The upstream has no healthy endpoint.
    NoEndpoint,
    /// No route is meant for it: by where it wanted to go, by its server name, or by whether it speaks TLS.
    NoRoute,
    /// A connection limit was reached.
    Limit,
    /// No certificate yet, and the hold time is over.
    NoIdentity,
    /// The worker's buffer budget is spent.
    OutOfBuffers,
    /// Drain time was over, or the listener went away.
    Drained,
    /// The process ends at once.
    Shutdown,
    /// No byte moved for longer than its listener allows.
    Idle,
}

impl CloseReason {
    /// Every reason, in counter order.
    pub const ALL: [Self; 24] = [
        Self::Complete,
        Self::Probe,
        Self::Denied,
        Self::CallerDenied,
        Self::Revoked,
        Self::DeniedByPeer,
        Self::LocalReset,
        Self::PeerReset,
        Self::Truncated,
        Self::HandshakeFailed,
        Self::IdentityMismatch,
        Self::HandshakeTimeout,
        Self::ProtocolError,
        Self::AppUnreachable,
        Self::ConnectFailed,
        Self::ConnectTimeout,
        Self::NoEndpoint,
        Self::NoRoute,
        Self::Limit,
        Self::NoIdentity,
        Self::OutOfBuffers,
        Self::Drained,
        Self::Shutdown,
        Self::Idle,
    ];

    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Probe => "probe",
            Self::Denied => "denied",
            Self::CallerDenied => "caller_denied",
            Self::Revoked => "revoked",
            Self::DeniedByPeer => "denied_by_peer",
            Self::LocalReset => "local_reset",
            Self::PeerReset => "peer_reset",
            Self::Truncated => "truncated",
            Self::HandshakeFailed => "handshake_failed",
            Self::IdentityMismatch => "identity_mismatch",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::ProtocolError => "protocol_error",
            Self::AppUnreachable => "app_unreachable",
            Self::ConnectFailed => "connect_failed",
            Self::ConnectTimeout => "connect_timeout",
            Self::NoEndpoint => "no_endpoint",
            Self::NoRoute => "no_route",
            Self::Limit => "limit",
            Self::NoIdentity => "no_identity",
            Self::OutOfBuffers => "out_of_buffers",
            Self::Drained => "drained",
            Self::Shutdown => "shutdown",
            Self::Idle => "idle",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_at_its_index_with_its_own_name() {
        let mut names = std::collections::HashSet::new();
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(names.insert(reason.as_str()));
        }
    }
}
