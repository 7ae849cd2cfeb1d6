//! What a record says for each operator.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::net::SocketAddr;
use std::time::SystemTime;

use serde_json::Value as Json;

use super::field::{Field, Part, Side};
use super::{certificate, flags};
use crate::identity::SpiffeId;
use crate::mesh::Address;
use crate::telemetry::cells::Direction;
use crate::telemetry::log::line;
use crate::telemetry::record::ConnectionRecord;

/// Consul's name for the cluster of the app.
const LOCAL_CLUSTER: &str = "local_app";
/// Where Linux tells the host's name.
const HOSTNAME_FILE: &str = "/proc/sys/kernel/hostname";

/// What a line says for an operator.
pub(super) enum Value<'a> {
    /// `-` in text, null in JSON.
    Missing,
    Text(Cow<'a, str>),
    Number(u64),
    /// Of the connection log, with its type.
    Json(Json),
}

impl<'a> Value<'a> {
    fn text(text: Option<impl Into<Cow<'a, str>>>) -> Self {
        text.map_or(Self::Missing, |text| Self::Text(text.into()))
    }
}

/// What lines say of the host.
#[derive(Debug)]
pub(super) struct Host {
    name: Option<String>,
}

impl Host {
    pub(super) fn read() -> Self {
        let name = std::fs::read_to_string(HOSTNAME_FILE).ok().map(|name| name.trim().to_owned());
        Self { name: name.filter(|name| !name.is_empty()) }
    }
}

/// One connection, as all logs tell it.
pub(super) struct Facts<'a> {
    record: &'a ConnectionRecord,
    host: &'a Host,
    /// Which of the process's connections, in the order in which they ended.
    number: u64,
    emitted: SystemTime,
    stream: OnceCell<String>,
    line: OnceCell<Json>,
}

impl<'a> Facts<'a> {
    pub(super) fn new(record: &'a ConnectionRecord, host: &'a Host, number: u64, emitted: SystemTime) -> Self {
        Self { record, host, number, emitted, stream: OnceCell::new(), line: OnceCell::new() }
    }

    pub(super) fn value<'b>(&'b self, field: &'b Field) -> Value<'b> {
        let record = self.record;
        match field {
            Field::Absent => Value::Missing,
            Field::Empty => Value::Text("".into()),
            Field::Zero => Value::Number(0),
            Field::Start(stamp) => Value::Text(stamp.print(record.start).into()),
            Field::Emit(stamp) => Value::Text(stamp.print(self.emitted).into()),
            Field::Duration => Value::Number(milliseconds(record.total)),
            Field::ReadyDuration => self.ready(),
            Field::BytesTo(side) if *side == flags::mesh_side(record) => Value::Number(record.bytes_to_mesh),
            Field::BytesTo(_) => Value::Number(record.bytes_from_mesh),
            Field::CodeDetails => Value::text(flags::code_details(record)),
            Field::TerminationDetails => Value::text(flags::termination(record)),
            Field::Flags => Value::Text(names(record, |flag| flag.short)),
            Field::FlagsLong => Value::Text(names(record, |flag| flag.long)),
            Field::UpstreamHost(part) => record.endpoint.as_ref().map_or(Value::Missing, |at| of_address(at, *part)),
            Field::Cluster => self.cluster(),
            Field::Remote(Side::Downstream, part) => of_socket(record.downstream, *part),
            Field::Remote(Side::Upstream, part) => match &record.endpoint {
                Some(address) if flags::was_connected(record) => of_address(address, *part),
                _ => Value::Missing,
            },
            Field::Local(side, part) => of_socket(self.local(*side), *part),
            Field::FailureReason(side) => Value::text(flags::failure(record, *side)),
            Field::CloseType(side) => Value::text(flags::close_type(record, *side)),
            Field::LocalCloseReason => Value::text(flags::local_close(record)),
            Field::TlsVersion(side) => Value::text(self.tls(*side).map(|(version, _)| line::tls_version(version))),
            Field::TlsCipher(side) => Value::text(self.tls(*side).map(|(_, suite)| cipher(suite))),
            Field::PeerUri(side) if self.spoke_tls(*side) => Value::text(self.peer().map(SpiffeId::as_str)),
            Field::PeerUri(side) => Value::text(self.shown(*side).and_then(certificate::uris)),
            Field::LocalUri(side) if self.spoke_tls(*side) => Value::text(self.own().map(SpiffeId::as_str)),
            Field::LocalUri(_) => Value::Missing,
            Field::Peer(side, attribute) => {
                Value::text(self.shown(*side).and_then(|der| certificate::attribute(der, *attribute)))
            }
            Field::ServerName => Value::text(record.access.as_deref().and_then(|facts| facts.server_name.as_deref())),
            Field::Attempts => Value::Number(match record.direction {
                Direction::Inbound => u64::from(record.endpoint.is_some()),
                Direction::Outbound => u64::from(record.attempts),
            }),
            Field::ConnectionId => Value::Number(self.number),
            Field::UpstreamConnectionId => Value::Number(if flags::was_connected(record) { self.number } else { 0 }),
            Field::StreamId => Value::Text(self.stream.get_or_init(|| uuid::Uuid::new_v4().to_string()).as_str().into()),
            Field::UniqueId => Value::Text(uuid::Uuid::new_v4().to_string().into()),
            Field::Hostname => Value::text(self.host.name.as_deref()),
            Field::LogType => Value::Text(if flags::is_unmatched(record) { "NotSet" } else { "TcpConnectionEnd" }.into()),
            // Envoy's dash is text here, in JSON too.
            Field::Environment(value) => Value::Text(value.as_deref().unwrap_or("-").into()),
            Field::Own(name) => self.own_field(name),
        }
    }

    /// Milliseconds until the upstream could be used, or was given up.
    fn ready(&self) -> Value<'_> {
        let record = self.record;
        match (record.direction, record.connect, record.handshake) {
            (Direction::Inbound, None, _) if record.endpoint.is_none() => Value::Missing,
            (Direction::Inbound, Some(connect), _) => Value::Number(milliseconds(connect)),
            (Direction::Outbound, Some(connect), Some(handshake)) => Value::Number(milliseconds(connect + handshake)),
            _ if flags::is_unmatched(record) => Value::Missing,
            _ => Value::Number(milliseconds(record.total)),
        }
    }

    fn cluster(&self) -> Value<'_> {
        let record = self.record;
        let cluster = record.access.as_deref().and_then(|facts| facts.cluster.as_deref());
        match record.direction {
            Direction::Inbound => Value::Text(LOCAL_CLUSTER.into()),
            Direction::Outbound => Value::text(cluster.or(record.upstream.as_deref())),
        }
    }

    fn local(&self, side: Side) -> Option<SocketAddr> {
        let facts = self.record.access.as_deref();
        match side {
            // To whom it spoke is what it was redirected from.
            Side::Downstream => self.record.original.or_else(|| facts.and_then(|facts| facts.downstream_local)),
            Side::Upstream => facts.and_then(|facts| facts.upstream_local).filter(|_| flags::was_connected(self.record)),
        }
    }

    /// Version and suite of TLS on that side, once it was negotiated.
    fn tls(&self, side: Side) -> Option<(u16, u16)> {
        if side != flags::mesh_side(self.record) {
            return self.record.access.as_deref().and_then(|facts| facts.outside_tls);
        }
        self.record.tls_version.zip(self.record.tls_suite).filter(|_| self.spoke_tls(side))
    }

    /// The certificate that the peer on that side has shown, DER.
    fn shown(&self, side: Side) -> Option<&[u8]> {
        let facts = self.record.access.as_deref()?;
        match side == flags::mesh_side(self.record) {
            true => facts.peer_certificate.as_deref().filter(|_| self.spoke_tls(side)),
            false => facts.outside_certificate.as_deref(),
        }
    }

    fn spoke_tls(&self, side: Side) -> bool {
        side == flags::mesh_side(self.record) && self.record.handshake.is_some()
    }

    fn peer(&self) -> Option<&SpiffeId> {
        match self.record.direction {
            Direction::Inbound => self.record.source.as_ref(),
            Direction::Outbound => self.record.destination.as_ref(),
        }
    }

    fn own(&self) -> Option<&SpiffeId> {
        match self.record.direction {
            Direction::Inbound => self.record.destination.as_ref(),
            Direction::Outbound => self.record.source.as_ref(),
        }
    }

    fn own_field(&self, name: &str) -> Value<'_> {
        let line = self.line.get_or_init(|| serde_json::to_value(line::Line::from(self.record)).unwrap_or_default());
        match line.get(name).or_else(|| line.get("caller")?.get(name)) {
            None | Some(Json::Null) => Value::Missing,
            Some(value) => Value::Json(value.clone()),
        }
    }
}

fn milliseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn names(record: &ConnectionRecord, name: impl Fn(&flags::Flag) -> &'static str) -> Cow<'static, str> {
    match flags::flags(record) {
        [] => "-".into(),
        [flag] => name(flag).into(),
        flags => flags.iter().map(name).collect::<Vec<_>>().join(",").into(),
    }
}

fn of_address(address: &Address, part: Part) -> Value<'_> {
    match (address, part) {
        (Address::Tcp(address), part) => of_socket(Some(*address), part),
        (Address::Unix(_), Part::Port) => Value::Missing,
        (Address::Unix(path), _) => Value::Text(path.to_string_lossy()),
    }
}

fn of_socket<'a>(address: Option<SocketAddr>, part: Part) -> Value<'a> {
    let Some(address) = address else { return Value::Missing };
    // A listener on :: sees IPv4 clients mapped.
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    match part {
        Part::Whole => Value::Text(address.to_string().into()),
        Part::WithoutPort => Value::Text(address.ip().to_string().into()),
        Part::Port => Value::Number(u64::from(address.port())),
    }
}

/// BoringSSL's name of a cipher suite.
fn cipher(number: u16) -> String {
    match number {
        0xc02b => "ECDHE-ECDSA-AES128-GCM-SHA256".to_owned(),
        0xc02c => "ECDHE-ECDSA-AES256-GCM-SHA384".to_owned(),
        0xcca9 => "ECDHE-ECDSA-CHACHA20-POLY1305".to_owned(),
        0xc02f => "ECDHE-RSA-AES128-GCM-SHA256".to_owned(),
        0xc030 => "ECDHE-RSA-AES256-GCM-SHA384".to_owned(),
        0xcca8 => "ECDHE-RSA-CHACHA20-POLY1305".to_owned(),
        // Of TLS 1.3 it uses the registered names.
        other => line::tls_suite(other),
    }
}
