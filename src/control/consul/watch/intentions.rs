//! The intentions of one service, in evaluation order, and what holds when none matches.
//!
//! Only `match` feeds the policy: the list endpoint hides what a token may not see. Consul 1.8 answers `match` without an
//! index; there the list's index is taken first and the set read after it, so that no change falls between.

use std::time::Duration;

use super::{Context, Follower, Name, Spec, Turn, Update};
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Client, Request, Response};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;
use crate::policy::{Action, DefaultPolicy, Intention};

const SPEC: Spec = Spec { class: Class::Policy, style: Style::Index, cached: false };
/// How long a blocked `match` of Consul 1.8 waits.
const LEGACY_WAIT: Duration = Duration::from_secs(60);
/// The same while the default policy is not known, so that its probe is soon repeated.
const UNKNOWN_WAIT: Duration = Duration::from_secs(1);
/// The probe's source: a service that nobody registers, of a trust domain that no cluster has.
const PROBE: &str = "spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/probe/svc/ringfence-default-policy-probe";
/// Its name alone.
const PROBE_NAME: &str = "ringfence-default-policy-probe";

pub(super) async fn watch(cx: &Context, name: &Name) {
    let request = name
        .scope(Request::get(Endpoint::Match, &["connect", "intentions", "match"]))
        .with("by", "destination")
        .with("name", &name.service);
    let mut follower = Follower::new(cx, SPEC, &request);
    let mut default = DefaultPolicy::Unknown;
    loop {
        let was_failing = follower.failing;
        match follower.turn().await {
            Turn::Answer { response, changed } => {
                if changed {
                    match decode(&response, name) {
                        Ok(intentions) => {
                            follower.accept(&response);
                            cx.data(Update::Intentions(intentions)).await;
                        }
                        Err(error) => {
                            follower.went_wrong(&error).await;
                            continue;
                        }
                    }
                }
                if changed || was_failing || default == DefaultPolicy::Unknown {
                    learn_default(cx, name, &response, &mut default).await;
                }
                if response.index.is_some() || follower.failing {
                    follower.went_well(&response).await;
                } else if let Err(error) = follow_unindexed(cx, name, &request, &mut follower, &mut default).await {
                    follower.went_wrong(&error).await;
                }
            }
            Turn::Failed(error) => follower.went_wrong(&error).await,
            Turn::Interrupted => {}
        }
    }
}

/// Consul 1.8: index from the list, set read after it, then a blocked `match` on that index. Returns on the first error.
async fn follow_unindexed(
    cx: &Context,
    name: &Name,
    request: &Request,
    follower: &mut Follower<'_>,
    default: &mut DefaultPolicy,
) -> Result<(), AgentError> {
    let list =
        name.scope(Request::get(Endpoint::IntentionIndex, &["connect", "intentions"])).with("filter", "DestinationName==nosuch");
    loop {
        let index = cx.client.call(&list).await?.index.unwrap_or(0).max(1);
        let current = cx.client.call(request).await?;
        take(cx, name, &current, follower, default).await?;
        let Some(_place) = cx.client.budget().enter(Class::Policy) else {
            follower.went_well(&current).await;
            continue;
        };
        let wait = if *default == DefaultPolicy::Unknown { UNKNOWN_WAIT } else { LEGACY_WAIT };
        let blocked = request.clone().with("index", &index.to_string());
        let answer = tokio::select! {
            answer = cx.client.wait(&blocked, wait) => answer?,
            () = cx.nudge.notified() => continue,
        };
        take(cx, name, &answer, follower, default).await?;
    }
}

async fn take(
    cx: &Context,
    name: &Name,
    response: &Response,
    follower: &mut Follower<'_>,
    default: &mut DefaultPolicy,
) -> Result<(), AgentError> {
    if follower.cursor.observe(response) {
        let intentions = decode(response, name)?;
        follower.accept(response);
        cx.data(Update::Intentions(intentions)).await;
        learn_default(cx, name, response, default).await;
    } else if *default == DefaultPolicy::Unknown {
        // A probe that failed is asked again, or nothing but an intention change would ever end the denial of all.
        learn_default(cx, name, response, default).await;
    }
    Ok(())
}

/// Asks what holds when nothing matches. A header that says deny is believed at once; one that says allow only when the
/// probe cannot answer at all, because it does not show `default_intention_policy`.
async fn learn_default(cx: &Context, name: &Name, response: &Response, default: &mut DefaultPolicy) {
    if *default == DefaultPolicy::Unknown && response.default_allow == Some(false) {
        *default = DefaultPolicy::Deny;
        cx.data(Update::Default(*default)).await;
    }
    let learned = match probe(&cx.client, name).await {
        Ok(Some(policy)) => policy,
        // A wildcard intention covers everything: the default decides nothing, so the careful one will do.
        Ok(None) => DefaultPolicy::Deny,
        Err(AgentError::NotFound { .. } | AgentError::Rejected { .. }) => match response.default_allow {
            Some(true) => DefaultPolicy::Allow,
            Some(false) => DefaultPolicy::Deny,
            None => DefaultPolicy::Unknown,
        },
        // A service that others front: its sidecars may authorize for it, a caller may only ask.
        Err(AgentError::Forbidden { .. }) => match check(&cx.client, name, response).await {
            Ok(policy) => policy,
            Err(error) => {
                tracing::debug!(service = %name.service, %error, "the default policy could not be asked for");
                return;
            }
        },
        Err(error) => {
            tracing::debug!(service = %name.service, %error, "the default policy could not be asked for");
            return;
        }
    };
    if learned != *default {
        *default = learned;
        cx.data(Update::Default(learned)).await;
    }
}

async fn probe(client: &Client, name: &Name) -> Result<Option<DefaultPolicy>, AgentError> {
    let body = serde_json::json!({ "Target": name.service, "ClientCertURI": PROBE, "ClientCertSerial": "00" }).to_string();
    let request = name.scope(Request::post(Endpoint::Authorize, &["agent", "connect", "authorize"], body));
    let answer: wire::Authorized = client.call(&request).await?.json(Endpoint::Authorize)?;
    Ok(default_of(&answer))
}

/// What the probe's source may do, for a token that may only read the service.
async fn check(client: &Client, name: &Name, response: &Response) -> Result<DefaultPolicy, AgentError> {
    // As above: where a wildcard covers everything, the answer would be the wildcard's.
    if decode(response, name)?.iter().any(|intention| intention.source == "*") {
        return Ok(DefaultPolicy::Deny);
    }
    let request = Request::get(Endpoint::Match, &["connect", "intentions", "check"])
        .with("source", PROBE_NAME)
        .with("destination", &name.service);
    let answer: wire::Checked = client.call(&name.scope(request)).await?.json(Endpoint::Match)?;
    Ok(if answer.allowed { DefaultPolicy::Allow } else { DefaultPolicy::Deny })
}

fn default_of(answer: &wire::Authorized) -> Option<DefaultPolicy> {
    let by_default = answer.reason.starts_with("Default") || answer.reason.starts_with("ACLs disabled");
    by_default.then_some(if answer.authorized { DefaultPolicy::Allow } else { DefaultPolicy::Deny })
}

fn decode(response: &Response, name: &Name) -> Result<Vec<Intention>, AgentError> {
    let malformed = |detail: &str| AgentError::Malformed { endpoint: Endpoint::Match, detail: detail.to_owned() };
    let mut answer: std::collections::BTreeMap<String, Option<Vec<wire::Intention>>> = response.json(Endpoint::Match)?;
    // Enterprise may write the name with its namespace; one question has one answer.
    let list = match answer.remove(&name.service) {
        Some(list) => list,
        None if answer.len() == 1 => answer.into_values().next().flatten(),
        None => return Err(malformed("it does not answer for the service asked about")),
    };
    list.unwrap_or_default()
        .into_iter()
        .map(|wire| intention(wire).ok_or_else(|| malformed("an intention without a source")))
        .collect()
}

/// Anything that cannot be judged at L4, or is not understood, keeps the source out.
fn intention(wire: wire::Intention) -> Option<Intention> {
    if wire.source_name.is_empty() {
        return None;
    }
    let action = match wire.action.to_ascii_lowercase().as_str() {
        _ if !wire.permissions.is_empty() => Action::DenyL7,
        "allow" if wire.jwt.is_some_and(|jwt| !jwt.is_null()) => Action::DenyJwt,
        "allow" => Action::Allow,
        _ => Action::Deny,
    };
    // Members of a sameness group are peers and partitions that only Consul knows: an allow for them reaches nobody here.
    let unknowable = action == Action::Allow && !wire.source_sameness_group.is_empty();
    let source_peer = if unknowable { wire.source_sameness_group } else { wire.source_peer };
    Some(Intention {
        id: wire.id,
        source: wire.source_name,
        source_namespace: wire.source_ns,
        source_partition: wire.source_partition,
        source_peer,
        destination: wire.destination_name,
        action,
        precedence: u8::try_from(wire.precedence.clamp(0, 255)).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        Name { service: "warehouse".into(), namespace: String::new(), partition: String::new() }
    }

    fn of(body: &str) -> Result<Vec<Intention>, AgentError> {
        decode(&Response::with_body(body.as_bytes()), &name())
    }

    #[test]
    fn the_capture_keeps_its_order() {
        let list = of(&crate::control::fixture("intentions-match-destination").to_string()).expect("parses");
        let seen: Vec<_> = list.iter().map(|i| (i.source.as_str(), i.action, i.precedence)).collect();
        assert_eq!(seen, [("airflow-reports", Action::Deny, 9), ("airflow-worker", Action::Allow, 9), ("*", Action::Deny, 8)]);
    }

    #[test]
    fn null_is_empty_but_another_service_is_garbage() {
        assert_eq!(of(r#"{"warehouse":null}"#).expect("empty"), []);
        assert_eq!(of(r#"{"default/warehouse":[]}"#).expect("empty"), []);
        for bad in ["{}", "[]", "null", r#"{"a":[],"b":[]}"#, r#"{"warehouse":[{"Action":"allow"}]}"#, "<html>"] {
            assert!(of(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn what_cannot_be_judged_keeps_out() {
        let actions: Vec<_> = of(r#"{"warehouse":[
                {"SourceName":"l7","Permissions":[{"Action":"allow","HTTP":{"PathPrefix":"/"}}],"Precedence":9},
                {"SourceName":"jwt","Action":"allow","JWT":{"Providers":[{"Name":"okta"}]},"Precedence":9},
                {"SourceName":"nojwt","Action":"allow","JWT":null,"Precedence":9},
                {"SourceName":"new","Action":"audit","Precedence":9},
                {"SourceName":"group","Action":"allow","SourceSamenessGroup":"g","Precedence":9},
                {"SourceName":"groupdeny","Action":"deny","SourceSamenessGroup":"g","Precedence":9}]}"#)
        .expect("parses")
        .into_iter()
        .map(|i| (i.action, i.source_peer))
        .collect();
        let none = String::new;
        assert_eq!(
            actions,
            [
                (Action::DenyL7, none()),
                (Action::DenyJwt, none()),
                (Action::Allow, none()),
                (Action::Deny, none()),
                (Action::Allow, "g".into()),
                (Action::Deny, none()),
            ]
        );
    }

    #[test]
    fn the_probe_tells_defaults_from_matches() {
        let of = |authorized, reason: &str| default_of(&wire::Authorized { authorized, reason: reason.into() });
        assert_eq!(of(true, "ACLs disabled, access is allowed by default"), Some(DefaultPolicy::Allow));
        assert_eq!(of(false, "Default behavior configured by ACLs"), Some(DefaultPolicy::Deny));
        assert_eq!(of(true, "Default intention policy"), Some(DefaultPolicy::Allow));
        assert_eq!(of(true, "Matched L4 intention: * => x"), None);
        assert_eq!(of(true, "anything new"), None);
        let capture: wire::Authorized = serde_json::from_value(crate::control::fixture("authorize-deny")).expect("parses");
        assert_eq!(default_of(&capture), None);
    }
}
