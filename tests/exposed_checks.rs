//! `expose.checks` at a real Consul over its HTTP API: the agent asks for an app's HTTP and gRPC checks at ports of the sidecar's,
//! and gets the app's answers there.

mod support;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::{HeaderMap, Method, Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use support::{Consul, Definition, Mesh, Sidecar, ports, traffic, wait_for, wait_until};

/// Consul's `expose_min_port` to `expose_max_port`.
const EXPOSED: Range<u16> = 21_500..21_756;
const GRPC: &str = "/grpc.health.v1.Health/Check";

/// An app that answers health checks of either kind, and counts those that were asked as Consul asks.
struct App {
    address: SocketAddr,
    http: Arc<AtomicU64>,
    grpc: Arc<AtomicU64>,
}

impl App {
    fn start() -> Self {
        let (http, grpc) = <(Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let listener = ports::listener();
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("nonblocking");
        let counts = (Arc::clone(&http), Arc::clone(&grpc));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                loop {
                    let (stream, _) = listener.accept().await.expect("accepts");
                    let counts = counts.clone();
                    let service = hyper::service::service_fn(move |request| answer(request, counts.clone()));
                    tokio::spawn(async move {
                        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
                    });
                }
            });
        });
        Self { address, http, grpc }
    }

    fn asked(&self) -> [u64; 2] {
        [&self.http, &self.grpc].map(|count| count.load(Ordering::Relaxed))
    }
}

async fn answer(
    request: Request<Incoming>,
    (http, grpc): (Arc<AtomicU64>, Arc<AtomicU64>),
) -> Result<Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let plain = |text: &'static str| Full::new(Bytes::from_static(text.as_bytes())).boxed();
    let mut response = Response::new(plain("no such check"));
    match (head.uri.path(), head.version) {
        // Its method and its body are the check's own.
        ("/health", Version::HTTP_11)
            if head.method == Method::PUT && head.uri.query() == Some("deep=1") && body == "are you well" =>
        {
            http.fetch_add(1, Ordering::Relaxed);
            response = Response::new(plain("well"));
        }
        (GRPC, Version::HTTP_2) if head.headers.get("te").is_some_and(|te| te == "trailers") && !body.is_empty() => {
            grpc.fetch_add(1, Ordering::Relaxed);
            // `HealthCheckResponse { status: SERVING }` behind gRPC's flag and length.
            let message = Frame::data(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]));
            let mut status = HeaderMap::new();
            status.insert("grpc-status", "0".parse().expect("a value"));
            response = Response::new(BoxBody::new(Frames([message, Frame::trailers(status)].into_iter())));
            response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
        }
        _ => *response.status_mut() = hyper::StatusCode::NOT_FOUND,
    }
    Ok(response)
}

/// A message and its trailers.
struct Frames(std::array::IntoIter<Frame<Bytes>, 2>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.next().map(Ok))
    }
}

/// The service, with checks of its own.
fn register(consul: &Consul, definition: &Definition, app: &App, expose: bool) {
    let mut body = definition.clone().proxy("Expose", json!({"Checks": expose})).json();
    body["Checks"] = json!([
        {"CheckID": "of-http", "HTTP": format!("http://{}/health?deep=1", app.address), "Method": "PUT", "Body": "are you well",
         "Interval": "1s"},
        {"CheckID": "of-grpc", "GRPC": app.address.to_string(), "Interval": "1s"},
    ]);
    let answer = consul.client().put("/v1/agent/service/register?replace-existing-checks", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn check(consul: &Consul, id: &str) -> Value {
    consul.client().get("/v1/agent/checks").ok("checks").json()[id].clone()
}

#[test]
fn the_agents_checks_reach_the_app_through_the_sidecar() {
    let (app, consul) = (App::start(), Consul::start());
    let definition = Definition::new("db").app(app.address);
    register(&consul, &definition, &app, true);
    // The agent begins with its lowest exposed ports, and nobody is there.
    let ports = [("of-http", "health?deep=1"), ("of-grpc", "refused")].map(|(id, part)| {
        wait_for("a check that fails at an exposed port", support::PATIENCE, || {
            let check = check(&consul, id);
            let output = check["Output"].as_str().unwrap_or_default();
            let exposed = EXPOSED.clone().find(|port| output.contains(&format!(":{port}")));
            exposed.filter(|_| check["Status"] == "critical" && output.contains(part)).ok_or_else(|| check.to_string())
        })
    });
    let before = app.asked();
    let mut sidecar = Sidecar::start(&consul, "db");
    for id in ["of-http", "of-grpc"] {
        wait_until("a check that passes", support::PATIENCE, || check(&consul, id)["Status"] == "passing");
    }
    let after = app.asked();
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?} and then {after:?}");
    // Nothing else of the app is there.
    let elsewhere = support::http::Client::new(([127, 0, 0, 1], ports[0]).into(), None);
    assert_eq!(elsewhere.get("/other").status, 404);

    register(&consul, &definition, &app, false);
    wait_until("the listeners gone", support::PATIENCE, || {
        ports.iter().all(|port| traffic::connect(([127, 0, 0, 1], *port).into()).is_err())
    });
    sidecar.assert_healthy();
}
