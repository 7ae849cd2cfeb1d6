//! A scripted agent: answers by path, blocks as Consul does, remembers who asked what.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::sync::watch;

use crate::tls::fixtures::{Ca, chain_pem, key_pem};

/// One scripted answer.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) index: Option<u64>,
    pub(super) hash: Option<String>,
    pub(super) body: Vec<u8>,
}

/// Everything that is scripted. A change wakes blocked queries.
#[derive(Debug, Clone, Default)]
pub(super) struct Script {
    pub(super) answers: BTreeMap<String, Answer>,
    /// Answers every call with 500.
    pub(super) down: bool,
    /// The one token accepted; others get 403.
    pub(super) token: Option<String>,
}

#[derive(Debug)]
pub(super) struct Fake {
    pub(super) port: u16,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    script: watch::Sender<Script>,
    asked: watch::Sender<Vec<String>>,
    open: AtomicUsize,
    open_most: AtomicUsize,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Answer {
    pub(super) fn ok(index: u64, body: impl ToString) -> Self {
        Self { status: 200, index: Some(index), hash: None, body: body.to_string().into_bytes() }
    }

    pub(super) fn status(status: u16, body: &str) -> Self {
        Self { status, index: Some(1), hash: None, body: body.into() }
    }

    pub(super) fn hashed(hash: &str, body: impl ToString) -> Self {
        Self { index: None, hash: Some(hash.into()), ..Self::ok(0, body) }
    }

    pub(super) fn unindexed(self) -> Self {
        Self { index: None, ..self }
    }
}

impl Fake {
    pub(super) async fn start(script: Script) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let shared = Arc::new(Shared {
            script: watch::Sender::new(script),
            asked: watch::Sender::default(),
            open: AtomicUsize::new(0),
            open_most: AtomicUsize::new(0),
        });
        let router = Router::new().fallback(serve).with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serving") });
        Self { port, shared, task }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Script)) {
        self.shared.script.send_modify(change);
    }

    pub(super) fn set(&self, path: &str, answer: Answer) {
        self.change(|script| drop(script.answers.insert(path.into(), answer)));
    }

    /// `METHOD path?query token` of every call so far that contains `text`.
    pub(super) fn asked(&self, text: &str) -> Vec<String> {
        self.shared.asked.borrow().iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// Most calls that were open at once; each one holds a connection.
    pub(super) fn open_most(&self) -> usize {
        self.shared.open_most.load(Ordering::Relaxed)
    }

    pub(super) fn open(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }
}

struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let open = shared.open.fetch_add(1, Ordering::Relaxed) + 1;
    shared.open_most.fetch_max(open, Ordering::Relaxed);
    let _open = Open(&shared);
    let token = request.headers().get("x-consul-token").and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let line = format!("{} {} {token}", request.method(), request.uri());
    shared.asked.send_modify(|asked| asked.push(line));
    let path = request.uri().path().to_owned();
    let query: BTreeMap<String, String> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let mut script = shared.script.subscribe();
    let wait: u64 = query.get("wait").and_then(|wait| wait.trim_end_matches('s').parse().ok()).unwrap_or(0);
    let answered = tokio::time::timeout(Duration::from_secs(wait), script.wait_for(|now| is_news(now, &path, &query))).await;
    drop(answered.map(|result| result.map(drop)));
    let now = script.borrow().clone();
    respond(&now, &path, &token)
}

/// Whether a blocked query must answer.
fn is_news(script: &Script, path: &str, query: &BTreeMap<String, String>) -> bool {
    let Some(answer) = script.answers.get(path).filter(|answer| answer.status == 200 && !script.down) else { return true };
    match (query.get("index"), query.get("hash")) {
        (Some(index), _) => answer.index.is_none_or(|now| now.to_string() != *index),
        (None, Some(hash)) => answer.hash.as_ref() != Some(hash),
        (None, None) => true,
    }
}

fn respond(script: &Script, path: &str, token: &str) -> Response {
    let open_to_all = path.ends_with("/acl/login") || path.ends_with("/acl/logout");
    if script.down {
        return (StatusCode::INTERNAL_SERVER_ERROR, "No known Consul servers").into_response();
    }
    if script.token.as_ref().is_some_and(|wanted| wanted != token) && !open_to_all {
        return (StatusCode::FORBIDDEN, "ACL not found").into_response();
    }
    let Some(answer) = script.answers.get(path) else {
        return (StatusCode::NOT_FOUND, "nothing here").into_response();
    };
    let mut headers = HeaderMap::new();
    if let Some(index) = answer.index {
        headers.insert("X-Consul-Index", index.into());
    }
    if let Some(hash) = &answer.hash {
        headers.insert("X-Consul-ContentHash", hash.parse().expect("a header"));
    }
    (StatusCode::from_u16(answer.status).expect("a status"), headers, answer.body.clone()).into_response()
}

/// A mesh of `services`, each with the upstream `db`, as an agent without ACLs shows it.
pub(super) fn mesh(ca: &Ca, services: &[&str]) -> Script {
    let mut script = Script::default();
    let mut set = |path: String, answer| drop(script.answers.insert(path, answer));
    set("/v1/agent/connect/ca/roots".into(), Answer::ok(9, roots(ca)));
    set("/v1/discovery-chain/db".into(), Answer::ok(5, chain("db")));
    set("/v1/health/connect/db".into(), Answer::ok(6, instances(21_001)));
    let default = r#"{"Authorized":false,"Reason":"Default behavior configured by ACLs"}"#;
    set("/v1/agent/connect/authorize".into(), Answer::ok(0, default).unindexed());
    set("/v1/connect/intentions/match".into(), Answer::ok(7, intentions(services[0], "deny")));
    let mut listed = serde_json::Map::new();
    for (number, service) in services.iter().enumerate() {
        let id = format!("{service}-sidecar-proxy");
        let definition = definition(service, 21_100 + number, 9_000 + number);
        listed.insert(id.clone(), definition.clone());
        set(format!("/v1/agent/service/{id}"), Answer::hashed("h1", definition));
        set(format!("/v1/agent/connect/ca/leaf/{service}"), Answer::ok(10, leaf(ca, service)));
    }
    set("/v1/agent/services".into(), Answer::ok(0, serde_json::Value::Object(listed)).unindexed());
    script
}

pub(super) fn definition(service: &str, port: usize, upstream_port: usize) -> serde_json::Value {
    serde_json::json!({
        "Kind": "connect-proxy", "ID": format!("{service}-sidecar-proxy"), "Service": format!("{service}-sidecar-proxy"),
        "Address": "", "Port": port, "Datacenter": "dc1",
        "Proxy": {
            "DestinationServiceName": service, "DestinationServiceID": service,
            "LocalServiceAddress": "127.0.0.1", "LocalServicePort": 8_080, "Config": null,
            "Upstreams": [{ "DestinationName": "db", "LocalBindPort": upstream_port }],
        }
    })
}

pub(super) fn roots(ca: &Ca) -> serde_json::Value {
    let pem = chain_pem(std::slice::from_ref(ca.certificate()));
    serde_json::json!({ "ActiveRootID": "a", "TrustDomain": "t.consul", "Roots": [{ "ID": "a", "RootCert": pem }] })
}

pub(super) fn leaf(ca: &Ca, service: &str) -> serde_json::Value {
    let svid = ca.svid(service);
    serde_json::json!({ "CertPEM": chain_pem(&svid.chain), "PrivateKeyPEM": key_pem(&svid.key), "Service": service })
}

pub(super) fn intentions(destination: &str, action: &str) -> serde_json::Value {
    serde_json::json!({ destination: [{ "SourceName": "api", "DestinationName": destination, "Action": action, "Precedence": 9 }] })
}

pub(super) fn instances(port: u16) -> serde_json::Value {
    serde_json::json!([{
        "Node": { "Address": "127.0.0.1", "Datacenter": "dc1" },
        "Service": { "Kind": "connect-proxy", "Service": "db-sidecar-proxy", "Port": port, "Proxy": { "DestinationServiceName": "db" } },
        "Checks": [{ "Status": "passing" }],
    }])
}

fn chain(service: &str) -> serde_json::Value {
    let id = format!("{service}.default.dc1");
    serde_json::json!({ "Chain": {
        "Protocol": "tcp", "StartNode": "start",
        "Nodes": { "start": { "Type": "resolver", "Resolver": { "ConnectTimeout": "5s", "Target": id } } },
        "Targets": { id.clone(): { "Service": service, "Datacenter": "dc1", "SNI": format!("{id}.internal.t.consul") } },
    } })
}
