//! Intentions: who may talk to a service, and the proof that somebody may.
//!
//! Invariant: [`Authorized`] can be made only by [`Intentions::decide_on`]; a connection to the local app cannot be opened
//! without one. Unknown policy, L7 permissions and JWT requirements are denials: this is an L4 proxy and fails closed.
//!
//! Pure: no clock, no I/O. Source: Consul `agent/connect/authz.go` (source match), `agent/xds/rbac.go` (L7 is deny at L4,
//! the datacenter is not matched); the order is that of `/v1/connect/intentions/match`.

pub mod network;

use std::fmt;
use std::sync::Arc;

use crate::identity::{ServiceName, SpiffeId};
pub use network::Subject;

/// What an intention does at L4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Lets the source in.
    Allow,
    /// Keeps the source out.
    Deny,
    /// Has HTTP permissions, which cannot be judged at L4: keeps the source out.
    DenyL7,
    /// Requires a JWT, which cannot be judged at L4: keeps the source out.
    DenyJwt,
}

/// One intention with the service as its destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intention {
    /// Consul's id where it has one, for logs.
    pub id: String,
    /// Source service name, or `*`.
    pub source: String,
    /// Source namespace, or `*`; empty counts as `default`.
    pub source_namespace: String,
    /// Source partition; empty counts as `default`.
    pub source_partition: String,
    /// Peer that the source comes from; empty for this cluster.
    pub source_peer: String,
    /// Destination as written (`*` for a wildcard), for logs.
    pub destination: String,
    /// What it does.
    pub action: Action,
    /// Consul's precedence, 9 the highest.
    pub precedence: u8,
}

/// What holds when no intention matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultPolicy {
    /// Consul lets it in (ACLs off or default allow).
    Allow,
    /// Consul keeps it out.
    Deny,
    /// Not yet learned: keeps it out.
    Unknown,
}

/// Everything that decides who may reach one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intentions {
    /// In evaluation order: the first whose source matches wins.
    ordered: Vec<Intention>,
    /// What each says, in the same order, so that a decision formats nothing.
    texts: Vec<Arc<str>>,
    default: DefaultPolicy,
    /// In place of a list: RBAC filters that Consul made of its intentions. All of them must let a peer in.
    filters: Option<Arc<[network::Rules]>>,
}

/// Proof that a peer was let in, and by what. Only [`Intentions::decide_on`] makes one.
#[derive(Debug, Clone)]
pub struct Authorized {
    by: Ground,
}

/// A refusal, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// What kept the peer out.
    pub by: Ground,
}

/// What a decision rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ground {
    /// The intention that matched.
    Intention(Arc<str>),
    /// The RBAC policy that matched, or that none did.
    Network(Arc<str>),
    /// No intention matched; the default applied.
    Default(DefaultPolicy),
    /// The peer is no service (a gateway, an agent), so no intention can name it.
    NotAService,
}

impl Intentions {
    /// A cold start: nothing is known, everything is denied.
    pub fn unknown() -> Self {
        Self::new(Vec::new(), DefaultPolicy::Unknown)
    }

    /// `ordered` must be in Consul's evaluation order, which a stable sort by descending precedence keeps.
    pub fn new(mut ordered: Vec<Intention>, default: DefaultPolicy) -> Self {
        ordered.sort_by_key(|intention| std::cmp::Reverse(intention.precedence));
        let texts = ordered.iter().map(|intention| intention.to_string().into()).collect();
        Self { ordered, texts, default, filters: None }
    }

    /// What RBAC filters say, in their order. None lets everybody in, as in Envoy.
    pub fn from_filters(filters: Vec<network::Rules>) -> Self {
        let allow_all = filters.iter().all(|rules| rules.effect() != network::Effect::Allow);
        let default = if allow_all { DefaultPolicy::Allow } else { DefaultPolicy::Deny };
        Self { ordered: Vec::new(), texts: Vec::new(), default, filters: Some(filters.into()) }
    }

    /// [`Intentions::decide_on`] of a connection of which only the peer is known.
    pub fn decide(&self, peer: &SpiffeId) -> Result<Authorized, Denied> {
        self.decide_on(&Subject { peer, remote: None, local: None, server_name: None })
    }

    /// Decides whether a connection may reach the service that these intentions protect.
    pub fn decide_on(&self, subject: &Subject<'_>) -> Result<Authorized, Denied> {
        let peer = subject.peer;
        if let Some(filters) = &self.filters {
            return decide_by_filters(filters, subject, self.default);
        }
        let Some(source) = peer.service_name() else {
            return Err(Denied { by: Ground::NotAService });
        };
        match self.ordered.iter().zip(&self.texts).find(|(intention, _)| intention.matches(source)) {
            Some((intention, text)) => {
                let by = Ground::Intention(Arc::clone(text));
                match intention.action {
                    Action::Allow => Ok(Authorized { by }),
                    Action::Deny | Action::DenyL7 | Action::DenyJwt => Err(Denied { by }),
                }
            }
            None => match self.default {
                DefaultPolicy::Allow => Ok(Authorized { by: Ground::Default(self.default) }),
                DefaultPolicy::Deny | DefaultPolicy::Unknown => Err(Denied { by: Ground::Default(self.default) }),
            },
        }
    }

    /// The intentions in evaluation order.
    pub fn ordered(&self) -> &[Intention] {
        &self.ordered
    }

    /// The RBAC filters, where Consul sent such in place of intentions.
    pub fn filters(&self) -> &[network::Rules] {
        self.filters.as_deref().unwrap_or_default()
    }

    /// Whether nothing at all is learned yet, so that whoever comes may wait a moment for it.
    pub fn is_unknown(&self) -> bool {
        self.default == DefaultPolicy::Unknown && self.ordered.is_empty() && self.filters.is_none()
    }

    /// What holds when none matches.
    pub fn default_policy(&self) -> DefaultPolicy {
        self.default
    }
}

/// The last filter's ground lets in, the first denial keeps out.
fn decide_by_filters(filters: &[network::Rules], subject: &Subject<'_>, default: DefaultPolicy) -> Result<Authorized, Denied> {
    let mut by = Ground::Default(default);
    for rules in filters {
        let verdict = rules.decide(subject);
        by = Ground::Network(verdict.by);
        if !verdict.allowed {
            return Err(Denied { by });
        }
    }
    Ok(Authorized { by })
}

impl Authorized {
    /// What let the peer in.
    pub fn by(&self) -> &Ground {
        &self.by
    }
}

impl Intention {
    fn matches(&self, source: &ServiceName) -> bool {
        // A peered source carries a foreign trust domain, which the handshake refuses: no peer intention can match here.
        self.source_peer.is_empty()
            && or_default(&self.source_partition) == &*source.partition
            && (self.source_namespace == "*" || or_default(&self.source_namespace) == &*source.namespace)
            && (self.source == "*" || self.source == *source.service)
    }
}

impl fmt::Display for Intention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
            Action::DenyL7 => "deny (L7 permissions cannot be judged at L4)",
            Action::DenyJwt => "deny (a JWT requirement cannot be judged at L4)",
        };
        let namespace = or_default(&self.source_namespace);
        if namespace == "default" {
            write!(f, "{} -> {} {action}", self.source, self.destination)?;
        } else {
            write!(f, "{namespace}/{} -> {} {action}", self.source, self.destination)?;
        }
        write!(f, " (precedence {})", self.precedence)
    }
}

impl fmt::Display for Ground {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intention(text) => write!(f, "intention {text}"),
            Self::Network(text) => write!(f, "RBAC {text}"),
            Self::Default(DefaultPolicy::Allow) => f.write_str("default policy allow"),
            Self::Default(DefaultPolicy::Deny) => f.write_str("default policy deny"),
            Self::Default(DefaultPolicy::Unknown) => f.write_str("no policy known yet"),
            Self::NotAService => f.write_str("peer identity is not a service"),
        }
    }
}

impl Denied {
    /// What an operator would change to let `source` reach `destination`.
    pub fn remedy(&self, source: &SpiffeId, destination: &str) -> String {
        match (&self.by, source.service_name()) {
            (Ground::Default(DefaultPolicy::Unknown), _) => {
                "wait until the agent has answered with intentions, or check the token's intentions:read right".to_owned()
            }
            (Ground::Intention(text), Some(_)) if text.contains("at L4") => {
                format!("replace the permissions of `{text}` by a plain allow, or keep an L7 proxy for {destination}")
            }
            (_, Some(name)) => format!("consul intention create -replace -allow {} {destination}", name.service),
            (_, None) => "only services can be named by intentions".to_owned(),
        }
    }
}

fn or_default(text: &str) -> &str {
    if text.is_empty() { "default" } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(service: &str) -> SpiffeId {
        SpiffeId::service("t.consul", "", "", "dc1", service).expect("valid")
    }

    fn intention(source: &str, destination: &str, action: Action, precedence: u8) -> Intention {
        Intention {
            id: String::new(),
            source: source.into(),
            source_namespace: "default".into(),
            source_partition: String::new(),
            source_peer: String::new(),
            destination: destination.into(),
            action,
            precedence,
        }
    }

    #[test]
    fn the_most_exact_intention_wins() {
        let set = Intentions::new(
            vec![intention("*", "db", Action::Allow, 8), intention("web", "db", Action::Deny, 9)],
            DefaultPolicy::Allow,
        );
        assert!(set.decide(&peer("web")).is_err());
        assert!(set.decide(&peer("api")).is_ok());
    }

    #[test]
    fn nothing_known_denies_and_says_so() {
        let denied = Intentions::unknown().decide(&peer("web")).expect_err("cold start denies");
        assert_eq!(denied.by, Ground::Default(DefaultPolicy::Unknown));
    }

    #[test]
    fn l7_jwt_and_peers_never_allow() {
        for action in [Action::DenyL7, Action::DenyJwt] {
            let set = Intentions::new(vec![intention("web", "db", action, 9)], DefaultPolicy::Allow);
            assert!(set.decide(&peer("web")).is_err());
        }
        let mut peered = intention("web", "db", Action::Allow, 9);
        peered.source_peer = "other".into();
        assert!(Intentions::new(vec![peered], DefaultPolicy::Deny).decide(&peer("web")).is_err());
    }

    #[test]
    fn a_gateway_is_nobody() {
        let gateway = SpiffeId::parse("spiffe://t.consul/gateway/mesh/dc/dc1").expect("valid");
        let open = Intentions::new(vec![], DefaultPolicy::Allow);
        assert_eq!(open.decide(&gateway).expect_err("denied").by, Ground::NotAService);
    }

    #[test]
    fn a_denial_names_the_remedy() {
        let set = Intentions::new(vec![intention("web", "db", Action::Deny, 9)], DefaultPolicy::Deny);
        let denied = set.decide(&peer("web")).expect_err("denied");
        assert_eq!(denied.by.to_string(), "intention web -> db deny (precedence 9)");
        assert_eq!(denied.remedy(&peer("web"), "db"), "consul intention create -replace -allow web db");
    }

    proptest! {
        #[test]
        fn without_an_allow_nobody_enters(sources in proptest::collection::vec("[a-c*]", 0..8), who in "[a-c]") {
            let list = sources.iter().map(|s| intention(s, "db", Action::Deny, if s == "*" { 8 } else { 9 })).collect();
            prop_assert!(Intentions::new(list, DefaultPolicy::Deny).decide(&peer(&who)).is_err());
        }
    }
}
