//! Who opened a local connection, and under which identity it may speak. Values only: `airflow` finds out, workers enforce.
//!
//! Invariant: an identity is used for a local connection only with a [`Grant`], and a grant names the rule that gave it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Generation;

/// One Airflow task instance's try, as its registration told it and its process proved it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Task {
    /// `dag_id`.
    pub dag: Arc<str>,
    /// `task_id`.
    pub task: Arc<str>,
    /// `run_id`.
    pub run: Arc<str>,
    /// 1 for the first try.
    pub try_number: u32,
    /// -1 when the task is not mapped.
    pub map_index: i32,
    /// The task instance's uuid; empty in Airflow 2.
    pub instance: Arc<str>,
}

/// Who is behind a local connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// A task instance.
    Task(Arc<Task>),
    /// A part of Airflow itself (scheduler, worker, api-server …), by the name that the rules give it.
    Component(Arc<str>),
    /// Nobody known.
    Stranger(Stranger),
}

/// What can be told of a process that is nobody known. For logs; decides nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stranger {
    /// Owner of the socket.
    pub uid: Option<u32>,
    /// A process that holds it.
    pub pid: Option<u32>,
    /// Its command line, cut and cleaned of control characters.
    pub command: Box<str>,
    /// The command names of its parents, nearest first.
    pub ancestry: Box<str>,
}

/// How a connection was attributed, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// The socket was made in the cgroup of a registered task, or of a unit that runs no tasks: a kernel fact.
    Cgroup,
    /// The address that was connected to was leased to this task (the triggerer's one process runs many).
    Lease,
    /// A holder of the socket, or a parent of it, is a registered task's process.
    Ancestor,
    /// A holder is a process of a component, and no parent of it runs a task.
    Component,
    /// The title of the task's supervisor (Airflow 2 without the plugin), where the rules accept it.
    Title,
    /// Not attributed.
    Unidentified,
}

impl Tier {
    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Lease => "lease",
            Self::Ancestor => "ancestor",
            Self::Component => "component",
            Self::Title => "title",
            Self::Unidentified => "unidentified",
        }
    }
}

/// The right to speak as a mesh identity. Made by a rule alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Grant {
    identity: Arc<str>,
    rule: Arc<str>,
}

impl Grant {
    /// `rule` gives `identity`, a Consul service name.
    pub fn by_rule(identity: Arc<str>, rule: Arc<str>) -> Self {
        Self { identity, rule }
    }

    /// The Consul service name to speak as.
    pub fn identity(&self) -> &Arc<str> {
        &self.identity
    }

    /// The rule that gave it.
    pub fn rule(&self) -> &Arc<str> {
        &self.rule
    }
}

/// Why a caller has no identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// The rule that refused, or `default`.
    pub rule: Arc<str>,
    /// Why, for a person.
    pub why: Arc<str>,
    /// What would change it.
    pub remedy: Arc<str>,
}

/// Who, how it is known, and what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Who it is.
    pub who: Who,
    /// How that is known.
    pub tier: Tier,
    /// What the rules say.
    pub verdict: Result<Grant, Refusal>,
}

impl Caller {
    /// The rule that decided.
    pub fn rule(&self) -> &Arc<str> {
        match &self.verdict {
            Ok(grant) => grant.rule(),
            Err(refusal) => &refusal.rule,
        }
    }

    /// The task, if it is one.
    pub fn task(&self) -> Option<&Task> {
        match &self.who {
            Who::Task(task) => Some(task),
            Who::Component(_) | Who::Stranger(_) => None,
        }
    }
}

/// Everybody whom one look-up finds, immutable, published whole.
#[derive(Debug)]
pub struct Callers {
    /// Grows with each publication. Set by `store::Publisher`.
    pub generation: u64,
    /// By cgroup id: the kernel's 64-bit id of the cgroup in which a socket was made.
    pub by_cgroup: HashMap<u64, Arc<Caller>>,
    /// Where redirected connections lead, the first that matches.
    pub routes: Arc<[Route]>,
    /// By the loopback address that was leased.
    pub leases: HashMap<IpAddr, Lease>,
}

/// A loopback address of a task's own: whoever of this user connects to it is that task. A bearer's right, for processes that
/// run many tasks at once.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Whose it is.
    pub caller: Arc<Caller>,
    /// Where it leads.
    pub upstream: Arc<str>,
    /// The user that may use it.
    pub uid: u32,
}

/// An address on the network that an upstream stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// First address of the network.
    pub network: IpAddr,
    /// Leading bits that count.
    pub prefix: u8,
    /// One port, or any.
    pub port: Option<u16>,
    /// The upstream's name.
    pub upstream: Arc<str>,
}

impl Route {
    /// Whether a connection to `destination` takes it.
    pub fn matches(&self, destination: SocketAddr) -> bool {
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => (u128::from(u32::from(ip)) << 96, true),
            IpAddr::V6(ip) => (u128::from(ip), false),
        };
        let ((wanted, wanted_v4), (network, network_v4)) = (bits(destination.ip().to_canonical()), bits(self.network));
        let mask = if self.prefix == 0 { 0 } else { u128::MAX << (128 - u32::from(self.prefix.min(128))) };
        wanted_v4 == network_v4 && (wanted ^ network) & mask == 0 && self.port.is_none_or(|port| port == destination.port())
    }
}

impl Default for Callers {
    fn default() -> Self {
        Self { generation: 0, by_cgroup: HashMap::new(), routes: Arc::from([]), leases: HashMap::new() }
    }
}

impl Generation for Callers {
    fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(network: &str, prefix: u8, port: Option<u16>) -> Route {
        Route { network: network.parse().expect("an address"), prefix, port, upstream: "warehouse".into() }
    }

    #[test]
    fn a_route_takes_its_network_and_port_and_nothing_else() {
        let to = |text: &str| text.parse::<SocketAddr>().expect("an address");
        assert!(route("10.1.0.0", 16, Some(5_432)).matches(to("10.1.2.3:5432")));
        assert!(!route("10.1.0.0", 16, Some(5_432)).matches(to("10.1.2.3:5433")));
        assert!(!route("10.1.0.0", 16, None).matches(to("10.2.0.0:5432")));
        assert!(route("10.1.2.3", 32, None).matches(to("[::ffff:10.1.2.3]:1")), "a v4 client of a v6 socket");
        assert!(!route("10.1.2.3", 32, None).matches(to("10.1.2.4:1")));
        assert!(route("2001:db8::", 32, None).matches(to("[2001:db8:1::1]:1")));
        assert!(route("0.0.0.0", 0, None).matches(to("203.0.113.9:9")) && !route("0.0.0.0", 0, None).matches(to("[::1]:9")));
        assert!(route("::", 0, None).matches(to("[2001:db8::1]:9")) && !route("::1", 128, None).matches(to("[::2]:9")));
    }
}
