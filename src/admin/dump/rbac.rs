//! Intentions as the network RBAC filter that Consul would send for them.
//!
//! Invariant: the filter decides as the intentions do. The first that matches a source wins there and there is no order
//! here, so each policy excludes the sources of those before it that say the opposite.

use serde_json::{Value, json};

use crate::policy::{Action, DefaultPolicy, Intention, Intentions};

const FILTER: &str = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC";

/// `envoy.filters.network.rbac`.
pub(super) fn filter(intentions: &Intentions) -> Value {
    json!({"name": "envoy.filters.network.rbac", "typed_config": {
        "@type": FILTER,
        "rules": rules(intentions),
        "stat_prefix": "connect_authz",
    }})
}

fn rules(intentions: &Intentions) -> Value {
    // The default needs no policy: those that differ from it are listed.
    let allows_by_default = intentions.default_policy() == DefaultPolicy::Allow;
    let ordered: Vec<&Intention> = intentions.ordered().iter().filter(|one| one.source_peer.is_empty()).collect();
    let differs = |intention: &Intention| (intention.action == Action::Allow) != allows_by_default;
    let principals: Vec<Value> = ordered
        .iter()
        .enumerate()
        .filter(|(_, intention)| differs(intention))
        .map(|(at, intention)| {
            let before = ordered[..at].iter().filter(|before| !differs(before));
            let others: Vec<Value> = before.map(|before| json!({"not_id": source(before)})).collect();
            if others.is_empty() {
                return source(intention);
            }
            let ids: Vec<Value> = std::iter::once(source(intention)).chain(others).collect();
            json!({"and_ids": {"ids": ids}})
        })
        .collect();
    let mut rules = json!({});
    if allows_by_default {
        rules["action"] = json!("DENY");
    }
    if !principals.is_empty() {
        rules["policies"] = json!({"consul-intentions-layer4": {"permissions": [{"any": true}], "principals": principals}});
    }
    rules
}

/// Whoever presents the SPIFFE ID of the intention's source.
fn source(intention: &Intention) -> Value {
    let part = |text: &str| match text {
        "*" => "[^/]+".to_owned(),
        "" => "default".to_owned(),
        text => regex::escape(text),
    };
    let partition = match intention.source_partition.as_str() {
        "" | "default" => String::new(),
        name => format!("/ap/{}", part(name)),
    };
    let (namespace, service) = (part(&intention.source_namespace), part(&intention.source));
    let regex = format!("^spiffe://[^/]+{partition}/ns/{namespace}/dc/[^/]+/svc/{service}$");
    json!({"authenticated": {"principal_name": {"safe_regex": {"regex": regex}}}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intention(source: &str, action: Action, precedence: u8) -> Intention {
        Intention {
            id: String::new(),
            source: source.into(),
            source_namespace: String::new(),
            source_partition: String::new(),
            source_peer: String::new(),
            destination: "db".into(),
            action,
            precedence,
        }
    }

    /// What the filter decides, read as Envoy reads it.
    fn lets_in(rules: &Value, id: &str) -> bool {
        fn holds(principal: &Value, id: &str) -> bool {
            if let Some(ids) = principal["and_ids"]["ids"].as_array() {
                return ids.iter().all(|one| holds(one, id));
            }
            if principal.get("not_id").is_some() {
                return !holds(&principal["not_id"], id);
            }
            let regex = principal["authenticated"]["principal_name"]["safe_regex"]["regex"].as_str().expect("a regex");
            regex::Regex::new(regex).expect("valid").is_match(id)
        }
        let principals = rules["policies"]["consul-intentions-layer4"]["principals"].as_array();
        let matched = principals.is_some_and(|list| list.iter().any(|principal| holds(principal, id)));
        matched != (rules["action"] == "DENY")
    }

    #[test]
    fn the_filter_decides_as_the_intentions_do() {
        use Action::{Allow, Deny, DenyL7};
        let lists = [
            vec![],
            vec![intention("web", Allow, 9)],
            vec![intention("web", Deny, 9), intention("*", Allow, 8)],
            vec![intention("web", Allow, 9), intention("*", Deny, 8)],
            vec![intention("a.b", DenyL7, 9), intention("web", Allow, 9), intention("*", Deny, 8)],
        ];
        for list in lists {
            for default in [DefaultPolicy::Allow, DefaultPolicy::Deny, DefaultPolicy::Unknown] {
                let intentions = Intentions::new(list.clone(), default);
                let rules = rules(&intentions);
                for name in ["web", "api", "a.b", "axb"] {
                    let id = crate::identity::SpiffeId::service("t.consul", "", "", "dc1", name).expect("valid");
                    let wanted = intentions.decide(&id).is_ok();
                    assert_eq!(lets_in(&rules, id.as_str()), wanted, "{name} with {list:?}, {default:?}: {rules}");
                }
            }
        }
    }
}
