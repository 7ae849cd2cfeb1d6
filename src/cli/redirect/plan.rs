//! Whose traffic is redirected where, and what else may leave the host: everything that the table is made of.
//!
//! Invariant: a plan can be loaded. Each redirected network has a listener of its address family, none lies on loopback, and
//! nobody whose traffic is redirected serves such a listener. Reads no file; asks the kernel who serves the listeners.

use std::net::SocketAddr;

use super::cgroup::Cgroup;
use super::network::{Allow, Network};
use crate::app::AppError;
use crate::mesh::caller::Route;
use crate::sys::{SocketDiag, SocketOwner};

const REDIRECT_REMEDY: &str = "add redirect = [\"127.0.0.1:15001\"] to them, and [[route]] tables with to, port and upstream";
const ROUTE_REMEDY: &str = "add at least one:\n  [[route]]\n  to = [\"10.1.2.3\"]\n  port = 5432\n  upstream = \"warehouse\"";

/// Whose traffic is meant: of any of these.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Selection {
    /// Owners of sockets, sorted.
    pub(super) users: Vec<u32>,
    /// Where sockets were made.
    pub(super) cgroups: Vec<Cgroup>,
}

/// A network of the outside world and the listener that stands for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Redirection {
    pub(super) network: Network,
    pub(super) port: Option<u16>,
    pub(super) listener: SocketAddr,
    pub(super) upstream: String,
}

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) selection: Selection,
    pub(super) redirections: Vec<Redirection>,
    /// What the selection may still reach outside; `None` leaves all of it open.
    pub(super) lock: Option<Vec<Allow>>,
}

impl Plan {
    /// Puts the rules file's routes to its listeners. `file` names it in errors.
    pub(super) fn new(
        file: &str,
        listeners: &[SocketAddr],
        routes: &[Route],
        selection: Selection,
        lock: Option<Vec<Allow>>,
    ) -> Result<Self, AppError> {
        let wrong = |what: String| Err(AppError::Config(format!("{file}: {what}")));
        if listeners.is_empty() {
            return wrong(format!("the rules have no `redirect` listener; {REDIRECT_REMEDY}"));
        }
        if routes.is_empty() {
            return wrong(format!("the rules have no [[route]], so there is nothing to redirect; {ROUTE_REMEDY}"));
        }
        let mut redirections: Vec<Redirection> = Vec::new();
        for route in routes {
            let Some(network) = Network::new(route.network, route.prefix) else { continue };
            if network.is_loopback() {
                return wrong(format!(
                    "[[route]] to {network}: loopback is never redirected; let clients use the own listener of upstream \"{}\"",
                    route.upstream
                ));
            }
            let Some(listener) = listeners.iter().find(|listener| listener.is_ipv4() == network.is_ipv4()) else {
                let (family, example) = if network.is_ipv4() { ("IPv4", "127.0.0.1:15001") } else { ("IPv6", "[::1]:15001") };
                return wrong(format!("[[route]] to {network} needs a listener of {family}; add \"{example}\" to `redirect`"));
            };
            // A network of an earlier route is that route's, as in the listener.
            if redirections.iter().any(|known| (known.network, known.port) == (network, route.port)) {
                continue;
            }
            let upstream = route.upstream.to_string();
            redirections.push(Redirection { network, port: route.port, listener: *listener, upstream });
        }
        Ok(Self { selection, redirections, lock })
    }

    /// The listeners in use, each once.
    fn listeners(&self) -> Vec<SocketAddr> {
        let mut listeners: Vec<_> = self.redirections.iter().map(|redirection| redirection.listener).collect();
        listeners.sort_unstable();
        listeners.dedup();
        listeners
    }

    /// Refuses a plan under which the process that serves a listener would be redirected to itself. Gives the listeners that
    /// nobody serves now.
    pub(super) fn refuse_loop(&self) -> Result<Vec<SocketAddr>, AppError> {
        let mut diag = SocketDiag::open().ok();
        let mut unserved = Vec::new();
        for listener in self.listeners() {
            match diag.as_mut().and_then(|diag| diag.listener(listener)) {
                Some(owner) => self.selection.refuse_server(listener, &owner)?,
                None => unserved.push(listener),
            }
        }
        Ok(unserved)
    }
}

impl Selection {
    /// Refuses a selection that holds `owner`, who serves `listener`.
    fn refuse_server(&self, listener: SocketAddr, owner: &SocketOwner) -> Result<(), AppError> {
        let refuse = |flag: String, remedy: &str| {
            Err(AppError::Config(format!(
                "{flag} has the process that listens at {listener}: its own connections would come back to it; {remedy}"
            )))
        };
        if self.users.contains(&owner.uid) {
            return refuse(format!("-user {}", owner.uid), "run ringfence as root, as its unit does, or as a user of its own");
        }
        match self.cgroups.iter().find(|cgroup| cgroup.holds(owner.cgroup)) {
            Some(cgroup) => refuse(format!("-cgroup {cgroup}"), "name the cgroups of Airflow's units alone"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn route(network: &str, prefix: u8, port: Option<u16>, upstream: &str) -> Route {
        Route { network: network.parse().expect("an address"), prefix, port, upstream: upstream.into() }
    }

    fn plan(listeners: &[&str], routes: &[Route]) -> Result<Plan, String> {
        let listeners: Vec<SocketAddr> = listeners.iter().map(|text| text.parse().expect("an address")).collect();
        let selection = Selection { users: vec![54_321], cgroups: Vec::new() };
        Plan::new("a.toml", &listeners, routes, selection, None).map_err(|error| error.to_string())
    }

    #[test]
    fn each_route_gets_the_listener_of_its_family_and_the_first_of_a_network_counts() {
        let routes = [
            route("10.1.2.3", 16, Some(5_432), "warehouse"),
            route("2001:db8::", 32, None, "lake"),
            route("10.1.0.0", 16, Some(5_432), "other"),
        ];
        let plan = plan(&["[::1]:15001", "127.0.0.1:15002"], &routes).expect("a plan");
        let told: Vec<_> =
            plan.redirections.iter().map(|one| format!("{} {} {}", one.network, one.listener, one.upstream)).collect();
        assert_eq!(told, ["10.1.0.0/16 127.0.0.1:15002 warehouse", "2001:db8::/32 [::1]:15001 lake"]);
    }

    #[test]
    fn what_is_missing_in_the_rules_is_named() {
        let routes = [route("10.1.2.3", 32, None, "w")];
        let both = ["127.0.0.1:15001", "[::1]:15001"];
        for (listeners, routes, part) in [
            (&[][..], &routes[..], "add redirect ="),
            (&both[..], &[], "[[route]]\n"),
            (&both[1..], &routes[..], "add \"127.0.0.1:15001\" to `redirect`"),
            (&both[..1], &[route("2001:db8::1", 128, None, "w")], "add \"[::1]:15001\" to `redirect`"),
            (&both[..], &[route("127.0.0.1", 32, None, "w")], "loopback is never redirected"),
        ] {
            let error = plan(listeners, routes).expect_err(part);
            assert!(error.starts_with("a.toml: ") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn who_serves_the_listener_is_not_redirected_to_it() {
        let server = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = server.local_addr().expect("its address").to_string();
        let mut plan = plan(&[&address], &[route("10.1.2.3", 32, None, "w")]).expect("a plan");
        assert_eq!(plan.refuse_loop().expect("54321 serves nothing"), []);
        plan.selection.users.push(std::fs::metadata("/proc/self").expect("proc").uid());
        let error = plan.refuse_loop().expect_err("we serve it").to_string();
        assert!(error.contains(&address) && error.contains("come back"), "{error}");
        drop(server);
        assert_eq!(plan.refuse_loop().expect("nobody serves it").len(), 1);
    }
}
