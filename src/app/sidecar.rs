//! One sidecar: its workers, its rotation thread, its admin thread.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::{AppError, callers, logs, port, threads};
use crate::admin::{self, Action, Lifecycle, Upgrade};
use crate::airflow;
use crate::config;
use crate::control::{Command, Status, dump};
use crate::mesh::{Bind, Snapshot};
use crate::proxy::{self, Workers};
use crate::store::{self, Viewer};
use crate::sys::handover::{self, Inherited};
use crate::telemetry::cells::WorkerCells;
use crate::telemetry::channel;
use crate::telemetry::hub::Hub;
use crate::telemetry::log::{AccessLogs, ConnectionLog, Destination, Reopener};

/// Wishes of the admin port that may wait.
const ACTIONS_MAX: usize = 16;
/// Commands to the control plane that may wait; a reload that finds no room is one of many. Wishes for certificates come in bursts.
const COMMANDS_MAX: usize = 512;
/// Reasons of ended threads that may wait: one a thread.
const ENDED_MAX: usize = 3;
/// How long listening sockets for pages wait for a registration that wants them.
const CLAIM_TIME: Duration = Duration::from_secs(10);
/// How long a thread that was told to end is waited for. Covers a token logout at the agent.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a wait looks again.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A running sidecar. Dropped without [`Self::stop`], its threads go on until the process ends.
#[derive(Debug)]
pub struct Sidecar {
    workers: Workers,
    cells: Vec<Arc<WorkerCells>>,
    viewer: Viewer<Snapshot>,
    status: watch::Receiver<Status>,
    commands: mpsc::Sender<Command>,
    lifecycle: watch::Sender<Lifecycle>,
    upgrade: watch::Sender<Upgrade>,
    admin_address: SocketAddr,
    admin_shutdown: watch::Sender<bool>,
    admin_closing: watch::Sender<bool>,
    airflow_phase: watch::Sender<airflow::Phase>,
    /// The airflow thread knows the tasks of an earlier run. Always true where callers are not told apart.
    tasks_known: Arc<AtomicBool>,
    /// The sockets outlive this process in the service manager's store.
    sockets_stay: bool,
    /// Whom to tell that this process serves.
    inherited: Inherited,
    /// When listening sockets for pages that nobody wants any more are closed.
    unclaimed_until: Option<Instant>,
    actions: mpsc::Receiver<Action>,
    reopener: Reopener,
    /// Listeners for redirected connections and leases, on each worker.
    redirects: usize,
    ended: mpsc::Receiver<AppError>,
    rotation: JoinHandle<()>,
    admin: JoinHandle<()>,
    airflow: Option<JoinHandle<()>>,
}

impl Sidecar {
    /// Starts every thread and returns; readiness comes later ([`Self::wait_ready`]).
    pub fn start(settings: config::Sidecar) -> Result<Self, AppError> {
        Self::start_with(settings, Inherited::default())
    }

    /// [`Self::start`], with the listening sockets that another process left.
    pub(super) fn start_with(settings: config::Sidecar, mut inherited: Inherited) -> Result<Self, AppError> {
        for wrong in &inherited.wrong {
            tracing::warn!("not taken over: {wrong}");
        }
        let (listener, admin_address) = threads::bind_admin(settings.admin.bind, &mut inherited)?;
        if let Some(path) = &settings.admin.address_path {
            threads::write_admin_address(path, admin_address)?;
        }
        let reopener = Reopener::default();
        let port_settings = port::settings(&settings, admin_address, reopener.clone(), inherited.has_predecessor())?;
        let config::Sidecar { mut consul, xds, mut plane, connection_log, access_logs, airflow, .. } = settings;
        let (prepared, attributions) =
            match airflow.map(|rules| callers::prepare(&rules, plane.workers, &mut inherited)).transpose()? {
                Some((prepared, attributions)) => (Some(prepared), attributions),
                None => (None, Vec::new()),
            };
        if xds.is_some() && prepared.is_some() {
            let why = "-airflow needs a certificate for each task, which Consul's xDS stream does not carry: \
                       run `ringfence connect -airflow` instead";
            return Err(AppError::Config(why.to_owned()));
        }
        consul.caller_identities_max = prepared.as_ref().map_or(0, callers::Prepared::identities_max);
        plane.redirects = prepared.as_ref().map(callers::Prepared::redirects).unwrap_or_default();
        plane.lease_port = prepared.as_ref().and_then(callers::Prepared::lease_port);
        let redirects = plane.redirects.len() + usize::from(plane.lease_port.is_some());
        let log = ConnectionLog::open(&Destination::from(&connection_log), &reopener)
            .map_err(|error| AppError::Config(format!("connection log: {error}")))?;
        let access_logs =
            AccessLogs::open(&access_logs, &reopener).map_err(|error| AppError::Config(format!("access log: {error}")))?;
        let (mut publisher, readers) = store::new(Snapshot::default(), plane.workers);
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..plane.workers).map(|_| channel::pair()).unzip();
        let cells = receivers.iter().map(|receiver| Arc::clone(&receiver.cells)).collect();
        let (status_sender, status) = watch::channel(Status::default());
        let (resources_sender, resources) = dump::channel();
        let (lifecycle, lifecycle_receiver) = watch::channel(Lifecycle::Starting);
        let (upgrade, upgrade_receiver) = watch::channel(Upgrade::default());
        let (commands, commands_receiver) = mpsc::channel(COMMANDS_MAX);
        let (actions_sender, actions) = mpsc::channel(ACTIONS_MAX);
        let (admin_shutdown, shutdown_receiver) = watch::channel(false);
        let (admin_closing, closing_receiver) = watch::channel(false);
        let phase = if inherited.has_predecessor() { airflow::Phase::Wait } else { airflow::Phase::Serve };
        let (airflow_phase, phase_receiver) = watch::channel(phase);
        let tasks_known = Arc::new(AtomicBool::new(prepared.is_none()));
        let (ended_sender, ended) = mpsc::channel(ENDED_MAX);
        let viewer = publisher.viewer();
        let mut hub = Hub::new(receivers, log);
        hub.set_access_logs(access_logs);
        let context = admin::Context {
            hub,
            viewer: viewer.clone(),
            status: status.clone(),
            resources,
            lifecycle: lifecycle_receiver,
            upgrade: upgrade_receiver,
            actions: actions_sender,
            closing: closing_receiver,
            settings: port_settings,
        };

        let workers = proxy::spawn(&plane, readers, senders, attributions, &mut inherited)
            .map_err(|error| AppError::Unavailable(format!("workers cannot start: {error}")))?;
        for wake in workers.wakes() {
            publisher.add_wake(wake);
        }
        let started = threads::admin(listener, context, shutdown_receiver, ended_sender.clone()).and_then(|admin| {
            let (ended, told) = (ended_sender.clone(), (status_sender, resources_sender));
            let rotation = threads::rotation((consul, xds), plane.workers, publisher, told, commands_receiver, ended)?;
            let airflow = prepared.map(|prepared| {
                let known = Arc::clone(&tasks_known);
                prepared.start(&workers, viewer.clone(), admin_address, commands.clone(), phase_receiver, known, ended_sender)
            });
            Ok((admin, rotation, airflow.transpose()?))
        });
        let (admin, rotation, airflow) = started.inspect_err(|_| workers.stop())?;
        Ok(Self {
            workers,
            cells,
            viewer,
            status,
            commands,
            lifecycle,
            upgrade,
            admin_address,
            admin_shutdown,
            admin_closing,
            airflow_phase,
            tasks_known,
            sockets_stay: false,
            inherited,
            unclaimed_until: None,
            actions,
            reopener,
            redirects,
            ended,
            rotation,
            admin,
            airflow,
        })
    }

    /// Where the admin port listens.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// What the control plane says of itself.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// What is being enforced.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.viewer.current()
    }

    /// Whether every service has all that it needs, every worker has it too, and every listener is bound.
    pub fn is_ready(&self) -> bool {
        self.missing().is_none()
    }

    /// What is missing for readiness, for a person.
    pub(super) fn missing(&self) -> Option<String> {
        let status = self.status.borrow();
        if !status.ready {
            let problems: Vec<String> = status
                .services
                .iter()
                .filter_map(|service| Some(format!("{}: {}", service.proxy_id, service.problem.as_deref()?)))
                .collect();
            return Some(match (problems.is_empty(), status.agent_reachable) {
                (false, _) => problems.join("; "),
                (true, false) => "the Consul agent has not answered yet".to_owned(),
                (true, true) => "waiting for definition, certificate and intentions".to_owned(),
            });
        }
        if !self.tasks_known.load(Ordering::Acquire) {
            return Some("the tasks of an earlier run are not taken up yet".to_owned());
        }
        let snapshot = self.viewer.current();
        if self.viewer.acknowledged() < 1 {
            return Some("a worker has not taken up the configuration yet".to_owned());
        }
        let (wanted, bound) = (listeners_wanted(&snapshot, self.cells.len(), self.redirects), self.listeners_bound());
        (bound < wanted).then(|| format!("{bound} of {wanted} listening sockets are bound; the log names those that cannot be"))
    }

    fn listeners_bound(&self) -> u64 {
        self.cells.iter().map(|cells| cells.listeners.value()).sum()
    }

    /// Waits until it is ready. The error says what is missing.
    pub async fn wait_ready(&mut self, timeout: Duration) -> Result<(), AppError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Ok(error) = self.ended.try_recv() {
                return Err(error);
            }
            let Some(missing) = self.missing() else {
                self.set_live();
                return Ok(());
            };
            if Instant::now() >= deadline {
                return Err(AppError::Config(format!("not ready after {timeout:?}: {missing}")));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Tells the admin port that readiness was reached.
    pub(super) fn set_live(&self) {
        self.lifecycle.send_if_modified(|lifecycle| {
            let starting = *lifecycle == Lifecycle::Starting;
            if starting {
                *lifecycle = Lifecycle::Live;
            }
            starting
        });
    }

    /// Reads token and certificate files again and opens log files again.
    pub fn reload(&self) {
        // A full queue holds reloads already.
        let _ = self.commands.try_send(Command::Reload);
        self.reopen_logs();
    }

    /// Opens log files again.
    pub fn reopen_logs(&self) {
        logs::reopen();
        self.reopener.reopen();
    }

    /// Stops accepting. Live connections go on until the drain time is over; their intentions stay enforced, because the
    /// control plane runs on until [`Self::stop`].
    pub fn drain(&self, time: Duration) {
        self.lifecycle.send_replace(Lifecycle::Draining);
        self.workers.drain(time);
    }

    /// Closes listeners, only the inbound ones on demand; connections and the process go on.
    pub(super) fn close_listeners(&self, inbound_only: bool) {
        self.workers.close_listeners(inbound_only);
    }

    /// [`Self::drain`], where the listening sockets stay for the next process: what has been accepted is served, and what comes
    /// later waits.
    pub(super) fn leave(&self, time: Duration) {
        self.lifecycle.send_replace(Lifecycle::Draining);
        self.workers.leave(time);
    }

    /// From now on the ends of listeners with this process are no ends of their sockets.
    pub(super) fn keep_sockets(&mut self) {
        self.sockets_stay = true;
        self.workers.leave_files();
    }

    /// Takes up what was left and is wanted, closes what is not, and tells a predecessor, if there is one, that this process
    /// serves.
    pub(super) fn settle(&mut self) {
        self.workers.settle();
        if !self.inherited.has_predecessor() {
            self.workers.take_charge();
        }
        self.inherited.tell_ready();
    }

    /// Tells whoever asks at the admin port how an upgrade goes.
    pub(super) fn tell_upgrade(&self, tell: impl FnOnce(&mut Upgrade)) {
        self.upgrade.send_modify(tell);
    }

    /// Whether another process still has everything and may go on.
    pub(super) fn has_predecessor(&self) -> bool {
        self.inherited.has_predecessor()
    }

    /// Whether no worker carries a connection.
    pub(super) fn is_idle(&self) -> bool {
        self.cells.iter().all(|cells| cells.connections.value() == 0)
    }

    /// How often the workers' listening sockets have changed.
    pub(super) fn listener_changes(&self) -> u64 {
        self.cells.iter().map(|cells| cells.listener_changes.value()).sum()
    }

    /// Takes everything over as soon as a predecessor has left it.
    pub(super) fn take_over_if_released(&mut self) {
        if self.inherited.is_released() {
            self.workers.take_charge();
            handover::open_apart();
            self.unclaimed_until = Some(Instant::now() + CLAIM_TIME);
            self.airflow_phase.send_replace(airflow::Phase::Serve);
            tracing::info!("the process before has left everything to this one");
        }
        if self.unclaimed_until.is_some_and(|until| until <= Instant::now()) {
            self.unclaimed_until = None;
            handover::close_apart();
        }
    }

    /// A successor serves with the same sockets: this process only finishes what it has begun.
    pub(super) fn hand_over(&self) {
        self.lifecycle.send_replace(Lifecycle::Draining);
        self.admin_closing.send_replace(true);
        self.airflow_phase.send_replace(airflow::Phase::HandOver);
        self.workers.hand_over();
    }

    /// Whether the workers have ended: after a drain, when the last connection has.
    pub fn is_finished(&self) -> bool {
        self.workers.is_finished()
    }

    /// The next wish of the admin port. Pends for ever when there will be none.
    pub(super) async fn next_action(&mut self) -> Action {
        match self.actions.recv().await {
            Some(action) => action,
            None => std::future::pending().await,
        }
    }

    /// Why a thread ended unasked, as soon as one does.
    pub(crate) fn take_failure(&mut self) -> Option<AppError> {
        self.ended.try_recv().ok()
    }

    /// Closes everything at once and waits for the threads, with a bound.
    pub async fn stop(self) -> Result<(), AppError> {
        self.lifecycle.send_replace(Lifecycle::Draining);
        self.workers.stop();
        let workers_ended = wait(|| self.workers.is_finished(), config::STOP_GRACE).await;
        // The rotation thread logs its token out; a full queue or an ended thread needs no command.
        let _ = self.commands.try_send(Command::Stop);
        let rotation_ended = wait(|| self.rotation.is_finished(), JOIN_TIMEOUT).await;
        // Last, so that the log lines of the connections just closed are written.
        self.admin_closing.send_replace(true);
        self.admin_shutdown.send_replace(true);
        // A socket's file is only its to remove who has the socket: not one that was not left it yet, or has left it.
        let left = self.sockets_stay || *self.airflow_phase.borrow() == airflow::Phase::HandOver;
        let ending = if left || self.inherited.has_predecessor() { airflow::Phase::Leave } else { airflow::Phase::End };
        self.airflow_phase.send_replace(ending);
        let admin_ended = wait(|| self.admin.is_finished(), JOIN_TIMEOUT).await;
        let airflow_ended = wait(|| self.airflow.as_ref().is_none_or(JoinHandle::is_finished), JOIN_TIMEOUT).await;
        let threads =
            [("worker", workers_ended), ("rotation", rotation_ended), ("admin", admin_ended), ("airflow", airflow_ended)];
        let late: Vec<&str> = threads.iter().filter(|(_, ended)| !ended).map(|(name, _)| *name).collect();
        if !late.is_empty() {
            return Err(AppError::Internal(format!("threads did not end in time: {}", late.join(", "))));
        }
        self.workers.join().map_err(|error| AppError::Internal(format!("a worker ended badly: {error}")))?;
        let airflow = self.airflow.map_or(Ok(()), JoinHandle::join);
        let joined = self.rotation.join().and_then(|()| self.admin.join()).and(airflow);
        joined.map_err(|_| AppError::Internal("a thread panicked".to_owned()))
    }
}

/// Sockets that the workers hold when all is bound: TCP listeners on each worker, unix sockets on one.
fn listeners_wanted(snapshot: &Snapshot, workers: usize, redirects: usize) -> u64 {
    let of_snapshot: u64 = snapshot.binds().map(|bind| if matches!(bind, Bind::Tcp(_)) { workers as u64 } else { 1 }).sum();
    of_snapshot + (redirects * workers) as u64
}

/// Whether `done` came true within `timeout`.
async fn wait(done: impl Fn() -> bool, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{PublicListener, Service};
    use crate::policy::Intentions;

    fn service(binds: Bind) -> Arc<Service> {
        Arc::new(Service {
            name: "web".into(),
            proxy_id: "web-sidecar-proxy".into(),
            identity: None,
            intentions: Arc::new(Intentions::unknown()),
            public: Some(Arc::new(PublicListener {
                bind: binds,
                app: Vec::new(),
                local_connect_timeout: config::LOCAL_CONNECT_TIMEOUT,
                handshake_timeout: config::HANDSHAKE_TIMEOUT,
                local_keepalive: None,
                max_inbound_connections: 0,
                idle_timeout: None,
            })),
            upstreams: Vec::new(),
        })
    }

    #[test]
    fn tcp_listeners_count_on_every_worker_and_unix_sockets_once() {
        let tcp = Bind::Tcp("127.0.0.1:21000".parse().expect("address"));
        let unix = Bind::Unix { path: "/run/x.sock".into(), mode: None };
        let snapshot = Snapshot { services: vec![service(tcp), service(unix)], ..Snapshot::default() };
        assert_eq!(listeners_wanted(&snapshot, 4, 1), 9);
        assert_eq!(listeners_wanted(&Snapshot::default(), 4, 0), 0);
    }

    #[test]
    fn an_admin_port_in_use_names_the_flag() {
        let (_held, address) =
            threads::bind_admin("127.0.0.1:0".parse().expect("address"), &mut Inherited::default()).expect("free port");
        let error = threads::bind_admin(address, &mut Inherited::default()).expect_err("taken");
        assert!(matches!(error, AppError::Config(_)));
        assert!(error.to_string().contains("-admin-bind") && error.to_string().contains(&address.to_string()), "{error}");
    }

    #[tokio::test]
    async fn waits_have_an_end() {
        assert!(!wait(|| false, Duration::from_millis(20)).await);
        assert!(wait(|| true, Duration::ZERO).await);
    }
}
