//! Resources as they came, for `/config_dump`.
//!
//! Invariant: the bytes may hold private keys. They are wiped when they are dropped, no `Debug` prints them, and they leave
//! this room only through [`Protos`], which replaces secrets. What was refused is told by its reason alone.
//!
//! Nothing is rendered until somebody asks, and then by whoever asks: the descriptions of Envoy's messages take megabytes, and
//! are here only as long as a dump is made. Measured: with 500 clusters a dump takes 10 MB and a quarter of a second of a debug
//! build, and leaves 1 MB behind; what did not change costs nothing at an update.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value as Json, json};
use zeroize::Zeroizing;

use super::held::{Held, Kind};
use super::proto_json::Protos;
use super::refusal::type_url;
use super::secrets::{SECRET, Secret};
use crate::control::dump::{Accepted, Refused, Resource, Resources};

/// A resource in force.
pub(super) struct Came {
    pub(super) version: String,
    /// Since when it is as it is.
    at: SystemTime,
    /// The message, encoded.
    bytes: Zeroizing<Vec<u8>>,
}

/// One name among the resources of a kind.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) name: String,
    /// None of this name was ever accepted where there is none.
    pub(super) came: Option<Arc<Came>>,
    pub(super) refused: Option<Arc<Refused>>,
}

/// The names whose newest version waits, with what is in force meanwhile as it came.
type Waiting = BTreeMap<String, Option<Arc<Came>>>;

/// Everything that is shown.
pub(super) struct Everything {
    bootstrap: Arc<Json>,
    /// When the bootstrap was read.
    bootstrap_at: SystemTime,
    /// By kind, in the order of [`Kind::ALL`].
    sent: [Arc<[Shown]>; Kind::ALL.len()],
    waiting_clusters: Waiting,
    waiting_listeners: Waiting,
    secrets: Vec<(String, Option<Arc<Secret>>)>,
}

impl Came {
    /// `before` is what it takes the place of: a resource that is sent again as it was has its old time.
    pub(super) fn new(version: &str, bytes: Vec<u8>, now: SystemTime, before: Option<&Self>) -> Self {
        Self { version: version.to_owned(), at: now, bytes: Zeroizing::new(bytes) }.in_place_of(before)
    }

    /// It has the time of `before` if that says the same.
    pub(super) fn in_place_of(mut self, before: Option<&Self>) -> Self {
        if let Some(before) = before.filter(|before| self.is_same_as(before)) {
            self.at = before.at;
        }
        self
    }

    /// Whether both say the same, whatever their versions.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

/// Without the bytes.
impl fmt::Debug for Came {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Came").field("version", &self.version).field("at", &self.at).finish_non_exhaustive()
    }
}

impl fmt::Debug for Everything {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Everything").field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl Accepted for Everything {
    fn resources(&self) -> Resources {
        let protos = Protos::load();
        let none = Waiting::new();
        let [clusters, endpoints, listeners, routes] = Kind::ALL.map(|kind| {
            let waiting = match kind {
                Kind::Cluster => &self.waiting_clusters,
                Kind::Listener => &self.waiting_listeners,
                Kind::Endpoints | Kind::Routes => &none,
            };
            self.sent[kind as usize].iter().map(|one| one.resource(kind, waiting, &protos)).collect()
        });
        Resources {
            bootstrap: Json::clone(&self.bootstrap),
            bootstrap_at: self.bootstrap_at,
            static_clusters: self.fixed("clusters", Kind::Cluster.message()),
            static_listeners: self.fixed("listeners", Kind::Listener.message()),
            static_secrets: self.fixed("secrets", SECRET),
            clusters,
            endpoints,
            listeners,
            routes,
            secrets: self.secrets.iter().map(|(name, held)| secret(name, held.as_deref(), &protos)).collect(),
        }
    }
}

impl Everything {
    /// What is held now, with the bootstrap and when that was read.
    pub(super) fn new((bootstrap, bootstrap_at): (Arc<Json>, SystemTime), held: &mut Held) -> Self {
        Self {
            bootstrap,
            bootstrap_at,
            sent: held.shown(),
            waiting_clusters: held.waiting_clusters().map(|name| (name.clone(), None)).collect(),
            waiting_listeners: held.waiting_listeners().map(|(name, serving)| (name.clone(), serving.cloned())).collect(),
            secrets: held.secrets_shown(),
        }
    }

    /// What the bootstrap has of a kind, the small listeners of this process's own and their clusters among it.
    fn fixed(&self, field: &str, message: &str) -> Vec<Resource> {
        let all = self.bootstrap.pointer(&format!("/static_resources/{field}")).and_then(Json::as_array);
        let resource = |json: &Json| Resource {
            name: json["name"].as_str().unwrap_or_default().to_owned(),
            version_info: String::new(),
            last_updated: self.bootstrap_at,
            json: typed(message, json.clone()),
            warming: None,
            error_state: None,
        };
        all.into_iter().flatten().map(resource).collect()
    }
}

impl Shown {
    fn resource(&self, kind: Kind, waiting: &Waiting, protos: &Protos) -> Resource {
        let version = |came: Option<&Came>| Resource {
            name: self.name.clone(),
            version_info: came.map(|came| came.version.clone()).unwrap_or_default(),
            last_updated: came.map_or(SystemTime::UNIX_EPOCH, |came| came.at),
            json: came.map_or(Json::Null, |came| json(kind.message(), &came.bytes, protos)),
            warming: None,
            error_state: None,
        };
        let newest = self.came.as_deref();
        let shown = match waiting.get(&self.name).filter(|_| newest.is_some()) {
            None => version(newest),
            Some(serving) => Resource { warming: Some(Box::new(version(newest))), ..version(serving.as_deref()) },
        };
        Resource { error_state: self.refused.as_deref().cloned(), ..shown }
    }
}

/// One that has not come is told by its name alone, with the version that Envoy gives it, and of no time.
fn secret(name: &str, held: Option<&Secret>, protos: &Protos) -> Resource {
    let version = |version_info: &str, last_updated, json| Resource {
        name: name.to_owned(),
        version_info: version_info.to_owned(),
        last_updated,
        json,
        warming: None,
        error_state: None,
    };
    match held.map(|held| &held.came) {
        Some(came) => version(&came.version, came.at, json(SECRET, &came.bytes, protos)),
        None => {
            let waits = version("uninitialized", SystemTime::UNIX_EPOCH, typed(SECRET, json!({ "name": name })));
            Resource { warming: Some(Box::new(waits)), ..version("", SystemTime::UNIX_EPOCH, Json::Null) }
        }
    }
}

fn json(message: &str, bytes: &[u8], protos: &Protos) -> Json {
    match protos.render_bytes(message, bytes) {
        Ok(json) => typed(message, json),
        // It was read once, so this is a value that JSON has no form for: named, as an unknown type is.
        Err(_) => json!({
            "@type": "type.googleapis.com/google.protobuf.StringValue",
            "value": format!("not shown: {message} has no form in JSON"),
        }),
    }
}

/// `json` with its type in front.
fn typed(message: &str, json: Json) -> Json {
    let mut all = Map::from_iter([("@type".to_owned(), Json::from(type_url(message)))]);
    if let Json::Object(fields) = json {
        all.extend(fields);
    }
    all.into()
}
