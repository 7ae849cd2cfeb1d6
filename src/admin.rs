//! The admin thread: drains what workers say, answers on the admin port, writes the logs.
//!
//! Invariant: nothing here can delay a worker or a rotation. The hub is drained by a tick whatever the port is doing, and
//! every request, connection and wait has a bound (`server`). Secrets never leave: keys and tokens are not reachable from
//! here but through `Svid`, of which only the public parts are printed.
//!
//! **The port has no password**, as Envoy's has none: whoever reaches it can stop the proxy. It is made for loopback, where
//! reaching it means being on the host; binding it elsewhere warns. Requests that change something are refused when a
//! browser page sent them.
//!
//! Knows no proxy and no ring: what it asks of the process it sends as an [`Action`]. A failing access log is an error line,
//! never the end of the port.

mod access;
mod callers;
mod certs;
mod clusters;
mod commands;
mod denials;
mod dump;
mod facts;
mod health;
mod listeners;
mod logging;
mod page;
pub mod pages;
mod proto_json;
mod reach;
mod routes;
mod server;
mod snapshot;
mod stats;
mod upgrade;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, watch};

use crate::config::LogLevel;
use crate::config::envoy::PageListener;
use crate::control::Status;
use crate::control::dump::Receiver as Resources;
use crate::mesh::Snapshot;
use crate::store::Viewer;
use crate::telemetry::hub::Hub;
use crate::telemetry::log::{Destination, Reopener, Rfc3339};
pub use upgrade::{Answer as UpgradeAnswer, Upgrade};

pub use facts::Facts;
pub use logging::{Apply, LIBRARIES, is_logger};
pub use stats::Settings as StatsSettings;

/// How often the hub is drained while workers have something to say.
const TICK_MIN: Duration = Duration::from_millis(20);
/// How often it is drained when they have not: an idle process wakes up six times a second.
const TICK_MAX: Duration = Duration::from_millis(160);
/// Drains that may follow one another without a pause for requests.
const DRAINS_IN_A_ROW_MAX: usize = 4;
/// Drains at the end, so that the last connections reach the log: more than all rings of 64 workers hold.
const LAST_DRAINS_MAX: usize = 256;

/// What the process is doing, decided by `app`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lifecycle {
    /// Workers are not running yet.
    #[default]
    Starting,
    /// Serving.
    Live,
    /// No new connections; the open ones go on until they end or the drain time is over.
    Draining,
}

/// What a request asks of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `/drain_listeners`: stop accepting; the open connections and the process go on.
    Drain(Drain),
    /// End at once.
    Quit,
    /// Open log files again.
    ReopenLogs,
    /// Start the program's file anew and leave everything to that process.
    Upgrade,
}

/// How `/drain_listeners` was asked for, with Envoy's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drain {
    /// Accept until the drain time is over.
    pub graceful: bool,
    /// Only the listeners that peers come in by.
    pub inbound_only: bool,
    /// Never stop accepting.
    pub skip_exit: bool,
}

impl Drain {
    /// A parameter counts by being there.
    fn new(parameters: &[(String, String)]) -> Self {
        let has = |wanted: &str| parameters.iter().any(|(name, _)| name == wanted);
        Self { graceful: has("graceful"), inbound_only: has("inboundonly"), skip_exit: has("skip_exit") }
    }
}

/// How the port behaves.
#[derive(Debug)]
pub struct Settings {
    /// `-admin-access-log-path`; Envoy's default is `/dev/null`.
    pub access_log: Destination,
    /// Makes the access log open its file again; the same one as the connection log's.
    pub reopener: Reopener,
    /// What the process says of itself.
    pub facts: Facts,
    /// Listeners for pages that are bound already.
    pub pages: Vec<pages::Bound>,
    /// Those that another process still has, and that are bound once it has left them.
    pub late_pages: Vec<PageListener>,
    /// Binds what is bound later.
    pub bind_page: pages::Bind,
    /// The log level at the start, and what changes it.
    pub log_level: (LogLevel, Option<Apply>),
    /// How stats are named and sent.
    pub stats: StatsSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            access_log: Destination::default(),
            reopener: Reopener::default(),
            facts: Facts::default(),
            pages: Vec::new(),
            late_pages: Vec::new(),
            bind_page: |address| std::net::TcpListener::bind(address),
            log_level: (LogLevel::Info, None),
            stats: StatsSettings::default(),
        }
    }
}

/// Everything that the admin thread needs.
#[derive(Debug)]
pub struct Context {
    /// The workers' events and counters.
    pub hub: Hub,
    /// What is enforced.
    pub viewer: Viewer<Snapshot>,
    /// What the control plane says of itself.
    pub status: watch::Receiver<Status>,
    /// What the xDS feeder has accepted; `None` has `/config_dump` made of the snapshot.
    pub resources: Resources,
    /// What the process is doing.
    pub lifecycle: watch::Receiver<Lifecycle>,
    /// Whether it is being replaced.
    pub upgrade: watch::Receiver<Upgrade>,
    /// Where requests for the process go.
    pub actions: mpsc::Sender<Action>,
    /// Turns true when the port shall close, while the workers' events are still taken: with or before `shutdown`.
    pub closing: watch::Receiver<bool>,
    /// How the port behaves.
    pub settings: Settings,
}

/// What requests and the tick share. The hub's lock is tokio's, on one thread, and never held across an await: it only
/// satisfies the compiler that two tasks do not use the hub at once.
#[derive(Debug)]
struct Shared {
    hub: Mutex<Hub>,
    viewer: Viewer<Snapshot>,
    status: watch::Receiver<Status>,
    resources: Resources,
    lifecycle: watch::Receiver<Lifecycle>,
    upgrade: watch::Receiver<Upgrade>,
    actions: mpsc::Sender<Action>,
    access: Mutex<access::AccessLog>,
    /// Whether the process was ready once; see [`health`].
    was_ready: AtomicBool,
    /// `/healthcheck/fail`.
    health_failed: AtomicBool,
    start: Instant,
    started: SystemTime,
    facts: Facts,
    levels: Mutex<logging::Levels>,
    since: Mutex<facts::Since>,
    /// Whose turn it is to make a dump.
    dumping: Arc<Mutex<()>>,
    /// Listeners for pages that do not depend on a registration.
    fixed_pages: Vec<PageListener>,
    late_pages: Vec<PageListener>,
    bind_page: pages::Bind,
    /// Listeners for pages that cannot be there now, and why.
    page_failures: watch::Sender<Vec<(SocketAddr, String)>>,
    stats: stats::Pages,
}

/// Serves until the context's `closing` turns true, takes what workers say until `shutdown` does or its sender is gone; then ends the open requests, takes the workers' last events
/// and writes the logs out. To lose no record, end the workers first.
pub async fn run(listener: TcpListener, mut context: Context, mut shutdown: watch::Receiver<bool>) {
    warn_if_exposed(&listener);
    if !context.hub.install_recorder() {
        tracing::debug!("another metrics recorder is installed; metrics of the control plane are not on /metrics");
    }
    let mut closing = context.closing.clone();
    let bound = std::mem::take(&mut context.settings.pages);
    let shared = Arc::new(Shared::new(context, bound.iter().map(|one| one.page.clone()).collect()));
    let ticking = tokio::spawn(tick(Arc::clone(&shared)));
    let flushing = tokio::spawn(stats::flush(Arc::clone(&shared)));
    let router = routes::router(Arc::clone(&shared));
    let pages = pages::run(Arc::clone(&shared), bound, router.clone(), closing.clone());
    tokio::join!(server::serve(listener, None, |_| true, router, &mut closing), pages);
    // The port may go to another process long before the last connection of this one ends. An error means the end as well.
    let _ = shutdown.wait_for(|shutdown| *shutdown).await;
    ticking.abort();
    flushing.abort();
    shared.finish().await;
}

impl Shared {
    fn new(context: Context, fixed_pages: Vec<PageListener>) -> Self {
        let Context { hub, viewer, status, resources, lifecycle, upgrade, actions, closing: _, settings } = context;
        let (level, apply) = settings.log_level;
        Self {
            hub: Mutex::new(hub),
            viewer,
            status,
            resources,
            lifecycle,
            upgrade,
            actions,
            access: Mutex::new(access::AccessLog::open(&settings.access_log, &settings.reopener)),
            was_ready: AtomicBool::new(false),
            health_failed: AtomicBool::new(false),
            start: Instant::now(),
            started: SystemTime::now(),
            levels: Mutex::new(logging::Levels::new(level, apply).start_with(&settings.facts.component_levels)),
            facts: settings.facts,
            since: Mutex::new(facts::Since::new()),
            dumping: Arc::new(Mutex::new(())),
            fixed_pages,
            late_pages: settings.late_pages,
            bind_page: settings.bind_page,
            page_failures: watch::Sender::new(Vec::new()),
            stats: stats::Pages::new(settings.stats),
        }
    }

    /// Listeners for pages that are bound as they are asked for: by registrations, and what another process still has.
    fn wanted_pages(&self) -> Vec<PageListener> {
        let mut pages = self.late_pages.clone();
        pages.extend(self.status.borrow().services.iter().flat_map(|service| service.pages.iter().cloned()));
        pages
    }

    /// All listeners for pages.
    fn pages(&self) -> Vec<PageListener> {
        let mut pages = self.fixed_pages.clone();
        pages.extend(self.wanted_pages());
        pages
    }

    async fn finish(&self) {
        let mut hub = self.hub.lock().await;
        for _ in 0..LAST_DRAINS_MAX {
            if !hub.drain().more {
                break;
            }
        }
    }
}

/// Drains the hub for ever: quickly while there are events, ever more slowly when there are none.
async fn tick(shared: Arc<Shared>) {
    let mut pause = TICK_MIN;
    let mut status = shared.status.clone();
    status.mark_changed();
    loop {
        let mut events = 0;
        {
            let mut hub = shared.hub.lock().await;
            // An error means that the control plane has ended: its last word stays.
            if status.has_changed().unwrap_or(false) {
                hub.learn_access_logs(&status.borrow_and_update().access_logs);
            }
            for _ in 0..DRAINS_IN_A_ROW_MAX {
                let progress = hub.drain();
                events += progress.events;
                if !progress.more {
                    break;
                }
            }
            // Readiness latches even when nobody asks at the right moment.
            health::state(&shared, &hub);
        }
        shared.access.lock().await.flush();
        shared.since.lock().await.note(&shared);
        pause = if events > 0 { TICK_MIN } else { (pause * 2).min(TICK_MAX) };
        tokio::time::sleep(pause).await;
    }
}

fn warn_if_exposed(listener: &TcpListener) {
    match listener.local_addr() {
        Ok(address) if !address.ip().is_loopback() => tracing::warn!(
            %address,
            remedy = "bind it to 127.0.0.1 or ::1 (-admin-bind), or keep strangers out with a firewall",
            "the admin port has no password and is reachable from other hosts: anybody there can stop this proxy"
        ),
        Ok(address) => tracing::info!(%address, "admin port is open"),
        Err(error) => tracing::warn!(%error, "the admin port's address is not known"),
    }
}

#[cfg(test)]
mod tests;
