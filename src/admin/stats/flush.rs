//! The flush: every so often an interval of the histograms ends, and sinks get what was counted in it.
//!
//! Invariant: without a sink a flush costs the histograms' turn and nothing is made. Sinks are those of the settings and of the
//! proxies' definitions, which may change while the process runs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Settings, collect};
use crate::admin::Shared;
use crate::config::envoy::STATS_FLUSH_INTERVAL;
use crate::control::StatsWishes;
use crate::telemetry::hub::Sample;
use crate::telemetry::stats::sink::{Sink, Timing};
use crate::telemetry::stats::tags::Dialect;
use crate::telemetry::stats::{Stat, Value, Which, model};

/// Shorter intervals than Envoy allows would only cost.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Flushes for ever.
pub(in crate::admin) async fn run(shared: Arc<Shared>) {
    let mut flusher = Flusher::default();
    loop {
        let wishes = shared.status.borrow().stats.clone();
        let settings = &shared.stats.settings;
        tokio::time::sleep(interval(settings, &wishes)).await;
        flusher.adopt(settings, &wishes);
        flusher.flush(&shared).await;
    }
}

/// The settings' interval, unless it is the default and a definition wishes another.
fn interval(settings: &Settings, wishes: &StatsWishes) -> Duration {
    let set = settings.stats.flush_interval;
    if set == STATS_FLUSH_INTERVAL { wishes.flush_interval.unwrap_or(set) } else { set }.max(INTERVAL_MIN)
}

/// The sinks and what they were told last.
#[derive(Debug, Default)]
struct Flusher {
    wishes: Option<StatsWishes>,
    sinks: Vec<Sink>,
    /// Counters at the last flush, by owner and name; those that ever counted.
    last: HashMap<(usize, String), u64>,
}

impl Flusher {
    /// Makes the sinks anew if they shall be others.
    fn adopt(&mut self, settings: &Settings, wishes: &StatsWishes) {
        if self.wishes.as_ref() == Some(wishes) {
            return;
        }
        let mut all = settings.stats.sinks.clone();
        all.extend(wishes.sinks.iter().filter(|sink| !settings.stats.sinks.contains(sink)).cloned());
        let tagger = || settings.tagger(Dialect::DogStatsd, &wishes.tags);
        self.sinks = all.into_iter().map(|sink| Sink::new(sink, tagger)).collect();
        self.wishes = Some(wishes.clone());
    }

    async fn flush(&mut self, shared: &Shared) {
        let samples = {
            let mut hub = shared.hub.lock().await;
            hub.drain();
            let durations = hub.durations_mut();
            durations.turn();
            if self.sinks.is_empty() {
                return;
            }
            durations.keep_samples();
            let (samples, dropped) = durations.take_samples();
            if dropped > 0 {
                tracing::debug!(dropped, "more durations than wait for sinks; their sums are right");
            }
            samples
        };
        let (stats, snapshot) = collect(shared, Which::Used).await;
        let timings = timings(samples.into(), &model::sample_names(&snapshot));
        let stats = self.grown(stats);
        for sink in &mut self.sinks {
            if let Some(tagger) = sink.tagger()
                && shared.stats.settings.consul_tags
            {
                tagger.set_owners(model::owners(&snapshot));
            }
            sink.flush(&stats, &timings).await;
        }
    }

    /// Counters become what was added since the last flush.
    fn grown(&mut self, mut stats: Vec<Stat>) -> Vec<Stat> {
        // Of counters that are gone nothing is kept.
        let mut before = std::mem::take(&mut self.last);
        for stat in stats.iter_mut().filter(|stat| stat.used) {
            if let Value::Counter(count) = &mut stat.value {
                let key = (stat.owner, stat.name.clone());
                let last = before.remove(&key).unwrap_or_default();
                self.last.insert(key, *count);
                *count = count.saturating_sub(last);
            }
        }
        stats
    }
}

fn timings(samples: Vec<Sample>, names: &model::SampleNames) -> Vec<Timing> {
    let mut timings = Vec::with_capacity(samples.len() * 2);
    for sample in samples {
        // A listener that is gone has no name any more.
        let Some(named) = names.get(&sample.key) else { continue };
        let mut push = |name: String, millis| timings.push(Timing { name, owner: named.owner, millis });
        push(format!("{}.downstream_cx_length_ms", named.listener), sample.length_ms);
        if let (Some(cluster), Some(connect_ms)) = (&named.cluster, sample.connect_ms) {
            push(format!("{cluster}.upstream_cx_connect_ms"), connect_ms);
            push(format!("{cluster}.upstream_cx_length_ms"), sample.length_ms);
        }
    }
    timings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(count: u64) -> Vec<Stat> {
        vec![Stat { name: "a".into(), owner: 0, value: Value::Counter(count), used: count > 0 }]
    }

    #[test]
    fn a_counters_growth_is_told_once() {
        let mut flusher = Flusher::default();
        for (count, grown) in [(0, 0), (3, 3), (3, 0), (10, 7)] {
            assert_eq!(flusher.grown(counter(count))[0].value, Value::Counter(grown));
        }
    }

    #[test]
    fn the_settings_interval_goes_before_a_definitions() {
        let wishes = StatsWishes { flush_interval: Some(Duration::from_secs(2)), ..StatsWishes::default() };
        assert_eq!(interval(&Settings::default(), &wishes), Duration::from_secs(2));
        assert_eq!(interval(&Settings::default(), &StatsWishes::default()), STATS_FLUSH_INTERVAL);
        let mut settings = Settings::default();
        settings.stats.flush_interval = Duration::from_secs(9);
        assert_eq!(interval(&settings, &wishes), Duration::from_secs(9));
    }
}
