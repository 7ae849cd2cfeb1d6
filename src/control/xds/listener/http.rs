//! `http_connection_manager`, as far as L4 can do what it says: requests that all go to one cluster are bytes, and single paths
//! of a local app are a listener for pages.
//!
//! Invariant: what is read here needs nobody to look at a request in the mesh: routes by anything but the path, filters that do
//! something, are refused by their names. Routes that come by RDS must all lead to one cluster. What Envoy does to headers is not
//! done, so whoever lets peers or clients of other hosts in by it is refused (`listener`): an app may trust
//! `x-forwarded-client-cert`, which Envoy writes. Only where the operator says that it does not
//! ([`Xds::http_as_tcp`](crate::config::envoy::Xds::http_as_tcp)) they are let in, and what a way in's RBAC says of callers holds.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, RouteSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::google::protobuf::Any;

use crate::config::envoy::PathMatch;
use crate::control::xds::rbac;
use crate::control::xds::refusal::{Refusal, message_name, unpack};
use crate::policy::network::Rules;

pub(super) const CONNECTION_MANAGER: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
/// Filters without an effect on where a request goes, or whether it does.
const PASSIVE: [&str; 4] = [
    "envoy.extensions.filters.http.router.v3.Router",
    "envoy.filters.http.router",
    "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
    "envoy.filters.http.grpc_stats",
];
/// Turns HTTP/1.1 into gRPC for clients that speak none. Those that do need nothing of it.
const BRIDGE: [&str; 2] = ["envoy.extensions.filters.http.grpc_http1_bridge.v3.Config", "envoy.filters.http.grpc_http1_bridge"];
const HTTP_RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
const FILTERS_WANTED: &str = "http_connection_manager: requests are not looked at: expected router";
const ROUTES_WANTED: &str =
    "http_connection_manager: requests are not told apart: expected one virtual host for * with routes by path or prefix";

/// What a connection manager asks for.
pub(super) struct Http {
    pub(super) routes: Routing,
    pub(super) access_log: Vec<AccessLog>,
    /// What RBAC filters say of callers; none if there is no such filter.
    pub(super) rules: Option<Vec<Rules>>,
}

/// Where its routes are.
pub(super) enum Routing {
    Inline(Vec<Route>),
    /// In the route configuration of this name, by RDS.
    Discovered(String),
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control::xds) struct Route {
    pub(in crate::control::xds) path: PathMatch,
    pub(in crate::control::xds) to: Target,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control::xds) enum Target {
    Cluster { name: String, rewrite: Option<String> },
    Status(u16),
}

impl Http {
    /// With `as_tcp` it is read for a way in whose requests nobody looks at.
    pub(super) fn read(any: &Any, field: &str, as_tcp: bool) -> Result<Self, Refusal> {
        let manager: pb::HttpConnectionManager = unpack(any, CONNECTION_MANAGER, field)?;
        let under = |why: Refusal| why.under(field);
        if !as_tcp
            && !matches!(CodecType::try_from(manager.codec_type), Ok(CodecType::Auto | CodecType::Http1 | CodecType::Http2))
        {
            return Err(Refusal::new(format!("{field}.codec_type"), manager.codec_type, "expected AUTO, HTTP1 or HTTP2"));
        }
        if let Some(index) = manager.upgrade_configs.iter().position(|upgrade| !upgrade.filters.is_empty()) {
            let place = format!("{field}.upgrade_configs[{index}].filters");
            return Err(Refusal::new(place, "present", "http_connection_manager: requests are not looked at: expected none"));
        }
        let mut rules = None;
        for (index, filter) in manager.http_filters.iter().enumerate() {
            let place = format!("{field}.http_filters[{index}]");
            let (kind, any) = match &filter.config_type {
                Some(pb::http_filter::ConfigType::TypedConfig(any)) => (message_name(any), Some(any)),
                Some(pb::http_filter::ConfigType::ConfigDiscovery(_)) | None => (filter.name.as_str(), None),
            };
            match any {
                Some(any) if as_tcp && kind == HTTP_RBAC => {
                    rules.get_or_insert_with(Vec::new).extend(rbac_of(any).map_err(|why| why.under(&place))?);
                }
                _ if PASSIVE.contains(&kind) || (as_tcp && BRIDGE.contains(&kind)) => {}
                _ => return Err(Refusal::new(format!("{place}.name"), format!("{} ({kind})", filter.name), FILTERS_WANTED)),
            }
        }
        let routes = match &manager.route_specifier {
            Some(RouteSpecifier::RouteConfig(config)) => {
                Routing::Inline(routes(config).map_err(|why| under(why.under("route_config")))?)
            }
            Some(RouteSpecifier::Rds(rds)) => Routing::Discovered(discovered(rds).map_err(|why| under(why.under("rds")))?),
            Some(_) => return Err(Refusal::new(format!("{field}.route_specifier"), "scoped_routes", ROUTES_WANTED)),
            None => return Err(Refusal::missing(format!("{field}.route_config"), ROUTES_WANTED)),
        };
        Ok(Self { routes, access_log: manager.access_log, rules })
    }
}

/// The one cluster that every request goes to, as it came.
pub(in crate::control::xds) fn passes_to(routes: &[Route]) -> Option<&str> {
    match routes {
        [Route { path: PathMatch::Prefix(prefix), to: Target::Cluster { name, rewrite: None } }] if prefix == "/" => Some(name),
        _ => None,
    }
}

/// The name of a route configuration that comes on the stream that all else comes on.
fn discovered(rds: &pb::Rds) -> Result<String, Refusal> {
    use core::config_source::ConfigSourceSpecifier;
    match rds.config_source.as_ref().and_then(|source| source.config_source_specifier.as_ref()) {
        Some(ConfigSourceSpecifier::Ads(_)) if !rds.route_config_name.is_empty() => Ok(rds.route_config_name.clone()),
        Some(ConfigSourceSpecifier::Ads(_)) => Err(Refusal::missing("route_config_name", "expected the name of routes")),
        _ => Err(Refusal::new(
            "config_source",
            "another than ads",
            "routes come on the stream that all else comes on: expected ads",
        )),
    }
}

/// The filter is that of connections under another name, but for addresses that a header tells.
fn rbac_of(any: &Any) -> Result<Option<Rules>, Refusal> {
    let HttpRbac { rules, matcher, .. } = unpack(any, HTTP_RBAC, "typed_config")?;
    let policies = rules.iter().flat_map(|rules| &rules.policies);
    if let Some((name, _)) = policies.into_iter().find(|(_, policy)| policy.principals.iter().any(rbac::names_remote_ip)) {
        let wanted = "in HTTP it is what x-forwarded-for says, which is not looked at: expected direct_remote_ip";
        return Err(Refusal::new(format!("typed_config.rules.policies[{name}].principals"), "remote_ip", wanted));
    }
    rbac::rules(&Rbac { rules, matcher, ..Rbac::default() }).map_err(|why| why.under("typed_config"))
}

/// The routes of a configuration, which must need nobody to look at more than the path.
pub(in crate::control::xds) fn routes(config: &route::RouteConfiguration) -> Result<Vec<Route>, Refusal> {
    let [host] = config.virtual_hosts.as_slice() else {
        let found = format!("{} of them", config.virtual_hosts.len());
        return Err(Refusal::new("virtual_hosts", found, ROUTES_WANTED));
    };
    let place = "virtual_hosts[0]";
    if host.domains != ["*"] {
        return Err(Refusal::new(format!("{place}.domains"), host.domains.join(","), ROUTES_WANTED));
    }
    let bare = route::VirtualHost {
        name: host.name.clone(),
        domains: host.domains.clone(),
        routes: host.routes.clone(),
        ..route::VirtualHost::default()
    };
    if *host != bare {
        return Err(Refusal::new(place, "more than domains and routes", ROUTES_WANTED));
    }
    let bare = route::RouteConfiguration {
        name: config.name.clone(),
        virtual_hosts: config.virtual_hosts.clone(),
        validate_clusters: config.validate_clusters,
        ..route::RouteConfiguration::default()
    };
    if *config != bare {
        return Err(Refusal::new(
            "name",
            &config.name,
            "more than virtual_hosts is in it: expected nothing done to headers or requests",
        ));
    }
    let all = host.routes.iter().enumerate();
    all.map(|(index, one)| one_route(one).map_err(|why| why.under(&format!("{place}.routes[{index}]")))).collect()
}

fn one_route(message: &route::Route) -> Result<Route, Refusal> {
    use route::route::Action;
    use route::route_match::PathSpecifier;
    let matches = message.r#match.clone().unwrap_or_default();
    let path = match &matches.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix.clone()),
        Some(PathSpecifier::Path(path)) => PathMatch::Exact(path.clone()),
        _ => return Err(Refusal::new("match.path_specifier", "of another kind", ROUTES_WANTED)),
    };
    let bare = route::RouteMatch { path_specifier: matches.path_specifier.clone(), ..route::RouteMatch::default() };
    if matches != bare {
        return Err(Refusal::new("match", "more than a path", ROUTES_WANTED));
    }
    let bare = route::Route {
        name: message.name.clone(),
        r#match: message.r#match.clone(),
        action: message.action.clone(),
        ..route::Route::default()
    };
    if *message != bare {
        return Err(Refusal::new("route", "more than match and action", ROUTES_WANTED));
    }
    let to = match &message.action {
        Some(Action::Route(action)) => match &action.cluster_specifier {
            Some(route::route_action::ClusterSpecifier::Cluster(name)) if as_it_came(action) => Target::Cluster {
                name: name.clone(),
                rewrite: Some(action.prefix_rewrite.clone()).filter(|rewrite| !rewrite.is_empty()),
            },
            _ => return Err(Refusal::new("route.cluster_specifier", "of another kind", "expected a cluster's name")),
        },
        Some(Action::DirectResponse(response)) => {
            let refused = |_| Refusal::new("direct_response.status", response.status, "expected a status from 200 to 599");
            Target::Status(u16::try_from(response.status).map_err(refused)?)
        }
        _ => return Err(Refusal::new("action", "of another kind", "expected route or direct_response")),
    };
    Ok(Route { path, to })
}

/// Whether connections are told apart by where they come from, which is what is done here.
fn by_source(policy: &route::route_action::HashPolicy) -> bool {
    use route::route_action::hash_policy::PolicySpecifier;
    matches!(&policy.policy_specifier, Some(PolicySpecifier::ConnectionProperties(by)) if by.source_ip)
}

/// Whether nothing but the beginning of the path is changed, nothing of a request says which member gets it, and nobody else
/// gets the request too.
fn as_it_came(action: &route::RouteAction) -> bool {
    action.regex_rewrite.is_none()
        && action.path_rewrite_policy.is_none()
        && action.host_rewrite_specifier.is_none()
        && action.request_mirror_policies.is_empty()
        && action.hash_policy.iter().all(by_source)
}
