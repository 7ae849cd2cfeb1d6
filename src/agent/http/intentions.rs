//! `/v1/connect/intentions…`: the records of Consul 1.8, the `exact` forms of 1.9 and later, match and check.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State as Extract};
use axum::http::StatusCode;
use axum::routing::get;
use serde_json::{Map, Value, json as object};

use super::{Answer, App, Params, Refusal, blocking, go_words, json};
use crate::agent::filter::Filter;
use crate::agent::intentions::{self, Document, Intention};
use crate::agent::schema::{self, Shape};
use crate::agent::shared::Shared;
use crate::agent::state::{State, Topic};

const SELECTORS: [&str; 10] = [
    "ID",
    "Description",
    "SourceNS",
    "SourceName",
    "DestinationNS",
    "DestinationName",
    "SourceType",
    "Action",
    "Precedence",
    "Meta",
];
/// Most names in one match.
const NAMES_MAX: usize = 256;

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/connect/intentions", get(list).post(create))
        .route("/v1/connect/intentions/exact", get(read_exact).put(put_exact).delete(delete_exact))
        .route("/v1/connect/intentions/match", get(matching))
        .route("/v1/connect/intentions/check", get(check))
        .route("/v1/connect/intentions/{id}", get(read).put(update).delete(remove))
}

async fn list(Extract(shared): App, params: Params) -> Answer {
    let filter = Filter::parse(params.get("filter").unwrap_or_default(), &SELECTORS)
        .map_err(|error| Refusal::internal(error.to_string()))?;
    blocking(&shared, &params, vec![Topic::Intentions], move |state| {
        let all = flatten(state).iter().map(Intention::to_json).filter(|intention| filter.matches(intention)).collect();
        Value::Array(all)
    })
    .await
}

async fn create(Extract(shared): App, body: Bytes) -> Answer {
    let (mut source, destination) = decode(&body)?.into_source().map_err(Refusal::internal)?;
    source.legacy_id = uuid::Uuid::new_v4().to_string();
    let id = source.legacy_id.clone();
    shared.change(|state| {
        let all = flatten(state);
        if let Some(old) = all.iter().find(|old| old.source.name == source.name && old.destination == destination) {
            return Err(Refusal::internal(format!("duplicate intention found: {}", old.describe())));
        }
        intentions::put(state, source, &destination).map_err(Refusal::from)
    })?;
    Ok(json(&object!({"ID": id})))
}

async fn read(Extract(shared): App, Path(id): Path<String>, params: Params) -> Answer {
    if id.len() != 36 {
        return Err(Refusal::bad("Bad request: failed intention lookup: index error: UUID must be 36 characters"));
    }
    let response = blocking(&shared, &params, vec![Topic::Intentions], |state| {
        intentions::by_id(&flatten(state), &id).map_or(Value::Null, Intention::to_json)
    })
    .await?;
    let exists = shared.read(|state| intentions::by_id(&flatten(state), &id).is_some());
    if exists { Ok(response) } else { Err(Refusal::missing("Intention not found")) }
}

async fn update(Extract(shared): App, Path(id): Path<String>, body: Bytes) -> Answer {
    let (mut source, destination) = decode(&body)?.into_source().map_err(Refusal::internal)?;
    shared.change(|state| {
        let all = flatten(state);
        let old = intentions::by_id(&all, &id)
            .ok_or_else(|| Refusal::internal(format!("Cannot modify non-existent intention: '{id}'")))?;
        match (old.is_declared(), old.has_names(&source, &destination)) {
            // Its ID comes from its names: it stays what it is, and with other names it would be another one.
            (true, true) => {}
            (true, false) => {
                return Err(Refusal::internal(format!(
                    "Cannot modify source or destination of intention '{id}', which a config entry declares: \
                     delete it and create the other one"
                )));
            }
            (false, same) => {
                if !same {
                    intentions::delete_one(state, old).map_err(Refusal::from)?;
                }
                source.legacy_id.clone_from(&id);
                source.legacy_create_time.clone_from(&old.source.legacy_create_time);
            }
        }
        intentions::put(state, source, &destination).map_err(Refusal::from)
    })?;
    Ok(json(&object!({"ID": id})))
}

async fn remove(Extract(shared): App, Path(id): Path<String>) -> Answer {
    shared.change(|state| {
        let all = flatten(state);
        let old = intentions::by_id(&all, &id)
            .ok_or_else(|| Refusal::internal(format!("Cannot delete non-existent intention: '{id}'")))?;
        intentions::delete_one(state, old).map_err(Refusal::from)
    })?;
    Ok(json(&Value::Bool(true)))
}

async fn read_exact(Extract(shared): App, params: Params) -> Answer {
    let (source, destination) = pair(&params)?;
    shared.read(|state| {
        let all = flatten(state);
        let found = all.iter().find(|found| found.source.name == source && found.destination == destination);
        found.map(|found| json(&found.to_json())).ok_or_else(|| Refusal::missing("Intention not found"))
    })
}

async fn put_exact(Extract(shared): App, params: Params, body: Bytes) -> Answer {
    let (source_name, destination) = pair(&params)?;
    let mut document = decode(&body)?;
    (document.source_name, document.destination_name) = (source_name, destination);
    let (source, destination) = document.into_source().map_err(Refusal::internal)?;
    shared.change(|state| intentions::put(state, source, &destination))?;
    Ok(json(&Value::Bool(true)))
}

async fn delete_exact(Extract(shared): App, params: Params) -> Answer {
    let (source, destination) = pair(&params)?;
    shared.change(|state| intentions::delete(state, &source, &destination))?;
    Ok(json(&Value::Bool(true)))
}

async fn matching(Extract(shared): App, params: Params) -> Answer {
    let by = match params.get("by") {
        None | Some("") => return Err(Refusal::internal("required query parameter 'by' not set")),
        Some("source") => Intention::has_source as fn(&Intention, &str) -> bool,
        Some("destination") => Intention::has_destination,
        Some(_) => return Err(Refusal::internal("'by' parameter must be one of 'source' or 'destination'")),
    };
    let names: Vec<String> = params.all("name").map(str::to_owned).collect();
    if names.is_empty() {
        return Err(Refusal::internal("required query parameter 'name' not set"));
    }
    if names.len() > NAMES_MAX {
        return Err(Refusal::bad(format!("{} names are more than {NAMES_MAX}", names.len())));
    }
    blocking(&shared, &params, vec![Topic::Intentions], |state| {
        let all = flatten(state);
        let of = |name: &str| -> Value {
            let found: Vec<_> = all.iter().filter(|intention| by(intention, name)).map(Intention::to_json).collect();
            // Consul prints an empty match as null.
            if found.is_empty() { Value::Null } else { Value::Array(found) }
        };
        Value::Object(names.iter().map(|name| (name.clone(), of(name))).collect::<Map<_, _>>())
    })
    .await
}

async fn check(Extract(shared): App, params: Params) -> Answer {
    let (source, destination) = pair(&params)?;
    let allowed =
        shared.read(|state| intentions::decide(&flatten(state), &source, &destination, state.settings.default_policy).allowed);
    Ok(json(&object!({"Allowed": allowed})))
}

fn flatten(state: &State) -> Vec<Intention> {
    intentions::flatten(state.entries.values())
}

/// `source` and `destination`; `default/web` names the one namespace there is.
fn pair(params: &Params) -> Result<(String, String), Refusal> {
    let one = |key: &str| match params.get(key) {
        None | Some("") => Err(Refusal::internal(format!("required query parameter '{key}' not set"))),
        Some(name) => Ok(name.strip_prefix("default/").unwrap_or(name).to_owned()),
    };
    Ok((one("source")?, one("destination")?))
}

fn decode(body: &[u8]) -> Result<Document, Refusal> {
    let failed = |text: String| Refusal::internal(format!("Failed to decode request body: {text}"));
    let document: Value = serde_json::from_slice(body).map_err(|error| failed(error.to_string()))?;
    let document =
        schema::normalise(Shape::Struct(&schema::INTENTION), document, "", 0).map_err(|error| failed(go_words(&error)))?;
    serde_json::from_value(document).map_err(|error| Refusal(StatusCode::BAD_REQUEST, error.to_string()))
}
