//! From the held resources to the service that workers enforce: a pure function of both and of what was published before.
//!
//! Invariant: a part that did not change is the very same `Arc`. An upstream whose endpoints are not known yet keeps the targets
//! that it had; one that never had any has none (workers hold its connections). What cannot be served is left out and named.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::cluster::{Cluster, Discovery};
use super::endpoint::{Assignment, Host, Place};
use super::held::Held;
use super::listener::{Listener, Role};
use super::tls_context::Material;
use crate::config;
use crate::control::build::{keep, keep_text};
use crate::control::consul::watch::hosts::ADDRESSES_MAX;
use crate::mesh::{Address, DenyReply, Endpoint, Identity, PublicListener, Service, Target, Upstream};
use crate::policy::Intentions;

/// How deep aggregates may lie in each other.
const AGGREGATE_DEPTH_MAX: usize = 8;

/// What is resolved.
pub(super) type Hosts = BTreeMap<String, Vec<IpAddr>>;

/// What a service is made of besides the resources.
pub(super) struct Surroundings<'a> {
    pub(super) proxy_id: &'a str,
    /// The service's name until the certificate tells it.
    pub(super) cluster: &'a str,
    pub(super) hosts: &'a Hosts,
    pub(super) identity: Option<&'a Arc<Identity>>,
}

/// A service, and what of the resources is not in it.
pub(super) struct Built {
    pub(super) service: Arc<Service>,
    pub(super) notes: Vec<String>,
}

/// The service that the resources describe. `old` is what was published last.
pub(super) fn service(held: &Held, around: &Surroundings<'_>, old: Option<&Arc<Service>>) -> Built {
    let mut notes = Vec::new();
    let (mut public, mut intentions) = (None, None);
    let mut upstreams: Vec<Arc<Upstream>> = Vec::new();
    let old_upstreams = old.map_or(&[][..], |old| &old.upstreams);
    for listener in held.listeners.values() {
        match &listener.role {
            Role::Public { .. } if public.is_some() => {
                notes.push(format!("listener {}: a second public listener", listener.name))
            }
            Role::Public { intentions: policy, max_connections, .. } => {
                match public_listener(held, around.hosts, listener, *max_connections) {
                    Ok(next) => {
                        public = Some(keep(next, old.and_then(|old| old.public.as_ref())));
                        intentions = Some(keep((**policy).clone(), old.map(|old| &old.intentions)));
                    }
                    Err(why) => notes.push(format!("listener {}: {why}", listener.name)),
                }
            }
            Role::Upstream { label } => match upstream(held, around.hosts, listener, label, old_upstreams) {
                Ok(next) => upstreams.push(next),
                Err(why) => notes.push(format!("listener {}: {why}", listener.name)),
            },
        }
    }
    let name = around.identity.and_then(|identity| identity.svid.id.service_name()).map_or(around.cluster, |name| &*name.service);
    let unknown = || keep(Intentions::unknown(), old.map(|old| &old.intentions));
    let next = Service {
        name: keep_text(old.map(|old| &old.name), name),
        proxy_id: keep_text(old.map(|old| &old.proxy_id), around.proxy_id),
        identity: around.identity.map(Arc::clone),
        intentions: intentions.unwrap_or_else(unknown),
        public,
        upstreams,
    };
    let service = match old {
        Some(old) if unchanged(old, &next) => Arc::clone(old),
        _ => Arc::new(next),
    };
    Built { service, notes }
}

/// Every TLS context in force that is not out of date, the listeners' first.
pub(super) fn materials(held: &Held) -> impl Iterator<Item = &Arc<Material>> {
    let of_listeners = held.listeners.up_to_date().filter_map(|listener| match &listener.role {
        Role::Public { material, .. } => Some(material),
        Role::Upstream { .. } => None,
    });
    of_listeners.chain(held.clusters.up_to_date().filter_map(|cluster| cluster.tls.as_ref().map(|tls| &tls.material)))
}

/// The names that must be resolved, and how often.
pub(super) fn names(held: &Held) -> BTreeMap<String, Duration> {
    let mut names = BTreeMap::new();
    for cluster in held.clusters.values() {
        if let Discovery::Dns(members, refresh) = &cluster.discovery {
            for name in members.places().filter_map(|place| place.host.name()) {
                let known = names.entry(name.to_owned()).or_insert(*refresh);
                *known = (*known).min(*refresh);
            }
        }
    }
    names
}

/// The first cluster behind a listener whose members are still asked for.
pub(super) fn waits_for(held: &Held) -> Option<&str> {
    held.listeners.values().find_map(|listener| waiting(held, &listener.cluster, 0))
}

fn waiting<'a>(held: &'a Held, name: &'a str, depth: usize) -> Option<&'a str> {
    let Some(cluster) = held.clusters.get(name) else { return Some(name) };
    match &cluster.discovery {
        Discovery::Eds(service) => held.endpoints.get(service).is_none().then_some(name),
        Discovery::Aggregate(members) if depth < AGGREGATE_DEPTH_MAX => {
            members.iter().find_map(|member| waiting(held, member, depth + 1))
        }
        _ => None,
    }
}

fn unchanged(old: &Service, next: &Service) -> bool {
    let same_identity = match (&old.identity, &next.identity) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    old.name == next.name
        && old.proxy_id == next.proxy_id
        && same_identity
        && Arc::ptr_eq(&old.intentions, &next.intentions)
        && old.public == next.public
        && old.upstreams.len() == next.upstreams.len()
        && old.upstreams.iter().zip(&next.upstreams).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn public_listener(held: &Held, hosts: &Hosts, listener: &Listener, max_connections: u32) -> Result<PublicListener, String> {
    let cluster = held.clusters.get(&listener.cluster).ok_or_else(|| format!("cluster {} is not there", listener.cluster))?;
    if cluster.tls.is_some() {
        return Err(format!("cluster {} speaks TLS, and the app behind a public listener is reached in plain", cluster.name));
    }
    let members = members(held, cluster).ok_or_else(|| format!("cluster {} has no endpoints yet", cluster.name))?;
    let mut app = Vec::new();
    for place in members.places() {
        match &place.host {
            Host::Unix(path) => app.push(Address::Unix(path.clone())),
            Host::Tcp(..) => app.extend(addresses(place, hosts).into_iter().map(Address::Tcp)),
        }
    }
    if app.is_empty() {
        return Err(format!("cluster {} has no address for the app", cluster.name));
    }
    Ok(PublicListener {
        bind: listener.bind.clone(),
        app,
        local_connect_timeout: cluster.connect_timeout,
        handshake_timeout: config::HANDSHAKE_TIMEOUT,
        max_inbound_connections: max_connections,
    })
}

fn upstream(
    held: &Held,
    hosts: &Hosts,
    listener: &Listener,
    label: &str,
    old_upstreams: &[Arc<Upstream>],
) -> Result<Arc<Upstream>, String> {
    let old = old_upstreams.iter().find(|old| old.bind == listener.bind && *old.name == *label);
    let mut leaves = Vec::new();
    collect(held, &listener.cluster, 0, &mut leaves)?;
    // What decides on the connection as a whole is said by the outermost cluster, what decides on members by the first.
    let outer = held.clusters.get(&listener.cluster).ok_or_else(|| format!("cluster {} is not there", listener.cluster))?;
    let first = leaves.first().ok_or_else(|| format!("cluster {} has no members", listener.cluster))?;
    let old_targets = old.map_or(&[][..], |old| &old.targets);
    let mut targets: Vec<Arc<Target>> = Vec::new();
    for cluster in &leaves {
        let tls = cluster.tls.as_ref().ok_or_else(|| format!("cluster {} has no UpstreamTlsContext", cluster.name))?;
        let Some(members) = members(held, cluster) else {
            let prefix = format!("{}#", cluster.name);
            targets.extend(old_targets.iter().filter(|old| *old.id == *cluster.name || old.id.starts_with(&prefix)).cloned());
            continue;
        };
        let none = Vec::new();
        let priorities = if members.priorities.is_empty() { std::slice::from_ref(&none) } else { &members.priorities };
        for (priority, places) in priorities.iter().enumerate() {
            let id = if priority == 0 { cluster.name.clone() } else { format!("{}#{priority}", cluster.name) };
            let next = Target {
                id: id.as_str().into(),
                sni: Arc::clone(&tls.sni),
                expected: Arc::clone(&tls.expected),
                endpoints: endpoints(places, hosts).into(),
                access: None,
            };
            targets.push(keep(next, old_targets.iter().find(|old| *old.id == *id)));
        }
    }
    let next = Upstream {
        name: keep_text(old.map(|old| &old.name), label),
        bind: listener.bind.clone(),
        connect_timeout: first.connect_timeout,
        balance: first.balance,
        max_connections: outer.max_connections.or(first.max_connections),
        outlier: first.outlier,
        deny_reply: DenyReply::Close,
        targets,
    };
    Ok(keep(next, old))
}

/// The clusters that have members, behind aggregates in their order.
fn collect<'a>(held: &'a Held, name: &str, depth: usize, leaves: &mut Vec<&'a Cluster>) -> Result<(), String> {
    let cluster = held.clusters.get(name).ok_or_else(|| format!("cluster {name} is not there"))?;
    match &cluster.discovery {
        Discovery::Aggregate(_) if depth >= AGGREGATE_DEPTH_MAX => {
            Err(format!("cluster {name} is an aggregate more than {AGGREGATE_DEPTH_MAX} deep"))
        }
        Discovery::Aggregate(members) => members.iter().try_for_each(|member| collect(held, member, depth + 1, leaves)),
        Discovery::OriginalDestination => {
            Err(format!("cluster {name} leads to original destinations, which this listener does not know"))
        }
        Discovery::Eds(_) | Discovery::Static(_) | Discovery::Dns(..) => {
            leaves.push(cluster);
            Ok(())
        }
    }
}

fn members<'a>(held: &'a Held, cluster: &'a Cluster) -> Option<&'a Assignment> {
    match &cluster.discovery {
        Discovery::Eds(service) => held.endpoints.get(service).map(|members| &**members),
        _ => cluster.told(),
    }
}

fn endpoints(places: &[Place], hosts: &Hosts) -> Vec<Endpoint> {
    let mut endpoints: Vec<Endpoint> = Vec::with_capacity(places.len());
    for place in places {
        for address in addresses(place, hosts) {
            match endpoints.iter_mut().find(|known| known.address == address) {
                // Two registrations of one address: alive if either is.
                Some(known) => {
                    known.healthy |= place.healthy;
                    known.weight = known.weight.max(place.weight);
                }
                None => endpoints.push(Endpoint { address, weight: place.weight, healthy: place.healthy }),
            }
        }
    }
    endpoints
}

fn addresses(place: &Place, hosts: &Hosts) -> Vec<SocketAddr> {
    let Host::Tcp(host, port) = &place.host else { return Vec::new() };
    match host.parse() {
        Ok(ip) => vec![SocketAddr::new(ip, *port)],
        Err(_) => hosts.get(host).into_iter().flatten().take(ADDRESSES_MAX).map(|ip| SocketAddr::new(*ip, *port)).collect(),
    }
}
