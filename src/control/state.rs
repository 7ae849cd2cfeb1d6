//! All that the watches have told, and which watches that calls for. Pure; clocks are handed in.
//!
//! Invariant: trouble never removes knowledge. Only three things do: a definition that stayed away longer than
//! [`GONE_GRACE`], a definition that no longer mentions a thing, and an answer that says that the thing has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::consul::watch::chain::{self, Chain, Gateway};
use super::consul::watch::checks::{self, Exposed};
use super::consul::watch::health::{self, Instance};
use super::consul::watch::{Event, Key, Name, Update, What};
use super::definition::{self, App, Definition, Destination};
use super::granted::Granted;
use super::rotation::Identities;
use crate::config;
use crate::config::envoy::Scrape;
use crate::policy::{DefaultPolicy, Intention, Intentions};

/// How long a proxy whose registration went away keeps its listeners: registrations come back within a config reload.
pub(crate) const GONE_GRACE: Duration = Duration::from_secs(60);

/// How soon workers must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// Nothing to publish.
    None,
    /// Endpoints, chains, certificates: together with what else comes.
    Soon,
    /// Who may come in.
    Now,
}

/// Everything known.
#[derive(Debug)]
pub(crate) struct State {
    /// How pages for Prometheus are served.
    pub(crate) scrape: Scrape,
    pub(crate) proxies: Vec<Proxy>,
    pub(crate) identities: Identities,
    pub(crate) policies: BTreeMap<Name, Policy>,
    pub(crate) chains: BTreeMap<chain::Ask, Chain>,
    /// By [`Key::Health`] and [`Key::Query`].
    pub(crate) instances: BTreeMap<Key, Vec<Instance>>,
    pub(crate) hosts: BTreeMap<String, Vec<IpAddr>>,
    /// Exposed checks, by their ids.
    pub(crate) checks: BTreeMap<checks::Ask, BTreeMap<String, Exposed>>,
    pub(crate) troubles: BTreeMap<Key, String>,
    pub(crate) granted: Granted,
    /// Namespace and partition of the identities that callers are granted.
    scope: (String, String),
    callers_told_apart: bool,
    mesh_gateway_service: String,
    mesh_known: bool,
}

/// One proxy of the process.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) source: config::Proxy,
    /// The last definition that was accepted.
    pub(crate) definition: Option<Definition>,
    /// Why the newest definition is not.
    pub(crate) refusal: Option<String>,
    pub(crate) gone_since: Option<Instant>,
    /// Whether everything was there once; stays so.
    pub(crate) was_ready: bool,
}

/// What is known of who may reach a service.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) list: Option<Vec<Intention>>,
    pub(crate) default: DefaultPolicy,
    /// Both, as workers use them.
    pub(crate) built: Arc<Intentions>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { list: None, default: DefaultPolicy::Unknown, built: Arc::new(Intentions::unknown()) }
    }
}

impl Policy {
    fn rebuild(&mut self) -> bool {
        // Without the list nothing may be let in, whatever the default says.
        let built = match &self.list {
            Some(list) => Intentions::new(list.clone(), self.default),
            None => Intentions::unknown(),
        };
        let changed = *self.built != built;
        if changed {
            self.built = Arc::new(built);
        }
        changed
    }
}

impl State {
    pub(crate) fn new(settings: &config::Consul, workers: usize) -> Self {
        let proxies = settings.proxies.iter().map(|source| {
            let flags = match source {
                config::Proxy::Service(flags) => Some(definition::from_flags(flags, settings)),
                config::Proxy::SidecarFor(_) | config::Proxy::ProxyId(_) => None,
            };
            let (definition, refusal) = match flags {
                Some(Ok(definition)) => (Some(definition), None),
                Some(Err(why)) => (None, Some(why)),
                None => (None, None),
            };
            Proxy { source: source.clone(), definition, refusal, gone_since: None, was_ready: false }
        });
        Self {
            scrape: settings.scrape.clone(),
            proxies: proxies.collect(),
            identities: Identities::new(workers, settings.tls_resumption),
            policies: BTreeMap::new(),
            chains: BTreeMap::new(),
            instances: BTreeMap::new(),
            hosts: BTreeMap::new(),
            checks: BTreeMap::new(),
            troubles: BTreeMap::new(),
            granted: Granted::new(settings.caller_identities_max),
            scope: (settings.namespace.clone().unwrap_or_default(), settings.partition.clone().unwrap_or_default()),
            callers_told_apart: settings.caller_identities_max > 0,
            mesh_gateway_service: settings.mesh_gateway_service.clone(),
            mesh_known: false,
        }
    }

    /// Takes in what a watch told.
    pub(crate) fn apply(&mut self, event: Event, now: Instant, wall: SystemTime) -> Urgency {
        let Event { key, what } = event;
        match what {
            What::Trouble(text) => {
                self.trouble(key, text);
                Urgency::None
            }
            What::Recovered => {
                self.untroubled(&key);
                Urgency::None
            }
            What::Gone(text) => {
                if let Key::Definition(index) = key
                    && let Some(proxy) = self.proxies.get_mut(index)
                {
                    proxy.gone_since.get_or_insert(now);
                }
                self.trouble(key, text);
                Urgency::None
            }
            What::Data(update) => {
                self.untroubled(&key);
                self.learn(key, update, wall)
            }
        }
    }

    /// One line a problem, not one a watch: an outage stops all of them at once.
    fn trouble(&mut self, key: Key, text: String) {
        if self.troubles.get(&key) == Some(&text) {
            return;
        }
        if self.troubles.values().any(|known| *known == text) {
            tracing::debug!(watch = %key, problem = %text, "the same for this watch");
        } else {
            tracing::warn!(watch = %key, problem = %text, "no new answer for this watch; what was learned before, if anything, stays in force");
        }
        self.troubles.insert(key, text);
    }

    fn untroubled(&mut self, key: &Key) {
        if self.troubles.remove(key).is_some() {
            tracing::debug!(watch = %key, "the agent answers this watch again");
            if self.troubles.is_empty() {
                tracing::info!("every watch is answered again");
            }
        }
    }

    fn learn(&mut self, key: Key, update: Update, wall: SystemTime) -> Urgency {
        let soon = |changed: bool| if changed { Urgency::Soon } else { Urgency::None };
        match (key, update) {
            (Key::Definition(index), Update::Definition(service)) => soon(self.define(index, &service)),
            (Key::Checks(ask), Update::Checks(told)) => {
                self.expose(ask, told);
                Urgency::None
            }
            (key @ Key::Roots, Update::Roots(roots)) => match self.identities.offer_roots(&roots, wall) {
                // A trust domain learned makes identities of targets possible.
                Ok(_) => Urgency::Soon,
                Err(why) => {
                    self.trouble(key, format!("the agent's roots are refused: {why}"));
                    Urgency::None
                }
            },
            (Key::Mesh, Update::Mesh(params)) => {
                self.mesh_known = true;
                soon(self.identities.set_params(params))
            }
            (Key::Leaf(name), Update::Leaf(leaf)) => soon(self.identities.offer_leaf(&name, leaf, wall)),
            (Key::Intentions(name), Update::Intentions(list)) => {
                let policy = self.policies.entry(name).or_default();
                policy.list = Some(list);
                if policy.rebuild() { Urgency::Now } else { Urgency::None }
            }
            (Key::Intentions(name), Update::Default(default)) => {
                let policy = self.policies.entry(name).or_default();
                policy.default = default;
                if policy.rebuild() { Urgency::Now } else { Urgency::None }
            }
            (Key::Chain(ask), Update::Chain(chain)) => {
                for note in &chain.notes {
                    tracing::warn!(upstream = %ask.name.service, %note, "part of the discovery chain is left out");
                }
                soon(self.chains.insert(ask, chain.clone()).as_ref() != Some(&chain))
            }
            (key @ (Key::Health(_) | Key::Query { .. }), Update::Instances(mut list)) => {
                if let Some(before) = self.instances.get(&key) {
                    health::keep_unproven(&mut list, before);
                }
                soon(self.instances.insert(key, list.clone()).as_ref() != Some(&list))
            }
            (Key::Host(host), Update::Host(addresses)) => {
                soon(self.hosts.insert(host, addresses.clone()).as_ref() != Some(&addresses))
            }
            (key, _) => {
                tracing::error!(watch = %key, "a watch told of what it does not watch; ignored");
                Urgency::None
            }
        }
    }

    fn define(&mut self, index: usize, service: &super::consul::wire::Service) -> bool {
        let Some(proxy) = self.proxies.get_mut(index) else { return false };
        proxy.gone_since = None;
        match definition::parse(service, &self.scrape) {
            Ok(definition) => {
                proxy.refusal = None;
                let changed = proxy.definition.as_ref() != Some(&definition);
                if changed && !definition.warnings.is_empty() {
                    tracing::warn!(proxy = %definition.proxy_id, "not everything in the registration has effect: {}", definition.warnings.join("; "));
                }
                if changed {
                    tracing::info!(proxy = %definition.proxy_id, service = %definition.name.service, upstreams = definition.upstreams.len(), "definition in force");
                    proxy.definition = Some(definition);
                }
                changed
            }
            Err(why) => {
                if proxy.refusal.as_ref() != Some(&why) {
                    tracing::error!(proxy = %service.id, "this registration is refused: {why}");
                }
                proxy.refusal = Some(why);
                false
            }
        }
    }

    /// A list that is empty takes nothing away: that is what a token sees that lost its rights. Nor does an output that says nothing of
    /// where was asked.
    fn expose(&mut self, ask: checks::Ask, told: checks::Checks) {
        if told.is_empty() {
            return;
        }
        let known = self.checks.entry(ask).or_default();
        known.retain(|id, _| told.contains_key(id));
        for (check, exposed) in told {
            let Some(exposed) = exposed else { continue };
            if known.get(&check) != Some(&exposed) {
                let remedy = "name the path in expose.paths where the check is of another port";
                tracing::info!(
                    check,
                    port = exposed.port,
                    path = exposed.path,
                    remedy,
                    "a check is passed on to the app's registered port"
                );
                known.insert(check, exposed);
            }
        }
    }

    /// Whether upstream connections speak as their callers.
    pub(crate) fn callers_told_apart(&self) -> bool {
        self.callers_told_apart
    }

    /// Keeps a certificate for a caller's identity from now on. False when there is no room.
    pub(crate) fn warm(&mut self, identity: &str, now: Instant) -> bool {
        let (namespace, partition) = self.scope.clone();
        self.granted.wish(Name { service: identity.to_owned(), namespace, partition }, now)
    }

    /// Whether there is a certificate for a caller's identity.
    pub(crate) fn has_certificate(&self, identity: &str) -> bool {
        let (namespace, partition) = self.scope.clone();
        self.identities.current(&Name { service: identity.to_owned(), namespace, partition }).is_some()
    }

    /// Looks at the clocks. Returns what must be asked for again at once, and whether something changed.
    pub(crate) fn tick(&mut self, now: Instant, wall: SystemTime) -> (Vec<Name>, Urgency) {
        let mut changed = false;
        self.granted.tick(now);
        for proxy in &mut self.proxies {
            let away = proxy.gone_since.is_some_and(|since| now.duration_since(since) >= GONE_GRACE);
            if away && let Some(definition) = proxy.definition.take() {
                tracing::warn!(proxy = %definition.proxy_id, "the registration stayed away; its listeners drain");
                changed = true;
            }
        }
        let tick = self.identities.tick(wall);
        for (name, alarm) in &tick.alarms {
            tracing::error!(service = %name.service, ?alarm, "the certificate was not renewed in time");
            metrics::counter!("ringfence_certificate_alarms_total", "service" => name.service.clone()).increment(1);
        }
        (tick.force, if changed || tick.changed { Urgency::Soon } else { Urgency::None })
    }

    /// Every watch that the state calls for now.
    pub(crate) fn wanted(&self) -> BTreeSet<Key> {
        let mut keys = BTreeSet::from([Key::Roots, Key::Mesh]);
        keys.extend(self.granted.names().cloned().map(Key::Leaf));
        for (index, proxy) in self.proxies.iter().enumerate() {
            if !matches!(proxy.source, config::Proxy::Service(_)) {
                keys.insert(Key::Definition(index));
            }
            let Some(definition) = &proxy.definition else { continue };
            keys.insert(Key::Leaf(definition.name.clone()));
            keys.extend(definition.checks.iter().map(|checks| Key::Checks(checks.ask.clone())));
            if let Some(public) = &definition.public {
                keys.insert(Key::Intentions(definition.name.clone()));
                if let App::Tcp { host, .. } = &public.app {
                    keys.extend(host_key(host));
                }
            }
            let own = self.datacenter(definition);
            for upstream in &definition.upstreams {
                self.want_upstream(&mut keys, upstream, own.as_deref());
            }
        }
        keys
    }

    fn want_upstream(&self, keys: &mut BTreeSet<Key>, upstream: &definition::Upstream, own: Option<&str>) {
        match &upstream.destination {
            Destination::Unsupported(_) => {}
            Destination::Query { name, datacenter } => {
                let key = Key::Query { name: name.clone(), datacenter: datacenter.clone() };
                self.want_hosts(keys, &key, own);
                keys.insert(key);
            }
            Destination::Service { .. } => {
                let Some(ask) = chain_ask(upstream) else { return };
                for target in self.chains.get(&ask).iter().flat_map(|chain| &chain.targets) {
                    let key = health_key(target);
                    if self.callers_told_apart && own == Some(&*target.datacenter) {
                        // To tell a caller at once, and why, that the other side would refuse it.
                        keys.insert(Key::Intentions(target.name.clone()));
                    }
                    if let Some(gateways) = own.and_then(|own| self.gateway_key(target, own)) {
                        self.want_hosts(keys, &gateways, own);
                        keys.insert(gateways);
                    } else {
                        self.want_hosts(keys, &key, own);
                    }
                    keys.insert(key);
                }
                keys.insert(Key::Chain(ask));
            }
        }
    }

    fn want_hosts(&self, keys: &mut BTreeSet<Key>, key: &Key, own: Option<&str>) {
        for instance in self.instances.get(key).into_iter().flatten() {
            keys.extend(host_key(&address(instance, own.unwrap_or_default()).0));
        }
    }

    /// Drops what no watch keeps fresh any more.
    pub(crate) fn forget(&mut self, key: &Key) {
        self.troubles.remove(key);
        match key {
            Key::Leaf(name) => self.identities.forget(name),
            Key::Checks(ask) => drop(self.checks.remove(ask)),
            Key::Intentions(name) => drop(self.policies.remove(name)),
            Key::Chain(ask) => drop(self.chains.remove(ask)),
            Key::Health(_) | Key::Query { .. } => drop(self.instances.remove(key)),
            Key::Host(host) => drop(self.hosts.remove(host)),
            Key::Token | Key::Definition(_) | Key::Roots | Key::Mesh => {}
        }
    }

    /// The datacenter that a proxy lives in: told by newer agents, in the certificate of any.
    pub(crate) fn datacenter(&self, definition: &Definition) -> Option<String> {
        if !definition.datacenter.is_empty() {
            return Some(definition.datacenter.clone());
        }
        let identity = self.identities.current(&definition.name)?;
        identity.svid.id.service_name().map(|name| name.datacenter.to_string())
    }

    /// An upstream as it is treated: without its escape hatches where a discovery chain is configured (Consul
    /// `agent/xds/clusters.go`, `listeners.go`, `IsDefault`).
    pub(crate) fn in_force<'a>(&self, upstream: &'a definition::Upstream) -> &'a definition::Upstream {
        match &upstream.unhatched {
            Some(plain) if chain_ask(upstream).and_then(|ask| self.chains.get(&ask)).is_some_and(|chain| !chain.is_default) => {
                plain
            }
            _ => upstream,
        }
    }

    /// Where the gateways for `target` are listed, if it is reached through any.
    pub(crate) fn gateway_key(&self, target: &chain::Target, own: &str) -> Option<Key> {
        let datacenter = match target.gateway {
            _ if target.datacenter == own => return None,
            Gateway::None => return None,
            Gateway::Local => own.to_owned(),
            Gateway::Remote => target.datacenter.clone(),
        };
        let name = Name { service: self.mesh_gateway_service.clone(), namespace: String::new(), partition: String::new() };
        Some(Key::Health(health::Ask { kind: health::Kind::Gateway, name, datacenter, filter: String::new() }))
    }
}

/// The question that resolves an upstream.
pub(crate) fn chain_ask(upstream: &definition::Upstream) -> Option<chain::Ask> {
    let Destination::Service { name, datacenter } = &upstream.destination else { return None };
    // Consul asks before it looks at escape hatches.
    let plain = upstream.unhatched.as_deref().unwrap_or(upstream);
    Some(chain::Ask {
        name: name.clone(),
        datacenter: datacenter.clone(),
        protocol: upstream.protocol.clone(),
        connect_timeout_ms: plain.connect_timeout.and_then(|timeout| u64::try_from(timeout.as_millis()).ok()),
        mesh_gateway: upstream.mesh_gateway.clone(),
    })
}

pub(crate) fn health_key(target: &chain::Target) -> Key {
    Key::Health(health::Ask {
        kind: health::Kind::Connect,
        name: target.name.clone(),
        datacenter: target.datacenter.clone(),
        filter: target.filter.clone(),
    })
}

/// Where an instance is dialed from datacenter `own`.
pub(crate) fn address<'a>(instance: &'a Instance, own: &str) -> &'a (String, u16) {
    if instance.datacenter.is_empty() || instance.datacenter == own { &instance.lan } else { &instance.wan }
}

/// A name that must be resolved; addresses and `localhost` need not.
fn host_key(host: &str) -> Option<Key> {
    (host != "localhost" && host.parse::<IpAddr>().is_err()).then(|| Key::Host(host.to_owned()))
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Token => f.write_str("token"),
            Self::Definition(index) => write!(f, "definition of proxy {index}"),
            Self::Checks(ask) => write!(f, "checks of {}", ask.instance.service),
            Self::Roots => f.write_str("roots"),
            Self::Mesh => f.write_str("mesh config"),
            Self::Leaf(name) => write!(f, "leaf of {}", name.service),
            Self::Intentions(name) => write!(f, "intentions of {}", name.service),
            Self::Chain(ask) => write!(f, "discovery chain of {}", ask.name.service),
            Self::Health(ask) => write!(f, "instances of {} in {}", ask.name.service, ask.datacenter),
            Self::Query { name, .. } => write!(f, "prepared query {name}"),
            Self::Host(host) => write!(f, "host {host}"),
        }
    }
}
