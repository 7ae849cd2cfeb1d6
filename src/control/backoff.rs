//! Waits between attempts: growing, bounded, never in step with other processes. Pure: the caller sleeps.

use std::time::Duration;

/// Doubling waits between `first` and `most`, each cut by up to a quarter at random.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// For an agent on loopback: quick to notice that it is back (the built-in proxy took 19 s), slow enough for it.
    pub(crate) fn agent() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(5))
    }

    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// The wait before the next attempt.
    pub(crate) fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(self.most);
        jittered(wait)
    }

    /// An attempt went well.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// `wait` shortened by up to a quarter.
pub(crate) fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.75..=1.0))
}

/// Keeps a loop from spinning when queries that should block return at once: a token bucket.
#[derive(Debug)]
pub(crate) struct Pace {
    tokens: f64,
    last: std::time::Instant,
}

/// Answers that may follow each other at once.
const PACE_BURST: f64 = 20.0;
/// Answers a second after that.
const PACE_PER_SECOND: f64 = 10.0;

impl Pace {
    pub(crate) fn new(now: std::time::Instant) -> Self {
        Self { tokens: PACE_BURST, last: now }
    }

    /// How long to wait before the next request.
    pub(crate) fn take(&mut self, now: std::time::Instant) -> Duration {
        let earned = now.saturating_duration_since(self.last).as_secs_f64() * PACE_PER_SECOND;
        self.tokens = (self.tokens + earned).min(PACE_BURST) - 1.0;
        self.last = now;
        if self.tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.tokens / PACE_PER_SECOND) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn waits_double_up_to_the_bound_and_start_over() {
        let mut backoff = Backoff::agent();
        let mut full = Duration::from_millis(200);
        for _ in 0..12 {
            let wait = backoff.wait();
            assert!(wait <= full && wait >= full.mul_f64(0.74), "{wait:?} for {full:?}");
            full = (full * 2).min(Duration::from_secs(5));
        }
        backoff.reset();
        assert!(backoff.wait() <= Duration::from_millis(200));
    }

    #[test]
    fn a_burst_is_free_and_a_spin_is_slowed() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!((0..20).all(|_| pace.take(start) == Duration::ZERO));
        assert!(pace.take(start) >= Duration::from_millis(99));
        assert_eq!(pace.take(start + Duration::from_secs(60)), Duration::ZERO);
    }
}
