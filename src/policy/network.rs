//! Network RBAC: what Envoy's filter of that name decides at L4, as a value that decides without I/O.
//!
//! Invariant: a matcher that asks for something not known of a connection matches nothing and keeps nothing out of a denial:
//! truth has three values here, and only a plain `true` lets anybody in. Regular expressions are compiled before a [`Rules`]
//! exists, match the whole text, and take linear time.
//!
//! Must not know protobufs: `control` translates. Semantics: Envoy's `rbac_engine_impl` and `matchers` (policies in the order
//! of their names, the first that matches is the one named; an identity is the URI SAN).

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

use regex::Regex;

use crate::identity::SpiffeId;

/// The rules of one RBAC filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    effect: Effect,
    policies: Vec<Policy>,
    /// What is said when no policy matches.
    unmatched: Arc<str>,
}

/// What a policy that matches does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Lets in; who matches no policy stays out.
    Allow,
    /// Keeps out; who matches no policy comes in.
    Deny,
    /// Neither: everybody comes in.
    Log,
}

/// One named policy: somebody in `principals` may do something in `permissions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    text: Arc<str>,
    permissions: Vec<Permission>,
    principals: Vec<Principal>,
}

/// Who.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// Everybody.
    Any,
    /// All of these.
    And(Vec<Self>),
    /// One of these.
    Or(Vec<Self>),
    /// Not this one.
    Not(Box<Self>),
    /// A peer with a verified certificate, and with this identity where one is given.
    Authenticated(Option<Text>),
    /// A peer that connects from this network.
    Remote(Network),
}

/// What.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permission {
    /// Everything.
    Any,
    /// All of these.
    And(Vec<Self>),
    /// One of these.
    Or(Vec<Self>),
    /// Not this.
    Not(Box<Self>),
    /// A connection to an address in this network.
    DestinationIp(Network),
    /// A connection to a port in this range.
    DestinationPort(Range<u32>),
    /// A handshake that asks for this server name; one that asks for none asks for the empty name.
    ServerName(Text),
}

/// How a text is matched.
#[derive(Debug, Clone)]
pub struct Text {
    pattern: Pattern,
    ignore_case: bool,
}

#[derive(Debug, Clone)]
enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Contains(String),
    Whole(Regex),
}

/// The addresses that share their first bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// A connection to be decided on; what is `None` is not known.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Whose certificate was verified.
    pub peer: &'a SpiffeId,
    /// Where it connects from.
    pub remote: Option<SocketAddr>,
    /// Where it arrived.
    pub local: Option<SocketAddr>,
    /// The server name it asked for.
    pub server_name: Option<&'a str>,
}

/// Why a matcher cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Not RE2's syntax.
    #[error("`{pattern}` is no regular expression ({detail})")]
    Regex {
        /// As written.
        pattern: String,
        /// What the compiler said.
        detail: String,
    },
    /// Too many bits.
    #[error("prefix length {prefix} is longer than the address {address}")]
    Prefix {
        /// As written.
        address: IpAddr,
        /// As written.
        prefix: u32,
    },
}

/// A decision: whether, and on what ground.
pub(super) struct Verdict {
    pub(super) allowed: bool,
    pub(super) by: Arc<str>,
}

impl Rules {
    /// `policies` are tried in the order of their names.
    pub fn new(effect: Effect, policies: impl IntoIterator<Item = (String, Vec<Permission>, Vec<Principal>)>) -> Self {
        let mut named: Vec<_> = policies.into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let verb = match effect {
            Effect::Allow => "allow",
            Effect::Deny => "deny",
            Effect::Log => "log",
        };
        let policies = named
            .into_iter()
            .map(|(name, permissions, principals)| Policy {
                text: format!("policy {name} ({verb})").into(),
                permissions,
                principals,
            })
            .collect();
        Self { effect, policies, unmatched: format!("no policy matched (rules {verb})").into() }
    }

    /// What a policy that matches does.
    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// Each policy as the log names it.
    pub fn texts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.policies.iter().map(|policy| &policy.text)
    }

    pub(super) fn decide(&self, subject: &Subject<'_>) -> Verdict {
        let mut doubtful = None;
        for policy in &self.policies {
            match policy.matches(subject) {
                Some(true) => return Verdict { allowed: self.effect != Effect::Deny, by: Arc::clone(&policy.text) },
                Some(false) => {}
                None => doubtful = doubtful.or(Some(&policy.text)),
            }
        }
        match (self.effect, doubtful) {
            // A denial that cannot be ruled out is one.
            (Effect::Deny, Some(text)) => Verdict { allowed: false, by: Arc::clone(text) },
            (effect, _) => Verdict { allowed: effect != Effect::Allow, by: Arc::clone(&self.unmatched) },
        }
    }
}

impl Policy {
    fn matches(&self, subject: &Subject<'_>) -> Option<bool> {
        let what = any(self.permissions.iter().map(|permission| permission.matches(subject)));
        let who = any(self.principals.iter().map(|principal| principal.matches(subject)));
        all([what, who].into_iter())
    }
}

impl Principal {
    fn matches(&self, subject: &Subject<'_>) -> Option<bool> {
        match self {
            Self::Any | Self::Authenticated(None) => Some(true),
            Self::And(ids) => all(ids.iter().map(|id| id.matches(subject))),
            Self::Or(ids) => any(ids.iter().map(|id| id.matches(subject))),
            Self::Not(id) => id.matches(subject).map(|matched| !matched),
            Self::Authenticated(Some(name)) => Some(name.matches(subject.peer.as_str())),
            Self::Remote(network) => subject.remote.map(|remote| network.contains(remote.ip())),
        }
    }
}

impl Permission {
    fn matches(&self, subject: &Subject<'_>) -> Option<bool> {
        match self {
            Self::Any => Some(true),
            Self::And(rules) => all(rules.iter().map(|rule| rule.matches(subject))),
            Self::Or(rules) => any(rules.iter().map(|rule| rule.matches(subject))),
            Self::Not(rule) => rule.matches(subject).map(|matched| !matched),
            Self::DestinationIp(network) => subject.local.map(|local| network.contains(local.ip())),
            Self::DestinationPort(ports) => subject.local.map(|local| ports.contains(&u32::from(local.port()))),
            Self::ServerName(name) => subject.server_name.map(|asked| name.matches(asked)),
        }
    }
}

/// True when all are, false when one is not, else unknown.
fn all(mut values: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    values
        .try_fold(Some(true), |so_far, value| match value {
            Some(false) => Err(()),
            Some(true) => Ok(so_far),
            None => Ok(None),
        })
        .unwrap_or(Some(false))
}

/// True when one is, false when none is, else unknown.
fn any(values: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    all(values.map(|value| value.map(|value| !value))).map(|none| !none)
}

impl Text {
    /// Equal.
    pub fn exact(text: &str, ignore_case: bool) -> Self {
        Self::plain(Pattern::Exact, text, ignore_case)
    }

    /// Begins with.
    pub fn prefix(text: &str, ignore_case: bool) -> Self {
        Self::plain(Pattern::Prefix, text, ignore_case)
    }

    /// Ends with.
    pub fn suffix(text: &str, ignore_case: bool) -> Self {
        Self::plain(Pattern::Suffix, text, ignore_case)
    }

    /// Has in it.
    pub fn contains(text: &str, ignore_case: bool) -> Self {
        Self::plain(Pattern::Contains, text, ignore_case)
    }

    fn plain(make: fn(String) -> Pattern, text: &str, ignore_case: bool) -> Self {
        let text = if ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
        Self { pattern: make(text), ignore_case }
    }

    /// The whole text matches `pattern`, in RE2's syntax.
    pub fn regex(pattern: &str) -> Result<Self, NetworkError> {
        let bad = |error: regex::Error| NetworkError::Regex { pattern: pattern.to_owned(), detail: error.to_string() };
        // By itself first: what is unbalanced must not become balanced by the brackets around it.
        Regex::new(pattern).map_err(bad)?;
        let whole = Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(bad)?;
        Ok(Self { pattern: Pattern::Whole(whole), ignore_case: false })
    }

    /// Whether `text` is matched.
    pub fn matches(&self, text: &str) -> bool {
        let lower;
        let text = if self.ignore_case {
            lower = text.to_ascii_lowercase();
            &lower
        } else {
            text
        };
        match &self.pattern {
            Pattern::Exact(wanted) => text == wanted,
            Pattern::Prefix(wanted) => text.starts_with(wanted.as_str()),
            Pattern::Suffix(wanted) => text.ends_with(wanted.as_str()),
            Pattern::Contains(wanted) => text.contains(wanted.as_str()),
            Pattern::Whole(regex) => regex.is_match(text),
        }
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.pattern, &other.pattern) {
            (Pattern::Exact(a), Pattern::Exact(b))
            | (Pattern::Prefix(a), Pattern::Prefix(b))
            | (Pattern::Suffix(a), Pattern::Suffix(b))
            | (Pattern::Contains(a), Pattern::Contains(b)) => a == b,
            (Pattern::Whole(a), Pattern::Whole(b)) => a.as_str() == b.as_str(),
            _ => false,
        };
        same && self.ignore_case == other.ignore_case
    }
}

impl Eq for Text {}

impl Network {
    /// The first `prefix` bits of `address`.
    pub fn new(address: IpAddr, prefix: u32) -> Result<Self, NetworkError> {
        let most = if address.is_ipv4() { 32 } else { 128 };
        match u8::try_from(prefix) {
            Ok(bits) if prefix <= most => Ok(Self { address, prefix: bits }),
            _ => Err(NetworkError::Prefix { address, prefix }),
        }
    }

    fn contains(&self, ip: IpAddr) -> bool {
        match (self.address, ip.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                (u32::from(network) ^ u32::from(ip)) & mask == 0
            }
            (IpAddr::V6(network), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                (u128::from(network) ^ u128::from(ip)) & mask == 0
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(rules: &Rules, service: &str) -> bool {
        let peer = SpiffeId::service("t.consul", "", "", "dc1", service).expect("valid");
        rules.decide(&Subject { peer: &peer, remote: None, local: None, server_name: None }).allowed
    }

    fn named(service: &str) -> Principal {
        let pattern = format!("^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{service}$");
        Principal::Authenticated(Some(Text::regex(&pattern).expect("a regex")))
    }

    fn rules(effect: Effect, principals: Vec<Principal>) -> Rules {
        Rules::new(effect, [("consul-intentions-layer4".to_owned(), vec![Permission::Any], principals)])
    }

    #[test]
    fn consuls_precedence_in_and_and_not_is_followed() {
        let but = Principal::Not(Box::new(named("web")));
        let set = rules(Effect::Deny, vec![named("api"), Principal::And(vec![named("[^/]+"), but])]);
        assert!(decide(&set, "web"));
        assert!(!decide(&set, "api") && !decide(&set, "other"));
    }

    #[test]
    fn rules_without_policies_do_what_their_action_leaves() {
        assert!(!decide(&Rules::new(Effect::Allow, []), "web"));
        assert!(decide(&Rules::new(Effect::Deny, []), "web"));
        assert!(decide(&rules(Effect::Log, vec![Principal::Any]), "web"));
    }

    #[test]
    fn a_regex_matches_the_whole_name_and_nothing_is_smuggled_out_of_it() {
        let name = |pattern: &str| Text::regex(pattern).expect("a regex");
        assert!(!name("svc").matches("a svc b") && name("a|ab").matches("ab"));
        assert!(matches!(Text::regex("a)|(b"), Err(NetworkError::Regex { .. })));
        assert!(!name("a$").matches("a\n"));
    }

    #[test]
    fn texts_are_matched_as_told() {
        assert!(Text::exact("Ab", true).matches("aB") && !Text::exact("Ab", false).matches("ab"));
        assert!(Text::prefix("spiffe://t", false).matches("spiffe://t.consul") && Text::suffix("/web", false).matches("a/web"));
        assert!(Text::contains("/dc1/", false).matches("x/dc1/y") && !Text::contains("dc2", false).matches("x/dc1/y"));
    }

    #[test]
    fn what_is_not_known_never_lets_in() {
        let net = Network::new("10.0.0.0".parse().expect("an address"), 8).expect("a network");
        let from = Principal::Remote(net);
        let not = Principal::Not(Box::new(from.clone()));
        for principal in [from, not] {
            assert!(!decide(&rules(Effect::Allow, vec![principal.clone()]), "web"), "{principal:?}");
            assert!(!decide(&rules(Effect::Deny, vec![principal.clone()]), "web"), "{principal:?}");
        }
    }

    #[test]
    fn addresses_ports_and_names_are_looked_at_where_known() {
        let peer = SpiffeId::service("t.consul", "", "", "dc1", "web").expect("valid");
        let at = |text: &str| text.parse::<SocketAddr>().ok();
        let subject =
            Subject { peer: &peer, remote: at("[::ffff:10.1.2.3]:9"), local: at("192.0.2.1:443"), server_name: Some("db.x") };
        let net = |text: &str, bits| Network::new(text.parse().expect("an address"), bits).expect("a network");
        assert_eq!(Principal::Remote(net("10.1.0.0", 16)).matches(&subject), Some(true));
        assert_eq!(Principal::Remote(net("10.2.0.0", 16)).matches(&subject), Some(false));
        assert_eq!(Principal::Remote(net("0.0.0.0", 0)).matches(&subject), Some(true));
        assert_eq!(Permission::DestinationPort(443..444).matches(&subject), Some(true));
        assert_eq!(Permission::DestinationIp(net("192.0.2.1", 32)).matches(&subject), Some(true));
        assert_eq!(Permission::ServerName(Text::suffix(".x", false)).matches(&subject), Some(true));
        assert!(Network::new("10.0.0.0".parse().expect("an address"), 33).is_err());
    }
}
