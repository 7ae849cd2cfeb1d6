//! Token buckets, one a user: how often the host may be asked on whose behalf.
//!
//! Invariant: memory is bounded. Beyond [`UIDS_MAX`] users with used buckets, all further ones share one.

use std::collections::HashMap;
use std::time::Instant;

/// Users with buckets of their own.
const UIDS_MAX: usize = 256;

/// A bucket for each user.
#[derive(Debug)]
pub(crate) struct Rates {
    rate: f64,
    burst: f64,
    buckets: HashMap<u32, Bucket>,
    shared: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Rates {
    /// `rate` tokens a second, and `burst` at once.
    pub(crate) fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, buckets: HashMap::new(), shared: None }
    }

    /// Takes tokens out of the user's bucket; false, and none taken, when there are not enough.
    pub(crate) fn take(&mut self, uid: u32, tokens: f64, now: Instant) -> bool {
        let bucket = self.bucket(uid, now);
        let enough = bucket.tokens >= tokens;
        if enough {
            bucket.tokens -= tokens;
        }
        enough
    }

    /// Puts tokens back that were taken for something that shall cost none.
    pub(crate) fn give_back(&mut self, uid: u32, tokens: f64, now: Instant) {
        let burst = self.burst;
        let bucket = self.bucket(uid, now);
        bucket.tokens = (bucket.tokens + tokens).min(burst);
    }

    fn bucket(&mut self, uid: u32, now: Instant) -> &mut Bucket {
        let (rate, burst) = (self.rate, self.burst);
        if self.buckets.len() >= UIDS_MAX && !self.buckets.contains_key(&uid) {
            self.buckets.retain(|_, bucket| bucket.fill(rate, burst, now) < burst);
        }
        let full = || Bucket { tokens: burst, filled: now };
        let bucket = if self.buckets.len() < UIDS_MAX || self.buckets.contains_key(&uid) {
            self.buckets.entry(uid).or_insert_with(full)
        } else {
            self.shared.get_or_insert_with(full)
        };
        bucket.fill(rate, burst, now);
        bucket
    }
}

impl Bucket {
    fn fill(&mut self, rate: f64, burst: f64, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * rate).min(burst);
        self.filled = now;
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_is_followed_by_the_rate() {
        let (mut rates, start) = (Rates::new(2.0, 5.0), Instant::now());
        assert!((0..5).all(|_| rates.take(7, 1.0, start)));
        assert!(!rates.take(7, 1.0, start));
        assert!(rates.take(8, 1.0, start), "users do not share");
        let later = start + Duration::from_secs(1);
        assert!(rates.take(7, 2.0, later));
        assert!(!rates.take(7, 1.0, later));
    }

    #[test]
    fn a_flood_of_users_shares_one_bucket() {
        let (mut rates, start) = (Rates::new(1.0, 2.0), Instant::now());
        let users = u32::try_from(UIDS_MAX).unwrap();
        assert!((0..users).all(|uid| rates.take(uid, 1.0, start)));
        assert_eq!((users..users + 10).filter(|uid| rates.take(*uid, 1.0, start)).count(), 2);
        assert!(rates.take(9_999, 1.0, start + Duration::from_secs(5)), "idle buckets make room");
        assert_eq!(rates.buckets.len(), 1);
    }
}
