//! What came, changed and went since the start, counted as snapshots follow each other.
//!
//! Envoy counts resources; over the HTTP API there are none, so that what one would say is compared: a cluster is how members
//! are dialed and who may answer, a listener is where it is and whom it lets in. A rotated certificate changes neither here,
//! because it is exchanged in place. Over xDS resources are counted as they come, and only members are compared here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::config::Keepalive;
use crate::mesh::router::Way;
use crate::mesh::{Address, DenyReply, Endpoint, PublicListener, Snapshot, Target, Upstream};
use crate::policy::Intentions;
use crate::telemetry::stats::{AllMembers, Answers, Changes, Members, Told, Updates};

/// What Consul calls the cluster of the local app.
const LOCAL_APP: &str = "local_app";

/// By proxy id and cluster, borrowed from a snapshot.
type ByCluster<'a, T> = BTreeMap<(&'a Arc<str>, &'a str), T>;

/// The counts so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    clusters: Changes,
    listeners: Changes,
    members: Arc<AllMembers>,
}

/// What is compared of a cluster.
#[derive(Debug)]
enum Cluster<'a> {
    App { addresses: &'a [Address], connect_timeout: Duration, keepalive: Option<Keepalive> },
    Of(&'a Upstream),
}

impl PartialEq for Cluster<'_> {
    fn eq(&self, other: &Self) -> bool {
        let target = |target: &Arc<Target>| (Arc::clone(&target.id), Arc::clone(&target.sni), Arc::clone(&target.expected));
        let settings = |one: &Upstream| {
            let dialed = (one.connect_timeout, one.max_connections, one.keepalive, one.outside.clone());
            (dialed, one.balance, one.outlier, one.panic_percent)
        };
        match (self, other) {
            (
                Self::App { addresses, connect_timeout, keepalive },
                Self::App { addresses: others, connect_timeout: timeout, keepalive: other },
            ) => (addresses, connect_timeout, keepalive) == (others, timeout, other),
            (Self::Of(one), Self::Of(other)) => {
                settings(one) == settings(other) && one.targets.iter().map(target).eq(other.targets.iter().map(target))
            }
            _ => false,
        }
    }
}

/// What is compared of a listener.
#[derive(Debug, PartialEq, Eq)]
enum Listener<'a> {
    In { handshake_timeout: Duration, idle_timeout: Option<Duration>, connections_max: u32, intentions: &'a Intentions },
    Out { name: &'a str, to: Option<&'a str>, idle_timeout: Option<Duration>, attempts: Option<u32>, deny_reply: DenyReply },
}

/// Where a cluster leads.
#[derive(Debug, PartialEq, Eq)]
enum Places<'a> {
    App(&'a [Address]),
    /// Of each target.
    Endpoints(Vec<Arc<[Endpoint]>>),
}

impl Places<'_> {
    fn is_empty(&self) -> bool {
        match self {
            Self::App(addresses) => addresses.is_empty(),
            Self::Endpoints(targets) => targets.iter().all(|endpoints| endpoints.is_empty()),
        }
    }

    /// Whether some came or went.
    fn has_others_than(&self, before: &Self) -> bool {
        let addresses = |targets: &[Arc<[Endpoint]>]| -> BTreeSet<SocketAddr> {
            targets.iter().flat_map(|endpoints| endpoints.iter()).map(|endpoint| endpoint.address).collect()
        };
        match (self, before) {
            (Self::App(now), Self::App(before)) => now != before,
            (Self::Endpoints(now), Self::Endpoints(before)) => addresses(now) != addresses(before),
            _ => true,
        }
    }
}

impl Tally {
    /// Counts what distinguishes two snapshots that are published one after the other.
    pub(super) fn follow(&mut self, before: &Snapshot, now: &Snapshot) {
        count(&mut self.clusters, &clusters(before), &clusters(now));
        count(&mut self.listeners, &listeners(before), &listeners(now));
        self.follow_members(before, now);
    }

    /// The same of members alone.
    pub(super) fn follow_members(&mut self, before: &Snapshot, now: &Snapshot) {
        let (before, now) = (&places(before), &places(now));
        if before == now {
            return;
        }
        let mut members = AllMembers::new();
        for ((proxy, cluster), places) in now {
            let known = self.members.get(*proxy).and_then(|of_proxy| of_proxy.get_key_value(*cluster));
            let (name, mut told) =
                known.map_or_else(|| (Arc::from(*cluster), Members::default()), |(name, told)| (Arc::clone(name), *told));
            let old = before.get(&(*proxy, *cluster));
            let (changed, others) = match old {
                Some(old) => (old != places, places.has_others_than(old)),
                None => (!places.is_empty(), !places.is_empty()),
            };
            told.changes += u64::from(others);
            if let Places::Endpoints(_) = places {
                let fetched = told.fetched.get_or_insert_default();
                fetched.answers.accepted += u64::from(changed || old.is_none());
                fetched.unchanged += u64::from(!changed && old.is_none());
            }
            members.entry(Arc::clone(proxy)).or_default().insert(name, told);
        }
        self.members = Arc::new(members);
    }

    /// What is told of it, where each of so many answers was taken.
    pub(super) fn told(&self, accepted: u64) -> Told {
        let updates = |changes| Updates { answers: Answers { accepted, rejected: 0 }, changes, warming: 0 };
        Told { clusters: updates(self.clusters), listeners: updates(self.listeners), members: Arc::clone(&self.members) }
    }

    /// The same members with what was fetched of them, which is known by the clusters' own names: those here are of their stats.
    #[cfg(feature = "xds")]
    pub(super) fn members(
        &self,
        snapshot: &Snapshot,
        fetched: impl Fn(&str) -> Option<crate::telemetry::stats::Fetched>,
    ) -> AllMembers {
        let first = snapshot.all_upstreams().filter_map(|upstream| upstream.targets.first());
        let own = first.map(|target| (target.cluster(), target.id.split('#').next().unwrap_or_default()));
        let own: BTreeMap<&str, &str> = own.collect();
        let with = |(cluster, members): (&Arc<str>, &Members)| {
            let fetched = fetched(own.get(&**cluster).copied().unwrap_or(cluster));
            (Arc::clone(cluster), Members { fetched, ..*members })
        };
        self.members.iter().map(|(proxy, clusters)| (Arc::clone(proxy), clusters.iter().map(with).collect())).collect()
    }
}

fn count<K: Ord, V: PartialEq>(changes: &mut Changes, before: &BTreeMap<K, V>, now: &BTreeMap<K, V>) {
    for (key, value) in now {
        match before.get(key) {
            None => changes.added += 1,
            Some(old) => changes.modified += u64::from(old != value),
        }
    }
    changes.removed += before.keys().filter(|key| !now.contains_key(key)).count() as u64;
}

/// The first of several listeners that lead to a cluster tells of it.
fn clusters(snapshot: &Snapshot) -> ByCluster<'_, Cluster<'_>> {
    let mut clusters = BTreeMap::new();
    for service in &snapshot.services {
        if let Some(public) = &service.public {
            let PublicListener { local_connect_timeout: connect_timeout, local_keepalive: keepalive, .. } = **public;
            let app = Cluster::App { addresses: &public.app, connect_timeout, keepalive };
            clusters.insert((&service.proxy_id, LOCAL_APP), app);
        }
        for upstream in &service.upstreams {
            if let Some(target) = upstream.targets.first() {
                clusters.entry((&service.proxy_id, target.cluster())).or_insert(Cluster::Of(upstream));
            }
        }
    }
    clusters
}

/// By proxy id and address.
fn listeners(snapshot: &Snapshot) -> BTreeMap<(&Arc<str>, String), Listener<'_>> {
    let mut listeners = BTreeMap::new();
    for service in &snapshot.services {
        if let Some(public) = &service.public {
            let PublicListener { handshake_timeout, idle_timeout, max_inbound_connections: connections_max, .. } = **public;
            let shape = Listener::In { handshake_timeout, idle_timeout, connections_max, intentions: &service.intentions };
            listeners.insert((&service.proxy_id, public.bind.to_string()), shape);
        }
        for upstream in &service.upstreams {
            let Upstream { name, idle_timeout, connect_attempts: attempts, deny_reply, targets, .. } = &**upstream;
            let to = targets.first().map(|target| target.cluster());
            let shape = Listener::Out { name, to, idle_timeout: *idle_timeout, attempts: *attempts, deny_reply: *deny_reply };
            listeners.insert((&service.proxy_id, upstream.bind.to_string()), shape);
        }
    }
    listeners
}

/// Where every cluster leads, also on routes. What leads wherever its clients wanted to go has no members.
fn places(snapshot: &Snapshot) -> ByCluster<'_, Places<'_>> {
    let mut places = BTreeMap::new();
    let endpoints =
        |upstream: &Upstream| Places::Endpoints(upstream.targets.iter().map(|target| Arc::clone(&target.endpoints)).collect());
    for service in &snapshot.services {
        if let Some(public) = &service.public {
            places.insert((&service.proxy_id, LOCAL_APP), Places::App(&public.app));
        }
        for upstream in &service.upstreams {
            if let Some(target) = upstream.targets.first() {
                places.entry((&service.proxy_id, target.cluster())).or_insert_with(|| endpoints(upstream));
            }
        }
    }
    for router in &snapshot.routers {
        for route in router.routes() {
            let key = (&router.settings().proxy_id, route.cluster());
            match (route.upstream(), &route.way) {
                (Some(upstream), _) => {
                    places.entry(key).or_insert_with(|| endpoints(upstream));
                }
                (None, Way::Terminate { service, .. }) => {
                    let app = service.public.as_ref().map_or(&[][..], |public| &public.app);
                    places.entry(key).or_insert(Places::App(app));
                }
                (None, _) => {}
            }
        }
    }
    places
}

#[cfg(test)]
mod tests;
