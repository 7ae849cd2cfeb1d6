//! From errors to close reasons.

pub(super) use crate::telemetry::close::CloseReason;

use crate::tls::FailureKind;

/// Which side of a connection something happened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The local client or app.
    Plain,
    /// The mesh peer.
    Mesh,
}

/// A socket error while bytes were flowing.
pub(super) fn broken(side: Side) -> CloseReason {
    match side {
        Side::Plain => CloseReason::LocalReset,
        Side::Mesh => CloseReason::PeerReset,
    }
}

/// A failed handshake.
pub(super) fn handshake(kind: FailureKind) -> CloseReason {
    match kind {
        FailureKind::Identity => CloseReason::IdentityMismatch,
        FailureKind::Alert(code) => alert(code).unwrap_or(CloseReason::HandshakeFailed),
        FailureKind::Protocol | FailureKind::Certificate => CloseReason::HandshakeFailed,
    }
}

/// An alert of the peer that means "not you": access_denied from ringfence, bad_certificate from Consul's own proxy,
/// which judges inside the handshake's verification.
pub(super) fn alert(code: u8) -> Option<CloseReason> {
    const BAD_CERTIFICATE: u8 = 42;
    const ACCESS_DENIED: u8 = 49;
    matches!(code, BAD_CERTIFICATE | ACCESS_DENIED).then_some(CloseReason::DeniedByPeer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_by_the_other_side_is_told_from_a_failure() {
        assert_eq!(handshake(FailureKind::Alert(49)), CloseReason::DeniedByPeer);
        assert_eq!(handshake(FailureKind::Alert(42)), CloseReason::DeniedByPeer);
        assert_eq!(handshake(FailureKind::Alert(48)), CloseReason::HandshakeFailed);
        assert_eq!(handshake(FailureKind::Identity), CloseReason::IdentityMismatch);
    }
}
