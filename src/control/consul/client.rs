//! The HTTP client of the agent: one pool, bounded answers, bounded waits, typed errors.
//!
//! Invariant: no answer longer than its endpoint's bound is read, no call outlives its timeout, and the token is in no URL,
//! no log and no `Debug`. Bodies may hold private keys and are wiped when dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use zeroize::Zeroizing;

use super::budget::{BLOCKING_QUERIES_MAX, Budget, IDLE_CONNECTIONS_MAX};
use super::connector::Connector;
use super::error::{AgentError, Endpoint, certificate_alert};
use super::token::{Secret, Token};
use crate::config::{self, AgentAddress};
use crate::control::ControlError;

/// Bound on a request that does not block. A first leaf may wait for the servers to sign.
const SHORT_TIMEOUT: Duration = Duration::from_secs(15);
/// What a blocking query may take beyond `wait` and Consul's own jitter of wait/16.
const BLOCKING_SLACK: Duration = Duration::from_secs(10);
/// Idle connections are closed before a Consul agent would (it never does by default).
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A reset within this time of sending is no ended blocking query but a refused connection.
const REFUSED_WITHIN: Duration = Duration::from_millis(500);
/// A body starts with this much room, so that a leaf with its key is never moved while it is read.
const BODY_BYTES_START: usize = 16 << 10;

const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// One call.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) endpoint: Endpoint,
    pub(crate) method: Method,
    /// Path segments after `/v1`, not yet encoded.
    pub(crate) path: Vec<String>,
    pub(crate) query: Vec<(&'static str, String)>,
    pub(crate) body: Option<Bytes>,
    pub(crate) auth: Auth,
}

/// Which token goes with a call.
#[derive(Debug, Clone)]
pub(crate) enum Auth {
    /// The one in use; the call waits until there is one.
    Current,
    /// None: the call that fetches a token.
    Anonymous,
    /// This one: the call that gives it back.
    With(Secret),
}

/// A good answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Response {
    pub(crate) index: Option<u64>,
    pub(crate) hash: Option<String>,
    /// Seconds since the agent heard from the servers; grows while they are away.
    pub(crate) age: Option<u64>,
    /// `X-Consul-Default-ACL-Policy`: true for allow.
    pub(crate) default_allow: Option<bool>,
    pub(crate) filtered_by_acls: bool,
    pub(crate) body: Body,
}

/// Bytes of an answer, wiped when dropped and never printed.
#[derive(Clone, Default)]
pub(crate) struct Body(Zeroizing<Vec<u8>>);

/// A handle to the agent. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    http: legacy::Client<Connector, Full<Bytes>>,
    connector: Connector,
    authority: String,
    prefix: String,
    basic: Option<HeaderValue>,
    namespace: Option<String>,
    partition: Option<String>,
    datacenter: Option<String>,
    token: Arc<Token>,
    budget: Budget,
    reachable: AtomicBool,
}

impl Request {
    pub(crate) fn get(endpoint: Endpoint, path: &[&str]) -> Self {
        let path = path.iter().map(|&segment| segment.to_owned()).collect();
        Self { endpoint, method: Method::GET, path, query: Vec::new(), body: None, auth: Auth::Current }
    }

    pub(crate) fn post(endpoint: Endpoint, path: &[&str], body: impl Into<Bytes>) -> Self {
        Self { method: Method::POST, body: Some(body.into()), ..Self::get(endpoint, path) }
    }

    /// Adds a parameter unless its value is empty.
    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Self {
        if !value.is_empty() {
            self.query.push((name, value.to_owned()));
        }
        self
    }
}

impl Client {
    pub(crate) fn new(settings: &config::Consul, token: Arc<Token>) -> Result<Self, ControlError> {
        let connector = Connector::new(&settings.address, &settings.tls)?;
        let (authority, prefix) = match &settings.address {
            AgentAddress::Http { host, port, prefix, .. } if host.contains(':') => (format!("[{host}]:{port}"), prefix.clone()),
            AgentAddress::Http { host, port, prefix, .. } => (format!("{host}:{port}"), prefix.clone()),
            AgentAddress::Unix(_) => ("localhost".to_owned(), String::new()),
        };
        let basic = match &settings.basic_auth {
            Some(pair) => {
                let text = Zeroizing::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair.as_bytes())));
                let mut value = HeaderValue::from_str(&text)
                    .map_err(|_| ControlError::Config("CONSUL_HTTP_AUTH cannot be sent as a header".into()))?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector.clone());
        metrics::gauge!("ringfence_agent_connected").set(0.0);
        let set = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
        Ok(Self {
            shared: Arc::new(Shared {
                http,
                connector,
                authority,
                prefix,
                basic,
                namespace: set(&settings.namespace),
                partition: set(&settings.partition),
                datacenter: set(&settings.datacenter),
                token,
                budget: Budget::new(BLOCKING_QUERIES_MAX),
                reachable: AtomicBool::new(false),
            }),
        })
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.shared.budget
    }

    pub(crate) fn token(&self) -> &Arc<Token> {
        &self.shared.token
    }

    /// Whether the agent answered last.
    pub(crate) fn reachable(&self) -> bool {
        self.shared.reachable.load(Ordering::Relaxed)
    }

    /// Reads certificate files again.
    pub(crate) fn reload(&self) -> Result<(), ControlError> {
        self.shared.connector.reload()
    }

    /// A call that answers at once. At most `SHORT_REQUESTS_MAX` are under way.
    pub(crate) async fn call(&self, request: &Request) -> Result<Response, AgentError> {
        let _turn = self.shared.budget.short().await;
        self.send(request, SHORT_TIMEOUT).await
    }

    /// A call that waits for a change. The caller holds a place of the budget.
    pub(crate) async fn wait(&self, request: &Request, wait: Duration) -> Result<Response, AgentError> {
        let request = request.clone().with("wait", &format!("{}s", wait.as_secs().max(1)));
        self.send(&request, wait + wait / 16 + BLOCKING_SLACK).await
    }

    async fn send(&self, request: &Request, timeout: Duration) -> Result<Response, AgentError> {
        let token = match &request.auth {
            Auth::Current => self.shared.token.current().await,
            Auth::Anonymous => None,
            Auth::With(secret) => Some(secret.clone()),
        };
        let started = Instant::now();
        let result = match tokio::time::timeout(timeout, self.exchange(request, token.as_ref(), started)).await {
            Ok(result) => result,
            Err(_) => Err(AgentError::Timeout { endpoint: request.endpoint, after: timeout }),
        };
        self.account(request, token.as_ref(), &result);
        result
    }

    fn account(&self, request: &Request, token: Option<&Secret>, result: &Result<Response, AgentError>) {
        let outcome = result.as_ref().map_or_else(AgentError::outcome, |_| "ok");
        metrics::counter!("ringfence_agent_requests_total", "endpoint" => request.endpoint.name(), "outcome" => outcome)
            .increment(1);
        let reachable = match result {
            Ok(_) => true,
            // Whoever refuses a connection is there.
            Err(error) if error.congestion() => self.reachable(),
            Err(error) => error.answered(),
        };
        if self.shared.reachable.swap(reachable, Ordering::Relaxed) != reachable {
            metrics::gauge!("ringfence_agent_connected").set(if reachable { 1.0 } else { 0.0 });
            match result {
                Err(error) if !reachable => tracing::warn!(%error, "lost the Consul agent; the last good state stays in force"),
                _ => tracing::info!(agent = %self.shared.authority, "the Consul agent answers"),
            }
        }
        match result {
            // These answer only whom they know.
            Ok(_) if matches!(request.endpoint, Endpoint::Definition | Endpoint::Match | Endpoint::Chain) => {
                self.shared.token.accepted();
            }
            Ok(_) => {}
            Err(error) if error.congestion() => self.shared.budget.congested(Instant::now()),
            Err(AgentError::TokenUnknown { .. }) if matches!(request.auth, Auth::Current) => self.shared.token.suspect(token),
            Err(_) => {}
        }
    }

    async fn exchange(&self, request: &Request, token: Option<&Secret>, started: Instant) -> Result<Response, AgentError> {
        let endpoint = request.endpoint;
        let http = self.http_request(request, token)?;
        let response = self.shared.http.request(http).await.map_err(|error| self.sort(endpoint, started, &error))?;
        let (parts, incoming) = response.into_parts();
        let max = endpoint.body_bytes_max();
        let body = read_body(incoming, max).await.map_err(|failure| match failure {
            BodyFailure::TooLong => AgentError::TooLarge { endpoint, max },
            BodyFailure::Broken => AgentError::Reset { address: self.shared.authority.clone(), endpoint, soon: false },
        })?;
        if parts.status != StatusCode::OK {
            return Err(AgentError::from_status(endpoint, parts.status.as_u16(), &body));
        }
        Ok(Response::new(&parts.headers, body))
    }

    fn http_request(&self, request: &Request, token: Option<&Secret>) -> Result<hyper::Request<Full<Bytes>>, AgentError> {
        let mut uri = format!("http://{}{}/v1", self.shared.authority, self.shared.prefix);
        for segment in &request.path {
            uri.push('/');
            uri.extend(utf8_percent_encode(segment, SEGMENT));
        }
        let mut separator = '?';
        for (name, value) in request.query.iter().map(|(name, value)| (*name, value.as_str())).chain(self.defaults(request)) {
            uri.push(separator);
            uri.push_str(name);
            // `cached` is a flag without a value.
            if name != "cached" {
                uri.push('=');
                uri.extend(utf8_percent_encode(value, SEGMENT));
            }
            separator = '&';
        }
        let mut builder = hyper::Request::builder().method(request.method.clone()).uri(uri);
        if let Some(basic) = &self.shared.basic {
            builder = builder.header(AUTHORIZATION, basic.clone());
        }
        if let Some(secret) = token {
            builder = builder.header("x-consul-token", secret.header());
        }
        builder.body(Full::new(request.body.clone().unwrap_or_default())).map_err(|error| AgentError::Malformed {
            endpoint: request.endpoint,
            detail: format!("the request cannot be written: {error}"),
        })
    }

    /// Namespace, partition and datacenter of the flags, where set and not given by the request itself.
    fn defaults<'a>(&'a self, request: &'a Request) -> impl Iterator<Item = (&'static str, &'a str)> {
        let reads_config = matches!(request.endpoint, Endpoint::Chain | Endpoint::Query);
        let datacenter = self.shared.datacenter.as_deref().filter(|_| reads_config);
        [("ns", self.shared.namespace.as_deref()), ("partition", self.shared.partition.as_deref()), ("dc", datacenter)]
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| (name, value)))
            .filter(|(name, _)| request.query.iter().all(|(given, _)| given != name))
    }

    fn sort(&self, endpoint: Endpoint, started: Instant, error: &legacy::Error) -> AgentError {
        let address = self.shared.authority.clone();
        if let Some(alert) = certificate_alert(error) {
            return AgentError::ClientCertificate { address, alert };
        }
        if error.is_connect() {
            return AgentError::Unreachable { address, detail: innermost(error) };
        }
        AgentError::Reset { address, endpoint, soon: started.elapsed() < REFUSED_WITHIN }
    }
}

impl Response {
    fn new(headers: &HeaderMap, body: Body) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        Self {
            index: text("x-consul-index").and_then(|value| value.parse().ok()),
            hash: text("x-consul-contenthash").map(str::to_owned),
            age: text("age").and_then(|value| value.parse().ok()),
            default_allow: text("x-consul-default-acl-policy").map(|value| value == "allow"),
            filtered_by_acls: text("x-consul-results-filtered-by-acls").is_some_and(|value| value == "true"),
            body,
        }
    }

    #[cfg(test)]
    pub(crate) fn with_body(body: &[u8]) -> Self {
        Self { body: Body(Zeroizing::new(body.to_vec())), ..Self::default() }
    }

    /// The body as JSON. `null` and anything unexpected is an error, never a default.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self, endpoint: Endpoint) -> Result<T, AgentError> {
        // serde's messages quote at most a short piece of a value, and never one of a string that was expected to be one.
        serde_json::from_slice(&self.body).map_err(|error| AgentError::Malformed {
            endpoint,
            detail: format!("line {} column {}: {:?}", error.line(), error.column(), error.classify()),
        })
    }
}

impl std::ops::Deref for Body {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("agent", &self.authority).finish_non_exhaustive()
    }
}

enum BodyFailure {
    TooLong,
    Broken,
}

async fn read_body(mut incoming: hyper::body::Incoming, max: usize) -> Result<Body, BodyFailure> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(BODY_BYTES_START));
    while let Some(frame) = incoming.frame().await {
        let frame = frame.map_err(|_| BodyFailure::Broken)?;
        if let Some(data) = frame.data_ref() {
            if bytes.len() + data.len() > max {
                return Err(BodyFailure::TooLong);
            }
            grow_wiping(&mut bytes, data.len());
            bytes.extend_from_slice(data);
        }
    }
    Ok(Body(bytes))
}

/// Makes room for `more` without leaving a copy of the old bytes behind.
fn grow_wiping(bytes: &mut Zeroizing<Vec<u8>>, more: usize) {
    if bytes.capacity() - bytes.len() < more {
        let mut larger = Zeroizing::new(Vec::with_capacity((bytes.len() + more) * 2));
        larger.extend_from_slice(bytes);
        *bytes = larger;
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
