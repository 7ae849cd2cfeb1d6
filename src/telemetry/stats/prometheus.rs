//! Stats in Prometheus' text format, by Envoy's rules: `envoy_` and the name without its tags, one `# TYPE` line a family,
//! counters before gauges before histograms, and no `_total` that the name does not have.
//!
//! Invariant: the page is made in pieces of about [`PIECE_BYTES`], as they are asked for: five hundred upstreams come to
//! seventy megabytes with Consul's tags, which at no time exist as a whole.

use std::fmt::Write;
use std::sync::Arc;

use super::histogram::BOUNDS_MS;
use super::{Histogram, Stat, Tagger, Value, give_way};

/// A piece is handed out when it has reached this size.
const PIECE_BYTES: usize = 32 << 10;
/// Names tagged in a row before others get their turn.
const NAMES_IN_A_ROW_MAX: usize = 256;

/// A page that is still to be written.
#[derive(Debug)]
pub struct Page {
    series: std::vec::IntoIter<Series>,
    /// The family that was begun.
    family: Option<(Kind, Arc<str>)>,
}

#[derive(Debug)]
struct Series {
    kind: Kind,
    family: Arc<str>,
    labels: Arc<str>,
    value: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Counter,
    Gauge,
    Text,
    Histogram,
}

impl Page {
    /// The page of `stats`, which are tagged now. Gives way from time to time.
    pub async fn new(stats: Vec<Stat>, tagger: &mut Tagger) -> Self {
        let mut series = Vec::with_capacity(stats.len());
        for (index, stat) in stats.into_iter().enumerate() {
            let tagged = tagger.tag(&stat.name, stat.owner);
            series.push(Series { kind: Kind::of(&stat.value), family: tagged.name, labels: tagged.labels, value: stat.value });
            if index % NAMES_IN_A_ROW_MAX == NAMES_IN_A_ROW_MAX - 1 {
                give_way().await;
            }
        }
        // Stable: in a family the order of names stays.
        series.sort_by(|a, b| (a.kind, &a.family).cmp(&(b.kind, &b.family)));
        Self { series: series.into_iter(), family: None }
    }

    fn write(&mut self, out: &mut String, series: &Series) {
        let Series { kind, family, labels, value } = series;
        if self.family.as_ref().is_none_or(|(begun, name)| begun != kind || name != family) {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "# TYPE {family} {}", kind.as_str());
            self.family = Some((*kind, Arc::clone(family)));
        }
        let _ = match value {
            Value::Counter(number) | Value::Gauge(number) => writeln!(out, "{family}{{{labels}}} {number}"),
            Value::Text(text) => {
                let text = text.replace('\\', r"\\").replace('\n', r"\n").replace('"', "\\\"");
                writeln!(out, "{family}{{{}text_value=\"{text}\"}} 0", before(labels))
            }
            Value::Histogram(histogram) => write_histogram(out, family, labels, histogram),
        };
    }
}

impl Iterator for Page {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let mut piece = String::new();
        while piece.len() < PIECE_BYTES {
            let Some(series) = self.series.next() else { break };
            self.write(&mut piece, &series);
        }
        (!piece.is_empty()).then_some(piece)
    }
}

fn write_histogram(out: &mut String, family: &str, labels: &str, histogram: &Histogram) -> std::fmt::Result {
    let mut below = 0;
    for (bound, count) in BOUNDS_MS.iter().zip(histogram.buckets()) {
        below += count;
        writeln!(out, "{family}_bucket{{{}le=\"{bound}\"}} {below}", before(labels))?;
    }
    writeln!(out, "{family}_bucket{{{}le=\"+Inf\"}} {}", before(labels), histogram.count())?;
    writeln!(out, "{family}_sum{{{labels}}} {}", histogram.sum_ms())?;
    writeln!(out, "{family}_count{{{labels}}} {}", histogram.count())
}

/// Labels in front of another one.
fn before(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{labels},") }
}

impl Kind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Counter(_) => Self::Counter,
            Value::Gauge(_) => Self::Gauge,
            Value::Text(_) => Self::Text,
            Value::Histogram(_) => Self::Histogram,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            // A text's number is always 0.
            Self::Gauge | Self::Text => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::stats::tags::Dialect;

    async fn page(stats: Vec<Stat>) -> Vec<String> {
        let mut tagger = Tagger::new(Dialect::Prometheus, &[], true).expect("Envoy's own tags");
        Page::new(stats, &mut tagger).await.collect()
    }

    fn stat(name: &str, value: Value) -> Stat {
        Stat { name: name.to_owned(), owner: 0, value, used: true }
    }

    #[tokio::test]
    async fn families_are_together_and_histograms_have_all_their_lines() {
        let mut histogram = Histogram::default();
        [4, 7_000_000].into_iter().for_each(|millis| histogram.record(millis));
        let stats = vec![
            stat("cluster.a.up", Value::Counter(1)),
            stat("cluster.a.x", Value::Gauge(7)),
            stat("cluster.b.up", Value::Counter(2)),
            stat("cluster.b.ms", Value::Histogram(Box::new(histogram))),
            stat("control_plane.identifier", Value::Text("a\"b".into())),
        ];
        let text = page(stats).await.concat();
        let lines: Vec<&str> = text.lines().collect();
        let numbers = [
            "# TYPE envoy_cluster_up counter",
            r#"envoy_cluster_up{envoy_cluster_name="a"} 1"#,
            r#"envoy_cluster_up{envoy_cluster_name="b"} 2"#,
            "# TYPE envoy_cluster_x gauge",
            r#"envoy_cluster_x{envoy_cluster_name="a"} 7"#,
            "# TYPE envoy_control_plane_identifier gauge",
            r#"envoy_control_plane_identifier{text_value="a\"b"} 0"#,
            "# TYPE envoy_cluster_ms histogram",
        ];
        assert_eq!(lines[..8], numbers);
        assert_eq!(lines[8], r#"envoy_cluster_ms_bucket{envoy_cluster_name="b",le="0.5"} 0"#);
        assert_eq!(lines[10], r#"envoy_cluster_ms_bucket{envoy_cluster_name="b",le="5"} 1"#);
        let end = [
            r#"envoy_cluster_ms_bucket{envoy_cluster_name="b",le="3600000"} 1"#,
            r#"envoy_cluster_ms_bucket{envoy_cluster_name="b",le="+Inf"} 2"#,
            r#"envoy_cluster_ms_sum{envoy_cluster_name="b"} 7000004"#,
            r#"envoy_cluster_ms_count{envoy_cluster_name="b"} 2"#,
        ];
        assert_eq!(lines[26..], end);
    }

    #[tokio::test]
    async fn pieces_are_small_whatever_the_page() {
        let stats = (0..20_000).map(|index| stat(&format!("cluster.c{index}.up"), Value::Counter(index))).collect();
        let pieces = page(stats).await;
        assert!(pieces.len() > 20, "{} pieces", pieces.len());
        assert!(pieces.iter().all(|piece| piece.len() < PIECE_BYTES + 4_096));
        assert_eq!(pieces.concat().lines().count(), 20_001);
    }
}
