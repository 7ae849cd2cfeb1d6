//! Which listeners are bound on which workers, and what is told when one is not.
//!
//! Invariant: a bind error is told once a change: not again while it stays, not once a worker, and anew after the listener
//! was up. Accept errors are told once in [`ACCEPT_INTERVAL`] for a listener. Each line names address, error and remedy.
//!
//! A unix socket exists once, so one worker that listens on it is enough; a TCP address needs all workers.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::mesh::Bind;
use crate::telemetry::cells::{Direction, ListenerCells};
use crate::telemetry::limiter::Limiter;

/// One accept error a listener in this time.
const ACCEPT_INTERVAL: Duration = Duration::from_secs(10);
/// Addresses remembered at once; more than a host has ports that are in use.
const LISTENERS_MAX: usize = 65_536;

/// All listeners that workers spoke of and that are not closed.
#[derive(Debug)]
pub struct Listeners {
    workers: usize,
    /// By the address as it is printed, which is unique and sorts well.
    table: BTreeMap<String, Listener>,
    accepts: Limiter<Bind>,
}

/// One listener over all workers.
#[derive(Debug)]
pub struct Listener {
    /// Where.
    pub bind: Bind,
    /// What it serves; `None` while no worker could bind it.
    pub serves: Option<Serves>,
    /// Indexed by worker.
    pub workers: Vec<WorkerListener>,
    /// The bind error that was told last.
    told: Option<String>,
}

/// What a listener is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serves {
    /// Inbound or outbound.
    pub direction: Direction,
    /// The local service.
    pub service: Arc<str>,
    /// The upstream's name on outbound listeners.
    pub upstream: Option<Arc<str>>,
}

/// One listener on one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WorkerListener {
    /// Not heard of, or closed.
    #[default]
    Absent,
    /// Accepting.
    Bound,
    /// Could not be bound; the worker tries again.
    Failed(String),
}

/// A listener that should accept and does not, or not everywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unbound {
    /// Where.
    pub bind: Bind,
    /// Workers that accept.
    pub bound: usize,
    /// Workers that should.
    pub wanted: usize,
    /// Why not, if a worker said so.
    pub error: Option<String>,
}

impl Listener {
    /// Workers that accept on it.
    pub fn bound(&self) -> usize {
        self.workers.iter().filter(|worker| **worker == WorkerListener::Bound).count()
    }

    /// Workers that cannot bind it.
    pub fn failed(&self) -> usize {
        self.workers.iter().filter(|worker| matches!(worker, WorkerListener::Failed(_))).count()
    }

    fn error(&self) -> Option<&str> {
        self.workers.iter().find_map(|worker| match worker {
            WorkerListener::Failed(error) => Some(error.as_str()),
            WorkerListener::Absent | WorkerListener::Bound => None,
        })
    }
}

impl Listeners {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, table: BTreeMap::new(), accepts: Limiter::new(ACCEPT_INTERVAL) }
    }

    /// Every listener, sorted by address.
    pub fn iter(&self) -> impl Iterator<Item = &Listener> {
        self.table.values()
    }

    /// Those of `wanted` that are not bound wherever they should be.
    pub fn unbound<'a>(&self, wanted: impl IntoIterator<Item = &'a Bind>) -> Vec<Unbound> {
        wanted.into_iter().filter_map(|bind| self.look(bind)).collect()
    }

    fn look(&self, bind: &Bind) -> Option<Unbound> {
        let wanted = match bind {
            Bind::Tcp(_) => self.workers,
            Bind::Unix { .. } => self.workers.min(1),
        };
        let listener = self.table.get(&bind.to_string());
        let bound = listener.map_or(0, Listener::bound);
        (bound < wanted).then(|| Unbound {
            bind: bind.clone(),
            bound,
            wanted,
            error: listener.and_then(Listener::error).map(str::to_owned),
        })
    }

    pub(super) fn up(&mut self, worker: usize, bind: Bind, cells: &ListenerCells) {
        let serves = Serves { direction: cells.direction, service: Arc::clone(&cells.service), upstream: cells.upstream.clone() };
        let Some(listener) = self.entry(bind) else { return };
        listener.serves = Some(serves);
        listener.workers[worker] = WorkerListener::Bound;
        if let Some(told) = listener.told.take_if(|_| listener.workers.iter().all(|w| !matches!(w, WorkerListener::Failed(_)))) {
            tracing::info!(listener = %listener.bind, was = told, "listener is bound now");
        }
    }

    pub(super) fn down(&mut self, worker: usize, bind: &Bind) {
        let name = bind.to_string();
        let Some(listener) = self.table.get_mut(&name) else { return };
        listener.workers[worker] = WorkerListener::Absent;
        if listener.workers.iter().all(|worker| *worker == WorkerListener::Absent) {
            self.table.remove(&name);
        }
    }

    pub(super) fn bind_failed(&mut self, worker: usize, bind: Bind, error: &io::Error) {
        let Some(listener) = self.entry(bind) else { return };
        let text = error.to_string();
        listener.workers[worker] = WorkerListener::Failed(text.clone());
        if listener.told.as_ref() != Some(&text) {
            tracing::error!(
                listener = %listener.bind,
                error = text,
                remedy = bind_remedy(&listener.bind, error),
                "listener cannot be bound; it is tried again"
            );
            listener.told = Some(text);
        }
    }

    pub(super) fn accept_failed(&mut self, bind: Bind, error: &io::Error, now: Instant) {
        if let Some(suppressed) = self.accepts.ask(bind.clone(), now) {
            tracing::error!(
                listener = %bind,
                %error,
                remedy = accept_remedy(error),
                suppressed,
                "connections cannot be accepted; accepting goes on after a pause"
            );
        }
    }

    /// Tells of the accept errors that were kept back.
    pub(super) fn tell(&mut self, now: Instant) {
        for (bind, suppressed) in self.accepts.due(now) {
            let listener = bind.map_or_else(|| "several".to_owned(), |bind| bind.to_string());
            tracing::error!(listener, suppressed, "connections could not be accepted");
        }
    }

    fn entry(&mut self, bind: Bind) -> Option<&mut Listener> {
        let name = bind.to_string();
        if self.table.len() >= LISTENERS_MAX && !self.table.contains_key(&name) {
            return None;
        }
        let workers = vec![WorkerListener::Absent; self.workers];
        Some(self.table.entry(name).or_insert_with(|| Listener { bind, serves: None, workers, told: None }))
    }
}

fn bind_remedy(bind: &Bind, error: &io::Error) -> String {
    match (bind, error.kind()) {
        (Bind::Tcp(address), io::ErrorKind::AddrInUse) => format!(
            "find who listens there with `ss -ltnp 'sport = :{}'` and stop it, or change the port in the registration",
            address.port()
        ),
        (Bind::Tcp(address), io::ErrorKind::AddrNotAvailable) => {
            format!("{} is on no interface of this host; correct the bind address in the registration", address.ip())
        }
        (Bind::Tcp(address), io::ErrorKind::PermissionDenied) => {
            format!("port {} needs CAP_NET_BIND_SERVICE, or choose one from 1024 on", address.port())
        }
        (Bind::Unix { path, .. }, io::ErrorKind::AddrInUse) => {
            format!("stop the process that listens on {}, or remove the file if there is none", path.display())
        }
        (Bind::Unix { path, .. }, io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            format!("the folder of {} must exist and be writable by this user", path.display())
        }
        _ => "correct the bind address in the registration".to_owned(),
    }
}

fn accept_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "raise LimitNOFILE (ulimit -n) of this process, or lower the connection limits",
        Some(libc::ENFILE) => "raise the sysctl fs.file-max: the whole host is out of descriptors",
        Some(libc::ENOBUFS | libc::ENOMEM) => "free memory on this host, or raise the limit of this process's cgroup",
        _ => "see the system's reason",
    }
}
