//! From what is known to what workers enforce: a pure function of the state and of what was published before.
//!
//! Invariant: a part that did not change is the very same `Arc`. An upstream whose new targets are not all known yet keeps
//! its old ones; one that never had any has none (workers hold its connections). A target whose list is known to be empty
//! is there, without endpoints.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::consul::watch::health::Instance;
use super::consul::watch::{Key, chain, hosts};
use super::definition::{self, App, Definition, Destination};
use super::state::{State, address, chain_ask, health_key};
use crate::config;
use crate::identity::SpiffeId;
use crate::mesh::{Address, Balance, Endpoint, Identity, PublicListener, Service, Target, Upstream};
use crate::policy::{DefaultPolicy, Intentions};

/// Every service that has a definition. `previous` is what was published last.
pub(crate) fn services(state: &State, previous: &[Arc<Service>]) -> Vec<Arc<Service>> {
    let definitions = state.proxies.iter().filter_map(|proxy| proxy.definition.as_ref());
    definitions
        .map(|definition| {
            let old = previous.iter().find(|service| *service.proxy_id == *definition.proxy_id);
            service(state, definition, old)
        })
        .collect()
}

/// The identities that callers may be granted and that have a certificate. The same map when nothing changed.
pub(crate) fn identities(
    state: &State,
    previous: &Arc<HashMap<Arc<str>, Arc<Identity>>>,
) -> Arc<HashMap<Arc<str>, Arc<Identity>>> {
    let next: HashMap<Arc<str>, Arc<Identity>> = state
        .granted
        .names()
        .filter_map(|name| Some((name.service.as_str().into(), Arc::clone(state.identities.current(name)?))))
        .collect();
    let same = next.len() == previous.len()
        && next.iter().all(|(name, identity)| previous.get(name).is_some_and(|old| Arc::ptr_eq(old, identity)));
    if same { Arc::clone(previous) } else { Arc::new(next) }
}

/// Whether none of the services changed.
pub(crate) fn same(a: &[Arc<Service>], b: &[Arc<Service>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn service(state: &State, definition: &Definition, old: Option<&Arc<Service>>) -> Arc<Service> {
    let policy = state.policies.get(&definition.name).map(|policy| Arc::clone(&policy.built));
    let keep_unknown = || {
        let old = old.map(|old| Arc::clone(&old.intentions)).filter(|old| **old == Intentions::unknown());
        old.unwrap_or_else(|| Arc::new(Intentions::unknown()))
    };
    let old_upstreams = old.map_or(&[][..], |old| &old.upstreams);
    let next = Service {
        name: keep_text(old.map(|old| &old.name), &definition.name.service),
        proxy_id: keep_text(old.map(|old| &old.proxy_id), &definition.proxy_id),
        identity: state.identities.current(&definition.name).map(Arc::clone),
        intentions: policy.unwrap_or_else(keep_unknown),
        public: definition
            .public
            .as_ref()
            .and_then(|public| public_listener(state, public))
            .map(|next| keep(next, old.and_then(|old| old.public.as_ref()))),
        upstreams: definition.upstreams.iter().filter_map(|spec| upstream(state, definition, spec, old_upstreams)).collect(),
    };
    match old {
        Some(old) if unchanged(old, &next) => Arc::clone(old),
        _ => Arc::new(next),
    }
}

fn unchanged(old: &Service, next: &Service) -> bool {
    let same = |a: &Option<Arc<_>>, b: &Option<Arc<_>>| match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    old.name == next.name
        && old.proxy_id == next.proxy_id
        && same(&old.identity, &next.identity)
        && Arc::ptr_eq(&old.intentions, &next.intentions)
        && old.public == next.public
        && old.upstreams.len() == next.upstreams.len()
        && old.upstreams.iter().zip(&next.upstreams).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn public_listener(state: &State, public: &definition::Public) -> Option<PublicListener> {
    let app = match &public.app {
        App::Unix(path) => vec![Address::Unix(path.clone())],
        App::Tcp { host, port } => resolve(state, host).into_iter().map(|ip| Address::Tcp(SocketAddr::new(ip, *port))).collect(),
    };
    // A host name that was never resolved: there is no app to let anybody reach.
    (!app.is_empty()).then(|| PublicListener {
        bind: public.bind.clone(),
        app,
        local_connect_timeout: public.local_connect_timeout,
        local_keepalive: public.local_keepalive,
        handshake_timeout: public.handshake_timeout,
        max_inbound_connections: public.max_inbound_connections,
        idle_timeout: public.idle_timeout,
    })
}

fn upstream(
    state: &State,
    definition: &Definition,
    spec: &definition::Upstream,
    old_upstreams: &[Arc<Upstream>],
) -> Option<Arc<Upstream>> {
    if matches!(spec.destination, Destination::Unsupported(_)) {
        return None;
    }
    let spec = state.in_force(spec);
    let old = old_upstreams.iter().find(|old| old.bind == spec.bind && *old.name == *spec.label);
    let old_targets = old.map_or(&[][..], |old| &old.targets);
    let resolved = resolve_targets(state, definition, spec);
    let chain = chain_ask(spec).and_then(|ask| state.chains.get(&ask));
    let (targets, balance, chain_timeout) = match (resolved, old) {
        (Some(targets), _) => {
            let kept = targets.into_iter().map(|next| {
                let old = old_targets.iter().find(|old| old.id == next.id);
                keep(next, old)
            });
            (
                kept.collect(),
                chain.map_or(Balance::RoundRobin, |chain| chain.balance),
                chain.and_then(|chain| chain.connect_timeout),
            )
        }
        (None, Some(old)) => (old.targets.clone(), old.balance, Some(old.connect_timeout)),
        (None, None) => (Vec::new(), Balance::RoundRobin, None),
    };
    let next = Upstream {
        name: keep_text(old.map(|old| &old.name), &spec.label),
        bind: spec.bind.clone(),
        connect_timeout: spec.connect_timeout.or(chain_timeout).unwrap_or(config::CONNECT_TIMEOUT),
        balance: spec.tuning.balance.unwrap_or(balance),
        max_connections: spec.max_connections,
        outlier: spec.outlier,
        idle_timeout: spec.tuning.idle_timeout,
        panic_percent: spec.tuning.panic_percent.unwrap_or(match spec.destination {
            // Consul says nothing of it for these, and 0 for what a chain leads to.
            Destination::Query { .. } => config::PANIC_PERCENT,
            _ => 0,
        }),
        keepalive: spec.tuning.keepalive,
        connect_attempts: spec.tuning.connect_attempts,
        front: None,
        outside: None,
        original: false,
        deny_reply: spec.deny_reply,
        targets,
    };
    // Equal targets are the same `Arc`s by now, so equality of the whole is cheap.
    Some(keep(next, old))
}

/// The targets of an upstream, or `None` while a part of the answer is missing.
fn resolve_targets(state: &State, definition: &Definition, spec: &definition::Upstream) -> Option<Vec<Target>> {
    let own = state.datacenter(definition)?;
    // While a new trust domain has no leaf of ours yet, peers are expected in the one that our identity belongs to.
    let in_use = state.identities.current(&definition.name).map(|identity| &*identity.bundle.trust_domain);
    let trust_domain = in_use.or_else(|| state.identities.trust_domain())?;
    match &spec.destination {
        Destination::Unsupported(_) => None,
        Destination::Query { name, datacenter } => {
            let list = state.instances.get(&Key::Query { name: name.clone(), datacenter: datacenter.clone() })?;
            query_target(state, name, datacenter, list, &own, trust_domain).map(|target| vec![target])
        }
        Destination::Service { .. } => {
            let chain = state.chains.get(&chain_ask(spec)?)?;
            chain.targets.iter().map(|target| chain_target(state, target, &own, trust_domain)).collect()
        }
    }
}

fn chain_target(state: &State, target: &chain::Target, own: &str, trust_domain: &str) -> Option<Target> {
    let list = state.instances.get(&health_key(target))?;
    let name = &target.name;
    let expected = SpiffeId::service(trust_domain, &name.partition, &name.namespace, &target.datacenter, &name.service).ok()?;
    let endpoints = match state.gateway_key(target, own) {
        None => endpoints(state, list, target.only_passing, own),
        Some(gateways) => {
            // The service must be healthy somewhere behind the gateways; which of them is dialed is their own health's matter.
            let alive = list.iter().any(|instance| instance.weight_and_health(target.only_passing).1);
            let mut endpoints = endpoints(state, state.instances.get(&gateways)?, false, own);
            endpoints.iter_mut().for_each(|endpoint| endpoint.healthy &= alive);
            endpoints
        }
    };
    Some(Target {
        id: target.id.as_str().into(),
        sni: target.sni.as_str().into(),
        expected: Arc::from([expected]),
        endpoints: endpoints.into(),
        access: access(state, target),
    })
}

/// Who may call a target, once the whole of it is known: its list and what holds when nothing matches. A fronted service's
/// own intentions are watched anyway; they say nothing about callers where callers are not told apart.
fn access(state: &State, target: &chain::Target) -> Option<Arc<Intentions>> {
    let policy = state.policies.get(&target.name).filter(|_| state.callers_told_apart())?;
    (policy.list.is_some() && policy.default != DefaultPolicy::Unknown).then(|| Arc::clone(&policy.built))
}

/// A prepared query is one target; whoever it names may answer.
fn query_target(state: &State, name: &str, datacenter: &str, list: &[Instance], own: &str, trust_domain: &str) -> Option<Target> {
    let mut expected: Vec<SpiffeId> = list
        .iter()
        .filter_map(|instance| {
            let of = &instance.name;
            SpiffeId::service(trust_domain, &of.partition, &of.namespace, &instance.datacenter, &of.service).ok()
        })
        .collect();
    expected.sort();
    expected.dedup();
    let datacenter = if datacenter.is_empty() { own } else { datacenter };
    Some(Target {
        id: format!("prepared_query:{name}").into(),
        sni: format!("{name}.default.{datacenter}.query.{trust_domain}").into(),
        expected: expected.into(),
        endpoints: endpoints(state, list, false, own).into(),
        access: None,
    })
}

fn endpoints(state: &State, list: &[Instance], only_passing: bool, own: &str) -> Vec<Endpoint> {
    let mut endpoints: Vec<Endpoint> = Vec::with_capacity(list.len());
    for instance in list {
        let (host, port) = address(instance, own);
        let (weight, healthy) = instance.weight_and_health(only_passing);
        for ip in resolve(state, host) {
            let address = SocketAddr::new(ip, *port);
            match endpoints.iter_mut().find(|known| known.address == address) {
                // Two registrations of one address: alive if either is.
                Some(known) => {
                    known.healthy |= healthy;
                    known.weight = known.weight.max(weight);
                }
                None => endpoints.push(Endpoint { address, weight, healthy }),
            }
        }
    }
    endpoints
}

fn resolve(state: &State, host: &str) -> Vec<IpAddr> {
    if let Ok(ip) = host.parse() {
        return vec![ip];
    }
    if host == "localhost" {
        return vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    }
    state.hosts.get(host).map(|ips| ips.iter().copied().take(hosts::ADDRESSES_MAX).collect()).unwrap_or_default()
}

/// The old `Arc` where the value did not change.
pub(super) fn keep<T: PartialEq>(next: T, old: Option<&Arc<T>>) -> Arc<T> {
    match old {
        Some(old) if **old == next => Arc::clone(old),
        _ => Arc::new(next),
    }
}

pub(super) fn keep_text(old: Option<&Arc<str>>, next: &str) -> Arc<str> {
    match old {
        Some(old) if **old == *next => Arc::clone(old),
        _ => next.into(),
    }
}

#[cfg(test)]
mod tests;
