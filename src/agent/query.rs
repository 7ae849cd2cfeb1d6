//! Prepared queries: a name for "the healthy instances of a service", as upstreams of type `prepared_query` use them.
//!
//! Invariant: names are unique. Templates, sessions and remote datacenters are refused, not ignored. Pure.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::check::Health;
use super::schema::{self, Shape};
use super::state::{Service, State};
use super::view;

/// Most prepared queries.
pub(super) const QUERIES_MAX: usize = 1_024;

/// A stored query.
#[derive(Debug, Clone)]
pub(super) struct Query {
    pub(super) id: String,
    pub(super) name: String,
    service: Selection,
    ttl: String,
    create_index: u64,
    modify_index: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Selection {
    service: String,
    only_passing: bool,
    tags: Vec<String>,
    service_meta: Map<String, Value>,
    connect: bool,
    failover: Map<String, Value>,
}

/// Decodes a query document; the text of a refusal is Consul's where it has one.
pub(super) fn decode(document: Value, id: String) -> Result<Query, String> {
    let document = schema::normalise(Shape::Struct(&schema::QUERY), document, "", 0)
        .map_err(|error| format!("Request decode failed: {error}"))?;
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if document
        .get("Template")
        .and_then(|template| template.get("Type"))
        .and_then(Value::as_str)
        .is_some_and(|kind| !kind.is_empty())
    {
        return Err(
            "Invalid prepared query: templates are not supported by the embedded agent: define the query by its name".to_owned()
        );
    }
    let service: Selection = serde_json::from_value(document.get("Service").cloned().unwrap_or_else(|| json!({})))
        .map_err(|error| error.to_string())?;
    if service.service.is_empty() {
        return Err("Invalid prepared query: Must provide a Service name to query".to_owned());
    }
    let ttl = document.get("DNS").and_then(|dns| dns.get("TTL")).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(Query { id, name: text("Name"), service, ttl, create_index: 0, modify_index: 0 })
}

impl State {
    /// Stores a query.
    pub(super) fn put_query(&mut self, mut query: Query) -> Result<(), String> {
        let clash = |other: &Query| other.id != query.id && !query.name.is_empty() && other.name == query.name;
        if self.queries.values().any(clash) {
            return Err(format!("name '{}' aliases an existing query name", query.name));
        }
        let old = self.queries.get(&query.id).map(|old| old.create_index);
        if old.is_none() && self.queries.len() >= QUERIES_MAX {
            return Err(format!("the agent is full: {QUERIES_MAX} prepared queries at most"));
        }
        query.modify_index = self.bump([]);
        query.create_index = old.unwrap_or(query.modify_index);
        self.queries.insert(query.id.clone(), query);
        Ok(())
    }

    /// The query of that id or name.
    pub(super) fn find_query(&self, key: &str) -> Option<&Query> {
        self.queries.get(key).or_else(|| self.queries.values().find(|query| query.name == key))
    }

    /// Runs a query; `connect` asks for mesh endpoints whatever the query says.
    pub(super) fn execute(&self, query: &Query, connect: bool) -> Value {
        let nodes: Vec<Value> = self
            .services
            .values()
            .filter(|service| {
                if connect || query.service.connect {
                    super::state::connect_name(&service.definition) == Some(&query.service.service)
                } else {
                    service.definition.name == query.service.service
                }
            })
            .filter(|service| query.selects(service))
            .filter(|service| {
                let health = self.service_health(&service.definition.id);
                health == Health::Passing || (health == Health::Warning && !query.service.only_passing)
            })
            .map(|service| view::health_entry(self, service))
            .collect();
        json!({
            "Service": query.service.service,
            "Nodes": nodes,
            "DNS": {"TTL": query.ttl},
            "Datacenter": self.settings.datacenter,
            "Failovers": 0,
            "Index": 1,
            "LastContact": 0,
            "KnownLeader": true,
            "ConsistencyLevel": "leader",
            "NotModified": false,
            "Backend": 0,
        })
    }
}

impl Query {
    fn selects(&self, service: &Service) -> bool {
        let tags = &service.definition.tags;
        let tagged = self.service.tags.iter().all(|tag| match tag.strip_prefix('!') {
            Some(unwanted) => !tags.iter().any(|have| have == unwanted),
            None => tags.contains(tag),
        });
        let meta = &service.definition.meta;
        tagged && self.service.service_meta.iter().all(|(key, value)| meta.get(key).map(String::as_str) == value.as_str())
    }

    /// The definition as Consul prints it.
    pub(super) fn to_json(&self) -> Value {
        let service = &self.service;
        json!({
            "ID": self.id,
            "Name": self.name,
            "Session": "",
            "Token": "",
            "Template": {"Type": "", "Regexp": "", "RemoveEmptyTags": false},
            "Service": {
                "Service": service.service,
                "Failover": {"NearestN": service.failover.get("NearestN").cloned().unwrap_or_else(|| json!(0)),
                             "Datacenters": service.failover.get("Datacenters").cloned().unwrap_or(Value::Null)},
                "OnlyPassing": service.only_passing,
                "IgnoreCheckIDs": null,
                "Near": "",
                "Tags": if service.tags.is_empty() { Value::Null } else { json!(service.tags) },
                "NodeMeta": null,
                "ServiceMeta": if service.service_meta.is_empty() { Value::Null } else { json!(service.service_meta) },
                "Connect": service.connect,
            },
            "DNS": {"TTL": self.ttl},
            "CreateIndex": self.create_index,
            "ModifyIndex": self.modify_index,
        })
    }
}
