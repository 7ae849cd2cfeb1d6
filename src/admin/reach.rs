//! Whether an identity would be let in by an upstream, as far as this process knows: `/reach?identity=NAME&to=SERVICE`.
//!
//! Invariant: the decision is the workers' own, by the same function on the same snapshot. What this process does not know it
//! calls unknown: the called side decides then. Asking dials nothing, fetches nothing and gives nobody an identity.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;

use super::Rfc3339;
use super::routes::{self, Parameters};
use crate::identity::SpiffeId;
use crate::mesh::router::Way;
use crate::mesh::{Service, Snapshot, Upstream};
use crate::telemetry::hub::{Failure, Hub};

/// Names listed in a refusal.
const NAMES_MAX: usize = 20;

/// The answer.
#[derive(Debug, Serialize)]
struct Reach {
    identity: String,
    spiffe_id: Option<String>,
    /// The certificate, when it is there already; otherwise it is fetched with the first connection.
    leaf: Option<Leaf>,
    service: String,
    upstream: String,
    bind: String,
    /// `allowed`, `denied` or `unknown`.
    decision: &'static str,
    by: String,
    remedy: Option<String>,
    endpoints: Vec<EndpointView>,
    /// The last connections to it that failed, whoever opened them, the newest first.
    failures: Vec<FailureView>,
}

#[derive(Debug, Serialize)]
struct Leaf {
    serial: String,
    not_before: String,
    not_after: String,
}

#[derive(Debug, Serialize)]
struct EndpointView {
    target: String,
    address: String,
    healthy: bool,
    /// Passive health checking keeps it out on at least one worker.
    ejected: bool,
}

#[derive(Debug, Serialize)]
struct FailureView {
    time: String,
    reason: &'static str,
    endpoint: Option<String>,
    detail: Option<String>,
}

pub(super) async fn reach(State(shared): routes::Admin, Query(parameters): Query<Parameters>) -> Response {
    let (identity, to) = (routes::parameter(&parameters, "identity"), routes::parameter(&parameters, "to"));
    let (Some(identity), Some(to)) = (identity, to) else {
        let text = "identity or to is missing; write /reach?identity=CONSUL_SERVICE_NAME&to=UPSTREAM\n";
        return routes::answer(StatusCode::BAD_REQUEST, routes::TEXT, text);
    };
    let snapshot = shared.viewer.current();
    let Some((service, upstream)) = find(&snapshot, to) else {
        return routes::answer(StatusCode::NOT_FOUND, routes::TEXT, unknown(&snapshot));
    };
    let mut hub = shared.hub.lock().await;
    hub.drain();
    routes::json(&Reach::new(&snapshot, identity, service, upstream, &hub))
}

/// The upstream of this name, or else the first that leads to a service of this name.
fn find<'a>(snapshot: &'a Snapshot, to: &str) -> Option<(&'a Service, &'a Upstream)> {
    let all = || all(snapshot);
    let leads_there = |upstream: &Upstream| {
        let expected = upstream.targets.iter().flat_map(|target| target.expected.iter());
        expected.filter_map(SpiffeId::service_name).any(|name| &*name.service == to)
    };
    let named = all().find(|(_, upstream)| &*upstream.name == to);
    named.or_else(|| all().find(|(_, upstream)| leads_there(upstream)))
}

/// Every upstream with whose it is, those behind routes too.
fn all(snapshot: &Snapshot) -> impl Iterator<Item = (&Service, &Upstream)> {
    let of_services = snapshot.services.iter();
    let of_services = of_services.flat_map(|service| service.upstreams.iter().map(move |upstream| (&**service, &**upstream)));
    let routes = snapshot.routers.iter().flat_map(|router| router.routes());
    let of_routes = routes.filter_map(|route| match &route.way {
        Way::Originate { service, upstream } => Some((&**service, &**upstream)),
        Way::Forward(_) | Way::Terminate { .. } | Way::Original(_) => None,
    });
    of_services.chain(of_routes)
}

fn unknown(snapshot: &Snapshot) -> String {
    let names: BTreeSet<&str> = all(snapshot).map(|(_, upstream)| &*upstream.name).collect();
    if names.is_empty() {
        return "this process has no upstream; add some to the service's proxy registration\n".to_owned();
    }
    let listed: Vec<&str> = names.iter().take(NAMES_MAX).copied().collect();
    let rest = if names.len() > NAMES_MAX { format!(" and {} more", names.len() - NAMES_MAX) } else { String::new() };
    format!("no upstream of that name is known here; there are: {}{rest}\n", listed.join(", "))
}

impl Reach {
    fn new(snapshot: &Snapshot, identity: &str, service: &Service, upstream: &Upstream, hub: &Hub) -> Self {
        let warm = snapshot.identities.get(identity);
        let id = warm.map(|identity| identity.svid.id.clone()).or_else(|| sibling(service, identity));
        let (decision, by, remedy) = decide(upstream, id.as_ref());
        let ejections = hub.ejections();
        let ejected = |address| ejections.iter().any(|one| one.endpoint == address && one.upstream == upstream.name);
        let endpoints = upstream.targets.iter().flat_map(|target| {
            target.endpoints.iter().map(|endpoint| EndpointView {
                target: target.id.to_string(),
                address: endpoint.address.to_string(),
                healthy: endpoint.healthy,
                ejected: ejected(endpoint.address),
            })
        });
        Self {
            identity: identity.to_owned(),
            spiffe_id: id.map(|id| id.to_string()),
            leaf: warm.map(|identity| Leaf {
                serial: identity.svid.serial.clone(),
                not_before: Rfc3339(identity.svid.not_before).to_string(),
                not_after: Rfc3339(identity.svid.not_after).to_string(),
            }),
            service: service.name.to_string(),
            upstream: upstream.name.to_string(),
            bind: upstream.bind.to_string(),
            decision,
            by,
            remedy,
            endpoints: endpoints.collect(),
            failures: hub.failures().of(&upstream.name).map(FailureView::from).collect(),
        }
    }
}

impl From<&Failure> for FailureView {
    fn from(failure: &Failure) -> Self {
        Self {
            time: Rfc3339(failure.time).to_string(),
            reason: failure.reason.as_str(),
            endpoint: failure.endpoint.as_ref().map(ToString::to_string),
            detail: failure.detail.as_deref().map(str::to_owned),
        }
    }
}

/// The SPIFFE ID that `identity` will have: that of the service beside it, under another name.
fn sibling(service: &Service, identity: &str) -> Option<SpiffeId> {
    let known = &service.identity.as_ref()?.svid.id;
    let name = known.service_name()?;
    SpiffeId::service(known.trust_domain(), &name.partition, &name.namespace, &name.datacenter, identity).ok()
}

/// As a worker decides before it dials: by the first target, and only to turn away.
fn decide(upstream: &Upstream, id: Option<&SpiffeId>) -> (&'static str, String, Option<String>) {
    let unknown = |why: &str| ("unknown", why.to_owned(), None);
    let Some(target) = upstream.targets.first() else { return unknown("the upstream has no target yet") };
    let Some(access) = &target.access else {
        return unknown("its intentions are not known here: the called side decides");
    };
    let Some(id) = id else { return unknown("there is no certificate yet to tell the trust domain") };
    match access.decide(id) {
        Ok(authorized) => ("allowed", authorized.by().to_string(), None),
        Err(denied) => {
            let called = target.expected.first().and_then(SpiffeId::service_name).map(|name| Arc::clone(&name.service));
            let called = called.unwrap_or_else(|| Arc::clone(&upstream.name));
            ("denied", denied.by.to_string(), Some(denied.remedy(id, &called)))
        }
    }
}
