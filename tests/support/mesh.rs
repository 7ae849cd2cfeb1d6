//! What tests ask of a control plane, be it real Consul or the embedded agent: both speak the same HTTP API.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::http::Client;
use super::{PATIENCE, wait_for};

/// A running control plane.
pub trait Mesh {
    /// The agent's HTTP address.
    fn address(&self) -> SocketAddr;
    /// A client with every right.
    fn client(&self) -> Client;
    /// A token for the sidecar of `service`; `None` without ACLs.
    fn token(&self, service: &str) -> Option<String>;
    /// Puts a new root in place. Leaves follow.
    fn rotate_ca(&self);

    fn register(&self, definition: &Definition) {
        let answer = self.client().put("/v1/agent/service/register", &definition.json());
        assert_eq!(answer.status, 200, "registration of {}: {}", definition.name, answer.body);
    }

    fn deregister(&self, id: &str) {
        self.client().put(&format!("/v1/agent/service/deregister/{id}"), &Value::Null).ok("deregistration");
    }

    fn allow(&self, source: &str, destination: &str) {
        self.intend(source, destination, "allow");
    }

    fn deny(&self, source: &str, destination: &str) {
        self.intend(source, destination, "deny");
    }

    /// Creates the intention, or changes its action.
    fn intend(&self, source: &str, destination: &str, action: &str) {
        let body = json!({"SourceName": source, "DestinationName": destination, "SourceType": "consul", "Action": action});
        let answer = match self.intention_id(source, destination) {
            Some(id) => self.client().put(&format!("/v1/connect/intentions/{id}"), &body),
            None => self.client().post("/v1/connect/intentions", &body),
        };
        assert_eq!(answer.status, 200, "intention {source} -> {destination}: {}", answer.body);
    }

    fn delete_intention(&self, source: &str, destination: &str) {
        let id = self.intention_id(source, destination).expect("an intention to delete");
        self.client().delete(&format!("/v1/connect/intentions/{id}")).ok("deletion of an intention");
    }

    fn intention_id(&self, source: &str, destination: &str) -> Option<String> {
        let list = self.client().get("/v1/connect/intentions").ok("list of intentions").json();
        let matches = |one: &&Value| one["SourceName"] == source && one["DestinationName"] == destination;
        Some(list.as_array()?.iter().find(matches)?["ID"].as_str()?.to_owned())
    }

    /// Writes a config entry.
    fn configure(&self, entry: &Value) {
        self.client().put("/v1/config", entry).ok("config entry");
    }

    /// Certificate chain and key of a service, as the agent gives them.
    fn leaf(&self, service: &str) -> Leaf {
        let path = format!("/v1/agent/connect/ca/leaf/{service}");
        let leaf = wait_for("a leaf certificate", PATIENCE, || {
            let answer = self.client().try_get(&path)?;
            if answer.status == 200 { Ok(answer.json()) } else { Err(answer.body) }
        });
        let text = |key: &str| leaf[key].as_str().unwrap_or_else(|| panic!("{key} of a leaf: {leaf}")).to_owned();
        Leaf { chain_pem: text("CertPEM"), key_pem: text("PrivateKeyPEM"), uri: text("ServiceURI"), serial: text("SerialNumber") }
    }

    /// Every root, one PEM after the other.
    fn roots_pem(&self) -> String {
        let roots = self.client().get("/v1/agent/connect/ca/roots").ok("roots").json();
        let roots = roots["Roots"].as_array().expect("a list of roots").clone();
        roots.iter().filter_map(|root| root["RootCert"].as_str()).collect::<Vec<_>>().join("\n")
    }

    fn trust_domain(&self) -> String {
        let roots = self.client().get("/v1/agent/connect/ca/roots").ok("roots").json();
        roots["TrustDomain"].as_str().expect("a trust domain").to_owned()
    }
}

/// What the agent issues for a service.
#[derive(Clone)]
pub struct Leaf {
    pub chain_pem: String,
    pub key_pem: String,
    pub uri: String,
    pub serial: String,
}

/// A service with its sidecar, as registered at the agent.
#[derive(Clone)]
pub struct Definition {
    pub name: String,
    pub id: String,
    /// Where peers come in.
    pub public: SocketAddr,
    /// Where the app listens.
    pub app: Option<SocketAddr>,
    upstreams: Vec<Value>,
    config: Value,
    meta: Value,
    extra: Value,
}

impl Definition {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            id: name.to_owned(),
            public: super::ports::free_address(),
            app: None,
            upstreams: Vec::new(),
            config: json!({}),
            meta: json!({}),
            extra: json!({}),
        }
    }

    pub fn id(mut self, id: &str) -> Self {
        self.id = id.to_owned();
        self
    }

    pub fn app(mut self, app: SocketAddr) -> Self {
        self.app = Some(app);
        self
    }

    pub fn public(mut self, public: SocketAddr) -> Self {
        self.public = public;
        self
    }

    pub fn upstream(self, name: &str, bind: SocketAddr) -> Self {
        self.upstream_with(name, bind, &json!({}))
    }

    /// An upstream with an opaque `config`.
    pub fn upstream_with(self, name: &str, bind: SocketAddr, config: &Value) -> Self {
        self.raw_upstream(json!({"DestinationName": name, "LocalBindAddress": bind.ip().to_string(), "LocalBindPort": bind.port(), "Config": config}))
    }

    pub fn raw_upstream(mut self, upstream: Value) -> Self {
        self.upstreams.push(upstream);
        self
    }

    /// Adds a key to the sidecar's opaque `proxy.config`.
    pub fn config(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config[key] = value.into();
        self
    }

    pub fn meta(mut self, key: &str, value: &str) -> Self {
        self.meta[key] = value.into();
        self
    }

    /// Adds a key to the sidecar's `proxy`.
    pub fn proxy(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.extra[key] = value.into();
        self
    }

    /// The registration. Its check passes at the first turn after the sidecar listens, within a second.
    pub fn json(&self) -> Value {
        let mut proxy = json!({"Upstreams": self.upstreams, "Config": self.config});
        if let Some(app) = self.app {
            proxy["LocalServiceAddress"] = app.ip().to_string().into();
            proxy["LocalServicePort"] = app.port().into();
        }
        for (key, value) in self.extra.as_object().into_iter().flatten() {
            proxy[key] = value.clone();
        }
        let check = json!({"Name": "listening", "TCP": self.public.to_string(), "Interval": "1s", "Timeout": "1s"});
        json!({
            "Name": self.name, "ID": self.id, "Port": self.app.map_or(1, |app| app.port()), "Meta": self.meta,
            "Connect": {"SidecarService": {
                "Address": self.public.ip().to_string(), "Port": self.public.port(), "Proxy": proxy, "Checks": [check],
            }},
        })
    }
}
