//! `http_connection_manager`, as far as L4 can do what it says: requests that all go to one cluster are bytes, and single paths
//! of a local app are a listener for pages.
//!
//! Invariant: what is read here needs nobody to look at a request in the mesh: routes by anything but the path, filters that do
//! something, and routes that come by RDS are refused by their names. What Envoy does to headers is not done, so whoever lets
//! peers in by it is refused (`listener`): an app may trust `x-forwarded-client-cert`, which Envoy takes from strangers.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::CodecType;
use envoy_types::pb::google::protobuf::Any;

use crate::config::envoy::PathMatch;
use crate::control::xds::refusal::{Refusal, message_name, unpack};

pub(super) const CONNECTION_MANAGER: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
/// Filters without an effect on where a request goes, or whether it does.
const PASSIVE: [&str; 4] = [
    "envoy.extensions.filters.http.router.v3.Router",
    "envoy.filters.http.router",
    "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
    "envoy.filters.http.grpc_stats",
];
const FILTERS_WANTED: &str = "http_connection_manager: requests are not looked at: expected router";
const ROUTES_WANTED: &str =
    "http_connection_manager: requests are not told apart: expected one virtual host for * with routes by path or prefix";

/// What a connection manager asks for.
pub(super) struct Http {
    pub(super) routes: Vec<Route>,
    pub(super) access_log: Vec<AccessLog>,
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
    pub(super) fn read(any: &Any, field: &str) -> Result<Self, Refusal> {
        let manager: pb::HttpConnectionManager = unpack(any, CONNECTION_MANAGER, field)?;
        let under = |why: Refusal| why.under(field);
        if !matches!(CodecType::try_from(manager.codec_type), Ok(CodecType::Auto | CodecType::Http1)) {
            return Err(Refusal::new(format!("{field}.codec_type"), manager.codec_type, "expected AUTO or HTTP1"));
        }
        for (index, filter) in manager.http_filters.iter().enumerate() {
            let kind = match &filter.config_type {
                Some(pb::http_filter::ConfigType::TypedConfig(any)) => message_name(any),
                Some(pb::http_filter::ConfigType::ConfigDiscovery(_)) | None => filter.name.as_str(),
            };
            if !PASSIVE.contains(&kind) {
                let place = format!("{field}.http_filters[{index}].name");
                return Err(Refusal::new(place, format!("{} ({kind})", filter.name), FILTERS_WANTED));
            }
        }
        let routes = match &manager.route_specifier {
            Some(pb::http_connection_manager::RouteSpecifier::RouteConfig(config)) => routes(config).map_err(under)?,
            Some(_) => return Err(Refusal::new(format!("{field}.route_specifier"), "rds or scoped_routes", ROUTES_WANTED)),
            None => return Err(Refusal::missing(format!("{field}.route_config"), ROUTES_WANTED)),
        };
        Ok(Self { routes, access_log: manager.access_log })
    }

    /// The one cluster that every request goes to, as it came.
    pub(super) fn passes_to(&self) -> Option<&str> {
        match self.routes.as_slice() {
            [Route { path: PathMatch::Prefix(prefix), to: Target::Cluster { name, rewrite: None } }] if prefix == "/" => {
                Some(name)
            }
            _ => None,
        }
    }
}

fn routes(config: &route::RouteConfiguration) -> Result<Vec<Route>, Refusal> {
    let [host] = config.virtual_hosts.as_slice() else {
        let found = format!("{} of them", config.virtual_hosts.len());
        return Err(Refusal::new("route_config.virtual_hosts", found, ROUTES_WANTED));
    };
    let place = "route_config.virtual_hosts[0]";
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
    if config.vhds.is_some() || !config.typed_per_filter_config.is_empty() {
        return Err(Refusal::new("route_config", "vhds or typed_per_filter_config", ROUTES_WANTED));
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

/// Whether nothing but the beginning of the path is changed, and nobody else gets the request too.
fn as_it_came(action: &route::RouteAction) -> bool {
    action.regex_rewrite.is_none()
        && action.path_rewrite_policy.is_none()
        && action.host_rewrite_specifier.is_none()
        && action.request_mirror_policies.is_empty()
}
