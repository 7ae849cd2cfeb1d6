//! The part of `/snapshot` that shows listeners with routes.

use serde::Serialize;

use super::{IdentityView, IntentionsView, UpstreamView};
use crate::mesh::router::{Route, Router, Way};

#[derive(Serialize)]
pub(super) struct RouterView {
    router: String,
    service: String,
    proxy_id: String,
    bind: String,
    transparent: bool,
    permissive: bool,
    inspects: bool,
    /// The fallback last, if there is one.
    routes: Vec<RouteView>,
}

#[derive(Serialize)]
struct RouteView {
    route: String,
    port: Option<u16>,
    networks: Vec<String>,
    server_names: Vec<String>,
    tls: Option<bool>,
    /// `forward`, `terminate`, `originate` or `original`.
    way: &'static str,
    /// Whose identity TLS is spoken with.
    identity: Option<IdentityView>,
    /// Who may come in, where TLS ends.
    intentions: Option<IntentionsView>,
    /// Where it leads, when that is a set of endpoints.
    cluster: Option<UpstreamView>,
}

impl From<&Router> for RouterView {
    fn from(router: &Router) -> Self {
        let settings = router.settings();
        Self {
            router: settings.name.to_string(),
            service: settings.service.to_string(),
            proxy_id: settings.proxy_id.to_string(),
            bind: settings.bind.to_string(),
            transparent: settings.transparent,
            permissive: settings.permissive,
            inspects: router.inspects(),
            routes: router.routes().map(|route| RouteView::from(&**route)).collect(),
        }
    }
}

impl From<&Route> for RouteView {
    fn from(route: &Route) -> Self {
        let (way, cluster) = match &route.way {
            Way::Forward(cluster) => ("forward", Some(cluster)),
            Way::Terminate { app, .. } => ("terminate", app.as_ref()),
            Way::Originate { upstream, .. } => ("originate", Some(upstream)),
            Way::Original(_) => ("original", None),
        };
        let ends_tls = matches!(route.way, Way::Terminate { .. });
        let service = route.way.service();
        Self {
            route: route.name.to_string(),
            port: route.matches.port,
            networks: route.matches.networks.iter().map(ToString::to_string).collect(),
            server_names: route.matches.server_names.iter().map(ToString::to_string).collect(),
            tls: route.matches.tls,
            way,
            identity: service.and_then(|service| service.identity.as_deref()).map(IdentityView::from),
            intentions: service.filter(|_| ends_tls).map(|service| IntentionsView::from(&*service.intentions)),
            cluster: cluster.map(|cluster| UpstreamView::from(&**cluster)),
        }
    }
}
