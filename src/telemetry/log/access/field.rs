//! What an operator stands for, once it is read.

use super::stamp::Stamp;

/// One side of a connection as Envoy names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Towards whoever connected.
    Downstream,
    /// Towards whom we connected to.
    Upstream,
}

/// How much of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    WithoutPort,
    Port,
}

/// What a certificate tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attribute {
    Subject,
    Issuer,
    Serial,
    FingerprintSha256,
    DnsNames,
    NotBefore,
    NotAfter,
}

/// One thing that a line can say.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Field {
    /// What no L4 connection has, and what this proxy does not know.
    Absent,
    /// What Envoy prints as nothing at L4.
    Empty,
    /// A number that is always 0 at L4.
    Zero,
    Start(Stamp),
    Emit(Stamp),
    Duration,
    /// Until the upstream could be used.
    ReadyDuration,
    /// Payload that went towards this side.
    BytesTo(Side),
    CodeDetails,
    TerminationDetails,
    Flags,
    FlagsLong,
    /// Whom we connected to, or tried to.
    UpstreamHost(Part),
    Cluster,
    Remote(Side, Part),
    Local(Side, Part),
    FailureReason(Side),
    CloseType(Side),
    LocalCloseReason,
    TlsVersion(Side),
    TlsCipher(Side),
    PeerUri(Side),
    LocalUri(Side),
    Peer(Side, Attribute),
    ServerName,
    Attempts,
    ConnectionId,
    UpstreamConnectionId,
    /// The same in every log of a connection.
    StreamId,
    /// New each time.
    UniqueId,
    Hostname,
    LogType,
    /// Read when the log was opened.
    Environment(Option<String>),
    /// A field of the connection log.
    Own(&'static str),
}
