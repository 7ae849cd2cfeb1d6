//! Two real Consul datacenters, federated over loopback: dc1 is the primary, dc2 the secondary. No ACLs: what no intention
//! denies is allowed.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::super::http::Client;
use super::super::{Mesh, PATIENCE, ports, wait_for};
use super::{Node, rotate_ca};

pub struct Federation {
    /// dc1.
    pub primary: Datacenter,
    /// dc2.
    pub secondary: Datacenter,
}

/// One datacenter: a server agent that its services register at.
pub struct Datacenter {
    pub name: &'static str,
    node: Node,
}

impl Federation {
    /// Starts both; they know each other and share one CA.
    pub fn start() -> Self {
        let wan = [ports::free(), ports::free()];
        let primary = Datacenter::launch("dc1", wan[0], wan[1]);
        let secondary = Datacenter::launch("dc2", wan[1], wan[0]);
        let federation = Self { primary, secondary };
        federation.wait_ready();
        federation
    }

    fn wait_ready(&self) {
        wait_for("two federated datacenters", PATIENCE * 2, || {
            let domains = (self.primary.federated_trust_domain()?, self.secondary.federated_trust_domain()?);
            if domains.0 == domains.1 { Ok(()) } else { Err(format!("two trust domains: {domains:?}")) }
        });
    }
}

impl Datacenter {
    fn launch(name: &'static str, wan: u16, other_wan: u16) -> Self {
        let mut node = Node::new(&format!("server {name}"));
        node.configure(
            &json!({"server": true, "bootstrap_expect": 1, "connect": {"enabled": true}, "performance": {"raft_multiplier": 1},
                "datacenter": name, "primary_datacenter": "dc1", "enable_central_service_config": true,
                "ports": {"serf_wan": wan}, "retry_join_wan": [format!("127.0.0.1:{other_wan}")], "retry_interval_wan": "1s"}),
            ports::free(),
        );
        node.start();
        Self { name, node }
    }

    /// The trust domain, once the CA is up and the nodes of both datacenters can be listed from here.
    fn federated_trust_domain(&self) -> Result<String, String> {
        let client = self.client();
        let ask = |path: &str| {
            let answer = client.try_get(path).map_err(|error| format!("{}: {error}", self.name))?;
            match serde_json::from_str::<Value>(&answer.body) {
                Ok(json) if answer.status == 200 => Ok(json),
                _ => Err(format!("{}: {path}: {}\n{}", self.name, answer.body, self.node.tail())),
            }
        };
        for datacenter in ["dc1", "dc2"] {
            let nodes = ask(&format!("/v1/catalog/nodes?dc={datacenter}"))?;
            if nodes.as_array().is_none_or(Vec::is_empty) {
                return Err(format!("{}: no node of {datacenter} in the catalog", self.name));
            }
        }
        let roots = ask("/v1/agent/connect/ca/roots")?;
        let domain = roots["TrustDomain"].as_str().filter(|domain| !domain.is_empty());
        domain.map(str::to_owned).ok_or_else(|| format!("{}: no CA yet: {roots}", self.name))
    }
}

impl Mesh for Datacenter {
    fn address(&self) -> SocketAddr {
        self.node.http
    }

    fn client(&self) -> Client {
        Client::new(self.address(), None)
    }

    fn token(&self, _service: &str) -> Option<String> {
        None
    }

    fn rotate_ca(&self) {
        rotate_ca(&self.client());
    }
}
