//! `/v1/config…`, `/v1/discovery-chain/…` and `/v1/query…`.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State as Extract};
use axum::routing::{get, put};
use serde_json::{Value, json as object};

use super::{Answer, App, Params, Refusal, blocking, body_json, done, indexed, json, with_index};
use crate::agent::chain::{self, Context, Overrides};
use crate::agent::entries::{Entry, KINDS};
use crate::agent::query;
use crate::agent::schema::{self, DecodeError, Shape};
use crate::agent::shared::{Look, Shared};
use crate::agent::state::Topic;

/// What every kind of entry is announced under.
const CONFIG_TOPICS: [Topic; 2] = [Topic::Config, Topic::Intentions];

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/config", put(write))
        .route("/v1/config/{kind}", get(list))
        .route("/v1/config/{kind}/{name}", get(read).delete(remove))
        .route("/v1/discovery-chain/{service}", get(compile).post(compile_with))
        .route("/v1/query", get(queries).post(create_query))
        .route("/v1/query/{id}", get(read_query).put(update_query).delete(remove_query))
        .route("/v1/query/{id}/execute", get(execute))
}

async fn write(Extract(shared): App, params: Params, body: Bytes) -> Answer {
    let entry = Entry::decode(body_json(&body, "Bad request: Request decoding failed: ")?)?;
    let cas: Option<u64> = match params.get("cas") {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| Refusal::bad("Bad request: cas must be an index"))?),
    };
    let stored = shared.change(|state| {
        let current = state.entries.get(&(entry.kind.clone(), entry.name.clone())).map_or(0, |old| old.modify_index);
        if cas.is_some_and(|cas| cas != current) {
            return Ok(false);
        }
        state.put_entry(entry).map(|()| true)
    })?;
    Ok(json(&Value::Bool(stored)))
}

async fn list(Extract(shared): App, Path(kind): Path<String>, params: Params) -> Answer {
    known(&kind)?;
    blocking(&shared, &params, CONFIG_TOPICS.to_vec(), |state| {
        Value::Array(state.entries.values().filter(|entry| entry.kind == kind).map(Entry::to_json).collect())
    })
    .await
}

async fn read(Extract(shared): App, Path((kind, name)): Path<(String, String)>, params: Params) -> Answer {
    known(&kind)?;
    let wait = params.wait()?;
    let key = (kind, name);
    let (index, entry) = shared
        .wait(&wait, |state| {
            let index = state.index_of(&CONFIG_TOPICS);
            let ready = wait.index == 0 || index > wait.index;
            Ok(Look { ready, value: (index, state.entries.get(&key).map(Entry::to_json)), again_in: None })
        })
        .await?;
    Ok(match entry {
        Some(entry) => indexed(index, &entry),
        None => {
            let missing = Refusal::missing(format!("Config entry not found for {:?} / {:?}", key.0, key.1));
            // A client can wait for an entry to appear.
            with_index(index, axum::response::IntoResponse::into_response(missing))
        }
    })
}

async fn remove(Extract(shared): App, Path((kind, name)): Path<(String, String)>) -> Answer {
    known(&kind)?;
    shared.change(|state| state.delete_entry(&kind, &name));
    Ok(json(&object!({})))
}

fn known(kind: &str) -> Result<(), Refusal> {
    if KINDS.contains(&kind) { Ok(()) } else { Err(Refusal::bad(format!("invalid config entry kind: {kind}"))) }
}

async fn compile(Extract(shared): App, Path(service): Path<String>, params: Params) -> Answer {
    compiled(&shared, &service, &params, Overrides::default()).await
}

async fn compile_with(Extract(shared): App, Path(service): Path<String>, params: Params, body: Bytes) -> Answer {
    let failed = |text: String| Refusal::bad(format!("Bad request: Request decoding failed: {text}"));
    let document = if body.is_empty() { object!({}) } else { body_json(&body, "Bad request: Request decoding failed: ")? };
    let document = schema::normalise(Shape::Struct(&schema::CHAIN_OVERRIDES), document, "", 0).map_err(|error| match error {
        DecodeError::Unknown { name, .. } => failed(format!("invalid config key {name:?}")),
        other => failed(other.to_string()),
    })?;
    let overrides = serde_json::from_value(document).map_err(|error| failed(error.to_string()))?;
    compiled(&shared, &service, &params, overrides).await
}

async fn compiled(shared: &Arc<Shared>, service: &str, params: &Params, overrides: Overrides) -> Answer {
    let wait = params.wait()?;
    let (index, chain) = shared
        .wait(&wait, |state| {
            let index = state.index_of(&[Topic::Config]);
            let datacenter = &state.settings.datacenter;
            let context = Context {
                entries: &state.entries,
                datacenter,
                compile_in: params.get("compile-dc").filter(|dc| !dc.is_empty()).unwrap_or(datacenter),
                trust_domain: &state.authority.trust_domain,
            };
            let chain = chain::compile(service, context, &overrides);
            Ok(Look { ready: wait.index == 0 || index > wait.index, value: (index, chain), again_in: None })
        })
        .await?;
    Ok(indexed(index, &chain.map_err(|error| Refusal::internal(error.to_string()))?))
}

async fn queries(Extract(shared): App) -> Answer {
    Ok(json(&shared.read(|state| Value::Array(state.queries.values().map(query::Query::to_json).collect()))))
}

async fn create_query(Extract(shared): App, body: Bytes) -> Answer {
    let id = uuid::Uuid::new_v4().to_string();
    let decoded = query::decode(body_json(&body, "Request decode failed: ")?, id.clone()).map_err(refused_query)?;
    shared.change(|state| state.put_query(decoded)).map_err(Refusal::internal)?;
    Ok(json(&object!({"ID": id})))
}

async fn update_query(Extract(shared): App, Path(id): Path<String>, body: Bytes) -> Answer {
    let decoded = query::decode(body_json(&body, "Request decode failed: ")?, id.clone()).map_err(refused_query)?;
    shared.change(|state| {
        if !state.queries.contains_key(&id) {
            return Err(Refusal::internal(format!("Cannot modify non-existent prepared query: '{id}'")));
        }
        state.put_query(decoded).map_err(Refusal::internal)
    })?;
    Ok(done())
}

async fn read_query(Extract(shared): App, Path(id): Path<String>) -> Answer {
    let found = shared.read(|state| state.queries.get(&id).map(query::Query::to_json));
    found.map(|found| json(&Value::Array(vec![found]))).ok_or_else(|| Refusal::missing("Query not found"))
}

async fn remove_query(Extract(shared): App, Path(id): Path<String>) -> Answer {
    shared.change(|state| state.queries.remove(&id));
    Ok(done())
}

/// Not blocking in Consul: the index is always 1.
async fn execute(Extract(shared): App, Path(key): Path<String>, params: Params) -> Answer {
    let connect = params.flag("connect");
    let found = shared.read(|state| state.find_query(&key).map(|query| state.execute(query, connect)));
    found.map(|found| indexed(1, &found)).ok_or_else(|| Refusal::missing("Query not found"))
}

fn refused_query(text: String) -> Refusal {
    if text.starts_with("Request decode failed") { Refusal::bad(text) } else { Refusal::internal(text) }
}
