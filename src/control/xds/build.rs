//! From the held resources to the service and routers that workers enforce: a pure function of both and of what was published before.
//!
//! Invariant: a part that did not change is the very same `Arc`. An upstream whose endpoints are not known yet keeps the targets
//! that it had; one that never had any has none (workers hold its connections). What cannot be served is left out and named.

mod routes;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::cluster::{Cluster, Discovery};
use super::endpoint::{Assignment, Host, Place};
use super::held::Held;
use super::identity::Identities;
use super::listener::{Destination, Ending, Listener, PageRoute, Role, Target as PageTarget, Tuning};
use super::tls_context::{self, Front as ClientTls, Material, Spoken};
use crate::config;
use crate::config::envoy::{PageAnswer, PageListener};
use crate::control::build::{keep, keep_text};
use crate::control::consul::watch::hosts::ADDRESSES_MAX;
use crate::mesh::router::Router;
use crate::mesh::{Address, Bind, DenyReply, Endpoint, Identity, PublicListener, Service, Snapshot, Target, Upstream};
use crate::policy::Intentions;
use crate::tls::{FrontTls, OutsideTls};

/// What is answered for an app that cannot be asked.
const UNAVAILABLE: u16 = 503;
/// How deep aggregates may lie in each other.
const AGGREGATE_DEPTH_MAX: usize = 8;

/// What is resolved.
pub(super) type Hosts = BTreeMap<String, Vec<IpAddr>>;

/// What a snapshot is made of besides the resources.
pub(super) struct Surroundings<'a> {
    pub(super) proxy_id: &'a str,
    /// The service's name until the certificate tells it, and that of a gateway.
    pub(super) cluster: &'a str,
    pub(super) hosts: &'a Hosts,
    pub(super) identities: &'a Identities,
}

/// What is published, and what of the resources is not in it.
pub(super) struct Built {
    pub(super) service: Arc<Service>,
    pub(super) routers: Vec<Arc<Router>>,
    pub(super) pages: Vec<PageListener>,
    pub(super) notes: Vec<String>,
}

/// The service and the routers that the resources describe. `old` is what was published last.
pub(super) fn mesh(held: &Held, around: &Surroundings<'_>, old: &Snapshot) -> Built {
    let warming = held.warming.iter().filter_map(|(name, newest)| Some((name, held.waits(&newest.listener)?)));
    let warming =
        warming.map(|(name, what)| format!("listener {name}: its newest waits for the {what}, the one before it serves"));
    let mut builder = Builder { held, around, notes: warming.collect() };
    let service = builder.service(old.services.first());
    let (mut routers, mut pages) = (Vec::new(), Vec::new());
    for listener in held.listeners.values() {
        match &listener.role {
            Role::Router(routes) => routers.extend(builder.router(listener, routes, &old.routers)),
            Role::Pages { routes, sources } => pages.extend(builder.page(listener, routes, sources)),
            Role::Public(_) | Role::Upstream { .. } => {}
        }
    }
    Built { service, routers, pages, notes: builder.notes }
}

/// All that is looked at while a snapshot is built.
struct Builder<'a> {
    held: &'a Held,
    around: &'a Surroundings<'a>,
    notes: Vec<String>,
}

/// What may be spoken to the members of an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Allowed {
    /// Mutual TLS of the mesh.
    Mesh,
    /// The same, wherever a redirected client wanted to go.
    MeshAtOriginal,
    /// What the client speaks, as it is.
    AsItCame,
    /// Plain, or TLS of their own: they are the app behind a gateway.
    App,
}

/// What a listener or chain says of the upstream behind it.
#[derive(Clone, Copy)]
struct Front<'a> {
    label: &'a str,
    bind: &'a Bind,
    tuning: Tuning,
    /// What its clients must speak.
    tls: Option<&'a ClientTls>,
}

impl Builder<'_> {
    fn service(&mut self, old: Option<&Arc<Service>>) -> Arc<Service> {
        let (mut public, mut intentions) = (None, None);
        let mut upstreams: Vec<Arc<Upstream>> = Vec::new();
        let old_upstreams = old.map_or(&[][..], |old| &old.upstreams);
        let old_upstreams: HashMap<_, _> = old_upstreams.iter().map(|old| ((&old.bind, &*old.name), old)).collect();
        let identity = self.identity().map(Arc::clone);
        for listener in self.held.listeners.values() {
            let built = match &listener.role {
                Role::Public(_) if public.is_some() => Err("a second public listener".to_owned()),
                Role::Public(ending) => self.public_listener(listener, ending).map(|next| {
                    public = Some(keep(next, old.and_then(|old| old.public.as_ref())));
                    intentions = Some(keep((*ending.intentions).clone(), old.map(|old| &old.intentions)));
                }),
                Role::Upstream { label, passage } => {
                    let old = old_upstreams.get(&(&listener.bind, label.as_str())).copied();
                    let front = Front { label, bind: &listener.bind, tuning: listener.tuning, tls: passage.front.as_deref() };
                    let next = self.named(&passage.to).and_then(|to| self.upstream(to, front, Allowed::Mesh, old));
                    next.map(|next| upstreams.push(next))
                }
                Role::Pages { .. } | Role::Router(_) => Ok(()),
            };
            if let Err(why) = built {
                self.notes.push(format!("listener {}: {why}", listener.name));
            }
        }
        let name = identity.as_ref().and_then(|identity| identity.svid.id.service_name());
        let name = name.map_or(self.around.cluster, |name| &*name.service);
        let unknown = || keep(Intentions::unknown(), old.map(|old| &old.intentions));
        let next = Service {
            name: keep_text(old.map(|old| &old.name), name),
            proxy_id: keep_text(old.map(|old| &old.proxy_id), self.around.proxy_id),
            identity,
            intentions: intentions.unwrap_or_else(unknown),
            public,
            upstreams,
        };
        keep_service(next, old)
    }

    /// What the service shows: to peers, or where it only calls, upstream. A gateway that does neither has nothing to show.
    fn identity(&self) -> Option<&Arc<Identity>> {
        let mut endings = self.held.listeners.values().filter_map(|listener| match &listener.role {
            Role::Public(ending) => Some(ending),
            Role::Upstream { .. } | Role::Pages { .. } | Role::Router(_) => None,
        });
        if let Some(ending) = endings.next() {
            return self.around.identities.of(&ending.material);
        }
        let mut upstreams = self.held.listeners.values().filter_map(|listener| match &listener.role {
            Role::Upstream { passage, .. } => Some(&passage.to),
            Role::Public(_) | Role::Pages { .. } | Role::Router(_) => None,
        });
        upstreams.find_map(|to| {
            let mut leaves = Vec::new();
            collect(self.held, self.held.cluster_of(to)?, 0, &mut leaves).ok()?;
            leaves.iter().find_map(|leaf| self.around.identities.of(&leaf.spoken.mesh()?.material))
        })
    }

    fn public_listener(&self, listener: &Listener, ending: &Ending) -> Result<PublicListener, String> {
        let cluster = self.cluster(self.named(&ending.to)?)?;
        let app = self.app(cluster)?;
        if app.is_empty() {
            return Err(format!("cluster {} has no address for the app", cluster.name));
        }
        Ok(PublicListener {
            bind: listener.bind.clone(),
            app,
            local_connect_timeout: cluster.connect_timeout,
            local_keepalive: cluster.keepalive,
            handshake_timeout: config::HANDSHAKE_TIMEOUT,
            max_inbound_connections: ending.max_connections,
            idle_timeout: listener.tuning.idle_timeout,
        })
    }

    /// A listener for single paths of local apps, each at the first address of its cluster.
    fn page(&mut self, listener: &Listener, routes: &[PageRoute], sources: &[(IpAddr, u8)]) -> Option<PageListener> {
        let Bind::Tcp(bind) = listener.bind else {
            self.notes.push(format!("listener {}: HTTP is served at TCP addresses only", listener.name));
            return None;
        };
        let mut notes = Vec::new();
        let routes = routes.iter().map(|route| {
            let answer = self.page_answer(&route.to).unwrap_or_else(|why| {
                notes.push(format!("listener {}: {why}", listener.name));
                PageAnswer::Status(UNAVAILABLE)
            });
            config::envoy::PageRoute { path: route.path.clone(), answer }
        });
        let routes = routes.collect();
        self.notes.extend(notes);
        Some(PageListener { name: listener.name.clone(), bind, routes, tls: None, sources: sources.to_vec() })
    }

    fn page_answer(&self, target: &PageTarget) -> Result<PageAnswer, String> {
        let (name, rewrite) = match target {
            PageTarget::Status(status) => return Ok(PageAnswer::Status(*status)),
            PageTarget::Cluster { name, rewrite } => (name, rewrite.clone()),
        };
        let cluster = self.cluster(name)?;
        match self.app(cluster)?.first() {
            Some(Address::Tcp(address)) => Ok(PageAnswer::Backend { address: *address, rewrite, http2: cluster.http2 }),
            Some(Address::Unix(_)) | None => Err(format!("cluster {name} has no TCP address")),
        }
    }

    /// The name of the cluster behind a listener or chain.
    fn named<'b>(&'b self, to: &'b Destination) -> Result<&'b str, String> {
        self.held.cluster_of(to).ok_or_else(|| format!("the routes {} are not there", to.name()))
    }

    fn cluster(&self, name: &str) -> Result<&Cluster, String> {
        self.held.clusters.get(name).map(|cluster| &**cluster).ok_or_else(|| format!("cluster {name} is not there"))
    }

    /// Every address of an app that is reached in plain.
    fn app(&self, cluster: &Cluster) -> Result<Vec<Address>, String> {
        if cluster.spoken != Spoken::Plain {
            return Err(format!("cluster {} speaks TLS, and the app behind a public listener is reached in plain", cluster.name));
        }
        let members = members(self.held, cluster).ok_or_else(|| format!("cluster {} has no endpoints yet", cluster.name))?;
        let mut app = Vec::new();
        for place in members.places() {
            match &place.host {
                Host::Unix(path) => app.push(Address::Unix(path.clone())),
                Host::Tcp(..) => app.extend(addresses(place, self.around.hosts).into_iter().map(Address::Tcp)),
            }
        }
        Ok(app)
    }

    fn upstream(
        &self,
        cluster: &str,
        front: Front<'_>,
        allowed: Allowed,
        old: Option<&Arc<Upstream>>,
    ) -> Result<Arc<Upstream>, String> {
        let leaves = self.leaves(cluster, allowed)?;
        // What decides on the connection as a whole is said by the outermost cluster, what decides on members by the first.
        let outer = self.cluster(cluster)?;
        let first = leaves.first().ok_or_else(|| format!("cluster {cluster} has no members"))?;
        let old_targets = old.map_or(&[][..], |old| &old.targets);
        let mut targets: Vec<Arc<Target>> = Vec::new();
        for cluster in &leaves {
            let (sni, expected) = match (&cluster.spoken, allowed) {
                (Spoken::Mesh(tls), Allowed::Mesh | Allowed::MeshAtOriginal) => (Arc::clone(&tls.sni), Arc::clone(&tls.expected)),
                (Spoken::Plain, Allowed::AsItCame | Allowed::App) | (Spoken::Outside(_), Allowed::App) => ("".into(), [].into()),
                (Spoken::Plain | Spoken::Outside(_), Allowed::Mesh | Allowed::MeshAtOriginal) => {
                    return Err(format!("cluster {} has no UpstreamTlsContext of the mesh", cluster.name));
                }
                (Spoken::Mesh(_) | Spoken::Outside(_), Allowed::AsItCame) | (Spoken::Mesh(_), Allowed::App) => {
                    return Err(format!("cluster {} speaks TLS of its own, which is not done here", cluster.name));
                }
            };
            let nobody = (allowed == Allowed::MeshAtOriginal).then(Assignment::default);
            let Some(members) = nobody.as_ref().or_else(|| members(self.held, cluster)) else {
                let prefix = format!("{}#", cluster.name);
                let kept = old_targets.iter().filter(|old| *old.id == *cluster.name || old.id.starts_with(&prefix));
                targets.extend(kept.map(|old| {
                    let next = Target { sni: Arc::clone(&sni), expected: Arc::clone(&expected), ..(**old).clone() };
                    keep(next, Some(old))
                }));
                continue;
            };
            let none = Vec::new();
            let priorities = if members.priorities.is_empty() { std::slice::from_ref(&none) } else { &members.priorities };
            for (priority, places) in priorities.iter().enumerate() {
                let id = if priority == 0 { cluster.name.clone() } else { format!("{}#{priority}", cluster.name) };
                let next = Target {
                    id: id.as_str().into(),
                    sni: Arc::clone(&sni),
                    expected: Arc::clone(&expected),
                    endpoints: endpoints(places, self.around.hosts).into(),
                    access: None,
                };
                targets.push(keep(next, old_targets.iter().find(|old| *old.id == *id)));
            }
        }
        let next = Upstream {
            name: keep_text(old.map(|old| &old.name), front.label),
            bind: front.bind.clone(),
            connect_timeout: first.connect_timeout,
            balance: first.balance,
            max_connections: outer.max_connections.or(first.max_connections),
            outlier: first.outlier,
            idle_timeout: front.tuning.idle_timeout,
            panic_percent: first.panic_percent,
            keepalive: first.keepalive,
            connect_attempts: front.tuning.connect_attempts,
            front: self.front(front.tls, old)?,
            outside: self.outside(&leaves, old)?,
            original: allowed == Allowed::MeshAtOriginal,
            deny_reply: DenyReply::Close,
            targets,
        };
        Ok(keep(next, old))
    }
}

impl Builder<'_> {
    /// The clusters that have members, behind `name`.
    fn leaves(&self, name: &str, allowed: Allowed) -> Result<Vec<&Cluster>, String> {
        if allowed == Allowed::MeshAtOriginal {
            return Ok(vec![self.cluster(name)?]);
        }
        let mut leaves = Vec::new();
        collect(self.held, name, 0, &mut leaves)?;
        Ok(leaves)
    }

    /// The TLS of clients outside of the mesh.
    fn front(&self, tls: Option<&ClientTls>, old: Option<&Arc<Upstream>>) -> Result<Option<Arc<FrontTls>>, String> {
        let Some(tls) = tls else { return Ok(None) };
        let settings = tls.settings(&self.held.secrets).ok_or_else(|| match tls.secret() {
            Some(name) => format!("the secret {name} is not there"),
            None => "it has no certificate".to_owned(),
        })?;
        let old = old.and_then(|old| old.front.as_ref());
        tls_context::keep_front(settings, self.around.identities.workers(), old).map(Some)
    }

    /// The TLS of an app outside of the mesh, which all its clusters must have in common.
    fn outside(&self, leaves: &[&Cluster], old: Option<&Arc<Upstream>>) -> Result<Option<Arc<OutsideTls>>, String> {
        let Some(first) = leaves.first() else { return Ok(None) };
        if let Some(other) = leaves.iter().find(|leaf| !same_outside(&leaf.spoken, &first.spoken)) {
            return Err(format!("clusters {} and {} of one app differ in TLS; give both the same", first.name, other.name));
        }
        match &first.spoken {
            Spoken::Outside(settings) => {
                let old = old.and_then(|old| old.outside.as_ref());
                tls_context::keep_outside(settings, self.around.identities.workers(), old).map(Some)
            }
            Spoken::Plain | Spoken::Mesh(_) => Ok(None),
        }
    }
}

fn same_outside(a: &Spoken, b: &Spoken) -> bool {
    match (a, b) {
        (Spoken::Outside(a), Spoken::Outside(b)) => a == b,
        (Spoken::Outside(_), _) | (_, Spoken::Outside(_)) => false,
        (Spoken::Plain | Spoken::Mesh(_), _) => true,
    }
}

/// Every TLS context in force that is not out of date, the listeners' first.
pub(super) fn materials(held: &Held) -> impl Iterator<Item = &Arc<Material>> {
    let of_listeners = held.listeners.up_to_date().flat_map(|listener| listener.endings()).map(|ending| &ending.material);
    of_listeners.chain(held.clusters.up_to_date().filter_map(|cluster| cluster.spoken.mesh().map(|tls| &tls.material)))
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

/// The first routes, secret or members of a cluster behind a listener that are still asked for.
pub(super) fn waits_for(held: &Held) -> Option<String> {
    held.listeners.values().find_map(|listener| {
        let members = |to| waiting(held, held.cluster_of(to)?, 0);
        let members = || listener.destinations().find_map(members);
        let what = held.waits(listener).filter(|_| !held.has_refused_routes(listener));
        what.map(|what| format!("waiting for the {what}"))
            .or_else(|| members().map(|cluster| format!("waiting for the endpoints of cluster {cluster}")))
    })
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

/// Whether two lists hold the very same parts.
pub(super) fn same_parts<T>(a: &[Arc<T>], b: &[Arc<T>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn keep_service(next: Service, old: Option<&Arc<Service>>) -> Arc<Service> {
    match old {
        Some(old) if unchanged(old, &next) => Arc::clone(old),
        _ => Arc::new(next),
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
        && same_parts(&old.upstreams, &next.upstreams)
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
