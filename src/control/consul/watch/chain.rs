//! The compiled discovery chain of one upstream: which targets, in which order, chosen how.

use std::time::Duration;

use super::{Context, Name, Spec, Update, follow_always};
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;
use crate::control::opaque::go_duration;
use crate::mesh::Balance;

const SPEC: Spec = Spec { class: Class::Background, style: Style::Index, cached: true };
/// Targets of one chain that are believed; Consul itself makes a handful.
const TARGETS_MAX: usize = 64;
/// Choices of least request: Envoy's default, and the most that makes sense.
const CHOICES: (u32, u32) = (2, 64);

/// What is asked: equal questions share a watch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ask {
    pub(crate) name: Name,
    /// Where the chain is evaluated; empty for the agent's own.
    pub(crate) datacenter: String,
    pub(crate) protocol: String,
    pub(crate) connect_timeout_ms: Option<u64>,
    pub(crate) mesh_gateway: String,
}

/// The answer, reduced to what matters at L4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    /// In failover order, the primary first.
    pub(crate) targets: Vec<Target>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) balance: Balance,
    /// Nobody has configured anything of it.
    pub(crate) is_default: bool,
    /// What was left out, for a person.
    pub(crate) notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) id: String,
    pub(crate) sni: String,
    pub(crate) name: Name,
    pub(crate) datacenter: String,
    pub(crate) filter: String,
    pub(crate) only_passing: bool,
    pub(crate) gateway: Gateway,
}

/// How another datacenter is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gateway {
    /// Directly, at the WAN address.
    None,
    /// Through a mesh gateway of ours.
    Local,
    /// Through a mesh gateway of theirs.
    Remote,
}

pub(super) async fn watch(cx: &Context, ask: &Ask) {
    follow_always(cx, SPEC, &request(ask), |response| decode(response).map(Update::Chain)).await;
}

fn request(ask: &Ask) -> Request {
    let mut overrides = serde_json::Map::new();
    if let Some(ms) = ask.connect_timeout_ms {
        overrides.insert("OverrideConnectTimeout".into(), format!("{ms}ms").into());
    }
    if !ask.protocol.is_empty() {
        overrides.insert("OverrideProtocol".into(), ask.protocol.clone().into());
    }
    if !ask.mesh_gateway.is_empty() {
        overrides.insert("OverrideMeshGateway".into(), serde_json::json!({ "Mode": ask.mesh_gateway }));
    }
    let path = ["discovery-chain", &ask.name.service];
    let request = if overrides.is_empty() {
        Request::get(Endpoint::Chain, &path)
    } else {
        Request::post(Endpoint::Chain, &path, serde_json::Value::Object(overrides).to_string())
    };
    ask.name.scope(request).with("compile-dc", &ask.datacenter)
}

fn decode(response: &Response) -> Result<Chain, AgentError> {
    let answer: wire::ChainAnswer = response.json(Endpoint::Chain)?;
    reduce(answer.chain).map_err(|detail| AgentError::Malformed { endpoint: Endpoint::Chain, detail })
}

fn reduce(chain: wire::Chain) -> Result<Chain, String> {
    let start = chain.nodes.get(&chain.start_node).ok_or("its start node is not among its nodes")?;
    if start.kind != "resolver" {
        return Err(format!(
            "the chain starts with a service-{} (protocol {}), which needs HTTP; this proxy works at L4: remove that entry or \
             set the service's protocol to tcp",
            start.kind, chain.protocol
        ));
    }
    let resolver = start.resolver.as_ref().ok_or("its start node has no resolver")?;
    let failovers = resolver.failover.iter().flat_map(|failover| &failover.targets);
    let mut notes = Vec::new();
    let mut targets: Vec<Target> = Vec::new();
    for id in std::iter::once(&resolver.target).chain(failovers).take(TARGETS_MAX) {
        let wire = chain.targets.get(id).ok_or_else(|| format!("its target {} is missing", id.escape_default()))?;
        match target(id, wire) {
            Ok(target) if targets.iter().all(|known| known.id != target.id) => targets.push(target),
            Ok(_) => {}
            Err(note) => notes.push(note),
        }
    }
    if targets.is_empty() {
        return Err(notes.join("; "));
    }
    Ok(Chain {
        targets,
        connect_timeout: resolver.connect_timeout.as_ref().and_then(go_duration).filter(|timeout| !timeout.is_zero()),
        balance: start.load_balancer.as_ref().map_or(Balance::RoundRobin, |lb| balance(lb, &mut notes)),
        is_default: is_default(&chain, resolver),
        notes,
    })
}

/// As Consul's `IsDefault`: a redirect may lead to a service of which nothing is configured.
fn is_default(chain: &wire::Chain, resolver: &wire::Resolver) -> bool {
    let target = chain.targets.get(&resolver.target);
    let here = |target: &wire::ChainTarget| {
        target.service == chain.service_name && not_default(&target.namespace) == not_default(&chain.namespace)
    };
    resolver.default && target.is_some_and(here)
}

fn target(id: &str, wire: &wire::ChainTarget) -> Result<Target, String> {
    if !wire.peer.is_empty() {
        return Err(format!("target {id} is imported from peer {}: peering needs the xDS feeder", wire.peer));
    }
    if wire.external {
        return Err(format!("target {id} has an ExternalSNI: it is outside the mesh and has no SPIFFE ID to check"));
    }
    if wire.sni.is_empty() || wire.datacenter.is_empty() || wire.service.is_empty() {
        return Err(format!("target {id} has no SNI, datacenter or service"));
    }
    let gateway = match wire.mesh_gateway.mode.as_str() {
        "local" => Gateway::Local,
        "remote" => Gateway::Remote,
        _ => Gateway::None,
    };
    Ok(Target {
        id: id.to_owned(),
        sni: wire.sni.clone(),
        name: Name {
            service: wire.service.clone(),
            // `default` is what Consul OSS answers and what it does not accept as a parameter.
            namespace: not_default(&wire.namespace),
            partition: not_default(&wire.partition),
        },
        datacenter: wire.datacenter.clone(),
        filter: wire.subset.filter.clone(),
        only_passing: wire.subset.only_passing,
        gateway,
    })
}

pub(crate) fn not_default(text: &str) -> String {
    if text == "default" { String::new() } else { text.to_owned() }
}

fn balance(lb: &wire::LoadBalancer, notes: &mut Vec<String>) -> Balance {
    match lb.policy.as_str() {
        "" | "round_robin" => Balance::RoundRobin,
        "least_request" => {
            let choices = lb.least_request_config.as_ref().map_or(0, |config| config.choice_count);
            Balance::LeastRequest { choices: if choices == 0 { CHOICES.0 } else { choices.clamp(CHOICES.0, CHOICES.1) } }
        }
        "random" => Balance::Random,
        "ring_hash" => Balance::RingHash,
        "maglev" => Balance::Maglev,
        other => {
            notes.push(format!("load balancing policy {} is unknown, round robin is used", other.escape_default()));
            Balance::RoundRobin
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(name: &str) -> Chain {
        decode(&Response::with_body(crate::control::fixture(name).to_string().as_bytes())).expect("the capture parses")
    }

    fn of(json: &str) -> Result<Chain, String> {
        reduce(serde_json::from_str(json).expect("JSON"))
    }

    #[test]
    fn subsets_failover_and_policy_come_from_the_chain() {
        let chain = capture("chain-warehouse");
        let ids: Vec<_> = chain.targets.iter().map(|target| target.id.as_str()).collect();
        assert_eq!(ids, ["v1.warehouse.default.dc1", "v2.warehouse.default.dc1"]);
        assert_eq!(chain.targets[0].filter, "Service.Meta.version == v1");
        assert_eq!((chain.targets[0].only_passing, chain.targets[1].only_passing), (false, true));
        assert!(chain.targets[0].sni.starts_with("v1.warehouse.default.dc1.internal."));
        assert_eq!(chain.balance, Balance::LeastRequest { choices: 3 });
        assert!(!chain.is_default && capture("chain-default").is_default && !capture("chain-redirect").is_default);
        assert_eq!(chain.connect_timeout, Some(Duration::from_secs(3)));
        assert_eq!(capture("chain-override").connect_timeout, Some(Duration::from_millis(2_500)));
    }

    #[test]
    fn a_redirect_leads_to_the_other_service() {
        let chain = capture("chain-redirect");
        assert_eq!(chain.targets.len(), 1);
        assert_eq!(chain.targets[0].name.service, "warehouse");
        assert_eq!(capture("chain-default").targets[0].name.namespace, "");
    }

    #[test]
    fn a_redirect_to_what_nobody_configured_is_no_default() {
        let chain = |target: &str| {
            let text = format!(
                r#"{{"ServiceName":"a","Namespace":"default","StartNode":"r","Nodes":{{"r":{{"Type":"resolver","Resolver":
                    {{"Default":true,"Target":"{target}"}}}}}},
                    "Targets":{{"{target}":{{"Service":"{target}","Namespace":"default","Datacenter":"dc1","SNI":"x"}}}}}}"#
            );
            of(&text).expect("a chain").is_default
        };
        assert!(chain("a") && !chain("b"));
    }

    #[test]
    fn l7_and_peers_are_named() {
        let error = of(r#"{"StartNode":"router:x","Protocol":"http","Nodes":{"router:x":{"Type":"router"}}}"#).expect_err("L7");
        assert!(error.contains("service-router") && error.contains("tcp"), "{error}");
        let peer = r#"{"StartNode":"r","Nodes":{"r":{"Type":"resolver","Resolver":{"Target":"a","Failover":{"Targets":["p"]}}}},
            "Targets":{"a":{"Service":"a","Datacenter":"dc1","SNI":"a.x"},"p":{"Service":"a","Peer":"east","SNI":"p.x"}}}"#;
        let chain = of(peer).expect("the rest works");
        assert_eq!(chain.targets.len(), 1);
        assert!(chain.notes[0].contains("peer east"), "{:?}", chain.notes);
        assert!(of(r#"{"StartNode":"r","Nodes":{}}"#).is_err());
        assert!(of(r#"{"StartNode":"r","Nodes":{"r":{"Type":"resolver","Resolver":{"Target":"gone"}}}}"#).is_err());
    }

    #[test]
    fn overrides_go_in_a_body_and_nothing_else_does() {
        let name = Name { service: "db".into(), namespace: String::new(), partition: String::new() };
        let mut ask = Ask {
            name,
            datacenter: "dc2".into(),
            protocol: String::new(),
            connect_timeout_ms: None,
            mesh_gateway: String::new(),
        };
        let plain = request(&ask);
        assert_eq!((plain.method.as_str(), plain.body.is_some()), ("GET", false));
        assert_eq!(plain.query, [("compile-dc", "dc2".to_owned())]);
        ask.connect_timeout_ms = Some(2_500);
        ask.mesh_gateway = "remote".into();
        let body = request(&ask).body.expect("a body");
        let json: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(json, serde_json::json!({"OverrideConnectTimeout":"2500ms","OverrideMeshGateway":{"Mode":"remote"}}));
    }
}
