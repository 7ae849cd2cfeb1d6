//! `ClusterLoadAssignment`: where a cluster's members are, by priority.
//!
//! Invariant: every place can be dialed as it stands or after its host name was resolved. Pure. Endpoints in other protocols
//! than TCP are refused.

use std::path::PathBuf;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;

use super::refusal::Refusal;

/// Priorities of one assignment; Consul sends one for each failover target.
const PRIORITIES_MAX: u32 = 128;
/// Envoy's and Consul's bound on a weight, and the mesh's.
const WEIGHT_MAX: u32 = 128;
/// Members of one assignment.
const PLACES_MAX: usize = 10_000;

/// Members by priority, the most wanted first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Assignment {
    pub(super) priorities: Vec<Vec<Place>>,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) host: Host,
    pub(super) weight: u32,
    pub(super) healthy: bool,
}

/// An address as configured.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Host {
    /// IP address or host name, and port.
    Tcp(String, u16),
    Unix(PathBuf),
}

impl Assignment {
    pub(super) fn parse(message: &pb::ClusterLoadAssignment) -> Result<Self, Refusal> {
        let mut priorities: Vec<Vec<Place>> = Vec::new();
        let mut count = 0;
        for (index, locality) in message.endpoints.iter().enumerate() {
            if locality.priority >= PRIORITIES_MAX {
                let wanted = format!("at most {PRIORITIES_MAX} priorities are used");
                return Err(Refusal::new(format!("endpoints[{index}].priority"), locality.priority, wanted));
            }
            count += locality.lb_endpoints.len();
            if count > PLACES_MAX {
                return Err(Refusal::new("endpoints", count, format!("at most {PLACES_MAX} members of a cluster are used")));
            }
            let priority = locality.priority as usize;
            if priorities.len() <= priority {
                priorities.resize_with(priority + 1, Vec::new);
            }
            for (member, endpoint) in locality.lb_endpoints.iter().enumerate() {
                let place = place(endpoint).map_err(|why| why.under(&format!("endpoints[{index}].lb_endpoints[{member}]")))?;
                priorities[priority].push(place);
            }
        }
        Ok(Self { priorities })
    }

    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        self.priorities.iter().flatten()
    }
}

fn place(message: &pb::LbEndpoint) -> Result<Place, Refusal> {
    let Some(pb::lb_endpoint::HostIdentifier::Endpoint(endpoint)) = &message.host_identifier else {
        return Err(Refusal::missing("endpoint", "expected an endpoint with an address"));
    };
    let host = Host::parse(endpoint.address.as_ref()).map_err(|why| why.under("endpoint.address"))?;
    // What Envoy dials where no other member is healthier counts as healthy: unknown and degraded.
    let healthy = match core::HealthStatus::try_from(message.health_status) {
        Ok(core::HealthStatus::Unknown | core::HealthStatus::Healthy | core::HealthStatus::Degraded) => true,
        Ok(core::HealthStatus::Unhealthy | core::HealthStatus::Draining | core::HealthStatus::Timeout) | Err(_) => false,
    };
    let weight = message.load_balancing_weight.as_ref().map_or(1, |weight| weight.value.clamp(1, WEIGHT_MAX));
    Ok(Place { host, weight, healthy })
}

impl Host {
    pub(super) fn parse(address: Option<&core::Address>) -> Result<Self, Refusal> {
        match address.and_then(|address| address.address.as_ref()) {
            Some(core::address::Address::SocketAddress(socket)) => {
                if socket.protocol != core::socket_address::Protocol::Tcp as i32 {
                    return Err(Refusal::new("socket_address.protocol", "UDP", "only TCP is proxied"));
                }
                let port = match &socket.port_specifier {
                    Some(core::socket_address::PortSpecifier::PortValue(port)) => u16::try_from(*port).ok(),
                    _ => None,
                };
                let Some(port) = port else {
                    let field = "socket_address.port_value";
                    return Err(Refusal::missing(field, "expected a port number from 0 to 65535"));
                };
                if socket.address.is_empty() {
                    return Err(Refusal::missing("socket_address.address", "expected an address or a host name"));
                }
                Ok(Self::Tcp(socket.address.clone(), port))
            }
            Some(core::address::Address::Pipe(pipe)) => Ok(Self::Unix(PathBuf::from(&pipe.path))),
            Some(_) => Err(Refusal::new("address", "an internal address", "expected a socket_address or a pipe")),
            None => Err(Refusal::missing("address", "expected a socket_address or a pipe")),
        }
    }

    /// The name that must be resolved, if it is one.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Tcp(host, _) if host.parse::<std::net::IpAddr>().is_err() => Some(host),
            Self::Tcp(..) | Self::Unix(_) => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use envoy_types::pb::google::protobuf::UInt32Value;

    pub(in super::super) fn address(host: &str, port: u32) -> core::Address {
        let socket = core::SocketAddress {
            address: host.to_owned(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port)),
            ..core::SocketAddress::default()
        };
        core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
    }

    /// One locality a priority.
    pub(in super::super) fn assignment(
        cluster: &str,
        priorities: &[&[(&str, u32, core::HealthStatus)]],
    ) -> pb::ClusterLoadAssignment {
        let locality = |(priority, members): (usize, &&[(&str, u32, core::HealthStatus)])| pb::LocalityLbEndpoints {
            priority: u32::try_from(priority).expect("few"),
            lb_endpoints: members.iter().map(|(host, port, health)| member(host, *port, *health)).collect(),
            ..pb::LocalityLbEndpoints::default()
        };
        pb::ClusterLoadAssignment {
            cluster_name: cluster.to_owned(),
            endpoints: priorities.iter().enumerate().map(locality).collect(),
            ..pb::ClusterLoadAssignment::default()
        }
    }

    fn member(host: &str, port: u32, health: core::HealthStatus) -> pb::LbEndpoint {
        let endpoint = pb::Endpoint { address: Some(address(host, port)), ..pb::Endpoint::default() };
        pb::LbEndpoint {
            health_status: health as i32,
            host_identifier: Some(pb::lb_endpoint::HostIdentifier::Endpoint(endpoint)),
            ..pb::LbEndpoint::default()
        }
    }

    #[test]
    fn priorities_health_and_weights_are_read() {
        let (healthy, unhealthy) = (core::HealthStatus::Healthy, core::HealthStatus::Unhealthy);
        let mut message =
            assignment("db", &[&[("10.0.0.1", 1, healthy), ("10.0.0.2", 2, unhealthy)], &[("gw.example", 3, healthy)]]);
        message.endpoints[0].lb_endpoints[0].load_balancing_weight = Some(UInt32Value { value: 1_000 });
        let parsed = Assignment::parse(&message).expect("fine");
        assert_eq!(parsed.priorities.len(), 2);
        let health: Vec<_> = parsed.places().map(|place| (place.weight, place.healthy)).collect();
        assert_eq!(health, [(WEIGHT_MAX, true), (1, false), (1, true)]);
        assert_eq!(parsed.priorities[1][0].host.name(), Some("gw.example"));
        assert_eq!(parsed.priorities[0][0].host.name(), None);
    }

    #[test]
    fn what_cannot_be_dialed_is_refused_by_its_place() {
        let mut message = assignment("db", &[&[("10.0.0.1", 70_000, core::HealthStatus::Healthy)]]);
        let told = Assignment::parse(&message).expect_err("refused").to_string();
        assert!(told.starts_with("endpoints[0].lb_endpoints[0].endpoint.address.socket_address.port_value: "), "{told}");
        message.endpoints[0].priority = u32::MAX;
        assert!(Assignment::parse(&message).expect_err("refused").to_string().contains("priority: 4294967295"));
    }
}
