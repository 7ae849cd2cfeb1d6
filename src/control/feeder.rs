//! The loop of the rotation thread: events in, watches started and ended, snapshots out.
//!
//! Invariant: one task a watch, exactly those that the state calls for; a snapshot is published only when it differs from
//! the last one; changes of intentions wait for nothing, everything else at most [`DEBOUNCE`]. All tasks end with the loop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use super::consul::budget::{Class, Wanted};
use super::consul::client::Client;
use super::consul::token::Token;
use super::consul::watch::{self as consul_watch, Context, EVENTS_MAX, Event, Key};
use super::consul::{login, token};
use super::state::{State, Urgency};
use super::tally::Tally;
use super::{Command, ControlError, Status, build, report};
use crate::config;
use crate::mesh::Snapshot;
use crate::store::Publisher;

/// How long changes that are not urgent wait for each other.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// How often clocks are looked at: grace times, expiry, the agent budget.
const TICK: Duration = Duration::from_secs(1);
/// Bound on giving the token back at the end.
const LOGOUT_TIMEOUT: Duration = Duration::from_secs(3);

pub(crate) struct Feeder {
    settings: config::Consul,
    client: Client,
    state: State,
    publisher: Publisher<Snapshot>,
    status: watch::Sender<Status>,
    tasks: BTreeMap<Key, Task>,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    rotations: u64,
    /// What each proxy will need once its definition is known; until then lower classes leave room for it.
    reserved: Vec<Vec<Wanted>>,
    /// When what waits is published.
    publish_at: Option<Instant>,
    tally: Tally,
}

struct Task {
    abort: AbortHandle,
    nudge: Arc<Notify>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

impl Feeder {
    pub(crate) fn new(
        settings: config::Consul,
        workers: usize,
        publisher: Publisher<Snapshot>,
        status: watch::Sender<Status>,
    ) -> Result<Self, ControlError> {
        if settings.proxies.is_empty() {
            return Err(ControlError::Config("no proxy to run: give -sidecar-for, -proxy-id or -service".into()));
        }
        if let config::TokenSource::Static(text) = &settings.token {
            token::Secret::new(text.clone())
                .map_err(|why| ControlError::Config(format!("the ACL token cannot be used: {why}")))?;
        }
        let client = Client::new(&settings, Token::new(&settings.token))?;
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let state = State::new(&settings, workers);
        let announce = |_| [Class::Leaf, Class::Policy].map(|class| client.budget().announce(class)).into();
        let reserved = settings.proxies.iter().map(announce).collect();
        Ok(Self {
            settings,
            client,
            state,
            publisher,
            status,
            tasks: BTreeMap::new(),
            sender,
            events,
            rotations: 0,
            reserved,
            publish_at: None,
            tally: Tally::default(),
        })
    }

    /// Runs until told to stop, or until nobody is left to tell.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        self.start_keeper();
        self.reconcile();
        self.publish();
        self.report();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let urgency = tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Warm(identity)) => self.warm(&identity),
                    Some(Command::Reload) => { self.reload(); Urgency::None }
                    Some(Command::Stop) | None => break,
                },
                Some(event) = self.events.recv() => self.take(event),
                () = sleep_until(self.publish_at) => {
                    self.publish();
                    Urgency::None
                }
                _ = tick.tick() => self.tick(),
            };
            match urgency {
                Urgency::None => {}
                Urgency::Soon => {
                    let at = Instant::now() + DEBOUNCE;
                    self.publish_at = Some(self.publish_at.map_or(at, |known| known.min(at)));
                }
                Urgency::Now => self.publish(),
            }
            self.report();
        }
        self.stop().await;
    }

    /// The event and all that wait behind it.
    fn take(&mut self, first: Event) -> Urgency {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let mut urgency = Urgency::None;
        let mut next = Some(first);
        for _ in 0..EVENTS_MAX {
            let Some(event) = next else { break };
            // A watch that was ended may still have had something to say.
            if event.key == Key::Token || self.tasks.contains_key(&event.key) {
                urgency = urgency.max(self.state.apply(event, now, wall));
            }
            next = self.events.try_recv().ok();
        }
        if let Some(event) = next
            && (event.key == Key::Token || self.tasks.contains_key(&event.key))
        {
            urgency = urgency.max(self.state.apply(event, now, wall));
        }
        self.reconcile();
        urgency
    }

    /// A certificate that is there already is only kept.
    fn warm(&mut self, identity: &str) -> Urgency {
        if !self.state.warm(identity, Instant::now()) {
            tracing::warn!(identity, "no certificate for this identity: too many others are in use; raise identities_max");
        }
        self.reconcile();
        // One that a service of this process has already brings no event: it is only missing in what the workers see.
        let published = self.publisher.current();
        let lacks_it = !published.identities.contains_key(identity) && self.state.has_certificate(identity);
        if lacks_it { Urgency::Now } else { Urgency::None }
    }

    fn tick(&mut self) -> Urgency {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let (force, urgency) = self.state.tick(now, wall);
        for name in force {
            tracing::info!(service = %name.service, "asking the agent for a new certificate");
            if let Some(task) = self.tasks.get(&Key::Leaf(name)) {
                task.nudge.notify_one();
            }
        }
        for (reserved, proxy) in self.reserved.iter_mut().zip(&self.state.proxies) {
            if proxy.definition.is_some() {
                reserved.clear();
            }
        }
        self.client.budget().grow(now);
        metrics::gauge!("ringfence_agent_blocking_queries").set(as_f64(self.client.budget().in_use() as u64));
        self.reconcile();
        self.expiry_metrics(wall);
        urgency
    }

    /// Starts the watches that are missing and ends those that nothing calls for.
    fn reconcile(&mut self) {
        let wanted = self.state.wanted();
        let gone: Vec<Key> = self.tasks.keys().filter(|key| **key != Key::Token && !wanted.contains(key)).cloned().collect();
        for key in gone {
            self.tasks.remove(&key);
            self.state.forget(&key);
        }
        for key in wanted {
            if !self.tasks.contains_key(&key) {
                self.start(key);
            }
        }
    }

    fn start(&mut self, key: Key) {
        let proxy = match &key {
            Key::Definition(index) => self.settings.proxies.get(*index).cloned(),
            _ => None,
        };
        let cx = self.context(key.clone());
        let nudge = Arc::clone(&cx.nudge);
        let abort = tokio::spawn(consul_watch::run(cx, proxy)).abort_handle();
        self.tasks.insert(key, Task { abort, nudge });
    }

    fn start_keeper(&mut self) {
        let cx = self.context(token::KEY);
        let nudge = Arc::clone(&cx.nudge);
        let abort = tokio::spawn(token::keep(self.settings.token.clone(), self.client.clone(), cx)).abort_handle();
        self.tasks.insert(token::KEY, Task { abort, nudge });
    }

    fn context(&self, key: Key) -> Context {
        Context { client: self.client.clone(), key, events: self.sender.clone(), nudge: Arc::new(Notify::new()) }
    }

    fn publish(&mut self) {
        self.publish_at = None;
        let current = self.publisher.current();
        let services = build::services(&self.state, &current.services);
        let identities = build::identities(&self.state, &current.identities);
        let others = !build::same(&services, &current.services);
        if others || !Arc::ptr_eq(&identities, &current.identities) {
            let next = Snapshot { services, identities, ..Snapshot::default() };
            if others {
                self.tally.follow(&current, &next);
            }
            let generation = self.publisher.publish(next);
            metrics::gauge!("ringfence_snapshot_generation").set(as_f64(generation));
            tracing::debug!(generation, "snapshot published");
        }
    }

    fn report(&mut self) {
        let published = self.publish_at.is_none();
        let told = self.tally.told(self.publisher.generation());
        let next = report::status(&mut self.state, published, self.client.reachable(), SystemTime::now());
        let next = Status { told, ..next };
        let rotations: u64 = next.services.iter().map(|service| service.rotations).sum();
        if rotations > self.rotations {
            metrics::counter!("ringfence_rotations_total").increment(rotations - self.rotations);
        }
        self.rotations = rotations;
        self.status.send_if_modified(|status| {
            log_changes(status, &next);
            let changed = *status != next;
            *status = next;
            changed
        });
    }

    fn expiry_metrics(&self, wall: SystemTime) {
        for service in &self.status.borrow().services {
            if let (Some(name), Some(end)) = (&service.service, service.leaf_not_after) {
                let left = match end.duration_since(wall) {
                    Ok(left) => left.as_secs_f64(),
                    Err(past) => -past.duration().as_secs_f64(),
                };
                metrics::gauge!("ringfence_leaf_expiry_seconds", "service" => name.to_string()).set(left);
            }
        }
    }

    fn reload(&mut self) {
        self.client.token().reload();
        match self.client.reload() {
            Ok(()) => tracing::info!("token and certificate files are read again"),
            Err(error) => tracing::error!(%error, "the TLS files towards the agent stay as they were"),
        }
    }

    async fn stop(mut self) {
        self.tasks.clear();
        if matches!(self.settings.token, config::TokenSource::Login(_))
            && tokio::time::timeout(LOGOUT_TIMEOUT, login::log_out(&self.client)).await.is_err()
        {
            tracing::warn!("the agent did not take the ACL token back in time; it ends by itself if the method limits it");
        }
    }
}

/// One line for each change that a person would want to see.
fn log_changes(old: &Status, new: &Status) {
    if new.ready && !old.ready {
        tracing::info!("every proxy has its definition, identity and policy");
    }
    for service in &new.services {
        let before = old.services.iter().find(|before| before.proxy_id == service.proxy_id);
        if service.leaf_serial.is_some() && before.is_none_or(|before| before.leaf_serial != service.leaf_serial) {
            tracing::info!(
                proxy = %service.proxy_id,
                spiffe_id = service.spiffe_id.as_deref().unwrap_or_default(),
                serial = service.leaf_serial.as_deref().unwrap_or_default(),
                "certificate in force"
            );
        }
    }
}

/// Gauges are floats; counts here stay far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "a gauge of a small count")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
