//! A blocking HTTP client for Consul's API and the admin port.

use std::time::Duration;

use serde_json::Value;

/// Longer than any answer without a blocking query.
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Clone)]
pub struct Client {
    base: String,
    token: Option<String>,
    agent: ureq::Agent,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.body))
    }

    /// Fails unless the status is 200.
    pub fn ok(self, what: &str) -> Self {
        assert_eq!(self.status, 200, "{what}: {}", self.body);
        self
    }
}

impl Client {
    pub fn new(address: std::net::SocketAddr, token: Option<&str>) -> Self {
        // One connection a request: an idle one would count against the agent's limit of 200.
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .proxy(None)
            .max_idle_connections(0)
            .build();
        Self { base: format!("http://{address}"), token: token.map(str::to_owned), agent: config.into() }
    }

    pub fn try_get(&self, path: &str) -> Result<Answer, String> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.header("X-Consul-Token", token);
        }
        answer(request.call())
    }

    pub fn try_delete(&self, path: &str) -> Result<Answer, String> {
        let mut request = self.agent.delete(format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.header("X-Consul-Token", token);
        }
        answer(request.call())
    }

    pub fn try_put(&self, path: &str, body: &Value) -> Result<Answer, String> {
        self.send(self.agent.put(format!("{}{path}", self.base)), body)
    }

    pub fn try_post(&self, path: &str, body: &Value) -> Result<Answer, String> {
        self.send(self.agent.post(format!("{}{path}", self.base)), body)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.try_get(path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.try_delete(path).unwrap_or_else(|error| panic!("DELETE {path}: {error}"))
    }

    pub fn put(&self, path: &str, body: &Value) -> Answer {
        self.try_put(path, body).unwrap_or_else(|error| panic!("PUT {path}: {error}"))
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.try_post(path, body).unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    fn send(&self, mut request: ureq::RequestBuilder<ureq::typestate::WithBody>, body: &Value) -> Result<Answer, String> {
        if let Some(token) = &self.token {
            request = request.header("X-Consul-Token", token);
        }
        // `null` stands for no body at all.
        answer(if body.is_null() { request.send_empty() } else { request.send(body.to_string()) })
    }
}

fn answer(result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Answer, String> {
    let mut response = result.map_err(|error| error.to_string())?;
    let body = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
    Ok(Answer { status: response.status().as_u16(), body })
}
