//! Who of this host talks to whom, as JSON: `/callers`.
//!
//! Invariant: `services` is exact now, bytes of open connections included: those are the listeners' own counters. `totals`
//! and `tries` know the caller and count a connection with its bytes when it closes, because only then does the data plane
//! tell of it. Everything is since the process started, and `dag` filters what has a DAG.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::response::Response;
use serde::Serialize;

use super::Rfc3339;
use super::routes::{self, Parameters};
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::hub::{Counts, Hub, Key, Seen, Speaker, Totals, Try};

/// Said in the answer, because the figures would otherwise be read as live.
const COUNTED: &str = "totals and tries count a connection, with its bytes, when it closes; services count open ones too";

/// The whole answer.
#[derive(Serialize)]
struct CallersView<'a> {
    since: String,
    counted: &'static str,
    services: Vec<ServiceView<'a>>,
    totals: Vec<TotalView<'a>>,
    /// The one seen last first.
    tries: Vec<TryView<'a>>,
    /// Tries that made room for newer ones.
    tries_forgotten: u64,
}

/// One listener's sums.
#[derive(Serialize)]
struct ServiceView<'a> {
    direction: &'static str,
    service: &'a str,
    upstream: Option<&'a str>,
    active: u64,
    connections: u64,
    denied: u64,
    bytes_from_mesh: u64,
    bytes_to_mesh: u64,
}

#[derive(Serialize)]
struct CountsView {
    connections: u64,
    denied: u64,
    bytes_from_mesh: u64,
    bytes_to_mesh: u64,
}

#[derive(Serialize)]
struct TotalView<'a> {
    /// `dag`, `component`, `unidentified` or `other`.
    who: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    dag: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    component: Option<&'a str>,
    upstream: &'a str,
    #[serde(flatten)]
    counts: CountsView,
}

#[derive(Serialize)]
struct TryView<'a> {
    dag: &'a str,
    task: &'a str,
    run: &'a str,
    #[serde(rename = "try")]
    try_number: u32,
    map_index: i32,
    identity: Option<&'a str>,
    upstream: &'a str,
    first_seen: String,
    last_seen: String,
    #[serde(flatten)]
    counts: CountsView,
    last_denial: Option<String>,
}

pub(super) async fn callers(State(shared): routes::Admin, Query(parameters): Query<Parameters>) -> Response {
    let mut hub = shared.hub.lock().await;
    hub.drain();
    routes::json(&CallersView::new(&hub, routes::parameter(&parameters, "dag")))
}

impl<'a> CallersView<'a> {
    fn new(hub: &'a Hub, dag: Option<&str>) -> Self {
        let callers = hub.callers();
        let of_dag = |name: Option<&Arc<str>>| dag.is_none_or(|dag| name.is_some_and(|name| **name == *dag));
        Self {
            since: Rfc3339(hub.since()).to_string(),
            counted: COUNTED,
            services: hub.series().totals().map(|(key, totals)| ServiceView::new(key, &totals)).collect(),
            totals: callers.totals().filter(|(speaker, ..)| of_dag(speaker.dag())).map(TotalView::from).collect(),
            tries: callers.tries().iter().filter(|(row, _)| of_dag(Some(&row.task.dag))).map(TryView::from).collect(),
            tries_forgotten: callers.tries().forgotten().0,
        }
    }
}

impl<'a> ServiceView<'a> {
    fn new(key: &'a Key, totals: &Totals) -> Self {
        let denied = match key.direction {
            Direction::Inbound => &[CloseReason::Denied][..],
            Direction::Outbound => &[CloseReason::CallerDenied, CloseReason::DeniedByPeer],
        };
        Self {
            direction: key.direction.as_str(),
            service: &key.service,
            upstream: key.upstream.as_deref(),
            active: totals.active,
            connections: totals.connections,
            denied: denied.iter().map(|reason| totals.closed[*reason as usize]).sum(),
            bytes_from_mesh: totals.bytes_from_mesh,
            bytes_to_mesh: totals.bytes_to_mesh,
        }
    }
}

impl From<&Counts> for CountsView {
    fn from(counts: &Counts) -> Self {
        let Counts { connections, denied, bytes_from_mesh, bytes_to_mesh } = *counts;
        Self { connections, denied, bytes_from_mesh, bytes_to_mesh }
    }
}

impl<'a> From<(&'a Speaker, &'a Arc<str>, &'a Counts)> for TotalView<'a> {
    fn from((speaker, upstream, counts): (&'a Speaker, &'a Arc<str>, &'a Counts)) -> Self {
        Self {
            who: speaker.kind(),
            dag: speaker.dag().map(|dag| &**dag),
            component: speaker.component().map(|name| &**name),
            upstream,
            counts: counts.into(),
        }
    }
}

impl<'a> From<(&'a Try, &'a Seen)> for TryView<'a> {
    fn from((Try { task, identity, upstream }, seen): (&'a Try, &'a Seen)) -> Self {
        Self {
            dag: &task.dag,
            task: &task.task,
            run: &task.run,
            try_number: task.try_number,
            map_index: task.map_index,
            identity: identity.as_deref(),
            upstream,
            first_seen: Rfc3339(seen.first).to_string(),
            last_seen: Rfc3339(seen.last).to_string(),
            counts: (&seen.counts).into(),
            last_denial: seen.last_denial.map(|id| id.to_string()),
        }
    }
}
