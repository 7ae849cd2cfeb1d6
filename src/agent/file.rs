//! The agent's file: services, intentions and config entries in HCL or JSON, in Consul's own formats, reloaded on change.
//!
//! Invariant: a file is decoded and validated whole before anything of it is used. A wrong one changes nothing, and the error
//! names the file, the item and what is wrong with it. What a file no longer defines is removed; what came over HTTP stays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use super::AgentError;
use super::definition::Definition;
use super::entries::Entry;
use super::hcl;
use super::intentions::{self, Document, Source};
use super::schema::{self, Shape};
use super::shared::Shared;
use super::state::{SERVICES_MAX, SIDECAR_PORTS, State};

/// Largest file read.
pub(super) const FILE_BYTES_MAX: u64 = 4 << 20;
/// Editors write in several steps: a change is read when nothing happened for this long.
const SETTLE: Duration = Duration::from_millis(100);
/// Keys at the top of a file, for the error that names them.
const KEYS: &str = "service, services, intentions, config_entries { bootstrap }, or a config entry's own kind";

/// What a valid file says.
#[derive(Debug, Default)]
pub(super) struct Plan {
    services: Vec<Definition>,
    entries: BTreeMap<(String, String), Entry>,
}

/// Reads, parses and validates.
pub(super) fn load(path: &Path) -> Result<Plan, AgentError> {
    let fail = |reason: String| AgentError::File { path: path.to_owned(), reason };
    let size = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(fail(format!("{size} bytes are more than {FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    let json = path.extension().is_some_and(|extension| extension == "json") || text.trim_start().starts_with('{');
    parse(&text, json).map_err(fail)
}

fn parse(text: &str, json: bool) -> Result<Plan, String> {
    let document: Value = if json {
        serde_json::from_str(text).map_err(|error| format!("not valid JSON: {error}"))?
    } else {
        hcl::parse(text).map_err(|error| format!("not valid HCL: {error}"))?
    };
    let Value::Object(document) = document else {
        return Err(format!("the file must hold {KEYS}"));
    };
    let mut plan = Plan::default();
    if document.keys().any(|key| key.eq_ignore_ascii_case("kind")) {
        plan.add_entry(Value::Object(document), "the config entry")?;
        return Ok(plan);
    }
    for (key, value) in document {
        match key.as_str() {
            "service" | "services" => items(value).into_iter().try_for_each(|item| plan.add_service(item))?,
            "intentions" | "intention" => items(value).into_iter().try_for_each(|item| plan.add_intention(item))?,
            "config_entries" => items(value).into_iter().try_for_each(|item| plan.add_bootstrap(item))?,
            other => return Err(format!("unknown key {other:?}: a file may hold {KEYS}")),
        }
    }
    Ok(plan)
}

/// One block, several blocks or a list: all mean a list.
fn items(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) => items,
        Value::Null => Vec::new(),
        one => vec![one],
    }
}

impl Plan {
    fn add_service(&mut self, document: Value) -> Result<(), String> {
        let name = label(&document, &["id", "name"]);
        let at = |reason: String| format!("service {name}: {}", reason.trim_end());
        let definition = Definition::decode(document).map_err(|error| at(error.to_string()))?;
        if self.services.iter().any(|other| other.id == definition.id) {
            return Err(at(format!("the id {:?} is used twice; give each instance an own id", definition.id)));
        }
        self.services.push(definition);
        Ok(())
    }

    fn add_bootstrap(&mut self, document: Value) -> Result<(), String> {
        let Value::Object(fields) = document else {
            return Err("config_entries must be a block with bootstrap inside".to_owned());
        };
        for (key, value) in fields {
            if key != "bootstrap" {
                return Err(format!("config_entries: unknown key {key:?}: only bootstrap is known"));
            }
            for (at, item) in items(value).into_iter().enumerate() {
                let name = format!("config entry {} ({} {})", at + 1, label(&item, &["kind"]), label(&item, &["name"]));
                self.add_entry(item, &name)?;
            }
        }
        Ok(())
    }

    fn add_entry(&mut self, document: Value, name: &str) -> Result<(), String> {
        let mut entry = Entry::decode(document).map_err(|error| format!("{name}: {}", error.to_string().trim_end()))?;
        entry.from_file = true;
        let key = (entry.kind.clone(), entry.name.clone());
        if self.entries.insert(key, entry).is_some() {
            return Err(format!("{name}: is defined twice"));
        }
        Ok(())
    }

    fn add_intention(&mut self, document: Value) -> Result<(), String> {
        let name = format!(
            "intention {} -> {}",
            label(&document, &["source_name", "sourcename"]),
            label(&document, &["destination_name", "destinationname"])
        );
        let at = |reason: String| format!("{name}: {}", reason.trim_end());
        let document =
            schema::normalise(Shape::Struct(&schema::INTENTION), document, "", 0).map_err(|error| at(error.to_string()))?;
        let document: Document = serde_json::from_value(document).map_err(|error| at(error.to_string()))?;
        let (source, destination) = document.into_source().map_err(at)?;
        let entry = self
            .entries
            .entry(("service-intentions".to_owned(), destination.clone()))
            .or_insert_with(|| Entry { from_file: true, ..Entry::empty("service-intentions", &destination) });
        let mut sources: Vec<Source> = intentions::sources(entry);
        if sources.iter().any(|other| other.name == source.name) {
            return Err(format!("{name}: is defined twice"));
        }
        sources.push(source);
        intentions::put_sources(&mut entry.body, &mut sources);
        Ok(())
    }

    /// Makes the state say what the file says. Fails before the first change, or not at all.
    pub(super) fn apply(self, state: &mut State) -> Result<(), AgentError> {
        self.check_room(state)?;
        let ids: Vec<&str> = self.services.iter().map(|service| service.id.as_str()).collect();
        let gone: Vec<String> = state
            .services
            .iter()
            .filter(|(id, service)| service.from_file && service.sidecar_of.is_none() && !ids.contains(&id.as_str()))
            .map(|(id, _)| id.clone())
            .collect();
        gone.iter().for_each(|id| _ = state.deregister(id));
        let without_sidecar: Vec<String> = self
            .services
            .iter()
            .filter(|service| service.connect.as_ref().is_none_or(|connect| connect.sidecar_service.is_none()))
            .filter_map(|service| {
                state.services.values().find(|other| other.from_file && other.sidecar_of.as_deref() == Some(&service.id))
            })
            .map(|sidecar| sidecar.definition.id.clone())
            .collect();
        without_sidecar.iter().for_each(|id| _ = state.deregister(id));
        for service in self.services {
            state.register(service, true)?;
        }
        let gone: Vec<_> = state
            .entries
            .iter()
            .filter(|(key, entry)| entry.from_file && !self.entries.contains_key(*key))
            .map(|(key, _)| key.clone())
            .collect();
        gone.iter().for_each(|(kind, name)| _ = state.delete_entry(kind, name));
        self.entries.into_values().try_for_each(|entry| state.put_entry(entry))
    }

    fn check_room(&self, state: &State) -> Result<(), AgentError> {
        let sidecars = |services: &[Definition]| {
            services
                .iter()
                .filter(|service| service.connect.as_ref().is_some_and(|connect| connect.sidecar_service.is_some()))
                .count()
        };
        let kept: Vec<_> = state.services.values().filter(|service| !service.from_file).collect();
        if kept.len() + self.services.len() + sidecars(&self.services) > SERVICES_MAX {
            return Err(AgentError::Full { what: "services", most: SERVICES_MAX });
        }
        let taken = kept.iter().filter(|service| SIDECAR_PORTS.contains(&service.definition.port)).count();
        if taken + sidecars(&self.services) > SIDECAR_PORTS.len() {
            return Err(AgentError::Full { what: "automatic sidecar ports (21000 to 21255)", most: SIDECAR_PORTS.len() });
        }
        Ok(())
    }
}

/// The first text found under one of `keys`, quoted, for an error.
fn label(document: &Value, keys: &[&str]) -> String {
    let empty = Map::new();
    let fields = document.as_object().unwrap_or(&empty);
    let found = keys.iter().find_map(|key| {
        let (_, value) = fields.iter().find(|(name, _)| name.replace('_', "").eq_ignore_ascii_case(&key.replace('_', "")))?;
        value.as_str()
    });
    found.map_or_else(|| "without a name".to_owned(), |found| json!(found).to_string())
}

/// Watches `path` until the agent stops; the watch is on its folder, because editors replace files.
pub(super) fn watch(shared: Arc<Shared>, path: PathBuf) -> Result<tokio::task::JoinHandle<()>, AgentError> {
    let fail = |error: notify::Error| AgentError::File { path: path.clone(), reason: format!("cannot be watched: {error}") };
    let changed = Arc::new(Notify::new());
    let mut watcher: RecommendedWatcher = {
        let (changed, name) = (Arc::clone(&changed), path.file_name().map(std::ffi::OsStr::to_owned));
        notify::recommended_watcher(move |event: Result<notify::Event, notify::Error>| {
            let concerns = |event: &notify::Event| {
                !event.kind.is_access() && event.paths.iter().any(|path| path.file_name() == name.as_deref())
            };
            // A watcher that lost events cannot say which: read again.
            if event.as_ref().map_or(true, concerns) {
                changed.notify_one();
            }
        })
        .map_err(fail)?
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    watcher.watch(folder, RecursiveMode::NonRecursive).map_err(fail)?;
    Ok(tokio::spawn(async move {
        let _watcher = watcher;
        loop {
            tokio::select! {
                () = changed.notified() => {}
                () = shared.stopped() => return,
            }
            while tokio::time::timeout(SETTLE, changed.notified()).await.is_ok() {}
            match load(&path).and_then(|plan| shared.change(|state| plan.apply(state))) {
                Ok(()) => tracing::info!(file = %path.display(), "file reloaded"),
                Err(error) => tracing::error!(%error, "file not reloaded: the agent goes on with what it had"),
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::AgentSettings;
    use crate::agent::DefaultPolicy;
    use std::time::SystemTime;

    const HCL: &str = r#"
        # Two services and who may talk to whom.
        service {
          name = "web"
          port = 8080
          connect { sidecar_service { proxy { upstreams { destination_name = "db" local_bind_port = 9191 } } } }
        }
        service {
          name = "db"
          id   = "db-1"
          port = 5432
          meta { version = "v1" }
          check { ttl = "10s" }
          connect { sidecar_service {} }
        }
        intentions = [
          { source_name = "web", destination_name = "db", action = "allow" },
          { source_name = "*", destination_name = "db", action = "deny" },
        ]
        config_entries {
          bootstrap { kind = "proxy-defaults" name = "global" config { local_connect_timeout_ms = 1000 } }
          bootstrap { kind = "service-resolver" name = "db" subsets = { v1 = { filter = "Service.Meta.version == v1" } } }
        }
    "#;

    fn state() -> State {
        State::new(AgentSettings::default(), SystemTime::now()).expect("a state")
    }

    #[test]
    fn consuls_hcl_is_understood() {
        let mut state = state();
        parse(HCL, false).expect("valid").apply(&mut state).expect("applied");
        assert_eq!(state.services.keys().collect::<Vec<_>>(), ["db-1", "db-1-sidecar-proxy", "web", "web-sidecar-proxy"]);
        let proxy = state.services["web-sidecar-proxy"].definition.proxy.as_ref().expect("a proxy");
        assert_eq!(proxy.upstreams[0].destination_name, "db");
        assert!(intentions::decide(&intentions::flatten(state.entries.values()), "web", "db", DefaultPolicy::Deny).allowed);
        assert!(!intentions::decide(&intentions::flatten(state.entries.values()), "ops", "db", DefaultPolicy::Allow).allowed);
        assert_eq!(state.entries.len(), 3);
    }

    #[test]
    fn json_is_understood_and_a_lone_config_entry_too() {
        let plan = parse(r#"{"services": [{"Name": "a"}, {"name": "b"}], "service": {"name": "c"}}"#, true).expect("valid");
        assert_eq!(plan.services.len(), 3);
        let plan = parse("Kind = \"service-defaults\"\nName = \"web\"\nProtocol = \"tcp\"\n", false).expect("valid");
        assert!(plan.entries.contains_key(&("service-defaults".to_owned(), "web".to_owned())));
    }

    #[test]
    fn an_error_names_the_item_and_what_is_wrong() {
        for (text, error) in [
            (r#"{"services": [{"name": "web", "prot": 1}]}"#, "service \"web\": unknown field \"prot\""),
            (r#"{"services": [{"port": 1}]}"#, "service without a name: Missing service name"),
            (
                r#"{"services": [{"name": "a"}, {"name": "a"}]}"#,
                "service \"a\": the id \"a\" is used twice; give each instance an own id",
            ),
            (
                r#"{"intentions": [{"source_name": "a", "destination_name": "b", "action": "maybe"}]}"#,
                "intention \"a\" -> \"b\": 1 error occurred:\n\t* Action must be set to 'allow' or 'deny'",
            ),
            (
                r#"{"config_entries": {"bootstrap": [{"kind": "service-router", "name": "x"}]}}"#,
                "config entry 1 (\"service-router\" \"x\"): invalid config entry kind: service-router",
            ),
        ] {
            assert_eq!(parse(text, true).expect_err("refused"), error);
        }
        let error = parse(r#"{"servces": []}"#, true).expect_err("refused");
        assert!(error.starts_with("unknown key \"servces\""), "{error}");
        let error = parse("service {\n  name = \n}\n", false).expect_err("refused");
        assert!(error.starts_with("not valid HCL: line 3:"), "{error}");
    }

    #[test]
    fn what_the_file_no_longer_says_goes_and_what_http_said_stays() {
        let mut state = state();
        let api = Definition::decode(json!({"Name": "api"})).expect("valid");
        state.register(api, false).expect("registered");
        let first = r#"{"services": [{"name": "a", "connect": {"sidecar_service": {}}}, {"name": "b"}], "intentions": [
            {"source_name": "a", "destination_name": "b", "action": "allow"}]}"#;
        parse(first, true).expect("valid").apply(&mut state).expect("applied");
        parse(r#"{"services": [{"name": "a"}]}"#, true).expect("valid").apply(&mut state).expect("applied");
        assert_eq!(state.services.keys().collect::<Vec<_>>(), ["a", "api"]);
        assert!(state.entries.is_empty());
    }
}
