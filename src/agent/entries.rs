//! Config entries: what `PUT /v1/config` takes, kept in canonical form.
//!
//! Invariant: a stored [`Entry`] decoded strictly and passed its kind's own rules, so the readers (`central`, `chain`, `intentions`)
//! never meet a malformed one. Pure.

use serde_json::{Map, Value, json};

use super::intentions;
use super::schema::{self, DecodeError, Shape, Struct};

/// Kinds that this agent keeps. L7 kinds (routers, splitters, gateways) are refused: this is an L4 tool.
pub(super) const KINDS: [&str; 5] = ["proxy-defaults", "service-defaults", "service-resolver", "service-intentions", "mesh"];

/// Why an entry was refused; Consul answers 400 for the first three and 500 for the last.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum EntryError {
    /// No `Kind`.
    #[error("Payload does not contain a kind/Kind key at the top level")]
    NoKind,
    /// A kind that this agent does not keep.
    #[error("invalid config entry kind: {0}")]
    Kind(String),
    /// The document does not have the kind's shape.
    #[error("1 error occurred:\n\t* {}\n\n", shape_text(.0))]
    Decode(DecodeError),
    /// The shape is right, the meaning is not.
    #[error("{0}")]
    Invalid(String),
}

/// One config entry.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) kind: String,
    pub(super) name: String,
    /// Everything but kind, name and indexes.
    pub(super) body: Map<String, Value>,
    pub(super) create_index: u64,
    pub(super) modify_index: u64,
    /// Whether the agent's file defines it.
    pub(super) from_file: bool,
}

impl Entry {
    /// Decodes and validates a document.
    pub(super) fn decode(document: Value) -> Result<Self, EntryError> {
        let kind = document
            .as_object()
            .and_then(|fields| fields.iter().find(|(key, _)| key.eq_ignore_ascii_case("kind")))
            .and_then(|(_, kind)| kind.as_str())
            .ok_or(EntryError::NoKind)?
            .to_owned();
        let shape = shape(&kind).ok_or_else(|| EntryError::Kind(kind.clone()))?;
        let document = schema::normalise(Shape::Struct(shape), document, "", 0).map_err(EntryError::Decode)?;
        let Value::Object(mut body) = document else {
            return Err(EntryError::NoKind);
        };
        let mut name = body.get("Name").and_then(Value::as_str).unwrap_or_default().to_owned();
        for key in ["Kind", "Name", "Namespace", "Partition", "CreateIndex", "ModifyIndex"] {
            body.remove(key);
        }
        unwrap_config(&mut body);
        match kind.as_str() {
            "proxy-defaults" => name = "global".to_owned(),
            "mesh" => name = "mesh".to_owned(),
            _ if name.is_empty() => return Err(EntryError::Invalid("Name is required".to_owned())),
            "service-defaults" => check_defaults(&body)?,
            "service-resolver" => check_resolver(&body)?,
            "service-intentions" => intentions::check_sources(&name, &mut body).map_err(EntryError::Invalid)?,
            _ => {}
        }
        Ok(Self { kind, name, body, create_index: 0, modify_index: 0, from_file: false })
    }

    /// An entry that says nothing yet.
    pub(super) fn empty(kind: &str, name: &str) -> Self {
        let (kind, name) = (kind.to_owned(), name.to_owned());
        Self { kind, name, body: Map::new(), create_index: 0, modify_index: 0, from_file: false }
    }

    /// The entry as Consul prints it.
    pub(super) fn to_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("Kind".to_owned(), json!(self.kind));
        if self.kind != "mesh" {
            out.insert("Name".to_owned(), json!(self.name));
        }
        out.extend(self.body.clone());
        let always: &[&str] = match self.kind.as_str() {
            "proxy-defaults" => &["Config", "MeshGateway", "Expose"],
            "service-defaults" => &["MeshGateway", "Expose"],
            _ => &[],
        };
        for key in always {
            out.entry(*key).or_insert_with(|| json!({}));
        }
        out.insert("CreateIndex".to_owned(), json!(self.create_index));
        out.insert("ModifyIndex".to_owned(), json!(self.modify_index));
        Value::Object(out)
    }
}

fn shape(kind: &str) -> Option<&'static Struct> {
    match kind {
        "proxy-defaults" => Some(&schema::PROXY_DEFAULTS),
        "service-defaults" => Some(&schema::SERVICE_DEFAULTS),
        "service-resolver" => Some(&schema::SERVICE_RESOLVER),
        "service-intentions" => Some(&schema::SERVICE_INTENTIONS),
        "mesh" => Some(&schema::MESH),
        _ => None,
    }
}

/// Consul's own words for an unknown field of a config entry.
fn shape_text(error: &DecodeError) -> String {
    match error {
        DecodeError::Unknown { path, name } if path.is_empty() => format!("invalid config key {name:?}"),
        DecodeError::Unknown { path, name } => format!("invalid config key \"{path}.{name}\""),
        other => other.to_string(),
    }
}

/// HCL gives `config {}` as a list of one object.
fn unwrap_config(body: &mut Map<String, Value>) {
    if let Some(Value::Array(items)) = body.get_mut("Config")
        && items.len() == 1
    {
        let only = items.remove(0);
        body.insert("Config".to_owned(), only);
    }
}

fn check_defaults(body: &Map<String, Value>) -> Result<(), EntryError> {
    match body.get("Protocol").and_then(Value::as_str) {
        None | Some("" | "tcp" | "http" | "http2" | "grpc") => Ok(()),
        Some(other) => {
            Err(EntryError::Invalid(format!("unknown protocol {other:?}: use tcp (or http, http2, grpc, carried as tcp)")))
        }
    }
}

fn check_resolver(body: &Map<String, Value>) -> Result<(), EntryError> {
    let subsets = body.get("Subsets").and_then(Value::as_object);
    let known = |subset: &str| subset.is_empty() || subsets.is_some_and(|subsets| subsets.contains_key(subset));
    let invalid = |text: String| Err(EntryError::Invalid(text));
    if let Some(subset) = body.get("DefaultSubset").and_then(Value::as_str).filter(|subset| !known(subset)) {
        return invalid(format!("DefaultSubset {subset:?} is not a valid subset"));
    }
    if let Some(redirect) = body.get("Redirect").and_then(Value::as_object)
        && redirect.is_empty()
    {
        return invalid("Redirect is empty".to_owned());
    }
    for (subset, failover) in body.get("Failover").and_then(Value::as_object).into_iter().flatten() {
        if subset != "*" && !known(subset) {
            return invalid(format!("Bad Failover[{subset:?}]: not a valid subset"));
        }
        if failover.as_object().is_none_or(Map::is_empty) {
            return invalid(format!(
                "Bad Failover[{subset:?}] one of Service, ServiceSubset, Targets or Datacenters is required"
            ));
        }
    }
    let policy = body.get("LoadBalancer").and_then(|balancer| balancer.get("Policy")).and_then(Value::as_str).unwrap_or_default();
    if !matches!(policy, "" | "random" | "round_robin" | "least_request" | "ring_hash" | "maglev") {
        return invalid(format!("Bad LoadBalancer policy: unsupported policy {policy:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(document: Value) -> String {
        Entry::decode(document).expect_err("refused").to_string()
    }

    #[test]
    fn refusals_are_consuls() {
        assert_eq!(refusal(json!({"Name": "web"})), "Payload does not contain a kind/Kind key at the top level");
        assert_eq!(refusal(json!({"Kind": "nope"})), "invalid config entry kind: nope");
        assert_eq!(
            refusal(json!({"Kind": "service-resolver", "Name": "web", "Foo": 1})),
            "1 error occurred:\n\t* invalid config key \"Foo\"\n\n"
        );
        assert_eq!(
            refusal(json!({"Kind": "service-resolver", "Name": "web", "DefaultSubset": "v1"})),
            "DefaultSubset \"v1\" is not a valid subset"
        );
        assert_eq!(
            refusal(json!({"Kind": "service-resolver", "Name": "web", "Failover": {"v9": {"Service": "q"}}})),
            "Bad Failover[\"v9\"]: not a valid subset"
        );
        assert!(refusal(json!({"Kind": "service-defaults", "Name": "web", "Protocol": "udp"})).contains("\"udp\""));
    }

    #[test]
    fn an_entry_prints_as_consul_prints_it() {
        let mut entry = Entry::decode(json!({"kind": "service-defaults", "name": "web", "protocol": "tcp"})).expect("valid");
        (entry.create_index, entry.modify_index) = (32, 33);
        assert_eq!(
            entry.to_json(),
            json!({"Kind": "service-defaults", "Name": "web", "Protocol": "tcp", "MeshGateway": {}, "Expose": {},
                   "CreateIndex": 32, "ModifyIndex": 33})
        );
        let global = Entry::decode(json!({"Kind": "proxy-defaults", "Name": "web"})).expect("valid");
        assert_eq!(global.name, "global");
    }
}
