//! The parameters of the stats pages.
//!
//! Invariant: a value that Envoy refuses is refused with Envoy's text; a parameter that is not known is ignored.

use regex::{Regex, RegexBuilder};

use crate::admin::routes::{Parameters, parameter};
use crate::telemetry::stats::text::Buckets;
use crate::telemetry::stats::{Stat, Value, Which};

/// Bytes that a filter's regex may take compiled.
const FILTER_BYTES_MAX: usize = 1 << 20;

/// What is asked for.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) format: Format,
    pub(super) buckets: Buckets,
    pub(super) used_only: bool,
    pub(super) text_readouts: bool,
    filter: Option<Regex>,
    kind: Option<Kind>,
    hidden_only: bool,
}

/// How it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Json,
    Prometheus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counters,
    Gauges,
    Histograms,
    TextReadouts,
}

impl Query {
    /// Reads the parameters; the error is the answer's text.
    pub(super) fn parse(parameters: &Parameters) -> Result<Self, String> {
        let text = |name| parameter(parameters, name);
        let is_there = |name| parameters.iter().any(|(found, _)| found == name);
        let buckets = match text("histogram_buckets") {
            None | Some("none" | "summary" | "prometheusnative") => Buckets::Summary,
            Some("cumulative") => Buckets::Cumulative,
            Some("disjoint") => Buckets::Disjoint,
            Some("detailed") => Buckets::Detailed,
            Some(_) => {
                return Err(
                    "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n".to_owned()
                );
            }
        };
        let format = match text("format") {
            // People's browsers ask for it; the text is as readable.
            None | Some("text" | "html" | "active-html") => Format::Text,
            Some("json") => Format::Json,
            Some("prometheus") => Format::Prometheus,
            Some(_) => return Err("usage: /stats?format=(html|active-html|json|prometheus|text)\n\n".to_owned()),
        };
        let kind = match text("type") {
            None | Some("All") => None,
            Some("Counters") => Some(Kind::Counters),
            Some("Gauges") => Some(Kind::Gauges),
            Some("Histograms") => Some(Kind::Histograms),
            Some("TextReadouts") => Some(Kind::TextReadouts),
            Some(_) => return Err("invalid &type= param".to_owned()),
        };
        let hidden_only = match text("hidden") {
            None | Some("include" | "exclude") => false,
            Some("only") => true,
            Some(_) => return Err("usage: /stats?hidden=(include|only|exclude)\n\n".to_owned()),
        };
        let filter = text("filter").map(filter).transpose()?;
        let (used_only, text_readouts) = (is_there("usedonly"), is_there("text_readouts"));
        Ok(Self { format, buckets, used_only, text_readouts, filter, kind, hidden_only })
    }

    pub(super) fn which(&self) -> Which {
        if self.used_only { Which::Used } else { Which::All }
    }

    pub(super) fn wants(&self, stat: &Stat) -> bool {
        // No stat here is hidden.
        !self.hidden_only
            && (stat.used || !self.used_only)
            && self.kind.is_none_or(|kind| kind == Kind::of(&stat.value))
            && self.filter.as_ref().is_none_or(|filter| filter.is_match(&stat.name))
    }

    /// Something particular is asked for, not the whole page.
    pub(super) fn is_narrowed(&self) -> bool {
        self.filter.is_some() || self.kind.is_some() || self.hidden_only
    }
}

fn filter(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text).size_limit(FILTER_BYTES_MAX).build().map_err(|error| {
        // The reason is its last line; those before draw where it is.
        let error = error.to_string();
        let why = error.lines().last().unwrap_or_default();
        format!("Invalid re2 regex: {}: {text}", why.strip_prefix("error: ").unwrap_or(why))
    })
}

impl Kind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Counter(_) => Self::Counters,
            Value::Gauge(_) => Self::Gauges,
            Value::Histogram(_) => Self::Histograms,
            Value::Text(_) => Self::TextReadouts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Query, String> {
        Query::parse(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    fn stat(name: &str, value: Value, used: bool) -> Stat {
        Stat { name: name.to_owned(), owner: 0, value, used }
    }

    /// The texts of Envoy 1.40.
    #[test]
    fn what_envoy_refuses_is_refused_with_its_text() {
        let refused = |name, value| parse(&[(name, value)]).expect_err("refused");
        assert_eq!(refused("format", "bogus"), "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n");
        assert_eq!(refused("type", "counters"), "invalid &type= param");
        assert!(refused("histogram_buckets", "x").starts_with("usage: /stats?histogram_buckets=(cumulative|disjoint|"));
        assert!(refused("hidden", "x").starts_with("usage: /stats?hidden=(include|only|exclude)"));
        let regex = refused("filter", "(");
        assert!(regex.starts_with("Invalid re2 regex: ") && regex.ends_with(": (") && !regex.contains('\n'), "{regex}");
        assert!(refused("filter", "(a{1000}){1000}").starts_with("Invalid re2 regex: "), "a bomb is refused as well");
    }

    #[test]
    fn parameters_choose_by_kind_name_and_use() {
        let (counter, unused) = (stat("server.a", Value::Counter(1), true), stat("server.b", Value::Gauge(0), false));
        let query = parse(&[("type", "Counters"), ("filter", "^server")]).expect("understood");
        assert!(query.wants(&counter) && !query.wants(&unused) && query.is_narrowed());
        let query = parse(&[("usedonly", "")]).expect("understood");
        assert!(query.wants(&counter) && !query.wants(&unused) && !query.is_narrowed());
        assert!(!parse(&[("filter", "^erver")]).expect("understood").wants(&counter));
        assert!(parse(&[("unknown", "x")]).expect("ignored").wants(&unused));
    }
}
