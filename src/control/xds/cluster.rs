//! `Cluster`: how members are found, chosen and dialed.
//!
//! Invariant: what is parsed can be served at L4, or says by its [`Discovery`] that only a gateway could. Pure.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::extensions::clusters::aggregate::v3::ClusterConfig as Aggregate;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options};
use envoy_types::pb::google::protobuf as well_known;

use super::endpoint::Assignment;
use super::refusal::{Refusal, message_name, unpack};
use super::tls_context;
use crate::config::{self, Keepalive};
use crate::mesh::{Balance, Outlier};

const AGGREGATE: &str = "envoy.extensions.clusters.aggregate.v3.ClusterConfig";
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Envoy's `dns_refresh_rate`.
const DNS_REFRESH: Duration = Duration::from_secs(5);
/// Nobody is asked more often.
const DNS_REFRESH_MIN: Duration = Duration::from_millis(500);
/// Envoy's `choice_count`.
const CHOICES: u32 = 2;
/// Linux's `MAX_TCP_KEEPIDLE` and `MAX_TCP_KEEPINTVL`.
const KEEPALIVE_SECONDS_MAX: u32 = 32_767;
/// Linux's `MAX_TCP_KEEPCNT`.
const KEEPALIVE_PROBES_MAX: u32 = 127;
/// Members of an aggregate.
const AGGREGATED_MAX: usize = 64;

/// A cluster as it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cluster {
    pub(super) name: String,
    pub(super) discovery: Discovery,
    pub(super) connect_timeout: Duration,
    pub(super) balance: Balance,
    /// As [`crate::mesh::Upstream::max_connections`].
    pub(super) max_connections: Option<u32>,
    pub(super) outlier: Outlier,
    pub(super) spoken: tls_context::Spoken,
    /// As [`crate::mesh::Upstream::panic_percent`].
    pub(super) panic_percent: u32,
    /// As [`crate::mesh::Upstream::keepalive`].
    pub(super) keepalive: Option<Keepalive>,
    /// Requests are sent to it over HTTP/2, where it is sent single ones ([`crate::config::envoy::PageAnswer::Backend`]).
    pub(super) http2: bool,
}

/// How members are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Discovery {
    /// By EDS, under this name.
    Eds(String),
    /// Told in the cluster itself.
    Static(Assignment),
    /// Host names, resolved this often.
    Dns(Assignment, Duration),
    /// Other clusters, in the order of preference.
    Aggregate(Vec<String>),
    /// Wherever the client wanted to go.
    OriginalDestination,
}

impl Cluster {
    pub(super) fn parse(message: &pb::Cluster) -> Result<Self, Refusal> {
        if !message.transport_socket_matches.is_empty() {
            let wanted = "one transport_socket for all members is used: expected none of these";
            return Err(Refusal::new("transport_socket_matches", message.transport_socket_matches.len(), wanted));
        }
        let unknown = [
            ("lb_subset_config", message.lb_subset_config.is_some(), "every healthy member is used: expected none"),
            (
                "upstream_bind_config",
                message.upstream_bind_config.is_some(),
                "the host chooses the source address: expected none",
            ),
        ];
        if let Some((field, _, wanted)) = unknown.into_iter().find(|(_, present, _)| *present) {
            return Err(Refusal::new(field, "present", wanted));
        }
        if let Some(filter) = message.filters.first() {
            return Err(Refusal::new("filters[0].name", &filter.name, "no filters run on upstream connections: expected none"));
        }
        Ok(Self {
            name: message.name.clone(),
            discovery: discovery(message)?,
            connect_timeout: duration(message.connect_timeout.as_ref(), "connect_timeout")?.unwrap_or(config::CONNECT_TIMEOUT),
            balance: balance(message)?,
            max_connections: max_connections(message),
            outlier: outlier(message.outlier_detection.as_ref())?,
            spoken: tls_context::upstream(message.transport_socket.as_ref())?,
            panic_percent: panic_percent(message)?,
            keepalive: keepalive(message),
            http2: http2(message)?,
        })
    }

    /// The members that the cluster itself tells.
    pub(super) fn told(&self) -> Option<&Assignment> {
        match &self.discovery {
            Discovery::Static(members) | Discovery::Dns(members, _) => Some(members),
            Discovery::Eds(_) | Discovery::Aggregate(_) | Discovery::OriginalDestination => None,
        }
    }
}

#[expect(deprecated, reason = "Consul sends dns_refresh_rate in the cluster itself")]
fn discovery(message: &pb::Cluster) -> Result<Discovery, Refusal> {
    use pb::cluster::{ClusterDiscoveryType as Kind, DiscoveryType as Type};
    let members = || {
        let assignment = message.load_assignment.as_ref();
        assignment.map_or_else(|| Ok(Assignment::default()), Assignment::parse).map_err(|why| why.under("load_assignment"))
    };
    let refresh = || {
        let asked = duration(message.dns_refresh_rate.as_ref(), "dns_refresh_rate")?.unwrap_or(DNS_REFRESH);
        Ok(asked.max(DNS_REFRESH_MIN))
    };
    match &message.cluster_discovery_type {
        None => Ok(Discovery::Static(static_members(members()?)?)),
        Some(Kind::Type(number)) => match Type::try_from(*number) {
            Ok(Type::Static) => Ok(Discovery::Static(static_members(members()?)?)),
            Ok(Type::StrictDns | Type::LogicalDns) => Ok(Discovery::Dns(members()?, refresh()?)),
            Ok(Type::Eds) => {
                let service = message.eds_cluster_config.as_ref().map_or("", |eds| eds.service_name.as_str());
                Ok(Discovery::Eds(if service.is_empty() { message.name.clone() } else { service.to_owned() }))
            }
            Ok(Type::OriginalDst) => Ok(Discovery::OriginalDestination),
            Err(_) => Err(Refusal::new("type", number, "expected STATIC, STRICT_DNS, LOGICAL_DNS, EDS or ORIGINAL_DST")),
        },
        Some(Kind::ClusterType(custom)) => match &custom.typed_config {
            Some(any) if message_name(any) == AGGREGATE => {
                let aggregate: Aggregate = unpack(any, AGGREGATE, "cluster_type.typed_config")?;
                if aggregate.clusters.is_empty() || aggregate.clusters.len() > AGGREGATED_MAX {
                    let found = format!("{} clusters", aggregate.clusters.len());
                    let wanted = format!("expected one to {AGGREGATED_MAX}");
                    return Err(Refusal::new("cluster_type.typed_config.clusters", found, wanted));
                }
                Ok(Discovery::Aggregate(aggregate.clusters))
            }
            _ => Err(Refusal::new("cluster_type.name", &custom.name, "of these only envoy.clusters.aggregate is known")),
        },
    }
}

fn static_members(members: Assignment) -> Result<Assignment, Refusal> {
    if let Some(host) = members.places().find_map(|place| place.host.name()) {
        let wanted = "a STATIC cluster has addresses: expected an IP address, or type STRICT_DNS";
        return Err(Refusal::new("load_assignment.endpoints.address", host, wanted));
    }
    Ok(members)
}

fn balance(message: &pb::Cluster) -> Result<Balance, Refusal> {
    use pb::cluster::{LbConfig, LbPolicy};
    let choices = match &message.lb_config {
        Some(LbConfig::LeastRequestLbConfig(config)) => config.choice_count.as_ref().map_or(CHOICES, |count| count.value.max(2)),
        _ => CHOICES,
    };
    match LbPolicy::try_from(message.lb_policy) {
        // What the policies of an aggregate and of original destinations say is decided by their members.
        Ok(LbPolicy::RoundRobin | LbPolicy::ClusterProvided) => Ok(Balance::RoundRobin),
        Ok(LbPolicy::LeastRequest) => Ok(Balance::LeastRequest { choices }),
        Ok(LbPolicy::Random) => Ok(Balance::Random),
        Ok(LbPolicy::RingHash) => Ok(Balance::RingHash),
        Ok(LbPolicy::Maglev) => Ok(Balance::Maglev),
        Ok(LbPolicy::LoadBalancingPolicyConfig) | Err(_) => {
            let wanted = "expected ROUND_ROBIN, LEAST_REQUEST, RANDOM, RING_HASH or MAGLEV";
            Err(Refusal::new("lb_policy", message.lb_policy, wanted))
        }
    }
}

fn max_connections(message: &pb::Cluster) -> Option<u32> {
    let thresholds = message.circuit_breakers.iter().flat_map(|breakers| &breakers.thresholds);
    // 0 is the priority DEFAULT, the only one that TCP uses.
    thresholds.filter(|one| one.priority == 0).find_map(|one| one.max_connections.as_ref()).map(|most| most.value)
}

/// A part of one is dropped, as in Envoy.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 0 to 100")]
fn panic_percent(message: &pb::Cluster) -> Result<u32, Refusal> {
    use pb::cluster::common_lb_config::LocalityConfigSpecifier as Locality;
    let Some(common) = &message.common_lb_config else { return Ok(config::PANIC_PERCENT) };
    if let Some(Locality::ZoneAwareLbConfig(zones)) = &common.locality_config_specifier
        && zones.fail_traffic_on_panic
    {
        let wanted = "in panic every member is used: expected false";
        return Err(Refusal::new("common_lb_config.zone_aware_lb_config.fail_traffic_on_panic", "true", wanted));
    }
    match common.healthy_panic_threshold.as_ref().map(|told| told.value) {
        None => Ok(config::PANIC_PERCENT),
        Some(percent) if (0.0..=100.0).contains(&percent) => Ok(percent as u32),
        Some(other) => {
            Err(Refusal::new("common_lb_config.healthy_panic_threshold", other, "expected a percentage from 0 to 100"))
        }
    }
}

/// Envoy switches it off where one of these is 0, and has what the kernel has where one is missing; beyond what a kernel takes
/// nothing can be meant.
fn keepalive(message: &pb::Cluster) -> Option<Keepalive> {
    let told = message.upstream_connection_options.as_ref()?.tcp_keepalive.as_ref()?;
    let value = |value: &Option<well_known::UInt32Value>, max| value.as_ref().map(|value| value.value.min(max));
    let time = |told: &_| value(told, KEEPALIVE_SECONDS_MAX);
    let (idle, interval, probes) =
        (time(&told.keepalive_time), time(&told.keepalive_interval), value(&told.keepalive_probes, KEEPALIVE_PROBES_MAX));
    if [idle, interval, probes].contains(&Some(0)) {
        return Some(Keepalive::Off);
    }
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    Some(Keepalive::On { idle: idle.map(seconds), interval: interval.map(seconds), probes })
}

/// Told by the cluster's own options, or by the older field.
#[expect(deprecated, reason = "Consul 1.10 sends http2_protocol_options in the cluster itself")]
fn http2(message: &pb::Cluster) -> Result<bool, Refusal> {
    use http_protocol_options::UpstreamProtocolOptions as Options;
    use http_protocol_options::explicit_http_config::ProtocolConfig as Explicit;
    let Some(any) = message.typed_extension_protocol_options.get(HTTP_OPTIONS) else {
        return Ok(message.http2_protocol_options.is_some());
    };
    let options: HttpProtocolOptions = unpack(any, HTTP_OPTIONS, "typed_extension_protocol_options")?;
    Ok(match options.upstream_protocol_options {
        Some(Options::ExplicitHttpConfig(config)) => matches!(config.protocol_config, Some(Explicit::Http2ProtocolOptions(_))),
        Some(Options::UseDownstreamProtocolConfig(_) | Options::AutoConfig(_)) | None => false,
    })
}

fn outlier(message: Option<&pb::OutlierDetection>) -> Result<Outlier, Refusal> {
    let default = Outlier::default();
    // A cluster without it ejects nobody.
    let Some(message) = message else { return Ok(Outlier { enforcing_percent: 0, ..default }) };
    let or = |value: &Option<well_known::UInt32Value>, default| value.as_ref().map_or(default, |value| value.value);
    let time = |value: &Option<well_known::Duration>, field, default| {
        duration(value.as_ref(), &format!("outlier_detection.{field}")).map(|found| found.unwrap_or(default))
    };
    Ok(Outlier {
        max_failures: or(&message.consecutive_5xx, default.max_failures),
        enforcing_percent: or(&message.enforcing_consecutive_5xx, default.enforcing_percent).min(100),
        max_ejection_percent: or(&message.max_ejection_percent, default.max_ejection_percent).min(100),
        base_ejection: time(&message.base_ejection_time, "base_ejection_time", default.base_ejection)?,
        interval: time(&message.interval, "interval", default.interval)?,
    })
}

/// Protobuf's own bound on durations, 10,000 years; instants beyond do not exist.
const DURATION_SECONDS_MAX: u64 = 315_576_000_000;

/// A duration that is not negative.
pub(super) fn duration(value: Option<&well_known::Duration>, field: &str) -> Result<Option<Duration>, Refusal> {
    let Some(value) = value else { return Ok(None) };
    match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 && seconds <= DURATION_SECONDS_MAX => {
            Ok(Some(Duration::new(seconds, nanos)))
        }
        _ => Err(Refusal::new(field, format!("{}s {}ns", value.seconds, value.nanos), "expected a duration of 0 s or more")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::endpoint::tests::assignment;
    use super::*;
    use envoy_types::pb::envoy::config::core::v3::{HealthStatus, TcpKeepalive};
    use envoy_types::pb::envoy::r#type::v3::Percent;
    use envoy_types::pb::google::protobuf::{Any, UInt32Value};
    use prost::Message as _;

    pub(in super::super) fn of_type(name: &str, kind: pb::cluster::DiscoveryType) -> pb::Cluster {
        pb::Cluster {
            name: name.to_owned(),
            cluster_discovery_type: Some(pb::cluster::ClusterDiscoveryType::Type(kind as i32)),
            ..pb::Cluster::default()
        }
    }

    #[test]
    fn what_consul_sends_for_a_target_is_understood() {
        let mut message = of_type("db", pb::cluster::DiscoveryType::Eds);
        message.connect_timeout = Some(well_known::Duration { seconds: 2, nanos: 500_000_000 });
        message.lb_policy = pb::cluster::LbPolicy::LeastRequest as i32;
        let least = pb::cluster::LeastRequestLbConfig { choice_count: Some(UInt32Value { value: 3 }), ..Default::default() };
        message.lb_config = Some(pb::cluster::LbConfig::LeastRequestLbConfig(least));
        let most = pb::circuit_breakers::Thresholds { max_connections: Some(UInt32Value { value: 64 }), ..Default::default() };
        message.circuit_breakers = Some(pb::CircuitBreakers { thresholds: vec![most], ..Default::default() });
        message.outlier_detection =
            Some(pb::OutlierDetection { consecutive_5xx: Some(UInt32Value { value: 3 }), ..Default::default() });
        let cluster = Cluster::parse(&message).expect("fine");
        assert_eq!(cluster.discovery, Discovery::Eds("db".into()));
        assert_eq!(cluster.connect_timeout, Duration::from_millis(2_500));
        assert_eq!(cluster.balance, Balance::LeastRequest { choices: 3 });
        assert_eq!(cluster.max_connections, Some(64));
        assert_eq!((cluster.outlier.max_failures, cluster.outlier.enforcing_percent), (3, 100));
    }

    #[test]
    fn keepalive_is_the_clusters_own_where_it_is_told() {
        let plain = of_type("db", pb::cluster::DiscoveryType::Eds);
        assert_eq!(Cluster::parse(&plain).expect("fine").keepalive, None);
        let told = |time: Option<u32>, probes: Option<u32>| {
            let value = |value: Option<u32>| value.map(|value| UInt32Value { value });
            let keepalive = TcpKeepalive { keepalive_time: value(time), keepalive_probes: value(probes), ..Default::default() };
            let options = pb::UpstreamConnectionOptions { tcp_keepalive: Some(keepalive), ..Default::default() };
            let message = pb::Cluster { upstream_connection_options: Some(options), ..plain.clone() };
            Cluster::parse(&message).expect("fine").keepalive
        };
        let on =
            |seconds: Option<u64>, probes| Some(Keepalive::On { idle: seconds.map(Duration::from_secs), interval: None, probes });
        assert_eq!(told(None, None), on(None, None), "the kernel's own");
        assert_eq!(told(Some(30), Some(3)), on(Some(30), Some(3)));
        assert_eq!(told(Some(u32::MAX), Some(u32::MAX)), on(Some(32_767), Some(127)));
        assert_eq!(told(Some(0), Some(3)), Some(Keepalive::Off));
    }

    #[test]
    fn the_panic_threshold_is_the_clusters_own_or_envoys() {
        let plain = of_type("db", pb::cluster::DiscoveryType::Eds);
        let told = |value: Option<f64>| {
            let healthy_panic_threshold = value.map(|value| Percent { value });
            let common = pb::cluster::CommonLbConfig { healthy_panic_threshold, ..Default::default() };
            let parsed = Cluster::parse(&pb::Cluster { common_lb_config: Some(common), ..plain.clone() });
            parsed.map(|cluster| cluster.panic_percent).map_err(|why| why.to_string())
        };
        assert_eq!(Cluster::parse(&plain).expect("fine").panic_percent, 50);
        assert_eq!([None, Some(0.0), Some(0.5), Some(33.4), Some(100.0)].map(told), [50, 0, 0, 33, 100].map(Ok));
        for beyond in [100.1, -1.0, f64::NAN, f64::INFINITY] {
            assert!(told(Some(beyond)).expect_err("refused").starts_with("common_lb_config.healthy_panic_threshold: "));
        }
        let zones = pb::cluster::common_lb_config::ZoneAwareLbConfig { fail_traffic_on_panic: true, ..Default::default() };
        let zones = pb::cluster::common_lb_config::LocalityConfigSpecifier::ZoneAwareLbConfig(zones);
        let common = pb::cluster::CommonLbConfig { locality_config_specifier: Some(zones), ..Default::default() };
        let told = Cluster::parse(&pb::Cluster { common_lb_config: Some(common), ..plain.clone() }).expect_err("refused");
        assert!(told.to_string().contains("fail_traffic_on_panic"), "{told}");
    }

    #[test]
    fn what_would_choose_other_members_or_addresses_is_refused() {
        let plain = of_type("db", pb::cluster::DiscoveryType::Eds);
        let subset = pb::Cluster { lb_subset_config: Some(Default::default()), ..plain.clone() };
        assert!(Cluster::parse(&subset).expect_err("refused").to_string().starts_with("lb_subset_config: "));
        let bound = pb::Cluster { upstream_bind_config: Some(Default::default()), ..plain };
        assert!(Cluster::parse(&bound).expect_err("refused").to_string().starts_with("upstream_bind_config: "));
    }

    #[test]
    fn without_outlier_detection_nobody_is_ejected() {
        let cluster = Cluster::parse(&of_type("db", pb::cluster::DiscoveryType::Eds)).expect("fine");
        assert_eq!(cluster.outlier.enforcing_percent, 0);
    }

    #[test]
    fn aggregates_tell_their_order_and_other_extensions_are_refused_by_name() {
        let config = Aggregate { clusters: vec!["a".into(), "b".into()] };
        let any = Any { type_url: super::super::refusal::type_url(AGGREGATE), value: config.encode_to_vec() };
        let custom = |name: &str, any| pb::cluster::CustomClusterType { name: name.into(), typed_config: Some(any) };
        let mut message = of_type("db", pb::cluster::DiscoveryType::Eds);
        let kind = pb::cluster::ClusterDiscoveryType::ClusterType;
        message.cluster_discovery_type = Some(kind(custom("envoy.clusters.aggregate", any)));
        let cluster = Cluster::parse(&message).expect("fine");
        assert_eq!(cluster.discovery, Discovery::Aggregate(vec!["a".into(), "b".into()]));
        message.cluster_discovery_type = Some(kind(custom("envoy.clusters.redis", Any::default())));
        let told = Cluster::parse(&message).expect_err("refused").to_string();
        assert!(told.starts_with("cluster_type.name: envoy.clusters.redis; "), "{told}");
    }

    #[test]
    fn a_static_cluster_has_no_host_names() {
        let mut message = of_type("db", pb::cluster::DiscoveryType::Static);
        message.load_assignment = Some(assignment("db", &[&[("db.example", 1, HealthStatus::Unknown)]]));
        assert!(Cluster::parse(&message).expect_err("refused").to_string().contains("db.example"));
        message.cluster_discovery_type =
            Some(pb::cluster::ClusterDiscoveryType::Type(pb::cluster::DiscoveryType::StrictDns as i32));
        let cluster = Cluster::parse(&message).expect("fine");
        assert!(matches!(cluster.discovery, Discovery::Dns(_, DNS_REFRESH)));
    }
}
