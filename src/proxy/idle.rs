//! How long a connection may live while bytes flow, or do not.
//!
//! Invariant: a connection on which a byte arrives, or is taken by a slow reader, within its limit is never cut for being idle;
//! any other is cut at its limit or little later. Bytes cost nothing: what moved is looked at when the timer fires.

use std::time::{Duration, Instant};

use super::close::CloseReason;
use super::connection::{Connection, Io, MESH, Next, PLAIN};
use crate::ring::Ring;

/// So many looks are taken in one limit,
const LOOKS: u32 = 8;
/// or more often: what the timer knows of connections that are gone is little then.
const LOOK_MAX: Duration = Duration::from_secs(30);

/// When a connection was last seen to have moved bytes.
pub(super) struct Idle {
    limit: Duration,
    /// Bytes that it had moved then, both ways.
    moved: u64,
    since: Instant,
}

impl Idle {
    pub(super) fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, moved: 0, since: now }
    }

    /// Whether nothing has moved for the whole limit. What cannot be told has moved.
    fn is_over(&mut self, moved: Option<u64>, now: Instant) -> bool {
        if moved != Some(self.moved) {
            self.moved = moved.unwrap_or(self.moved);
            self.since = now;
        }
        now.saturating_duration_since(self.since) >= self.limit
    }
}

impl Connection {
    /// Bounds a connection whose listener went away.
    pub(super) fn must_end_by(&mut self, deadline: Instant) {
        self.drain_by.get_or_insert(deadline);
        self.deadline = self.deadline.into_iter().chain(self.drain_by).min();
    }

    /// The next time that a relaying connection is looked at.
    pub(super) fn rearm_relay(&mut self, now: Instant) {
        let look = self.idle.as_ref().map(|idle| now + (idle.limit / LOOKS).min(LOOK_MAX));
        self.deadline = look.into_iter().chain(self.drain_by).min();
    }

    pub(super) fn relayed_too_long<R: Ring>(&mut self, io: &mut Io<'_, R>) -> Next {
        if self.drain_by.is_some_and(|deadline| deadline <= io.now) {
            return self.close(io, CloseReason::Drained, true);
        }
        let moved = self.moved(io.ring);
        if self.idle.as_mut().is_some_and(|idle| idle.is_over(moved, io.now)) {
            return self.close(io, CloseReason::Idle, true);
        }
        self.rearm_relay(io.now);
        Next::Wait
    }

    /// Bytes received, and of what is being sent those that were taken; a unix socket does not tell the latter.
    fn moved<R: Ring>(&self, ring: &mut R) -> Option<u64> {
        let received = self.facts.bytes_from_mesh + self.facts.bytes_to_mesh;
        let sending = [(&self.flows[PLAIN], MESH), (&self.flows[MESH], PLAIN)].into_iter().filter(|(flow, _)| flow.is_sending());
        let mut legs = sending.filter_map(|(_, leg)| self.legs[leg].socket);
        legs.try_fold(received, |moved, socket| Some(moved + ring.acknowledged(socket)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_limit_without_a_byte_is_too_long() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut idle = Idle::new(Duration::from_secs(8), start);
        assert!(!idle.is_over(Some(0), after(7)));
        assert!(!idle.is_over(Some(1), after(8)), "a byte moved");
        assert!(!idle.is_over(Some(1), after(15)));
        assert!(!idle.is_over(None, after(16)), "nobody knows");
        assert!(!idle.is_over(Some(1), after(23)));
        assert!(idle.is_over(Some(1), after(24)));
    }
}
