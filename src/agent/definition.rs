//! Service and check definitions: from Consul's documents to typed values, with Consul's own refusals.
//!
//! Invariant: a [`Definition`] is valid by itself: it has a name, its checks can run here, a proxy has a destination. What needs
//! the catalog (a free sidecar port, an existing service) is decided by `state`. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::duration;
use super::schema::{self, DecodeError, Shape};

/// Most checks of one service.
pub(super) const SERVICE_CHECKS_MAX: usize = 32;
/// Most upstreams of one proxy.
pub(super) const UPSTREAMS_MAX: usize = 256;

/// Why a definition was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DefinitionError {
    /// The document does not have Consul's shape.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The shape is right, the meaning is not; the text is Consul's where Consul has one.
    #[error("{0}")]
    Invalid(String),
}

/// A service as somebody registered it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Definition {
    /// Empty for an ordinary service, `connect-proxy` for a sidecar.
    pub(super) kind: String,
    #[serde(rename = "ID")]
    pub(super) id: String,
    pub(super) name: String,
    pub(super) tags: Vec<String>,
    pub(super) address: String,
    pub(super) tagged_addresses: BTreeMap<String, TaggedAddress>,
    pub(super) meta: BTreeMap<String, String>,
    pub(super) port: u16,
    pub(super) socket_path: String,
    check: Option<CheckDefinition>,
    pub(super) checks: Vec<CheckDefinition>,
    pub(super) weights: Option<Weights>,
    pub(super) enable_tag_override: bool,
    pub(super) proxy: Option<Proxy>,
    pub(super) connect: Option<Connect>,
    namespace: String,
    partition: String,
}

/// One of `TaggedAddresses`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct TaggedAddress {
    pub(super) address: String,
    pub(super) port: u16,
}

/// Load-balancing weights by health.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Weights {
    pub(super) passing: u32,
    pub(super) warning: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self { passing: 1, warning: 1 }
    }
}

/// `connect {}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Connect {
    pub(super) native: bool,
    pub(super) sidecar_service: Option<Box<Definition>>,
}

/// `proxy {}`, in the order and with the omissions of Consul's answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Proxy {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) destination_service_name: String,
    #[serde(rename = "DestinationServiceID", skip_serializing_if = "String::is_empty")]
    pub(super) destination_service_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) local_service_address: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) local_service_port: u16,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) local_service_socket_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) mode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) transparent_proxy: Option<Value>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) config: Map<String, Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) upstreams: Vec<Upstream>,
    pub(super) mesh_gateway: Map<String, Value>,
    pub(super) expose: Map<String, Value>,
}

/// One of `upstreams`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Upstream {
    pub(super) destination_type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) destination_namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) destination_partition: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) destination_peer: String,
    pub(super) destination_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) datacenter: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) local_bind_address: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) local_bind_port: u16,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) local_bind_socket_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) local_bind_socket_mode: String,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) config: Map<String, Value>,
    pub(super) mesh_gateway: Map<String, Value>,
}

/// A check as somebody registered it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct CheckDefinition {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "CheckID")]
    check_id: String,
    pub(super) name: String,
    pub(super) notes: String,
    #[serde(rename = "ServiceID")]
    pub(super) service_id: String,
    pub(super) status: String,
    script_args: Vec<String>,
    args: Vec<String>,
    #[serde(rename = "HTTP")]
    pub(super) http: String,
    #[serde(rename = "H2PING")]
    h2ping: String,
    #[serde(rename = "TCP")]
    pub(super) tcp: String,
    #[serde(rename = "UDP")]
    udp: String,
    #[serde(rename = "GRPC")]
    grpc: String,
    #[serde(rename = "DockerContainerID")]
    docker_container_id: String,
    interval: String,
    timeout: String,
    #[serde(rename = "TTL")]
    ttl: String,
    pub(super) alias_service: String,
    deregister_critical_service_after: String,
}

impl CheckDefinition {
    /// A TCP check.
    pub(super) fn tcp(name: &str, target: String, interval: Duration) -> Self {
        Self { name: name.to_owned(), tcp: target, interval: duration::format(interval), ..Self::default() }
    }

    /// A check that nothing feeds.
    pub(super) fn bare(name: &str, notes: &str, status: &str) -> Self {
        Self { name: name.to_owned(), notes: notes.to_owned(), status: status.to_owned(), ..Self::default() }
    }

    /// An alias of another service's health.
    pub(super) fn alias(service_id: &str) -> Self {
        let name = format!("Connect Sidecar Aliasing {service_id}");
        Self { name, alias_service: service_id.to_owned(), ..Self::default() }
    }

    /// The id given, if any.
    pub(super) fn given_id(&self) -> Option<&str> {
        [&self.check_id, &self.id].into_iter().map(String::as_str).find(|id| !id.is_empty())
    }

    /// How often it runs.
    pub(super) fn interval(&self) -> Option<Duration> {
        duration::parse(&self.interval).filter(|found| !found.is_zero())
    }

    /// How long one run may take; Consul's default is 10 s.
    pub(super) fn timeout(&self) -> Duration {
        duration::parse(&self.timeout).filter(|found| !found.is_zero()).unwrap_or(Duration::from_secs(10))
    }

    /// Its time to live, for a TTL check.
    pub(super) fn ttl(&self) -> Option<Duration> {
        duration::parse(&self.ttl).filter(|found| !found.is_zero())
    }

    /// After how long in `critical` the service goes away.
    pub(super) fn deregister_after(&self) -> Option<Duration> {
        duration::parse(&self.deregister_critical_service_after).filter(|found| !found.is_zero())
    }

    /// Refuses what cannot run here, with Consul's text where it has one.
    pub(super) fn validate(&self) -> Result<(), DefinitionError> {
        let invalid = |text: &str| Err(DefinitionError::Invalid(text.to_owned()));
        if !matches!(self.status.as_str(), "" | "passing" | "warning" | "critical") {
            return invalid("Status for checks must 'passing', 'warning', 'critical'");
        }
        if !self.args.is_empty() || !self.script_args.is_empty() || !self.docker_container_id.is_empty() {
            return invalid(
                "Scripts are disabled on this agent from remote calls; the embedded agent never runs them: use tcp, http, ttl or alias",
            );
        }
        if !self.grpc.is_empty() || !self.udp.is_empty() || !self.h2ping.is_empty() {
            return invalid("gRPC, UDP and H2PING checks are not run by the embedded agent: use tcp, http, ttl or alias");
        }
        if self.http.starts_with("https://") {
            return invalid("HTTPS checks are not run by the embedded agent: use a tcp check");
        }
        let polled = !self.tcp.is_empty() || !self.http.is_empty();
        if polled && self.interval().is_none() {
            return invalid("Invalid check: Interval must be > 0 for Script, HTTP, or TCP checks");
        }
        if polled && self.ttl().is_some() {
            return invalid("Invalid check: Interval and TTL cannot both be specified");
        }
        if !polled && self.ttl().is_none() && self.alias_service.is_empty() {
            return invalid("Invalid check: TTL must be > 0 for TTL checks");
        }
        Ok(())
    }
}

impl Definition {
    /// Decodes and validates a document of `PUT /v1/agent/service/register` or a file's `service`.
    pub(super) fn decode(document: Value) -> Result<Self, DefinitionError> {
        let document = unalias(schema::normalise(Shape::Struct(&schema::SERVICE), document, "", 0)?);
        let mut definition: Self =
            serde_json::from_value(document).map_err(|error| DefinitionError::Invalid(error.to_string()))?;
        definition.settle();
        definition.validate()?;
        Ok(definition)
    }

    /// Fills what Consul fills before validating.
    pub(super) fn settle(&mut self) {
        if self.id.is_empty() {
            self.id = self.name.clone();
        }
        self.checks.extend(self.check.take());
        // Consul's own command line sends a check without a field for "no check".
        self.checks.retain(|check| *check != CheckDefinition::default());
        if let Some(proxy) = &mut self.proxy {
            for upstream in proxy.upstreams.iter_mut().filter(|upstream| upstream.destination_type.is_empty()) {
                upstream.destination_type = "service".to_owned();
            }
        }
        if let Some(sidecar) = self.connect.as_mut().and_then(|connect| connect.sidecar_service.as_mut()) {
            sidecar.checks.extend(sidecar.check.take());
            sidecar.checks.retain(|check| *check != CheckDefinition::default());
        }
    }

    fn validate(&self) -> Result<(), DefinitionError> {
        if self.name.is_empty() {
            return Err(DefinitionError::Invalid("Missing service name".to_owned()));
        }
        for (what, name) in [("namespace", &self.namespace), ("partition", &self.partition)] {
            if !matches!(name.as_str(), "" | "default") {
                return Err(DefinitionError::Invalid(format!("Invalid {what} {name:?}: a Consul Enterprise feature")));
            }
        }
        if self.checks.len() > SERVICE_CHECKS_MAX {
            return Err(DefinitionError::Invalid(format!("{} checks are more than {SERVICE_CHECKS_MAX}", self.checks.len())));
        }
        self.checks.iter().try_for_each(CheckDefinition::validate)?;
        match self.kind.as_str() {
            "connect-proxy" => self.validate_proxy()?,
            "" | "mesh-gateway" | "terminating-gateway" | "ingress-gateway" => {}
            other => {
                return Err(DefinitionError::Invalid(format!(
                    "unknown service kind {other:?}: leave it out or use connect-proxy"
                )));
            }
        }
        if let Some(sidecar) = self.connect.as_ref().and_then(|connect| connect.sidecar_service.as_ref()) {
            sidecar.validate_sidecar(self)?;
        }
        Ok(())
    }

    /// `sidecar_service {}` inside `parent`: what it may not say.
    fn validate_sidecar(&self, parent: &Self) -> Result<(), DefinitionError> {
        let problem = if parent.kind == "connect-proxy" {
            "a connect-proxy cannot have a SidecarService of its own"
        } else if !self.id.is_empty() {
            "A SidecarService cannot specify an ID as this is managed by the agent"
        } else if self.connect.as_ref().is_some_and(|connect| connect.sidecar_service.is_some()) {
            "A SidecarService cannot have a nested SidecarService"
        } else if self.connect.as_ref().is_some_and(|connect| connect.native) {
            "A SidecarService cannot be Connect native"
        } else {
            ""
        };
        if !problem.is_empty() {
            return Err(listed(&[problem.to_owned()]));
        }
        self.checks.iter().try_for_each(CheckDefinition::validate)?;
        match &self.proxy {
            Some(proxy) => proxy.problems().map_or(Ok(()), Err),
            None => Ok(()),
        }
    }

    fn validate_proxy(&self) -> Result<(), DefinitionError> {
        let mut problems = Vec::new();
        if self.proxy.as_ref().is_none_or(|proxy| proxy.destination_service_name.is_empty()) {
            problems.push("Proxy.DestinationServiceName must be non-empty for Connect proxy services".to_owned());
        }
        if self.port == 0 && self.socket_path.is_empty() {
            problems.push("Port must be set for a Connect proxy".to_owned());
        }
        if self.connect.as_ref().is_some_and(|connect| connect.native) {
            problems.push("A Proxy cannot also be Connect Native, only typical services".to_owned());
        }
        if !problems.is_empty() {
            return Err(listed(&problems));
        }
        self.proxy.as_ref().and_then(Proxy::problems).map_or(Ok(()), Err)
    }
}

impl Proxy {
    fn problems(&self) -> Option<DefinitionError> {
        let mut problems = Vec::new();
        if self.upstreams.len() > UPSTREAMS_MAX {
            problems.push(format!("{} upstreams are more than {UPSTREAMS_MAX}", self.upstreams.len()));
        }
        for (at, upstream) in self.upstreams.iter().enumerate() {
            if upstream.destination_name.is_empty() {
                problems.push("upstream destination name cannot be empty".to_owned());
            }
            if upstream.local_bind_port == 0 && upstream.local_bind_socket_path.is_empty() {
                problems.push("upstream local bind port cannot be zero".to_owned());
            }
            if !matches!(upstream.destination_type.as_str(), "" | "service" | "prepared_query") {
                problems.push(format!("unknown upstream destination type {:?}", upstream.destination_type));
            }
            if self.upstreams[..at].iter().any(|other| other.listens_like(upstream)) {
                problems.push(format!("upstreams cannot share the local listener of {:?}", upstream.destination_name));
            }
        }
        (!problems.is_empty()).then(|| listed(&problems))
    }
}

impl Upstream {
    fn listens_like(&self, other: &Self) -> bool {
        (&self.local_bind_address, self.local_bind_port, &self.local_bind_socket_path)
            == (&other.local_bind_address, other.local_bind_port, &other.local_bind_socket_path)
    }
}

/// Consul's list of several errors in one text.
fn listed(problems: &[String]) -> DefinitionError {
    let count = if problems.len() == 1 { "1 error".to_owned() } else { format!("{} errors", problems.len()) };
    let lines: String = problems.iter().map(|problem| format!("\t* {problem}\n")).collect();
    DefinitionError::Invalid(format!("{count} occurred:\n{lines}\n"))
}

/// `Service` is another name of `Name`; a `Config` block in HCL is a list of one object.
fn unalias(mut document: Value) -> Value {
    if let Value::Object(fields) = &mut document {
        if let Some(name) = fields.remove("Service") {
            fields.entry("Name").or_insert(name);
        }
        for key in ["Proxy", "Connect", "SidecarService"] {
            if let Some(inner) = fields.remove(key) {
                fields.insert(key.to_owned(), unalias(inner));
            }
        }
        if let Some(Value::Array(upstreams)) = fields.get_mut("Upstreams") {
            upstreams.iter_mut().for_each(|upstream| *upstream = unalias(upstream.take()));
        }
        if let Some(Value::Array(items)) = fields.get_mut("Config")
            && items.len() == 1
        {
            let only = items.remove(0);
            fields.insert("Config".to_owned(), only);
        }
    }
    document
}

fn is_zero(port: &u16) -> bool {
    *port == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(document: Value) -> String {
        Definition::decode(document).expect_err("refused").to_string()
    }

    #[test]
    fn refusals_are_consuls() {
        assert_eq!(refusal(json!({"Port": 1})), "Missing service name");
        assert_eq!(
            refusal(json!({"Name": "x", "Kind": "connect-proxy"})),
            "2 errors occurred:\n\t* Proxy.DestinationServiceName must be non-empty for Connect proxy services\n\
             \t* Port must be set for a Connect proxy\n\n"
        );
        assert_eq!(
            refusal(json!({"Name": "x", "Kind": "connect-proxy", "Port": 1,
                "Proxy": {"DestinationServiceName": "z", "Upstreams": [{"DestinationName": "q"}]}})),
            "1 error occurred:\n\t* upstream local bind port cannot be zero\n\n"
        );
        assert_eq!(
            refusal(json!({"Name": "x", "Connect": {"SidecarService": {"ID": "foo"}}})),
            "1 error occurred:\n\t* A SidecarService cannot specify an ID as this is managed by the agent\n\n"
        );
        assert_eq!(
            refusal(json!({"Name": "x", "Check": {"TCP": "a"}})),
            "Invalid check: Interval must be > 0 for Script, HTTP, or TCP checks"
        );
        assert_eq!(
            refusal(json!({"Name": "x", "Check": {"TCP": "a", "Interval": "1s", "Status": "foo"}})),
            "Status for checks must 'passing', 'warning', 'critical'"
        );
        assert!(refusal(json!({"Name": "x", "Check": {"Args": ["a"], "Interval": "1s"}})).starts_with("Scripts are disabled"));
        assert!(refusal(json!({"Name": "x", "Port": 70_000})).contains("70000"));
    }

    #[test]
    fn an_empty_check_is_no_check() {
        let empty = json!({"Interval": "0s", "TTL": "", "Header": {}, "ScriptArgs": null});
        let definition = Definition::decode(json!({"Name": "web", "Check": empty, "Checks": [empty]})).expect("valid");
        assert!(definition.checks.is_empty());
    }

    #[test]
    fn an_upstream_is_a_service_unless_it_says_otherwise() {
        let definition = Definition::decode(json!({"name": "web-proxy", "kind": "connect-proxy", "port": 1, "proxy": {
            "destination_service_name": "web", "config": [{"protocol": "tcp"}],
            "upstreams": [{"destination_name": "db", "local_bind_port": 2}]}}))
        .expect("valid");
        let proxy = definition.proxy.expect("a proxy");
        assert_eq!(proxy.upstreams[0].destination_type, "service");
        assert_eq!(proxy.config["protocol"], "tcp");
        assert_eq!(definition.id, "web-proxy");
    }

    #[test]
    fn two_upstreams_cannot_share_a_listener() {
        let upstream = json!({"destination_name": "db", "local_bind_port": 2});
        let text = refusal(json!({"name": "p", "kind": "connect-proxy", "port": 1,
            "proxy": {"destination_service_name": "web", "upstreams": [upstream.clone(), upstream]}}));
        assert!(text.contains("cannot share the local listener of \"db\""), "{text}");
    }
}
