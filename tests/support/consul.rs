//! Real Consul 1.8.7 with ACLs that deny by default: one agent that is the server too, or a server and a client agent.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::http::Client;
use super::{Mesh, PATIENCE, Process, ports, wait_for};

mod federation;
pub use federation::{Datacenter, Federation};

pub struct Consul {
    server: Node,
    client: Option<Node>,
    management: String,
}

/// See [`Consul::at_server`].
pub struct AtServer {
    http: SocketAddr,
    management: String,
}

impl Mesh for AtServer {
    fn address(&self) -> SocketAddr {
        self.http
    }

    fn client(&self) -> Client {
        Client::new(self.http, Some(&self.management))
    }

    fn token(&self, service: &str) -> Option<String> {
        Some(make_token(self, service))
    }

    fn rotate_ca(&self) {
        rotate_ca(&self.client());
    }
}

/// One Consul process, which can be killed and started again with its data and ports.
pub struct Node {
    name: String,
    http: SocketAddr,
    serf: SocketAddr,
    process: Option<Process>,
    /// Last, so that the log is still there when the process tells its end.
    folder: tempfile::TempDir,
}

impl Consul {
    /// The binary.
    pub fn binary() -> PathBuf {
        super::tool(super::cache().join("consul-1.8.7/usr/bin/consul"))
    }

    /// One agent that is also the server.
    pub fn start() -> Self {
        Self::launch(false)
    }

    /// A server, and a client agent that everything local talks to.
    pub fn start_with_client_agent() -> Self {
        Self::launch(true)
    }

    /// The server's process.
    pub fn server(&mut self) -> &mut Node {
        &mut self.server
    }

    /// The agent's process: the client agent where there is one.
    pub fn agent(&mut self) -> &mut Node {
        self.client.as_mut().unwrap_or(&mut self.server)
    }

    /// The mesh as a service on the server's host sees it.
    pub fn at_server(&self) -> AtServer {
        AtServer { http: self.server.http, management: self.management.clone() }
    }

    /// A token made of `body`: `ServiceIdentities`, `Policies`. Gives (accessor, secret).
    pub fn make_token(&self, body: &Value) -> (String, String) {
        let token = self.client().put("/v1/acl/token", body).ok("creation of a token").json();
        let text = |key: &str| token[key].as_str().expect("part of a token").to_owned();
        (text("AccessorID"), text("SecretID"))
    }

    pub fn delete_token(&self, accessor: &str) {
        self.client().delete(&format!("/v1/acl/token/{accessor}")).ok("deletion of a token");
    }

    /// Waits until the agent answers with the management token and the CA is up.
    pub fn wait_ready(&self) {
        let client = self.client();
        wait_for("Consul is ready", PATIENCE * 2, || {
            for path in ["/v1/acl/token/self", "/v1/agent/self"] {
                let answer = client.try_get(path)?;
                if answer.status != 200 {
                    return Err(format!("{path}: {}\n{}", answer.body, self.server.tail()));
                }
            }
            // Not /v1/connect/ca/configuration: before the CA is up, that question makes a 1.8.7 server panic.
            let roots = client.try_get("/v1/agent/connect/ca/roots")?;
            if roots.status != 200 || roots.json()["TrustDomain"].as_str().is_none_or(str::is_empty) {
                return Err(format!("no CA yet: {}\n{}", roots.body, self.server.tail()));
            }
            // A node that is not in the catalog yet has no healthy services.
            let nodes = client.try_get("/v1/catalog/nodes")?;
            let expected = 1 + usize::from(self.client.is_some());
            let count = serde_json::from_str::<Value>(&nodes.body).ok().and_then(|list| Some(list.as_array()?.len()));
            if count == Some(expected) { Ok(()) } else { Err(format!("{expected} nodes in the catalog: {}", nodes.body)) }
        });
    }

    fn launch(with_client: bool) -> Self {
        let management = uuid::Uuid::new_v4().to_string();
        let rpc = ports::free();
        let acl = json!({"enabled": true, "default_policy": "deny", "tokens": {"master": management, "agent": management}});
        let mut server = Node::new("server");
        server.configure(
            &json!({"server": true, "bootstrap_expect": 1, "acl": acl, "connect": {"enabled": true},
                "performance": {"raft_multiplier": 1}}),
            rpc,
        );
        server.start();
        let client = with_client.then(|| {
            let mut client = Node::new("client");
            client.configure(
                &json!({"server": false, "acl": acl, "retry_join": [server.serf.to_string()], "retry_interval": "1s",
                    "connect": {"enabled": true}}),
                rpc,
            );
            client.start();
            client
        });
        let consul = Self { server, client, management };
        consul.wait_ready();
        consul
    }
}

impl Node {
    fn new(name: &str) -> Self {
        let (http, serf) = (ports::free_address(), ports::free_address());
        Self { name: format!("consul {name}"), http, serf, process: None, folder: super::scratch() }
    }

    /// Writes the configuration that all share, changed by `role`: an object in it adds to the one that is there.
    fn configure(&self, role: &Value, rpc: u16) {
        let mut config = json!({
            "node_name": self.name.replace(' ', "-"), "datacenter": "dc1", "data_dir": self.folder.path().join("data"),
            "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1", "log_level": "info", "disable_update_check": true,
            "leave_on_terminate": false,
            "ports": {"http": self.http.port(), "serf_lan": self.serf.port(), "serf_wan": -1, "server": rpc, "dns": -1, "grpc": -1},
        });
        for (key, value) in role.as_object().expect("a role") {
            match (config.get_mut(key).and_then(Value::as_object_mut), value) {
                (Some(known), Value::Object(more)) => known.extend(more.clone()),
                _ => config[key] = value.clone(),
            }
        }
        std::fs::write(self.folder.path().join("config.json"), config.to_string()).expect("configuration of Consul");
    }

    /// Starts it, or starts it again after [`Node::kill`].
    pub fn start(&mut self) {
        let mut command = Command::new(Consul::binary());
        command.args(["agent", "-config-file"]).arg(self.folder.path().join("config.json"));
        self.process = Some(Process::start_logged(&self.name, &command, &self.folder.path().join("consul.log")));
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.take().expect("a running Consul").kill();
    }

    fn tail(&self) -> String {
        self.process.as_ref().map_or_else(String::new, Process::tail)
    }
}

impl Mesh for Consul {
    fn address(&self) -> SocketAddr {
        self.client.as_ref().unwrap_or(&self.server).http
    }

    fn client(&self) -> Client {
        Client::new(self.address(), Some(&self.management))
    }

    fn token(&self, service: &str) -> Option<String> {
        Some(make_token(self, service))
    }

    fn rotate_ca(&self) {
        rotate_ca(&self.client());
    }
}

/// A token with the identity of `service`, once the agent of `mesh` knows it.
fn make_token(mesh: &dyn Mesh, service: &str) -> String {
    let body = json!({"ServiceIdentities": [{"ServiceName": service}]});
    let token = mesh.client().put("/v1/acl/token", &body).ok("creation of a token").json();
    let secret = token["SecretID"].as_str().expect("a token's secret").to_owned();
    // A client agent that has just started knows no new token for a moment: it still resolves ACLs in the old way.
    let client = Client::new(mesh.address(), Some(&secret));
    let question = json!({"Target": service, "ClientCertURI": "spiffe://nobody.consul/ns/default/dc/dc1/svc/nobody"});
    wait_for("the agent knows the new token", PATIENCE, || {
        let answer = client.try_post("/v1/agent/connect/authorize", &question)?;
        if answer.status == 200 { Ok(()) } else { Err(answer.body) }
    });
    secret
}

/// A new key makes a new root.
fn rotate_ca(client: &Client) {
    let key = rcgen::KeyPair::generate().expect("a key for the new root").serialize_pem();
    let body = json!({"Provider": "consul", "Config": {"LeafCertTTL": "72h", "PrivateKey": key, "RootCert": ""}});
    client.put("/v1/connect/ca/configuration", &body).ok("rotation of the CA");
}
