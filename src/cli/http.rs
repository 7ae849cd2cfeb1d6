//! HTTP calls of the commands themselves: registration and intentions in `demo`, one call a right in `check`.
//!
//! Invariant: every call has a bound on time and on the answer's size. The control plane's own client is typed and
//! retries; this one shows what the agent said, word for word, because that is what the two commands are about.

use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, Uri};
use tower_service::Service;
use zeroize::Zeroizing;

use crate::config::{AgentAddress, AgentTls, Consul};
use crate::control::consul::connector::Connector;

/// Bound on one call, connecting included.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer that is read.
const BODY_BYTES_MAX: usize = 32 << 20;
/// How much of an error's text is repeated.
const TEXT_CHARS_MAX: usize = 200;

/// Calls one agent.
pub(super) struct Http {
    connector: Connector,
    authority: String,
    prefix: String,
    authorization: Option<Zeroizing<String>>,
    token: Option<Zeroizing<String>>,
    scope: Vec<(&'static str, String)>,
}

/// What came back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// The agent's clock, to the second.
    pub(super) date: Option<SystemTime>,
    body: Bytes,
}

/// Why nothing usable came back.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("{address}: {source}")]
    Connect { address: String, source: std::io::Error },
    #[error("{address}: {source}")]
    Exchange { address: String, source: hyper::Error },
    #[error("{address}: no answer within {CALL_TIMEOUT:?}")]
    Timeout { address: String },
    #[error("{address}: {detail}")]
    Answer { address: String, detail: String },
}

impl Http {
    /// For the agent of `settings`; `token` is what every call carries.
    pub(super) fn new(settings: &Consul, token: Option<Zeroizing<String>>) -> Result<Self, crate::control::ControlError> {
        use base64::Engine;
        let (authority, prefix) = match &settings.address {
            AgentAddress::Unix(_) => ("localhost".to_owned(), String::new()),
            AgentAddress::Http { host, port, prefix, .. } if host.contains(':') => (format!("[{host}]:{port}"), prefix.clone()),
            AgentAddress::Http { host, port, prefix, .. } => (format!("{host}:{port}"), prefix.clone()),
        };
        let basic = |auth: &Zeroizing<String>| {
            Zeroizing::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(auth.as_bytes())))
        };
        let scope = [("ns", &settings.namespace), ("partition", &settings.partition), ("dc", &settings.datacenter)];
        Ok(Self {
            connector: Connector::new(&settings.address, &settings.tls)?,
            authority,
            prefix,
            authorization: settings.basic_auth.as_ref().map(basic),
            token,
            scope: scope.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect(),
        })
    }

    /// For a plain HTTP server on this host.
    pub(super) fn local(address: std::net::SocketAddr) -> Result<Self, crate::control::ControlError> {
        let address =
            AgentAddress::Http { host: address.ip().to_string(), port: address.port(), tls: false, prefix: String::new() };
        Self::new(&Consul { address, tls: AgentTls::default(), ..Consul::default() }, None)
    }

    pub(super) async fn get(&self, path: &str) -> Result<Answer, HttpError> {
        self.call(Method::GET, path, None).await
    }

    pub(super) async fn put(&self, path: &str, body: &serde_json::Value) -> Result<Answer, HttpError> {
        self.call(Method::PUT, path, Some(body)).await
    }

    pub(super) async fn post(&self, path: &str, body: &serde_json::Value) -> Result<Answer, HttpError> {
        self.call(Method::POST, path, Some(body)).await
    }

    async fn call(&self, method: Method, path: &str, body: Option<&serde_json::Value>) -> Result<Answer, HttpError> {
        tokio::time::timeout(CALL_TIMEOUT, self.exchange(method, path, body))
            .await
            .unwrap_or_else(|_| Err(HttpError::Timeout { address: self.authority.clone() }))
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&serde_json::Value>) -> Result<Answer, HttpError> {
        let address = || self.authority.clone();
        let detail = |detail: String| HttpError::Answer { address: address(), detail };
        let request = self.request(method, path, body).map_err(|error| detail(error.to_string()))?;
        let stream = self
            .connector
            .clone()
            .call(Uri::default())
            .await
            .map_err(|source| HttpError::Connect { address: address(), source })?;
        let exchange = |source| HttpError::Exchange { address: address(), source };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(exchange)?;
        // Its errors reach the request as well.
        let driver = tokio::spawn(async move { drop(connection.await) });
        let response = sender.send_request(request).await.map_err(exchange)?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let date = header("date").and_then(http_date);
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| detail(format!("the answer broke off or is larger than {BODY_BYTES_MAX} bytes: {error}")))?
            .to_bytes();
        driver.abort();
        Ok(Answer { status, date, body })
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let mut target = format!("{}{path}", self.prefix);
        for (name, value) in &self.scope {
            let separator = if target.contains('?') { '&' } else { '?' };
            target = format!("{target}{separator}{name}={}", encode(value));
        }
        let mut request = Request::builder().method(method).uri(target).header("host", &self.authority);
        if let Some(token) = &self.token {
            request = request.header("x-consul-token", token.as_str());
        }
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization.as_str());
        }
        let body = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        request.body(Full::new(body))
    }
}

impl Answer {
    pub(super) fn is_ok(&self) -> bool {
        self.status == 200
    }

    /// The body as JSON, `Null` if it is none.
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// Status and the start of the body, for messages. Error bodies of Consul hold no secrets.
    pub(super) fn text(&self) -> String {
        let text: String = String::from_utf8_lossy(&self.body).trim().chars().take(TEXT_CHARS_MAX).collect();
        format!("HTTP {}: {text}", self.status)
    }
}

/// One path segment or query value.
pub(super) fn encode(text: &str) -> String {
    const KEPT: percent_encoding::AsciiSet =
        percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    const ENCODED: &percent_encoding::AsciiSet = &KEPT;
    percent_encoding::utf8_percent_encode(text, ENCODED).to_string()
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the only form that servers write today.
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day = words.next()?.parse().ok()?;
    let month_name = words.next()?;
    let month = u8::try_from(MONTHS.iter().position(|month| *month == month_name)? + 1).ok()?;
    let year = words.next()?.parse().ok()?;
    let mut clock = words.next()?.splitn(3, ':').map(|part| part.parse::<u8>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let date = time::Date::from_calendar_date(year, month.try_into().ok()?, day).ok()?;
    let time = time::Time::from_hms(hour, minute, second.min(59)).ok()?;
    Some(time::PrimitiveDateTime::new(date, time).assume_utc().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_dates_are_read() {
        let date = http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("the standard's own example");
        assert_eq!(date.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs(), 784_111_777);
        for bad in ["", "Sun", "Sun, 06 Nov", "Sun, 99 Nov 1994 08:49:37 GMT", "Sun, 06 Foo 1994 08:49:37 GMT"] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn scope_token_and_prefix_are_on_every_call_and_the_token_in_no_debug() {
        let settings = Consul {
            address: AgentAddress::Http { host: "::1".into(), port: 8_500, tls: false, prefix: "/consul".into() },
            namespace: Some("team a".into()),
            basic_auth: Some(Zeroizing::new("user:pass".into())),
            ..Consul::default()
        };
        let http = Http::new(&settings, Some(Zeroizing::new("t0ken".into()))).expect("valid");
        let request = http.request(Method::GET, "/v1/agent/services?x=y", None).expect("valid");
        assert_eq!(request.uri(), "/consul/v1/agent/services?x=y&ns=team%20a");
        assert_eq!(request.headers()["x-consul-token"], "t0ken");
        assert_eq!(request.headers()["authorization"], "Basic dXNlcjpwYXNz");
        assert_eq!(request.headers()["host"], "[::1]:8500");
    }

    #[test]
    fn names_cannot_leave_their_place_in_the_path() {
        assert_eq!(encode("web-1_a.b~c"), "web-1_a.b~c");
        assert_eq!(encode("../a?b=c&d#e%/é"), "..%2Fa%3Fb%3Dc%26d%23e%25%2F%C3%A9");
    }

    proptest::proptest! {
        #[test]
        fn no_date_panics(text in "\\PC{0,40}") {
            let _ = http_date(&text);
        }
    }
}
