//! `Listener`: the public one of a service, one of an upstream, or one whose connections are told apart first.
//!
//! Invariant: a listener that is parsed is served as it stands: every filter of it is known, and what it terminates it also
//! decides on. Anything else is refused by the name of the filter or match. Pure.

mod chain;
mod http;
mod plain;
mod routes;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog as WireLog;
use envoy_types::pb::envoy::config::listener::v3 as pb;

use self::chain::Filters;
pub(super) use self::http::{Route as PageRoute, Target, passes_to, routes as routes_of};
pub(in crate::control) use self::plain::Plain;
use self::routes::routes;
use super::access_log;
use super::endpoint::Host;
use super::refusal::{Refusal, message_name};
use super::tls_context::{Downstream, Front, Material, SecretName};
use crate::config::envoy::{AccessLog, Logged, PathMatch};
use crate::mesh::Bind;
use crate::mesh::router::Match;
use crate::policy::{DefaultPolicy, Intentions};

const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";
const TLS_INSPECTOR: &str = "envoy.filters.listener.tls_inspector";
const ORIGINAL_DST_TYPE: &str = "envoy.extensions.filters.listener.original_dst.v3.OriginalDst";
const TLS_INSPECTOR_TYPE: &str = "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector";
/// Consul's protocols that have requests.
const PROTOCOLS: [&str; 3] = ["http", "http2", "grpc"];
/// Values of `TrafficDirection`.
const INBOUND: i32 = 1;
const OUTBOUND: i32 = 2;

/// A listener as it is served.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Listener {
    pub(super) name: String,
    pub(super) bind: Bind,
    pub(super) role: Role,
    /// Of the only chain, where the role has no chains of its own.
    pub(super) tuning: Tuning,
    pub(super) access_logs: Vec<AccessLog>,
}

/// Which way a listener leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// Mutual TLS in.
    Public(Ending),
    /// From local clients, or those of an ingress gateway, out with mutual TLS. The label is what Consul calls the upstream.
    Upstream { label: String, passage: Passage },
    /// Single paths of a local app, in plain HTTP, for whoever is in one of these networks (everybody where there are none).
    Pages { routes: Vec<PageRoute>, sources: Vec<(IpAddr, u8)> },
    /// Told apart by where they want to go, the server name they ask for, or whether they speak TLS.
    Router(Routes),
}

/// What `tcp_proxy` says of the connections that it carries. None of it changes who may come in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::control) struct Tuning {
    /// As [`crate::mesh::Upstream::idle_timeout`].
    pub(in crate::control) idle_timeout: Option<Duration>,
    /// As [`crate::mesh::Upstream::connect_attempts`].
    pub(in crate::control) connect_attempts: Option<u32>,
}

/// Mutual TLS that ends here, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ending {
    pub(super) material: Arc<Material>,
    pub(super) intentions: Arc<Intentions>,
    /// 0 is unlimited.
    pub(super) max_connections: u32,
    pub(super) to: Destination,
}

/// A way that begins with whoever connects, nobody of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Passage {
    pub(super) to: Destination,
    /// What TLS clients must speak; they speak in plain if none.
    pub(super) front: Option<Arc<Front>>,
}

/// The cluster behind a chain, as the chain says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    Cluster(String),
    /// The one that the route configuration of this name sends everything to.
    Routes(String),
}

/// The filter chains of a listener that has several, or conditions on one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Routes {
    /// Connections come redirected.
    pub(super) transparent: bool,
    /// It leads out into the mesh.
    pub(super) outbound: bool,
    pub(super) inspect_timeout: Duration,
    /// Whoever says nothing for so long speaks no TLS.
    pub(super) silent_is_raw: bool,
    pub(super) chains: Vec<Chain>,
    pub(super) fallback: Option<Chain>,
}

/// One filter chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    /// Unique in its listener.
    pub(super) name: String,
    pub(super) matches: Match,
    pub(super) way: Way,
    pub(super) tuning: Tuning,
}

/// Where a chain leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// Mutual TLS ends here.
    End(Ending),
    /// Whether TLS is spoken behind it is the cluster's to say.
    Pass(Passage),
    /// As it is to the cluster of the name that the ClientHello asks for (`sni_cluster`).
    ServerName,
}

/// What the listener filters say.
#[derive(Default)]
struct Inspection {
    transparent: bool,
    tls: bool,
}

impl Listener {
    /// `http_as_tcp` is that of [`crate::config::envoy::Xds`].
    pub(super) fn parse(message: &pb::Listener, http_as_tcp: bool) -> Result<Self, Refusal> {
        let bind = bind(message)?;
        let inspection = inspection(message)?;
        let mut access_logs = access_logs(&message.access_log)?;
        let only = match (message.filter_chains.as_slice(), &message.default_filter_chain) {
            ([chain], None) if chain::matches_all(chain) || chain::is_http(chain) => Some((chain, "filter_chains[0]")),
            ([], Some(chain)) => Some((chain, "default_filter_chain")),
            ([], None) => return Err(Refusal::missing("filter_chains", "expected one or more filter chains")),
            _ => None,
        };
        let only = match only {
            Some((chain, place)) if !inspection.transparent => {
                let filters = chain::filters(chain, http_as_tcp).map_err(|why| why.under(place))?;
                (!filters.by_server_name).then_some((chain, place, filters))
            }
            _ => None,
        };
        let mut tuning = Tuning::default();
        let role = match only {
            Some((chain, place, filters)) => {
                tuning = filters.tuning;
                access_logs.extend_from_slice(&filters.access_logs);
                let role =
                    if filters.paths.is_empty() { alone(message, &bind, chain, filters) } else { pages(message, chain, filters) };
                role.map_err(|why| why.under(place))?
            }
            None => Role::Router(routes(message, &bind, &inspection, &mut access_logs, http_as_tcp)?),
        };
        Ok(Self { name: message.name.clone(), bind, role, tuning, access_logs })
    }

    /// As [`AccessLog::only`]; `None` where its routes are not known before they are asked for.
    pub(super) fn logged_as(&self) -> Option<BTreeSet<Logged>> {
        let of = |upstream: Option<&str>| Logged { service: None, upstream: upstream.map(str::to_owned) };
        Some(match &self.role {
            Role::Public(_) => BTreeSet::from([of(None)]),
            Role::Upstream { label, .. } => BTreeSet::from([of(Some(label))]),
            Role::Pages { .. } => BTreeSet::new(),
            Role::Router(routes) if routes.all().any(|chain| matches!(chain.way, Way::ServerName)) => return None,
            Role::Router(routes) => {
                let of_chains = routes.all().map(|chain| match chain.way {
                    Way::End(_) => of(None),
                    Way::Pass(_) | Way::ServerName => of(Some(&chain.name)),
                });
                of_chains.chain([of(Some(&self.name))]).collect()
            }
        })
    }

    /// Where it says that connections go.
    pub(super) fn destinations(&self) -> impl Iterator<Item = &Destination> {
        let (one, routes) = match &self.role {
            Role::Public(ending) => (Some(&ending.to), None),
            Role::Upstream { passage, .. } => (Some(&passage.to), None),
            Role::Pages { .. } => (None, None),
            Role::Router(routes) => (None, Some(routes)),
        };
        let of_routes = routes.into_iter().flat_map(Routes::all).filter_map(|chain| chain.way.destination());
        one.into_iter().chain(of_routes)
    }

    /// The secrets that its clients' TLS needs.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        let (one, routes) = match &self.role {
            Role::Upstream { passage, .. } => (Some(passage), None),
            Role::Router(routes) => (None, Some(routes)),
            Role::Public(_) | Role::Pages { .. } => (None, None),
        };
        let of_routes = routes.into_iter().flat_map(Routes::all).filter_map(|chain| match &chain.way {
            Way::Pass(passage) => Some(passage),
            Way::End(_) | Way::ServerName => None,
        });
        one.into_iter().chain(of_routes).filter_map(|passage| passage.front.as_ref()?.secret())
    }

    /// Everywhere that mutual TLS ends.
    pub(super) fn endings(&self) -> impl Iterator<Item = &Ending> {
        let (one, routes) = match &self.role {
            Role::Public(ending) => (Some(ending), None),
            Role::Upstream { .. } | Role::Pages { .. } => (None, None),
            Role::Router(routes) => (None, Some(routes)),
        };
        let of_routes = routes.into_iter().flat_map(Routes::all).filter_map(|chain| match &chain.way {
            Way::End(ending) => Some(ending),
            Way::Pass(_) | Way::ServerName => None,
        });
        one.into_iter().chain(of_routes)
    }

    /// Lets nobody in any more: what passes intentions by goes with them.
    pub(super) fn deny_all(&mut self) {
        let ends = |chain: &Chain| matches!(chain.way, Way::End(_));
        let nobody = Arc::new(Intentions::new(Vec::new(), DefaultPolicy::Deny));
        match &mut self.role {
            Role::Public(ending) => ending.intentions = nobody,
            Role::Upstream { .. } => {}
            Role::Pages { routes, .. } => routes.clear(),
            Role::Router(routes) if routes.all().any(ends) => {
                routes.chains.retain(ends);
                routes.fallback.take_if(|chain| !ends(chain));
                for chain in routes.chains.iter_mut().chain(&mut routes.fallback) {
                    if let Way::End(ending) = &mut chain.way {
                        ending.intentions = Arc::clone(&nobody);
                    }
                }
            }
            Role::Router(_) => {}
        }
    }
}

impl Way {
    /// Where it says that connections go.
    fn destination(&self) -> Option<&Destination> {
        match self {
            Self::End(ending) => Some(&ending.to),
            Self::Pass(passage) => Some(&passage.to),
            Self::ServerName => None,
        }
    }

    /// What stands for it: the name of the cluster, or of the routes to it.
    pub(super) fn name(&self) -> Option<&str> {
        self.destination().map(Destination::name)
    }
}

impl Destination {
    /// Of the cluster, or of the routes to it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Cluster(name) | Self::Routes(name) => name,
        }
    }
}

impl Routes {
    /// Every chain, the one by default last.
    pub(super) fn all(&self) -> impl Iterator<Item = &Chain> {
        self.chains.iter().chain(&self.fallback)
    }
}

/// Requests by path, in plain: what Consul makes of `expose`. Behind TLS requests would have to be looked at.
fn pages(message: &pb::Listener, chain: &pb::FilterChain, filters: Filters) -> Result<Role, Refusal> {
    let wanted = "requests are told apart by path only where a local app's single paths are exposed in plain HTTP: expected none";
    if chain.transport_socket.is_some() {
        return Err(Refusal::new("transport_socket", "with routes by path", wanted));
    }
    if filters.rbac || filters.max_connections != 0 {
        return Err(Refusal::new("filters", "rbac or connection_limit with routes by path", wanted));
    }
    let whole = |route: &PageRoute| matches!((&route.path, &route.to), (PathMatch::Prefix(_), Target::Cluster { .. }));
    if message.traffic_direction != INBOUND || filters.paths.iter().any(whole) {
        let wanted =
            "in plain HTTP single paths of the local app are exposed: expected exact paths in a listener for traffic inbound";
        return Err(Refusal::new("filters.http_connection_manager.route_config", "routes by prefix, or outbound", wanted));
    }
    Ok(Role::Pages { routes: filters.paths, sources: chain::sources(chain)? })
}

/// One chain that takes every connection.
fn alone(message: &pb::Listener, bind: &Bind, chain: &pb::FilterChain, filters: Filters) -> Result<Role, Refusal> {
    if !chain::matches_all(chain) {
        let wanted = "whoever is let in is decided by RBAC: expected no condition";
        return Err(Refusal::new("filter_chain_match", "present", wanted));
    }
    match way(filters, bind)? {
        Way::End(ending) => Ok(Role::Public(ending)),
        Way::Pass(_) if message.traffic_direction == INBOUND => {
            let wanted = "a way in that is not mutual TLS is not served: expected a DownstreamTlsContext that requires a client certificate";
            Err(Refusal::missing("transport_socket", wanted))
        }
        Way::Pass(passage) => {
            let label = label(&message.name, bind);
            // Consul calls every listener for HTTP after the protocol; its routes have the name of the port, as in Envoy's stats.
            let label = match &passage.to {
                Destination::Routes(routes) if PROTOCOLS.contains(&label.as_str()) => format!("ingress_upstream_{routes}"),
                _ => label,
            };
            Ok(Role::Upstream { label, passage })
        }
        Way::ServerName => Err(Refusal::new("filters", "sni_cluster", "expected it with tls_inspector")),
    }
}

/// Where a chain leads; what it terminates it must also decide on.
fn way(filters: Filters, bind: &Bind) -> Result<Way, Refusal> {
    if filters.by_server_name && filters.downstream != Downstream::Plain {
        return Err(Refusal::new("filters", "sni_cluster", "TLS is passed on by it: expected no DownstreamTlsContext"));
    }
    let front = match &filters.downstream {
        Downstream::Mesh(material) => return end(Arc::clone(material), filters),
        Downstream::Front(front) => Some(Arc::clone(front)),
        Downstream::Plain => None,
    };
    // Whoever is on this host is the caller itself. Envoy would take the header from others.
    let of_this_host = match bind {
        Bind::Tcp(address) => address.ip().is_loopback(),
        Bind::Unix { .. } => true,
    };
    if !of_this_host {
        filters.check_http("for clients of other hosts")?;
    }
    if filters.rbac {
        let wanted = "callers are known by their certificates: expected a DownstreamTlsContext that requires one with it";
        return Err(Refusal::new("filters", "envoy.filters.network.rbac without mutual TLS", wanted));
    }
    if filters.max_connections != 0 {
        let wanted = "without mutual TLS it is the cluster that limits connections: expected circuit_breakers there";
        return Err(Refusal::new("filters", "envoy.filters.network.connection_limit", wanted));
    }
    match filters.to {
        Some(to) => Ok(Way::Pass(Passage { to, front })),
        None => Ok(Way::ServerName),
    }
}

/// Mutual TLS that ends here: callers of the mesh come in.
fn end(material: Arc<Material>, filters: Filters) -> Result<Way, Refusal> {
    filters.check_http("behind TLS")?;
    if !filters.rbac {
        let wanted = "without it every certificate of the mesh would be let in: expected envoy.filters.network.rbac, or of HTTP envoy.filters.http.rbac, first";
        return Err(Refusal::missing("filters", wanted));
    }
    let intentions = Arc::new(Intentions::from_filters(filters.rules));
    let to = filters.to.ok_or_else(|| Refusal::missing("filters.tcp_proxy.cluster", "expected a cluster's name"))?;
    Ok(Way::End(Ending { to, material, intentions, max_connections: filters.max_connections }))
}

/// Filters of listeners are known by their names where they have no type: Consul up to 1.11 sends them so.
fn inspection(message: &pb::Listener) -> Result<Inspection, Refusal> {
    let mut found = Inspection::default();
    if message.transparent.as_ref().is_some_and(|set| set.value) {
        let wanted = "connections are redirected here, not handed over with foreign addresses: expected false";
        return Err(Refusal::new("transparent", "true", wanted));
    }
    found.transparent = message.use_original_dst.as_ref().is_some_and(|set| set.value);
    for (index, filter) in message.listener_filters.iter().enumerate() {
        let place = format!("listener_filters[{index}]");
        if filter.filter_disabled.is_some() {
            return Err(Refusal::new(format!("{place}.filter_disabled"), "present", "a filter holds for every connection"));
        }
        let name = match &filter.config_type {
            Some(pb::listener_filter::ConfigType::TypedConfig(any)) => message_name(any),
            Some(pb::listener_filter::ConfigType::ConfigDiscovery(_)) => "config_discovery",
            None => filter.name.as_str(),
        };
        match name {
            ORIGINAL_DST | ORIGINAL_DST_TYPE => found.transparent = true,
            TLS_INSPECTOR | TLS_INSPECTOR_TYPE => found.tls = true,
            _ => {
                let wanted = format!("of these {TLS_INSPECTOR} and {ORIGINAL_DST} are known");
                return Err(Refusal::new(format!("{place}.name"), &filter.name, wanted));
            }
        }
    }
    Ok(found)
}

fn bind(message: &pb::Listener) -> Result<Bind, Refusal> {
    if message.filter_chain_matcher.is_some() {
        return Err(Refusal::new(
            "filter_chain_matcher",
            "present",
            "chains are told apart by filter_chain_match: expected none",
        ));
    }
    if !message.additional_addresses.is_empty() {
        let wanted = "a listener has one address here: expected none";
        return Err(Refusal::new("additional_addresses", message.additional_addresses.len(), wanted));
    }
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
