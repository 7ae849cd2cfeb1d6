//! Intentions as Consul keeps them: sources inside `service-intentions` entries, flattened for the intentions endpoints.
//!
//! Invariant: the flattened list is always in evaluation order (precedence descending, then names), so the first whose source
//! matches decides. Every intention has an ID, also one that a config entry declares, since Consul 1.8's command line knows no
//! other way to an intention. Whatever cannot be judged at L4 denies. Pure.

use std::time::SystemTime;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::entries::Entry;
use super::state::State;
use super::view::stamp;
use super::{AgentError, DefaultPolicy};

/// Most sources of one destination.
pub(super) const SOURCES_MAX: usize = 4_096;

/// One source of a `service-intentions` entry, in the order in which Consul prints it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Source {
    pub(super) name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) action: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) permissions: Vec<Value>,
    pub(super) precedence: u8,
    #[serde(rename = "LegacyID", skip_serializing_if = "String::is_empty")]
    pub(super) legacy_id: String,
    #[serde(rename = "Type")]
    pub(super) source_type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) description: String,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) legacy_meta: Map<String, Value>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) legacy_create_time: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) legacy_update_time: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) peer: String,
    #[serde(skip_serializing)]
    namespace: String,
    #[serde(skip_serializing)]
    partition: String,
    #[serde(skip_serializing)]
    sameness_group: String,
}

/// One intention: a source with its destination.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Intention {
    pub(super) source: Source,
    pub(super) destination: String,
    jwt: Option<Value>,
    create_index: u64,
    modify_index: u64,
}

/// What an authorisation rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) allowed: bool,
    /// Consul's text.
    pub(super) reason: String,
}

/// Validates the sources of the entry `destination` and completes them (precedence, type, order).
pub(super) fn check_sources(destination: &str, body: &mut Map<String, Value>) -> Result<(), String> {
    let sources = body.remove("Sources").unwrap_or_else(|| json!([]));
    let mut sources: Vec<Source> = serde_json::from_value(sources).map_err(|error| error.to_string())?;
    if sources.is_empty() {
        return Err("At least one source is required".to_owned());
    }
    if sources.len() > SOURCES_MAX {
        return Err(format!("{} sources are more than {SOURCES_MAX}", sources.len()));
    }
    check_wildcard("Name", destination)?;
    for (at, source) in sources.iter_mut().enumerate() {
        complete(source, destination).map_err(|error| format!("Sources[{at}].{error}"))?;
    }
    for (at, source) in sources.iter().enumerate() {
        if sources[..at].iter().any(|other| (&other.name, &other.peer) == (&source.name, &source.peer)) {
            return Err(format!("Sources[{at}] defines {:?} more than once", source.name));
        }
    }
    put_sources(body, &mut sources);
    Ok(())
}

/// Stores `sources` in evaluation order.
pub(super) fn put_sources(body: &mut Map<String, Value>, sources: &mut [Source]) {
    sources.sort_by_key(|source| std::cmp::Reverse(source.precedence));
    body.insert("Sources".to_owned(), json!(sources));
}

/// The sources of a stored entry.
pub(super) fn sources(entry: &Entry) -> Vec<Source> {
    // Stored entries were checked: an entry that does not decode cannot exist.
    entry.body.get("Sources").and_then(|sources| serde_json::from_value(sources.clone()).ok()).unwrap_or_default()
}

fn complete(source: &mut Source, destination: &str) -> Result<(), String> {
    if source.name.is_empty() {
        return Err("Name is required".to_owned());
    }
    check_wildcard("Name", &source.name)?;
    for (what, value) in [("Namespace", &source.namespace), ("Partition", &source.partition)] {
        if !matches!(value.as_str(), "" | "default") {
            return Err(format!("{what}: {value:?} is a Consul Enterprise feature"));
        }
    }
    if !source.sameness_group.is_empty() {
        return Err("SamenessGroup: a Consul Enterprise feature".to_owned());
    }
    match (source.action.as_str(), source.permissions.is_empty()) {
        ("allow" | "deny", true) | ("", false) => {}
        (_, false) => return Err("Action must be omitted if Permissions are specified".to_owned()),
        (_, true) => return Err("Action must be set to 'allow' or 'deny'".to_owned()),
    }
    if source.source_type.is_empty() {
        source.source_type = "consul".to_owned();
    }
    if source.source_type != "consul" {
        return Err("Type must be set to 'consul'".to_owned());
    }
    source.precedence = precedence(&source.name, destination);
    Ok(())
}

fn check_wildcard(what: &str, name: &str) -> Result<(), String> {
    if name.len() > 1 && name.contains('*') {
        return Err(format!("{what}: wildcard character '*' cannot be used with partial values"));
    }
    Ok(())
}

/// Consul's table for the one namespace that there is.
pub(super) fn precedence(source: &str, destination: &str) -> u8 {
    match (source, destination) {
        ("*", "*") => 5,
        (_, "*") => 6,
        ("*", _) => 8,
        _ => 9,
    }
}

/// Every intention of `entries`, in evaluation order.
pub(super) fn flatten<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Intention> {
    let mut all: Vec<Intention> = entries
        .filter(|entry| entry.kind == "service-intentions")
        .flat_map(|entry| {
            sources(entry).into_iter().map(|source| Intention {
                source,
                destination: entry.name.clone(),
                jwt: entry.body.get("JWT").cloned(),
                create_index: entry.create_index,
                modify_index: entry.modify_index,
            })
        })
        .collect();
    all.sort_by(|a, b| {
        (b.source.precedence, &a.source.name, &a.destination).cmp(&(a.source.precedence, &b.source.name, &b.destination))
    });
    all
}

/// Decides `source` -> `destination` on a list in evaluation order.
pub(super) fn decide(all: &[Intention], source: &str, destination: &str, default: DefaultPolicy) -> Verdict {
    let found = all.iter().find(|intention| {
        intention.source.peer.is_empty() && intention.has_source(source) && intention.has_destination(destination)
    });
    match (found, default) {
        (Some(intention), _) => intention.verdict(),
        (None, DefaultPolicy::Allow) => {
            Verdict { allowed: true, reason: "ACLs disabled, access is allowed by default".to_owned() }
        }
        (None, DefaultPolicy::Deny) => Verdict { allowed: false, reason: "Default behavior configured by ACLs".to_owned() },
    }
}

impl Intention {
    /// Its ID: the one it was created with, or the one that its names give.
    pub(super) fn id(&self) -> String {
        if self.is_declared() {
            return derived_id(&self.source, &self.destination);
        }
        self.source.legacy_id.clone()
    }

    /// Whether it came without an ID: from a config entry, a file or an `exact` call.
    pub(super) fn is_declared(&self) -> bool {
        self.source.legacy_id.is_empty()
    }

    /// Whether `source` and `destination` name this intention.
    pub(super) fn has_names(&self, source: &Source, destination: &str) -> bool {
        (&self.source.name, &self.source.peer, self.destination.as_str()) == (&source.name, &source.peer, destination)
    }

    /// Whether it speaks of the source `name`.
    pub(super) fn has_source(&self, name: &str) -> bool {
        self.source.name == "*" || self.source.name == name
    }

    /// Whether it speaks of the destination `name`.
    pub(super) fn has_destination(&self, name: &str) -> bool {
        self.destination == "*" || self.destination == name
    }

    fn verdict(&self) -> Verdict {
        let arrow = format!("default/{} => default/{}", self.source.name, self.destination);
        let precedence = self.source.precedence;
        if !self.source.permissions.is_empty() {
            let count = self.source.permissions.len();
            let reason = format!("Matched L7 intention: {arrow} (Precedence: {precedence}, Permissions: {count})");
            return Verdict { allowed: false, reason };
        }
        let action = self.source.action.to_ascii_uppercase();
        let id = if self.source.legacy_id.is_empty() { String::new() } else { format!("ID: {}, ", self.source.legacy_id) };
        let reason = format!("Matched L4 intention: {arrow} ({id}Precedence: {precedence}, Action: {action})");
        Verdict { allowed: self.source.action == "allow", reason }
    }

    /// Consul's text of an intention in an error.
    pub(super) fn describe(&self) -> String {
        let Source { name, action, precedence, .. } = &self.source;
        let action = action.to_ascii_uppercase();
        format!("{action} default/{name} => default/{} (ID: {}, Precedence: {precedence})", self.destination, self.id())
    }

    /// The intention as the list, match and read endpoints print it.
    pub(super) fn to_json(&self) -> Value {
        let source = &self.source;
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| {
            out.insert(key.to_owned(), value);
        };
        put("ID", json!(self.id()));
        if !source.description.is_empty() {
            put("Description", json!(source.description));
        }
        put("SourceNS", json!("default"));
        put("SourceName", json!(source.name));
        if !source.peer.is_empty() {
            put("SourcePeer", json!(source.peer));
        }
        put("DestinationNS", json!("default"));
        put("DestinationName", json!(self.destination));
        put("SourceType", json!(source.source_type));
        if source.permissions.is_empty() {
            put("Action", json!(source.action));
        } else {
            put("Permissions", json!(source.permissions));
        }
        if let Some(jwt) = &self.jwt {
            put("JWT", jwt.clone());
        }
        if !source.legacy_meta.is_empty() {
            put("Meta", json!(source.legacy_meta));
        }
        put("Precedence", json!(source.precedence));
        if !source.legacy_create_time.is_empty() {
            put("CreatedAt", json!(source.legacy_create_time));
            put("UpdatedAt", json!(source.legacy_update_time));
        }
        put("CreateIndex", json!(self.create_index));
        put("ModifyIndex", json!(self.modify_index));
        Value::Object(out)
    }
}

/// A UUID that the same names always give, so that it outlives a restart and a reload of the file.
fn derived_id(source: &Source, destination: &str) -> String {
    let mut digest = Context::new(&SHA256);
    for part in [destination, &source.name, &source.peer] {
        // The length keeps `a`, `bc` apart from `ab`, `c`.
        digest.update(&(part.len() as u64).to_be_bytes());
        digest.update(part.as_bytes());
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.finish().as_ref()[..16]);
    // Version 8 says that the bytes have a meaning of their own; `create` gives out version 4, so the two never meet.
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

/// The intention with this ID.
pub(super) fn by_id<'a>(all: &'a [Intention], id: &str) -> Option<&'a Intention> {
    all.iter().find(|intention| intention.id() == id)
}

/// Adds the intention, or replaces the one of the same source and destination.
pub(super) fn put(state: &mut State, mut source: Source, destination: &str) -> Result<(), AgentError> {
    let now = stamp(SystemTime::now());
    if !source.legacy_id.is_empty() {
        source.legacy_update_time.clone_from(&now);
        if source.legacy_create_time.is_empty() {
            source.legacy_create_time = now;
        }
    }
    let key = ("service-intentions".to_owned(), destination.to_owned());
    let (mut entry, mut all) = match state.entries.get(&key) {
        Some(entry) => (entry.clone(), sources(entry)),
        None => (Entry::empty("service-intentions", destination), Vec::new()),
    };
    all.retain(|old| (&old.name, &old.peer) != (&source.name, &source.peer));
    if all.len() >= SOURCES_MAX {
        return Err(AgentError::Full { what: "sources of one destination", most: SOURCES_MAX });
    }
    all.push(source);
    put_sources(&mut entry.body, &mut all);
    state.put_entry(entry)
}

/// Removes the intention; one that is not there is no error, as in Consul.
pub(super) fn delete(state: &mut State, source: &str, destination: &str) -> Result<(), AgentError> {
    delete_where(state, destination, |old| old.name == source)
}

/// Removes exactly this intention and not one of the same name at another peer.
pub(super) fn delete_one(state: &mut State, intention: &Intention) -> Result<(), AgentError> {
    delete_where(state, &intention.destination, |old| intention.has_names(old, &intention.destination))
}

fn delete_where(state: &mut State, destination: &str, gone: impl Fn(&Source) -> bool) -> Result<(), AgentError> {
    let key = ("service-intentions".to_owned(), destination.to_owned());
    let Some(mut entry) = state.entries.get(&key).cloned() else {
        return Ok(());
    };
    let mut all = sources(&entry);
    all.retain(|old| !gone(old));
    if all.is_empty() {
        state.delete_entry(&key.0, &key.1);
        return Ok(());
    }
    put_sources(&mut entry.body, &mut all);
    state.put_entry(entry)
}

/// A document of the intentions endpoints as a source and its destination.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Document {
    #[serde(rename = "ID")]
    pub(super) id: String,
    description: String,
    #[serde(rename = "SourceNS")]
    source_ns: String,
    pub(super) source_name: String,
    source_peer: String,
    #[serde(rename = "DestinationNS")]
    destination_ns: String,
    pub(super) destination_name: String,
    source_type: String,
    action: String,
    permissions: Vec<Value>,
    meta: Map<String, Value>,
}

impl Document {
    /// Validates it with Consul's texts.
    pub(super) fn into_source(self) -> Result<(Source, String), String> {
        let listed = |text: &str| format!("1 error occurred:\n\t* {text}\n\n");
        for (what, name) in [("SourceName", &self.source_name), ("DestinationName", &self.destination_name)] {
            if name.is_empty() {
                return Err(listed(&format!("{what} must be set")));
            }
            check_wildcard(what, name).map_err(|text| listed(&text))?;
        }
        for (what, name) in [("SourceNS", &self.source_ns), ("DestinationNS", &self.destination_ns)] {
            if !matches!(name.as_str(), "" | "default") {
                return Err(listed(&format!("{what} {name:?}: namespaces are a Consul Enterprise feature")));
            }
        }
        let mut source = Source {
            name: self.source_name,
            action: self.action,
            permissions: self.permissions,
            source_type: self.source_type,
            description: self.description,
            legacy_meta: self.meta,
            peer: self.source_peer,
            ..Source::default()
        };
        complete(&mut source, &self.destination_name).map_err(|text| listed(&text))?;
        Ok((source, self.destination_name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(list: &[(&str, &[(&str, &str)])]) -> Vec<Entry> {
        list.iter()
            .map(|(destination, sources)| {
                let sources: Vec<Value> = sources.iter().map(|(name, action)| json!({"Name": name, "Action": action})).collect();
                Entry::decode(json!({"Kind": "service-intentions", "Name": destination, "Sources": sources})).expect("valid")
            })
            .collect()
    }

    #[test]
    fn the_list_is_in_evaluation_order() {
        let entries =
            entries(&[("*", &[("*", "deny"), ("web", "allow")]), ("db", &[("*", "deny"), ("web", "allow"), ("api", "deny")])]);
        let order: Vec<_> =
            flatten(entries.iter()).iter().map(|i| (i.source.precedence, i.source.name.clone(), i.destination.clone())).collect();
        let expected = [(9, "api", "db"), (9, "web", "db"), (8, "*", "db"), (6, "web", "*"), (5, "*", "*")];
        assert_eq!(order, expected.map(|(p, s, d)| (p, s.to_owned(), d.to_owned())));
    }

    #[test]
    fn the_first_match_decides_and_says_why() {
        let entries = entries(&[("db", &[("*", "deny"), ("web", "allow")]), ("*", &[("ops", "allow")])]);
        let all = flatten(entries.iter());
        let verdict = decide(&all, "web", "db", DefaultPolicy::Deny);
        assert!(verdict.allowed);
        assert_eq!(verdict.reason, "Matched L4 intention: default/web => default/db (Precedence: 9, Action: ALLOW)");
        let verdict = decide(&all, "ops", "db", DefaultPolicy::Allow);
        assert_eq!(verdict.reason, "Matched L4 intention: default/* => default/db (Precedence: 8, Action: DENY)");
        assert!(decide(&all, "ops", "cache", DefaultPolicy::Deny).allowed);
        assert_eq!(decide(&all, "web", "cache", DefaultPolicy::Deny).reason, "Default behavior configured by ACLs");
        assert!(decide(&all, "web", "cache", DefaultPolicy::Allow).allowed);
    }

    #[test]
    fn l7_permissions_deny() {
        let entry = Entry::decode(json!({"Kind": "service-intentions", "Name": "db", "Sources": [
            {"Name": "web", "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]}]}))
        .expect("valid");
        let verdict = decide(&flatten([&entry].into_iter()), "web", "db", DefaultPolicy::Allow);
        assert!(!verdict.allowed);
        assert!(verdict.reason.starts_with("Matched L7 intention"), "{}", verdict.reason);
    }

    #[test]
    fn a_declared_intention_has_an_id_that_its_names_give() {
        let of = |list: &[(&str, &[(&str, &str)])]| -> Vec<String> {
            flatten(entries(list).iter()).iter().map(Intention::id).collect()
        };
        let all = of(&[("db", &[("web", "allow"), ("api", "deny"), ("*", "deny")]), ("web", &[("db", "allow")])]);
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), 4, "{all:?}");
        for id in &all {
            let uuid = uuid::Uuid::parse_str(id).expect("a UUID");
            assert_eq!((uuid.get_version_num(), id.len()), (8, 36), "{id}");
        }
        // The names alone count: neither the action nor the company in the entry changes the ID, nor does a new version.
        let alone = of(&[("db", &[("web", "deny")])]);
        assert_eq!(alone, ["28280775-a261-8ff3-bb22-293faa319924"]);
        assert!(distinct.contains(&alone[0]), "{all:?}");
        // Names that are the same when written one after the other are not the same intention.
        assert_ne!(of(&[("bc", &[("a", "allow")])]), of(&[("b", &[("ca", "allow")])]));
    }

    #[test]
    fn an_id_finds_its_intention_and_shows_in_the_document() {
        let entry = Entry::decode(json!({"Kind": "service-intentions", "Name": "db", "Sources": [
            {"Name": "web", "Action": "allow"}, {"Name": "web", "Peer": "east", "Action": "deny"},
            {"Name": "api", "Action": "deny", "LegacyID": "0b3c4d5e-0000-4000-8000-000000000001"}]}))
        .expect("valid");
        let all = flatten([&entry].into_iter());
        for intention in &all {
            let found = by_id(&all, &intention.id()).expect("found");
            assert_eq!(found, intention);
            assert_eq!(intention.to_json()["ID"], json!(intention.id()));
            assert!(intention.describe().contains(&intention.id()), "{}", intention.describe());
        }
        assert!(by_id(&all, "0b3c4d5e-0000-4000-8000-000000000001").is_some_and(|found| found.source.name == "api"));
        assert_eq!(by_id(&all, ""), None);
    }

    #[test]
    fn malformed_sources_are_refused() {
        for (sources, text) in [
            (json!([]), "At least one source is required"),
            (json!([{"Name": "web"}]), "Sources[0].Action must be set to 'allow' or 'deny'"),
            (json!([{"Action": "allow"}]), "Sources[0].Name is required"),
            (
                json!([{"Name": "we*", "Action": "allow"}]),
                "Sources[0].Name: wildcard character '*' cannot be used with partial values",
            ),
            (
                json!([{"Name": "a", "Action": "allow"}, {"Name": "a", "Action": "deny"}]),
                "Sources[1] defines \"a\" more than once",
            ),
        ] {
            let error =
                Entry::decode(json!({"Kind": "service-intentions", "Name": "db", "Sources": sources})).expect_err("refused");
            assert_eq!(error.to_string(), text);
        }
    }
}
