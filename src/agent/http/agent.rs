//! `/v1/agent/…`: what Consul's local agent answers about its own services and checks.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State as Extract};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use serde_json::{Map, Value, json as object};

use super::{Answer, App, CONTENT_HASH, Params, REASON, Refusal, body_json, done, go_words, json};
use crate::agent::check::Health;
use crate::agent::definition::{CheckDefinition, Definition};
use crate::agent::filter::Filter;
use crate::agent::schema::{self, Shape};
use crate::agent::shared::{Look, Shared};
use crate::agent::state::{Service, State};
use crate::agent::view;

/// Version that this agent's answers look like.
const LIKE_VERSION: &str = "1.10.12";
const SERVICE_SELECTORS: [&str; 12] = [
    "Kind",
    "ID",
    "Service",
    "Tags",
    "Meta",
    "Port",
    "Address",
    "Weights",
    "Proxy.DestinationServiceName",
    "Proxy.DestinationServiceID",
    "Proxy.LocalServiceAddress",
    "Proxy.LocalServicePort",
];

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/agent/self", get(about))
        .route("/v1/agent/version", get(version))
        .route("/v1/agent/services", get(services))
        .route("/v1/agent/checks", get(checks))
        .route("/v1/agent/service/register", put(register))
        .route("/v1/agent/service/deregister/{id}", put(deregister))
        .route("/v1/agent/service/maintenance/{id}", put(maintenance))
        .route("/v1/agent/service/{id}", get(service))
        .route("/v1/agent/check/register", put(register_check))
        .route("/v1/agent/check/deregister/{id}", put(deregister_check))
        .route("/v1/agent/check/pass/{id}", put(pass))
        .route("/v1/agent/check/warn/{id}", put(warn))
        .route("/v1/agent/check/fail/{id}", put(fail))
        .route("/v1/agent/check/update/{id}", put(update))
        .route("/v1/agent/health/service/id/{id}", get(health_by_id))
        .route("/v1/agent/health/service/name/{name}", get(health_by_name))
}

async fn about(Extract(shared): App) -> Response {
    json(&shared.read(|state| {
        let dc = &state.settings.datacenter;
        object!({
            "Config": {"Datacenter": dc, "PrimaryDatacenter": dc, "NodeName": state.node_name, "NodeID": state.node_id,
                       "Revision": "", "Server": true, "Version": LIKE_VERSION},
            "DebugConfig": {"ACLsEnabled": false, "ConnectEnabled": true, "Datacenter": dc, "GRPCPort": -1, "GRPCAddrs": [],
                            "ConnectSidecarMinPort": 21_000, "ConnectSidecarMaxPort": 21_255},
            "Coord": {"Vec": [0, 0, 0, 0, 0, 0, 0, 0], "Error": 1.5, "Adjustment": 0, "Height": 1e-5},
            "Member": {"Name": state.node_name, "Addr": "127.0.0.1", "Port": 0, "Status": 1,
                       "Tags": {"acls": "0", "dc": dc, "id": state.node_id, "role": "consul", "build": LIKE_VERSION}},
            "Stats": {"agent": {"checks": state.checks.len().to_string(), "services": state.services.len().to_string()},
                      "build": {"version": LIKE_VERSION}, "consul": {"acl": "disabled", "server": "true"}},
            "Meta": {"consul-network-segment": ""},
            "Ringfence": {"EmbeddedAgent": true, "Version": env!("CARGO_PKG_VERSION")},
        })
    }))
}

async fn version() -> Response {
    json(&object!({"HumanVersion": LIKE_VERSION, "SHA": "", "BuildDate": "", "FIPS": ""}))
}

async fn services(Extract(shared): App, params: Params) -> Answer {
    let filter = Filter::parse(params.get("filter").unwrap_or_default(), &SERVICE_SELECTORS)
        .map_err(|error| Refusal::internal(error.to_string()))?;
    let all: Map<String, Value> = shared.read(|state| {
        state
            .services
            .iter()
            .map(|(id, service)| (id.clone(), Value::Object(view::agent_service(state, service))))
            .filter(|(_, service)| filter.matches(service))
            .collect()
    });
    Ok(json(&Value::Object(all)))
}

async fn checks(Extract(shared): App) -> Response {
    json(&Value::Object(
        shared.read(|state| state.checks.iter().map(|(id, check)| (id.clone(), view::check(state, check))).collect()),
    ))
}

/// Blocks on the content's hash, not on an index.
async fn service(Extract(shared): App, Path(id): Path<String>, params: Params) -> Answer {
    let wait = params.wait()?;
    let found = shared
        .wait(&wait, |state| {
            let definition = state.services.get(&id).map(|service| view::agent_service(state, service));
            let hash = definition.as_ref().map(view::content_hash);
            let ready = wait.hash.is_empty() || hash.as_ref() != Some(&wait.hash);
            Ok(Look { ready, value: definition.zip(hash), again_in: None })
        })
        .await?;
    let (mut definition, hash) = found.ok_or_else(|| Refusal::missing(format!("unknown service ID: {id}")))?;
    definition.insert("ContentHash".to_owned(), object!(hash));
    let mut response = json(&Value::Object(definition));
    if let Ok(value) = HeaderValue::from_str(&hash) {
        response.headers_mut().insert(CONTENT_HASH, value);
    }
    Ok(response)
}

async fn register(Extract(shared): App, body: Bytes) -> Answer {
    let definition = Definition::decode(body_json(&body, "Request decode failed: ")?)?;
    shared.change(|state| state.register(definition, false))?;
    Ok(done())
}

async fn deregister(Extract(shared): App, Path(id): Path<String>) -> Response {
    // An unknown id is a success, as in Consul.
    shared.change(|state| state.deregister(&id));
    done()
}

async fn maintenance(Extract(shared): App, Path(id): Path<String>, params: Params) -> Answer {
    let enable = match params.get("enable") {
        None | Some("") => return Err(Refusal::bad("Missing value for enable")),
        Some(text) => matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True"),
    };
    let reason = params.get("reason").unwrap_or_default().to_owned();
    if shared.change(|state| state.maintain(&id, enable, &reason)) {
        Ok(done())
    } else {
        Err(Refusal::missing(format!("No service registered with ID {id:?}")))
    }
}

async fn register_check(Extract(shared): App, body: Bytes) -> Answer {
    let document = body_json(&body, "Request decode failed: ")?;
    let document = schema::normalise(Shape::Struct(&schema::CHECK), document, "", 0)
        .map_err(|error| Refusal::bad(format!("Request decode failed: {}", go_words(&error))))?;
    let check: CheckDefinition = serde_json::from_value(document).map_err(|error| Refusal::bad(error.to_string()))?;
    if check.name.is_empty() {
        return Err(Refusal::bad("Missing check name"));
    }
    check.validate()?;
    shared.change(|state| state.register_check(check))?;
    Ok(done())
}

async fn deregister_check(Extract(shared): App, Path(id): Path<String>) -> Response {
    shared.change(|state| state.deregister_check(&id));
    done()
}

async fn pass(Extract(shared): App, Path(id): Path<String>, params: Params) -> Answer {
    beat(&shared, &id, Health::Passing, params.get("note").unwrap_or_default())
}

async fn warn(Extract(shared): App, Path(id): Path<String>, params: Params) -> Answer {
    beat(&shared, &id, Health::Warning, params.get("note").unwrap_or_default())
}

async fn fail(Extract(shared): App, Path(id): Path<String>, params: Params) -> Answer {
    beat(&shared, &id, Health::Critical, params.get("note").unwrap_or_default())
}

async fn update(Extract(shared): App, Path(id): Path<String>, body: Bytes) -> Answer {
    let document = body_json(&body, "Request decode failed: ")?;
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
    let health = match text("Status") {
        "passing" => Health::Passing,
        "warning" => Health::Warning,
        "critical" => Health::Critical,
        other => return Err(Refusal::bad(format!("Invalid check status: '{other}'"))),
    };
    beat(&shared, &id, health, text("Output"))
}

/// A heartbeat of a TTL check.
fn beat(shared: &Arc<Shared>, id: &str, health: Health, note: &str) -> Answer {
    let beaten = shared.change(|state| {
        let is_ttl = state.checks.get_mut(id).is_some_and(crate::agent::check::Check::beat);
        if is_ttl {
            state.set_health(id, health, note.to_owned());
        }
        is_ttl
    });
    if beaten { Ok(done()) } else { Err(Refusal::internal(format!("CheckID {id:?} does not have associated TTL"))) }
}

async fn health_by_id(Extract(shared): App, Path(id): Path<String>, params: Params) -> Response {
    let found = shared.read(|state| state.services.get(&id).map(|service| report(state, service)));
    match found {
        Some((status, name, report)) => answer(status, &name, &report, &params),
        None => {
            let nothing = object!({"AggregatedStatus": "critical", "Service": null, "Checks": null});
            answer(StatusCode::NOT_FOUND, "critical", &nothing, &params)
        }
    }
}

async fn health_by_name(Extract(shared): App, Path(name): Path<String>, params: Params) -> Response {
    let reports: Vec<_> = shared.read(|state| {
        state.services.values().filter(|service| service.definition.name == name).map(|service| report(state, service)).collect()
    });
    // The worst instance names the status; 200 < 429 < 503.
    let worst = reports.iter().max_by_key(|(status, ..)| status.as_u16()).map(|(status, name, _)| (*status, name.clone()));
    let (status, text) = worst.unwrap_or_else(|| (StatusCode::NOT_FOUND, "critical".to_owned()));
    let list: Vec<Value> = reports.into_iter().map(|(_, _, report)| report).collect();
    answer(status, &text, &object!(list), &params)
}

fn report(state: &State, service: &Service) -> (StatusCode, String, Value) {
    let id = &service.definition.id;
    let health = state.service_health(id);
    let maintained = state.checks_of(id).any(|check| check.kind == "maintenance");
    let text = if maintained { "maintenance" } else { health.as_str() };
    let checks: Vec<Value> = state.checks_of(id).map(|check| view::check(state, check)).collect();
    let status = StatusCode::from_u16(view::health_status(health)).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let report = object!({"AggregatedStatus": text, "Service": view::agent_service(state, service), "Checks": checks});
    (status, text.to_owned(), report)
}

fn answer(status: StatusCode, text: &str, report: &Value, params: &Params) -> Response {
    let mut response = if params.get("format") == Some("text") {
        ([(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"))], text.to_owned()).into_response()
    } else {
        json(report)
    };
    if let Ok(value) = HeaderValue::from_str(text) {
        response.headers_mut().insert(REASON, value);
    }
    *response.status_mut() = status;
    response
}
