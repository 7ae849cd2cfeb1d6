//! Envoy's response flags and details for the ways in which a connection ends here.
//!
//! What Envoy 1.40 wrote when each was provoked on its TCP proxy, mutual TLS towards the upstream, one connect attempt:
//!
//! | failure | `RESPONSE_FLAGS` | details |
//! | --- | --- | --- |
//! | refused | `UF,URX` | transport failure `delayed_connect_error:_Connection_refused` |
//! | reset in the handshake | `UF,URX` | transport failure `TLS_error:\|…Connection_reset_by_peer:TLS_error_end` |
//! | TLS failure | `UF,URX` | transport failure `TLS_error:\|…WRONG_VERSION_NUMBER:TLS_error_end` |
//! | wrong SAN | `UF,URX` | transport failure `TLS_error:\|…CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_SAN_matcher,…:TLS_error_end` |
//! | connect timeout | `UF,URX` | no reason |
//! | no endpoint, or none healthy | `UH` | no host, attempt count 0 |
//! | over `max_connections` | `UO` | no host, attempt count 0 |
//! | over the connection limit (inbound) | `-` | local close reason `over_connection_limit` |
//! | denied by RBAC | `-` | `rbac_access_denied_matched_policy[none]`, local close reason `rbac_deny_close` |
//! | upstream reset while bytes flow | `UR` | close types `RemoteReset` (upstream), `LocalReset` (downstream) |
//! | client reset | `-` | close type `RemoteReset` (downstream) |
//! | idle | `-` | local close reason `tcp_session_idle_timeout` |
//! | drain (SIGTERM) | `-` | no termination detail |
//! | TLS failure of a client | `-` | downstream transport failure `TLS_error:\|…:TLS_error_end` |
//! | no filter chain | `NR` | code details `filter_chain_not_found` |
//!
//! Ours are the same but for this, each on purpose:
//!
//! - A denied peer never reaches the app: Envoy had dialed it, so its line names an upstream host, bytes and an attempt.
//!   The policy is always `[none]`: which RBAC policy Consul would have written is not asked.
//! - Between `TLS_error:|` and `:TLS_error_end` stand our own words, not BoringSSL's numbers. A certificate that fails keeps
//!   `CERTIFICATE_VERIFY_FAILED`, which is what scripts look for.
//! - A mesh peer that ends without close_notify is a truncation, not an end: details say `truncated`, and it is `UR` where
//!   the upstream did it. Envoy takes it for a FIN.
//! - Drain, shutdown, revocation and a missing certificate have termination details of their own; a worker without buffers
//!   is `OM`.

use std::borrow::Cow;

use super::field::Side;
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::ConnectionRecord;

/// One response flag: its short and its long name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flag {
    pub(super) short: &'static str,
    pub(super) long: &'static str,
}

const UF: Flag = Flag { short: "UF", long: "UpstreamConnectionFailure" };
const URX: Flag = Flag { short: "URX", long: "UpstreamRetryLimitExceeded" };
const UH: Flag = Flag { short: "UH", long: "NoHealthyUpstream" };
const UO: Flag = Flag { short: "UO", long: "UpstreamOverflow" };
const UR: Flag = Flag { short: "UR", long: "UpstreamRemoteReset" };
const NR: Flag = Flag { short: "NR", long: "NoRouteFound" };
const UPE: Flag = Flag { short: "UPE", long: "UpstreamProtocolError" };
const DPE: Flag = Flag { short: "DPE", long: "DownstreamProtocolError" };
const OM: Flag = Flag { short: "OM", long: "OverloadManagerTerminated" };

/// The side that speaks TLS.
pub(super) fn mesh_side(record: &ConnectionRecord) -> Side {
    match record.direction {
        Direction::Inbound => Side::Downstream,
        Direction::Outbound => Side::Upstream,
    }
}

/// Whether the upstream could be used, which is when Envoy would begin to relay.
pub(super) fn was_connected(record: &ConnectionRecord) -> bool {
    match record.direction {
        Direction::Inbound => record.connect.is_some(),
        Direction::Outbound => record.handshake.is_some(),
    }
}

/// Nothing here wanted the connection.
pub(super) fn is_unmatched(record: &ConnectionRecord) -> bool {
    record.reason == CloseReason::NoRoute
}

/// The flags, in Envoy's order.
pub(super) fn flags(record: &ConnectionRecord) -> &'static [Flag] {
    let by_upstream = |flags: &'static [Flag]| if mesh_side(record) == Side::Upstream { flags } else { &[] };
    match record.reason {
        CloseReason::ConnectFailed | CloseReason::ConnectTimeout | CloseReason::AppUnreachable => &[UF, URX],
        // Of a client that never got its TLS to stand, nobody upstream knows.
        CloseReason::HandshakeFailed if record.attempts == 0 => &[],
        CloseReason::HandshakeFailed | CloseReason::IdentityMismatch => by_upstream(&[UF, URX]),
        // In TLS 1.3 the other side decides when the handshake is over for us.
        CloseReason::DeniedByPeer if was_connected(record) => &[UF],
        CloseReason::DeniedByPeer => &[UF, URX],
        CloseReason::NoEndpoint => &[UH],
        CloseReason::NoIdentity => by_upstream(&[UH]),
        CloseReason::Limit => by_upstream(&[UO]),
        CloseReason::PeerReset | CloseReason::Truncated => by_upstream(&[UR]),
        CloseReason::LocalReset if mesh_side(record) == Side::Downstream => &[UR],
        CloseReason::ProtocolError if mesh_side(record) == Side::Upstream => &[UPE],
        CloseReason::ProtocolError => &[DPE],
        CloseReason::NoRoute => &[NR],
        CloseReason::OutOfBuffers => &[OM],
        CloseReason::LocalReset
        | CloseReason::Complete
        | CloseReason::Probe
        | CloseReason::Denied
        | CloseReason::CallerDenied
        | CloseReason::Revoked
        | CloseReason::HandshakeTimeout
        | CloseReason::Drained
        | CloseReason::Shutdown
        | CloseReason::Idle => &[],
    }
}

/// `%RESPONSE_CODE_DETAILS%`.
pub(super) fn code_details(record: &ConnectionRecord) -> Option<&'static str> {
    is_unmatched(record).then_some("filter_chain_not_found")
}

/// `%CONNECTION_TERMINATION_DETAILS%`.
pub(super) fn termination(record: &ConnectionRecord) -> Option<&'static str> {
    match record.reason {
        CloseReason::Denied => Some("rbac_access_denied_matched_policy[none]"),
        CloseReason::HandshakeTimeout => Some("transport_socket_timeout"),
        reason @ (CloseReason::CallerDenied
        | CloseReason::Revoked
        | CloseReason::Truncated
        | CloseReason::NoIdentity
        | CloseReason::Drained
        | CloseReason::Shutdown) => Some(reason.as_str()),
        _ => None,
    }
}

/// `%DOWNSTREAM_LOCAL_CLOSE_REASON%`, misspelt as in Envoy.
pub(super) fn local_close(record: &ConnectionRecord) -> Option<&'static str> {
    match flags(record) {
        [UF, URX] => Some("tcp_initializion_failure:0"),
        [UH] => Some("tcp_initializion_failure:1"),
        [UO] => Some("tcp_initializion_failure:2"),
        _ => match record.reason {
            CloseReason::Denied | CloseReason::Revoked => Some("rbac_deny_close"),
            CloseReason::Limit => Some("over_connection_limit"),
            CloseReason::Idle => Some("tcp_session_idle_timeout"),
            _ => None,
        },
    }
}

/// `%…_DETECTED_CLOSE_TYPE%`.
pub(super) fn close_type(record: &ConnectionRecord, side: Side) -> Option<&'static str> {
    let reset_by = match (record.reason, mesh_side(record)) {
        (CloseReason::PeerReset, mesh) => Some(mesh),
        (CloseReason::LocalReset, Side::Upstream) => Some(Side::Downstream),
        (CloseReason::LocalReset, Side::Downstream) => Some(Side::Upstream),
        _ => None,
    };
    match (reset_by, side) {
        (Some(by), side) if by == side => Some("RemoteReset"),
        (Some(Side::Upstream), Side::Downstream) => Some("LocalReset"),
        _ if is_unmatched(record) && side == Side::Upstream => None,
        _ => Some("Normal"),
    }
}

/// `%…_TRANSPORT_FAILURE_REASON%`.
pub(super) fn failure(record: &ConnectionRecord, side: Side) -> Option<String> {
    let detail = record.detail.as_deref()?;
    let of_tls = match record.reason {
        CloseReason::HandshakeFailed | CloseReason::ProtocolError | CloseReason::DeniedByPeer => true,
        CloseReason::IdentityMismatch => true,
        CloseReason::ConnectFailed | CloseReason::AppUnreachable => false,
        _ => return None,
    };
    // As in `flags`: before anybody is dialed there is TLS with whoever connected only.
    let downstream = mesh_side(record) == Side::Downstream || record.attempts == 0;
    let failed = if of_tls && downstream { Side::Downstream } else { Side::Upstream };
    if side != failed {
        return None;
    }
    let words = words(detail);
    Some(match (of_tls, record.reason) {
        (false, _) => format!("delayed_connect_error:_{words}"),
        (true, CloseReason::IdentityMismatch) => {
            format!("TLS_error:|CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_{words}:TLS_error_end")
        }
        (true, _) => format!("TLS_error:|{words}:TLS_error_end"),
    })
}

/// Without spaces, so that a line can be cut at them, and without the number that Rust adds to the system's words.
fn words(detail: &str) -> Cow<'_, str> {
    let detail = detail.split_once(" (os error ").map_or(detail, |(words, _)| words);
    if detail.contains(|c: char| c.is_whitespace() || c.is_control()) {
        detail.replace(|c: char| c.is_whitespace() || c.is_control(), "_").into()
    } else {
        detail.into()
    }
}
