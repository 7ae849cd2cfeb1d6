//! The loop of the rotation thread when Consul's xDS server tells it the mesh: responses in, acks and snapshots out.
//!
//! Invariant: every response is answered; a snapshot is published only when it differs from the last one; while the server is
//! away the last good state stays. A change of who may come in waits for nothing, because each response is taken at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{mpsc, watch};

use super::build::{self, Built, Hosts, Surroundings};
use super::held::{Held, Kind};
use super::identity::Identities;
use super::listener::{Listener, Role};
use super::resolver::{Answer, Resolver};
use super::secrets::{Certificate, Secrets};
use super::shown::Everything;
use super::stream::{Event, Opener};
use super::subscription::{Subscription, answer};
use crate::config::envoy::{AccessLog, PageListener, Xds};
use crate::control::tally::Tally;
use crate::control::{Command, ControlError, ServiceStatus, StatsWishes, Status, dump};
use crate::mesh::{Identity, Snapshot};
use crate::store::Publisher;
use crate::telemetry::stats::{AllMembers, Answers, Changes, Told, Updates};

/// Events of the stream that may wait.
const EVENTS_MAX: usize = 64;
/// Refusals of one kind that are told.
const REFUSED_MAX: usize = 100;
/// How often clocks are looked at: a leaf that was refused for its time may be good now.
const TICK: Duration = Duration::from_secs(1);
/// How long a first answer is waited for before the proxy counts as complete without it, as Envoy's `initial_fetch_timeout`.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Problems that are shown; the rest is counted.
const PROBLEMS_MAX: usize = 6;

pub(super) struct Feeder {
    settings: Xds,
    held: Held,
    subscription: Subscription,
    identities: Identities,
    hosts: Hosts,
    resolver: Resolver,
    answers: mpsc::Receiver<Answer>,
    secrets: Secrets,
    certificates: mpsc::Receiver<Certificate>,
    publisher: Publisher<Snapshot>,
    status: watch::Sender<Status>,
    /// What `/config_dump` shows, and the bootstrap in it.
    resources: dump::Sender,
    bootstrap: (Arc<serde_json::Value>, SystemTime),
    requests: Option<mpsc::Sender<DeltaDiscoveryRequest>>,
    /// When the stream was opened first.
    opened: Option<Instant>,
    reachable: bool,
    was_ready: bool,
    /// Why there is no stream.
    trouble: Option<String>,
    /// By kind, what was refused last and not mended since.
    refused: [Vec<String>; Kind::ALL.len()],
    notes: Vec<String>,
    pages: Vec<PageListener>,
    /// By kind, the answers that were taken and those that were not.
    responses: [Answers; Kind::ALL.len()],
    rotations: u64,
    tally: Tally,
    /// What is told of members, and whether that is all there is to tell.
    members: Arc<AllMembers>,
    members_told: bool,
}

impl Feeder {
    pub(super) fn new(
        mut settings: Xds,
        workers: usize,
        publisher: Publisher<Snapshot>,
        status: watch::Sender<Status>,
        resources: dump::Sender,
    ) -> Result<Self, ControlError> {
        let mut held = Held::from_bootstrap(&settings.static_clusters, &settings.static_listeners, settings.http_as_tcp)?;
        if let (None, Some(name)) = (&settings.server, held.names(Kind::Routes).first()) {
            let why =
                format!("a listener of the bootstrap has its routes by RDS ({name}), and no ads_config says where they are");
            return Err(ControlError::Config(why));
        }
        // Without a server there is nothing to wait for.
        held.listeners.answered = settings.server.is_none();
        let (resolver, answers) = Resolver::new();
        let (secrets, certificates) = Secrets::new(&settings);
        let subscription = Subscription::new(&settings);
        metrics::gauge!("ringfence_xds_connected").set(0.0);
        let bootstrap = (Arc::new(settings.bootstrap.take()), SystemTime::now());
        Ok(Self {
            settings,
            held,
            subscription,
            identities: Identities::new(workers),
            hosts: Hosts::new(),
            resolver,
            answers,
            secrets,
            certificates,
            publisher,
            status,
            resources,
            bootstrap,
            requests: None,
            opened: None,
            reachable: false,
            was_ready: false,
            trouble: None,
            refused: Default::default(),
            notes: Vec::new(),
            pages: Vec::new(),
            responses: Default::default(),
            rotations: 0,
            tally: Tally::default(),
            members: Arc::default(),
            members_told: false,
        })
    }

    /// Runs until told to stop, or until nobody is left to tell.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Result<(), ControlError> {
        let (sender, mut events) = mpsc::channel(EVENTS_MAX);
        let opener = self.settings.server.as_ref().map(|server| Opener::new(&self.settings, server)).transpose()?;
        let stream = opener.map(|opener| tokio::spawn(Arc::new(opener).run(sender)));
        self.show();
        self.settle(true);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let mut changed = false;
            tokio::select! {
                command = commands.recv() => match command {
                    // The token comes from the bootstrap, and callers are not told apart.
                    Some(Command::Reload | Command::Warm(_)) => {}
                    Some(Command::Stop) | None => break,
                },
                Some(event) = events.recv() => {
                    self.take(event);
                    changed = true;
                }
                Some((host, answer)) = self.answers.recv() => {
                    self.resolved(host, answer);
                    changed = true;
                }
                Some((name, secret)) = self.certificates.recv() => {
                    tracing::info!(secret = %name, "a certificate for clients came by SDS");
                    self.held.take_secret(name, secret);
                    self.show();
                    changed = true;
                }
                _ = tick.tick() => {}
            }
            self.settle(changed);
        }
        if let Some(stream) = stream {
            stream.abort();
        }
        Ok(())
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Opened(requests) => {
                self.opened.get_or_insert_with(Instant::now);
                self.requests = Some(requests);
                for request in self.subscription.open(&self.held) {
                    self.send(request);
                }
            }
            Event::Response(response) => self.learn(&response),
            Event::Closed(why) => {
                self.requests = None;
                self.reachable = false;
                metrics::gauge!("ringfence_xds_connected").set(0.0);
                if self.trouble.as_ref() != Some(&why) {
                    tracing::warn!(problem = %why, "no xDS stream; what was learned before, if anything, stays in force");
                }
                self.trouble = Some(why);
            }
        }
    }

    fn learn(&mut self, response: &DeltaDiscoveryResponse) {
        if !self.reachable {
            self.reachable = true;
            metrics::gauge!("ringfence_xds_connected").set(1.0);
            tracing::info!(proxy = %self.settings.node_id, "the xDS server answers");
        }
        self.trouble = None;
        let refused = match Kind::of_url(&response.type_url) {
            Some(kind) => {
                let refused = self.held.apply(kind, response);
                let answers = &mut self.responses[kind as usize];
                let (result, count) = match refused.is_empty() {
                    true => ("accepted", &mut answers.accepted),
                    false => ("rejected", &mut answers.rejected),
                };
                *count += 1;
                self.members_told &= kind != Kind::Endpoints;
                metrics::counter!("ringfence_xds_updates_total", "type" => kind.short(), "result" => result).increment(1);
                for why in &refused {
                    tracing::error!(resource = %why, "a resource is refused; the one before it, if any, stays, but a way in lets nobody in until it is understood");
                }
                self.remember(kind, response, &refused);
                refused
            }
            None => vec![format!("{}: nobody asked for resources of this type", response.type_url)],
        };
        self.send(answer(&response.type_url, &response.nonce, &refused));
        self.held.forget_unnamed();
        for kind in Kind::BY_NAME {
            let told: Vec<String> = self.held.names(kind).iter().map(|name| format!("{} {name}: ", kind.message())).collect();
            self.refused[kind as usize].retain(|why| told.iter().any(|of_name| why.starts_with(of_name)));
        }
        self.show();
        if self.requests.is_some() {
            for request in self.subscription.follow(&self.held) {
                self.send(request);
            }
        }
    }

    /// Lets `/config_dump` show what is held now.
    fn show(&mut self) {
        let everything = Everything::new(self.bootstrap.clone(), &mut self.held);
        self.resources.send_replace(Some(Arc::new(everything)));
    }

    /// A refusal is told until the resource of that name is taken or removed.
    fn remember(&mut self, kind: Kind, response: &DeltaDiscoveryResponse, refused: &[String]) {
        let known = &mut self.refused[kind as usize];
        let named = response.resources.iter().map(|resource| &resource.name).chain(&response.removed_resources);
        let told: BTreeSet<String> = named.map(|name| format!("{} {name}: ", kind.message())).collect();
        known.retain(|why| !told.iter().any(|of_name| why.starts_with(of_name)));
        known.extend(refused.iter().cloned());
        known.truncate(REFUSED_MAX);
    }

    /// A server that takes nothing loses the stream, and gets all of it again on the next one.
    fn send(&mut self, request: DeltaDiscoveryRequest) {
        if self.requests.as_ref().is_some_and(|requests| requests.try_send(request).is_err()) {
            self.requests = None;
        }
    }

    fn resolved(&mut self, host: String, answer: Result<Vec<std::net::IpAddr>, String>) {
        match answer {
            Ok(addresses) => {
                self.hosts.insert(host, addresses);
            }
            Err(why) => tracing::warn!(host, problem = %why, "a host name cannot be resolved; its old addresses, if any, stay"),
        }
    }

    /// Puts what is held in force, where that changed or a certificate can be used by now.
    fn settle(&mut self, changed: bool) {
        if changed {
            let names = build::names(&self.held);
            self.hosts.retain(|name, _| names.contains_key(name));
            self.resolver.follow(&names);
            self.secrets.follow(&self.held.secret_names());
        }
        if self.identities.offer(build::materials(&self.held), SystemTime::now()) || changed {
            self.publish();
        }
        self.report();
    }

    fn publish(&mut self) {
        // An answer with clusters alone takes nothing from anybody.
        if !self.held.listeners.answered {
            return;
        }
        let current = self.publisher.current();
        let around = Surroundings {
            proxy_id: &self.settings.node_id,
            cluster: &self.settings.node_cluster,
            hosts: &self.hosts,
            identities: &self.identities,
        };
        let Built { service, routers, pages, notes } = build::mesh(&self.held, &around, &current);
        self.pages = pages;
        if notes != self.notes {
            for note in notes.iter().filter(|note| !self.notes.contains(note)) {
                tracing::warn!(%note, "not served");
            }
            self.notes = notes;
        }
        if build::same_parts(&routers, &current.routers) && current.services.first().is_some_and(|old| Arc::ptr_eq(old, &service))
        {
            return;
        }
        let next = Snapshot { services: vec![service], routers, identities: Arc::clone(&current.identities), generation: 0 };
        self.tally.follow_members(&current, &next);
        self.members_told = false;
        let generation = self.publisher.publish(next);
        metrics::gauge!("ringfence_snapshot_generation").set(as_f64(generation));
        tracing::debug!(generation, "snapshot published");
    }

    fn report(&mut self) {
        let waits = self.waits_for();
        self.was_ready |= waits.is_none();
        self.tell_rotations();
        let snapshot = self.publisher.current();
        let mut told = BTreeSet::new();
        let distinct = snapshot.all_services().filter(|service| told.insert(&service.name));
        let mut services: Vec<ServiceStatus> = distinct.map(|service| self.status_of(service.identity.as_ref())).collect();
        if services.is_empty() {
            services.push(self.status_of(None));
        }
        services[0].problem = self.problem(waits);
        services[0].pages.clone_from(&self.pages);
        let access_logs = access_logs(&self.held.listeners.values().map(AsRef::as_ref).collect::<Vec<_>>());
        let next = Status {
            ready: self.was_ready,
            agent_reachable: self.reachable,
            services,
            access_logs,
            // A bootstrap says it all at the start.
            stats: StatsWishes::default(),
            told: self.told(),
        };
        self.status.send_if_modified(|status| {
            let changed = *status != next;
            if changed {
                *status = next;
            }
            changed
        });
    }

    /// What became of clusters, listeners and members. Those of the bootstrap count as added, this process's own among them.
    fn told(&mut self) -> Told {
        if !std::mem::replace(&mut self.members_told, true) {
            let snapshot = self.publisher.current();
            self.members = Arc::new(self.tally.members(&snapshot, |cluster| self.held.fetched(cluster)));
        }
        let told = |kind: Kind, field: &str, changes: Changes, warming: usize| {
            let fixed = self.bootstrap.0["static_resources"][field].as_array().map_or(0, Vec::len);
            let changes = Changes { added: changes.added + fixed as u64, ..changes };
            Updates { answers: self.responses[kind as usize], changes, warming: warming as u64 }
        };
        let Held { clusters, listeners, .. } = &self.held;
        Told {
            clusters: told(Kind::Cluster, "clusters", clusters.changes, self.held.waiting_clusters().count()),
            listeners: told(Kind::Listener, "listeners", listeners.changes, self.held.waiting_listeners().count()),
            members: Arc::clone(&self.members),
        }
    }

    /// Tells of leaves that came into use.
    fn tell_rotations(&mut self) {
        if self.identities.rotations > self.rotations {
            metrics::counter!("ringfence_rotations_total").increment(self.identities.rotations - self.rotations);
            self.rotations = self.identities.rotations;
            for svid in self.identities.in_use().map(|identity| &identity.svid) {
                tracing::info!(proxy = %self.settings.node_id, spiffe_id = %svid.id, serial = %svid.serial, "certificate in force");
            }
        }
        for svid in self.identities.in_use().map(|identity| &identity.svid) {
            if let Some(name) = svid.id.service_name() {
                metrics::gauge!("ringfence_leaf_expiry_seconds", "service" => name.service.to_string()).set(left(svid.not_after));
            }
        }
    }

    fn status_of(&self, identity: Option<&Arc<Identity>>) -> ServiceStatus {
        let svid = identity.map(|identity| &identity.svid);
        ServiceStatus {
            proxy_id: self.settings.node_id.as_str().into(),
            service: svid.and_then(|svid| svid.id.service_name()).map(|name| Arc::clone(&name.service)),
            spiffe_id: svid.map(|svid| svid.id.to_string()),
            leaf_serial: svid.map(|svid| svid.serial.clone()),
            leaf_not_after: svid.map(|svid| svid.not_after),
            rotations: self.identities.rotations,
            pages: Vec::new(),
            problem: None,
        }
    }

    /// What is missing before the proxy is complete, for a person.
    fn waits_for(&self) -> Option<String> {
        let late = self.opened.is_some_and(|opened| opened.elapsed() >= FIRST_ANSWER_TIMEOUT);
        if !(self.held.listeners.answered || late && self.held.clusters.answered) {
            return Some("waiting for listeners from the xDS server".to_owned());
        }
        if self.identities.has_none_of_its_offers() {
            return Some("waiting for a certificate that can be used".to_owned());
        }
        if late {
            return None;
        }
        build::waits_for(&self.held)
    }

    fn problem(&self, waits: Option<String>) -> Option<String> {
        let mut found: Vec<String> = self.trouble.iter().cloned().collect();
        found.extend(self.refused.iter().flatten().map(|why| format!("refused: {why}")));
        found.extend(self.identities.refused().map(|why| format!("the newest certificate is not in use: {why}")));
        found.extend(self.secrets.troubles());
        found.extend(self.notes.iter().map(|note| format!("not served: {note}")));
        if self.identities.in_use().any(|identity| identity.svid.not_after <= SystemTime::now()) {
            found.push("the certificate has expired: peers refuse new connections; check Consul's servers".to_owned());
        }
        if !self.was_ready {
            found.extend(waits);
        }
        let more = found.len().saturating_sub(PROBLEMS_MAX);
        found.truncate(PROBLEMS_MAX);
        if more > 0 {
            found.push(format!("and {more} more"));
        }
        (!found.is_empty()).then(|| found.join("; "))
    }
}

/// Seconds until then; negative afterwards.
fn left(end: SystemTime) -> f64 {
    match end.duration_since(SystemTime::now()) {
        Ok(left) => left.as_secs_f64(),
        Err(past) => -past.duration().as_secs_f64(),
    }
}

/// Gauges are floats; counts here stay far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "a gauge of a small count")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

/// The logs of all listeners, each for its own connections; one that all have takes every connection.
pub(super) fn access_logs(listeners: &[&Listener]) -> Vec<AccessLog> {
    let mut logs: Vec<&AccessLog> = Vec::new();
    for log in listeners.iter().flat_map(|listener| &listener.access_logs) {
        if !logs.contains(&log) {
            logs.push(log);
        }
    }
    let serving = listeners.iter().copied().filter(|listener| !matches!(listener.role, Role::Pages { .. }));
    let scoped = logs.into_iter().map(|log| {
        let (having, lacking): (Vec<&Listener>, Vec<_>) =
            serving.clone().partition(|listener| listener.access_logs.contains(log));
        let only = || having.iter().map(|listener| listener.logged_as()).collect::<Option<Vec<_>>>();
        let only = if lacking.is_empty() { None } else { only().map(|sets| sets.into_iter().flatten().collect()) };
        AccessLog { only, ..log.clone() }
    });
    scoped.collect()
}
