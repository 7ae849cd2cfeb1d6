//! Stats as Envoy's `/stats` prints them: lines for people, JSON for scripts.
//!
//! Invariant: one line a name. What several local services share by name is added up here ([`fold`]), because a line has no
//! label that could tell them apart.

use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::histogram::{BOUNDS_MS, Bins, PERCENTILES};
use super::{Histogram, Stat, Value};

/// How histograms are shown (`histogram_buckets=`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Buckets {
    /// Percentiles.
    #[default]
    Summary,
    /// Each bucket with all below it.
    Cumulative,
    /// Each bucket alone.
    Disjoint,
    /// Every bin and the percentiles.
    Detailed,
}

/// Adds up stats of one name and kind. `stats` must be sorted by name.
pub fn fold(stats: Vec<Stat>) -> Vec<Stat> {
    let mut folded: Vec<Stat> = Vec::with_capacity(stats.len());
    for stat in stats {
        let merged = folded.last_mut().is_some_and(|last| last.name == stat.name && merge(last, &stat));
        if !merged {
            folded.push(stat);
        }
    }
    folded
}

fn merge(sum: &mut Stat, more: &Stat) -> bool {
    match (&mut sum.value, &more.value) {
        (Value::Counter(sum), Value::Counter(more)) => *sum = sum.wrapping_add(*more),
        // Times are not added: what ends first counts.
        (Value::Gauge(first), Value::Gauge(more)) if sum.name.ends_with("_unix_time_seconds") => *first = (*first).min(*more),
        (Value::Gauge(sum), Value::Gauge(more)) => *sum = sum.wrapping_add(*more),
        (Value::Histogram(sum), Value::Histogram(more)) => sum.merge(more),
        _ => return false,
    }
    sum.used |= more.used;
    true
}

/// Text readouts first, then counters and gauges, then histograms, each a line (or four).
pub fn text(stats: &[Stat], buckets: Buckets) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    for (name, text) in stats.iter().filter_map(readout) {
        let _ = writeln!(out, "{name}: \"{text}\"");
    }
    for (name, number) in stats.iter().filter_map(number) {
        let _ = writeln!(out, "{name}: {number}");
    }
    for (name, histogram) in stats.iter().filter_map(histogram) {
        out.push_str(name);
        out.push(':');
        match buckets {
            _ if histogram.count() == 0 => out.push_str(" No recorded values"),
            Buckets::Summary => summary(&mut out, histogram),
            Buckets::Cumulative | Buckets::Disjoint => bounded(&mut out, histogram, buckets),
            Buckets::Detailed => detailed(&mut out, histogram),
        }
        out.push('\n');
    }
    out
}

fn summary(out: &mut String, histogram: &Histogram) {
    for percent in PERCENTILES {
        let shown = |bins: &Bins| bins.percentile(percent).map_or_else(|| "nan".to_owned(), |value| value.to_string());
        let _ = write!(out, " P{percent}({},{})", shown(histogram.interval()), shown(histogram.total()));
    }
}

fn bounded(out: &mut String, histogram: &Histogram, buckets: Buckets) {
    let (interval, total) = (counts(histogram.interval(), buckets), exact(histogram, buckets));
    for ((bound, interval), total) in BOUNDS_MS.iter().zip(interval).zip(total) {
        let _ = write!(out, " B{}({interval},{total})", general(*bound));
    }
}

fn detailed(out: &mut String, histogram: &Histogram) {
    let bins = |bins: &Bins| {
        bins.iter().map(|(bin, count)| format!("{},{}:{count}", bin.lower(), bin.width())).collect::<Vec<_>>().join(", ")
    };
    let _ = write!(out, "\n  totals={}\n  intervals={}\n  summary=", bins(histogram.total()), bins(histogram.interval()));
    let mut text = String::new();
    summary(&mut text, histogram);
    out.push_str(text.trim_start());
}

/// The sums' buckets, which are kept exactly.
fn exact(histogram: &Histogram, buckets: Buckets) -> Vec<u64> {
    running(histogram.buckets().iter().copied(), buckets)
}

/// An interval's buckets, from its bins.
fn counts(bins: &Bins, buckets: Buckets) -> Vec<u64> {
    let mut counted = [0; BOUNDS_MS.len()];
    for (bin, count) in bins.iter() {
        if let Some(bucket) = BOUNDS_MS.iter().position(|bound| bin.lower() <= *bound) {
            counted[bucket] += count;
        }
    }
    running(counted.into_iter(), buckets)
}

fn running(counts: impl Iterator<Item = u64>, buckets: Buckets) -> Vec<u64> {
    let mut below = 0;
    counts
        .map(|count| {
            below += count;
            if buckets == Buckets::Disjoint { count } else { below }
        })
        .collect()
}

/// C's `%g`, for the bounds: six digits, an exponent from a million on.
fn general(bound: f64) -> String {
    if bound < 1e6 {
        return bound.to_string();
    }
    let exponent = bound.log10().floor();
    format!("{}e+{exponent:02}", bound / 10_f64.powf(exponent))
}

/// The same as one JSON object, on one line.
pub fn json(stats: &[Stat], buckets: Buckets) -> String {
    let readouts = stats.iter().filter_map(readout).map(|(name, text)| json!({"name": name, "value": text}));
    let numbers = stats.iter().filter_map(number).map(|(name, number)| json!({"name": name, "value": number}));
    let mut all: Vec<Json> = readouts.chain(numbers).collect();
    // Envoy leaves out histograms without samples, and the whole block when none is left.
    let histograms: Vec<_> = stats.iter().filter_map(histogram).filter(|(_, histogram)| histogram.count() > 0).collect();
    if !histograms.is_empty() {
        all.push(json!({ "histograms": block(&histograms, buckets) }));
    }
    json!({ "stats": all }).to_string()
}

fn block(histograms: &[(&str, &Histogram)], buckets: Buckets) -> Json {
    let percentiles = |histogram: &Histogram| -> Vec<Json> {
        let at = |percent: &f64| json!({"cumulative": histogram.total().percentile(*percent), "interval": histogram.interval().percentile(*percent)});
        PERCENTILES.iter().map(at).collect()
    };
    match buckets {
        Buckets::Summary => {
            let values = |(name, histogram): &(&str, &Histogram)| json!({"name": name, "values": percentiles(histogram)});
            let computed: Vec<Json> = histograms.iter().map(values).collect();
            json!({"supported_quantiles": PERCENTILES, "computed_quantiles": computed})
        }
        Buckets::Cumulative | Buckets::Disjoint => histograms
            .iter()
            .map(|(name, histogram)| {
                let counted = counts(histogram.interval(), buckets).into_iter().zip(exact(histogram, buckets));
                let bucket = |(bound, (interval, cumulative)): (&f64, (u64, u64))| {
                    json!({"upper_bound": bound, "interval": interval, "cumulative": cumulative})
                };
                json!({"name": name, "buckets": BOUNDS_MS.iter().zip(counted).map(bucket).collect::<Vec<_>>()})
            })
            .collect(),
        Buckets::Detailed => {
            let bins = |bins: &Bins| -> Vec<Json> {
                let bin = |(bin, count): (super::histogram::Bin, u64)| {
                    json!({"lower_bound": bin.lower(), "width": bin.width(), "count": count})
                };
                bins.iter().map(bin).collect()
            };
            let detail = |(name, histogram): &(&str, &Histogram)| {
                json!({"name": name, "totals": bins(histogram.total()), "intervals": bins(histogram.interval()),
                    "percentiles": percentiles(histogram)})
            };
            let details: Vec<Json> = histograms.iter().map(detail).collect();
            json!({"supported_percentiles": PERCENTILES, "details": details})
        }
    }
}

fn readout(stat: &Stat) -> Option<(&str, &str)> {
    match &stat.value {
        Value::Text(text) => Some((&stat.name, text)),
        _ => None,
    }
}

fn number(stat: &Stat) -> Option<(&str, u64)> {
    match stat.value {
        Value::Counter(number) | Value::Gauge(number) => Some((&stat.name, number)),
        _ => None,
    }
}

fn histogram(stat: &Stat) -> Option<(&str, &Histogram)> {
    match &stat.value {
        Value::Histogram(histogram) => Some((&stat.name, histogram)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(name: &str, owner: usize, value: Value) -> Stat {
        Stat { name: name.to_owned(), owner, value, used: true }
    }

    fn recorded(samples: &[u64]) -> Value {
        let mut histogram = Histogram::default();
        samples.iter().for_each(|millis| histogram.record(*millis));
        Value::Histogram(Box::new(histogram))
    }

    /// Lines that Envoy 1.40 printed for the same samples.
    #[test]
    fn histograms_are_printed_as_envoy_prints_them() {
        let stats = [stat("a.b_ms", 0, recorded(&[3, 3])), stat("c", 0, Value::Histogram(Box::default()))];
        let shown = text(&stats, Buckets::Summary);
        let percentiles = "P0(nan,3.033333333333333) P25(nan,3.033333333333333) P50(nan,3.033333333333333) P75(nan,3.06";
        assert!(shown.starts_with(&format!("a.b_ms: {percentiles}")), "{shown}");
        assert!(shown.contains(" P99.5(nan,3.06") && shown.ends_with("\nc: No recorded values\n"), "{shown}");
        let shown = text(&stats[..1], Buckets::Cumulative);
        assert!(shown.starts_with("a.b_ms: B0.5(0,0) B1(0,0) B5(0,2) B10(0,2) "), "{shown}");
        assert!(shown.ends_with(" B300000(0,2) B600000(0,2) B1.8e+06(0,2) B3.6e+06(0,2)\n"), "{shown}");
        assert!(text(&stats[..1], Buckets::Disjoint).contains(" B5(0,2) B10(0,0) "));
        let shown = text(&stats[..1], Buckets::Detailed);
        assert!(shown.starts_with("a.b_ms:\n  totals=3,0.1:2\n  intervals=\n  summary=P0(nan,3.0"), "{shown}");
    }

    #[test]
    fn json_has_the_shapes_of_envoy() {
        let stats = [stat("a", 0, Value::Text("x".into())), stat("b", 0, Value::Gauge(4)), stat("c", 0, recorded(&[4]))];
        let parsed: Json = serde_json::from_str(&json(&stats, Buckets::Summary)).expect("JSON");
        assert_eq!(parsed["stats"][1], json!({"name": "b", "value": 4}));
        let quantile = &parsed["stats"][2]["histograms"]["computed_quantiles"][0];
        assert_eq!((&quantile["name"], &quantile["values"][2]), (&json!("c"), &json!({"cumulative": 4.05, "interval": null})));
        let parsed: Json = serde_json::from_str(&json(&stats, Buckets::Cumulative)).expect("JSON");
        assert_eq!(
            parsed["stats"][2]["histograms"][0]["buckets"][2],
            json!({"upper_bound": 5.0, "interval": 0, "cumulative": 1})
        );
        assert_eq!(json(&[], Buckets::Summary), r#"{"stats":[]}"#);
    }

    #[test]
    fn what_services_share_by_name_is_one_line() {
        let stats = vec![
            stat("local_app.x", 0, Value::Counter(2)),
            stat("local_app.x", 1, Value::Counter(3)),
            stat("y_ms", 0, recorded(&[1])),
            stat("y_ms", 1, recorded(&[2])),
        ];
        let folded = fold(stats);
        assert_eq!(folded.len(), 2);
        assert_eq!(folded[0].value, Value::Counter(5));
        assert_eq!(folded[1].value, recorded(&[1, 2]));
    }
}
