//! The commands of the admin port, with Envoy's names, texts and status codes where Envoy has them.
//!
//! Invariant: a command that changes something takes POST only, and none from a browser page: a page on the same machine
//! can reach loopback, but it cannot help sending `Origin`. Everything else may be asked with any method, as in Envoy.
//! Each answer carries Envoy's headers.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{ConnectInfo, Extension, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, post};
use serde::Serialize;

use super::health::{self, Problem};
use super::snapshot::View;
use super::{Action, Shared, access, callers, denials, page, reach, upgrade};

pub(super) const TEXT: &str = "text/plain; charset=UTF-8";
const JSON: &str = "application/json";
/// The version of the text format that Prometheus' scrapers ask for.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const NOSNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

pub(super) type Admin = State<Arc<Shared>>;
/// What stands behind the `?`, in order.
pub(super) type Parameters = Vec<(String, String)>;

/// One command, for `/help` and for wrong paths.
struct Command {
    path: &'static str,
    changes: bool,
    help: &'static str,
}

const COMMANDS: &[Command] = &[
    Command { path: "/", changes: false, help: "this list" },
    Command {
        path: "/airflow",
        changes: false,
        help: "page for people: who talks to whom; ?dag= ?task= ?run= preset its filter",
    },
    Command { path: "/callers", changes: false, help: "tasks, components and services with their sums, as JSON; ?dag=" },
    Command { path: "/denials", changes: false, help: "the last denials and why, as JSON; ?dag= ?limit=" },
    Command { path: "/denials/{id}", changes: false, help: "one denial, as JSON" },
    Command { path: "/drain_listeners", changes: true, help: "stop accepting; open connections go on" },
    Command { path: "/healthz", changes: false, help: "the process is alive; what is not well, as JSON" },
    Command { path: "/help", changes: false, help: "this list" },
    Command { path: "/metrics", changes: false, help: "metrics in Prometheus' text format" },
    Command { path: "/quitquitquit", changes: true, help: "exit" },
    Command { path: "/reach", changes: false, help: "would ?identity= be let in by ?to=, as JSON" },
    Command { path: "/ready", changes: false, help: "200 LIVE when ready, otherwise 503 and the state" },
    Command { path: "/reopen_logs", changes: true, help: "open log files again" },
    Command { path: "/snapshot", changes: false, help: "what is being enforced, as JSON without secrets" },
    Command {
        path: "/upgrade",
        changes: false,
        help: "which process serves and whether another takes over, as JSON; POST starts one",
    },
];

pub(super) fn router(shared: Arc<Shared>) -> Router {
    let router = COMMANDS.iter().fold(Router::new(), |router, command| router.route(command.path, handler(command.path)));
    let router = router.merge(page::parts());
    router.fallback(unknown).layer(middleware::from_fn_with_state(Arc::clone(&shared), around)).with_state(shared)
}

fn handler(path: &'static str) -> MethodRouter<Arc<Shared>> {
    match path {
        "/metrics" => any(metrics),
        "/ready" => any(ready),
        "/healthz" => any(healthz),
        "/snapshot" => any(snapshot),
        "/airflow" => any(page::page),
        "/callers" => any(callers::callers),
        "/denials" => any(denials::denials),
        "/denials/{id}" => any(denials::denial),
        "/reach" => any(reach::reach),
        "/drain_listeners" => changing(Action::Drain),
        "/quitquitquit" => changing(Action::Quit),
        "/reopen_logs" => changing(Action::ReopenLogs),
        "/upgrade" => changing(Action::Upgrade).get(upgrade::upgrade),
        _ => any(help),
    }
}

fn changing(action: Action) -> MethodRouter<Arc<Shared>> {
    post(move |State(shared): Admin, request: Request| async move { act(&shared, action, &request) }).fallback(post_required)
}

/// What every request has in common: Envoy's headers and the access log.
async fn around(
    State(shared): Admin,
    Extension(ConnectInfo(peer)): Extension<ConnectInfo<SocketAddr>>,
    request: Request,
    next: Next,
) -> Response {
    let start = Instant::now();
    let logged = shared.access.lock().await.is_on();
    let asked = logged.then(|| access::Request::new(request.method(), request.uri(), request.headers(), peer));
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(NOSNIFF, HeaderValue::from_static("nosniff"));
    headers.insert(header::SERVER, HeaderValue::from_static("ringfence"));
    if let Some(asked) = asked {
        let bytes = response.body().size_hint().exact().unwrap_or_default();
        shared.access.lock().await.record(&asked, response.status().as_u16(), bytes, start.elapsed());
    }
    response
}

async fn metrics(State(shared): Admin) -> Response {
    let snapshot = shared.viewer.current();
    let mut hub = shared.hub.lock().await;
    // The newest events first: a scrape right after a connection shall see it.
    hub.drain();
    hub.exporter().publish_snapshot(&snapshot, shared.viewer.acknowledged());
    answer(StatusCode::OK, PROMETHEUS, hub.render())
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

fn act(shared: &Shared, action: Action, request: &Request) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        let text = "refused: the request comes from a web page; send it without an Origin header\n";
        return answer(StatusCode::FORBIDDEN, TEXT, text);
    }
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

async fn help() -> Response {
    answer(StatusCode::OK, TEXT, format!("admin commands are:\n{}", list()))
}

async fn unknown() -> Response {
    answer(StatusCode::NOT_FOUND, TEXT, format!("invalid path. admin commands are:\n{}", list()))
}

fn list() -> String {
    COMMANDS.iter().fold(String::new(), |mut text, Command { path, changes, help }| {
        let how = if *changes { " (POST)" } else { "" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {path}{how}: {help}");
        text
    })
}

/// The value of a parameter; one without text asks for nothing.
pub(super) fn parameter<'a>(parameters: &'a [(String, String)], name: &str) -> Option<&'a str> {
    parameters.iter().find(|(found, _)| found == name).map(|(_, value)| &**value).filter(|value| !value.is_empty())
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
