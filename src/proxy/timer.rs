//! Deadlines of connections: a wheel of buckets, lazily checked.
//!
//! Invariant: a deadline fires at its time or up to one tick later, never before; one that is further away than a round up to
//! [`FAR`] ticks later. Nothing is cancelled: whoever fires asks its owner whether the deadline still holds, and an owner that
//! moved on ignores it.

use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(16);
const BUCKETS: usize = 1_024;
/// Deadlines of later rounds lie in every bucket of this distance, one a second: else thousands of connections that may be
/// idle for an hour would fill all buckets, and wake the worker for each.
const FAR: u64 = 64;

/// What a deadline belongs to: a slot and its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    owner: Owner,
    tick: u64,
}

/// A hashed wheel of about 16 s; longer deadlines go round more than once.
#[derive(Debug)]
pub(super) struct Wheel {
    start: Instant,
    /// First tick not yet looked at.
    next_tick: u64,
    buckets: Vec<Vec<Entry>>,
    entries: usize,
}

impl Wheel {
    pub(super) fn new(now: Instant) -> Self {
        Self { start: now, next_tick: 0, buckets: vec![Vec::new(); BUCKETS], entries: 0 }
    }

    /// Fires `owner` at `deadline`.
    pub(super) fn add(&mut self, owner: Owner, deadline: Instant) {
        let since = deadline.saturating_duration_since(self.start);
        // Rounded up: never early.
        let mut tick = (since.as_nanos().div_ceil(TICK.as_nanos()) as u64).max(self.next_tick);
        if tick >= self.next_tick + BUCKETS as u64 {
            tick = tick.next_multiple_of(FAR);
        }
        self.buckets[bucket(tick)].push(Entry { owner, tick });
        self.entries += 1;
    }

    /// Moves every owner that is due at `now` into `due`.
    pub(super) fn expire(&mut self, now: Instant, due: &mut Vec<Owner>) {
        let current = (now.saturating_duration_since(self.start).as_nanos() / TICK.as_nanos()) as u64;
        if self.entries == 0 {
            self.next_tick = self.next_tick.max(current + 1);
            return;
        }
        // After a long sleep one round sees every bucket.
        let first = self.next_tick.max(current.saturating_sub(BUCKETS as u64 - 1));
        for tick in first..=current {
            let entries = &mut self.buckets[bucket(tick)];
            let before = entries.len();
            entries.retain(|entry| {
                if entry.tick <= current {
                    due.push(entry.owner);
                }
                entry.tick > current
            });
            self.entries -= before - entries.len();
        }
        self.next_tick = self.next_tick.max(current + 1);
    }

    /// How long until something may be due: the time to sleep at most.
    pub(super) fn next_in(&self, now: Instant) -> Option<Duration> {
        if self.entries == 0 {
            return None;
        }
        let tick = (self.next_tick..self.next_tick + BUCKETS as u64).find(|&tick| !self.buckets[bucket(tick)].is_empty())?;
        let at = self.start + TICK * u32::try_from(tick).unwrap_or(u32::MAX);
        Some(at.saturating_duration_since(now).max(Duration::from_millis(1)))
    }
}

fn bucket(tick: u64) -> usize {
    (tick % BUCKETS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_fires_once_in_time_and_never_early(delays in proptest::collection::vec(0_u64..60_000, 1..60), step in 1_u64..5_000) {
            let start = Instant::now();
            let mut wheel = Wheel::new(start);
            for (slot, delay) in delays.iter().enumerate() {
                wheel.add(Owner { slot: slot as u32, generation: 0 }, start + Duration::from_millis(*delay));
            }
            let mut fired = vec![false; delays.len()];
            let mut at = 0;
            while at < 70_000 {
                at += step;
                let mut due = Vec::new();
                wheel.expire(start + Duration::from_millis(at), &mut due);
                for owner in due {
                    let slot = owner.slot as usize;
                    prop_assert!(!fired[slot], "fired twice");
                    prop_assert!(delays[slot] <= at, "fired early");
                    // A far one may lie up to its next bucket behind.
                    let far = if delays[slot] > 16_000 { 1_024 } else { 0 };
                    prop_assert!(at - delays[slot] <= step + 32 + far, "fired late: {} at {at}", delays[slot]);
                    fired[slot] = true;
                }
            }
            prop_assert!(fired.into_iter().all(|fired| fired));
            prop_assert_eq!(wheel.next_in(start), None);
        }
    }

    #[test]
    fn far_deadlines_wake_nobody_often() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        for slot in 0..10_000 {
            wheel.add(Owner { slot, generation: 0 }, start + Duration::from_millis(3_600_000 + 37 * u64::from(slot)));
        }
        let (mut at, mut wakes, mut due) = (start, 0, Vec::new());
        while at < start + Duration::from_secs(160) {
            at += wheel.next_in(at).expect("something waits");
            wheel.expire(at, &mut due);
            wakes += 1;
        }
        assert!(wakes <= 180 && due.is_empty(), "{wakes} wakes in 160 s");
    }

    #[test]
    fn the_next_wait_never_passes_a_deadline() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        wheel.add(Owner { slot: 1, generation: 1 }, start + Duration::from_millis(500));
        let wait = wheel.next_in(start).expect("something waits");
        assert!(wait >= Duration::from_millis(500) && wait <= Duration::from_millis(520), "{wait:?}");
    }
}
