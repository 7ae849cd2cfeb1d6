//! The discovery chain of a service at L4: one resolver node, its target and the targets to fail over to.
//!
//! Invariant: a compiled chain has every target that its nodes name, and each target's SNI is what the mesh will present.
//! Redirects are followed at most [`REDIRECTS_MAX`] times. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::duration;
use super::state::Entries;

/// Most redirects followed before they count as a circle.
pub(super) const REDIRECTS_MAX: usize = 16;
const CONNECT_TIMEOUT: &str = "5s";

/// Why a chain cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// Redirects go in a circle.
    #[error("detected circular resolver redirect: {0}")]
    Circle(String),
    /// A subset that the service's resolver does not define.
    #[error("service {service:?} does not have a subset named {subset:?}")]
    Subset {
        /// The service.
        service: String,
        /// The subset.
        subset: String,
    },
}

/// What a caller of the compile endpoint overrides.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Overrides {
    override_connect_timeout: String,
    override_protocol: String,
    override_mesh_gateway: Map<String, Value>,
}

/// The world that a chain is compiled in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) entries: &'a Entries,
    pub(super) datacenter: &'a str,
    /// The datacenter to compile for; targets stay there unless an entry says otherwise.
    pub(super) compile_in: &'a str,
    pub(super) trust_domain: &'a str,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Resolver {
    default_subset: String,
    subsets: BTreeMap<String, Map<String, Value>>,
    redirect: Option<Place>,
    failover: BTreeMap<String, Failover>,
    connect_timeout: String,
    load_balancer: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failover {
    service: String,
    service_subset: String,
    datacenters: Vec<String>,
    targets: Vec<Place>,
}

/// Where an entry points; what it leaves out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Place {
    service: String,
    service_subset: String,
    datacenter: String,
}

impl Place {
    fn id(&self) -> String {
        let rest = format!("{}.default.{}", self.service, self.datacenter);
        if self.service_subset.is_empty() { rest } else { format!("{}.{rest}", self.service_subset) }
    }
}

/// Compiles the chain of `service`.
pub(super) fn compile(service: &str, context: Context<'_>, overrides: &Overrides) -> Result<Value, ChainError> {
    let start = Place { service: service.to_owned(), datacenter: context.compile_in.to_owned(), ..Place::default() };
    let (place, resolver) = follow(start, context)?;
    let resolver = resolver.unwrap_or_default();
    let is_default = entry(context, service).is_none();
    let timeout = [&overrides.override_connect_timeout, &resolver.connect_timeout]
        .into_iter()
        .find(|text| duration::parse(text).is_some_and(|found| !found.is_zero()))
        .map_or(CONNECT_TIMEOUT, String::as_str);

    let mut targets = Map::new();
    targets.insert(place.id(), target(&place, context, overrides, timeout)?);
    let mut node = json!({"ConnectTimeout": timeout, "Target": place.id()});
    if is_default {
        node["Default"] = json!(true);
    }
    let mut failover_ids = Vec::new();
    for fallback in failovers(&place, &resolver) {
        let (fallback, _) = follow(fallback, context)?;
        let id = fallback.id();
        if id != place.id() && !failover_ids.contains(&id) {
            targets.insert(id.clone(), target(&fallback, context, overrides, timeout)?);
            failover_ids.push(id);
        }
    }
    if !failover_ids.is_empty() {
        node["Failover"] = json!({"Targets": failover_ids});
    }
    let start_node = format!("resolver:{}", place.id());
    let mut resolver_node = json!({"Type": "resolver", "Name": place.id(), "Resolver": node});
    if let Some(balancer) = resolver.load_balancer {
        resolver_node["LoadBalancer"] = balancer;
    }
    let mut chain = json!({"ServiceName": service, "Namespace": "default", "Datacenter": context.compile_in});
    if let Some(hash) = overrides.hash() {
        chain["CustomizationHash"] = json!(hash);
    }
    chain["Protocol"] = json!(protocol(service, context, overrides));
    chain["StartNode"] = json!(start_node);
    chain["Nodes"] = json!({start_node: resolver_node});
    chain["Targets"] = Value::Object(targets);
    Ok(json!({"Chain": chain}))
}

/// Follows redirects and default subsets from `place` to where they end.
fn follow(mut place: Place, context: Context<'_>) -> Result<(Place, Option<Resolver>), ChainError> {
    let mut trail = vec![place.id()];
    loop {
        let Some(resolver) = entry(context, &place.service) else {
            return if place.service_subset.is_empty() { Ok((place, None)) } else { Err(place.unknown_subset()) };
        };
        let next = match &resolver.redirect {
            Some(redirect) => {
                let mut next = place.clone();
                // A redirect to another service leaves the subset behind.
                if !redirect.service.is_empty() && redirect.service != place.service {
                    (next.service, next.service_subset) = (redirect.service.clone(), String::new());
                }
                if !redirect.service_subset.is_empty() {
                    next.service_subset.clone_from(&redirect.service_subset);
                }
                if !redirect.datacenter.is_empty() {
                    next.datacenter.clone_from(&redirect.datacenter);
                }
                next
            }
            None if place.service_subset.is_empty() && !resolver.default_subset.is_empty() => {
                Place { service_subset: resolver.default_subset.clone(), ..place.clone() }
            }
            None => place.clone(),
        };
        if next == place {
            let known = place.service_subset.is_empty() || resolver.subsets.contains_key(&place.service_subset);
            return if known { Ok((place, Some(resolver))) } else { Err(place.unknown_subset()) };
        }
        trail.push(next.id());
        if trail.len() > REDIRECTS_MAX || trail[..trail.len() - 1].contains(&next.id()) {
            return Err(ChainError::Circle(trail.join(" -> ")));
        }
        place = next;
    }
}

fn failovers(place: &Place, resolver: &Resolver) -> Vec<Place> {
    let Some(failover) = resolver.failover.get(&place.service_subset).or_else(|| resolver.failover.get("*")) else {
        return Vec::new();
    };
    let over = |service: &str, subset: &str, datacenter: &str| {
        let moved = !service.is_empty() && service != place.service;
        let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
        Place {
            service: or(service, &place.service),
            service_subset: if moved { subset.to_owned() } else { or(subset, &place.service_subset) },
            datacenter: or(datacenter, &place.datacenter),
        }
    };
    if !failover.targets.is_empty() {
        return failover.targets.iter().map(|to| over(&to.service, &to.service_subset, &to.datacenter)).collect();
    }
    if failover.datacenters.is_empty() {
        return vec![over(&failover.service, &failover.service_subset, "")];
    }
    failover.datacenters.iter().map(|dc| over(&failover.service, &failover.service_subset, dc)).collect()
}

fn target(place: &Place, context: Context<'_>, overrides: &Overrides, timeout: &str) -> Result<Value, ChainError> {
    let subset = match entry(context, &place.service) {
        Some(resolver) if !place.service_subset.is_empty() => {
            resolver.subsets.get(&place.service_subset).cloned().ok_or_else(|| place.unknown_subset())?
        }
        None if !place.service_subset.is_empty() => return Err(place.unknown_subset()),
        _ => Map::new(),
    };
    let external = context
        .entries
        .get(&("service-defaults".to_owned(), place.service.clone()))
        .and_then(|entry| entry.body.get("ExternalSNI"))
        .and_then(Value::as_str)
        .filter(|sni| !sni.is_empty());
    let name = format!("{}.internal.{}", place.id(), context.trust_domain);
    let mut out = json!({"ConnectTimeout": timeout, "ID": place.id(), "Service": place.service});
    if !place.service_subset.is_empty() {
        out["ServiceSubset"] = json!(place.service_subset);
    }
    out["Namespace"] = json!("default");
    out["Datacenter"] = json!(place.datacenter);
    out["MeshGateway"] = mesh_gateway(place, context, overrides);
    out["Subset"] = Value::Object(subset);
    if external.is_some() {
        out["External"] = json!(true);
    }
    out["SNI"] = json!(external.unwrap_or(&name));
    out["Name"] = json!(name);
    Ok(out)
}

/// Only targets elsewhere have a mesh gateway mode: upstream, then service, then proxy defaults.
fn mesh_gateway(place: &Place, context: Context<'_>, overrides: &Overrides) -> Value {
    if place.datacenter == context.datacenter {
        return json!({});
    }
    if !overrides.override_mesh_gateway.is_empty() {
        return Value::Object(overrides.override_mesh_gateway.clone());
    }
    [("service-defaults", place.service.as_str()), ("proxy-defaults", "global")]
        .into_iter()
        .filter_map(|(kind, name)| context.entries.get(&(kind.to_owned(), name.to_owned())))
        .filter_map(|entry| entry.body.get("MeshGateway"))
        .find(|mode| mode.as_object().is_some_and(|fields| !fields.is_empty()))
        .cloned()
        .unwrap_or_else(|| json!({}))
}

fn protocol(service: &str, context: Context<'_>, overrides: &Overrides) -> String {
    let central = context
        .entries
        .get(&("service-defaults".to_owned(), service.to_owned()))
        .and_then(|entry| entry.body.get("Protocol"))
        .or_else(|| {
            let global = context.entries.get(&("proxy-defaults".to_owned(), "global".to_owned()))?;
            global.body.get("Config")?.get("protocol")
        })
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty());
    match overrides.override_protocol.as_str() {
        "" => central.unwrap_or("tcp").to_owned(),
        named => named.to_owned(),
    }
}

fn entry(context: Context<'_>, service: &str) -> Option<Resolver> {
    let entry = context.entries.get(&("service-resolver".to_owned(), service.to_owned()))?;
    // Stored resolvers decoded strictly, so this view of one cannot fail.
    serde_json::from_value(Value::Object(entry.body.clone())).ok()
}

impl Place {
    fn unknown_subset(&self) -> ChainError {
        ChainError::Subset { service: self.service.clone(), subset: self.service_subset.clone() }
    }
}

impl Overrides {
    /// Names a customised chain: any stable 8 hex digits of what was overridden.
    fn hash(&self) -> Option<String> {
        if self.override_connect_timeout.is_empty() && self.override_protocol.is_empty() && self.override_mesh_gateway.is_empty()
        {
            return None;
        }
        let gateway = Value::Object(self.override_mesh_gateway.clone());
        let text = format!("{}\0{}\0{gateway}", self.override_connect_timeout, self.override_protocol);
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        Some(digest.as_ref()[..4].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::entries::Entry;

    fn compiled(service: &str, documents: &[Value], overrides: Value) -> Result<Value, ChainError> {
        let entries: Entries = documents
            .iter()
            .map(|document| Entry::decode(document.clone()).expect("valid"))
            .map(|entry| ((entry.kind.clone(), entry.name.clone()), entry))
            .collect();
        let overrides: Overrides = serde_json::from_value(overrides).expect("overrides");
        let context = Context { entries: &entries, datacenter: "dc1", compile_in: "dc1", trust_domain: "t.consul" };
        compile(service, context, &overrides).map(|chain| chain["Chain"].clone())
    }

    fn warehouse() -> Vec<Value> {
        vec![
            json!({"Kind": "service-resolver", "Name": "warehouse", "DefaultSubset": "v1", "ConnectTimeout": "3s",
                   "Subsets": {"v1": {"Filter": "Service.Meta.version == v1"},
                               "v2": {"Filter": "Service.Meta.version == v2", "OnlyPassing": true}},
                   "Failover": {"v1": {"ServiceSubset": "v2"}},
                   "LoadBalancer": {"Policy": "least_request", "LeastRequestConfig": {"ChoiceCount": 3}}}),
            json!({"Kind": "service-resolver", "Name": "old-warehouse", "Redirect": {"Service": "warehouse", "ServiceSubset": "v2"}}),
        ]
    }

    #[test]
    fn a_service_without_entries_has_the_default_chain() {
        let chain = compiled("broker", &[], json!({})).expect("compiles");
        assert_eq!(
            chain,
            json!({"ServiceName": "broker", "Namespace": "default", "Datacenter": "dc1", "Protocol": "tcp",
                "StartNode": "resolver:broker.default.dc1",
                "Nodes": {"resolver:broker.default.dc1": {"Type": "resolver", "Name": "broker.default.dc1",
                    "Resolver": {"ConnectTimeout": "5s", "Default": true, "Target": "broker.default.dc1"}}},
                "Targets": {"broker.default.dc1": {"ConnectTimeout": "5s", "ID": "broker.default.dc1", "Service": "broker",
                    "Namespace": "default", "Datacenter": "dc1", "MeshGateway": {}, "Subset": {},
                    "SNI": "broker.default.dc1.internal.t.consul", "Name": "broker.default.dc1.internal.t.consul"}}})
        );
    }

    #[test]
    fn subsets_and_failover_compile_as_consul_compiles_them() {
        let chain = compiled("warehouse", &warehouse(), json!({})).expect("compiles");
        assert_eq!(chain["StartNode"], "resolver:v1.warehouse.default.dc1");
        assert_eq!(
            chain["Nodes"]["resolver:v1.warehouse.default.dc1"],
            json!({"Type": "resolver", "Name": "v1.warehouse.default.dc1",
                "Resolver": {"ConnectTimeout": "3s", "Target": "v1.warehouse.default.dc1",
                             "Failover": {"Targets": ["v2.warehouse.default.dc1"]}},
                "LoadBalancer": {"Policy": "least_request", "LeastRequestConfig": {"ChoiceCount": 3}}})
        );
        assert_eq!(chain["Targets"]["v2.warehouse.default.dc1"]["Subset"]["OnlyPassing"], true);
    }

    #[test]
    fn a_redirect_is_followed_to_the_other_services_subset() {
        let chain = compiled("old-warehouse", &warehouse(), json!({})).expect("compiles");
        assert_eq!(chain["ServiceName"], "old-warehouse");
        assert_eq!(chain["StartNode"], "resolver:v2.warehouse.default.dc1");
        let node = &chain["Nodes"]["resolver:v2.warehouse.default.dc1"]["Resolver"];
        assert_eq!(*node, json!({"ConnectTimeout": "3s", "Target": "v2.warehouse.default.dc1"}));
    }

    #[test]
    fn overrides_win_and_name_the_chain() {
        let chain = compiled("warehouse", &warehouse(), json!({"OverrideConnectTimeout": "2.5s"})).expect("compiles");
        assert_eq!(chain["Nodes"]["resolver:v1.warehouse.default.dc1"]["Resolver"]["ConnectTimeout"], "2.5s");
        assert_eq!(chain["CustomizationHash"].as_str().map(str::len), Some(8));
    }

    #[test]
    fn failover_to_other_datacenters_takes_the_gateway_mode() {
        let documents = [
            json!({"Kind": "service-resolver", "Name": "db", "Failover": {"*": {"Datacenters": ["dc2", "dc3"]}}}),
            json!({"Kind": "proxy-defaults", "Name": "global", "MeshGateway": {"Mode": "local"}}),
        ];
        let chain = compiled("db", &documents, json!({})).expect("compiles");
        assert_eq!(chain["Targets"]["db.default.dc2"]["MeshGateway"], json!({"Mode": "local"}));
        assert_eq!(chain["Targets"]["db.default.dc1"]["MeshGateway"], json!({}));
        let node = &chain["Nodes"]["resolver:db.default.dc1"]["Resolver"];
        assert_eq!(node["Failover"]["Targets"], json!(["db.default.dc2", "db.default.dc3"]));
    }

    #[test]
    fn circles_and_unknown_subsets_are_refused() {
        let documents = [
            json!({"Kind": "service-resolver", "Name": "a", "Redirect": {"Service": "b"}}),
            json!({"Kind": "service-resolver", "Name": "b", "Redirect": {"Service": "a"}}),
            json!({"Kind": "service-resolver", "Name": "c", "Redirect": {"Service": "d", "ServiceSubset": "v1"}}),
        ];
        assert!(matches!(compiled("a", &documents, json!({})), Err(ChainError::Circle(_))));
        assert!(matches!(compiled("c", &documents, json!({})), Err(ChainError::Subset { .. })));
        let own = [json!({"Kind": "service-resolver", "Name": "loop", "Redirect": {"Service": "loop"}})];
        assert_eq!(compiled("loop", &own, json!({})).expect("compiles")["StartNode"], "resolver:loop.default.dc1");
    }
}
