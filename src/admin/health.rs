//! Whether the proxy is ready, and what is not well.
//!
//! Invariant: readiness is gained once, when the control plane has everything and all listeners are bound, and then kept
//! until drain, as Envoy keeps it. A later trouble (an upstream's port taken, the agent away) leaves the rest serving; an
//! orchestrator that restarted the sidecar for it would make it worse. `/healthz` tells of it instead.

use std::sync::atomic::Ordering;

use serde::Serialize;

use super::{Lifecycle, Shared};
use crate::control::Status;
use crate::mesh::Snapshot;
use crate::telemetry::hub::{Hub, Unbound};

/// Readiness in Envoy's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum State {
    /// The process is starting.
    PreInitializing,
    /// Something is missing: identity, policy, or a listener.
    Initializing,
    /// Serving.
    Live,
    /// On its way out.
    Draining,
}

impl State {
    /// The body of `/ready`, without the line break.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::PreInitializing => "PRE_INITIALIZING",
            Self::Initializing => "INITIALIZING",
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
        }
    }
}

/// Something that is not well, for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    /// What it is about: `agent`, a proxy id, or a listener's address.
    pub(super) subject: String,
    /// What is wrong.
    pub(super) problem: String,
}

/// The state now.
pub(super) fn state(shared: &Shared, hub: &Hub) -> State {
    match *shared.lifecycle.borrow() {
        _ if shared.health_failed.load(Ordering::Relaxed) => State::Draining,
        Lifecycle::Starting => State::PreInitializing,
        Lifecycle::Draining => State::Draining,
        Lifecycle::Live if shared.was_ready.load(Ordering::Relaxed) => State::Live,
        Lifecycle::Live => {
            let ready = shared.status.borrow().ready && unbound(&shared.viewer.current(), hub).is_empty();
            shared.was_ready.store(ready, Ordering::Relaxed);
            if ready { State::Live } else { State::Initializing }
        }
    }
}

/// Everything that is not well now.
pub(super) fn problems(shared: &Shared, hub: &Hub) -> Vec<Problem> {
    let mut problems = status_problems(&shared.status.borrow());
    problems.extend(unbound(&shared.viewer.current(), hub).into_iter().map(|listener| {
        let Unbound { bind, bound, wanted, error } = listener;
        let why = error.map_or_else(|| "it is being opened".to_owned(), |error| format!("it cannot be bound: {error}"));
        Problem { subject: bind.to_string(), problem: format!("{bound} of {wanted} workers listen; {why}") }
    }));
    problems.extend(
        shared.page_failures.borrow().iter().map(|(bind, why)| Problem { subject: bind.to_string(), problem: why.clone() }),
    );
    for (subject, counts) in [("connection log", hub.log_counts()), ("access log", hub.access_log_counts())] {
        if counts.dropped > 0 {
            let problem = format!("{} lines were dropped: the sink is slow or fails", counts.dropped);
            problems.push(Problem { subject: subject.to_owned(), problem });
        }
    }
    problems
}

fn status_problems(status: &Status) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !status.agent_reachable {
        problems.push(Problem {
            subject: "agent".to_owned(),
            problem: "the Consul agent did not answer last; what was learned before stays in force".to_owned(),
        });
    }
    for service in &status.services {
        if let Some(problem) = &service.problem {
            problems.push(Problem { subject: service.proxy_id.to_string(), problem: problem.clone() });
        }
    }
    problems
}

fn unbound(snapshot: &Snapshot, hub: &Hub) -> Vec<Unbound> {
    hub.listeners().unbound(snapshot.binds())
}
