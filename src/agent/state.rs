//! Everything that the agent knows: services, checks, config entries, queries and the indexes that blocking queries wait on.
//!
//! Invariant: each change moves the one index forward and stamps it on the topics it touched; an unchanged write moves nothing.
//! Alias checks (`checks`) and sidecars (`sidecar`) always agree with the service they belong to. No I/O.

mod checks;
mod sidecar;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use super::ca::Authority;
use super::check::{Check, Health};
use super::definition::Definition;
use super::entries::Entry;
use super::leaf::Leaves;
use super::query::Query;
use super::{AgentError, AgentSettings};

/// Most services, sidecars included.
pub(super) const SERVICES_MAX: usize = 4_096;
/// Most checks.
pub(super) const CHECKS_MAX: usize = 16_384;
/// Most config entries.
pub(super) const ENTRIES_MAX: usize = 4_096;
/// Ports that automatic sidecars get (Consul: `sidecar_min_port`, `sidecar_max_port`).
pub(super) const SIDECAR_PORTS: std::ops::RangeInclusive<u16> = 21_000..=21_255;

/// Config entries by kind and name.
pub(super) type Entries = BTreeMap<(String, String), Entry>;

/// What a blocking query can wait on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    /// Any service or check.
    Catalog,
    /// Instances of one service name.
    Service(String),
    /// Mesh endpoints of one service name.
    Connect(String),
    /// Config entries other than intentions.
    Config,
    /// Intentions.
    Intentions,
    /// CA roots.
    Roots,
}

/// A registered service.
#[derive(Debug, Clone)]
pub(super) struct Service {
    pub(super) definition: Definition,
    /// The service that this sidecar was made for.
    pub(super) sidecar_of: Option<String>,
    /// Whether the agent's file defines it.
    pub(super) from_file: bool,
    pub(super) create_index: u64,
    pub(super) modify_index: u64,
}

/// The state of one agent.
pub(super) struct State {
    pub(super) settings: AgentSettings,
    pub(super) node_id: String,
    pub(super) node_name: String,
    pub(super) services: BTreeMap<String, Service>,
    pub(super) checks: BTreeMap<String, Check>,
    pub(super) entries: Entries,
    pub(super) queries: BTreeMap<String, Query>,
    pub(super) authority: Authority,
    pub(super) leaves: Leaves,
    pins: BTreeMap<String, Health>,
    index: u64,
    topics: HashMap<Topic, u64>,
}

impl State {
    /// An empty state with a fresh CA.
    pub(super) fn new(settings: AgentSettings, now: SystemTime) -> Result<Self, AgentError> {
        let mut authority = Authority::new(settings.root_ttl, now)?;
        authority.stamp(1);
        Ok(Self {
            node_id: uuid::Uuid::new_v4().to_string(),
            node_name: "ringfence-agent".to_owned(),
            services: BTreeMap::new(),
            checks: BTreeMap::new(),
            entries: BTreeMap::new(),
            queries: BTreeMap::new(),
            leaves: Leaves::default(),
            pins: BTreeMap::new(),
            topics: HashMap::new(),
            index: 1,
            authority,
            settings,
        })
    }

    /// The newest index.
    pub(super) fn index(&self) -> u64 {
        self.index
    }

    /// The newest index of `topics`, at least 1.
    pub(super) fn index_of(&self, topics: &[Topic]) -> u64 {
        topics.iter().filter_map(|topic| self.topics.get(topic)).copied().max().unwrap_or(1)
    }

    /// Moves the index forward for `topics` and returns it.
    pub(super) fn bump(&mut self, topics: impl IntoIterator<Item = Topic>) -> u64 {
        self.index += 1;
        self.topics.extend(topics.into_iter().map(|topic| (topic, self.index)));
        self.index
    }

    /// Registers a service, and its sidecar if it asks for one.
    pub(super) fn register(&mut self, mut definition: Definition, from_file: bool) -> Result<(), AgentError> {
        let sidecar = definition.connect.as_mut().and_then(|connect| connect.sidecar_service.take());
        let sidecar = sidecar.map(|sidecar| self.expand_sidecar(&definition, *sidecar)).transpose()?;
        let new =
            [Some(&definition), sidecar.as_ref()].into_iter().flatten().filter(|d| !self.services.contains_key(&d.id)).count();
        if self.services.len() + new > SERVICES_MAX {
            return Err(AgentError::Full { what: "services", most: SERVICES_MAX });
        }
        if self.checks.len() + definition.checks.len() + sidecar.as_ref().map_or(0, |d| d.checks.len()) > CHECKS_MAX {
            return Err(AgentError::Full { what: "checks", most: CHECKS_MAX });
        }
        let parent_id = definition.id.clone();
        self.put_service(definition, None, from_file);
        if let Some(sidecar) = sidecar {
            self.put_service(sidecar, Some(parent_id), from_file);
        }
        self.settle_aliases();
        Ok(())
    }

    fn put_service(&mut self, mut definition: Definition, sidecar_of: Option<String>, from_file: bool) {
        if let Some(proxy) =
            definition.proxy.as_mut().filter(|proxy| proxy.local_service_address.is_empty() && proxy.local_service_port != 0)
        {
            proxy.local_service_address = "127.0.0.1".to_owned();
        }
        let id = definition.id.clone();
        self.put_checks(&definition);
        let old = self.services.get(&id);
        if let Some(old) = old.filter(|old| old.definition == definition) {
            let kept = Service { sidecar_of, from_file, ..old.clone() };
            self.services.insert(id, kept);
            return;
        }
        let created = old.map(|old| old.create_index);
        let mut topics = old.map_or_else(Vec::new, |old| topics(&old.definition));
        topics.extend(self::topics(&definition));
        let index = self.bump(topics);
        let create_index = created.unwrap_or(index);
        self.services.insert(id, Service { definition, sidecar_of, from_file, create_index, modify_index: index });
    }

    /// Removes a service, its checks and the sidecar made for it; tells whether it was there.
    pub(super) fn deregister(&mut self, id: &str) -> bool {
        let Some(service) = self.services.remove(id) else {
            return false;
        };
        self.pins.remove(id);
        self.checks.retain(|_, check| check.service_id != id);
        self.bump(topics(&service.definition));
        let sidecars: Vec<_> =
            self.services.iter().filter(|(_, s)| s.sidecar_of.as_deref() == Some(id)).map(|(id, _)| id.clone()).collect();
        sidecars.iter().for_each(|sidecar| _ = self.deregister(sidecar));
        self.settle_aliases();
        true
    }

    /// Stores an entry; an equal one changes nothing.
    pub(super) fn put_entry(&mut self, mut entry: Entry) -> Result<(), AgentError> {
        let key = (entry.kind.clone(), entry.name.clone());
        let old = self.entries.get(&key);
        if old.is_none() && self.entries.len() >= ENTRIES_MAX {
            return Err(AgentError::Full { what: "config entries", most: ENTRIES_MAX });
        }
        let created = old.map(|old| (old.create_index, old.modify_index, old.body == entry.body));
        (entry.create_index, entry.modify_index) = match created {
            Some((create, modify, true)) => (create, modify),
            Some((create, ..)) => (create, self.bump([entry_topic(&key.0)])),
            None => {
                let index = self.bump([entry_topic(&key.0)]);
                (index, index)
            }
        };
        self.entries.insert(key, entry);
        Ok(())
    }

    /// Removes an entry; tells whether it was there.
    pub(super) fn delete_entry(&mut self, kind: &str, name: &str) -> bool {
        let found = self.entries.remove(&(kind.to_owned(), name.to_owned())).is_some();
        if found {
            self.bump([entry_topic(kind)]);
        }
        found
    }

    /// Replaces the CA root.
    pub(super) fn rotate(&mut self, key: Option<rcgen::KeyPair>) -> Result<(), AgentError> {
        self.authority.rotate(key, self.index + 1, SystemTime::now())?;
        self.bump([Topic::Roots]);
        tracing::info!(root = %self.authority.active().id, "CA root rotated");
        Ok(())
    }

    /// Forgets retired roots after their time.
    pub(super) fn prune_roots(&mut self, now: SystemTime) {
        let before = now.checked_sub(self.settings.old_root_retention).unwrap_or(SystemTime::UNIX_EPOCH);
        if self.authority.prune(before) {
            self.bump([Topic::Roots]);
        }
    }

    /// How long until a retired root has to go.
    pub(super) fn root_prune_in(&self, now: SystemTime) -> Option<Duration> {
        let at = self.authority.oldest_retirement()? + self.settings.old_root_retention;
        Some(at.duration_since(now).unwrap_or_default())
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("index", &self.index).field("services", &self.services.len()).finish_non_exhaustive()
    }
}

fn topics(definition: &Definition) -> Vec<Topic> {
    let mut out = vec![Topic::Catalog, Topic::Service(definition.name.clone())];
    if let Some(name) = connect_name(definition) {
        out.push(Topic::Connect(name.to_owned()));
    }
    out
}

/// The service name that mesh clients find this instance under.
pub(super) fn connect_name(definition: &Definition) -> Option<&str> {
    match (&definition.proxy, definition.kind.as_str()) {
        (Some(proxy), "connect-proxy") => Some(&proxy.destination_service_name),
        _ if definition.connect.as_ref().is_some_and(|connect| connect.native) => Some(&definition.name),
        _ => None,
    }
}

fn entry_topic(kind: &str) -> Topic {
    if kind == "service-intentions" { Topic::Intentions } else { Topic::Config }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn state() -> State {
        State::new(AgentSettings::default(), SystemTime::now()).expect("a state")
    }

    fn register(state: &mut State, document: Value) {
        state.register(Definition::decode(document).expect("valid"), false).expect("registered");
    }

    #[test]
    fn a_sidecar_gets_consuls_defaults() {
        let mut state = state();
        register(
            &mut state,
            json!({"Name": "web", "ID": "web-1", "Port": 8080, "Tags": ["a"], "Meta": {"version": "v1"}, "Connect": {"SidecarService": {}}}),
        );
        let sidecar = &state.services["web-1-sidecar-proxy"];
        let definition = &sidecar.definition;
        assert_eq!(
            (definition.name.as_str(), definition.kind.as_str(), definition.port),
            ("web-sidecar-proxy", "connect-proxy", 21_000)
        );
        assert_eq!((&definition.tags[0], &definition.meta["version"]), (&"a".to_owned(), &"v1".to_owned()));
        let proxy = definition.proxy.as_ref().expect("a proxy");
        assert_eq!((proxy.destination_service_name.as_str(), proxy.destination_service_id.as_str()), ("web", "web-1"));
        assert_eq!((proxy.local_service_address.as_str(), proxy.local_service_port), ("127.0.0.1", 8_080));
        let checks: Vec<_> =
            state.checks_of("web-1-sidecar-proxy").map(|c| (c.id.as_str(), c.name.as_str(), c.observed)).collect();
        assert_eq!(
            checks,
            [
                ("service:web-1-sidecar-proxy:1", "Connect Sidecar Listening", Health::Critical),
                ("service:web-1-sidecar-proxy:2", "Connect Sidecar Aliasing web-1", Health::Passing),
            ]
        );
        assert_eq!(state.checks["service:web-1-sidecar-proxy:1"].definition.tcp, "127.0.0.1:21000");
    }

    #[test]
    fn sidecar_ports_are_kept_and_never_shared() {
        let mut state = state();
        for name in ["a", "b", "a"] {
            register(&mut state, json!({"Name": name, "Port": 1, "Connect": {"SidecarService": {}}}));
        }
        assert_eq!(state.services["a-sidecar-proxy"].definition.port, 21_000);
        assert_eq!(state.services["b-sidecar-proxy"].definition.port, 21_001);
        for at in 0..254 {
            register(&mut state, json!({"Name": format!("s{at}"), "Connect": {"SidecarService": {}}}));
        }
        let full = Definition::decode(json!({"Name": "one-more", "Connect": {"SidecarService": {}}})).expect("valid");
        assert!(matches!(state.register(full, false), Err(AgentError::Full { .. })));
        assert!(!state.services.contains_key("one-more"), "a failed registration leaves nothing behind");
    }

    #[test]
    fn an_unchanged_registration_moves_no_index() {
        let mut state = state();
        let document = json!({"Name": "web", "Port": 1, "Check": {"TTL": "10s"}, "Connect": {"SidecarService": {}}});
        register(&mut state, document.clone());
        state.set_health("service:web", Health::Passing, String::new());
        let index = state.index();
        register(&mut state, document);
        assert_eq!(state.index(), index);
        assert_eq!(state.service_health("web"), Health::Passing, "health survives a re-registration");
    }

    #[test]
    fn aliases_follow_maintenance_and_deregistration_takes_the_sidecar() {
        let mut state = state();
        register(&mut state, json!({"Name": "web", "Port": 1, "Connect": {"SidecarService": {}}}));
        let before = state.index_of(&[Topic::Connect("web".to_owned())]);
        assert!(state.maintain("web", true, "x"));
        assert_eq!(state.checks["service:web-sidecar-proxy:2"].observed, Health::Critical);
        assert!(state.index_of(&[Topic::Connect("web".to_owned())]) > before);
        assert!(state.maintain("web", false, ""));
        assert_eq!(state.checks["service:web-sidecar-proxy:2"].observed, Health::Passing);
        assert!(!state.maintain("none", true, ""));
        assert!(state.deregister("web"));
        assert!(state.services.is_empty() && state.checks.is_empty());
    }

    #[test]
    fn a_pin_overrides_what_is_observed_until_it_is_taken_away() {
        let mut state = state();
        register(&mut state, json!({"Name": "web", "Port": 1, "Connect": {"SidecarService": {}}}));
        state.pin("web-sidecar-proxy", Some(Health::Passing)).expect("known");
        assert_eq!(state.service_health("web-sidecar-proxy"), Health::Passing);
        state.set_health("service:web-sidecar-proxy:1", Health::Critical, "refused".to_owned());
        assert_eq!(state.service_health("web-sidecar-proxy"), Health::Passing);
        state.pin("web-sidecar-proxy", None).expect("known");
        assert_eq!(state.service_health("web-sidecar-proxy"), Health::Critical);
        assert!(state.pin("none", None).is_err());
    }

    #[test]
    fn ttl_checks_expire_and_long_critical_services_go() {
        let mut state = state();
        register(
            &mut state,
            json!({"Name": "web", "Check": {"TTL": "10s", "Status": "passing", "DeregisterCriticalServiceAfter": "60s"}}),
        );
        let now = std::time::Instant::now();
        state.expire(now);
        assert_eq!(state.service_health("web"), Health::Passing);
        state.expire(now + Duration::from_secs(11));
        assert_eq!(state.service_health("web"), Health::Critical);
        assert_eq!(state.checks["service:web"].output, "TTL expired");
        state.expire(now + Duration::from_secs(100));
        assert!(state.services.is_empty());
    }
}
