//! The tokio threads: `rotation`, `admin`, and `airflow` where callers are told apart.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, watch};

use super::AppError;
use crate::admin;
use crate::airflow;
use crate::config;
use crate::control::{self, Command, Status};
use crate::mesh::Snapshot;
use crate::store::Publisher;
use crate::sys::handover::{Inherited, Place};

/// What ended, to whoever supervises.
pub(super) type Ended = mpsc::Sender<AppError>;

/// Starts the rotation thread.
pub(super) fn rotation(
    (consul, xds): (config::Consul, Option<config::envoy::Xds>),
    workers: usize,
    publisher: Publisher<Snapshot>,
    (status, resources): (watch::Sender<Status>, control::dump::Sender),
    commands: mpsc::Receiver<Command>,
    ended: Ended,
) -> Result<JoinHandle<()>, AppError> {
    spawn("rotation", move |runtime| {
        let ran = match xds {
            None => runtime.block_on(control::run(consul, workers, publisher, status, commands)),
            Some(xds) => runtime.block_on(control::run_xds(xds, workers, publisher, status, commands, resources)),
        };
        if let Err(error) = ran {
            // Nobody listens any more when the sidecar is already going.
            let _ = ended.try_send(AppError::Config(error.to_string()));
        }
    })
}

/// Starts the admin thread on a socket that is bound already.
pub(super) fn admin(
    listener: TcpListener,
    context: admin::Context,
    shutdown: watch::Receiver<bool>,
    ended: Ended,
) -> Result<JoinHandle<()>, AppError> {
    spawn("admin", move |runtime| {
        runtime.block_on(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => admin::run(listener, context, shutdown).await,
                Err(error) => {
                    let _ = ended.try_send(AppError::Internal(format!("the admin port's socket cannot be used: {error}")));
                }
            }
        });
    })
}

/// Starts the airflow thread. `context` is made on it: what it holds need not be sent between threads later.
pub(super) fn airflow(
    phase: watch::Receiver<airflow::Phase>,
    ended: Ended,
    socket: OwnedFd,
    context: impl FnOnce() -> airflow::Context + Send + 'static,
) -> Result<JoinHandle<()>, AppError> {
    spawn("airflow", move |runtime| {
        let tasks = tokio::task::LocalSet::new();
        if let Err(error) = runtime.block_on(tasks.run_until(airflow::run(context(), socket, phase))) {
            let _ = ended.try_send(AppError::Config(error.to_string()));
        }
    })
}

/// Binds the admin port, or takes it from a predecessor. Taken before anything else starts, so that a second sidecar with the same port never takes part
/// in the first one's listeners.
pub(super) fn bind_admin(bind: SocketAddr, inherited: &mut Inherited) -> Result<(TcpListener, SocketAddr), AppError> {
    let socket = inherited.take_socket(&Place::Tcp(bind)).map(TcpListener::from);
    let bound = socket.map_or_else(|| TcpListener::bind(bind), Ok).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    bound.map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::AddrInUse => "another sidecar runs there; choose another port with -admin-bind",
            std::io::ErrorKind::AddrNotAvailable => "this host has no such address; -admin-bind localhost:19000 always works",
            _ => "choose another address with -admin-bind",
        };
        AppError::Config(format!("admin port {bind} cannot be bound: {error}; {remedy}"))
    })
}

/// Writes where the admin port listens, as Envoy does: no line end.
pub(super) fn write_admin_address(path: &Path, address: SocketAddr) -> Result<(), AppError> {
    std::fs::write(path, address.to_string())
        .map_err(|error| AppError::Config(format!("--admin-address-path {}: {error}", path.display())))
}

fn spawn(name: &str, body: impl FnOnce(tokio::runtime::Runtime) + Send + 'static) -> Result<JoinHandle<()>, AppError> {
    let failed = |error: std::io::Error| AppError::Unavailable(format!("thread `{name}` cannot start: {error}; raise TasksMax"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    std::thread::Builder::new().name(name.to_owned()).spawn(move || body(runtime)).map_err(failed)
}
