//! The routes of one router, arranged in the order in which a connection is matched.
//!
//! Invariant: two routes never stand at the same place. Looking a connection up allocates nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Network, RouterError, RouterSettings, Seen, ServerName};

/// By destination port; `None` stands for every port that is not named.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<Option<u16>, Ports>);

/// What is wanted of one port.
#[derive(Debug, Default)]
struct Ports {
    /// The longest prefix first.
    networks: Vec<(Network, Names)>,
    /// Every address that is in none of them.
    anywhere: Option<Names>,
}

/// By server name: exact names, suffixes with their leading dot, and any.
#[derive(Debug, Default)]
struct Names {
    named: HashMap<Arc<str>, Protocols>,
    any: Option<Protocols>,
}

/// By what is spoken.
#[derive(Debug, Default)]
struct Protocols {
    tls: Option<usize>,
    raw: Option<usize>,
    either: Option<usize>,
}

impl Table {
    pub(super) fn new(settings: &RouterSettings) -> Result<Self, RouterError> {
        let mut table = Self::default();
        for (place, route) in settings.routes.iter().enumerate() {
            for (port, network, name, tls) in route.matches.places() {
                let ports = table.0.entry(port).or_default();
                let wanted = ports.names(network).protocols(name).of(tls);
                if let Some(first) = *wanted {
                    return Err(RouterError::Overlap {
                        router: Arc::clone(&settings.name),
                        first: Arc::clone(&settings.routes[first].name),
                        second: Arc::clone(&route.name),
                        what: format!("{:?}", route.matches),
                    });
                }
                *wanted = Some(place);
            }
        }
        for ports in table.0.values_mut() {
            ports.networks.sort_by_key(|(network, _)| std::cmp::Reverse(network.prefix));
        }
        Ok(table)
    }

    pub(super) fn find(&self, seen: &Seen<'_>) -> Option<usize> {
        let port = seen.destination.map(|destination| destination.port());
        let ports = port.and_then(|port| self.0.get(&Some(port))).or_else(|| self.0.get(&None))?;
        let names = ports.find(seen.destination.map(|destination| destination.ip()))?;
        names.find(seen.server_name.unwrap_or_default())?.find(seen.tls)
    }
}

impl Ports {
    fn names(&mut self, network: Option<Network>) -> &mut Names {
        let Some(network) = network else { return self.anywhere.get_or_insert_default() };
        let at = self.networks.iter().position(|(known, _)| *known == network).unwrap_or_else(|| {
            self.networks.push((network, Names::default()));
            self.networks.len() - 1
        });
        &mut self.networks[at].1
    }

    fn find(&self, ip: Option<IpAddr>) -> Option<&Names> {
        let within = ip.and_then(|ip| self.networks.iter().find(|(network, _)| network.contains(ip)));
        within.map(|(_, names)| names).or(self.anywhere.as_ref())
    }
}

impl Names {
    fn protocols(&mut self, name: Option<&ServerName>) -> &mut Protocols {
        match name {
            Some(ServerName::Exact(name) | ServerName::Under(name)) => self.named.entry(Arc::clone(name)).or_default(),
            None => self.any.get_or_insert_default(),
        }
    }

    fn find(&self, name: &str) -> Option<&Protocols> {
        let suffixes = || {
            let dots = name.char_indices().skip(1).filter(|(_, c)| *c == '.').map(|(at, _)| at);
            dots.filter_map(|at| self.named.get(&name[at..])).next()
        };
        self.named.get(name).or_else(suffixes).or(self.any.as_ref())
    }
}

impl Protocols {
    fn of(&mut self, tls: Option<bool>) -> &mut Option<usize> {
        match tls {
            Some(true) => &mut self.tls,
            Some(false) => &mut self.raw,
            None => &mut self.either,
        }
    }

    fn find(&self, tls: bool) -> Option<usize> {
        if tls { self.tls } else { self.raw }.or(self.either)
    }
}
