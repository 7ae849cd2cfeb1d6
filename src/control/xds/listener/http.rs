//! `http_connection_manager`, as far as L4 can do what it says: requests that all go to one cluster are bytes, and single paths
//! of a local app are a listener for pages.
//!
//! Invariant: what is read here needs nobody to look at a request in the mesh: routes by anything but the path, other filters
//! than RBAC on certificates, and routes that come by RDS are refused by their names.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::google::protobuf::Any;

use crate::config::envoy::PathMatch;
use crate::control::xds::rbac;
use crate::control::xds::refusal::{Refusal, message_name, unpack};
use crate::policy::network::Rules;

pub(super) const CONNECTION_MANAGER: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
/// Filters without an effect on where a request goes, or whether it does.
const PASSIVE: [&str; 4] = [
    "envoy.extensions.filters.http.router.v3.Router",
    "envoy.filters.http.router",
    "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
    "envoy.filters.http.grpc_stats",
];
const FILTERS_WANTED: &str = "http_connection_manager: requests are not looked at: expected router and rbac on certificates";
const ROUTES_WANTED: &str =
    "http_connection_manager: requests are not told apart: expected one virtual host for * with routes by path or prefix";

/// What a connection manager asks for.
pub(super) struct Http {
    pub(super) rules: Vec<Rules>,
    pub(super) rbac: bool,
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
        let (mut rules, mut rbac) = (Vec::new(), false);
        for (index, filter) in manager.http_filters.iter().enumerate() {
            let place = format!("{field}.http_filters[{index}]");
            let any = match &filter.config_type {
                Some(pb::http_filter::ConfigType::TypedConfig(any)) => Some(any),
                Some(pb::http_filter::ConfigType::ConfigDiscovery(_)) | None => None,
            };
            let kind = any.map_or(filter.name.as_str(), message_name);
            match (kind, any) {
                (RBAC, Some(any)) => {
                    let filter: HttpRbac = unpack(any, RBAC, &place)?;
                    if filter.matcher.is_some() {
                        return Err(Refusal::new(format!("{place}.matcher"), "present", "expected rules"));
                    }
                    let network = Rbac { rules: filter.rules, ..Rbac::default() };
                    rules.extend(rbac::rules(&network).map_err(|why| why.under(&place))?);
                    rbac = true;
                }
                (kind, _) if PASSIVE.contains(&kind) => {}
                (kind, _) => {
                    return Err(Refusal::new(format!("{place}.name"), format!("{} ({kind})", filter.name), FILTERS_WANTED));
                }
            }
        }
        let routes = match &manager.route_specifier {
            Some(pb::http_connection_manager::RouteSpecifier::RouteConfig(config)) => routes(config).map_err(under)?,
            Some(_) => return Err(Refusal::new(format!("{field}.route_specifier"), "rds or scoped_routes", ROUTES_WANTED)),
            None => return Err(Refusal::missing(format!("{field}.route_config"), ROUTES_WANTED)),
        };
        Ok(Self { rules, rbac, routes, access_log: manager.access_log })
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
    let to = match &message.action {
        Some(Action::Route(action)) => match &action.cluster_specifier {
            Some(route::route_action::ClusterSpecifier::Cluster(name)) if action.regex_rewrite.is_none() => Target::Cluster {
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
