//! The resources that are in force: the last good state of each.
//!
//! Invariant: a resource that is refused leaves the one before it where it is, and its version with it; the good ones of the
//! same response are taken (so does Envoy, and nacks the response). What is held was understood whole. Policy is no such
//! state: a way in whose newest listener is not understood lets nobody in, because whom that one denies is not known, and
//! what is out of date brings no roots.
//!
//! Besides the value that a resource was understood as, its bytes are kept: `/config_dump` shows it as it came (`shown`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterMessage;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerMessage;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};

use super::cluster::{Cluster, Discovery};
use super::endpoint::Assignment;
use super::listener::{self, Destination, Listener, Role};
use super::refusal::{Refusal, unpack};
use super::secrets::Secret;
use super::shelf::Shelf;
use super::shown::{Came, Shown as ShownResource};
use super::tls_context::SecretName;
use crate::control::ControlError;
use crate::telemetry::stats::Fetched;

/// A kind of resource that is asked for, in the order in which it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Cluster,
    Endpoints,
    Listener,
    Routes,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Cluster, Self::Endpoints, Self::Listener, Self::Routes];
    /// Those that are asked for by name, as others name them.
    pub(super) const BY_NAME: [Self; 2] = [Self::Endpoints, Self::Routes];

    pub(super) fn message(self) -> &'static str {
        match self {
            Self::Cluster => "envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "envoy.config.listener.v3.Listener",
            Self::Routes => "envoy.config.route.v3.RouteConfiguration",
        }
    }

    pub(super) fn of_url(type_url: &str) -> Option<Self> {
        let name = type_url.rsplit('/').next().unwrap_or_default();
        Self::ALL.into_iter().find(|kind| kind.message() == name)
    }

    /// Its name in metrics, as Envoy's managers have it.
    pub(super) fn short(self) -> &'static str {
        match self {
            Self::Cluster => "cds",
            Self::Endpoints => "eds",
            Self::Listener => "lds",
            Self::Routes => "rds",
        }
    }
}

/// Everything held.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) clusters: Shelf<Cluster>,
    /// By the name that EDS knows the cluster by.
    pub(super) endpoints: Shelf<Assignment>,
    /// What was told under these names, whatever became of it.
    fetched: BTreeMap<String, Fetched>,
    /// Those that were taken away and are still dialed.
    gone: BTreeMap<String, Arc<Assignment>>,
    pub(super) listeners: Shelf<Listener>,
    /// By name, newest listeners that wait for their routes or secrets: what was there before serves until these have come, as in
    /// Envoy. A way in is none of them: whom its newest denies is denied now.
    pub(super) warming: BTreeMap<String, Newest>,
    pub(super) routes: Shelf<Routed>,
    /// What SDS servers have sent.
    pub(super) secrets: BTreeMap<SecretName, Arc<Secret>>,
    /// As [`crate::config::envoy::Xds::http_as_tcp`].
    pub(super) http_as_tcp: bool,
}

/// A listener that waits behind another of its name.
#[derive(Debug)]
pub(super) struct Newest {
    pub(super) listener: Arc<Listener>,
    /// The one that serves meanwhile, as it came.
    serving: Option<Arc<Came>>,
}

/// A route configuration in which every request goes to one cluster.
#[derive(Debug)]
pub(super) struct Routed {
    pub(super) cluster: String,
}

impl Routed {
    fn parse(message: &RouteConfiguration) -> Result<Self, Refusal> {
        let routes = listener::routes_of(message)?;
        let cluster = listener::passes_to(&routes).ok_or_else(|| {
            let wanted = "requests are not told apart: expected one route, of prefix /, to one cluster without a rewrite";
            Refusal::new("virtual_hosts[0].routes", format!("{} of them, by path or with a rewrite", routes.len()), wanted)
        })?;
        Ok(Self { cluster: cluster.to_owned() })
    }
}

impl Held {
    /// What the bootstrap has of its own: encoded messages.
    pub(super) fn from_bootstrap(clusters: &[Vec<u8>], listeners: &[Vec<u8>], http_as_tcp: bool) -> Result<Self, ControlError> {
        let mut held = Self { http_as_tcp, ..Self::default() };
        for bytes in clusters {
            let message = decode::<ClusterMessage>(bytes, Kind::Cluster)?;
            let parsed = Cluster::parse(&message).map_err(|why| unusable(Kind::Cluster, &message.name, &why))?;
            held.clusters.fix(message.name, parsed);
        }
        for bytes in listeners {
            let message = decode::<ListenerMessage>(bytes, Kind::Listener)?;
            let parsed = Listener::parse(&message, http_as_tcp).and_then(|listener| {
                check_target(&listener, &held.clusters)?;
                Ok(listener)
            });
            let parsed = parsed.map_err(|why| unusable(Kind::Listener, &message.name, &why))?;
            held.listeners.fix(message.name, parsed);
        }
        Ok(held)
    }

    /// Takes what is good of a response; returns what is not, each with its type, name, field, value and what would do.
    pub(super) fn apply(&mut self, kind: Kind, response: &DeltaDiscoveryResponse) -> Vec<String> {
        let before = self.in_force(kind, response);
        let Self { clusters, listeners, routes, http_as_tcp, .. } = self;
        let refused = match kind {
            Kind::Cluster => clusters.apply(kind, response, |resource| Cluster::parse(&body::<ClusterMessage>(resource, kind)?)),
            Kind::Endpoints => self.apply_members(response),
            Kind::Routes => routes.apply(kind, response, |resource| Routed::parse(&body::<RouteConfiguration>(resource, kind)?)),
            Kind::Listener => {
                let refused = listeners.apply(kind, response, |resource| {
                    let listener = Listener::parse(&body::<ListenerMessage>(resource, kind)?, *http_as_tcp)?;
                    check_target(&listener, clusters)?;
                    Ok(listener)
                });
                for entry in listeners.entries.values_mut().filter(|entry| entry.outdated) {
                    Arc::make_mut(&mut entry.value).deny_all();
                }
                refused
            }
        };
        before.into_iter().for_each(|(name, before)| self.warm(name, before));
        self.promote();
        refused
    }

    /// Takes members, and counts what is said of them.
    fn apply_members(&mut self, response: &DeltaDiscoveryResponse) -> Vec<String> {
        let Self { endpoints, fetched, gone, .. } = self;
        let known = |name: &String| endpoints.get(name).or_else(|| gone.get(name)).map(|known| (name.clone(), Arc::clone(known)));
        let before: BTreeMap<_, _> = response.resources.iter().filter_map(|resource| known(&resource.name)).collect();
        for name in &response.removed_resources {
            if let Some(members) = endpoints.get(name) {
                gone.insert(name.clone(), Arc::clone(members));
            }
            let told = fetched.entry(name.clone()).or_default();
            told.answers.accepted += 1;
            told.empty += 1;
        }
        endpoints.apply(Kind::Endpoints, response, |resource| {
            let told = fetched.entry(resource.name.clone()).or_default();
            let parsed = body::<ClusterLoadAssignment>(resource, Kind::Endpoints).and_then(|message| Assignment::parse(&message));
            match &parsed {
                Err(_) => told.answers.rejected += 1,
                Ok(next) => {
                    let before = before.get(&resource.name);
                    let unchanged = before.map_or_else(|| next.places().next().is_none(), |before| **before == *next);
                    told.answers.accepted += 1;
                    told.unchanged += u64::from(unchanged);
                }
            }
            parsed
        })
    }

    /// A certificate came by its name; one that nobody asked for, or does no more, is dropped.
    pub(super) fn take_secret(&mut self, name: SecretName, secret: Secret) {
        if self.secret_names().contains(&name) {
            let before = self.secrets.get(&name).map(|before| &before.came);
            let secret = Secret { came: secret.came.in_place_of(before), ..secret };
            self.secrets.insert(name, Arc::new(secret));
            self.promote();
        }
    }

    /// The listeners in force of which a response brings newer ones.
    fn in_force(&self, kind: Kind, response: &DeltaDiscoveryResponse) -> Vec<(String, Newest)> {
        let named = response.resources.iter().filter(|_| kind == Kind::Listener);
        let in_force = named.filter_map(|one| {
            let entry = self.listeners.entries.get(&one.name)?;
            let serving = match self.warming.get(&one.name) {
                Some(newest) => newest.serving.clone(),
                None => entry.came.clone(),
            };
            Some((one.name.clone(), Newest { listener: Arc::clone(&entry.value), serving }))
        });
        in_force.collect()
    }

    /// Leaves `before` in force where the newest of its name has to wait.
    fn warm(&mut self, name: String, before: Newest) {
        let Newest { listener: before, serving } = before;
        self.warming.remove(&name);
        let Some(entry) = self.listeners.entries.get(&name) else { return };
        let newest = Arc::clone(&entry.value);
        let lets_in = [&before, &newest].iter().any(|listener| listener.endings().next().is_some());
        // What never served has nothing to go on with.
        if entry.outdated || lets_in || self.waits(&newest).is_none() || self.waits(&before).is_some() {
            return;
        }
        if let Some(entry) = self.listeners.entries.get_mut(&name) {
            entry.value = before;
        }
        self.warming.insert(name, Newest { listener: newest, serving });
    }

    /// Puts those in force that need not wait any more.
    fn promote(&mut self) {
        let mut warming = std::mem::take(&mut self.warming);
        warming.retain(|name, newest| {
            let waits = self.waits(&newest.listener).is_some();
            match self.listeners.entries.get_mut(name) {
                Some(entry) if !waits => {
                    entry.value = Arc::clone(&newest.listener);
                    false
                }
                there => there.is_some(),
            }
        });
        self.warming = warming;
    }

    /// The routes or the secret that a listener cannot be served without.
    pub(super) fn waits(&self, listener: &Listener) -> Option<String> {
        let routes = listener.destinations().find(|to| self.cluster_of(to).is_none());
        let secret = || listener.secrets().find(|name| !self.secrets.contains_key(name));
        routes.map(|to| format!("routes {}", to.name())).or_else(|| secret().map(|name| format!("secret {name}")))
    }

    /// Whether the newest routes of a name were refused: they are not waited for.
    pub(super) fn has_refused_routes(&self, listener: &Listener) -> bool {
        listener.destinations().any(|to| matches!(to, Destination::Routes(name) if self.routes.refused.contains_key(name)))
    }

    /// The names by which resources of a kind must be asked for. None at all are the names of those that all are asked for.
    pub(super) fn names(&self, kind: Kind) -> BTreeSet<String> {
        match kind {
            Kind::Cluster | Kind::Listener => BTreeSet::new(),
            Kind::Endpoints => {
                let of_clusters = self.clusters.values().filter_map(|cluster| match &cluster.discovery {
                    Discovery::Eds(name) => Some(name.clone()),
                    _ => None,
                });
                of_clusters.collect()
            }
            Kind::Routes => {
                let of_listeners = self.all_listeners().flat_map(|listener| listener.destinations());
                let of_listeners = of_listeners.filter_map(|destination| match destination {
                    Destination::Routes(name) => Some(name.clone()),
                    Destination::Cluster(_) => None,
                });
                of_listeners.collect()
            }
        }
    }

    /// The cluster behind a listener or chain; none where the routes to it are not here.
    pub(super) fn cluster_of<'a>(&'a self, destination: &'a Destination) -> Option<&'a str> {
        match destination {
            Destination::Cluster(name) => Some(name),
            Destination::Routes(name) => self.routes.get(name).map(|routed| routed.cluster.as_str()),
        }
    }

    /// The secrets that must be asked for.
    pub(super) fn secret_names(&self) -> BTreeSet<SecretName> {
        self.all_listeners().flat_map(|listener| listener.secrets()).cloned().collect()
    }

    /// Every listener in force, and those that are warming.
    fn all_listeners(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values().chain(self.warming.values().map(|newest| &newest.listener))
    }

    /// Drops what nobody asks for by name any more.
    pub(super) fn forget_unnamed(&mut self) {
        let secrets = self.secret_names();
        self.secrets.retain(|name, _| secrets.contains(name));
        let (endpoints, routes) = (self.names(Kind::Endpoints), self.names(Kind::Routes));
        self.fetched.retain(|name, _| endpoints.contains(name));
        self.gone.retain(|name, _| endpoints.contains(name) && self.endpoints.get(name).is_none());
        self.endpoints.keep_only(&endpoints);
        self.routes.keep_only(&routes);
    }

    /// What the server has sent, by kind in the order of [`Kind::ALL`]. The same `Arc` as before for what did not change.
    pub(super) fn shown(&mut self) -> [Arc<[ShownResource]>; Kind::ALL.len()] {
        [self.clusters.shown(), self.endpoints.shown(), self.listeners.shown(), self.routes.shown()]
    }

    /// The secrets that are asked for, each as it came; those without still wait.
    pub(super) fn secrets_shown(&self) -> Vec<(String, Option<Arc<Secret>>)> {
        self.secret_names().iter().map(|name| (name.name.clone(), self.secrets.get(name).cloned())).collect()
    }

    /// Clusters without their first endpoints: they are dialed by nobody.
    pub(super) fn waiting_clusters(&self) -> impl Iterator<Item = &String> {
        let waits = |cluster: &Cluster| matches!(&cluster.discovery, Discovery::Eds(name) if self.endpoints.get(name).is_none());
        self.clusters.entries.iter().filter(move |(_, entry)| waits(&entry.value)).map(|(name, _)| name)
    }

    /// Listeners whose newest version waits for routes or a secret, with what serves meanwhile as it came.
    pub(super) fn waiting_listeners(&self) -> impl Iterator<Item = (&String, Option<&Arc<Came>>)> {
        let behind = self.warming.iter().map(|(name, newest)| (name, newest.serving.as_ref()));
        let entries = self.listeners.entries.iter().filter(|(name, _)| !self.warming.contains_key(*name));
        let alone = entries.filter(|(_, entry)| self.waits(&entry.value).is_some()).map(|(name, _)| (name, None));
        alone.chain(behind)
    }

    /// What was told of a cluster's members, where that is told apart from it.
    pub(super) fn fetched(&self, cluster: &str) -> Option<Fetched> {
        match &self.clusters.get(cluster)?.discovery {
            Discovery::Eds(name) => Some(self.fetched.get(name).copied().unwrap_or_default()),
            _ => None,
        }
    }

    /// What is held of a kind, for a server that starts over.
    pub(super) fn versions(&self, kind: Kind) -> std::collections::HashMap<String, String> {
        match kind {
            Kind::Cluster => self.clusters.versions().collect(),
            Kind::Endpoints => self.endpoints.versions().collect(),
            Kind::Listener => self.listeners.versions().collect(),
            Kind::Routes => self.routes.versions().collect(),
        }
    }
}

fn decode<T: prost::Message + Default>(bytes: &[u8], kind: Kind) -> Result<T, ControlError> {
    T::decode(bytes).map_err(|error| ControlError::Config(format!("a {} of the bootstrap: {error}", kind.message())))
}

fn unusable(kind: Kind, name: &str, why: &Refusal) -> ControlError {
    ControlError::Config(format!("the bootstrap's {} {name} cannot be served: {why}", kind.message()))
}

fn body<T: prost::Message + Default>(resource: &Resource, kind: Kind) -> Result<T, Refusal> {
    match &resource.resource {
        Some(any) => unpack(any, kind.message(), "resource"),
        None => Err(Refusal::missing("resource", format!("expected a {}", kind.message()))),
    }
}

/// An upstream speaks mutual TLS. Its cluster may still be on its way; it is looked at again when the snapshot is built.
fn check_target(listener: &Listener, clusters: &Shelf<Cluster>) -> Result<(), Refusal> {
    let Role::Upstream { passage, .. } = &listener.role else { return Ok(()) };
    let Destination::Cluster(name) = &passage.to else { return Ok(()) };
    let Some(cluster) = clusters.get(name) else { return Ok(()) };
    if cluster.spoken.mesh().is_none() && !matches!(cluster.discovery, Discovery::Aggregate(_)) {
        let wanted = "its cluster has no UpstreamTlsContext of the mesh, and nothing leaves for the mesh without";
        return Err(Refusal::new("filter_chains[0].filters.tcp_proxy.cluster", name, wanted));
    }
    Ok(())
}
