//! What workers tell the admin thread: counters in plain cells, connections as events in single-producer rings.
//!
//! Invariant: a worker never waits here. A full event ring drops the event and counts it; a counter is one relaxed load
//! and store on a line that only its worker writes. Formatting, labels and output happen on the admin thread.

pub mod cells;
pub mod channel;
pub mod close;
pub mod denial;
pub mod export;
pub mod hub;
mod limiter;
pub mod log;
pub mod record;
pub mod stats;
