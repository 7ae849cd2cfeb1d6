//! Stats of listeners whose connections are told apart: gateways, transparent proxies, permissive mode.
//!
//! Invariant: a connection is counted once. Workers count it for its route from when that is known, and for the router when it
//! ends before; Envoy counts all of them at the listener, so that one has the sum. Prefixes are Consul's, as far as a route
//! tells them: of chains by server name at a mesh gateway all have one.

use super::{EndsHere, Facts, Made, Sums, listener};
use crate::mesh::router::{Route, Router, RouterSettings, Way};
use crate::mesh::{Service, Snapshot};
use crate::telemetry::hub::{Key, Share, Totals};

/// What Consul names the way in of a service.
const PUBLIC: &str = "public_listener";

/// The place of its service in the snapshot. A gateway's is the only one.
pub(super) fn owner(snapshot: &Snapshot, router: &Router) -> usize {
    let own = |service: &std::sync::Arc<Service>| service.proxy_id == router.settings().proxy_id;
    snapshot.services.iter().position(own).unwrap_or_default()
}

pub(super) fn tell(made: &mut Made, owner: usize, router: &Router, facts: &Facts, sums: &mut Sums) {
    let settings = router.settings();
    let unrouted = sums.first(facts, &Key::outbound(&settings.service, &settings.name));
    let (mut totals, mut shares, mut span) = (unrouted.totals(), unrouted.shares().to_vec(), unrouted.span());
    let mut ended = Totals::default();
    let mut identity = None;
    for route in router.routes() {
        let key = Key::of_route(settings, route);
        let counted = sums.first(facts, &key);
        let of_route = counted.totals();
        totals.merge(&of_route);
        add(&mut shares, counted.shares());
        span.length.merge(&counted.span().length);
        sums.tcps.entry(prefix(settings, route)).or_default().take(&of_route, key.direction);
        let cluster = sums.clusters.entry(route.cluster().to_owned()).or_default();
        if let Some(upstream) = route.upstream() {
            cluster.take_upstream(upstream, key.direction, &of_route, counted.span(), facts.ejected(&upstream.name));
        }
        match &route.way {
            Way::Originate { service, .. } => cluster.speaks_as(service.identity.as_ref()),
            Way::Original(_) => cluster.take_original(&of_route, counted.span()),
            Way::Forward(_) => {}
            Way::Terminate { service, app } => {
                let public = service.public.as_deref();
                if let (None, Some(public)) = (app, public) {
                    cluster.take_app(&of_route, counted.span(), public.app.len());
                }
                sums.came_in(&of_route, public.is_some_and(|public| public.max_inbound_connections > 0));
                ended.merge(&of_route);
                identity = identity.or(service.identity.as_deref());
            }
        }
    }
    let fronts = router.routes().filter_map(|route| route.upstream()?.front.as_ref());
    let first = fronts.map(|front| front.not_after()).min();
    let tls = match (identity, first) {
        (Some(identity), _) => EndsHere::Mesh(identity, &ended),
        (None, Some(not_after)) => EndsHere::Front(not_after, &totals),
        (None, None) => EndsHere::Nothing,
    };
    listener(made, owner, &settings.bind, &totals, &shares, span.length, tls);
}

/// By worker.
fn add(sum: &mut Vec<Share>, shares: &[Share]) {
    sum.resize(sum.len().max(shares.len()), Share::default());
    for (sum, share) in sum.iter_mut().zip(shares) {
        sum.connections += share.connections;
        sum.active += share.active;
    }
}

/// Consul's `stat_prefix` of a route's chain.
pub fn prefix(settings: &RouterSettings, route: &Route) -> String {
    let listener = settings.name.split(':').next().unwrap_or_default();
    let id = match &route.way {
        Way::Terminate { .. } | Way::Forward(_) if listener == PUBLIC => return PUBLIC.to_owned(),
        Way::Forward(_) => return format!("mesh_gateway_local.{listener}"),
        Way::Terminate { service, .. } => service.identity.as_ref().map(|identity| &identity.svid.id),
        Way::Originate { upstream, .. } => upstream.targets.first().and_then(|target| target.expected.first()),
        Way::Original(_) => None,
    };
    match id.and_then(|id| id.service_name()) {
        Some(name) => format!("upstream.{}.{}.{}", name.service, name.namespace, name.datacenter),
        None => format!("upstream.{}", route.cluster()),
    }
}
