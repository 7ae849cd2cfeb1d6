//! The last denials with their reasons: `/denials` and `/denials/ID`.
//!
//! Invariant: what is shown is the connection log's own line, key for key. An id that is not there is told how long ids are
//! kept, because that is what the asker wants to know next.

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use serde_json::value::RawValue;

use super::Rfc3339;
use super::routes::{self, Parameters};
use crate::telemetry::hub::{DENIALS_MAX, Denial};

/// Denials in an answer that names no limit.
const LIMIT_DEFAULT: usize = 100;

/// The answer of `/denials`.
#[derive(Serialize)]
struct DenialsView<'a> {
    since: String,
    kept: usize,
    kept_max: usize,
    /// The newest first.
    denials: Vec<&'a RawValue>,
}

pub(super) async fn denials(State(shared): routes::Admin, Query(parameters): Query<Parameters>) -> Response {
    let dag = routes::parameter(&parameters, "dag");
    let limit = match routes::parameter(&parameters, "limit").map(str::parse) {
        None => LIMIT_DEFAULT,
        Some(Ok(limit)) if (1..=DENIALS_MAX).contains(&limit) => limit,
        Some(_) => {
            let text = format!("limit is no number of 1 to {DENIALS_MAX}; write /denials?limit={LIMIT_DEFAULT}\n");
            return routes::answer(StatusCode::BAD_REQUEST, routes::TEXT, text);
        }
    };
    let mut hub = shared.hub.lock().await;
    hub.drain();
    let wanted = |denial: &&Denial| dag.is_none_or(|dag| denial.dag.as_deref() == Some(dag));
    let denials = hub.denials();
    routes::json(&DenialsView {
        since: Rfc3339(hub.since()).to_string(),
        kept: denials.len(),
        kept_max: DENIALS_MAX,
        denials: denials.newest().filter(wanted).take(limit).map(|denial| &*denial.line).collect(),
    })
}

pub(super) async fn denial(State(shared): routes::Admin, Path(id): Path<String>) -> Response {
    let mut hub = shared.hub.lock().await;
    hub.drain();
    match hub.denials().get(&id) {
        Some(denial) => routes::json(&denial.line),
        None => {
            let text = format!(
                "no denial of this id is kept: the last {DENIALS_MAX} are, since this process started at {}; older ones stand in \
                 the connection log (-connection-log), under the key denial\n",
                Rfc3339(hub.since())
            );
            routes::answer(StatusCode::NOT_FOUND, routes::TEXT, text)
        }
    }
}
