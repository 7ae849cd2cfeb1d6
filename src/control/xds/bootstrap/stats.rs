//! Tags and sinks of a bootstrap.

use std::net::SocketAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value as Json;

use super::{BootstrapError, cluster_named, duration, list, part, shape};
use crate::config::envoy::{STATS_FLUSH_INTERVAL, StatAddress, StatDialect, StatSink, StatTag, StatTagValue, Stats};

/// What Envoy puts before each name that it sends to a sink.
const PREFIX: &str = "envoy";

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    stats_tags: Vec<Tag>,
    use_all_default_tags: Option<bool>,
    stats_matcher: Option<IgnoredAny>,
    histogram_bucket_settings: Option<IgnoredAny>,
    #[serde(rename = "allow_default_tag_overrides")]
    _allow_default_tag_overrides: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Tag {
    tag_name: String,
    regex: Option<String>,
    fixed_value: Option<String>,
}

/// `StatsdSink` and `DogStatsdSink`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Sink {
    #[serde(rename = "@type")]
    _type: IgnoredAny,
    address: Option<shape::Address>,
    tcp_cluster_name: Option<String>,
    prefix: String,
    /// A datagram holds one line here.
    #[serde(rename = "max_bytes_per_datagram")]
    _max_bytes_per_datagram: IgnoredAny,
}

pub(super) fn read(json: &Json, clusters: &[shape::Cluster], ignored: &mut Vec<String>) -> Result<Stats, BootstrapError> {
    let config: Config = part(&json["stats_config"], "stats_config")?;
    for (name, given) in [
        ("stats_matcher", config.stats_matcher.is_some()),
        ("histogram_bucket_settings", config.histogram_bucket_settings.is_some()),
    ] {
        if given {
            ignored.push(format!("stats_config.{name}"));
        }
    }
    let tags = config.stats_tags.into_iter().enumerate().map(|(index, tag)| {
        let value = match (tag.regex, tag.fixed_value) {
            (None, Some(fixed)) => StatTagValue::Fixed(fixed),
            (Some(regex), None) => {
                let place = format!("stats_config.stats_tags[{index}].regex");
                regex::Regex::new(&regex).map_err(|error| BootstrapError::at(&place, error.to_string()))?;
                StatTagValue::Regex(regex)
            }
            // Envoy then looks for one of its own tags of this name, which are on anyway.
            _ => return Ok(None),
        };
        Ok(Some(StatTag { name: tag.tag_name, value }))
    });
    let tags = tags.collect::<Result<Vec<_>, BootstrapError>>()?.into_iter().flatten().collect();
    let mut sinks = Vec::new();
    for (index, sink) in list(&json["stats_sinks"]).iter().enumerate() {
        sinks.extend(read_sink(sink, &format!("stats_sinks[{index}]"), clusters, ignored)?);
    }
    let flush = json["stats_flush_interval"].as_str().map(|text| duration(text, "stats_flush_interval")).transpose()?;
    Ok(Stats {
        tags,
        default_tags: config.use_all_default_tags.unwrap_or(true),
        sinks,
        flush_interval: flush.unwrap_or(STATS_FLUSH_INTERVAL),
        ..Stats::default()
    })
}

/// The clusters that sinks of a bootstrap use: none of them is for traffic.
pub(super) fn clusters_of(bootstrap: &Json) -> Vec<String> {
    list(&bootstrap["stats_sinks"])
        .iter()
        .filter_map(|sink| {
            let config = &sink["typed_config"];
            config["tcp_cluster_name"].as_str().or_else(|| config.pointer("/grpc_service/envoy_grpc/cluster_name")?.as_str())
        })
        .map(str::to_owned)
        .collect()
}

fn read_sink(
    sink: &Json,
    place: &str,
    clusters: &[shape::Cluster],
    ignored: &mut Vec<String>,
) -> Result<Option<StatSink>, BootstrapError> {
    let config = &sink["typed_config"];
    let place = format!("{place}.typed_config");
    let dialect = if shape::is_type(config, "StatsdSink") {
        StatDialect::Statsd
    } else if shape::is_type(config, "DogStatsdSink") {
        StatDialect::DogStatsd
    } else if shape::is_type(config, "MetricsServiceConfig") || shape::is_type(config, "SinkConfig") {
        // Consul's telemetry collector: a service of its own that other sinks and Prometheus do without.
        ignored.push(place);
        return Ok(None);
    } else {
        let name = config["@type"].as_str().unwrap_or("without a type");
        return Err(BootstrapError::at(&place, format!("the sink {name} is not known: statsd and dog_statsd are")));
    };
    let sink: Sink = part(config, &place)?;
    let address = match (&sink.address, &sink.tcp_cluster_name) {
        (Some(shape::Address { pipe: Some(pipe), .. }), None) => StatAddress::Unix(pipe.path.clone()),
        (Some(address), None) => StatAddress::Udp(address.socket(&format!("{place}.address"))?),
        (None, Some(name)) => StatAddress::Tcp(address_of(clusters, name, &format!("{place}.tcp_cluster_name"))?),
        _ => return Err(BootstrapError::at(&place, "address or tcp_cluster_name is wanted")),
    };
    let prefix = if sink.prefix.is_empty() { PREFIX.to_owned() } else { sink.prefix };
    Ok(Some(StatSink { dialect, address, prefix }))
}

fn address_of(clusters: &[shape::Cluster], name: &str, place: &str) -> Result<SocketAddr, BootstrapError> {
    let (_, cluster) = cluster_named(clusters, name, place)?;
    let address = cluster.addresses().next().ok_or_else(|| BootstrapError::at(place, "the cluster has no endpoint"))?;
    address.socket(place)
}
