//! `envoy.filters.network.rbac` to [`network::Rules`].
//!
//! Invariant: what cannot be judged at L4 (headers, paths, metadata, JWTs, CEL) refuses the listener by name; nothing is left
//! out of a policy. Pure.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as Filter;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;

use super::refusal::Refusal;
use crate::policy::network::{Effect, Network, NetworkError, Permission, Principal, Rules, Text};

const L7: &str = "L4 connections have no such thing: expected principals by certificate or address";

/// What the filter enforces; `None` where it only shadows.
pub(super) fn rules(filter: &Filter) -> Result<Option<Rules>, Refusal> {
    if filter.matcher.is_some() {
        return Err(Refusal::new("matcher", "present", "expected rules"));
    }
    let Some(rules) = &filter.rules else { return Ok(None) };
    let effect = match pb::rbac::Action::try_from(rules.action) {
        Ok(pb::rbac::Action::Allow) => Effect::Allow,
        Ok(pb::rbac::Action::Deny) => Effect::Deny,
        Ok(pb::rbac::Action::Log) => Effect::Log,
        Err(_) => return Err(Refusal::new("rules.action", rules.action, "expected ALLOW, DENY or LOG")),
    };
    let policies = rules.policies.iter().map(|(name, policy)| {
        let parsed = parse(policy).map_err(|why| why.under(&format!("rules.policies[{name}]")))?;
        Ok((name.clone(), parsed.0, parsed.1))
    });
    Ok(Some(Rules::new(effect, policies.collect::<Result<Vec<_>, _>>()?)))
}

fn parse(policy: &pb::Policy) -> Result<(Vec<Permission>, Vec<Principal>), Refusal> {
    if policy.condition.is_some() || policy.checked_condition.is_some() {
        return Err(Refusal::new("condition", "present", "CEL is not evaluated: expected permissions and principals"));
    }
    Ok((each(&policy.permissions, "permissions", permission)?, each(&policy.principals, "principals", principal)?))
}

/// At least one, as Envoy wants it: all of none would be everybody.
fn each<T, P>(list: &[T], field: &str, parse: fn(&T) -> Result<P, Refusal>) -> Result<Vec<P>, Refusal> {
    if list.is_empty() {
        return Err(Refusal::new(field, "empty", "expected one or more"));
    }
    let parsed = list.iter().enumerate().map(|(index, one)| parse(one).map_err(|why| why.under(&format!("{field}[{index}]"))));
    parsed.collect()
}

#[expect(deprecated, reason = "what is refused must be named, old fields too")]
fn permission(message: &pb::Permission) -> Result<Permission, Refusal> {
    use pb::permission::Rule;
    match &message.rule {
        None => Err(Refusal::missing("rule", "expected a permission")),
        Some(Rule::Any(true)) => Ok(Permission::Any),
        Some(Rule::Any(false)) => Err(Refusal::new("any", "false", "expected true")),
        Some(Rule::AndRules(set)) => each(&set.rules, "and_rules.rules", permission).map(Permission::And),
        Some(Rule::OrRules(set)) => each(&set.rules, "or_rules.rules", permission).map(Permission::Or),
        Some(Rule::NotRule(rule)) => {
            permission(rule).map(|rule| Permission::Not(Box::new(rule))).map_err(|why| why.under("not_rule"))
        }
        Some(Rule::DestinationIp(range)) => network(range, "destination_ip").map(Permission::DestinationIp),
        Some(Rule::DestinationPort(port)) => Ok(Permission::DestinationPort(*port..port.saturating_add(1))),
        Some(Rule::DestinationPortRange(range)) => {
            let bound = |number: i32| u32::try_from(number).unwrap_or(0);
            Ok(Permission::DestinationPort(bound(range.start)..bound(range.end)))
        }
        Some(Rule::RequestedServerName(name)) => text(name, "requested_server_name").map(Permission::ServerName),
        Some(Rule::Header(header)) => Err(Refusal::new("header", &header.name, L7)),
        Some(Rule::UrlPath(_)) => Err(Refusal::new("url_path", "present", L7)),
        Some(Rule::Metadata(_) | Rule::SourcedMetadata(_)) => Err(Refusal::new("metadata", "present", L7)),
        Some(Rule::Matcher(extension)) => Err(Refusal::new("matcher", &extension.name, L7)),
        Some(Rule::UriTemplate(extension)) => Err(Refusal::new("uri_template", &extension.name, L7)),
    }
}

#[expect(deprecated, reason = "Consul and others still send them")]
fn principal(message: &pb::Principal) -> Result<Principal, Refusal> {
    use pb::principal::Identifier;
    match &message.identifier {
        None => Err(Refusal::missing("identifier", "expected a principal")),
        Some(Identifier::Any(true)) => Ok(Principal::Any),
        Some(Identifier::Any(false)) => Err(Refusal::new("any", "false", "expected true")),
        Some(Identifier::AndIds(set)) => each(&set.ids, "and_ids.ids", principal).map(Principal::And),
        Some(Identifier::OrIds(set)) => each(&set.ids, "or_ids.ids", principal).map(Principal::Or),
        Some(Identifier::NotId(id)) => principal(id).map(|id| Principal::Not(Box::new(id))).map_err(|why| why.under("not_id")),
        Some(Identifier::Authenticated(who)) => {
            let name = who.principal_name.as_ref().map(|name| text(name, "authenticated.principal_name"));
            name.transpose().map(Principal::Authenticated)
        }
        // Without PROXY protocol and forwarded headers the three are one address.
        Some(Identifier::SourceIp(range)) => network(range, "source_ip").map(Principal::Remote),
        Some(Identifier::DirectRemoteIp(range)) => network(range, "direct_remote_ip").map(Principal::Remote),
        Some(Identifier::RemoteIp(range)) => network(range, "remote_ip").map(Principal::Remote),
        Some(Identifier::Header(header)) => Err(Refusal::new("header", &header.name, L7)),
        Some(Identifier::UrlPath(_)) => Err(Refusal::new("url_path", "present", L7)),
        Some(Identifier::Metadata(_) | Identifier::SourcedMetadata(_)) => Err(Refusal::new("metadata", "present (a JWT)", L7)),
        Some(Identifier::FilterState(state)) => Err(Refusal::new("filter_state", &state.key, L7)),
        Some(Identifier::Custom(extension)) => Err(Refusal::new("custom", &extension.name, L7)),
    }
}

/// Whether it is about the address that forwarded headers tell, where there are such.
pub(super) fn names_remote_ip(principal: &pb::Principal) -> bool {
    use pb::principal::Identifier;
    match &principal.identifier {
        Some(Identifier::RemoteIp(_)) => true,
        Some(Identifier::AndIds(set) | Identifier::OrIds(set)) => set.ids.iter().any(names_remote_ip),
        Some(Identifier::NotId(id)) => names_remote_ip(id),
        _ => false,
    }
}

fn network(range: &CidrRange, field: &str) -> Result<Network, Refusal> {
    let address: IpAddr = range
        .address_prefix
        .parse()
        .map_err(|_| Refusal::new(format!("{field}.address_prefix"), &range.address_prefix, "expected an IP address"))?;
    let prefix = range.prefix_len.as_ref().map_or(0, |length| length.value);
    Network::new(address, prefix).map_err(|why| Refusal::new(format!("{field}.prefix_len"), prefix, why.to_string()))
}

fn text(message: &matcher::StringMatcher, field: &str) -> Result<Text, Refusal> {
    use matcher::string_matcher::MatchPattern;
    let ignore_case = message.ignore_case;
    match &message.match_pattern {
        Some(MatchPattern::Exact(text)) => Ok(Text::exact(text, ignore_case)),
        Some(MatchPattern::Prefix(text)) => Ok(Text::prefix(text, ignore_case)),
        Some(MatchPattern::Suffix(text)) => Ok(Text::suffix(text, ignore_case)),
        Some(MatchPattern::Contains(text)) => Ok(Text::contains(text, ignore_case)),
        Some(MatchPattern::SafeRegex(regex)) => Text::regex(&regex.regex)
            .map_err(|why: NetworkError| Refusal::new(format!("{field}.safe_regex.regex"), why, "expected RE2's syntax")),
        Some(MatchPattern::Custom(custom)) => {
            Err(Refusal::new(format!("{field}.custom"), &custom.name, "expected exact, prefix, suffix, contains or safe_regex"))
        }
        None => Err(Refusal::missing(field, "expected exact, prefix, suffix, contains or safe_regex")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::identity::SpiffeId;
    use crate::policy::Intentions;

    /// The filter that Consul makes of one policy.
    pub(in super::super) fn filter(action: pb::rbac::Action, principals: Vec<pb::Principal>) -> Filter {
        let any = pb::Permission { rule: Some(pb::permission::Rule::Any(true)) };
        let policy = pb::Policy { permissions: vec![any], principals, ..pb::Policy::default() };
        let policies = if policy.principals.is_empty() { vec![] } else { vec![("consul-intentions-layer4".to_owned(), policy)] };
        let rules = pb::Rbac { action: action as i32, policies: policies.into_iter().collect(), ..pb::Rbac::default() };
        Filter { rules: Some(rules), stat_prefix: "connect_authz".into(), ..Filter::default() }
    }

    pub(in super::super) fn named(service: &str) -> pb::Principal {
        let regex = matcher::RegexMatcher {
            regex: format!("^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{service}$"),
            ..matcher::RegexMatcher::default()
        };
        let pattern = matcher::string_matcher::MatchPattern::SafeRegex(regex);
        let name = matcher::StringMatcher { match_pattern: Some(pattern), ..matcher::StringMatcher::default() };
        let who = pb::principal::Authenticated { principal_name: Some(name) };
        pb::Principal { identifier: Some(pb::principal::Identifier::Authenticated(who)) }
    }

    fn decide(filter: &Filter, service: &str) -> Result<String, String> {
        let intentions = Intentions::from_filters(rules(filter).expect("fine").into_iter().collect());
        let peer = SpiffeId::service("t.consul", "", "", "dc1", service).expect("valid");
        intentions.decide(&peer).map(|proof| proof.by().to_string()).map_err(|denied| denied.by.to_string())
    }

    #[test]
    fn a_decision_names_the_policy() {
        let deny = filter(pb::rbac::Action::Deny, vec![named("web")]);
        assert_eq!(decide(&deny, "web"), Err("RBAC policy consul-intentions-layer4 (deny)".into()));
        assert_eq!(decide(&deny, "api"), Ok("RBAC no policy matched (rules deny)".into()));
        let allow = filter(pb::rbac::Action::Allow, vec![named("web")]);
        assert_eq!(decide(&allow, "web"), Ok("RBAC policy consul-intentions-layer4 (allow)".into()));
        assert!(decide(&allow, "api").is_err());
    }

    #[test]
    fn empty_rules_deny_and_absent_rules_do_not() {
        let mut empty = filter(pb::rbac::Action::Allow, vec![]);
        assert!(decide(&empty, "web").is_err());
        empty.rules = None;
        assert!(decide(&empty, "web").is_ok());
    }

    #[test]
    fn a_set_of_nobody_is_refused_where_it_would_be_everybody() {
        let set = pb::principal::Set { ids: Vec::new() };
        let nobody = pb::Principal { identifier: Some(pb::principal::Identifier::AndIds(set)) };
        let told = rules(&filter(pb::rbac::Action::Allow, vec![nobody])).expect_err("refused").to_string();
        assert!(told.contains("principals[0].and_ids.ids: empty"), "{told}");
    }

    #[test]
    fn what_l4_cannot_judge_is_refused_by_its_place() {
        let header = pb::Principal { identifier: Some(pb::principal::Identifier::Header(Default::default())) };
        let not = pb::Principal { identifier: Some(pb::principal::Identifier::NotId(Box::new(header))) };
        let told = rules(&filter(pb::rbac::Action::Allow, vec![named("web"), not])).expect_err("refused").to_string();
        assert!(told.starts_with("rules.policies[consul-intentions-layer4].principals[1].not_id.header: "), "{told}");
    }
}
