//! What tells local callers apart, put together: the workers' halves, and the airflow thread that answers them.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, watch};

use super::AppError;
use super::threads::{self, Ended};
use crate::airflow;
use crate::control::Command;
use crate::mesh::Snapshot;
use crate::mesh::caller::Callers;
use crate::proxy::{Attribution, Workers};
use crate::store::desk::{self, Desk};
use crate::store::{self, Publisher, Viewer};
use crate::sys::EventFd;
use crate::sys::handover::Inherited;

/// Places in the control plane's queue that wishes leave free.
const ORDERS_ROOM: usize = 8;

/// Read and bound, with no thread yet.
pub(super) struct Prepared {
    settings: airflow::Settings,
    socket: OwnedFd,
    publisher: Publisher<Callers>,
    desks: Vec<Desk>,
    questions: EventFd,
}

/// Reads the rules, binds the socket, and makes each worker's half.
pub(super) fn prepare(rules: &Path, workers: usize, inherited: &mut Inherited) -> Result<(Prepared, Vec<Attribution>), AppError> {
    let failed = |error: airflow::AirflowError| AppError::Config(error.to_string());
    let settings = airflow::Settings::load(rules).map_err(failed)?;
    let socket = airflow::bind(&settings, inherited).map_err(failed)?;
    let (publisher, readers) = store::new(Callers::default(), workers);
    let (inquirers, desks) = desk::open(workers);
    let descriptor = |error| AppError::Unavailable(format!("eventfd: {error}; raise LimitNOFILE"));
    let questions = EventFd::new().map_err(descriptor)?;
    let mut attributions = Vec::with_capacity(workers);
    for (callers, mut inquirer) in readers.into_iter().zip(inquirers) {
        inquirer.set_wake(Box::new(airflow::Doorbell(questions.try_clone().map_err(descriptor)?)));
        attributions.push(Attribution { callers, inquirer });
    }
    Ok((Prepared { settings, socket, publisher, desks, questions }, attributions))
}

impl Prepared {
    /// How many certificates for callers there may be at once.
    pub(super) fn identities_max(&self) -> usize {
        self.settings.identities_max()
    }

    /// Where leased addresses are reached.
    pub(super) fn lease_port(&self) -> Option<u16> {
        self.settings.lease_port()
    }

    /// Where redirected connections come in.
    pub(super) fn redirects(&self) -> Vec<SocketAddr> {
        self.settings.redirects().to_vec()
    }

    /// Starts the thread. `known` turns true when it knows the tasks of an earlier run.
    #[allow(clippy::too_many_arguments, reason = "each is one of the sidecar's own channels")]
    pub(super) fn start(
        self,
        workers: &Workers,
        viewer: Viewer<Snapshot>,
        admin: SocketAddr,
        commands: mpsc::Sender<Command>,
        phase: watch::Receiver<airflow::Phase>,
        known: Arc<AtomicBool>,
        ended: Ended,
    ) -> Result<JoinHandle<()>, AppError> {
        let Self { settings, socket, publisher, mut desks, questions } = self;
        for (desk, wake) in desks.iter_mut().zip(workers.wakes()) {
            desk.set_wake(wake);
        }
        threads::airflow(phase, ended, socket, move || airflow::Context {
            settings,
            publisher,
            desks,
            questions,
            viewer,
            admin,
            known,
            // A full queue loses a wish, which the next question or the next tick repeats.
            wish: Box::new(move |identity| {
                // Room for what the process itself orders.
                if commands.capacity() > ORDERS_ROOM {
                    drop(commands.try_send(Command::Warm(Arc::clone(identity))));
                }
            }),
        })
    }
}
