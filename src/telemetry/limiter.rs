//! One line a key and interval: keeps a repeating event from flooding the log, and counts what it kept back.
//!
//! Invariant: every event is either said or counted, and every count is told later, by the next line of its key or by
//! [`Limiter::due`]. Memory is bounded: beyond [`KEYS_MAX`] keys all further ones share a single allowance.
//!
//! Knows no clock: the caller passes the time in.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Keys remembered at once.
const KEYS_MAX: usize = 1_024;

/// Lets one event a key and interval through.
#[derive(Debug)]
pub(super) struct Limiter<K> {
    interval: Duration,
    keys: HashMap<K, Allowance>,
    shared: Option<Allowance>,
}

#[derive(Debug)]
struct Allowance {
    last: Instant,
    suppressed: u64,
}

impl<K: Hash + Eq> Limiter<K> {
    /// One event each `interval`.
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, keys: HashMap::new(), shared: None }
    }

    /// `Some(kept back since the last line)` when the event may be said now; otherwise it is counted.
    pub(super) fn ask(&mut self, key: K, now: Instant) -> Option<u64> {
        if let Some(allowance) = self.keys.get_mut(&key) {
            return allowance.ask(now, self.interval);
        }
        if self.keys.len() < KEYS_MAX {
            self.keys.insert(key, Allowance { last: now, suppressed: 0 });
            return Some(0);
        }
        match &mut self.shared {
            Some(allowance) => allowance.ask(now, self.interval),
            None => {
                self.shared = Some(Allowance { last: now, suppressed: 0 });
                Some(0)
            }
        }
    }

    /// Forgets keys whose interval is over, and returns those of them that still have events to tell of. The count under
    /// `None` belongs to keys that found no room of their own.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Option<K>, u64)> {
        let interval = self.interval;
        let mut told: Vec<_> = self
            .keys
            .extract_if(|_, allowance| allowance.is_over(now, interval))
            .filter(|(_, allowance)| allowance.suppressed > 0)
            .map(|(key, allowance)| (Some(key), allowance.suppressed))
            .collect();
        if let Some(allowance) = self.shared.take_if(|allowance| allowance.is_over(now, interval))
            && allowance.suppressed > 0
        {
            told.push((None, allowance.suppressed));
        }
        told
    }
}

impl Allowance {
    fn is_over(&self, now: Instant, interval: Duration) -> bool {
        now.saturating_duration_since(self.last) >= interval
    }

    fn ask(&mut self, now: Instant, interval: Duration) -> Option<u64> {
        if self.is_over(now, interval) {
            self.last = now;
            return Some(std::mem::take(&mut self.suppressed));
        }
        self.suppressed += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    #[test]
    fn one_line_an_interval_and_nothing_is_lost() {
        let mut limiter = Limiter::new(INTERVAL);
        let start = Instant::now();
        assert_eq!(limiter.ask("web", start), Some(0));
        assert_eq!(limiter.ask("web", start), None);
        assert_eq!(limiter.ask("web", start + INTERVAL / 2), None);
        assert_eq!(limiter.ask("api", start), Some(0), "keys do not share");
        assert_eq!(limiter.ask("web", start + INTERVAL), Some(2));
        assert_eq!(limiter.ask("web", start + INTERVAL), None);
        let mut told = limiter.due(start + INTERVAL * 2);
        told.sort_unstable();
        assert_eq!(told, [(Some("web"), 1)], "the quiet key is forgotten without a line");
        assert!(limiter.keys.is_empty());
    }

    #[test]
    fn a_flood_of_keys_shares_one_allowance() {
        let mut limiter = Limiter::new(INTERVAL);
        let start = Instant::now();
        let said = (0..KEYS_MAX + 10).filter(|key| limiter.ask(*key, start).is_some()).count();
        assert_eq!(said, KEYS_MAX + 1);
        assert_eq!(limiter.keys.len(), KEYS_MAX);
        assert_eq!(limiter.due(start + INTERVAL), [(None, 9)]);
    }
}
