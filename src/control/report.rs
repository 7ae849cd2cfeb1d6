//! What the control plane says of itself, computed from the state.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::consul::watch::Key;
use super::definition::{Definition, Destination};
use super::state::{Proxy, State, chain_ask, health_key};
use super::{ServiceStatus, StatsWishes, Status};
use crate::config;
use crate::config::envoy::{AccessLog, PageListener};
use crate::policy::DefaultPolicy;
use crate::telemetry::stats::Told;

/// Problems of one proxy that are shown; the rest is counted.
const PROBLEMS_MAX: usize = 6;

/// The status now, but for what is counted of snapshots. Marks proxies that are complete for the first time, once all that is known
/// is also published.
pub(crate) fn status(state: &mut State, published: bool, agent_reachable: bool, wall: SystemTime) -> Status {
    let complete: Vec<bool> = state.proxies.iter().map(|proxy| is_complete(state, proxy)).collect();
    for (proxy, complete) in state.proxies.iter_mut().zip(complete) {
        proxy.was_ready |= complete && published;
    }
    let services: Vec<ServiceStatus> = (0..state.proxies.len()).map(|index| service_status(state, index, wall)).collect();
    Status {
        ready: state.proxies.iter().all(|proxy| proxy.was_ready),
        agent_reachable,
        services,
        access_logs: access_logs(state),
        stats: stats_wishes(state),
        told: Told::default(),
    }
}

/// What the registrations ask for, each log once.
fn access_logs(state: &State) -> Vec<AccessLog> {
    let mut logs: Vec<AccessLog> = Vec::new();
    let definitions = state.proxies.iter().filter_map(|proxy| proxy.definition.as_ref());
    let all = definitions.flat_map(|definition| {
        let of_upstreams = definition.upstreams.iter().flat_map(|upstream| &state.in_force(upstream).access_logs);
        definition.access_logs.iter().chain(of_upstreams)
    });
    for log in all {
        if !logs.contains(log) {
            logs.push(log.clone());
        }
    }
    logs
}

fn stats_wishes(state: &State) -> StatsWishes {
    let mut wishes = StatsWishes::default();
    for of_one in state.proxies.iter().filter_map(|proxy| proxy.definition.as_ref()).map(|definition| &definition.stats) {
        wishes.add(of_one);
    }
    wishes
}

fn is_complete(state: &State, proxy: &Proxy) -> bool {
    let Some(definition) = &proxy.definition else { return false };
    let policy_known = definition.public.is_none()
        || state
            .policies
            .get(&definition.name)
            .is_some_and(|policy| policy.list.is_some() && policy.default != DefaultPolicy::Unknown);
    proxy.refusal.is_none() && policy_known && state.identities.current(&definition.name).is_some()
}

fn service_status(state: &State, index: usize, wall: SystemTime) -> ServiceStatus {
    let proxy = &state.proxies[index];
    let definition = proxy.definition.as_ref();
    let svid = definition.and_then(|definition| state.identities.current(&definition.name)).map(|identity| &identity.svid);
    let source = match &proxy.source {
        config::Proxy::SidecarFor(id) | config::Proxy::ProxyId(id) => id.as_str(),
        config::Proxy::Service(flags) => flags.name.as_str(),
    };
    ServiceStatus {
        proxy_id: definition.map_or(source, |definition| definition.proxy_id.as_str()).into(),
        service: definition.map(|definition| definition.name.service.as_str().into()),
        spiffe_id: svid.map(|svid| svid.id.to_string()),
        leaf_serial: svid.map(|svid| svid.serial.clone()),
        leaf_not_after: svid.map(|svid| svid.not_after),
        rotations: definition.map_or(0, |definition| state.identities.rotations(&definition.name)),
        pages: definition.map(|definition| pages(state, definition)).unwrap_or_default(),
        problem: problem(state, index, wall),
    }
}

fn pages(state: &State, definition: &Definition) -> Vec<PageListener> {
    let mut pages = definition.pages.clone();
    if let Some(checks) = &definition.checks {
        let exposed = state.checks.get(&checks.ask).into_iter().flat_map(BTreeMap::values);
        checks.add_to(&mut pages, exposed);
    }
    pages
}

fn problem(state: &State, index: usize, wall: SystemTime) -> Option<String> {
    let proxy = &state.proxies[index];
    let mut found: Vec<String> = proxy.refusal.iter().map(|why| format!("the registration is refused: {why}")).collect();
    let trouble = |key: &Key| state.troubles.get(key).cloned();
    found.extend([Key::Token, Key::Definition(index), Key::Roots, Key::Mesh].iter().filter_map(trouble));
    match &proxy.definition {
        Some(definition) => definition_problems(state, definition, wall, &mut found),
        None if found.is_empty() => found.push("waiting for the registration".to_owned()),
        None => {}
    }
    found.dedup();
    let more = found.len().saturating_sub(PROBLEMS_MAX);
    found.truncate(PROBLEMS_MAX);
    if more > 0 {
        found.push(format!("and {more} more"));
    }
    (!found.is_empty()).then(|| found.join("; "))
}

fn definition_problems(state: &State, definition: &Definition, wall: SystemTime, found: &mut Vec<String>) {
    let name = &definition.name;
    let trouble = |key: Key| state.troubles.get(&key).cloned();
    found.extend(trouble(Key::Leaf(name.clone())));
    found.extend(state.identities.problem(name, wall));
    if definition.public.is_some() {
        found.extend(trouble(Key::Intentions(name.clone())));
    }
    if let Some(checks) = &definition.checks {
        found.extend(trouble(Key::Checks(checks.ask.clone())));
    }
    for upstream in &definition.upstreams {
        let mut notes = Vec::new();
        if !std::ptr::eq(state.in_force(upstream), upstream) {
            notes.push("a discovery chain is configured for it, so its escape hatches do not hold, as in Consul".to_owned());
        }
        match &upstream.destination {
            Destination::Unsupported(why) => notes.push(why.clone()),
            Destination::Query { name, datacenter } => {
                notes.extend(trouble(Key::Query { name: name.clone(), datacenter: datacenter.clone() }));
            }
            Destination::Service { .. } => {
                let Some(ask) = chain_ask(upstream) else { continue };
                if let Some(chain) = state.chains.get(&ask) {
                    notes.extend(chain.notes.iter().cloned());
                    notes.extend(chain.targets.iter().filter_map(|target| trouble(health_key(target))));
                }
                notes.extend(trouble(Key::Chain(ask)));
            }
        }
        found.extend(notes.into_iter().map(|note| format!("upstream {}: {note}", upstream.label)));
    }
    if found.is_empty() && state.identities.current(name).is_none() {
        found.push("waiting for the first certificate".to_owned());
    }
}
