//! Envoy's stats, made when somebody asks: names and values of what a sidecar at layer 4 has, from what workers counted and
//! what is enforced.
//!
//! Invariant: nothing here is counted. A [`Stat`] is a view of cells, of the snapshot or of the process, so it is as exact as
//! those, and nothing is kept between two questions but durations ([`histogram`]) and tags that were worked out ([`tags`]).
//! What this proxy cannot know has Envoy's name and the value 0: `model` says of which stats that is so, and why.
//!
//! Knows no HTTP and no control plane: what only they know comes in as [`model::Process`].

pub mod histogram;
pub mod model;
pub mod prometheus;
pub mod sink;
pub mod tags;
pub mod text;

pub use histogram::Histogram;
pub use model::{AllMembers, Answers, Changes, Facts, Fetched, Members, Process, Stat, Told, Updates, Value, Which};
pub use tags::Tagger;

/// Lets other tasks of this thread have their turn, and then whoever waits for its core: that may be a worker, for which the
/// scheduler would let a thread that is at work finish its slice of some milliseconds.
pub(crate) async fn give_way() {
    tokio::task::yield_now().await;
    std::thread::yield_now();
}
