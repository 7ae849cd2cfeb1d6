//! What a proxy's configuration says of stats: tags, statsd and DogStatsD sinks, and how often they are written to.
//!
//! Invariant: a wish that cannot be understood has no effect and is named once; it never refuses the proxy. Addresses may name
//! variables of the environment, as Consul's bootstrap allows: `$HOST_IP:8125`, `${HOST_IP}:8125` or the whole URL in one.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use super::lenient;
use crate::config::envoy::{StatAddress, StatDialect, StatSink, StatTag, StatTagValue};
use crate::control::StatsWishes;
use crate::control::opaque::Opaque;

/// Tags of one proxy that are believed.
const TAGS_MAX: usize = 64;
/// Envoy's prefix of what it sends to sinks.
const PREFIX: &str = "envoy";

/// Reads the wishes; `environment` looks variables up.
pub(super) fn wishes(
    config: &Opaque<'_>,
    environment: &dyn Fn(&str) -> Option<String>,
    warnings: &mut Vec<String>,
) -> StatsWishes {
    let mut sinks = Vec::new();
    for (key, dialect) in [("envoy_statsd_url", StatDialect::Statsd), ("envoy_dogstatsd_url", StatDialect::DogStatsd)] {
        let Some(url) = lenient(config.text(key), warnings).filter(|url| !url.is_empty()) else { continue };
        match address(&url, environment) {
            Ok(address) => sinks.push(StatSink { dialect, address, prefix: PREFIX.to_owned() }),
            Err(why) => warnings.push(format!("proxy.config.{key} `{}` has no effect: {why}", url.escape_default())),
        }
    }
    let flush_interval = lenient(config.duration("envoy_stats_flush_interval"), warnings).filter(|every| !every.is_zero());
    StatsWishes { tags: tags(config, warnings), sinks, flush_interval }
}

fn tags(config: &Opaque<'_>, warnings: &mut Vec<String>) -> Vec<StatTag> {
    let Some(list) = config.get("envoy_stats_tags") else { return Vec::new() };
    let mut tags = Vec::new();
    for item in list.as_array().map(Vec::as_slice).unwrap_or_default().iter().take(TAGS_MAX) {
        match item.as_str().and_then(|text| text.split_once('=')) {
            Some((name, value)) if !name.is_empty() => {
                tags.push(StatTag { name: name.to_owned(), value: StatTagValue::Fixed(value.to_owned()) });
            }
            _ => warnings.push(format!("proxy.config.envoy_stats_tags: {item} is not NAME=VALUE and has no effect")),
        }
    }
    if !list.is_array() {
        warnings.push("proxy.config.envoy_stats_tags is no list of NAME=VALUE and has no effect".to_owned());
    }
    tags
}

/// `udp://HOST:PORT` or `unix:///PATH`, with variables.
fn address(url: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<StatAddress, String> {
    let url = expand(url, environment)?;
    if let Some(path) = url.strip_prefix("unix://") {
        return match path {
            "" => Err("it names no path; write unix:///PATH".to_owned()),
            path => Ok(StatAddress::Unix(PathBuf::from(path))),
        };
    }
    let Some(place) = url.strip_prefix("udp://") else {
        return Err("it begins neither with udp:// nor with unix://".to_owned());
    };
    let (host, port) = place.rsplit_once(':').ok_or("it has no port; write udp://HOST:PORT")?;
    let port = port.parse::<u16>().map_err(|_| format!("`{}` is no port", port.escape_default()))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ip = match host {
        "localhost" | "" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        // Consul wants an address as well: Envoy resolves no name here.
        host => host.parse().map_err(|_| format!("`{}` is no IP address", host.escape_default()))?,
    };
    Ok(StatAddress::Udp(SocketAddr::new(ip, port)))
}

/// Replaces `$NAME` and `${NAME}`.
fn expand(url: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let (mut out, mut rest) = (String::new(), url);
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, left) = match after.strip_prefix('{').and_then(|after| after.split_once('}')) {
            Some((name, left)) => (name, left),
            None => after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        let value =
            environment(name).ok_or_else(|| format!("the variable {} is not set for this process", name.escape_default()))?;
        // A bare variable may hold HOST:PORT without a scheme, as Consul's documentation has it.
        if out.is_empty() && !value.contains("://") {
            out.push_str("udp://");
        }
        out.push_str(&value);
        rest = left;
    }
    out.push_str(rest);
    Ok(out)
}

impl StatsWishes {
    /// Adds another proxy's wishes; what is there stays.
    pub(crate) fn add(&mut self, other: &Self) {
        for tag in &other.tags {
            if self.tags.iter().all(|known| known.name != tag.name) {
                self.tags.push(tag.clone());
            }
        }
        for sink in &other.sinks {
            if !self.sinks.contains(sink) {
                self.sinks.push(sink.clone());
            }
        }
        self.flush_interval = self.flush_interval.or(other.flush_interval);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn read(config: serde_json::Value) -> (StatsWishes, Vec<String>) {
        let map = config.as_object().cloned().expect("an object");
        let mut warnings = Vec::new();
        let environment = |name: &str| match name {
            "HOST_IP" => Some("10.0.0.9".to_owned()),
            "STATSD" => Some("10.0.0.8:9125".to_owned()),
            "URL" => Some("udp://10.0.0.7:1".to_owned()),
            _ => None,
        };
        let wishes = wishes(&Opaque::new(&map), &environment, &mut warnings);
        (wishes, warnings)
    }

    fn sink(url: &str) -> StatAddress {
        let (wishes, warnings) = read(json!({ "envoy_statsd_url": url }));
        assert!(warnings.is_empty(), "{warnings:?}");
        wishes.sinks[0].address.clone()
    }

    #[test]
    fn addresses_are_read_in_each_of_consuls_forms() {
        let udp = |text: &str| StatAddress::Udp(text.parse().expect("address"));
        assert_eq!(sink("udp://127.0.0.1:8125"), udp("127.0.0.1:8125"));
        assert_eq!(sink("udp://[::1]:8125"), udp("[::1]:8125"));
        assert_eq!(sink("udp://$HOST_IP:8125"), udp("10.0.0.9:8125"));
        assert_eq!(sink("$HOST_IP:8125"), udp("10.0.0.9:8125"));
        assert_eq!(sink("${HOST_IP}:8125"), udp("10.0.0.9:8125"));
        assert_eq!(sink("$STATSD"), udp("10.0.0.8:9125"));
        assert_eq!(sink("$URL"), udp("10.0.0.7:1"));
        assert_eq!(sink("unix:///run/statsd.sock"), StatAddress::Unix("/run/statsd.sock".into()));
    }

    #[test]
    fn what_cannot_be_understood_is_named_and_has_no_effect() {
        for (url, named) in [("$NOTHING", "NOTHING"), ("tcp://1.2.3.4:1", "udp://"), ("udp://a.example:1", "a.example")] {
            let (wishes, warnings) = read(json!({ "envoy_dogstatsd_url": url }));
            assert!(wishes.sinks.is_empty());
            assert!(warnings.len() == 1 && warnings[0].contains(named), "{warnings:?}");
        }
        let (wishes, warnings) = read(json!({ "envoy_stats_tags": ["a=b=c", "d"] }));
        assert_eq!(wishes.tags, [StatTag { name: "a".into(), value: StatTagValue::Fixed("b=c".into()) }]);
        assert!(warnings[0].contains("\"d\""), "{warnings:?}");
    }

    #[test]
    fn the_first_proxy_that_wishes_has_its_way() {
        let (mut first, _) = read(json!({ "envoy_stats_tags": ["a=1"], "envoy_stats_flush_interval": "2s" }));
        let (second, _) = read(json!({ "envoy_stats_tags": ["a=2", "b=2"], "envoy_stats_flush_interval": "9s" }));
        first.add(&second);
        assert_eq!(first.flush_interval, Some(Duration::from_secs(2)));
        let names: Vec<_> = first.tags.iter().map(|tag| (tag.name.as_str(), &tag.value)).collect();
        assert_eq!(names, [("a", &StatTagValue::Fixed("1".into())), ("b", &StatTagValue::Fixed("2".into()))]);
    }
}
