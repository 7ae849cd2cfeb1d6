//! `/v1/catalog/…`, `/v1/health/…` and `/v1/status/…`: what Consul's servers answer about all services.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State as Extract};
use axum::response::Response;
use axum::routing::get;
use serde_json::{Map, Value, json as object};

use super::{Answer, App, Params, Refusal, blocking, json};
use crate::agent::check::Health;
use crate::agent::filter::Filter;
use crate::agent::shared::Shared;
use crate::agent::state::{Service, State, Topic, connect_name};
use crate::agent::view;

const HEALTH_SELECTORS: [&str; 16] = [
    "Node.Node",
    "Node.ID",
    "Node.Address",
    "Node.Datacenter",
    "Node.Meta",
    "Service.Kind",
    "Service.ID",
    "Service.Service",
    "Service.Tags",
    "Service.Meta",
    "Service.Port",
    "Service.Address",
    "Service.Weights",
    "Service.Proxy.DestinationServiceName",
    "Service.Proxy.DestinationServiceID",
    "Service.EnableTagOverride",
];
const CATALOG_SELECTORS: [&str; 11] = [
    "ID",
    "Node",
    "Address",
    "Datacenter",
    "NodeMeta",
    "ServiceKind",
    "ServiceID",
    "ServiceName",
    "ServiceTags",
    "ServiceMeta",
    "ServicePort",
];

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/catalog/services", get(services))
        .route("/v1/catalog/service/{name}", get(service))
        .route("/v1/catalog/connect/{name}", get(connect))
        .route("/v1/catalog/nodes", get(nodes))
        .route("/v1/catalog/datacenters", get(datacenters))
        .route("/v1/health/service/{name}", get(health_service))
        .route("/v1/health/connect/{name}", get(health_connect))
        .route("/v1/health/checks/{name}", get(health_checks))
        .route("/v1/status/leader", get(leader))
        .route("/v1/status/peers", get(peers))
        .route("/v1/internal/federation-states/mesh-gateways", get(federation))
}

/// Whether an instance answers to a name, in one of the two ways.
#[derive(Clone, Copy)]
enum By {
    Name,
    Connect,
}

impl By {
    fn topic(self, name: &str) -> Topic {
        match self {
            Self::Name => Topic::Service(name.to_owned()),
            Self::Connect => Topic::Connect(name.to_owned()),
        }
    }

    fn selects(self, service: &Service, name: &str) -> bool {
        match self {
            Self::Name => service.definition.name == name,
            Self::Connect => connect_name(&service.definition) == Some(name),
        }
    }
}

async fn services(Extract(shared): App, params: Params) -> Answer {
    blocking(&shared, &params, vec![Topic::Catalog], |state| {
        let mut all = Map::new();
        all.insert("consul".to_owned(), object!([]));
        for service in state.services.values() {
            let tags = all.entry(service.definition.name.clone()).or_insert_with(|| object!([]));
            if let Value::Array(tags) = tags {
                for tag in &service.definition.tags {
                    if !tags.iter().any(|known| known == tag) {
                        tags.push(object!(tag));
                    }
                }
            }
        }
        Value::Object(all)
    })
    .await
}

async fn service(Extract(shared): App, Path(name): Path<String>, params: Params) -> Answer {
    catalog(&shared, &name, &params, By::Name).await
}

async fn connect(Extract(shared): App, Path(name): Path<String>, params: Params) -> Answer {
    catalog(&shared, &name, &params, By::Connect).await
}

async fn catalog(shared: &Arc<Shared>, name: &str, params: &Params, by: By) -> Answer {
    let filter = parse_filter(params, &CATALOG_SELECTORS)?;
    blocking(shared, params, topics(by, name), |state| {
        let chosen = state.services.values().filter(|service| by.selects(service, name) && tagged(service, params));
        Value::Array(chosen.map(|service| view::catalog_entry(state, service)).filter(|row| filter.matches(row)).collect())
    })
    .await
}

async fn health_service(Extract(shared): App, Path(name): Path<String>, params: Params) -> Answer {
    health(&shared, &name, &params, By::Name).await
}

async fn health_connect(Extract(shared): App, Path(name): Path<String>, params: Params) -> Answer {
    if params.get("peer").is_some_and(|peer| !peer.is_empty()) {
        return Err(Refusal::internal("cluster peering is not supported by the embedded agent"));
    }
    health(&shared, &name, &params, By::Connect).await
}

async fn health(shared: &Arc<Shared>, name: &str, params: &Params, by: By) -> Answer {
    let filter = parse_filter(params, &HEALTH_SELECTORS)?;
    let passing = params.flag("passing");
    blocking(shared, params, topics(by, name), |state| {
        let chosen = state
            .services
            .values()
            .filter(|service| by.selects(service, name) && tagged(service, params))
            .filter(|service| !passing || state.service_health(&service.definition.id) == Health::Passing);
        Value::Array(chosen.map(|service| view::health_entry(state, service)).filter(|row| filter.matches(row)).collect())
    })
    .await
}

async fn health_checks(Extract(shared): App, Path(name): Path<String>, params: Params) -> Answer {
    blocking(&shared, &params, vec![Topic::Service(name.clone())], |state| {
        Value::Array(
            state.checks.values().filter(|check| check.service_name == name).map(|check| view::check(state, check)).collect(),
        )
    })
    .await
}

async fn nodes(Extract(shared): App, params: Params) -> Answer {
    blocking(&shared, &params, Vec::new(), |state| Value::Array(vec![view::node(state)])).await
}

async fn datacenters(Extract(shared): App) -> Response {
    json(&shared.read(|state| object!([state.settings.datacenter])))
}

async fn leader() -> Response {
    json(&object!("127.0.0.1:8300"))
}

async fn peers() -> Response {
    json(&object!(["127.0.0.1:8300"]))
}

/// One datacenter has no federation; an empty answer is what Consul gives.
async fn federation(Extract(shared): App, params: Params) -> Answer {
    blocking(&shared, &params, Vec::new(), |_: &State| object!({})).await
}

/// Central configuration shows in these answers, so a change of it is news too.
fn topics(by: By, name: &str) -> Vec<Topic> {
    vec![by.topic(name), Topic::Config]
}

fn tagged(service: &Service, params: &Params) -> bool {
    params.all("tag").all(|tag| service.definition.tags.iter().any(|have| have == tag))
}

fn parse_filter(params: &Params, selectors: &[&str]) -> Result<Filter, Refusal> {
    Filter::parse(params.get("filter").unwrap_or_default(), selectors).map_err(|error| Refusal::internal(error.to_string()))
}
