//! How Consul prints what the agent knows: nodes, services, checks and catalog rows, field by field and in its order.
//!
//! Invariant: the shapes are those captured from real agents (1.8 and 1.10); central configuration is merged in. Pure.

use std::time::SystemTime;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::central;
use super::check::{Check, Health};
use super::definition::Definition;
use super::state::{Service, State};

/// RFC 3339 in whole seconds, as certificates have it.
pub(super) fn stamp(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second()
    )
}

/// `GET /v1/agent/service/:id` without its hash, and the values of `GET /v1/agent/services`.
pub(super) fn agent_service(state: &State, service: &Service) -> Map<String, Value> {
    let merged = central::merge(&service.definition, &state.entries);
    let mut out = Map::new();
    if !merged.kind.is_empty() {
        out.insert("Kind".to_owned(), json!(merged.kind));
    }
    let weights = merged.weights.unwrap_or_default();
    for (key, value) in [
        ("ID", json!(merged.id)),
        ("Service", json!(merged.name)),
        ("Tags", json!(merged.tags)),
        ("Meta", json!(merged.meta)),
        ("Port", json!(merged.port)),
        ("Address", json!(merged.address)),
    ] {
        out.insert(key.to_owned(), value);
    }
    if !merged.socket_path.is_empty() {
        out.insert("SocketPath".to_owned(), json!(merged.socket_path));
    }
    if !merged.tagged_addresses.is_empty() {
        out.insert("TaggedAddresses".to_owned(), json!(merged.tagged_addresses));
    }
    out.insert("Weights".to_owned(), json!(weights));
    out.insert("EnableTagOverride".to_owned(), json!(merged.enable_tag_override));
    if let Some(proxy) = merged.proxy.as_ref().filter(|_| !merged.kind.is_empty()) {
        out.insert("Proxy".to_owned(), json!(proxy));
    }
    if merged.connect.as_ref().is_some_and(|connect| connect.native) {
        out.insert("Connect".to_owned(), json!({"Native": true}));
    }
    out.insert("Datacenter".to_owned(), json!(state.settings.datacenter));
    out
}

/// 16 hex digits that change exactly when the definition does.
pub(super) fn content_hash(definition: &Map<String, Value>) -> String {
    let text = Value::Object(definition.clone()).to_string();
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The agent's node.
pub(super) fn node(state: &State) -> Value {
    json!({
        "ID": state.node_id,
        "Node": state.node_name,
        "Address": "127.0.0.1",
        "Datacenter": state.settings.datacenter,
        "TaggedAddresses": tagged(),
        "Meta": {"consul-network-segment": ""},
        "CreateIndex": 1,
        "ModifyIndex": 1,
    })
}

fn tagged() -> Value {
    json!({"lan": "127.0.0.1", "lan_ipv4": "127.0.0.1", "wan": "127.0.0.1", "wan_ipv4": "127.0.0.1"})
}

/// One row of the health endpoints.
pub(super) fn health_entry(state: &State, service: &Service) -> Value {
    let merged = central::merge(&service.definition, &state.entries);
    let mut out = Map::new();
    if !merged.kind.is_empty() {
        out.insert("Kind".to_owned(), json!(merged.kind));
    }
    for (key, value) in [
        ("ID", json!(merged.id)),
        ("Service", json!(merged.name)),
        ("Tags", json!(merged.tags)),
        ("Address", json!(merged.address)),
    ] {
        out.insert(key.to_owned(), value);
    }
    if !merged.tagged_addresses.is_empty() {
        out.insert("TaggedAddresses".to_owned(), json!(merged.tagged_addresses));
    }
    for (key, value) in [
        ("Meta", if merged.meta.is_empty() { Value::Null } else { json!(merged.meta) }),
        ("Port", json!(merged.port)),
        ("Weights", json!(merged.weights.unwrap_or_default())),
        ("EnableTagOverride", json!(merged.enable_tag_override)),
        ("Proxy", proxy(&merged)),
        ("Connect", connect(&merged)),
        ("CreateIndex", json!(service.create_index)),
        ("ModifyIndex", json!(service.modify_index)),
    ] {
        out.insert(key.to_owned(), value);
    }
    let checks: Vec<Value> =
        std::iter::once(serf_check(state)).chain(state.checks_of(&merged.id).map(|c| check(state, c))).collect();
    json!({"Node": node(state), "Service": out, "Checks": checks})
}

/// One row of the catalog endpoints.
pub(super) fn catalog_entry(state: &State, service: &Service) -> Value {
    let merged = central::merge(&service.definition, &state.entries);
    json!({
        "ID": state.node_id,
        "Node": state.node_name,
        "Address": "127.0.0.1",
        "Datacenter": state.settings.datacenter,
        "TaggedAddresses": tagged(),
        "NodeMeta": {"consul-network-segment": ""},
        "ServiceKind": merged.kind,
        "ServiceID": merged.id,
        "ServiceName": merged.name,
        "ServiceTags": merged.tags,
        "ServiceAddress": merged.address,
        "ServiceTaggedAddresses": merged.tagged_addresses,
        "ServiceWeights": merged.weights.unwrap_or_default(),
        "ServiceMeta": merged.meta,
        "ServicePort": merged.port,
        "ServiceSocketPath": merged.socket_path,
        "ServiceEnableTagOverride": merged.enable_tag_override,
        "ServiceProxy": proxy(&merged),
        "ServiceConnect": connect(&merged),
        "CreateIndex": service.create_index,
        "ModifyIndex": service.modify_index,
    })
}

/// One check.
pub(super) fn check(state: &State, check: &Check) -> Value {
    let tags = state.services.get(&check.service_id).map_or_else(Vec::new, |service| service.definition.tags.clone());
    json!({
        "Node": state.node_name,
        "CheckID": check.id,
        "Name": check.name,
        "Status": state.health(check).as_str(),
        "Notes": check.notes,
        "Output": check.output,
        "ServiceID": check.service_id,
        "ServiceName": check.service_name,
        "ServiceTags": tags,
        "Type": check.kind,
        "Interval": "",
        "Timeout": "",
        "ExposedPort": 0,
        "Definition": {},
        "CreateIndex": check.create_index,
        "ModifyIndex": check.modify_index,
    })
}

fn serf_check(state: &State) -> Value {
    json!({
        "Node": state.node_name,
        "CheckID": "serfHealth",
        "Name": "Serf Health Status",
        "Status": Health::Passing.as_str(),
        "Notes": "",
        "Output": "Agent alive and reachable",
        "ServiceID": "",
        "ServiceName": "",
        "ServiceTags": [],
        "Type": "",
        "Interval": "",
        "Timeout": "",
        "ExposedPort": 0,
        "Definition": {},
        "CreateIndex": 1,
        "ModifyIndex": 1,
    })
}

fn proxy(definition: &Definition) -> Value {
    definition.proxy.as_ref().map_or_else(|| json!({"Mode": "", "MeshGateway": {}, "Expose": {}}), |proxy| json!(proxy))
}

fn connect(definition: &Definition) -> Value {
    if definition.connect.as_ref().is_some_and(|connect| connect.native) { json!({"Native": true}) } else { json!({}) }
}

/// `GET …/connect/ca/roots`.
pub(super) fn roots(state: &State) -> Value {
    let active = state.authority.active().id.clone();
    let roots: Vec<Value> = state
        .authority
        .roots()
        .map(|root| {
            json!({
                "ID": root.id,
                "Name": "Consul CA Primary Cert",
                "SerialNumber": root.serial,
                "SigningKeyID": root.signing_key_id,
                "ExternalTrustDomain": state.authority.cluster_id(),
                "NotBefore": stamp(root.not_before),
                "NotAfter": stamp(root.not_after),
                "RootCert": root.pem,
                "IntermediateCerts": root.cross_signed.as_ref().map_or(Value::Null, |pem| json!([pem])),
                "Active": root.id == active,
                "PrivateKeyType": "ec",
                "PrivateKeyBits": 256,
                "CreateIndex": root.create_index,
                "ModifyIndex": root.modify_index,
            })
        })
        .collect();
    json!({"ActiveRootID": active, "TrustDomain": state.authority.trust_domain, "Roots": roots})
}

/// The HTTP status of `GET /v1/agent/health/service/…`.
pub(super) fn health_status(health: Health) -> u16 {
    match health {
        Health::Passing => 200,
        Health::Warning => 429,
        Health::Critical => 503,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::AgentSettings;
    use std::time::Duration;

    #[test]
    fn stamps_are_rfc_3339() {
        assert_eq!(stamp(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_356_107)), "2026-11-22T14:01:47Z");
    }

    #[test]
    fn a_sidecar_prints_as_the_captured_one() {
        let mut state = State::new(AgentSettings::default(), SystemTime::now()).expect("a state");
        let document = json!({"Name": "web", "Port": 8080, "Connect": {"SidecarService": {}}});
        state.register(Definition::decode(document).expect("valid"), false).expect("registered");
        let printed = agent_service(&state, &state.services["web-sidecar-proxy"]);
        assert_eq!(
            Value::Object(printed.clone()).to_string(),
            json!({"Kind": "connect-proxy", "ID": "web-sidecar-proxy", "Service": "web-sidecar-proxy", "Tags": [], "Meta": {},
                "Port": 21000, "Address": "", "Weights": {"Passing": 1, "Warning": 1}, "EnableTagOverride": false,
                "Proxy": {"DestinationServiceName": "web", "DestinationServiceID": "web", "LocalServiceAddress": "127.0.0.1",
                    "LocalServicePort": 8080, "MeshGateway": {}, "Expose": {}}, "Datacenter": "dc1"})
            .to_string()
        );
        assert_eq!(content_hash(&printed).len(), 16);
    }
}
