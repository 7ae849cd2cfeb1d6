//! What the admin thread is told of the process, and the listeners for some of its pages.
//!
//! A listener of the command line or a bootstrap that cannot be bound ends the start, as in Envoy; a process that takes another's
//! place takes its socket over once that one has left it.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use super::{AppError, logs};
use crate::admin::{self, Facts, pages};
use crate::config;
use crate::config::envoy::PageListener;
use crate::sys::handover::{self, Place};
use crate::telemetry::log::{Destination, Reopener};

/// Settings of the admin port; `admin` is where it is bound.
pub(super) fn settings(
    sidecar: &config::Sidecar,
    admin: SocketAddr,
    reopener: Reopener,
    successor: bool,
) -> Result<admin::Settings, AppError> {
    let (pages, late_pages) = bind_pages(&sidecar.pages, successor)?;
    let node = sidecar.xds.as_ref().map(|xds| (xds.node_id.clone(), xds.node_cluster.clone(), xds.node_metadata.clone()));
    let facts = Facts {
        envoy_version: sidecar.admin.envoy_version.clone(),
        admin: Some(admin),
        access_log: sidecar.admin.access_log.clone(),
        workers: sidecar.plane.workers,
        drain_time: sidecar.plane.drain_time,
        agent: sidecar.xds.is_none().then(|| sidecar.consul.address.clone()),
        node,
        component_levels: sidecar.admin.component_levels.clone(),
    };
    Ok(admin::Settings {
        access_log: access_log(sidecar.admin.access_log.clone()),
        reopener,
        facts,
        pages,
        late_pages,
        bind_page,
        log_level: logs::level(),
        stats: admin::StatsSettings {
            consul_tags: sidecar.xds.is_none() && sidecar.stats.tags.is_empty(),
            stats: sidecar.stats.clone(),
        },
    })
}

/// The flag is a path, and people write `/dev/stdout`.
fn access_log(path: Option<PathBuf>) -> Destination {
    path.map_or(Destination::None, |path| path.to_str().map_or_else(|| Destination::File(path.clone()), Destination::from))
}

fn bind_pages(wanted: &[PageListener], successor: bool) -> Result<(Vec<pages::Bound>, Vec<PageListener>), AppError> {
    let (mut bound, mut late) = (Vec::new(), Vec::new());
    for page in wanted {
        match pages::bind(page.clone(), bind_page) {
            Ok(one) => bound.push(one),
            Err(pages::PageError::Bind { .. }) if successor => late.push(page.clone()),
            Err(error) => return Err(AppError::Config(error.to_string())),
        }
    }
    Ok((bound, late))
}

/// Set apart from the workers' sockets: these listeners come and go with registrations, of which a new process knows nothing at
/// first.
fn bind_page(address: SocketAddr) -> io::Result<TcpListener> {
    let left = handover::take_apart(&Place::Tcp(address)).map(TcpListener::from);
    let listener = left.map_or_else(|| TcpListener::bind(address), Ok)?;
    handover::set_apart(&listener);
    Ok(listener)
}
