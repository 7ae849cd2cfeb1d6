//! `Listener`: the public one of a service, or one of an upstream.
//!
//! Invariant: a listener that is parsed is served as it stands: every filter of it is known, and what it terminates it also
//! decides on. Anything else is refused by the name of the filter or match. Pure.

use std::path::PathBuf;
use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog as WireLog;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use envoy_types::pb::google::protobuf::Any;

use super::access_log;
use super::endpoint::Host;
use super::rbac;
use super::refusal::{Refusal, message_name, unpack};
use super::tls_context::{self, Material};
use crate::config::envoy::AccessLog;
use crate::mesh::Bind;
use crate::policy::network::Rules;
use crate::policy::{DefaultPolicy, Intentions};

const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const RBAC: &str = "envoy.extensions.filters.network.rbac.v3.RBAC";
const CONNECTION_LIMIT: &str = "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit";
const FILTERS_WANTED: &str = "at L4 rbac, connection_limit and tcp_proxy are known";

/// A listener as it is served.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Listener {
    pub(super) name: String,
    pub(super) bind: Bind,
    pub(super) role: Role,
    /// Where its connections go.
    pub(super) cluster: String,
    pub(super) access_logs: Vec<AccessLog>,
}

/// Which way a listener leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// Mutual TLS in.
    Public {
        material: Arc<Material>,
        intentions: Arc<Intentions>,
        /// 0 is unlimited.
        max_connections: u32,
    },
    /// Plain in, mutual TLS out. The label is what Consul calls the upstream.
    Upstream { label: String },
}

/// What the filters of a chain say.
#[derive(Default)]
struct Filters {
    rules: Vec<Rules>,
    rbac: bool,
    max_connections: u32,
    cluster: Option<String>,
    access_logs: Vec<AccessLog>,
}

impl Listener {
    pub(super) fn parse(message: &pb::Listener) -> Result<Self, Refusal> {
        let bind = bind(message)?;
        if let Some(filter) = message.listener_filters.first() {
            let wanted = "connections are not told apart by server name or original destination here: expected none";
            return Err(Refusal::new("listener_filters[0].name", &filter.name, wanted));
        }
        let chain = match (message.filter_chains.as_slice(), &message.default_filter_chain) {
            ([chain], None) => chain,
            ([], Some(chain)) => chain,
            (chains, default) => {
                let found = format!("{} and {} by default", chains.len(), usize::from(default.is_some()));
                return Err(Refusal::new("filter_chains", found, "expected one filter chain"));
            }
        };
        let place = "filter_chains[0]";
        if chain.filter_chain_match.as_ref().is_some_and(|found| *found != pb::FilterChainMatch::default()) {
            let wanted = "the one chain takes every connection: expected no match";
            return Err(Refusal::new(format!("{place}.filter_chain_match"), "present", wanted));
        }
        let filters = filters(chain).map_err(|why| why.under(place))?;
        let Some(cluster) = filters.cluster else {
            let wanted = "expected envoy.filters.network.tcp_proxy as the last filter";
            return Err(Refusal::missing(format!("{place}.filters"), wanted));
        };
        let tls = tls_context::downstream(chain.transport_socket.as_ref()).map_err(|why| why.under(place))?;
        if tls.is_some() && !filters.rbac {
            let wanted = "without it every certificate of the mesh would be let in: expected envoy.filters.network.rbac first";
            return Err(Refusal::missing(format!("{place}.filters"), wanted));
        }
        let role = match tls {
            Some(material) => Role::Public {
                material,
                intentions: Arc::new(Intentions::from_filters(filters.rules)),
                max_connections: filters.max_connections,
            },
            None if filters.rbac => {
                let wanted = "callers are known by their certificates: expected a DownstreamTlsContext with it";
                return Err(Refusal::new(format!("{place}.filters"), "envoy.filters.network.rbac without TLS", wanted));
            }
            None if message.traffic_direction == 1 => {
                let wanted = "a way in that is not mutual TLS is not served: expected a DownstreamTlsContext";
                return Err(Refusal::missing(format!("{place}.transport_socket"), wanted));
            }
            None => Role::Upstream { label: label(&message.name, &bind) },
        };
        let mut access_logs = access_logs(&message.access_log)?;
        access_logs.extend(filters.access_logs);
        Ok(Self { name: message.name.clone(), bind, role, cluster, access_logs })
    }
}

impl Listener {
    /// Lets nobody in any more.
    pub(super) fn deny_all(&mut self) {
        if let Role::Public { intentions, .. } = &mut self.role {
            *intentions = Arc::new(Intentions::new(Vec::new(), DefaultPolicy::Deny));
        }
    }
}

fn bind(message: &pb::Listener) -> Result<Bind, Refusal> {
    if message.bind_to_port.as_ref().is_some_and(|bound| !bound.value) {
        return Err(Refusal::new("bind_to_port", "false", "a listener is reached by its own port only: expected true"));
    }
    if message.udp_listener_config.is_some() || message.api_listener.is_some() {
        return Err(Refusal::new("udp_listener_config", "present", "expected a TCP listener"));
    }
    match Host::parse(message.address.as_ref())? {
        Host::Unix(path) => {
            let mode = message.address.as_ref().and_then(pipe_mode).filter(|mode| *mode != 0);
            Ok(Bind::Unix { path, mode })
        }
        Host::Tcp(host, port) => {
            let ip = host.parse().map_err(|_| Refusal::new("address.socket_address.address", &host, "expected an IP address"))?;
            Ok(Bind::Tcp(std::net::SocketAddr::new(ip, port)))
        }
    }
}

fn pipe_mode(address: &envoy_types::pb::envoy::config::core::v3::Address) -> Option<u32> {
    match &address.address {
        Some(envoy_types::pb::envoy::config::core::v3::address::Address::Pipe(pipe)) => Some(pipe.mode),
        _ => None,
    }
}

fn filters(chain: &pb::FilterChain) -> Result<Filters, Refusal> {
    let mut found = Filters::default();
    for (index, filter) in chain.filters.iter().enumerate() {
        let place = format!("filters[{index}]");
        if found.cluster.is_some() {
            return Err(Refusal::new(place, &filter.name, "expected nothing after tcp_proxy"));
        }
        let any = match &filter.config_type {
            Some(pb::filter::ConfigType::TypedConfig(any)) => any,
            Some(pb::filter::ConfigType::ConfigDiscovery(_)) => {
                return Err(Refusal::new(format!("{place}.config_discovery"), &filter.name, FILTERS_WANTED));
            }
            None => return Err(Refusal::new(format!("{place}.typed_config"), &filter.name, FILTERS_WANTED)),
        };
        take(&mut found, any, &filter.name).map_err(|why| why.under(&place))?;
    }
    Ok(found)
}

fn take(found: &mut Filters, any: &Any, name: &str) -> Result<(), Refusal> {
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
            found.max_connections = u32::try_from(most).unwrap_or(u32::MAX);
        }
        TCP_PROXY => {
            let filter: tcp_proxy::TcpProxy = unpack(any, TCP_PROXY, field)?;
            found.access_logs = access_logs(&filter.access_log).map_err(|why| why.under(field))?;
            found.cluster = Some(target(&filter).map_err(|why| why.under(field))?);
        }
        _ => return Err(Refusal::new("name", format!("{name} ({})", message_name(any)), FILTERS_WANTED)),
    }
    Ok(())
}

fn target(filter: &tcp_proxy::TcpProxy) -> Result<String, Refusal> {
    use tcp_proxy::tcp_proxy::ClusterSpecifier;
    if filter.tunneling_config.is_some() {
        return Err(Refusal::new("tunneling_config", "present", "TCP is not tunnelled in HTTP: expected none"));
    }
    match &filter.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) if !name.is_empty() => Ok(name.clone()),
        Some(ClusterSpecifier::WeightedClusters(weighted)) => match weighted.clusters.as_slice() {
            [one] => Ok(one.name.clone()),
            many => Err(Refusal::new("weighted_clusters.clusters", format!("{} clusters", many.len()), "expected one")),
        },
        Some(ClusterSpecifier::Cluster(_)) | None => Err(Refusal::missing("cluster", "expected a cluster's name")),
    }
}

fn access_logs(list: &[WireLog]) -> Result<Vec<AccessLog>, Refusal> {
    access_log::access_logs(list).map_err(|why| Refusal::new("access_log", why, "expected a log that can be written"))
}

/// Consul names a listener `LABEL:ADDRESS:PORT`.
fn label(name: &str, bind: &Bind) -> String {
    let suffix = match bind {
        Bind::Tcp(address) => format!(":{}:{}", address.ip(), address.port()),
        Bind::Unix { path, .. } => format!(":{}", PathBuf::from(path).display()),
    };
    name.strip_suffix(&suffix).filter(|label| !label.is_empty()).unwrap_or(name).to_owned()
}
