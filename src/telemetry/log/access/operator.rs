//! Envoy's operators by name, with what each may be given.
//!
//! Invariant: what Envoy 1.40 refuses is refused here, with the operator's name. Operators for HTTP are known and have
//! no value on an L4 connection; what Envoy has and this proxy cannot know is named in [`UNKNOWN_HERE`].

use super::field::{Attribute, Field, Part, Side};
use super::stamp::Stamp;
use crate::telemetry::log::line;

/// Nothing to say of a TCP connection, in Envoy either.
const ABSENT: &[&str] = &[
    "PROTOCOL",
    "UPSTREAM_PROTOCOL",
    "REQUEST_DURATION",
    "REQUEST_TX_DURATION",
    "RESPONSE_DURATION",
    "RESPONSE_TX_DURATION",
    "ROUNDTRIP_DURATION",
    "DOWNSTREAM_HANDSHAKE_DURATION",
    "ROUTE_NAME",
    "VIRTUAL_CLUSTER_NAME",
    "FILTER_CHAIN_NAME",
    "TLS_JA3_FINGERPRINT",
    "TLS_JA4_FINGERPRINT",
    "TRACE_ID",
    "GRPC_STATUS_NUMBER",
    "UPSTREAM_LOCAL_CLOSE_REASON",
];
/// Envoy may have a value for these, this proxy keeps none: sessions, SANs of other kinds, whole certificates and chains.
const UNKNOWN_HERE: &[&str] = &[
    "DOWNSTREAM_TLS_SESSION_ID",
    "UPSTREAM_TLS_SESSION_ID",
    "DOWNSTREAM_PEER_IP_SAN",
    "DOWNSTREAM_PEER_EMAIL_SAN",
    "DOWNSTREAM_PEER_OTHERNAME_SAN",
    "DOWNSTREAM_PEER_FINGERPRINT_1",
    "DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256",
    "DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_1",
    "DOWNSTREAM_PEER_CHAIN_SERIALS",
    "DOWNSTREAM_PEER_CERT",
    "DOWNSTREAM_LOCAL_SUBJECT",
    "DOWNSTREAM_LOCAL_DNS_SAN",
    "DOWNSTREAM_LOCAL_IP_SAN",
    "DOWNSTREAM_LOCAL_EMAIL_SAN",
    "UPSTREAM_PEER_IP_SAN",
    "UPSTREAM_PEER_CERT",
    "UPSTREAM_LOCAL_DNS_SAN",
    "UPSTREAM_LOCAL_IP_SAN",
];
/// No value at L4; they must be given an argument and may be given a length.
const ABSENT_WITH_ARGUMENT: &[&str] = &[
    "REQ",
    "REQUEST_HEADER",
    "RESP",
    "RESPONSE_HEADER",
    "TRAILER",
    "RESPONSE_TRAILER",
    "DYNAMIC_METADATA",
    "CLUSTER_METADATA",
    "UPSTREAM_METADATA",
    "METADATA",
    "FILTER_STATE",
    "UPSTREAM_FILTER_STATE",
    "QUERY_PARAM",
    "PATH",
    "COMMON_DURATION",
];
/// Counts of HTTP and of QUIC.
const ZERO: &[&str] = &[
    "RESPONSE_CODE",
    "BYTES_RETRANSMITTED",
    "PACKETS_RETRANSMITTED",
    "UPSTREAM_HEADER_BYTES_SENT",
    "UPSTREAM_HEADER_BYTES_RECEIVED",
    "UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT",
    "UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED",
    "DOWNSTREAM_HEADER_BYTES_SENT",
    "DOWNSTREAM_HEADER_BYTES_RECEIVED",
    "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT",
    "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED",
];
/// What `%REQUESTED_SERVER_NAME(option)%` may say; without HTTP all of them mean the SNI.
const SERVER_NAME_OPTIONS: &[&str] = &["SNI_ONLY", "SNI_FIRST", "HOST_ONLY", "HOST_FIRST"];

/// The field of `name`, or why Envoy would refuse it.
pub(super) fn read(name: &str, argument: Option<&str>, length: Option<usize>) -> Result<Field, String> {
    let no_length = || match length {
        Some(_) => Err(format!("{name} does not allow length to be specified; remove the `:N`")),
        None => Ok(()),
    };
    let needed = || argument.filter(|text| !text.is_empty()).ok_or_else(|| format!("{name} requires parameters: {name}(...)"));
    match name {
        "START_TIME" | "EMIT_TIME" => {
            no_length()?;
            let stamp = Stamp::new(argument.unwrap_or_default());
            Ok(if name == "START_TIME" { Field::Start(stamp) } else { Field::Emit(stamp) })
        }
        "REQUESTED_SERVER_NAME" => {
            no_length()?;
            match argument.filter(|text| !SERVER_NAME_OPTIONS.contains(text)) {
                Some(other) => Err(format!("{name} has no option `{other}`; write one of {}", SERVER_NAME_OPTIONS.join(", "))),
                None => Ok(Field::ServerName),
            }
        }
        "RESPONSE_CODE_DETAILS" => no_length().map(|()| Field::CodeDetails),
        "GRPC_STATUS" => no_length().map(|()| Field::Absent),
        "ENVIRONMENT" => Ok(Field::Environment(std::env::var(needed()?).ok())),
        "RINGFENCE" => {
            let wanted = needed()?;
            let known = line::FIELDS.iter().find(|field| **field == wanted);
            known
                .map(|field| Field::Own(field))
                .ok_or_else(|| format!("{name} knows no field `{wanted}`; the connection log has {}", line::FIELDS.join(", ")))
        }
        _ if ABSENT_WITH_ARGUMENT.contains(&name) => needed().map(|_| Field::Absent),
        _ => {
            let field = plain(name).ok_or_else(|| {
                format!("operator %{name}% is not known; README lists the operators, %RINGFENCE(field)% among them")
            })?;
            match (argument, length) {
                (None, None) => Ok(field),
                _ => Err(format!("{name} does not take any parameters or length")),
            }
        }
    }
}

/// The operators that take nothing.
fn plain(name: &str) -> Option<Field> {
    if let Some(rest) = name.strip_prefix("DOWNSTREAM_") {
        // Without PROXY protocol the direct addresses are the addresses.
        let rest = rest.strip_prefix("DIRECT_").unwrap_or(rest);
        if let Some(field) = of_side(Side::Downstream, rest) {
            return Some(field);
        }
    }
    if let Some(field) = name.strip_prefix("UPSTREAM_").and_then(|rest| of_side(Side::Upstream, rest)) {
        return Some(field);
    }
    Some(match name {
        "DURATION" => Field::Duration,
        "BYTES_RECEIVED" | "UPSTREAM_WIRE_BYTES_SENT" | "DOWNSTREAM_WIRE_BYTES_RECEIVED" => Field::BytesTo(Side::Upstream),
        "BYTES_SENT" | "UPSTREAM_WIRE_BYTES_RECEIVED" | "DOWNSTREAM_WIRE_BYTES_SENT" => Field::BytesTo(Side::Downstream),
        "CONNECTION_TERMINATION_DETAILS" => Field::TerminationDetails,
        "RESPONSE_FLAGS" => Field::Flags,
        "RESPONSE_FLAGS_LONG" => Field::FlagsLong,
        "UPSTREAM_HOST" | "UPSTREAM_HOST_NAME" => Field::UpstreamHost(Part::Whole),
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" => Field::UpstreamHost(Part::WithoutPort),
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Field::Cluster,
        "UPSTREAM_CONNECTION_ID" => Field::UpstreamConnectionId,
        "UPSTREAM_CONNECTION_POOL_READY_DURATION" => Field::ReadyDuration,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Field::Attempts,
        "DOWNSTREAM_LOCAL_CLOSE_REASON" => Field::LocalCloseReason,
        "CONNECTION_ID" => Field::ConnectionId,
        "STREAM_ID" => Field::StreamId,
        "UNIQUE_ID" => Field::UniqueId,
        "HOSTNAME" => Field::Hostname,
        "ACCESS_LOG_TYPE" => Field::LogType,
        "LOCAL_REPLY_BODY" | "CUSTOM_FLAGS" => Field::Empty,
        _ if ZERO.contains(&name) => Field::Zero,
        _ if ABSENT.contains(&name) || UNKNOWN_HERE.contains(&name) => Field::Absent,
        _ => return None,
    })
}

/// What both sides have.
fn of_side(side: Side, name: &str) -> Option<Field> {
    // Envoy has these for one side only.
    let of_downstream = side == Side::Downstream;
    Some(match name {
        "REMOTE_ADDRESS" => Field::Remote(side, Part::Whole),
        "REMOTE_ADDRESS_WITHOUT_PORT" => Field::Remote(side, Part::WithoutPort),
        "REMOTE_PORT" => Field::Remote(side, Part::Port),
        "LOCAL_ADDRESS" => Field::Local(side, Part::Whole),
        "LOCAL_ADDRESS_WITHOUT_PORT" => Field::Local(side, Part::WithoutPort),
        "LOCAL_PORT" => Field::Local(side, Part::Port),
        "TRANSPORT_FAILURE_REASON" => Field::FailureReason(side),
        "DETECTED_CLOSE_TYPE" => Field::CloseType(side),
        "TLS_VERSION" => Field::TlsVersion(side),
        "TLS_CIPHER" => Field::TlsCipher(side),
        "PEER_URI_SAN" => Field::PeerUri(side),
        "LOCAL_URI_SAN" => Field::LocalUri(side),
        "PEER_SUBJECT" => Field::Peer(side, Attribute::Subject),
        "PEER_ISSUER" => Field::Peer(side, Attribute::Issuer),
        "PEER_DNS_SAN" => Field::Peer(side, Attribute::DnsNames),
        "PEER_CERT_V_START" => Field::Peer(side, Attribute::NotBefore),
        "PEER_CERT_V_END" => Field::Peer(side, Attribute::NotAfter),
        "PEER_SERIAL" if of_downstream => Field::Peer(side, Attribute::Serial),
        "PEER_FINGERPRINT_256" if of_downstream => Field::Peer(side, Attribute::FingerprintSha256),
        _ => return None,
    })
}
