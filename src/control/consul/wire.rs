//! Consul's JSON, as far as this proxy reads it. Unknown fields are ignored; `null` is an empty list, map or text.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use zeroize::Zeroizing;

/// `GET /v1/agent/service/:id`, and an element of `/v1/agent/services` and of health answers.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Service {
    #[serde(deserialize_with = "nullable")]
    pub(crate) kind: String,
    #[serde(rename = "ID")]
    pub(crate) id: String,
    pub(crate) service: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) address: String,
    pub(crate) port: u16,
    #[serde(deserialize_with = "nullable")]
    pub(crate) tagged_addresses: BTreeMap<String, TaggedAddress>,
    pub(crate) weights: Option<Weights>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) proxy: Proxy,
    #[serde(deserialize_with = "nullable")]
    pub(crate) connect: Connect,
    #[serde(deserialize_with = "nullable")]
    pub(crate) datacenter: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) namespace: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) partition: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct TaggedAddress {
    pub(crate) address: String,
    pub(crate) port: u16,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Weights {
    pub(crate) passing: i64,
    pub(crate) warning: i64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Connect {
    pub(crate) native: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Proxy {
    #[serde(deserialize_with = "nullable")]
    pub(crate) destination_service_name: String,
    #[serde(rename = "DestinationServiceID", deserialize_with = "nullable")]
    pub(crate) destination_service_id: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) local_service_address: String,
    pub(crate) local_service_port: u16,
    #[serde(deserialize_with = "nullable")]
    pub(crate) local_service_socket_path: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) mode: String,
    #[serde(rename = "MutualTLSMode", deserialize_with = "nullable")]
    pub(crate) mutual_tls_mode: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) config: Map<String, Value>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) upstreams: Vec<Upstream>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) mesh_gateway: MeshGateway,
    #[serde(deserialize_with = "nullable")]
    pub(crate) expose: Expose,
    #[serde(deserialize_with = "nullable")]
    pub(crate) access_logs: AccessLogs,
    #[serde(deserialize_with = "nullable")]
    pub(crate) envoy_extensions: Vec<EnvoyExtension>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct MeshGateway {
    #[serde(deserialize_with = "nullable")]
    pub(crate) mode: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Expose {
    pub(crate) checks: bool,
    #[serde(deserialize_with = "nullable")]
    pub(crate) paths: Vec<ExposedPath>,
}

/// A path of the app that is reached without TLS.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct ExposedPath {
    #[serde(deserialize_with = "nullable")]
    pub(crate) path: String,
    pub(crate) local_path_port: u16,
    pub(crate) listener_port: u16,
    #[serde(deserialize_with = "nullable")]
    pub(crate) protocol: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct AccessLogs {
    pub(crate) enabled: bool,
    pub(crate) disable_listener_logs: bool,
    #[serde(rename = "Type", deserialize_with = "nullable")]
    pub(crate) kind: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) path: String,
    #[serde(rename = "JSONFormat", deserialize_with = "nullable")]
    pub(crate) json_format: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) text_format: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct EnvoyExtension {
    #[serde(deserialize_with = "nullable")]
    pub(crate) name: String,
    pub(crate) required: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Upstream {
    #[serde(deserialize_with = "nullable")]
    pub(crate) destination_type: String,
    pub(crate) destination_name: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) destination_namespace: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) destination_partition: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) destination_peer: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) datacenter: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) local_bind_address: String,
    pub(crate) local_bind_port: u16,
    #[serde(deserialize_with = "nullable")]
    pub(crate) local_bind_socket_path: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) local_bind_socket_mode: String,
    pub(crate) centrally_configured: bool,
    #[serde(deserialize_with = "nullable")]
    pub(crate) config: Map<String, Value>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) mesh_gateway: MeshGateway,
}

/// `GET /v1/agent/connect/ca/roots`. A field that is missing here is an error: roots are never a default.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Roots {
    #[serde(rename = "ActiveRootID")]
    pub(crate) active_root_id: String,
    pub(crate) trust_domain: String,
    pub(crate) roots: Vec<Root>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Root {
    #[serde(rename = "ID")]
    pub(crate) id: String,
    pub(crate) root_cert: String,
    #[serde(rename = "SigningKeyID", default, deserialize_with = "nullable")]
    pub(crate) signing_key_id: String,
}

/// `GET /v1/agent/connect/ca/leaf/:service`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Leaf {
    #[serde(rename = "CertPEM")]
    pub(crate) cert_pem: String,
    #[serde(rename = "PrivateKeyPEM")]
    pub(crate) private_key_pem: Private,
}

/// Text that is wiped when dropped and never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Private(pub(crate) Zeroizing<String>);

/// One element of `/v1/connect/intentions/match`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Intention {
    #[serde(rename = "ID", deserialize_with = "nullable")]
    pub(crate) id: String,
    #[serde(rename = "SourceNS", deserialize_with = "nullable")]
    pub(crate) source_ns: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) source_name: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) source_partition: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) source_peer: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) source_sameness_group: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) destination_name: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) action: String,
    pub(crate) precedence: i64,
    #[serde(deserialize_with = "nullable")]
    pub(crate) permissions: Vec<Value>,
    #[serde(rename = "JWT")]
    pub(crate) jwt: Option<Value>,
}

/// `POST /v1/agent/connect/authorize`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Authorized {
    pub(crate) authorized: bool,
    pub(crate) reason: String,
}

/// `/v1/connect/intentions/check`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Checked {
    pub(crate) allowed: bool,
}

/// `/v1/discovery-chain/:service`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ChainAnswer {
    pub(crate) chain: Chain,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Chain {
    #[serde(default)]
    pub(crate) service_name: String,
    #[serde(default)]
    pub(crate) namespace: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) protocol: String,
    pub(crate) start_node: String,
    pub(crate) nodes: BTreeMap<String, ChainNode>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) targets: BTreeMap<String, ChainTarget>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ChainNode {
    #[serde(rename = "Type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) resolver: Option<Resolver>,
    #[serde(default)]
    pub(crate) load_balancer: Option<LoadBalancer>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Resolver {
    #[serde(default)]
    pub(crate) connect_timeout: Option<Value>,
    /// There is no such entry.
    #[serde(default)]
    pub(crate) default: bool,
    pub(crate) target: String,
    #[serde(default)]
    pub(crate) failover: Option<Failover>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Failover {
    #[serde(deserialize_with = "nullable")]
    pub(crate) targets: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct LoadBalancer {
    #[serde(deserialize_with = "nullable")]
    pub(crate) policy: String,
    pub(crate) least_request_config: Option<LeastRequest>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct LeastRequest {
    pub(crate) choice_count: u32,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ChainTarget {
    pub(crate) service: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) namespace: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) partition: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) peer: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) datacenter: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) mesh_gateway: MeshGateway,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) subset: Subset,
    #[serde(rename = "SNI", default, deserialize_with = "nullable")]
    pub(crate) sni: String,
    #[serde(default)]
    pub(crate) external: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Subset {
    #[serde(deserialize_with = "nullable")]
    pub(crate) filter: String,
    pub(crate) only_passing: bool,
}

/// One element of health answers and of a prepared query's `Nodes`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Instance {
    pub(crate) node: Node,
    pub(crate) service: Service,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) checks: Vec<Check>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Node {
    #[serde(deserialize_with = "nullable")]
    pub(crate) address: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) datacenter: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) tagged_addresses: BTreeMap<String, String>,
}

/// An element of `/v1/agent/checks`, and of health answers.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Check {
    pub(crate) status: String,
    /// Empty for a check of the node.
    #[serde(default, rename = "ServiceID", deserialize_with = "nullable")]
    pub(crate) service_id: String,
    /// What the check last said; empty until it has run.
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) output: String,
    /// `tcp`, `http`, `ttl`, `alias` and so on; empty for node checks and maintenance.
    #[serde(default, rename = "Type", deserialize_with = "nullable")]
    pub(crate) kind: String,
    /// Where the agent asks instead of at the app; 0 is at the app, or not told (before Consul 1.10). Whoever registers an
    /// instance may write anything here.
    #[serde(default, deserialize_with = "port_or_none")]
    pub(crate) exposed_port: u16,
}

/// `GET /v1/query/:name/execute`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct QueryAnswer {
    #[serde(deserialize_with = "nullable")]
    pub(crate) nodes: Vec<Instance>,
}

/// `GET /v1/config/mesh/mesh`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Mesh {
    #[serde(rename = "TLS", deserialize_with = "nullable")]
    pub(crate) tls: MeshTls,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct MeshTls {
    #[serde(deserialize_with = "nullable")]
    pub(crate) incoming: TlsRange,
    #[serde(deserialize_with = "nullable")]
    pub(crate) outgoing: TlsRange,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TlsRange {
    #[serde(rename = "TLSMinVersion", deserialize_with = "nullable")]
    pub(crate) min: String,
    #[serde(rename = "TLSMaxVersion", deserialize_with = "nullable")]
    pub(crate) max: String,
    #[serde(rename = "CipherSuites", deserialize_with = "nullable")]
    pub(crate) suites: Vec<String>,
}

impl<'de> Deserialize<'de> for Private {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

impl std::fmt::Debug for Private {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A port, or 0 for whatever is none.
fn port_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    Ok(Value::deserialize(deserializer)?.as_u64().and_then(|number| u16::try_from(number).ok()).unwrap_or(0))
}

/// Go writes `null` for an empty list or map.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// `2026-11-22T14:01:47.123Z` or with an offset; `None` for anything else.
pub(crate) fn rfc3339(text: &str) -> Option<SystemTime> {
    let number = |range: std::ops::Range<usize>| text.get(range).and_then(|part| part.parse::<u32>().ok());
    let month = time::Month::try_from(u8::try_from(number(5..7)?).ok()?).ok()?;
    let day = u8::try_from(number(8..10)?).ok()?;
    let date = time::Date::from_calendar_date(i32::try_from(number(0..4)?).ok()?, month, day).ok()?;
    let midnight = date.midnight().assume_utc().unix_timestamp();
    let of_day = i64::from(number(11..13)?) * 3_600 + i64::from(number(14..16)?) * 60 + i64::from(number(17..19)?);
    let zone = text.get(19..)?.trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
    let offset = match zone.as_bytes() {
        [b'Z'] => 0,
        [sign @ (b'+' | b'-'), rest @ ..] if rest.len() == 5 => {
            let hours: i64 = zone.get(1..3)?.parse().ok()?;
            let minutes: i64 = zone.get(4..6)?.parse().ok()?;
            (hours * 3_600 + minutes * 60) * if *sign == b'-' { -1 } else { 1 }
        }
        _ => return None,
    };
    let seconds = u64::try_from(midnight + of_day - offset).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_read_with_any_fraction_and_zone() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(rfc3339("1970-01-02T00:00:01Z"), at(86_401));
        assert_eq!(rfc3339("1970-01-02T01:00:01.123456789+01:00"), at(86_401));
        assert_eq!(rfc3339("2026-11-22T14:01:47Z"), at(1_795_356_107));
        for bad in ["", "2026-13-01T00:00:00Z", "2026-11-22", "2026-11-22T14:01:47", "1900-01-01T00:00:00Z", "é026-11-22T14"] {
            assert_eq!(rfc3339(bad), None, "{bad}");
        }
    }

    #[test]
    fn nulls_are_empty_but_missing_roots_are_an_error() {
        let service: Service = serde_json::from_str(
            r#"{"Kind":"connect-proxy","ID":"a","Service":"b","Proxy":{"Config":null,"Upstreams":null},"TaggedAddresses":null}"#,
        )
        .expect("nulls are fine");
        assert!(service.proxy.upstreams.is_empty());
        assert!(serde_json::from_str::<Roots>("{}").is_err());
        assert!(serde_json::from_str::<Leaf>(r#"{"CertPEM":"x"}"#).is_err());
    }
}
