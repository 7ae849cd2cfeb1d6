//! The HTTP face: Consul's paths, headers, status codes and error texts.
//!
//! Invariant: every answer carries `X-Consul-Default-ACL-Policy`; a refusal is text with Consul's words. Only programs on this
//! host are served: a request that a browser made (`Origin`) or that names another host (DNS rebinding) is refused, because
//! this API hands out private keys without a token.

mod agent;
mod catalog;
mod config;
mod connect;
mod intentions;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Request, State as Extract};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use serde_json::Value;

use super::AgentError;
use super::DefaultPolicy;
use super::definition::DefinitionError;
use super::entries::EntryError;
use super::schema::DecodeError;
use super::shared::{Look, Shared, Wait};
use super::state::{State, Topic};

/// Largest body taken.
pub(super) const BODY_BYTES_MAX: usize = 1 << 20;

const INDEX: HeaderName = HeaderName::from_static("x-consul-index");
const KNOWN_LEADER: HeaderName = HeaderName::from_static("x-consul-knownleader");
const LAST_CONTACT: HeaderName = HeaderName::from_static("x-consul-lastcontact");
const DEFAULT_POLICY: HeaderName = HeaderName::from_static("x-consul-default-acl-policy");
const CONTENT_HASH: HeaderName = HeaderName::from_static("x-consul-contenthash");
const CACHE: HeaderName = HeaderName::from_static("x-cache");
const REASON: HeaderName = HeaderName::from_static("x-consul-reason");

type App = Extract<Arc<Shared>>;
type Answer = Result<Response, Refusal>;

/// Every endpoint.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .merge(agent::routes())
        .merge(connect::routes())
        .merge(intentions::routes())
        .merge(catalog::routes())
        .merge(config::routes())
        .route("/v1/acl/{*rest}", any(acl_disabled))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), gate))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(shared)
}

/// A refused request.
#[derive(Debug)]
struct Refusal(StatusCode, String);

impl Refusal {
    fn bad(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }

    fn missing(text: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, text.into())
    }

    fn internal(text: impl Into<String>) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, text.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, [(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))], self.1).into_response()
    }
}

impl From<AgentError> for Refusal {
    fn from(error: AgentError) -> Self {
        let status = match &error {
            AgentError::TooManyWaiting => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

impl From<DefinitionError> for Refusal {
    fn from(error: DefinitionError) -> Self {
        match error {
            DefinitionError::Decode(error) => Self::bad(format!("Request decode failed: {}", go_words(&error))),
            DefinitionError::Invalid(text) => Self::bad(text),
        }
    }
}

impl From<EntryError> for Refusal {
    fn from(error: EntryError) -> Self {
        match error {
            EntryError::Invalid(text) => Self::internal(text),
            other => Self::bad(format!("Bad request: Request decoding failed: {other}")),
        }
    }
}

/// An unknown field in the words of Go's JSON decoder, which clients match on.
fn go_words(error: &DecodeError) -> String {
    match error {
        DecodeError::Unknown { name, .. } => format!("json: unknown field {name:?}"),
        other => format!("json: {other}"),
    }
}

/// The query string, decoded; keys may repeat.
#[derive(Debug, Default)]
struct Params(Vec<(String, String)>);

impl Params {
    fn parse(query: &str) -> Self {
        let decode = |text: &str| {
            let text = text.replace('+', " ");
            percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned()
        };
        let pair = |part: &str| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            (decode(key), decode(value))
        };
        Self(query.split('&').filter(|part| !part.is_empty()).map(pair).collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// A switch: `?passing`, `?passing=1`, `?passing=true`.
    fn flag(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !matches!(value, "0" | "false" | "f" | "F" | "FALSE" | "False"))
    }

    fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn wait(&self) -> Result<Wait, Refusal> {
        Wait::parse(self.get("index"), self.get("wait"), self.get("hash")).map_err(Refusal::bad)
    }
}

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

/// A JSON answer.
fn json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], value.to_string()).into_response()
}

/// A JSON answer with the headers of a query.
fn indexed(index: u64, value: &Value) -> Response {
    with_index(index, json(value))
}

fn with_index(index: u64, mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(INDEX, HeaderValue::from(index));
    headers.insert(KNOWN_LEADER, HeaderValue::from_static("true"));
    headers.insert(LAST_CONTACT, HeaderValue::from_static("0"));
    response
}

/// Marks an answer as one from the agent's cache, as Consul does for roots and leaves.
fn cached(mut response: Response) -> Response {
    response.headers_mut().insert(header::AGE, HeaderValue::from_static("0"));
    response.headers_mut().insert(CACHE, HeaderValue::from_static("HIT"));
    response
}

/// A blocking query over `topics`.
async fn blocking(shared: &Arc<Shared>, params: &Params, topics: Vec<Topic>, view: impl Fn(&State) -> Value) -> Answer {
    let wait = params.wait()?;
    let (index, value) = shared
        .wait(&wait, |state| {
            let index = state.index_of(&topics);
            let ready = wait.index == 0 || index > wait.index;
            // Only an answer is worth rendering; a look that goes on sleeping is not.
            Ok(Look { ready, value: index, again_in: None })
        })
        .await
        .map(|_| shared.read(|state| (state.index_of(&topics), view(state))))?;
    Ok(indexed(index, &value))
}

/// A body as JSON; `what` begins the refusal.
fn body_json(body: &[u8], what: &str) -> Result<Value, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::bad(format!("{what}{error}")))
}

/// Runs before every endpoint: who may ask, and what open source Consul refuses everywhere.
async fn gate(Extract(shared): App, request: Request, next: Next) -> Response {
    let params = Params::parse(request.uri().query().unwrap_or_default());
    let (policy, datacenter) = shared.read(|state| (state.settings.default_policy, state.settings.datacenter.clone()));
    let mut response = match refuse(request.headers(), &params, &datacenter) {
        Some(refusal) => refusal.into_response(),
        None => next.run(request).await,
    };
    let policy = match policy {
        DefaultPolicy::Allow => "allow",
        DefaultPolicy::Deny => "deny",
    };
    response.headers_mut().insert(DEFAULT_POLICY, HeaderValue::from_static(policy));
    response
}

fn refuse(headers: &HeaderMap, params: &Params, datacenter: &str) -> Option<Refusal> {
    if headers.contains_key(header::ORIGIN) {
        return Some(Refusal(StatusCode::FORBIDDEN, "the embedded agent does not serve web pages (Origin header)".to_owned()));
    }
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or_default());
    if let Some(host) = host.filter(|host| !names_this_host(host)) {
        return Some(Refusal(
            StatusCode::FORBIDDEN,
            format!("Host {host:?} is not this machine: ask for 127.0.0.1, [::1] or localhost"),
        ));
    }
    if params.get("ns").is_some_and(|ns| !ns.is_empty()) {
        return Some(Refusal::bad("Bad request: Invalid query parameter: \"ns\" - Namespaces are a Consul Enterprise feature"));
    }
    if params.get("partition").is_some_and(|name| !name.is_empty()) {
        return Some(Refusal::bad(
            "Bad request: Invalid query parameter: \"partition\" - Partitions are a Consul Enterprise feature",
        ));
    }
    match params.get("dc") {
        Some(dc) if !dc.is_empty() && dc != datacenter => Some(Refusal::internal("No path to datacenter")),
        _ => None,
    }
}

fn names_this_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.is_empty()
        || name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

async fn acl_disabled() -> Refusal {
    Refusal(StatusCode::UNAUTHORIZED, "ACL support disabled".to_owned())
}

async fn unknown_path() -> Refusal {
    Refusal::missing("Invalid URL path: not a recognized HTTP API endpoint")
}

async fn method_not_allowed(method: Method) -> Refusal {
    Refusal(StatusCode::METHOD_NOT_ALLOWED, format!("method {method} not allowed"))
}

/// An empty 200.
fn done() -> Response {
    Response::new(Body::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_served() {
        for host in ["127.0.0.1:8500", "localhost", "LOCALHOST:1", "[::1]:8500", "127.8.0.1", ""] {
            assert!(names_this_host(host), "{host}");
        }
        for host in ["evil.example", "10.0.0.1:8500", "[fe80::1]:1", "127.0.0.1.evil.example"] {
            assert!(!names_this_host(host), "{host}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::ORIGIN, HeaderValue::from_static("null"));
        assert!(refuse(&headers, &Params::default(), "dc1").is_some());
    }

    #[test]
    fn parameters_decode_and_repeat() {
        let params = Params::parse("name=a%20b&name=c+d&passing&near=_agent&stale=false");
        assert_eq!(params.all("name").collect::<Vec<_>>(), ["a b", "c d"]);
        assert!(params.flag("passing") && !params.flag("stale") && !params.flag("none"));
    }
}
