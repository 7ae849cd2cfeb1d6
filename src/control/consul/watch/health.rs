//! Where the instances of one target, or the mesh gateways of one datacenter, are and how they feel.
//!
//! Never `passing=1`: it drops instances in `warning`, which Envoy uses. The filter is the chain's, verbatim. An empty list
//! that may only be empty for lack of rights is trouble, not data.

use super::{Context, Name, Spec, Update, follow_always};
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

const SPEC: Spec = Spec { class: Class::Background, style: Style::Index, cached: true };
/// Envoy's largest weight.
const WEIGHT_MAX: i64 = 128;

/// What is asked: equal questions share a watch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ask {
    pub(crate) kind: Kind,
    pub(crate) name: Name,
    /// Empty for the agent's own.
    pub(crate) datacenter: String,
    pub(crate) filter: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// Sidecars and native instances of a service.
    Connect,
    /// Mesh gateways, by the name that they are registered under.
    Gateway,
}

/// One instance, with everything that decides whether and where it is dialed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    /// Service that its certificate names.
    pub(crate) name: Name,
    pub(crate) datacenter: String,
    pub(crate) lan: (String, u16),
    pub(crate) wan: (String, u16),
    pub(crate) state: State,
    /// Critical only because no check has run yet: see [`Instance::not_run`].
    unproven: bool,
    passing_weight: i64,
    warning_weight: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Passing,
    Warning,
    Critical,
}

pub(super) async fn watch(cx: &Context, ask: &Ask) {
    let (endpoint, kind) = match ask.kind {
        Kind::Connect => (Endpoint::Health, "connect"),
        Kind::Gateway => (Endpoint::Gateways, "service"),
    };
    let request = ask
        .name
        .scope(Request::get(endpoint, &["health", kind, &ask.name.service]))
        .with("dc", &ask.datacenter)
        .with("filter", &ask.filter);
    follow_always(cx, SPEC, &request, |response| {
        let list = decode(response, endpoint)?;
        if list.is_empty() && (response.filtered_by_acls || cx.client.token().is_suspect()) {
            return Err(AgentError::Hidden { endpoint });
        }
        Ok(Update::Instances(list))
    })
    .await;
}

fn decode(response: &Response, endpoint: Endpoint) -> Result<Vec<Instance>, AgentError> {
    let list: Vec<wire::Instance> = response.json(endpoint)?;
    Ok(instances(list))
}

/// Instances in a steady order, so that the agent's order is no change.
pub(super) fn instances(list: Vec<wire::Instance>) -> Vec<Instance> {
    let mut instances: Vec<Instance> = list.into_iter().filter_map(instance).collect();
    instances.sort_by(|a, b| (&a.lan, &a.wan, a.state).cmp(&(&b.lan, &b.wan, b.state)));
    instances.dedup();
    instances
}

fn instance(wire: wire::Instance) -> Option<Instance> {
    let service = &wire.service;
    let node = &wire.node;
    let is_proxy = !service.connect.native && !service.proxy.destination_service_name.is_empty();
    let certificate_name = if is_proxy { &service.proxy.destination_service_name } else { &service.service };
    let lan_address = if service.address.is_empty() { &node.address } else { &service.address };
    let lan = (lan_address.clone(), service.port);
    let wan = match service.tagged_addresses.get("wan").filter(|wan| !wan.address.is_empty()) {
        Some(wan) => (wan.address.clone(), if wan.port == 0 { service.port } else { wan.port }),
        None if !service.address.is_empty() => lan.clone(),
        None => (node.tagged_addresses.get("wan").filter(|wan| !wan.is_empty()).unwrap_or(&node.address).clone(), service.port),
    };
    let state = wire.checks.iter().map(|check| state(&check.status)).max().unwrap_or(State::Passing);
    let weights = service.weights.unwrap_or(wire::Weights { passing: 1, warning: 1 });
    // A node without an address or an instance without a port cannot be dialed by anybody.
    (!lan.0.is_empty() && lan.1 != 0).then(|| Instance {
        name: Name {
            service: certificate_name.clone(),
            namespace: super::chain::not_default(&service.namespace),
            partition: super::chain::not_default(&service.partition),
        },
        datacenter: node.datacenter.clone(),
        lan,
        wan,
        state,
        unproven: wire.checks.iter().filter(|check| self::state(&check.status) == State::Critical).all(not_run),
        passing_weight: weights.passing,
        warning_weight: weights.warning,
    })
}

fn state(text: &str) -> State {
    match text {
        "passing" => State::Passing,
        "warning" => State::Warning,
        // `critical`, `maintenance` and anything new.
        _ => State::Critical,
    }
}

/// Whether a check is critical only because it has not run since its agent started: a restarted agent sets what it probes
/// itself to critical until the first result, and these probes never end without a word.
fn not_run(check: &wire::Check) -> bool {
    check.output.is_empty() && matches!(check.kind.as_str(), "tcp" | "http" | "grpc" | "h2ping" | "alias")
}

/// Fail static over a restart of an instance's own agent: an instance that was usable stays so until a check of it has
/// really run. One that nobody knew yet starts critical, as in Consul.
pub(crate) fn keep_unproven(list: &mut [Instance], before: &[Instance]) {
    for instance in list.iter_mut().filter(|instance| instance.state == State::Critical && instance.unproven) {
        let known = before
            .iter()
            .find(|known| (&known.name, &known.lan, &known.datacenter) == (&instance.name, &instance.lan, &instance.datacenter));
        if let Some(known) = known {
            instance.state = known.state;
        }
    }
}

impl Instance {
    /// Weight and health as Envoy is told them (`agent/xds/endpoints.go`).
    pub(crate) fn weight_and_health(&self, only_passing: bool) -> (u32, bool) {
        let weight = if self.state == State::Warning { self.warning_weight } else { self.passing_weight };
        let healthy = match self.state {
            State::Passing => true,
            State::Warning => !only_passing,
            State::Critical => false,
        };
        let clamped = u32::try_from(weight.clamp(1, WEIGHT_MAX)).unwrap_or(1);
        (clamped, healthy && weight > 0)
    }

    #[cfg(test)]
    pub(crate) fn simple(service: &str, datacenter: &str, lan: (&str, u16), wan: (&str, u16), state: State) -> Self {
        Self {
            name: Name { service: service.into(), namespace: String::new(), partition: String::new() },
            datacenter: datacenter.into(),
            lan: (lan.0.into(), lan.1),
            wan: (wan.0.into(), wan.1),
            state,
            unproven: false,
            passing_weight: 1,
            warning_weight: 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Instance {
        instance(serde_json::from_str(text).expect("JSON")).expect("an instance")
    }

    #[test]
    fn the_capture_gives_address_name_and_state() {
        let body = crate::control::fixture("health-connect").to_string();
        let list = decode(&Response::with_body(body.as_bytes()), Endpoint::Health).expect("the capture parses");
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].lan, ("127.0.0.1".to_owned(), 21_501), "the node's address where the service has none");
        assert_eq!((list[0].name.service.as_str(), list[0].state), ("warehouse", State::Critical));
        assert_eq!(list[0].weight_and_health(false), (1, false));
        let body = crate::control::fixture("health-mesh-gateway").to_string();
        let gateways = decode(&Response::with_body(body.as_bytes()), Endpoint::Gateways).expect("the capture parses");
        assert_eq!((gateways[0].lan.0.as_str(), gateways[0].wan.0.as_str()), ("127.0.0.1", "198.51.100.1"));
    }

    #[test]
    fn weights_and_health_are_envoys() {
        let with = |checks: &str, passing: i64, warning: i64| {
            of(&format!(
                r#"{{"Node":{{"Address":"10.0.0.1"}},"Service":{{"Service":"db","Port":1,"Connect":{{"Native":true}},
                "Weights":{{"Passing":{passing},"Warning":{warning}}}}},"Checks":[{checks}]}}"#
            ))
        };
        let passing = r#"{"Status":"passing"}"#;
        let warning = r#"{"Status":"passing"},{"Status":"warning"}"#;
        let critical = r#"{"Status":"warning"},{"Status":"critical"}"#;
        assert_eq!(with(passing, 10, 2).weight_and_health(true), (10, true));
        assert_eq!(with("", 10, 2).weight_and_health(true), (10, true));
        assert_eq!(with(warning, 10, 2).weight_and_health(false), (2, true));
        assert_eq!(with(warning, 10, 2).weight_and_health(true), (2, false));
        assert!(!with(critical, 10, 2).weight_and_health(false).1);
        assert_eq!(with(warning, 10, 0).weight_and_health(false), (1, false), "weight 0 takes it out");
        assert_eq!(with(passing, 5_000, 1).weight_and_health(false), (128, true));
        assert_eq!(with(passing, -5, 1).weight_and_health(false), (1, false));
    }

    #[test]
    fn wan_addresses_in_consuls_order() {
        let wan = |service: &str, node: &str| {
            of(&format!(
                r#"{{"Node":{{"Address":"10.0.0.1","TaggedAddresses":{node}}},"Service":{{"Service":"db","Port":1{service}}}}}"#
            ))
            .wan
        };
        let tagged = r#","TaggedAddresses":{"wan":{"Address":"198.51.100.7","Port":9}}"#;
        assert_eq!(wan(tagged, "null"), ("198.51.100.7".to_owned(), 9));
        assert_eq!(wan("", r#"{"wan":"198.51.100.8"}"#), ("198.51.100.8".to_owned(), 1));
        assert_eq!(wan(r#","Address":"db.example""#, r#"{"wan":"198.51.100.8"}"#), ("db.example".to_owned(), 1));
        assert_eq!(wan("", "null"), ("10.0.0.1".to_owned(), 1));
    }

    /// What a real agent answers right after its restart, and what it answers once the check has run.
    #[test]
    fn an_agents_restart_takes_no_known_instance_away() {
        let with = |check: &str| {
            vec![of(&format!(
                r#"{{"Node":{{"Address":"10.0.0.1","Datacenter":"dc1"}},"Service":{{"Service":"db-sidecar-proxy","Port":21000,"Proxy":{{"DestinationServiceName":"db"}}}},
                "Checks":[{{"Status":"passing","Output":"Agent alive and reachable"}},{check}]}}"#
            ))]
        };
        let restarted = r#"{"Status":"critical","Output":"","Type":"tcp"}"#;
        let before = with(r#"{"Status":"passing","Output":"TCP connect: Success","Type":"tcp"}"#);
        let after = |check: &str, before: &[Instance]| {
            let mut list = with(check);
            keep_unproven(&mut list, before);
            list[0].state
        };
        assert_eq!(after(restarted, &before), State::Passing);
        assert_eq!(after(restarted, &[]), State::Critical, "a new instance starts critical");
        for proven in [
            r#"{"Status":"critical","Output":"connection refused","Type":"tcp"}"#,
            r#"{"Status":"critical","Output":"","Type":"ttl"}"#,
            r#"{"Status":"critical","Output":"","CheckID":"_service_maintenance:db"}"#,
        ] {
            assert_eq!(after(proven, &before), State::Critical, "{proven}");
            assert_eq!(after(&format!("{restarted},{proven}"), &before), State::Critical, "{proven}");
        }
    }
}
