//! `/config_dump`: the configuration in force as Envoy's messages.
//!
//! Invariant: the order is Envoy's, because scripts count: bootstrap, clusters, endpoints with `include_eds`, listeners,
//! routes where some are asked for, secrets. What is shown holds no key: the xDS feeder hands its resources over redacted
//! (`control::dump`), and those that are made of the snapshot ([`made`]) name no key. The hub is not touched.

mod made;
mod mask;
mod rbac;
mod tls;

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use regex::Regex;
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedMutexGuard, oneshot};

use self::mask::Mask;
use super::proto_json;
use super::routes::{self, Admin, Parameters};
use crate::control::dump::{Accepted, Refused, Resource, Resources};

/// Errors of this command have no charset in Envoy.
const PLAIN: &str = "text/plain";
const PACKAGE: &str = "type.googleapis.com/envoy.admin.v3.";

/// Bytes of a request's regular expression.
const REGEX_BYTES_MAX: usize = 1 << 10;

/// One message of the dump: its name, and its repeated fields in order.
struct Section {
    message: &'static str,
    /// Single fields.
    fields: Map<String, Value>,
    lists: Vec<List>,
}

/// One repeated field of resources.
struct List {
    field: &'static str,
    /// Name of an element's message.
    element: &'static str,
    /// Fields that an element may have.
    known: &'static [&'static str],
    /// Name and element.
    items: Vec<(String, Value)>,
}

/// Why there is no dump, as status and text.
type Refusal = (StatusCode, String);

pub(super) async fn config_dump(State(shared): Admin, Query(parameters): Query<Parameters>) -> Response {
    // In a statement of its own: the channel is locked no longer.
    let accepted = shared.resources.borrow().clone();
    if let Some(accepted) = accepted {
        // One at a time, whether or not its client still waits: each takes megabytes.
        let turn = Arc::clone(&shared.dumping).lock_owned().await;
        return rendered(accepted, parameters, turn).await;
    }
    let snapshot = shared.viewer.current();
    let mut since = shared.since.lock().await;
    since.note(&shared);
    let made = made::resources(&snapshot, &shared.facts, &shared.pages(), shared.started, &mut since);
    answer(&made, &parameters)
}

/// What the xDS feeder has accepted, on a thread of its own: probes and scrapers wait for this one, and with that thread goes
/// the memory that it took. Where none can be had, they wait.
async fn rendered(accepted: Arc<dyn Accepted>, parameters: Parameters, turn: OwnedMutexGuard<()>) -> Response {
    let (sender, made) = oneshot::channel();
    let (of_thread, asked) = (Arc::clone(&accepted), parameters.clone());
    let thread = std::thread::Builder::new().name("dump".to_owned()).spawn(move || {
        // Nobody listens when the client is gone.
        let _ = sender.send(answer(&of_thread.resources(), &asked));
        drop(turn);
    });
    let made = match thread {
        Ok(_) => made.await.ok(),
        Err(_) => None,
    };
    made.unwrap_or_else(|| answer(&accepted.resources(), &parameters))
}

fn answer(resources: &Resources, parameters: &Parameters) -> Response {
    let include_eds = parameters.iter().any(|(name, _)| name == "include_eds");
    match select(sections(resources, include_eds), parameters) {
        Ok(configs) if configs.is_empty() => proto_json::answer(&json!({})),
        Ok(configs) => proto_json::answer(&json!({ "configs": configs })),
        Err((status, text)) => routes::answer(status, PLAIN, text),
    }
}

fn sections(resources: &Resources, include_eds: bool) -> Vec<Section> {
    let Resources {
        bootstrap,
        bootstrap_at,
        static_clusters,
        static_listeners,
        static_secrets,
        clusters,
        endpoints,
        listeners,
        routes,
        secrets,
    } = resources;
    let bootstrap = Section {
        message: "BootstrapConfigDump",
        fields: Map::from_iter([
            ("bootstrap".to_owned(), bootstrap.clone()),
            ("last_updated".to_owned(), proto_json::time(*bootstrap_at).into()),
        ]),
        lists: Vec::new(),
    };
    let clusters = Section::of(
        "ClustersConfigDump",
        [
            List::new("static_clusters", "StaticCluster", STATIC_CLUSTER, static_clusters, |one| flat(one, "cluster")),
            List::new("dynamic_active_clusters", "DynamicCluster", DYNAMIC_CLUSTER, active(clusters), |one| flat(one, "cluster")),
            List::new("dynamic_warming_clusters", "DynamicCluster", DYNAMIC_CLUSTER, warming(clusters), |one| {
                flat(one, "cluster")
            }),
        ],
    );
    let endpoints = include_eds.then(|| {
        let element = |one: &Resource| flat(one, "endpoint_config");
        Section::of(
            "EndpointsConfigDump",
            [
                List::new("static_endpoint_configs", "StaticEndpointConfig", STATIC_ENDPOINT, &[], element),
                List::new("dynamic_endpoint_configs", "DynamicEndpointConfig", DYNAMIC_ENDPOINT, endpoints, element),
            ],
        )
    });
    let listeners = Section::of(
        "ListenersConfigDump",
        [
            List::new("static_listeners", "StaticListener", STATIC_LISTENER, static_listeners, |one| flat(one, "listener")),
            List::new("dynamic_listeners", "DynamicListener", DYNAMIC_LISTENER, listeners, listener),
        ],
    );
    // Envoy has this one only where an http_connection_manager is.
    let routes = (!routes.is_empty()).then(|| {
        let element = |one: &Resource| flat(one, "route_config");
        Section::of(
            "RoutesConfigDump",
            [
                List::new("static_route_configs", "StaticRouteConfig", STATIC_ROUTES, &[], element),
                List::new("dynamic_route_configs", "DynamicRouteConfig", DYNAMIC_ROUTES, routes, element),
            ],
        )
    });
    let secrets = Section::of(
        "SecretsConfigDump",
        [
            List::new("static_secrets", "StaticSecret", STATIC_SECRET, static_secrets, secret),
            List::new("dynamic_active_secrets", "DynamicSecret", DYNAMIC_SECRET, active(secrets), secret),
            List::new("dynamic_warming_secrets", "DynamicSecret", DYNAMIC_SECRET, warming(secrets), secret),
        ],
    );
    [Some(bootstrap), Some(clusters), endpoints, Some(listeners), routes, Some(secrets)].into_iter().flatten().collect()
}

/// Those in force, and those of which no version ever was.
fn active(all: &[Resource]) -> impl Iterator<Item = &Resource> {
    all.iter().filter(|one| !one.json.is_null() || one.warming.is_none())
}

/// The newest versions that wait.
fn warming(all: &[Resource]) -> impl Iterator<Item = &Resource> {
    all.iter().filter_map(|one| one.warming.as_deref())
}

const STATIC_CLUSTER: &[&str] = &["cluster", "last_updated"];
const DYNAMIC_CLUSTER: &[&str] = &["version_info", "cluster", "last_updated", "error_state", "client_status"];
const STATIC_ENDPOINT: &[&str] = &["endpoint_config", "last_updated"];
const DYNAMIC_ENDPOINT: &[&str] = &["version_info", "endpoint_config", "last_updated", "error_state", "client_status"];
const STATIC_LISTENER: &[&str] = &["listener", "last_updated"];
const DYNAMIC_LISTENER: &[&str] = &["name", "active_state", "warming_state", "draining_state", "error_state", "client_status"];
const STATIC_ROUTES: &[&str] = &["route_config", "last_updated"];
const DYNAMIC_ROUTES: &[&str] = &["version_info", "route_config", "last_updated", "error_state", "client_status"];
const STATIC_SECRET: &[&str] = &["name", "last_updated", "secret"];
const DYNAMIC_SECRET: &[&str] = &["name", "version_info", "last_updated", "secret", "error_state", "client_status"];

/// An element that holds its resource under `field`.
fn flat(resource: &Resource, field: &str) -> Value {
    let mut element = Map::new();
    if !resource.version_info.is_empty() {
        element.insert("version_info".to_owned(), resource.version_info.as_str().into());
    }
    if !resource.json.is_null() {
        element.insert(field.to_owned(), resource.json.clone());
        element.insert("last_updated".to_owned(), proto_json::time(resource.last_updated).into());
    }
    if let Some(refused) = &resource.error_state {
        element.insert("error_state".to_owned(), error_state(refused));
    }
    element.into()
}

/// A secret's element has its name besides.
fn secret(resource: &Resource) -> Value {
    let mut element = Map::from_iter([("name".to_owned(), Value::from(resource.name.as_str()))]);
    if let Value::Object(fields) = flat(resource, "secret") {
        element.extend(fields);
    }
    element.into()
}

/// A listener's element has the resource one level deeper.
fn listener(resource: &Resource) -> Value {
    let mut element = Map::from_iter([("name".to_owned(), Value::from(resource.name.as_str()))]);
    for (field, version) in [("active_state", Some(resource)), ("warming_state", resource.warming.as_deref())] {
        if let Some(version) = version.filter(|version| !version.json.is_null()) {
            let state = json!({
                "version_info": version.version_info,
                "listener": version.json,
                "last_updated": proto_json::time(version.last_updated),
            });
            element.insert(field.to_owned(), state);
        }
    }
    if let Some(refused) = &resource.error_state {
        element.insert("error_state".to_owned(), error_state(refused));
    }
    element.into()
}

/// `envoy.admin.v3.UpdateFailureState`.
fn error_state(refused: &Refused) -> Value {
    json!({
        "last_update_attempt": proto_json::time(refused.at),
        "details": refused.details,
        "version_info": refused.version_info,
    })
}

impl List {
    fn new<'a>(
        field: &'static str,
        element: &'static str,
        known: &'static [&'static str],
        resources: impl IntoIterator<Item = &'a Resource>,
        render: impl Fn(&Resource) -> Value,
    ) -> Self {
        let items = resources.into_iter().map(|resource| (resource.name.clone(), render(resource))).collect();
        Self { field, element, known, items }
    }
}

impl Section {
    fn of<const N: usize>(message: &'static str, lists: [List; N]) -> Self {
        Self { message, fields: Map::new(), lists: lists.into() }
    }

    fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field) || self.lists.iter().any(|list| list.field == field)
    }

    /// The whole message.
    fn message(self) -> Map<String, Value> {
        let mut message = self.fields;
        for list in self.lists.into_iter().filter(|list| !list.items.is_empty()) {
            message.insert(list.field.to_owned(), list.items.into_iter().map(|(_, item)| item).collect());
        }
        message
    }
}

/// What of the dump was asked for.
fn select(mut sections: Vec<Section>, parameters: &[(String, String)]) -> Result<Vec<Value>, Refusal> {
    if let Some(pattern) = routes::parameter(parameters, "name_regex") {
        let wanted = whole_name(pattern)?;
        for list in sections.iter_mut().flat_map(|section| &mut section.lists) {
            list.items.retain(|(name, _)| wanted.is_match(name));
        }
    }
    let mask = routes::parameter(parameters, "mask").map(Mask::new);
    match routes::parameter(parameters, "resource") {
        Some(resource) => elements(sections, resource, mask.as_ref()),
        None => messages(sections, mask.as_ref()),
    }
}

/// Envoy matches the whole name.
fn whole_name(pattern: &str) -> Result<Regex, Refusal> {
    let refused = |why: &str| {
        let text = format!("INVALID_ARGUMENT: Error while parsing name_regex from {pattern}: {why}");
        (StatusCode::BAD_REQUEST, text)
    };
    if pattern.len() > REGEX_BYTES_MAX {
        return Err(refused(&format!("longer than {REGEX_BYTES_MAX} bytes")));
    }
    // Alone first, so that brackets that close nothing cannot pair with those around it.
    Regex::new(pattern).and_then(|_| Regex::new(&format!("^(?:{pattern})$"))).map_err(|error| {
        let text = error.to_string();
        refused(text.lines().last().unwrap_or_default().trim_start_matches("error: "))
    })
}

/// The elements of one repeated field.
fn elements(sections: Vec<Section>, resource: &str, mask: Option<&Mask<'_>>) -> Result<Vec<Value>, Refusal> {
    let Some(section) = sections.into_iter().find(|section| section.has(resource)) else {
        return Err((StatusCode::NOT_FOUND, format!("{resource} not found in config dump")));
    };
    let message = section.message;
    let Some(list) = section.lists.into_iter().find(|list| list.field == resource) else {
        let text = format!("{resource} is not a repeated field. Use ?mask={resource} to get only this field");
        return Err((StatusCode::BAD_REQUEST, text));
    };
    if let Some(mask) = mask
        && !mask.begins_in(list.known)
    {
        return Err((StatusCode::BAD_REQUEST, format!("FieldMask {} could not be successfully used.", mask.text())));
    }
    let kind = format!("{PACKAGE}{message}.{}", list.element);
    Ok(list
        .items
        .into_iter()
        .map(|(_, item)| typed(&kind, mask.map_or_else(|| item.clone(), |mask| mask.apply(&item))))
        .collect())
}

/// The messages, those that the mask fits where there is one.
fn messages(sections: Vec<Section>, mask: Option<&Mask<'_>>) -> Result<Vec<Value>, Refusal> {
    let mut found = Vec::new();
    for section in sections {
        let kind = format!("{PACKAGE}{}", section.message);
        let fits = mask.is_none_or(|mask| mask.heads().all(|head| section.has(head)));
        if !fits {
            continue;
        }
        let message = Value::Object(section.message());
        found.push(typed(&kind, mask.map_or_else(|| message.clone(), |mask| mask.apply(&message))));
    }
    match mask {
        Some(mask) if found.is_empty() => {
            let text = format!("FieldMask {} could not be successfully applied to any configs.", mask.text());
            Err((StatusCode::BAD_REQUEST, text))
        }
        _ => Ok(found),
    }
}

/// `value` with `@type` in front.
fn typed(kind: &str, value: Value) -> Value {
    let mut message = Map::from_iter([("@type".to_owned(), Value::from(kind))]);
    if let Value::Object(fields) = value {
        message.extend(fields);
    }
    message.into()
}
