//! The airflow thread: knows which Airflow task or component is behind a local connection, and which mesh identity the rules
//! give it.
//!
//! Invariant: nothing that task code says decides anything alone. A registration counts for the process that the kernel
//! names, if its parents are what runs tasks; the rest is the kernel's word (cgroup, socket inode, process tree). What
//! cannot be told is [`Tier::Unidentified`](crate::mesh::caller::Tier), which has no identity.
//!
//! Tasks register over a unix socket before their DAG's code runs (`registration`), are remembered with their process
//! (`registry`) in a cgroup of their own where the host allows (`cgroup`), and are told to the workers as an immutable table.
//! What the table does not answer, the workers ask (`attribution`). `leases` are for processes that run many tasks. `rules`
//! turns facts into identities, `catalog` holds what the deployment says of each DAG; `office` puts all of it together.
//!
//! Knows no proxy, no ring and no Consul: it wishes for certificates by name, and whoever runs it passes the wish on.

mod attribution;
mod catalog;
mod cgroup;
mod leases;
mod office;
mod process;
mod registration;
mod registry;
mod rules;

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::mesh::Snapshot;
use crate::mesh::caller::{Callers, Route};
use crate::store::desk::Desk;
use crate::store::{Publisher, Viewer, Wake};
use crate::sys::handover::{Inherited, Place};
use crate::sys::{self, EventFd};
use office::Office;
use office::Opening;

/// How often clocks and files are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Why the airflow thread could not start.
#[derive(Debug, thiserror::Error)]
pub enum AirflowError {
    /// The rules cannot be used.
    #[error("{0}")]
    Rules(#[from] rules::RulesError),
    /// The registration socket cannot be had.
    #[error("registration socket {path}: {source}; its folder must exist and be writable, and no other ringfence may use it")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A descriptor cannot be had.
    #[error("{what}: {source}; raise LimitNOFILE")]
    Descriptor {
        /// Which.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

/// The rules as they stand in their file, checked whole, with what the process needs to know of them before it starts.
#[derive(Debug)]
pub struct Settings {
    path: PathBuf,
    file: rules::File,
}

impl Settings {
    /// Reads the file of `-airflow`.
    pub fn load(path: &Path) -> Result<Self, AirflowError> {
        Ok(Self { path: path.to_owned(), file: rules::Rules::load(path)? })
    }

    /// `identities_max`: certificates for callers at once.
    pub fn identities_max(&self) -> usize {
        self.file.settings.identities_max
    }

    /// `lease_port`: where leased addresses are reached.
    pub fn lease_port(&self) -> Option<u16> {
        self.file.settings.lease_port
    }

    /// `redirect`: where connections that nftables redirects come in.
    pub fn redirects(&self) -> &[SocketAddr] {
        &self.file.settings.redirects
    }

    /// `[[route]]`: where they lead, the first that matches.
    pub fn routes(&self) -> &[Route] {
        &self.file.settings.routes
    }
}

/// Wishes for a certificate of a Consul service name.
pub type Wish = Box<dyn Fn(&Arc<str>)>;

/// What the thread works with.
pub struct Context {
    /// The rules.
    pub settings: Settings,
    /// Where those are told whom one look-up finds.
    pub publisher: Publisher<Callers>,
    /// Where the workers ask.
    pub desks: Vec<Desk>,
    /// Signalled with every question.
    pub questions: EventFd,
    /// What is enforced: the routes are read from it.
    pub viewer: Viewer<Snapshot>,
    /// Where the admin port is, for the routes' readers.
    pub admin: SocketAddr,
    /// Turns true when the tasks of an earlier run are taken up and told to the workers.
    pub known: Arc<AtomicBool>,
    /// Passes wishes for certificates on.
    pub wish: Wish,
}

/// Rouses the airflow thread.
#[derive(Debug)]
pub struct Doorbell(pub EventFd);

impl Wake for Doorbell {
    fn wake(&self) {
        self.0.signal();
    }
}

/// Binds the registration socket, so that a failure is known before any thread runs, or takes it from a predecessor.
pub fn bind(settings: &Settings, inherited: &mut Inherited) -> Result<OwnedFd, AirflowError> {
    let path = &settings.file.settings.socket;
    if let Some(socket) = inherited.take_socket(&Place::Unix(path.clone())) {
        return Ok(socket);
    }
    let failed = |source| AirflowError::Socket { path: path.clone(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    // Any user's task may register: what counts is its process's parents.
    sys::listen_unix(path, Some(settings.file.settings.socket_mode)).map_err(failed)
}

/// What the thread shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Take registrations and answer.
    #[default]
    Serve,
    /// Answer, and leave registrations to a predecessor that still takes them.
    Wait,
    /// Answer, and leave registrations to a successor.
    HandOver,
    /// End, and leave the socket: it is another process's.
    Leave,
    /// End.
    End,
}

/// Runs until `phase` says to end, or its sender is gone. Must run on a current-thread runtime, within a `LocalSet`.
pub async fn run(context: Context, socket: OwnedFd, mut phase: watch::Receiver<Phase>) -> Result<(), AirflowError> {
    let failed = |what| move |source| AirflowError::Descriptor { what, source };
    let bell = bell(&context.questions).map_err(failed("the workers' bell"))?;
    let listener = registration::listener(socket).map_err(failed("the registration socket"))?;
    let Context { settings, publisher, mut desks, questions, viewer, admin, known, wish } = context;
    let socket_path = settings.file.settings.socket.clone();
    let mut now = *phase.borrow_and_update();
    let office = Office::open(Opening { settings, publisher, viewer, admin, wish, waits: now == Phase::Wait });
    known.store(true, Ordering::Release);
    let serving = tokio::task::spawn_local(registration::serve(listener, Rc::clone(&office), phase.clone()));
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !matches!(now, Phase::Leave | Phase::End) {
        let mut more = false;
        tokio::select! {
            changed = phase.changed() => {
                now = if changed.is_ok() { *phase.borrow_and_update() } else { Phase::End };
                match now {
                    Phase::Serve => office.borrow_mut().take_over(),
                    Phase::HandOver => {
                        serving.abort();
                        office.borrow_mut().keep_leases();
                    }
                    Phase::Wait | Phase::Leave | Phase::End => {}
                }
            }
            ready = bell.readable() => {
                // An error of this descriptor would be one of the kernel; the tick goes on answering then.
                if let Ok(mut ready) = ready {
                    silence(&bell);
                    ready.clear_ready();
                }
                more = office.borrow_mut().answer(&mut desks);
            }
            _ = tick.tick() => {
                office.borrow_mut().tick();
                more = office.borrow_mut().answer(&mut desks);
            }
        }
        if more {
            // Rung again, so that registrations and the rest have their turn in between.
            questions.signal();
        }
    }
    serving.abort();
    office.borrow_mut().keep_leases();
    if now == Phase::End {
        // Whoever comes next binds it again; a file that stays would only say "refused" more slowly.
        let _ = std::fs::remove_file(socket_path);
    }
    Ok(())
}

/// The doorbell's reading side, which does not block.
fn bell(questions: &EventFd) -> io::Result<AsyncFd<File>> {
    let file = File::from(questions.try_clone_descriptor()?);
    sys::set_nonblocking(&file)?;
    sys::readiness(file, Interest::READABLE)
}

/// Takes the rings so far; silence already is no error.
fn silence(bell: &AsyncFd<File>) {
    let _ = (&mut bell.get_ref()).read(&mut [0; 8]);
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}
