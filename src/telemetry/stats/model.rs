//! The stats themselves: Envoy's names for what was counted and for what is enforced.
//!
//! Invariant: a value is what was counted, or 0. These are 0 because this proxy has nothing that they could mean, or does not
//! know: bytes buffered (a flow receives only when all it had was sent), flow control, flushes, drain and idle closes apart
//! from `ringfence_connections_closed_total`'s reasons, `ssl.fail_verify_*` but for the SAN (`ssl.connection_error` counts every
//! other failed handshake), curves and signature algorithms, changes of listeners and clusters since the start (what is active
//! is known), panic mode, degraded and excluded members, `server.version` (Envoy's commit), and watchdogs.
//!
//! An upstream is one cluster, as Consul makes it before 1.14: named after its first target, with all targets' endpoints. What
//! several upstreams lead to, and what several local services share by name (`local_app`), is told apart by [`Stat::owner`].

mod scopes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Histogram;
use crate::config;
use crate::identity::ServiceName;
use crate::mesh::{Bind, Identity, Service, Snapshot, Upstream};
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::hub::{Ejection, Hub, Key, Share, Span, Totals};
use scopes::{Cluster, Scope};

/// Scopes made in a row before other tasks of the thread get their turn.
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Process {
    /// Envoy's `server.state`: 0 live, 1 draining, 2 before and 3 in initialisation.
    pub state: u64,
    /// How long it has run.
    pub uptime: Duration,
    /// Whether the control plane answers.
    pub connected: bool,
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

    fn of(&self, service: &Arc<str>, upstream: Option<&Arc<str>>) -> Counted<'_> {
        let direction = if upstream.is_some() { Direction::Outbound } else { Direction::Inbound };
        let key = Key { direction, service: Arc::clone(service), upstream: upstream.cloned() };
        Counted { series: self.series.get(&key), span: self.spans.get(&key) }
    }
}

/// What was counted for one listener.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted<'a> {
    series: Option<&'a (Totals, Vec<Share>)>,
    span: Option<&'a Span>,
}

impl Counted<'_> {
    fn totals(&self) -> Totals {
        self.series.map(|(totals, _)| totals.clone()).unwrap_or_default()
    }

    fn shares(&self) -> &[Share] {
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

/// Makes every stat, sorted by name. Lets other tasks run from time to time.
pub async fn build(snapshot: &Snapshot, facts: &Facts, process: &Process) -> Vec<Stat> {
    let mut stats = Vec::new();
    let mut breath = Breath(0);
    for (owner, service) in snapshot.services.iter().enumerate() {
        let mut clusters: BTreeMap<String, Cluster> = BTreeMap::new();
        if let Some(public) = &service.public {
            let counted = facts.of(&service.name, None);
            let totals = counted.totals();
            listener(&mut stats, owner, &public.bind, &counted, service.identity.as_deref());
            scopes::tcp(&mut Scope::new(&mut stats, owner, "tcp.public_listener"), &totals, Direction::Inbound);
            scopes::authorisation(&mut stats, owner, &totals, public.max_inbound_connections > 0);
            clusters.entry("local_app".to_owned()).or_default().take_app(&totals, counted.span(), public.app.len());
            breath.take().await;
        }
        for upstream in &service.upstreams {
            let counted = facts.of(&service.name, Some(&upstream.name));
            let totals = counted.totals();
            listener(&mut stats, owner, &upstream.bind, &counted, None);
            let scope = format!("tcp.{}", stat_prefix(upstream, service));
            scopes::tcp(&mut Scope::new(&mut stats, owner, &scope), &totals, Direction::Outbound);
            if let Some(name) = cluster_name(upstream) {
                let ejected = facts.ejections.iter().filter(|ejection| ejection.upstream == upstream.name).count();
                let cluster = clusters.entry(name).or_default();
                cluster.take_upstream(upstream, &totals, counted.span(), ejected as u64);
            }
            breath.take().await;
        }
        for (name, cluster) in &clusters {
            cluster.tell(&mut Scope::new(&mut stats, owner, &format!("cluster.{name}")), service.identity.as_deref());
            breath.take().await;
        }
    }
    of_process(&mut stats, snapshot, facts, process);
    // Runs of sorted names, which this sort takes as they are.
    stats.sort_by(|a, b| (&a.name, a.owner).cmp(&(&b.name, b.owner)));
    stats
}

/// Gives way after some scopes.
struct Breath(usize);

impl Breath {
    async fn take(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(SCOPES_IN_A_ROW_MAX) {
            tokio::task::yield_now().await;
        }
    }
}

fn listener(stats: &mut Vec<Stat>, owner: usize, bind: &Bind, counted: &Counted<'_>, tls: Option<&Identity>) {
    let mut scope = Scope::new(stats, owner, &format!("listener.{}", address(bind)));
    let totals = counted.totals();
    scopes::listener(&mut scope, &totals, counted.span().length);
    for (worker, share) in counted.shares().iter().enumerate() {
        scope.counter(&format!("worker_{worker}.downstream_cx_total"), share.connections);
        scope.gauge(&format!("worker_{worker}.downstream_cx_active"), share.active, true);
    }
    if let Some(identity) = tls {
        scopes::ssl(&mut scope, &totals, identity);
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
    upstream.targets.first().map(|target| target.sni.to_string())
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
    for (owner, service) in snapshot.services.iter().enumerate() {
        let mut add = |direction, upstream: Option<&Arc<str>>, bind: &Bind, cluster: Option<String>| {
            let key = Key { direction, service: Arc::clone(&service.name), upstream: upstream.cloned() };
            let cluster = cluster.map(|name| format!("cluster.{name}"));
            names.insert(key, SampleName { owner, listener: format!("listener.{}", address(bind)), cluster });
        };
        if let Some(public) = &service.public {
            add(Direction::Inbound, None, &public.bind, Some("local_app".to_owned()));
        }
        for upstream in &service.upstreams {
            add(Direction::Outbound, Some(&upstream.name), &upstream.bind, cluster_name(upstream));
        }
    }
    names
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

fn of_process(stats: &mut Vec<Stat>, snapshot: &Snapshot, facts: &Facts, process: &Process) {
    let listeners = snapshot.binds().count();
    let clusters: usize =
        snapshot.services.iter().map(|service| service.upstreams.len() + usize::from(service.public.is_some())).sum();
    let mut server = Scope::new(stats, PROCESS, "server");
    scopes::server(&mut server, process, facts.worker_connections.iter().sum(), facts.worker_connections.len());
    if let Some(days) = days_until_first_expiry(snapshot) {
        server.gauge("days_until_first_cert_expiring", days, true);
    } else {
        server.gauge("days_until_first_cert_expiring", 0, false);
    }
    let active = listeners.saturating_sub(facts.listeners_failed);
    scopes::managers(stats, snapshot.generation, clusters as u64, active as u64, process.connected);
}

fn days_until_first_expiry(snapshot: &Snapshot) -> Option<u64> {
    let of_services = snapshot.services.iter().filter_map(|service| service.identity.as_ref());
    let first = of_services.chain(snapshot.identities.values()).map(|identity| identity.svid.not_after).min()?;
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
