//! The commands of the admin port, with Envoy's names, texts and status codes where Envoy has them.
//!
//! Invariant: a command that changes something takes POST only, and none from a browser page: a page on the same machine
//! can reach loopback, but it cannot help sending `Origin`. Everything else may be asked with any method, as in Envoy.
//! Each answer carries Envoy's headers.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Extension, Query, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, post};
use serde::Serialize;
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::SizeAbove;

use super::commands::{self, COMMANDS};
use super::health::{self, Problem};
use super::snapshot::View;
use super::{
    Action, Drain, Shared, access, callers, certs, clusters, denials, dump, facts, listeners, page, reach, stats, upgrade,
};
use crate::telemetry::stats::Which;

pub(super) const TEXT: &str = "text/plain; charset=UTF-8";
pub(super) const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=UTF-8";
/// The version of the text format that Prometheus' scrapers ask for.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const NOSNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

/// Bodies above this are compressed for whoever asks for it. What fits into a packet is not worth it.
const COMPRESSED_BYTES_MIN: u64 = 1_400;

pub(super) type Admin = State<Arc<Shared>>;
/// What stands behind the `?`, in order.
pub(super) type Parameters = Vec<(String, String)>;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    let router = COMMANDS.iter().fold(Router::new(), |router, command| router.route(command.path, handler(command.path)));
    let router = router.merge(page::parts());
    router
        .fallback(unknown)
        // Consul's labels are most of a scrape, and much the same on every line: a twentieth is left of it at the fastest level.
        .layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(SizeAbove::new(COMPRESSED_BYTES_MIN)))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), around))
        .with_state(shared)
}

fn handler(path: &'static str) -> MethodRouter<Arc<Shared>> {
    if let Some((status, text)) = facts::fixed(path) {
        let fixed = any(move || async move { answer(status, TEXT, text) });
        return if path == "/heapprofiler" { changing(move |_, _| answer(status, TEXT, text)) } else { fixed };
    }
    match path {
        "/" => any(index),
        "/certs" => any(certs::certs),
        "/clusters" => any(clusters::answer),
        "/config_dump" => any(dump::config_dump),
        "/init_dump" => any(facts::init_dump),
        "/listeners" => any(listeners::listeners),
        "/memory" => any(facts::memory),
        "/memory/tcmalloc" => any(facts::memory_text),
        "/runtime" => any(facts::runtime),
        "/server_info" => any(facts::server_info),
        "/metrics" => any(metrics),
        "/ready" => any(ready),
        "/healthz" => any(healthz),
        "/snapshot" => any(snapshot),
        "/airflow" => any(page::page),
        "/callers" => any(callers::callers),
        "/denials" => any(denials::denials),
        "/denials/{id}" => any(denials::denial),
        "/reach" => any(reach::reach),
        "/cpuprofiler" | "/allocprofiler" => {
            changing(move |_, parameters| facts::profiler(path, parameter(parameters, "enable")))
        }
        "/drain_listeners" => changing(|shared, parameters| act(shared, Action::Drain(Drain::new(parameters)))),
        "/healthcheck/fail" => changing(|shared, _| health_check(shared, true)),
        "/healthcheck/ok" => changing(|shared, _| health_check(shared, false)),
        "/logging" => post(logging).fallback(post_required),
        "/quitquitquit" => changing(|shared, _| act(shared, Action::Quit)),
        "/reopen_logs" => changing(|shared, _| act(shared, Action::ReopenLogs)),
        "/runtime_modify" => changing(|_, parameters| facts::runtime_modify(parameters.len())),
        "/upgrade" => changing(|shared, _| act(shared, Action::Upgrade)).get(upgrade::upgrade),
        "/reset_counters" => post(reset_counters).fallback(post_required),
        "/stats" => any(stats::stats),
        "/stats/prometheus" => any(stats::prometheus),
        _ => any(help),
    }
}

/// A command that takes POST only, and none from a browser page.
fn changing(command: impl Fn(&Shared, &Parameters) -> Response + Clone + Send + Sync + 'static) -> MethodRouter<Arc<Shared>> {
    let checked = move |State(shared): Admin, Query(parameters): Query<Parameters>, headers: HeaderMap| {
        let refused = from_a_page(&headers);
        let answer = refused.unwrap_or_else(|| command(&shared, &parameters));
        async move { answer }
    };
    post(checked).fallback(post_required)
}

async fn logging(State(shared): Admin, Query(parameters): Query<Parameters>, headers: HeaderMap) -> Response {
    match from_a_page(&headers) {
        Some(refused) => refused,
        None => shared.levels.lock().await.answer(&parameters),
    }
}

/// What every request has in common: Envoy's headers, the encoding of the answer and the access log.
async fn around(
    State(shared): Admin,
    Extension(ConnectInfo(peer)): Extension<ConnectInfo<SocketAddr>>,
    mut request: Request,
    next: Next,
) -> Response {
    let start = Instant::now();
    let logged = shared.access.lock().await.is_on();
    let asked = logged.then(|| access::Request::new(request.method(), request.uri(), request.headers(), peer));
    // Anything but gzip is the same as nothing, as in Envoy, which answers in full whatever is accepted.
    match takes_gzip(request.headers()) {
        true => drop(request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"))),
        false => drop(request.headers_mut().remove(header::ACCEPT_ENCODING)),
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(NOSNIFF, HeaderValue::from_static("nosniff"));
    headers.insert(header::SERVER, HeaderValue::from_static("envoy"));
    let Some(asked) = asked else { return response };
    let status = response.status().as_u16();
    response.map(|body| {
        let ended = move |bytes| {
            // On the one thread of this runtime nobody else can have it.
            if let Ok(mut access) = shared.access.try_lock() {
                access.record(&asked, status, bytes, start.elapsed());
            }
        };
        Body::new(access::Counted::new(body, ended))
    })
}

/// Whether gzip is accepted (RFC 9110, 12.5.3); what accepts everything gets what it always got.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let texts = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let weight = weight.trim().strip_prefix("q=").map_or(Some(1.0), |weight| weight.parse::<f32>().ok());
        name.trim().eq_ignore_ascii_case("gzip") && weight.is_some_and(|weight| weight > 0.0)
    })
}

async fn metrics(State(shared): Admin) -> Response {
    answer(StatusCode::OK, PROMETHEUS, own_metrics(&shared, Which::All).await)
}

/// The `ringfence_*` families.
pub(super) async fn own_metrics(shared: &Shared, which: Which) -> String {
    let snapshot = shared.viewer.current();
    let (text, sums) = {
        let mut hub = shared.hub.lock().await;
        // The newest events first: a scrape right after a connection shall see it.
        hub.drain();
        hub.exporter().publish_snapshot(&snapshot, shared.viewer.acknowledged());
        (hub.render(), hub.sums(which))
    };
    text + &sums.text()
}

async fn reset_counters(State(shared): Admin, headers: HeaderMap) -> Response {
    if let Some(refused) = from_a_page(&headers) {
        return refused;
    }
    stats::reset(&shared).await;
    answer(StatusCode::OK, TEXT, "OK\n")
}

async fn ready(State(shared): Admin) -> Response {
    let mut hub = shared.hub.lock().await;
    hub.drain();
    let state = health::state(&shared, &hub);
    let status = if state == health::State::Live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer(status, TEXT, format!("{}\n", state.as_str()))
}

/// The answer of `/healthz`.
#[derive(Serialize)]
struct Health {
    state: health::State,
    uptime_seconds: u64,
    generation: u64,
    acknowledged_generation: u64,
    agent_reachable: bool,
    problems: Vec<Problem>,
}

async fn healthz(State(shared): Admin) -> Response {
    let mut hub = shared.hub.lock().await;
    hub.drain();
    json(&Health {
        state: health::state(&shared, &hub),
        uptime_seconds: shared.start.elapsed().as_secs(),
        generation: shared.viewer.current().generation,
        acknowledged_generation: shared.viewer.acknowledged(),
        agent_reachable: shared.status.borrow().agent_reachable,
        problems: health::problems(&shared, &hub),
    })
}

async fn snapshot(State(shared): Admin) -> Response {
    let mut hub = shared.hub.lock().await;
    hub.drain();
    json(&View::new(&shared.viewer.current(), shared.viewer.acknowledged(), &hub))
}

/// The refusal of what a web page sent.
fn from_a_page(headers: &HeaderMap) -> Option<Response> {
    headers.contains_key(header::ORIGIN).then(|| {
        let text = "refused: the request comes from a web page; send it without an Origin header\n";
        answer(StatusCode::FORBIDDEN, TEXT, text)
    })
}

/// `/healthcheck/fail` and `/healthcheck/ok`: what `/ready` says, and nothing else.
fn health_check(shared: &Shared, failed: bool) -> Response {
    shared.health_failed.store(failed, Ordering::Relaxed);
    tracing::info!(failed, "health set on the admin port");
    answer(StatusCode::OK, TEXT, "OK\n")
}

fn act(shared: &Shared, action: Action) -> Response {
    match shared.actions.try_send(action) {
        Ok(()) => {
            tracing::info!(?action, "asked for on the admin port");
            answer(StatusCode::OK, TEXT, "OK\n")
        }
        Err(error) => {
            tracing::warn!(?action, %error, "asked for on the admin port, and not done");
            let text = "not done: the process has not yet dealt with earlier requests, or is ending; try again\n";
            answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
        }
    }
}

async fn post_required(method: Method) -> Response {
    let text = format!("Method {method} not allowed, POST required.");
    ([(header::ALLOW, "POST")], answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, text)).into_response()
}

async fn index() -> Response {
    answer(StatusCode::OK, HTML, commands::page())
}

async fn help() -> Response {
    answer(StatusCode::OK, TEXT, format!("admin commands are:\n{}", commands::list()))
}

async fn unknown() -> Response {
    answer(StatusCode::NOT_FOUND, TEXT, format!("invalid path. admin commands are:\n{}", commands::list()))
}

/// The value of a parameter; one without text asks for nothing.
pub(super) fn parameter<'a>(parameters: &'a [(String, String)], name: &str) -> Option<&'a str> {
    parameters.iter().find(|(found, _)| found == name).map(|(_, value)| &**value).filter(|value| !value.is_empty())
}

/// Bytes in lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec_pretty(value) {
        Ok(mut body) => {
            body.push(b'\n');
            answer(StatusCode::OK, JSON, body)
        }
        Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("the answer could not be made: {error}\n")),
    }
}

pub(super) fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    (status, [(header::CONTENT_TYPE, content_type)], body.into()).into_response()
}
