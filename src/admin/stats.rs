//! `/stats`, `/stats/prometheus` and `/reset_counters`, with Envoy's parameters and texts.
//!
//! Invariant: the hub is held only while counters are copied out of it; names, tags and text are made afterwards, with pauses in
//! which the tick has its turn. A Prometheus page is written in pieces as the scraper takes them.
//!
//! `/reset_counters` changes what these pages show, nothing else: the counters of `ringfence_*` only grow.

mod flush;
mod query;

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Polling, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::{Query as Extracted, State};
use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::Frame;
use tokio::sync::Mutex;

use super::Shared;
use super::health;
use super::routes::{Admin, Parameters, TEXT, answer};
use crate::config;
use crate::config::envoy::StatTag;
use crate::mesh::Snapshot;
use crate::telemetry::stats::prometheus::Page;
use crate::telemetry::stats::tags::{self, Dialect};
use crate::telemetry::stats::{Facts, Process, Stat, Tagger, Value, Which, model, text};

pub(super) use flush::run as flush;
use query::{Format, Query};

const JSON: &str = "application/json";
/// Pieces made in a row before the tick and other requests get their turn: half a millisecond.
const PIECES_IN_A_ROW_MAX: u32 = 8;

/// What the pages need to know.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Tags, sinks and what is left out.
    pub stats: config::envoy::Stats,
    /// Consul's tags are brought by this process, because no bootstrap brings them.
    pub consul_tags: bool,
}

/// What the pages remember.
#[derive(Debug)]
pub(super) struct Pages {
    settings: Settings,
    tagger: Mutex<Named>,
    /// What counters were at the last reset, by owner and name.
    baseline: Mutex<HashMap<(usize, String), u64>>,
}

/// A tagger and the tags of definitions that it was made with.
#[derive(Debug)]
struct Named {
    tagger: Tagger,
    wished: Vec<StatTag>,
}

impl Settings {
    /// The tags of stats, with what definitions wish besides.
    fn tags(&self, wished: &[StatTag]) -> Vec<StatTag> {
        let mut tags = self.stats.tags.clone();
        if self.consul_tags {
            tags.extend(tags::of_consul(self.stats.omit_deprecated_tags));
        }
        for tag in wished {
            if tags.iter().all(|known| known.name != tag.name) {
                tags.push(tag.clone());
            }
        }
        tags
    }

    fn tagger(&self, dialect: Dialect, wished: &[StatTag]) -> Tagger {
        Tagger::new(dialect, &self.tags(wished), self.stats.default_tags).unwrap_or_else(|error| {
            tracing::error!(%error, remedy = "correct stats_config.stats_tags", "stats have no tags but Envoy's own");
            Tagger::new(dialect, &[], true).expect("Envoy's own tags are well-formed")
        })
    }
}

impl Pages {
    pub(super) fn new(settings: Settings) -> Self {
        let tagger = settings.tagger(Dialect::Prometheus, &[]);
        Self { settings, tagger: Mutex::new(Named { tagger, wished: Vec::new() }), baseline: Mutex::new(HashMap::new()) }
    }
}

/// Stats as they stand now, whatever was reset.
async fn collect(shared: &Shared, which: Which) -> (Vec<Stat>, Arc<Snapshot>) {
    let snapshot = shared.viewer.current();
    let (facts, state) = {
        let mut hub = shared.hub.lock().await;
        // The newest events first: a scrape right after a connection shall see it.
        hub.drain();
        (Facts::capture(&hub), health::state(shared, &hub))
    };
    let (connected, told) = {
        let status = shared.status.borrow();
        (status.agent_reachable, status.told.clone())
    };
    let process = Process {
        state: match state {
            health::State::Live => 0,
            health::State::Draining => 1,
            health::State::PreInitializing => 2,
            health::State::Initializing => 3,
        },
        uptime: shared.start.elapsed(),
        connected,
        told,
        memory: model::Memory::now(),
    };
    (model::build(&snapshot, &facts, &process, which).await, snapshot)
}

/// What a page shows: counted since the last reset, and asked for.
async fn shown(shared: &Shared, query: &Query) -> (Vec<Stat>, Arc<Snapshot>) {
    let (mut stats, snapshot) = collect(shared, query.which()).await;
    let baseline = shared.stats.baseline.lock().await;
    if !baseline.is_empty() {
        for stat in &mut stats {
            if let Value::Counter(count) = &mut stat.value
                && let Some(reset) = baseline.get(&(stat.owner, stat.name.clone()))
            {
                // A listener that came back under its name begins at its totals, which never fall below.
                *count = count.saturating_sub(*reset);
            }
        }
    }
    drop(baseline);
    stats.retain(|stat| query.wants(stat));
    (stats, snapshot)
}

pub(super) async fn stats(State(shared): Admin, Extracted(parameters): Extracted<Parameters>) -> Response {
    match Query::parse(&parameters) {
        Err(why) => answer(StatusCode::BAD_REQUEST, TEXT, why),
        Ok(query) if query.format == Format::Prometheus => page(&shared, query).await,
        Ok(query) => {
            let (stats, _) = shown(&shared, &query).await;
            let stats = text::fold(stats);
            match query.format {
                Format::Json => answer(StatusCode::OK, JSON, text::json(&stats, query.buckets)),
                _ => answer(StatusCode::OK, TEXT, text::text(&stats, query.buckets)),
            }
        }
    }
}

pub(super) async fn prometheus(State(shared): Admin, Extracted(parameters): Extracted<Parameters>) -> Response {
    match Query::parse(&parameters) {
        Err(why) => answer(StatusCode::BAD_REQUEST, TEXT, why),
        Ok(query) => page(&shared, query).await,
    }
}

async fn page(shared: &Arc<Shared>, mut query: Query) -> Response {
    query.used_only |= shared.stats.settings.stats.omit_unused;
    let (mut stats, snapshot) = shown(shared, &query).await;
    if !query.text_readouts {
        stats.retain(|stat| !matches!(stat.value, Value::Text(_)));
    }
    let wished = shared.status.borrow().stats.tags.clone();
    let pages = &shared.stats;
    let mut named = pages.tagger.lock().await;
    if named.wished != wished {
        *named = Named { tagger: pages.settings.tagger(Dialect::Prometheus, &wished), wished };
    }
    if pages.settings.consul_tags {
        named.tagger.set_owners(model::owners(&snapshot));
    } else {
        // Without tags that tell services apart, two series of one name would be the same series twice.
        stats = text::fold(stats);
    }
    let envoys = Page::new(stats, &mut named.tagger).await;
    drop(named);
    let ours = if query.is_narrowed() { String::new() } else { super::routes::own_metrics(shared, query.which()).await };
    let pieces = envoys.chain(Some(ours).filter(|ours| !ours.is_empty()));
    answer(StatusCode::OK, TEXT, Body::new(Pieces { left: Box::new(pieces), in_a_row: 0 }))
}

/// What counters are now is where these pages count from.
pub(super) async fn reset(shared: &Shared) {
    let (stats, _) = collect(shared, Which::Used).await;
    let counted = stats.into_iter().filter_map(|stat| match stat.value {
        Value::Counter(count) if count > 0 => Some(((stat.owner, stat.name), count)),
        _ => None,
    });
    *shared.stats.baseline.lock().await = counted.collect();
}

/// A body whose pieces are made when they can be sent.
struct Pieces {
    left: Box<dyn Iterator<Item = String> + Send>,
    in_a_row: u32,
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Polling<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.in_a_row == PIECES_IN_A_ROW_MAX {
            self.in_a_row = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.in_a_row += 1;
        // A piece is some tens of microseconds of work: whoever waits for this core comes first.
        std::thread::yield_now();
        Poll::Ready(self.left.next().map(|piece| Ok(Frame::data(Bytes::from(piece)))))
    }
}
