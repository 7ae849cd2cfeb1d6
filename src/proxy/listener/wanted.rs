//! What a snapshot wants of a worker's listeners, and whose each is.
//!
//! Invariant: a connection is judged by the newest state of the very identity that it came to, wherever in the snapshot that
//! stands now; one whose service went keeps the service that it came to until it ends. Reads snapshots only.

use std::net::Ipv4Addr;
use std::sync::Arc;

use super::{Key, Listener, Part};
use crate::config::DataPlane;
use crate::mesh::router::{Route, Router, Way};
use crate::mesh::{Bind, PublicListener, Service, Snapshot};
use crate::telemetry::cells::Direction;

/// A listener that a snapshot wants.
#[derive(Debug)]
pub(in crate::proxy) struct Wanted {
    pub(in crate::proxy) key: Key,
    pub(in crate::proxy) service: Arc<Service>,
    pub(in crate::proxy) place: Place,
}

/// Which part of its service a wanted listener is.
#[derive(Debug)]
pub(in crate::proxy) enum Place {
    Public(Arc<PublicListener>),
    Upstream(Arc<crate::mesh::Upstream>),
    Redirect,
    Lease,
    Router(Arc<Router>),
    Route(Arc<Route>),
}

impl Place {
    /// Which way its connections go.
    pub(in crate::proxy) fn direction(&self) -> Direction {
        let ends = |route: &Route| matches!(route.way, Way::Terminate { .. });
        let inbound = match self {
            Self::Public(_) => true,
            Self::Router(router) => router.routes().any(|route| ends(route)),
            Self::Route(route) => ends(route),
            Self::Upstream(_) | Self::Redirect | Self::Lease => false,
        };
        if inbound { Direction::Inbound } else { Direction::Outbound }
    }
}

/// Every listener that `snapshot` has, and those that lead to upstreams by other ways, which are `redirect`'s.
pub(in crate::proxy) fn wanted(snapshot: &Snapshot, plane: &DataPlane, redirect: &Arc<Service>) -> Vec<Wanted> {
    let mut all = Vec::new();
    if let Some(port) = plane.lease_port {
        let bind = Bind::Tcp((Ipv4Addr::UNSPECIFIED, port).into());
        all.push(Wanted::new(bind, redirect, Part::Lease, Place::Lease));
    }
    for address in &plane.redirects {
        all.push(Wanted::new(Bind::Tcp(*address), redirect, Part::Redirect, Place::Redirect));
    }
    for service in &snapshot.services {
        if let Some(public) = &service.public {
            all.push(Wanted::new(public.bind.clone(), service, Part::Public, Place::Public(Arc::clone(public))));
        }
        for upstream in &service.upstreams {
            let part = Part::Upstream(Arc::clone(&upstream.name));
            all.push(Wanted::new(upstream.bind.clone(), service, part, Place::Upstream(Arc::clone(upstream))));
        }
    }
    snapshot.routers.iter().for_each(|router| want_router(router, redirect, &mut all));
    all
}

/// A router and its routes. Those that speak no TLS belong to a service that has neither identity nor policy.
fn want_router(router: &Arc<Router>, redirect: &Arc<Service>, all: &mut Vec<Wanted>) {
    let settings = router.settings();
    let nobody = Arc::new(Service {
        name: Arc::clone(&settings.service),
        proxy_id: Arc::clone(&settings.proxy_id),
        identity: None,
        intentions: Arc::clone(&redirect.intentions),
        public: None,
        upstreams: Vec::new(),
    });
    let part = Part::Router(Arc::clone(&settings.name));
    all.push(Wanted::new(settings.bind.clone(), &nobody, part, Place::Router(Arc::clone(router))));
    for route in router.routes() {
        let service = route.way.service().unwrap_or(&nobody);
        all.push(Wanted::new(settings.bind.clone(), service, Part::of(route), Place::Route(Arc::clone(route))));
    }
}

/// Where `route` of `router` is found among listeners.
pub(in crate::proxy) fn key_of(router: &Router, route: &Route) -> Key {
    let settings = router.settings();
    let proxy_id = route.way.service().map_or(&settings.proxy_id, |service| &service.proxy_id);
    Key { bind: settings.bind.clone(), proxy_id: Arc::clone(proxy_id), part: Part::of(route) }
}

/// The newest state of the service that `listener` serves; `wanted` is what the snapshot says of the listener itself.
pub(in crate::proxy) fn service_of(listener: &Listener, wanted: Option<&Wanted>, snapshot: &Snapshot) -> Option<Arc<Service>> {
    let before = &listener.service;
    let of_proxy = || snapshot.services.iter().find(|service| service.proxy_id == before.proxy_id);
    let found = match (wanted, &listener.part) {
        (Some(wanted), _) => Some(&wanted.service),
        (None, Part::Terminate(_)) => {
            ending_for(listener, snapshot).or_else(|| of_proxy().filter(|now| has_public_at(now, listener)))
        }
        (None, Part::Originate(_)) => {
            let ways = snapshot.routers.iter().flat_map(|router| router.routes()).filter_map(|route| match &route.way {
                Way::Originate { service, .. } => Some(service),
                Way::Forward(_) | Way::Terminate { .. } | Way::Original(_) => None,
            });
            ways.into_iter().find(|service| same_identity(service, before))
        }
        (None, Part::Public) => {
            let moved = || ending_for(listener, snapshot);
            of_proxy().filter(|now| now.public.is_some()).or_else(moved).or_else(of_proxy)
        }
        (None, Part::Upstream(_)) => of_proxy(),
        (None, Part::Redirect | Part::Lease | Part::Router(_) | Part::Forward(_) | Part::Original(_)) => None,
    };
    found.map(Arc::clone)
}

/// The service that TLS ends for now where `listener` ended it before: a public listener may have become one with routes.
fn ending_for<'a>(listener: &Listener, snapshot: &'a Snapshot) -> Option<&'a Arc<Service>> {
    let here = snapshot.routers.iter().filter(|router| router.settings().bind == listener.bind);
    let ways = here.flat_map(|router| router.routes()).filter_map(|route| match &route.way {
        Way::Terminate { service, .. } => Some(service),
        Way::Forward(_) | Way::Originate { .. } | Way::Original(_) => None,
    });
    ways.into_iter().find(|service| same_identity(service, &listener.service))
}

/// One proxy may speak for several services, and for services of one name in several namespaces.
fn same_identity(a: &Service, b: &Service) -> bool {
    let id = |service: &Service| service.identity.as_ref().map(|identity| identity.svid.id.clone());
    a.proxy_id == b.proxy_id && a.name == b.name && id(a) == id(b)
}

fn has_public_at(service: &Service, listener: &Listener) -> bool {
    service.public.as_ref().is_some_and(|public| public.bind == listener.bind)
}

impl Wanted {
    fn new(bind: Bind, service: &Arc<Service>, part: Part, place: Place) -> Self {
        Self { key: Key { bind, proxy_id: Arc::clone(&service.proxy_id), part }, service: Arc::clone(service), place }
    }
}
