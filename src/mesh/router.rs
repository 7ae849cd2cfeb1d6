//! Listeners whose connections are told apart before anything is done with them: by where they wanted to go, by the server
//! name that they ask for, by whether they speak TLS at all. Values and the choice between them; workers act on it.
//!
//! Invariant: a [`Router`] is made by [`Router::new`] only, which refuses routes that cannot be told apart and routes that would
//! lead bytes past intentions. Which route a connection takes depends on the routes, never on their order.
//!
//! Knows no socket and no ClientHello: what was seen of a connection comes as [`Seen`].
//!
//! Source of the order: Envoy's `FilterChainManagerImpl::findFilterChain`. Port, then the longest prefix, then the server name
//! (exact, then the longest suffix, then any), then the transport protocol; each step keeps the best and never looks back. Envoy 1.40
//! was asked (tests.rs).

mod table;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use self::table::Table;
use super::{Bind, Service, Upstream};
use crate::config::Keepalive;

/// What a router is made of.
#[derive(Debug, Clone)]
pub struct RouterSettings {
    /// Names it in logs and metrics, and across snapshots together with `proxy_id` and `bind`.
    pub name: Arc<str>,
    /// The local service or gateway that it belongs to, for logs and metrics.
    pub service: Arc<str>,
    /// Consul's id of the proxy's registration.
    pub proxy_id: Arc<str>,
    /// Where connections come in.
    pub bind: Bind,
    /// Connections are redirected here, and the destination is where they wanted to go (`SO_ORIGINAL_DST`). Otherwise it is
    /// the address that they came in at.
    pub transparent: bool,
    /// Routes without TLS may stand beside [`Way::Terminate`]: the service accepts whoever comes without a certificate.
    pub permissive: bool,
    /// Bound on the first bytes, where routes need them: from accept to a whole ClientHello.
    pub inspect_timeout: Duration,
    /// Whoever says nothing in `inspect_timeout` counts as without TLS (Envoy's `continue_on_listener_filters_timeout`), for
    /// protocols in which the server speaks first. Otherwise it is reset.
    pub silent_is_raw: bool,
    /// In any order; names are unique.
    pub routes: Vec<Arc<Route>>,
    /// Taken when no other matches (Envoy's `default_filter_chain`); its own match is not looked at.
    pub fallback: Option<Arc<Route>>,
}

/// One listener with its routes.
#[derive(Debug)]
pub struct Router {
    settings: RouterSettings,
    table: Table,
    inspects: bool,
}

/// One way through a router and who takes it.
#[derive(Debug, Clone)]
pub struct Route {
    /// Names it in its router, in logs and metrics: a cluster's or filter chain's name.
    pub name: Arc<str>,
    /// Who takes it.
    pub matches: Match,
    /// Where it leads.
    pub way: Way,
}

/// What a connection must be like. The default matches all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// Destination port; any if none.
    pub port: Option<u16>,
    /// The destination is in one of these; anywhere if there are none.
    pub networks: Vec<Network>,
    /// The ClientHello asks for one of these; any name or none if there are none.
    pub server_names: Vec<ServerName>,
    /// Whether it speaks TLS; either if none.
    pub tls: Option<bool>,
}

/// A network by its first address and how many leading bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// A server name as routes write it, in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServerName {
    /// This name.
    Exact(Arc<str>),
    /// Any name that ends with this suffix, which begins with a dot; written `*.suffix`.
    Under(Arc<str>),
}

/// Where a route leads.
#[derive(Debug, Clone)]
pub enum Way {
    /// Bytes go as they are, both ways, to an endpoint of this cluster: a mesh gateway, or what permissive mode lets in. SNI and
    /// expected identities of its targets, its `bind` and its `deny_reply` mean nothing here.
    Forward(Arc<Upstream>),
    /// Mutual TLS as this service ends here and its intentions decide; behind it is the app.
    Terminate {
        /// Whose identity and intentions; its `public` says where the app is and the bounds, whatever its `bind`.
        service: Arc<Service>,
        /// The app when it is a set of endpoints to choose from, instead of `public.app`. TLS is spoken to it where its
        /// [`Upstream::outside`] says so.
        app: Option<Arc<Upstream>>,
    },
    /// Mutual TLS out, whatever clients speak, as an upstream's own listener does.
    Originate {
        /// Whose identity is shown.
        service: Arc<Service>,
        /// Where to; its `bind` means nothing here.
        upstream: Arc<Upstream>,
    },
    /// Bytes go as they are to where the connection wanted to go before it was redirected.
    Original(Original),
}

/// The bounds of a passthrough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Original {
    /// Bound on the TCP connect.
    pub connect_timeout: Duration,
    /// Most connections at once over all workers; `None` is Envoy's 1,024.
    pub max_connections: Option<u32>,
    /// As [`Upstream::idle_timeout`].
    pub idle_timeout: Option<Duration>,
    /// As [`Upstream::keepalive`].
    pub keepalive: Option<Keepalive>,
}

/// What is known of a connection when it is routed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen<'a> {
    /// Where it goes, on TCP.
    pub destination: Option<SocketAddr>,
    /// The server name that its ClientHello asks for, in lower case.
    pub server_name: Option<&'a str>,
    /// It began with a ClientHello.
    pub tls: bool,
}

/// Why a router was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouterError {
    /// Two routes of one name.
    #[error("router {router}: two routes are named {route}; name each after its cluster or filter chain")]
    SameName {
        /// The router.
        router: Arc<str>,
        /// The name.
        route: Arc<str>,
    },
    /// Two routes that one connection would take.
    #[error("router {router}: routes {first} and {second} match the same connections ({what}); only one of them may")]
    Overlap {
        /// The router.
        router: Arc<str>,
        /// One of them.
        first: Arc<str>,
        /// The other.
        second: Arc<str>,
        /// The match that both have.
        what: String,
    },
    /// Bytes would pass the intentions that another route enforces.
    #[error(
        "router {router}: route {route} passes bytes on without TLS beside routes that enforce intentions; set permissive mode \
         if the service is meant to accept clients without a certificate"
    )]
    PastIntentions {
        /// The router.
        router: Arc<str>,
        /// The route.
        route: Arc<str>,
    },
    /// TLS is to be ended for a service without a word on its app.
    #[error("router {router}: route {route} ends TLS for {service}, which has no public part; say where its app is")]
    NoApp {
        /// The router.
        router: Arc<str>,
        /// The route.
        route: Arc<str>,
        /// The service.
        service: Arc<str>,
    },
    /// Passthrough where nothing was redirected.
    #[error("router {router}: route {route} leads to the original destination, but the listener is not transparent")]
    NotTransparent {
        /// The router.
        router: Arc<str>,
        /// The route.
        route: Arc<str>,
    },
    /// Mutual TLS is to be ended for connections that speak none.
    #[error("router {router}: route {route} ends TLS, but matches only connections without TLS")]
    TerminatesRaw {
        /// The router.
        router: Arc<str>,
        /// The route.
        route: Arc<str>,
    },
    /// A network that is none.
    #[error("{address}/{prefix} is no network: an IPv4 prefix has at most 32 bits, an IPv6 prefix 128")]
    NoNetwork {
        /// Its address.
        address: IpAddr,
        /// Its prefix.
        prefix: u8,
    },
    /// A server name that cannot be matched.
    #[error("server name {0:?} cannot be matched; write a full name, or `*.` and a suffix")]
    NoServerName(String),
}

impl Router {
    /// A router of these settings, if they can be served.
    pub fn new(settings: RouterSettings) -> Result<Self, RouterError> {
        check(&settings)?;
        let table = Table::new(&settings)?;
        let looks = |route: &Arc<Route>| !route.matches.server_names.is_empty() || route.matches.tls.is_some();
        let inspects = settings.routes.iter().any(looks);
        Ok(Self { settings, table, inspects })
    }

    /// What it was made of.
    pub fn settings(&self) -> &RouterSettings {
        &self.settings
    }

    /// Every route, the fallback last.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.settings.routes.iter().chain(&self.settings.fallback)
    }

    /// Whether the first bytes must be seen before a connection can be routed.
    pub fn inspects(&self) -> bool {
        self.inspects
    }

    /// Whether intentions are enforced, and no bytes may pass them by.
    pub fn enforces(&self) -> bool {
        !self.settings.permissive && self.routes().any(|route| matches!(route.way, Way::Terminate { .. }))
    }

    /// Whether a service that TLS is spoken for has no certificate yet.
    pub fn lacks_identity(&self) -> bool {
        self.routes().filter_map(|route| route.way.service()).any(|service| service.identity.is_none())
    }

    /// The place in [`Self::routes`] of the route that a connection takes; `None` is to reset it.
    pub fn route(&self, seen: &Seen<'_>) -> Option<usize> {
        let fallback = || self.settings.fallback.as_ref().map(|_| self.settings.routes.len());
        self.table.find(seen).or_else(fallback)
    }
}

fn check(settings: &RouterSettings) -> Result<(), RouterError> {
    let mut names = std::collections::HashSet::new();
    let all = || settings.routes.iter().chain(&settings.fallback);
    let enforces = all().any(|route| matches!(route.way, Way::Terminate { .. }));
    for route in all() {
        let router = Arc::clone(&settings.name);
        let name = Arc::clone(&route.name);
        if !names.insert(&route.name) {
            return Err(RouterError::SameName { router, route: name });
        }
        match &route.way {
            Way::Terminate { service, .. } if service.public.is_none() => {
                return Err(RouterError::NoApp { router, route: name, service: Arc::clone(&service.name) });
            }
            Way::Terminate { .. } if route.matches.tls == Some(false) => {
                return Err(RouterError::TerminatesRaw { router, route: name });
            }
            Way::Original(_) if !settings.transparent => return Err(RouterError::NotTransparent { router, route: name }),
            Way::Forward(_) | Way::Original(_) | Way::Originate { .. } if enforces && !settings.permissive => {
                return Err(RouterError::PastIntentions { router, route: name });
            }
            Way::Forward(_) | Way::Terminate { .. } | Way::Originate { .. } | Way::Original(_) => {}
        }
    }
    Ok(())
}

impl Route {
    /// The endpoints that it chooses from, where it leads to such.
    pub fn upstream(&self) -> Option<&Arc<Upstream>> {
        match &self.way {
            Way::Forward(upstream) | Way::Originate { upstream, .. } => Some(upstream),
            Way::Terminate { app, .. } => app.as_ref(),
            Way::Original(_) => None,
        }
    }

    /// The cluster that it leads to, for metrics: its name begins with that, and no cluster's name has a space.
    pub fn cluster(&self) -> &str {
        let named = self.name.split(' ').next().unwrap_or_default();
        self.upstream().and_then(|upstream| upstream.targets.first()).map_or(named, |target| target.cluster())
    }
}

impl Way {
    /// The service whose identity and intentions hold on this way, where TLS is spoken.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Terminate { service, .. } | Self::Originate { service, .. } => Some(service),
            Self::Forward(_) | Self::Original(_) => None,
        }
    }

    /// As [`Upstream::idle_timeout`].
    pub fn idle_timeout(&self) -> Option<Duration> {
        match self {
            Self::Forward(upstream) | Self::Originate { upstream, .. } => upstream.idle_timeout,
            Self::Terminate { service, .. } => service.public.as_ref()?.idle_timeout,
            Self::Original(original) => original.idle_timeout,
        }
    }
}

impl Network {
    /// The network of `prefix` leading bits around `address`.
    pub fn new(address: IpAddr, prefix: u8) -> Result<Self, RouterError> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if prefix > bits {
            return Err(RouterError::NoNetwork { address, prefix });
        }
        let network = Self { address, prefix };
        let address = match address {
            IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) & (network.mask() >> 96) as u32).into()),
            IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & network.mask()).into()),
        };
        Ok(Self { address, prefix })
    }

    /// Its first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// How many leading bits count.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether `ip` lies in it. An IPv4 address in IPv6's clothing is an IPv4 address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_ipv4() == self.address.is_ipv4() && (aligned(ip) ^ aligned(self.address)) & self.mask() == 0
    }

    fn mask(&self) -> u128 {
        if self.prefix == 0 { 0 } else { u128::MAX << (128 - u32::from(self.prefix)) }
    }
}

/// The address with its first bit first.
fn aligned(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// One of the things that a match takes: port, network, server name, and whether TLS is spoken; `None` is any.
pub type Place<'a> = (Option<u16>, Option<Network>, Option<&'a ServerName>, Option<bool>);

impl Match {
    /// Everything that it takes, one by one. Two routes that have a place in common cannot be told apart.
    pub fn places(&self) -> impl Iterator<Item = Place<'_>> {
        let networks = each(&self.networks);
        networks.flat_map(move |network| each(&self.server_names).map(move |name| (self.port, network.copied(), name, self.tls)))
    }
}

/// Each of `wanted`, or one time none.
fn each<T>(wanted: &[T]) -> impl Iterator<Item = Option<&T>> {
    wanted.iter().map(Some).chain(wanted.is_empty().then_some(None))
}

impl fmt::Display for Match {
    /// For people and names: `10.0.0.0/8 *.db.consul port 5432 tls`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words: Vec<String> = self.networks.iter().map(ToString::to_string).collect();
        words.extend(self.server_names.iter().map(ToString::to_string));
        words.extend(self.port.map(|port| format!("port {port}")));
        words.extend(self.tls.map(|tls| if tls { "tls" } else { "raw" }.to_owned()));
        if words.is_empty() { f.write_str("all") } else { f.write_str(&words.join(" ")) }
    }
}

impl fmt::Display for ServerName {
    /// As `server_names` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Under(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl FromStr for ServerName {
    type Err = RouterError;

    /// `name`, `*.suffix` or `.suffix`, as Envoy's `server_names` writes them.
    fn from_str(text: &str) -> Result<Self, RouterError> {
        let name = text.to_ascii_lowercase();
        let suffix = name.strip_prefix('*').unwrap_or(&name);
        let refused = || RouterError::NoServerName(text.to_owned());
        if suffix.contains('*') || !suffix.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused());
        }
        match suffix.strip_prefix('.') {
            Some("") => Err(refused()),
            Some(_) => Ok(Self::Under(suffix.into())),
            None if suffix.is_empty() || name.starts_with('*') => Err(refused()),
            None => Ok(Self::Exact(name.into())),
        }
    }
}

#[cfg(test)]
mod tests;
