//! One upstream of a registration: where it listens, what it leads to, how it is treated.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::{HARMLESS_KEYS, bind_ip, hatches, lenient, positive, refuse_keys};
use crate::config::Keepalive;
use crate::config::envoy::AccessLog;
use crate::control::consul::watch::Name;
use crate::control::consul::watch::chain::not_default;
use crate::control::consul::wire;
use crate::control::opaque::Opaque;
use crate::mesh::{Balance, Bind, DenyReply, Outlier};

/// One upstream, not yet resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Upstream {
    pub(crate) label: String,
    pub(crate) bind: Bind,
    pub(crate) destination: Destination,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) protocol: String,
    pub(crate) mesh_gateway: String,
    pub(crate) max_connections: Option<u32>,
    pub(crate) outlier: Outlier,
    pub(crate) tuning: Tuning,
    pub(crate) deny_reply: DenyReply,
    /// For its connections alone, from an escape hatch.
    pub(crate) access_logs: Vec<AccessLog>,
    /// What it is without its escape hatches, if it has any: Consul drops them where a discovery chain is configured.
    pub(crate) unhatched: Option<Box<Self>>,
}

/// What only an escape hatch can say of an upstream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tuning {
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) connect_attempts: Option<u32>,
    /// Instead of what the discovery chain says.
    pub(crate) balance: Option<Balance>,
    pub(crate) panic_percent: Option<u32>,
    pub(crate) keepalive: Option<Keepalive>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    Service {
        name: Name,
        datacenter: String,
    },
    Query {
        name: String,
        datacenter: String,
    },
    /// Nothing that this feeder can resolve; the text says why.
    Unsupported(String),
}

/// Reads one upstream; `None` for an entry that has no listener. `Err` is why the proxy must not run.
pub(super) fn upstream(
    wire: &wire::Upstream,
    proxy: &wire::Proxy,
    own: &Name,
    warnings: &mut Vec<String>,
) -> Result<Option<Upstream>, String> {
    // Synthetic entries of central configuration have no listener.
    let no_bind = wire.local_bind_port == 0 && wire.local_bind_socket_path.is_empty();
    if wire.destination_name == "*" || (wire.centrally_configured && no_bind) {
        return Ok(None);
    }
    let label = label(wire);
    let place = format!("upstream {label}");
    if no_bind {
        return Err(format!("{place} has neither local_bind_port nor local_bind_socket_path"));
    }
    let config = Opaque::new(&wire.config);
    refuse_keys(&config, &place, &hatches::OF_PROXIES)?;
    let mode = &wire.mesh_gateway.mode;
    let mut notes = Vec::new();
    let mut upstream = Upstream {
        bind: bind(wire, &place)?,
        destination: destination(wire, own),
        connect_timeout: lenient(config.millis("connect_timeout_ms"), &mut notes).filter(|timeout| !timeout.is_zero()),
        protocol: lenient(config.text("protocol"), &mut notes).unwrap_or_default(),
        mesh_gateway: if mode.is_empty() { proxy.mesh_gateway.mode.clone() } else { mode.clone() },
        max_connections: max_connections(&config, &mut notes),
        outlier: outlier(&config, &mut notes),
        tuning: Tuning::default(),
        deny_reply: deny_reply(&config, &mut notes),
        access_logs: Vec::new(),
        unhatched: None,
        label,
    };
    let unhatched = upstream.clone();
    if hatches::of_upstream(&config, &mut upstream, (&own.service, &place))? {
        upstream.unhatched = Some(Box::new(unhatched));
    }
    config.ignore(&HARMLESS_KEYS);
    notes.extend(config.unread().iter().map(|key| format!("config.{} has no effect", key.escape_default())));
    warnings.extend(notes.into_iter().map(|note| format!("{place}: {note}")));
    Ok(Some(upstream))
}

/// As Consul writes an upstream's id: `[prepared_query:][partition/][namespace/]name[?dc=..|?peer=..]`.
fn label(wire: &wire::Upstream) -> String {
    let kind = if wire.destination_type == "prepared_query" { "prepared_query:" } else { "" };
    let mut text = kind.to_owned();
    for part in [&wire.destination_partition, &wire.destination_namespace] {
        if !part.is_empty() && part != "default" {
            text.push_str(part);
            text.push('/');
        }
    }
    text.push_str(&wire.destination_name);
    if !wire.destination_peer.is_empty() {
        text.push_str(&format!("?peer={}", wire.destination_peer));
    } else if !wire.datacenter.is_empty() {
        text.push_str(&format!("?dc={}", wire.datacenter));
    }
    text
}

fn destination(wire: &wire::Upstream, own: &Name) -> Destination {
    let datacenter = wire.datacenter.clone();
    match wire.destination_type.as_str() {
        _ if !wire.destination_peer.is_empty() => Destination::Unsupported(format!(
            "it is imported from peer {}: peering needs the xDS feeder, Consul's HTTP API does not give the peer's trust bundle",
            wire.destination_peer
        )),
        "" | "service" => {
            let or_own = |given: &str, own: &str| if given.is_empty() { own.to_owned() } else { not_default(given) };
            Destination::Service {
                name: Name {
                    service: wire.destination_name.clone(),
                    namespace: or_own(&wire.destination_namespace, &own.namespace),
                    partition: or_own(&wire.destination_partition, &own.partition),
                },
                datacenter,
            }
        }
        "prepared_query" => Destination::Query { name: wire.destination_name.clone(), datacenter },
        other => Destination::Unsupported(format!("destination_type {} is unknown", other.escape_default())),
    }
}

fn bind(wire: &wire::Upstream, place: &str) -> Result<Bind, String> {
    if !wire.local_bind_socket_path.is_empty() {
        let text = wire.local_bind_socket_mode.as_str();
        let mode = match text {
            "" => None,
            text => Some(u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777).ok_or_else(|| {
                format!("{place}: local_bind_socket_mode `{}` is no octal mode such as 0660", text.escape_default())
            })?),
        };
        return Ok(Bind::Unix { path: PathBuf::from(&wire.local_bind_socket_path), mode });
    }
    let ip = bind_ip(&wire.local_bind_address, Ipv4Addr::LOCALHOST, &format!("{place}: local_bind_address"))?;
    Ok(Bind::Tcp(SocketAddr::new(ip, wire.local_bind_port)))
}

/// `deny_reply`, a key of ringfence's own: Consul passes on what it does not know.
fn deny_reply(config: &Opaque<'_>, notes: &mut Vec<String>) -> DenyReply {
    match lenient(config.text("deny_reply"), notes).as_deref() {
        None | Some("" | "close") => DenyReply::Close,
        Some("postgres") => DenyReply::Postgres,
        Some("mysql") => DenyReply::Mysql,
        Some("http") => DenyReply::Http,
        Some("redis") => DenyReply::Redis,
        Some(other) => {
            let other = other.escape_default();
            notes.push(format!(
                "config.deny_reply `{other}` is none of postgres, mysql, http, redis, close; clients are only closed"
            ));
            DenyReply::Close
        }
    }
}

fn max_connections(config: &Opaque<'_>, notes: &mut Vec<String>) -> Option<u32> {
    let limits = Opaque::new(lenient(config.block("limits"), notes)?);
    let max = lenient(limits.small("max_connections"), notes);
    limits.ignore(&["max_pending_requests", "max_concurrent_requests"]);
    notes.extend(limits.unread().iter().map(|key| format!("limits.{} has no effect", key.escape_default())));
    max
}

fn outlier(config: &Opaque<'_>, notes: &mut Vec<String>) -> Outlier {
    let defaults = Outlier::default();
    let Some(block) = lenient(config.block("passive_health_check"), notes) else { return defaults };
    let block = Opaque::new(block);
    let percent = |value: Option<u32>, default: u32| value.unwrap_or(default).min(100);
    let outlier = Outlier {
        // Consul leaves Envoy's default in place of 0.
        max_failures: lenient(block.small("max_failures"), notes).filter(|max| *max > 0).unwrap_or(defaults.max_failures),
        enforcing_percent: percent(lenient(block.small("enforcing_consecutive_5xx"), notes), defaults.enforcing_percent),
        max_ejection_percent: percent(lenient(block.small("max_ejection_percent"), notes), defaults.max_ejection_percent),
        base_ejection: positive(lenient(block.duration("base_ejection_time"), notes), defaults.base_ejection),
        interval: positive(lenient(block.duration("interval"), notes), defaults.interval),
    };
    notes.extend(block.unread().iter().map(|key| format!("passive_health_check.{} has no effect", key.escape_default())));
    outlier
}
