//! The stats themselves: Envoy's names for what was counted and for what is enforced.
//!
//! Invariant: a value is what was counted, or 0. These are 0 because this proxy has nothing that they could mean, or does not
//! know: bytes buffered (a flow receives only when all it had was sent), flow control, flushes, drain closes apart from
//! `ringfence_connections_closed_total`'s reasons, `ssl.fail_verify_*` but for the SAN (`ssl.connection_error` counts every
//! other failed handshake), curves and signature algorithms, `update_*` of members that are found by DNS, degraded and excluded
//! members, `server.version` (Envoy's commit), and watchdogs.
//!
//! A listener with routes has the sums of its routes ([`routes`]).
//!
//! An upstream is one cluster, as Consul makes it before 1.14: named after its first target, with all targets' endpoints. What
//! several upstreams lead to, and what several local services share by name (`local_app`), is told apart by [`Stat::owner`].

mod routes;
mod scopes;
mod updates;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;

use super::{Histogram, give_way};
use crate::config;
use crate::identity::ServiceName;
use crate::mesh::{Bind, Identity, Service, Snapshot, Upstream};
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::hub::{Ejection, Hub, Key, Share, Span, Totals};
pub use routes::prefix as route_prefix;
use scopes::{Cluster, Scope};
pub use updates::{AllMembers, Answers, Changes, Fetched, Members, Told, Updates};

/// Scopes made in a row before others get their turn.
const SCOPES_IN_A_ROW_MAX: usize = 32;
/// The owner of what belongs to the process.
const PROCESS: usize = 0;

/// One stat.
#[derive(Debug, Clone, PartialEq)]
pub struct Stat {
    /// Envoy's name, with everything that becomes tags.
    pub name: String,
    /// The place of its local service in [`Snapshot::services`].
    pub owner: usize,
    /// What it says.
    pub value: Value,
    /// Whether it was ever counted or set.
    pub used: bool,
}

/// Which stats are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All that Envoy has.
    All,
    /// Those that were ever counted or set. The others are not even named: of many upstreams they are most.
    Used,
}

/// Stats as they are made.
#[derive(Debug)]
pub(super) struct Made {
    stats: Vec<Stat>,
    which: Which,
    /// When the first root of each bundle ends, by the address of the bundle: all upstreams of a service have the same.
    root_ends: HashMap<usize, Option<u64>>,
}

impl Made {
    /// Seconds since 1970; none where no root can be read.
    fn first_root_end(&mut self, identity: &Identity) -> Option<u64> {
        let end = |root: &CertificateDer<'_>| {
            let (_, certificate) = x509_parser::parse_x509_certificate(root).ok()?;
            u64::try_from(certificate.validity().not_after.timestamp()).ok()
        };
        let first = || identity.bundle.roots.iter().filter_map(end).min();
        *self.root_ends.entry(Arc::as_ptr(&identity.bundle).addr()).or_insert_with(first)
    }
}

/// What a stat says.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Only grows.
    Counter(u64),
    /// Goes up and down.
    Gauge(u64),
    /// A text.
    Text(String),
    /// A distribution, in milliseconds.
    Histogram(Box<Histogram>),
}

/// What is copied from the hub in one go, so that it is free again while names are made.
#[derive(Debug, Default)]
pub struct Facts {
    series: BTreeMap<Key, (Totals, Vec<Share>)>,
    spans: BTreeMap<Key, Span>,
    ejections: Vec<Ejection>,
    worker_connections: Vec<u64>,
    listeners_failed: usize,
}

/// What only the process's other threads know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Envoy's `server.state`: 0 live, 1 draining, 2 before and 3 in initialisation.
    pub state: u64,
    /// How long it has run.
    pub uptime: Duration,
    /// Whether the control plane answers.
    pub connected: bool,
    /// What that has told.
    pub told: Told,
    /// What it occupies.
    pub memory: Memory,
}

/// Memory in bytes, as `/proc/self/status` has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Anonymous and resident.
    pub allocated: u64,
    /// Anonymous and mapped.
    pub heap: u64,
    /// Resident, files' pages included.
    pub physical: u64,
}

impl Facts {
    /// Copies what the workers have said so far.
    pub fn capture(hub: &Hub) -> Self {
        let series = hub.series();
        Self {
            series: series.totals().map(|(key, totals)| (key.clone(), (totals, series.shares(key)))).collect(),
            spans: hub.durations().spans().clone(),
            ejections: hub.ejections(),
            worker_connections: hub.worker_connections(),
            listeners_failed: hub.listeners().iter().filter(|listener| listener.failed() > 0).count(),
        }
    }

    fn at(&self, key: &Key) -> Counted<'_> {
        Counted { series: self.series.get(key), span: self.spans.get(key) }
    }

    /// How many endpoints of an upstream are ejected.
    fn ejected(&self, upstream: &Arc<str>) -> u64 {
        self.ejections.iter().filter(|ejection| ejection.upstream == *upstream).count() as u64
    }
}

/// What was counted for one listener.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counted<'a> {
    series: Option<&'a (Totals, Vec<Share>)>,
    span: Option<&'a Span>,
}

impl<'a> Counted<'a> {
    fn totals(&self) -> Totals {
        self.series.map(|(totals, _)| totals.clone()).unwrap_or_default()
    }

    fn shares(&self) -> &'a [Share] {
        self.series.map(|(_, shares)| shares.as_slice()).unwrap_or_default()
    }

    fn span(&self) -> Span {
        self.span.cloned().unwrap_or_default()
    }
}

impl Memory {
    /// What this process occupies now; zeros where `/proc` cannot be read.
    pub fn now() -> Self {
        std::fs::read_to_string("/proc/self/status").map_or_else(|_| Self::default(), |text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
            kib.unwrap_or_default().saturating_mul(1_024)
        };
        Self { allocated: bytes("RssAnon:"), heap: bytes("VmData:"), physical: bytes("VmRSS:") }
    }
}

/// Makes the stats, sorted by name. Gives way from time to time.
pub async fn build(snapshot: &Snapshot, facts: &Facts, process: &Process, which: Which) -> Vec<Stat> {
    let mut made = Made { stats: Vec::new(), which, root_ends: HashMap::new() };
    let mut breath = Breath(0);
    let mut clusters = 0;
    let owners = snapshot.services.len().max(usize::from(!snapshot.routers.is_empty()));
    for owner in 0..owners {
        let mut sums = Sums::default();
        if let Some(service) = snapshot.services.get(owner) {
            of_service(&mut made, owner, service, facts, &mut sums, &mut breath).await;
        }
        for router in snapshot.routers.iter().filter(|router| routes::owner(snapshot, router) == owner) {
            routes::tell(&mut made, owner, router, facts, &mut sums);
            breath.take().await;
        }
        clusters += sums.clusters.len();
        let members = proxy_id(snapshot, owner).and_then(|proxy| process.told.members.get(proxy));
        sums.tell(&mut made, owner, members, &mut breath).await;
    }
    of_process(&mut made, snapshot, facts, process, clusters);
    let mut stats = made.stats;
    // Runs of sorted names, which this sort takes as they are.
    stats.sort_by(|a, b| (&a.name, a.owner).cmp(&(&b.name, b.owner)));
    stats
}

/// What several listeners of one owner add to.
#[derive(Debug, Default)]
struct Sums {
    /// By `stat_prefix`.
    tcps: BTreeMap<String, scopes::Tcp>,
    clusters: BTreeMap<String, Cluster>,
    /// Of those who come in, and whether a limit is set on them.
    inbound: Option<(Totals, bool)>,
    /// Whose counters are in it: two chains of one service have the same.
    counted: BTreeSet<Key>,
}

impl Sums {
    /// What was counted under `key`; nothing the second time.
    fn first<'a>(&mut self, facts: &'a Facts, key: &Key) -> Counted<'a> {
        if self.counted.insert(key.clone()) { facts.at(key) } else { Counted::default() }
    }

    fn came_in(&mut self, totals: &Totals, limited: bool) {
        let (sum, any) = self.inbound.get_or_insert_with(Default::default);
        sum.merge(totals);
        *any |= limited;
    }

    async fn tell(self, made: &mut Made, owner: usize, members: Option<&BTreeMap<Arc<str>, Members>>, breath: &mut Breath) {
        if let Some((totals, limited)) = &self.inbound {
            scopes::authorisation(made, owner, totals, *limited);
        }
        for (prefix, tcp) in &self.tcps {
            tcp.tell(&mut Scope::new(made, owner, &format!("tcp.{prefix}")));
            breath.take().await;
        }
        for (name, cluster) in &self.clusters {
            let members = members.and_then(|members| members.get(name.as_str())).copied().unwrap_or_default();
            cluster.tell(&mut Scope::new(made, owner, &format!("cluster.{name}")), members);
            breath.take().await;
        }
    }
}

async fn of_service(made: &mut Made, owner: usize, service: &Service, facts: &Facts, sums: &mut Sums, breath: &mut Breath) {
    if let Some(public) = &service.public {
        let counted = sums.first(facts, &Key::inbound(&service.name));
        let totals = counted.totals();
        let tls = service.identity.as_deref().map_or(EndsHere::Nothing, |identity| EndsHere::Mesh(identity, &totals));
        listener(made, owner, &public.bind, &totals, counted.shares(), counted.span().length, tls);
        sums.tcps.entry("public_listener".to_owned()).or_default().take(&totals, Direction::Inbound);
        sums.came_in(&totals, public.max_inbound_connections > 0);
        let app = sums.clusters.entry("local_app".to_owned()).or_default();
        app.take_app(&totals, counted.span(), public.app.len());
        breath.take().await;
    }
    for upstream in &service.upstreams {
        let counted = sums.first(facts, &Key::outbound(&service.name, &upstream.name));
        let totals = counted.totals();
        let tls = upstream.front.as_ref().map_or(EndsHere::Nothing, |front| EndsHere::Front(front.not_after(), &totals));
        listener(made, owner, &upstream.bind, &totals, counted.shares(), counted.span().length, tls);
        sums.tcps.entry(stat_prefix(upstream, service)).or_default().take(&totals, Direction::Outbound);
        if let Some(name) = cluster_name(upstream) {
            let cluster = sums.clusters.entry(name).or_default();
            cluster.take_upstream(upstream, Direction::Outbound, &totals, counted.span(), facts.ejected(&upstream.name));
            cluster.speaks_as(service.identity.as_ref());
        }
        breath.take().await;
    }
}

/// Gives way after some scopes.
struct Breath(usize);

impl Breath {
    async fn take(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(SCOPES_IN_A_ROW_MAX) {
            give_way().await;
        }
    }
}

/// What TLS ends at a listener, and what was counted of it.
enum EndsHere<'a> {
    Nothing,
    Mesh(&'a Identity, &'a Totals),
    /// Of clients outside of the mesh, and when the first certificate for them ends.
    Front(SystemTime, &'a Totals),
}

fn listener(made: &mut Made, owner: usize, bind: &Bind, totals: &Totals, shares: &[Share], length: Histogram, tls: EndsHere<'_>) {
    let mut scope = Scope::new(made, owner, &format!("listener.{}", address(bind)));
    scopes::listener(&mut scope, totals, &length);
    for (worker, share) in shares.iter().enumerate() {
        scope.counter(&format!("worker_{worker}.downstream_cx_total"), share.connections);
        scope.gauge(&format!("worker_{worker}.downstream_cx_active"), share.active, true);
    }
    match tls {
        EndsHere::Nothing => {}
        EndsHere::Mesh(identity, totals) => {
            scopes::ssl(&mut scope, totals, closed(totals, CloseReason::HandshakeFailed), identity);
        }
        EndsHere::Front(not_after, totals) => scopes::front_tls(&mut scope, totals, not_after),
    }
}

/// Envoy writes an address with `_` in place of `:`.
fn address(bind: &Bind) -> String {
    match bind {
        Bind::Tcp(address) => address.to_string().replace(':', "_"),
        Bind::Unix { path, .. } => path.to_string_lossy().replace(':', "_"),
    }
}

/// Consul's `stat_prefix` of an upstream's listener.
fn stat_prefix(upstream: &Upstream, service: &Service) -> String {
    let (name, place) = upstream.name.split_once('?').unwrap_or((&upstream.name, ""));
    if let Some(query) = name.strip_prefix("prepared_query:") {
        return format!("upstream.prepared_query_{query}");
    }
    let own = own_name(service);
    let mut parts: Vec<&str> = name.rsplit('/').collect();
    let service = parts.remove(0);
    let namespace = parts.first().copied().or_else(|| own.map(|own| &*own.namespace)).unwrap_or("default");
    let elsewhere = place.strip_prefix("dc=").or_else(|| place.strip_prefix("peer="));
    let datacenter = elsewhere.or_else(|| own.map(|own| &*own.datacenter)).unwrap_or(config::DATACENTER);
    format!("upstream.{service}.{namespace}.{datacenter}")
}

/// Consul's name of the cluster that an upstream leads to.
fn cluster_name(upstream: &Upstream) -> Option<String> {
    upstream.targets.first().map(|target| target.cluster().to_owned())
}

fn own_name(service: &Service) -> Option<&ServiceName> {
    service.identity.as_ref().and_then(|identity| identity.svid.id.service_name())
}

/// What the stats of a key's durations are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleName {
    /// As in [`Stat::owner`].
    pub owner: usize,
    /// The listener's scope.
    pub listener: String,
    /// The cluster's scope, where there is one.
    pub cluster: Option<String>,
}

/// The names for samples, by key.
pub type SampleNames = BTreeMap<Key, SampleName>;

/// The names for everything that `snapshot` has.
pub fn sample_names(snapshot: &Snapshot) -> SampleNames {
    let mut names = BTreeMap::new();
    let mut add = |key, owner, bind: &Bind, cluster: Option<String>| {
        let cluster = cluster.map(|name| format!("cluster.{name}"));
        names.insert(key, SampleName { owner, listener: format!("listener.{}", address(bind)), cluster });
    };
    for (owner, service) in snapshot.services.iter().enumerate() {
        if let Some(public) = &service.public {
            add(Key::inbound(&service.name), owner, &public.bind, Some("local_app".to_owned()));
        }
        for upstream in &service.upstreams {
            add(Key::outbound(&service.name, &upstream.name), owner, &upstream.bind, cluster_name(upstream));
        }
    }
    for router in &snapshot.routers {
        let (settings, owner) = (router.settings(), routes::owner(snapshot, router));
        for route in router.routes() {
            add(Key::of_route(settings, route), owner, &settings.bind, Some(route.cluster().to_owned()));
        }
        add(Key::outbound(&settings.service, &settings.name), owner, &settings.bind, None);
    }
    names
}

/// The registration that stats of this owner belong to.
fn proxy_id(snapshot: &Snapshot, owner: usize) -> Option<&Arc<str>> {
    let of_routers = || snapshot.routers.first().map(|router| &router.settings().proxy_id);
    snapshot.services.get(owner).map(|service| &service.proxy_id).or_else(of_routers)
}

/// The fixed tags that Consul gives each service's sidecar.
pub fn owners(snapshot: &Snapshot) -> Vec<Vec<(String, String)>> {
    let tag = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let of = |service: &Arc<Service>| {
        let mut tags = vec![tag("local_cluster", &service.name), tag("consul.source.service", &service.name)];
        if let Some(own) = own_name(service) {
            tags.push(tag("consul.source.namespace", &own.namespace));
            tags.push(tag("consul.source.partition", &own.partition));
            tags.push(tag("consul.source.datacenter", &own.datacenter));
        }
        tags
    };
    snapshot.services.iter().map(of).collect()
}

fn of_process(made: &mut Made, snapshot: &Snapshot, facts: &Facts, process: &Process, clusters: usize) {
    let listeners = snapshot.binds().count();
    let mut server = Scope::new(made, PROCESS, "server");
    scopes::server(&mut server, process, facts.worker_connections.iter().sum(), facts.worker_connections.len());
    if let Some(days) = days_until_first_expiry(snapshot) {
        server.gauge("days_until_first_cert_expiring", days, true);
    } else {
        server.gauge("days_until_first_cert_expiring", 0, false);
    }
    let active = listeners.saturating_sub(facts.listeners_failed);
    let Told { clusters: cds, listeners: lds, .. } = process.told;
    scopes::managers(made, (cds, clusters as u64), (lds, active as u64), process.connected);
}

fn days_until_first_expiry(snapshot: &Snapshot) -> Option<u64> {
    let of_services = snapshot.all_services().filter_map(|service| service.identity.as_ref());
    let of_identities = of_services.chain(snapshot.identities.values()).map(|identity| identity.svid.not_after);
    let of_fronts = snapshot.all_upstreams().filter_map(|upstream| upstream.front.as_ref()).map(|front| front.not_after());
    let first = of_identities.chain(of_fronts).min()?;
    Some(first.duration_since(SystemTime::now()).unwrap_or_default().as_secs() / 86_400)
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn closed(totals: &Totals, reason: CloseReason) -> u64 {
    totals.closed[reason as usize]
}

#[cfg(test)]
pub(super) mod tests;
