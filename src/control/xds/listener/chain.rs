//! One filter chain: whom it takes and what its filters are.
//!
//! Invariant: a chain that is read has known filters only, and leads somewhere.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use envoy_types::pb::google::protobuf::Any;

use super::http::{self, CONNECTION_MANAGER, Http, Route, Routing};
use super::{Destination, Tuning, access_logs};
use crate::config::envoy::AccessLog;
use crate::control::xds::cluster::duration;
use crate::control::xds::rbac;
use crate::control::xds::refusal::{Refusal, message_name, unpack};
use crate::control::xds::tls_context::{self, Downstream};
use crate::mesh::router::{Match, Network, ServerName};
use crate::policy::network::Rules;

const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const RBAC: &str = "envoy.extensions.filters.network.rbac.v3.RBAC";
const CONNECTION_LIMIT: &str = "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit";
const SNI_CLUSTER: &str = "envoy.extensions.filters.network.sni_cluster.v3.SniCluster";
/// The same filter where it comes without a type.
const SNI_CLUSTER_NAME: &str = "envoy.filters.network.sni_cluster";
const FILTERS_WANTED: &str = "at L4 rbac, connection_limit, sni_cluster, tcp_proxy and an http_connection_manager that passes all \
                              to one cluster are known";

/// What the filters of a chain say.
#[derive(Default)]
pub(super) struct Filters {
    pub(super) rules: Vec<Rules>,
    pub(super) rbac: bool,
    /// 0 is unlimited.
    pub(super) max_connections: u32,
    /// The cluster is that of the server name.
    pub(super) by_server_name: bool,
    /// Where all goes; none where `paths` or the server name says it.
    pub(super) to: Option<Destination>,
    pub(super) tuning: Tuning,
    /// It ends in an `http_connection_manager`.
    pub(super) http: bool,
    /// And may do so where whoever connects is not of this host.
    pub(super) http_as_tcp: bool,
    /// What clients must speak.
    pub(super) downstream: Downstream,
    /// The paths of an `http_connection_manager` that tells them apart; then there is no cluster.
    pub(super) paths: Vec<Route>,
    pub(super) access_logs: Vec<AccessLog>,
}

/// What is said of a header that only Envoy writes.
const HEADER_WANTED: &str = "x-forwarded-client-cert would reach the app as a stranger wrote it: expected tcp_proxy, so set the \
                             protocol to tcp, or RINGFENCE_HTTP_AS_TCP=1 for this process if the app does not trust that header";

impl Filters {
    /// Refuses HTTP of strangers, unless the operator says that apps do not mind. Who they are is `whose`.
    pub(super) fn check_http(&self, whose: &str) -> Result<(), Refusal> {
        if self.http && !self.http_as_tcp {
            return Err(Refusal::new("filters", format!("http_connection_manager {whose}"), HEADER_WANTED));
        }
        Ok(())
    }
}

/// Whether it takes every connection.
pub(super) fn matches_all(chain: &pb::FilterChain) -> bool {
    chain.filter_chain_match.as_ref().is_none_or(|found| *found == pb::FilterChainMatch::default())
}

/// Whether an `http_connection_manager` is all there is to it.
pub(super) fn is_http(chain: &pb::FilterChain) -> bool {
    match chain.filters.as_slice() {
        [pb::Filter { config_type: Some(pb::filter::ConfigType::TypedConfig(any)), .. }] => {
            message_name(any) == CONNECTION_MANAGER
        }
        _ => false,
    }
}

/// The networks that a chain takes connections from, where that is all it says of them.
pub(super) fn sources(chain: &pb::FilterChain) -> Result<Vec<(IpAddr, u8)>, Refusal> {
    let Some(found) = &chain.filter_chain_match else { return Ok(Vec::new()) };
    let bare = pb::FilterChainMatch { source_prefix_ranges: found.source_prefix_ranges.clone(), ..Default::default() };
    if *found != bare {
        return Err(Refusal::new("filter_chain_match", "more than source_prefix_ranges", "expected no other condition"));
    }
    let ranges = found.source_prefix_ranges.iter().enumerate();
    let place = |index| format!("filter_chain_match.source_prefix_ranges[{index}]");
    ranges.map(|(index, range)| address(range).map_err(|why| why.under(&place(index)))).collect()
}

/// Whom a chain takes.
pub(super) fn matches(chain: &pb::FilterChain) -> Result<Match, Refusal> {
    let Some(found) = &chain.filter_chain_match else { return Ok(Match::default()) };
    let place = "filter_chain_match";
    let other = [
        ("address_suffix", !found.address_suffix.is_empty() || found.suffix_len.is_some()),
        ("source_type", found.source_type != 0),
        ("source_prefix_ranges", !found.source_prefix_ranges.is_empty()),
        ("direct_source_prefix_ranges", !found.direct_source_prefix_ranges.is_empty()),
        ("source_ports", !found.source_ports.is_empty()),
        ("application_protocols", !found.application_protocols.is_empty()),
    ];
    if let Some((field, _)) = other.iter().find(|(_, present)| *present) {
        let wanted = "told apart are destination_port, prefix_ranges, server_names and transport_protocol: expected no other";
        return Err(Refusal::new(format!("{place}.{field}"), "present", wanted));
    }
    let port = found.destination_port.as_ref().map(|port| {
        let refused = |_| Refusal::new(format!("{place}.destination_port"), port.value, "expected a port number");
        u16::try_from(port.value).map_err(refused)
    });
    let networks = found.prefix_ranges.iter().enumerate();
    let networks =
        networks.map(|(index, range)| network(range).map_err(|why| why.under(&format!("{place}.prefix_ranges[{index}]"))));
    let names = found.server_names.iter().enumerate().map(|(index, name)| {
        name.parse().map_err(|why| Refusal::new(format!("{place}.server_names[{index}]"), why, "expected a name or *.suffix"))
    });
    let tls = match found.transport_protocol.as_str() {
        "" => None,
        "tls" => Some(true),
        "raw_buffer" => Some(false),
        other => return Err(Refusal::new(format!("{place}.transport_protocol"), other, "expected tls or raw_buffer")),
    };
    Ok(Match {
        port: port.transpose()?,
        networks: networks.collect::<Result<_, _>>()?,
        server_names: names.collect::<Result<Vec<ServerName>, _>>()?,
        tls,
    })
}

fn network(range: &CidrRange) -> Result<Network, Refusal> {
    let (address, prefix) = address(range)?;
    Network::new(address, prefix).map_err(|why| Refusal::new("prefix_len", prefix, why.to_string()))
}

/// Address and prefix length.
fn address(range: &CidrRange) -> Result<(IpAddr, u8), Refusal> {
    let refused = || Refusal::new("address_prefix", &range.address_prefix, "expected an IP address");
    let address: IpAddr = range.address_prefix.parse().map_err(|_| refused())?;
    let length = range.prefix_len.as_ref().map_or(0, |length| length.value);
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = u8::try_from(length).ok().filter(|prefix| *prefix <= bits);
    let refused = || Refusal::new("prefix_len", length, format!("{address}/{length} is no network: expected at most {bits}"));
    Ok((address, prefix.ok_or_else(refused)?))
}

/// What its filters say, the last of which must lead somewhere.
#[expect(deprecated, reason = "Envoy still reads use_proxy_proto")]
pub(super) fn filters(chain: &pb::FilterChain, http_as_tcp: bool) -> Result<Filters, Refusal> {
    if chain.use_proxy_proto.as_ref().is_some_and(|set| set.value) {
        return Err(Refusal::new("use_proxy_proto", "true", "a PROXY header would reach the cluster as payload: expected false"));
    }
    let downstream = tls_context::downstream(chain.transport_socket.as_ref())?;
    let ends_mesh = matches!(downstream, Downstream::Mesh(_));
    let mut found = Filters { downstream, http_as_tcp, ..Filters::default() };
    let mut ended = false;
    for (index, filter) in chain.filters.iter().enumerate() {
        let place = format!("filters[{index}]");
        if ended {
            return Err(Refusal::new(place, &filter.name, "expected nothing after tcp_proxy"));
        }
        let any = match &filter.config_type {
            Some(pb::filter::ConfigType::TypedConfig(any)) => any,
            Some(pb::filter::ConfigType::ConfigDiscovery(_)) => {
                return Err(Refusal::new(format!("{place}.config_discovery"), &filter.name, FILTERS_WANTED));
            }
            None if filter.name == SNI_CLUSTER_NAME => {
                found.by_server_name = true;
                continue;
            }
            None => return Err(Refusal::new(format!("{place}.typed_config"), &filter.name, FILTERS_WANTED)),
        };
        // Without callers of the mesh all of a connection manager must be what is done here.
        take(&mut found, any, &filter.name, http_as_tcp && ends_mesh).map_err(|why| why.under(&place))?;
        ended = [TCP_PROXY, CONNECTION_MANAGER].contains(&message_name(any));
    }
    if !ended {
        return Err(Refusal::missing("filters", "expected tcp_proxy or an http_connection_manager as the last filter"));
    }
    if !found.by_server_name && found.to.is_none() && found.paths.is_empty() {
        return Err(Refusal::missing("filters.tcp_proxy.cluster", "expected a cluster's name"));
    }
    Ok(found)
}

fn take(found: &mut Filters, any: &Any, name: &str, as_tcp: bool) -> Result<(), Refusal> {
    let field = "typed_config";
    match message_name(any) {
        RBAC => {
            let filter: Rbac = unpack(any, RBAC, field)?;
            found.rbac = true;
            found.rules.extend(rbac::rules(&filter).map_err(|why| why.under(field))?);
        }
        CONNECTION_LIMIT => {
            let filter: ConnectionLimit = unpack(any, CONNECTION_LIMIT, field)?;
            let most = filter.max_connections.as_ref().map_or(0, |most| most.value);
            if most == 0 {
                return Err(Refusal::new(format!("{field}.max_connections"), most, "expected 1 or more"));
            }
            let most = u32::try_from(most).unwrap_or(u32::MAX);
            found.max_connections = if found.max_connections == 0 { most } else { most.min(found.max_connections) };
        }
        TCP_PROXY => {
            let filter: tcp_proxy::TcpProxy = unpack(any, TCP_PROXY, field)?;
            found.access_logs = access_logs(&filter.access_log).map_err(|why| why.under(field))?;
            found.to = target(&filter).map_err(|why| why.under(field))?;
            found.tuning = tuning(&filter).map_err(|why| why.under(field))?;
        }
        SNI_CLUSTER => found.by_server_name = true,
        CONNECTION_MANAGER => {
            let http = Http::read(any, field, as_tcp)?;
            found.rbac |= http.rules.is_some();
            found.rules.extend(http.rules.iter().flatten().cloned());
            found.access_logs = access_logs(&http.access_log).map_err(|why| why.under(field))?;
            match http.routes {
                Routing::Discovered(name) => found.to = Some(Destination::Routes(name)),
                Routing::Inline(routes) => match http::passes_to(&routes) {
                    Some(cluster) => found.to = Some(Destination::Cluster(cluster.to_owned())),
                    None => found.paths = routes,
                },
            }
            found.http = true;
        }
        _ => return Err(Refusal::new("name", format!("{name} ({})", message_name(any)), FILTERS_WANTED)),
    }
    Ok(())
}

fn tuning(filter: &tcp_proxy::TcpProxy) -> Result<Tuning, Refusal> {
    let idle_timeout = duration(filter.idle_timeout.as_ref(), "idle_timeout")?;
    let connect_attempts = filter.max_connect_attempts.as_ref().map(|most| most.value);
    if connect_attempts == Some(0) {
        return Err(Refusal::new("max_connect_attempts", 0, "expected 1 or more"));
    }
    // 0 is Envoy's word for no bound, and it counts in milliseconds.
    Ok(Tuning { idle_timeout: idle_timeout.filter(|timeout| timeout.as_millis() > 0), connect_attempts })
}

fn target(filter: &tcp_proxy::TcpProxy) -> Result<Option<Destination>, Refusal> {
    use tcp_proxy::tcp_proxy::ClusterSpecifier;
    if filter.tunneling_config.is_some() {
        return Err(Refusal::new("tunneling_config", "present", "TCP is not tunnelled in HTTP: expected none"));
    }
    if filter.metadata_match.is_some() {
        return Err(Refusal::new("metadata_match", "present", "every healthy member of a cluster is used: expected none"));
    }
    let name = match &filter.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => name,
        Some(ClusterSpecifier::WeightedClusters(weighted)) => match weighted.clusters.as_slice() {
            [one] => &one.name,
            many => return Err(Refusal::new("weighted_clusters.clusters", format!("{} clusters", many.len()), "expected one")),
        },
        None => return Ok(None),
    };
    Ok((!name.is_empty()).then(|| Destination::Cluster(name.clone())))
}
