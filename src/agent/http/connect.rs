//! Certificates and authorisation: `/v1/agent/connect/…` and `/v1/connect/ca/…`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State as Extract};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post, put};
use serde_json::{Value, json as object};

use super::{Answer, App, Params, Refusal, blocking, body_json, cached, done, go_words, indexed, json};
use crate::agent::schema::{self, Shape};
use crate::agent::shared::{Look, Shared};
use crate::agent::state::Topic;
use crate::agent::{duration, intentions, leaf, sec1, view};
use crate::identity::SpiffeId;

/// Range of a leaf's life that Consul accepts.
const LEAF_TTL: std::ops::RangeInclusive<Duration> = Duration::from_secs(3_600)..=Duration::from_secs(8_760 * 3_600);

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/agent/connect/ca/roots", get(agent_roots))
        .route("/v1/connect/ca/roots", get(roots))
        .route("/v1/agent/connect/ca/leaf/{service}", get(leaf_certificate))
        .route("/v1/agent/connect/authorize", post(authorize))
        .route("/v1/connect/ca/configuration", get(configuration).put(configure))
        // Not Consul's: rotates the root without a new configuration.
        .route("/v1/connect/ca/rotate", put(rotate))
}

async fn agent_roots(Extract(shared): App, params: Params) -> Answer {
    blocking(&shared, &params, vec![Topic::Roots], view::roots).await.map(cached)
}

async fn roots(Extract(shared): App, params: Params) -> Answer {
    if params.flag("pem") {
        let pem: String = shared.read(|state| state.authority.roots().map(|root| root.pem.as_str()).collect());
        return Ok(axum::response::IntoResponse::into_response(([("content-type", "application/pem-certificate-chain")], pem)));
    }
    blocking(&shared, &params, vec![Topic::Roots], view::roots).await
}

async fn leaf_certificate(Extract(shared): App, Path(service): Path<String>, params: Params) -> Answer {
    let wait = params.wait()?;
    let (index, document) = shared
        .wait(&wait, |state| {
            let found = leaf::current(state, &service, SystemTime::now())?;
            let ready = wait.index == 0 || found.index > wait.index;
            Ok(Look { ready, value: (found.index, found.document), again_in: Some(found.due_in) })
        })
        .await?;
    Ok(cached(indexed(index, &document)))
}

async fn authorize(Extract(shared): App, body: Bytes) -> Answer {
    let document = body_json(&body, "Bad request: Request decode failed: ")?;
    let document = schema::normalise(Shape::Struct(&schema::AUTHORIZE), document, "", 0)
        .map_err(|error| Refusal::bad(format!("Bad request: Request decode failed: {}", go_words(&error))))?;
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
    let target = text("Target");
    if target.is_empty() {
        return Err(Refusal::bad("Bad request: Target service must be specified"));
    }
    let not_connect = || Refusal::bad("Bad request: ClientCertURI not a valid Connect identifier");
    let uri = text("ClientCertURI");
    let lower = uri.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')).map(|(domain, path)| {
        // Consul takes any spelling of the trust domain, and any trust domain at all.
        format!("spiffe://{}/{path}", domain.to_ascii_lowercase())
    });
    let id = SpiffeId::parse(lower.as_deref().unwrap_or(uri)).map_err(|_| not_connect())?;
    let Some(source) = id.service_name() else {
        let known = lower.is_none() || matches!(id.kind(), crate::identity::Kind::MeshGateway);
        return Err(if known {
            Refusal::bad("Bad request: ClientCertURI not a valid Service identifier")
        } else {
            not_connect()
        });
    };
    let verdict = shared.read(|state| {
        let all = intentions::flatten(state.entries.values());
        intentions::decide(&all, &source.service, target, state.settings.default_policy)
    });
    Ok(cached(json(&object!({"Authorized": verdict.allowed, "Reason": verdict.reason}))))
}

async fn configuration(Extract(shared): App) -> Response {
    json(&shared.read(|state| {
        let index = state.index_of(&[Topic::Roots]);
        object!({
            "Provider": "consul",
            "Config": {"IntermediateCertTTL": "8760h", "LeafCertTTL": duration::format(state.settings.leaf_ttl), "RotationPeriod": "2160h"},
            "State": null,
            "ForceWithoutCrossSigning": false,
            "CreateIndex": index,
            "ModifyIndex": index,
        })
    }))
}

/// Every accepted configuration rotates the root, with the key it brings or a new one.
async fn configure(Extract(shared): App, body: Bytes) -> Answer {
    let document = body_json(&body, "Request decode failed: ")?;
    let document = schema::normalise(Shape::Struct(&schema::CA_CONFIGURATION), document, "", 0)
        .map_err(|error| Refusal::bad(format!("Request decode failed: {}", go_words(&error))))?;
    let provider = document.get("Provider").and_then(Value::as_str).unwrap_or_default();
    if provider != "consul" {
        return Err(Refusal::internal(format!("could not initialize provider: unknown CA provider {provider:?}")));
    }
    let setting =
        |key: &str| document.get("Config").and_then(|config| config.get(key)).and_then(Value::as_str).filter(|t| !t.is_empty());
    if setting("RootCert").is_some() {
        return Err(Refusal::internal("the embedded agent makes its own root certificates: leave RootCert out"));
    }
    let ttl = match setting("LeafCertTTL") {
        None => None,
        Some(text) => Some(duration::parse(text).ok_or_else(|| Refusal::internal(format!("time: invalid duration {text:?}")))?),
    };
    if let Some(ttl) = ttl.filter(|ttl| !LEAF_TTL.contains(ttl)) {
        let bound = if ttl < *LEAF_TTL.start() { "greater or equal than 1h0m0s" } else { "less than 8760h0m0s" };
        return Err(Refusal::internal(format!("error configuring provider: leaf cert TTL must be {bound}")));
    }
    let key = setting("PrivateKey").map(sec1::key_pair).transpose().map_err(|error| Refusal::internal(error.to_string()))?;
    shared.change(|state| {
        state.rotate(key)?;
        if let Some(ttl) = ttl {
            state.settings.leaf_ttl = ttl;
        }
        Ok::<_, crate::agent::AgentError>(())
    })?;
    Ok(done())
}

async fn rotate(Extract(shared): App) -> Answer {
    shared.change(|state| state.rotate(None))?;
    let mut response = json(&shared.read(|state| object!({"ActiveRootID": state.authority.active().id})));
    *response.status_mut() = StatusCode::OK;
    Ok(response)
}
