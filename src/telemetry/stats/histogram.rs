//! Durations as Envoy's histograms keep them: log-linear bins of two decimal digits, and Prometheus buckets.
//!
//! Invariant: buckets, count and sum are exact for the milliseconds recorded; a percentile lies in the bin of two digits that
//! holds it. Bins are made as they are needed: at most 90 a power of ten, and a duration has at most [`MILLIS_MAX`].
//!
//! An interval runs from one [`Histogram::turn`] to the next: Envoy shows the last one beside the sums.

use std::collections::BTreeMap;

/// Envoy's default bucket bounds, in milliseconds.
pub const BOUNDS_MS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];
/// The percentiles that Envoy prints.
pub const PERCENTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];
/// Longer durations count as this long: 31 years.
const MILLIS_MAX: u64 = 1_000_000_000_000;

/// One distribution of durations, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    total: Bins,
    running: Bins,
    interval: Bins,
    buckets: [u64; BOUNDS_MS.len()],
    sum_ms: u64,
}

/// Counts by bin, in the bins' order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bins {
    counts: BTreeMap<Bin, u64>,
    samples: u64,
}

/// One bin: a power of ten, then its first two digits; no digits for zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bin {
    exponent: i8,
    digits: u8,
}

impl Histogram {
    /// Counts a duration.
    pub fn record(&mut self, millis: u64) {
        let millis = millis.min(MILLIS_MAX);
        let bin = Bin::of(millis);
        self.total.add(bin, 1);
        self.running.add(bin, 1);
        self.sum_ms = self.sum_ms.saturating_add(millis);
        if let Some(bucket) = BOUNDS_MS.iter().position(|bound| millis as f64 <= *bound) {
            self.buckets[bucket] += 1;
        }
    }

    /// Begins the next interval.
    pub fn turn(&mut self) {
        self.interval = std::mem::take(&mut self.running);
    }

    /// Counts everything that `other` has.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in
            [(&mut self.total, &other.total), (&mut self.running, &other.running), (&mut self.interval, &other.interval)]
        {
            theirs.counts.iter().for_each(|(bin, count)| mine.add(*bin, *count));
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += theirs;
        }
        self.sum_ms = self.sum_ms.saturating_add(other.sum_ms);
    }

    /// Durations counted.
    pub fn count(&self) -> u64 {
        self.total.samples
    }

    /// All durations added up, in milliseconds.
    pub fn sum_ms(&self) -> u64 {
        self.sum_ms
    }

    /// Durations in each bucket alone, in the order of [`BOUNDS_MS`]; what is longer is in none.
    pub fn buckets(&self) -> &[u64; BOUNDS_MS.len()] {
        &self.buckets
    }

    /// Everything since the start.
    pub fn total(&self) -> &Bins {
        &self.total
    }

    /// The interval that ended last.
    pub fn interval(&self) -> &Bins {
        &self.interval
    }
}

impl Bins {
    fn add(&mut self, bin: Bin, count: u64) {
        *self.counts.entry(bin).or_default() += count;
        self.samples += count;
    }

    /// Where `percent` of the samples are not above, in milliseconds; `None` without samples. Samples are taken to lie evenly
    /// in their bin, none at its edges, which is how Envoy's library does it.
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let rank = ((percent / 100.0 * self.samples as f64).ceil() as u64).max(1);
        let mut before = 0;
        for (bin, count) in &self.counts {
            if rank <= before + count {
                return Some(bin.lower() + bin.width() * (rank - before) as f64 / (count + 1) as f64);
            }
            before += count;
        }
        None
    }

    /// Each bin with its count, from the shortest.
    pub fn iter(&self) -> impl Iterator<Item = (Bin, u64)> {
        self.counts.iter().map(|(bin, count)| (*bin, *count))
    }
}

impl Bin {
    fn of(millis: u64) -> Self {
        if millis == 0 {
            return Self { exponent: i8::MIN, digits: 0 };
        }
        let (mut digits, mut exponent) = (millis, 0);
        while digits >= 100 {
            (digits, exponent) = (digits / 10, exponent + 1);
        }
        if digits < 10 {
            (digits, exponent) = (digits * 10, exponent - 1);
        }
        Self { exponent, digits: digits as u8 }
    }

    /// Its lower bound, in milliseconds.
    pub fn lower(self) -> f64 {
        self.scaled(f64::from(self.digits))
    }

    /// How wide it is, in milliseconds.
    pub fn width(self) -> f64 {
        if self.digits == 0 { 0.0 } else { self.scaled(1.0) }
    }

    /// By division where it is a fraction: 0.1 times 41 would not be 4.1.
    fn scaled(self, number: f64) -> f64 {
        match self.exponent {
            _ if self.digits == 0 => 0.0,
            exponent @ 0.. => number * 10_f64.powi(i32::from(exponent)),
            exponent => number / 10_f64.powi(-i32::from(exponent)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(samples: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        samples.iter().for_each(|millis| histogram.record(*millis));
        histogram
    }

    fn percentiles(samples: &[u64]) -> Vec<f64> {
        let histogram = of(samples);
        PERCENTILES.iter().map(|percent| histogram.total().percentile(*percent).expect("has samples")).collect()
    }

    /// What Envoy 1.40 printed for these samples.
    #[test]
    fn percentiles_are_those_of_envoy() {
        assert!(percentiles(&[4]).iter().all(|value| (value - 4.05).abs() < 1e-12));
        assert!(percentiles(&[215]).iter().all(|value| *value == 215.0));
        assert!(percentiles(&[0]).iter().all(|value| *value == 0.0));
        let two = percentiles(&[3, 3]);
        assert!((two[2] - 3.033_333_333_333_333).abs() < 1e-12 && (two[3] - 3.066_666_666_666_667).abs() < 1e-12, "{two:?}");
        let three = percentiles(&[2, 2, 9]);
        assert!((three[2] - 2.066_666_666_666_667).abs() < 1e-12 && (three[3] - 9.05).abs() < 1e-12, "{three:?}");
    }

    #[test]
    fn buckets_count_exactly_and_include_their_bound() {
        let histogram = of(&[0, 1, 5, 6, 25, 3_600_001]);
        let counted: Vec<_> = BOUNDS_MS.iter().zip(histogram.buckets()).filter(|(_, count)| **count > 0).collect();
        assert_eq!(counted, [(&0.5, &1), (&1.0, &1), (&5.0, &1), (&10.0, &1), (&25.0, &1)]);
        assert_eq!((histogram.count(), histogram.sum_ms()), (6, 3_600_038));
    }

    #[test]
    fn intervals_follow_one_another_and_the_sum_stays() {
        let mut histogram = of(&[7]);
        assert_eq!(histogram.interval().percentile(50.0), None);
        histogram.turn();
        assert!(histogram.interval().percentile(50.0).is_some());
        histogram.turn();
        assert_eq!(histogram.interval().percentile(50.0), None);
        assert_eq!(histogram.count(), 1);
    }

    #[test]
    fn any_duration_has_its_bin_and_few_bins_hold_all() {
        let mut histogram = of(&[u64::MAX, MILLIS_MAX, 99, 100, 101, 109, 110]);
        (0..2_000_000).step_by(7).for_each(|millis| histogram.record(millis));
        assert!(histogram.total().iter().count() < 90 * 14);
        for (bin, _) in histogram.total().iter() {
            assert_eq!(Bin::of(bin.lower() as u64).digits, if bin.lower() < 1.0 { 0 } else { bin.digits }, "{bin:?}");
        }
    }

    #[test]
    fn merged_histograms_have_what_both_had() {
        let mut left = of(&[1, 2]);
        left.merge(&of(&[2, 3_000]));
        assert_eq!(left, of(&[1, 2, 2, 3_000]));
    }
}
