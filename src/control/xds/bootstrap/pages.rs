//! Listeners of a bootstrap that lead to this process's own admin pages: Prometheus, stats, readiness.
//!
//! Invariant: every route is kept in order and with what it leads to; anything that a list of exact paths and prefixes cannot
//! say is refused with its path. A backend is on loopback: this is no HTTP proxy.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value as Json;

use super::{BootstrapError, cluster_named, list, part, shape};
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PageTls, PathMatch};

/// Consul's name of the cluster that leads to the admin port.
const SELF_ADMIN: &str = "self_admin";

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Listener {
    name: String,
    address: shape::Address,
    filter_chains: Vec<Chain>,
    #[serde(rename = "traffic_direction")]
    _traffic_direction: IgnoredAny,
    #[serde(rename = "stat_prefix")]
    _stat_prefix: IgnoredAny,
    #[serde(rename = "enable_reuse_port")]
    _enable_reuse_port: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Chain {
    filters: Vec<Filter>,
    transport_socket: Option<shape::TransportSocket>,
    #[serde(rename = "name")]
    _name: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Filter {
    #[serde(rename = "name")]
    _name: IgnoredAny,
    typed_config: Connections,
}

/// `HttpConnectionManager`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Connections {
    #[serde(rename = "@type")]
    _type: IgnoredAny,
    #[serde(rename = "stat_prefix")]
    _stat_prefix: IgnoredAny,
    #[serde(rename = "codec_type")]
    _codec_type: IgnoredAny,
    route_config: Routes,
    http_filters: Vec<HttpFilter>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HttpFilter {
    name: String,
    #[serde(rename = "typed_config")]
    _typed_config: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Routes {
    #[serde(rename = "name")]
    _name: IgnoredAny,
    virtual_hosts: Vec<VirtualHost>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct VirtualHost {
    #[serde(rename = "name")]
    _name: IgnoredAny,
    domains: Vec<String>,
    routes: Vec<Route>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Route {
    r#match: Match,
    route: Option<Action>,
    direct_response: Option<Status>,
    #[serde(rename = "name")]
    _name: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Match {
    path: Option<String>,
    prefix: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Action {
    cluster: String,
    prefix_rewrite: Option<String>,
    /// The admin thread has its own bounds.
    #[serde(rename = "timeout")]
    _timeout: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Status {
    status: u16,
}

/// What a listener may refer to.
pub(super) struct Context<'a> {
    pub(super) clusters: &'a [shape::Cluster],
    pub(super) admin: Option<SocketAddr>,
    pub(super) secrets: &'a [shape::Secret],
}

/// Whether this listener speaks HTTP and so can only be one of these.
pub(super) fn is_page(listener: &Json) -> bool {
    list(&listener["filter_chains"])
        .iter()
        .flat_map(|chain| list(&chain["filters"]))
        .any(|filter| shape::is_type(&filter["typed_config"], "HttpConnectionManager"))
}

/// The clusters that such listeners of a bootstrap use.
pub(super) fn clusters_of(bootstrap: &Json) -> Vec<String> {
    fn collect(json: &Json, names: &mut Vec<String>) {
        match json {
            Json::Object(fields) => {
                names.extend(fields.get("cluster").and_then(Json::as_str).map(str::to_owned));
                fields.values().for_each(|value| collect(value, names));
            }
            Json::Array(values) => values.iter().for_each(|value| collect(value, names)),
            _ => {}
        }
    }
    let mut names = vec![SELF_ADMIN.to_owned()];
    let pages = list(&bootstrap["static_resources"]["listeners"]).iter().filter(|listener| is_page(listener));
    pages.for_each(|listener| collect(listener, &mut names));
    names
}

impl Context<'_> {
    pub(super) fn read(&self, listener: &Json, place: &str) -> Result<PageListener, BootstrapError> {
        let listener: Listener = part(listener, place)?;
        let bind = listener.address.socket(&format!("{place}.address"))?;
        let [Chain { filters, transport_socket, .. }] = listener.filter_chains.as_slice() else {
            return Err(BootstrapError::at(&format!("{place}.filter_chains"), "exactly one is wanted for a listener of HTTP"));
        };
        let place = format!("{place}.filter_chains[0]");
        let [Filter { typed_config: connections, .. }] = filters.as_slice() else {
            return Err(BootstrapError::at(&format!("{place}.filters"), "HTTP behind another filter is not understood"));
        };
        let filter = format!("{place}.filters[0].typed_config");
        let unknown = |filter: &&HttpFilter| !matches!(filter.name.as_str(), "envoy.filters.http.router" | "envoy.router");
        if let Some(other) = connections.http_filters.iter().find(unknown) {
            return Err(BootstrapError::at(&format!("{filter}.http_filters"), format!("'{}' is of L7 and not done", other.name)));
        }
        let [host] = connections.route_config.virtual_hosts.as_slice() else {
            return Err(BootstrapError::at(&format!("{filter}.route_config.virtual_hosts"), "exactly one is wanted"));
        };
        let host_place = format!("{filter}.route_config.virtual_hosts[0]");
        if host.domains != ["*"] {
            return Err(BootstrapError::at(&format!("{host_place}.domains"), "only [\"*\"] is understood"));
        }
        let routes = host.routes.iter().enumerate();
        let routes = routes.map(|(index, route)| self.route(route, &format!("{host_place}.routes[{index}]")));
        let tls = transport_socket.as_ref().map(|socket| self.tls(socket, &place)).transpose()?;
        Ok(PageListener { name: listener.name, bind, routes: routes.collect::<Result<_, _>>()?, tls, sources: Vec::new() })
    }

    fn route(&self, route: &Route, place: &str) -> Result<PageRoute, BootstrapError> {
        let path = match (&route.r#match.path, &route.r#match.prefix) {
            (Some(path), None) => PathMatch::Exact(path.clone()),
            (None, Some(prefix)) => PathMatch::Prefix(prefix.clone()),
            _ => return Err(BootstrapError::at(&format!("{place}.match"), "path or prefix is wanted")),
        };
        let answer = match (&route.route, &route.direct_response) {
            (Some(action), None) => self.answer(action, &format!("{place}.route"))?,
            (None, Some(response)) => PageAnswer::Status(response.status),
            _ => return Err(BootstrapError::at(place, "route or direct_response is wanted")),
        };
        Ok(PageRoute { path, answer })
    }

    fn answer(&self, action: &Action, place: &str) -> Result<PageAnswer, BootstrapError> {
        let rewrite = action.prefix_rewrite.clone().filter(|rewrite| !rewrite.is_empty());
        let (_, cluster) = cluster_named(self.clusters, &action.cluster, &format!("{place}.cluster"))?;
        let mut addresses = cluster.addresses();
        let (Some(address), None) = (addresses.next(), addresses.next()) else {
            return Err(BootstrapError::at(&format!("{place}.cluster"), "exactly one endpoint is wanted"));
        };
        let address = address.socket(&format!("{place}.cluster"))?;
        if cluster.name == SELF_ADMIN || Some(address) == self.admin {
            Ok(PageAnswer::Admin { rewrite })
        } else if address.ip().is_loopback() {
            Ok(PageAnswer::Backend { address, rewrite, http2: false })
        } else {
            let why = format!("HTTP to {address} is L7 and not done: only this host's admin port and loopback can be reached");
            Err(BootstrapError::at(&format!("{place}.cluster"), why))
        }
    }

    fn tls(&self, socket: &shape::TransportSocket, place: &str) -> Result<PageTls, BootstrapError> {
        let place = format!("{place}.transport_socket.typed_config");
        if !socket.is("DownstreamTlsContext") {
            return Err(BootstrapError::at(&place, "only DownstreamTlsContext is understood here"));
        }
        let tls: shape::DownstreamTls = part(&socket.typed_config, &place)?;
        let common = &tls.common_tls_context;
        let secret = |name: &str| self.secrets.iter().find(|secret| secret.name == name);
        let of_secret = common.tls_certificate_sds_secret_configs.first();
        let of_secret = of_secret.and_then(|config| secret(&config.name)?.tls_certificate.as_ref());
        let file = |source: &shape::DataSource, what: &str| {
            let why = format!("the {what} must be in a file of its own (filename)");
            source.filename.clone().ok_or_else(|| BootstrapError::at(&place, why))
        };
        let Some(pair) = common.tls_certificates.first().or(of_secret) else {
            return Err(BootstrapError::at(&place, "no certificate, and no static secret of the name"));
        };
        let named = common.validation_context_sds_secret_config.as_ref();
        let context = match named {
            Some(config) => {
                Some(secret(&config.name).and_then(|secret| secret.validation_context.as_ref()).ok_or_else(|| {
                    let why = format!("there is no static secret '{}' with a validation_context", config.name);
                    BootstrapError::at(&place, why)
                })?)
            }
            None => common.validation_context.as_ref(),
        };
        Ok(PageTls {
            cert_file: file(&pair.certificate_chain, "certificate")?,
            key_file: file(&pair.private_key, "key")?,
            ca: context.map(|context| trusted(context, &place)).transpose()?,
        })
    }
}

/// The file or folder of CAs.
fn trusted(context: &shape::ValidationContext, place: &str) -> Result<PathBuf, BootstrapError> {
    let file = context.trusted_ca.as_ref().and_then(|source| source.filename.clone());
    file.or_else(|| context.watched_directory.as_ref().map(|folder| folder.path.clone()))
        .ok_or_else(|| BootstrapError::at(place, "the CA must be in a file or folder of its own"))
}
